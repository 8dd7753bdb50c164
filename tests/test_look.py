"""The microscope: what it notes is what direct definitions give and what the layers used, what the
page holds is that, rounded as said, and in a real browser a token that is pointed at changes it.
"""

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from browser import browser
from test_sample import greedy, prompts, tiny
from test_speculate import agreeable

import chat
import checkpoint
import data
import decode
import hf
import look
import tokenizer
from classroom import microscope, watch
from latent_moe import relu2
from mamba import ssd_chunked, ssd_recurrent
from model import Config, Nemotron
from quant import packed
from speculate import Tally, rounds

PATTERN = "ME*-M*E"
ENC = chat.with_special(data.tokenizer("bytes"))


@pytest.fixture(scope="module")
def model():
    return tiny(PATTERN)


@pytest.fixture(scope="module")
def ids():
    return prompts(19, seed=3)[0]


@pytest.fixture(scope="module")
def record(model, ids):
    return watch.watch(model, ids, 5)


@pytest.fixture(scope="module")
def inside(model, ids):
    """What went into and came out of every mixer, by hooks of this test's own."""
    seen, hooks = {}, []
    for i, block in enumerate(model.backbone.layers):
        note = lambda m, args, out, i=i: seen.update({i: (args[0], out)})
        hooks.append(block.mixer.register_forward_hook(note))
    with torch.no_grad():
        model(torch.tensor([ids]))
    [h.remove() for h in hooks]
    return seen


# ---- what is noted, and what it should be


def test_probabilities_are_softmax_of_the_logits_of_what_came_before(model, ids, record):
    """Each prefix is read alone, and sorted in plain Python."""
    assert math.isnan(record.probability[0]) and record.rank[0] == 0
    for i in range(1, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:i]]))[0, -1].tolist()
        weights = [math.exp(x) for x in logits]
        p = [w / sum(weights) for w in weights]
        order = sorted(range(len(p)), key=lambda t: -p[t])
        assert float(record.probability[i]) == pytest.approx(p[ids[i]], rel=1e-9)
        assert int(record.rank[i]) == order.index(ids[i]) + 1
        assert record.best[i].tolist() == order[:5]
        assert record.best_probability[i].tolist() == pytest.approx([p[t] for t in order[:5]])


def test_half_lives_halve(model, record, inside):
    """After so many tokens of the same dt half of a memory is left: dt from the mixer's input by
    the formula, and the state of the recurrence itself.
    """
    layers = [i for i, x in enumerate(PATTERN) if x == "M"]
    assert sorted(record.half_lives) == layers
    for i in layers:
        mixer = model.backbone.layers[i].mixer
        u, _ = inside[i]
        with torch.no_grad():
            raw = mixer.in_proj(u)[0, :, -mixer.split[2] :]
            dt, A = (1 + (raw + mixer.dt_bias).exp()).log(), -mixer.A_log.exp()
            found = record.half_lives[i]
            assert torch.allclose((dt * A * found).exp(), torch.tensor(0.5).double())
            t, h = dt.shape
            x = torch.zeros(1, t, h, 1).double()
            x[:, 4] = 1  # one write, at token 4
            one = torch.ones(1, t, 1, 1).double()
            for end in (5, 9, t):
                _, S = ssd_recurrent(x[:, :end], dt[None, :end], A, one[:, :end], one[:, :end])
                left = S[0, :, 0, 0] / dt[4]
                halvings = (1 / found[5:end]).sum(0)
                assert torch.allclose(left, 2**-halvings)


def test_attention_rows_are_what_the_layer_used(model, ids, monkeypatch):
    """Rows sum to 1, see nothing later, and times the values give what `attend` gave."""
    used = {}
    for i, block in enumerate(model.backbone.layers):
        if PATTERN[i] == "*":

            def attend(q, k, v, first, i=i, inner=block.mixer.attend):
                used[i] = v, inner(q, k, v, first)
                return used[i][1]

            monkeypatch.setattr(block.mixer, "attend", attend)
    record = watch.watch(model, ids, 5)
    assert sorted(used) == sorted(record.weights) == [2, 5]
    for i, weights in record.weights.items():
        v, y = used[i]
        assert torch.allclose(weights.sum(-1), torch.ones(4, 19).double())
        assert not weights.triu(1).any() and bool((weights >= 0).all())
        both = v[0].repeat_interleave(2, 0)  # 4 query heads share 2 of values
        assert torch.allclose(weights @ both, y[0])


def test_the_chosen_experts_are_those_the_layer_used(model, record, inside):
    """The layer's output again, from the noted experts and shares alone; and the router's own
    choice, sorted in plain Python.
    """
    layers = [i for i, x in enumerate(PATTERN) if x == "E"]
    assert sorted(record.picks) == layers == sorted(record.shares)
    for i in layers:
        moe = model.backbone.layers[i].mixer
        u, y = (x[0] for x in inside[i])
        with torch.no_grad():
            score = moe.gate(u) + moe.gate.e_score_correction_bias
            c = moe.fc1_latent_proj(u)
            for t, (pick, share) in enumerate(zip(record.picks[i].tolist(), record.shares[i])):
                best = sorted(range(8), key=lambda e: -score[t, e])[:3]
                assert sorted(best) == sorted(pick) and share.tolist() == sorted(
                    share.tolist(), reverse=True
                )
                assert float(share.sum()) == pytest.approx(1)
                routed = sum(
                    s * moe.scale * moe.experts.down_proj[e] @ relu2(moe.experts.up_proj[e] @ c[t])
                    for e, s in zip(pick, share)
                )
                got = moe.fc2_latent_proj(routed) + moe.shared_experts(u[t])
                assert torch.allclose(got, y[t])


def test_watching_changes_nothing_and_leaves_nothing(ids):
    model = tiny(PATTERN)
    before = [dict(vars(m)) for m in model.modules()]
    with torch.no_grad():
        want = model(torch.tensor([ids]))
        with watch.noted(model):
            assert torch.equal(model(torch.tensor([ids])), want)
        with pytest.raises(KeyError), watch.noted(model):
            raise KeyError
    assert model.backbone.layers[0].mixer.scan is ssd_chunked
    after = [vars(m) for m in model.modules()]
    for old, new in zip(before, after):
        assert {k: v for k, v in old.items() if k[0] != "_"} == {
            k: v for k, v in new.items() if k[0] != "_"
        }
        assert not new["_forward_pre_hooks"]
    with pytest.raises(ValueError, match="a text of 1 token"):
        watch.watch(model, [3], 1)


@pytest.mark.parametrize("d", [1, 3, 7])
def test_fates_are_what_drafting_did(d):
    """The greedy text, every draft that stood and every one that fell, by their definition."""
    model, (row,) = agreeable(scale=0.1), prompts(5)
    text, tally = greedy(model, row, 60), Tally(d)
    got = [t for some in rounds(model, [row], 60, d, tally=tally) for t in some[0]]
    record = watch.watch(model, row + got, 5, tally.drafted)
    assert row + got == text and 5 not in record.fates
    assert sorted(record.fates) == list(range(6, 65))
    logits = model(torch.tensor([text]))[0].detach()
    for i, fate in record.fates.items():
        assert fate.of == d and 0 <= fate.place <= d
        before = record.fates.get(i - 1, watch.Fate(0, d))
        assert not fate.place or before.place == fate.place - 1  # a round ends with place 0
        if fate.fell:
            assert fate.fell[0] != text[i]
            p = logits[i - 1].softmax(-1)[fate.fell[0]]
            assert fate.probability == pytest.approx(float(p), rel=1e-4)
    stood = Counter(fate.place for fate in record.fates.values() if fate.place)
    cut = sum(n for (_,), (n,) in tally.drafted) - sum(stood.values())
    assert 0 <= cut <= d  # the last round may have gone beyond the text
    assert sum(tally.stood[1:]) - cut == sum(stood.values()) > 5
    assert any(fate.fell for fate in record.fates.values())


def judged(model, text, i, drafts):
    """The MTP block's probability of each of its drafts of a round that follows text[:i], and their
    experts: by definition, the whole text and the drafts read in one pass, without a cache.
    """
    embed, picks, out = model.backbone.embeddings, [], []
    block = next(b.mixer for b in model.mtp.layers if hasattr(b.mixer, "experts"))
    hook = block.experts.register_forward_pre_hook(lambda m, args: picks.append(args[1][-1]))
    row = torch.tensor([text[:i]])
    with torch.no_grad():
        h = model.hidden(row)[:, :-1]  # of each token but the last, which the block is told
        told = row[:, 1:]
        for token in drafts:
            state = model.mtp(h, embed(told))[:, -1:]
            p = model.logits(state)[0, -1].softmax(-1)[token]
            out.append((float(p), sorted(picks[-1].tolist())))
            h = torch.cat([h, state], 1)
            told = torch.cat([told, torch.tensor([[token]])], 1)
    hook.remove()
    return out


@pytest.mark.parametrize("d", [1, 3])
def test_a_draft_knows_how_sure_its_block_was_and_whom_it_asked(d):
    model, (row,), tally = agreeable(scale=0.1), prompts(5), Tally(d)
    with watch.drafting(model) as passes:
        got = [t for some in rounds(model, [row], 40, d, tally=tally) for t in some[0]]
    record = watch.watch(model, row + got, 5, tally.drafted, passes)
    seen, at = set(), 6
    for (drafts,), (stood,) in tally.drafted:
        want = judged(model, row + got, at, drafts)
        for i in range(at, min(at + stood + 1, 45)):
            fate = record.fates[i]
            if fate.place or fate.fell:
                p, experts = want[fate.place - 1 if fate.place else stood]
                ((pick, share),) = fate.draft.experts
                assert fate.draft.sure == pytest.approx(p, rel=1e-4)
                assert sorted(pick.tolist()) == experts and float(share.sum()) == pytest.approx(1)
                seen.add((fate.place, bool(fate.fell)))
        at += stood + 1
    assert {(1, False), (min(d, 2), False), (0, True)} <= seen
    assert not model.mtp._forward_hooks  # and it leaves nothing behind


def test_habits_and_kinds(record):
    kinds = [watch.kind(bytes([t + 95])) for t in record.ids]
    for picks in record.picks.values():
        for row, (i, pick) in zip(watch.habit(picks, kinds).tolist(), enumerate(picks.tolist())):
            same = [j for j in range(i) if kinds[j] == kinds[i]]
            for x, e in zip(row, pick):
                want = sum(e in picks[j].tolist() for j in same) / len(same) if same else math.nan
                assert x == pytest.approx(want, nan_ok=True)
    named = {
        "line end": [b"\n", b"\n    ", b" \r\n"],
        "blank": [b" ", b"\t", b"    "],
        "word": [b"def", b" self", b"_x1", "é".encode()],
        "number": [b"7", b" 42nd"],
        "sign": [b"(", b" ->", b'"""'],
        "part of a character": [b"\xc3", b"\xa9x"],
    }
    for name, raws in named.items():
        assert {watch.KINDS[watch.kind(raw)] for raw in raws} == {name}
    assert watch.kind(b"<think>", special=True) == watch.kind(b"\xff", special=True) == 0


# ---- the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on disk that nobody had to train."""
    model = tiny("ME*M", torch.float32, vocab_size=270, num_nextn_predict_layers=1)
    path = tmp_path_factory.mktemp("runs") / "some"
    saved = dict(model=model.state_dict(), config=asdict(model.config), step=7)
    checkpoint.save(path, 7, saved | dict(tokenizer=data.pack(ENC)))
    return path


def made(folder, *argv, prompt="def f(x):", out="p.html"):
    """Runs the program -> the page's path, and the record it holds."""
    path = folder / out
    look.main(["--run", str(folder), "--prompt", prompt, "--out", str(path), "--seed", "1", *argv])
    text = path.read_text(encoding="utf-8")
    (known,) = re.findall(r'<script type="application/json" id="record">(.*?)</script>', text)
    return path, json.loads(known)


def unpacked(coded, two=False):
    raw = microscope.base64.b64decode(coded)
    return [a + 256 * b for a, b in zip(raw[::2], raw[1::2])] if two else list(raw)


def test_the_page_holds_the_record(model, ids, record):
    """To the steps that microscope.py promises."""
    spell = lambda t: bytes([t + 95])
    plain = json.loads(json.dumps(microscope.plain(record, spell, {3}, model.config)))
    assert plain["tokens"] == [chr(t + 95) if t + 95 < 128 else f"\\x{t + 95:02x}" for t in ids]
    assert [k == 0 for k in plain["kinds"]] == [t == 3 for t in ids]
    assert plain["p"][0] is None and plain["rank"] == record.rank.tolist()
    assert plain["p"][1:] == pytest.approx(record.probability[1:].tolist(), rel=1e-3)
    assert "".join(one["letter"] for one in plain["layers"]) == PATTERN
    for i, one in enumerate(plain["layers"]):
        if one["letter"] == "M":
            octaves = [x / 8 - 8 for x in unpacked(one["half"])]
            assert octaves == pytest.approx(
                record.half_lives[i].log2().flatten().tolist(), abs=1 / 16 + 1e-6
            )
        elif one["letter"] == "E":
            assert unpacked(one["picks"], two=True) == record.picks[i].flatten().tolist()
            shares = [x / 255 for x in unpacked(one["shares"])]
            assert shares == pytest.approx(record.shares[i].flatten().tolist(), abs=1 / 500)
            want = watch.habit(record.picks[i], plain["kinds"]).flatten().tolist()
            for code, x in zip(unpacked(one["habit"]), want):
                assert code == 255 if math.isnan(x) else code / 254 == pytest.approx(x, abs=1 / 500)
        elif one["letter"] == "*":
            weights = torch.zeros(19, 4, 19).double()
            at = torch.tensor(unpacked(one["at"], two=True)).view(19, 4, 19)
            coded = torch.tensor(unpacked(one["weight"])).double().view(19, 4, 19) / 255
            weights.scatter_add_(2, at, coded)
            assert torch.allclose(weights.transpose(0, 1), record.weights[i], atol=1 / 500)


def test_a_page_of_the_toy_is_small(tmp_path):
    model = Nemotron(Config.preset("toy")).eval()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2048, (250,), generator=g).tolist()
    record = watch.watch(model, ids, 50)
    page = microscope.page(record, lambda t: b"token", set(), model.config, "about")
    assert 100_000 < len(page.html().encode()) < 1_000_000


def test_every_flag_reaches_the_page(folder, tmp_path, capsys):
    base = ["--max-new-tokens", "12"]
    first = made(folder, *base)[1]
    assert len(first["tokens"]) == 9 + 12 and first["start"] == 9 and not first["fates"]
    assert made(folder, *base)[1] == first  # a seed is a text
    for argv in (["--seed=2"], ["--temperature=0"], ["--top-p=1e-6"], ["--top-k=1"]):
        assert made(folder, *base, *argv)[1]["tokens"] != first["tokens"], argv
    assert len(made(folder, "--max-new-tokens=0")[1]["tokens"]) == 9
    assert made(folder, *base, prompt="abc")[1]["tokens"][:3] == ["a", "b", "c"]
    (folder / "q.txt").write_text("from a file", encoding="utf-8")
    given = made(folder, *base, "--prompt-file", str(folder / "q.txt"))[1]
    assert "".join(given["tokens"]).startswith("from a file")
    drafted = made(folder, *base, "--temperature=0", "--speculate=3")[1]
    assert drafted["tokens"] == made(folder, *base, "--temperature=0")[1]["tokens"]
    assert {fate["of"] for fate in drafted["fates"].values()} == {3}
    asked = made(folder, *base, "--chat", prompt="hi")[1]
    want = chat.render([dict(role="user", content="hi")], generate=True)
    assert "".join(asked["tokens"]).startswith(want) and asked["kinds"][0] == 0
    quiet = made(folder, *base, "--chat", "--think=off", prompt="hi")[1]
    assert "".join(quiet["tokens"]).startswith(
        chat.render([dict(role="user", content="hi")], generate=True, thinking=False)
    )
    mark = next(t for t in first["tokens"][12:] if len(t) == 1 and t.isascii() and t.isprintable())
    stopped = made(folder, *base, "--stop", mark)[1]["tokens"]
    assert stopped == first["tokens"][: 1 + first["tokens"].index(mark, 9)]
    said = capsys.readouterr().out
    assert "p.html: 21 tokens, 0 of them drafted, " in said and " bits of surprise a token" in said


def test_a_released_checkpoint(folder, tmp_path):
    model, *_ = look.sample.load_run(folder)
    hf.save(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.pack(ENC)))
    argv = ["--max-new-tokens", "12", "--temperature", "0"]
    released = made(folder, "--hf", str(tmp_path), *argv)[1]
    assert released == made(folder, *argv)[1]
    half = made(folder, "--hf", str(tmp_path), "--precision=bf16", *argv)[1]
    assert half["p"] != released["p"]


def test_a_quantised_checkpoint_is_watched_as_it_runs(folder):
    """Packed weights; keys and values in E4M3, as a cache holds them; inputs rounded if asked."""
    golden = Path(__file__).parent / "golden" / "quantised" / "mixed"
    model, text = hf.load(golden), [int(t) for t in prompts(12, v=256)[0]]
    assert packed.plan(model)[1]  # it has a cache of codes
    record = watch.watch(model, text, 3)
    for i in range(1, 12):
        with torch.no_grad():
            logits = decode.read(model, model.new_cache(1), [text[:i]])[0]
        p = float(logits.softmax(-1)[text[i]])
        assert float(record.probability[i]) == pytest.approx(p, rel=1e-4)
    with torch.no_grad():
        free = model(torch.tensor([text]))[0, :-1].softmax(-1)
    free = free.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    assert (free / record.probability[1:] - 1).abs().max() > 1e-3  # without the cache's rounding
    argv = ["--hf", str(golden), "--max-new-tokens", "4", "--temperature", "0"]
    plain, lazy, rounded = (
        made(folder, *argv, *more)[1] for more in ((), ("--lazy",), ("--activations",))
    )
    assert plain == lazy != rounded


def test_a_place_where_no_page_can_go_is_known_at_once(tmp_path, monkeypatch):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="a folder has this name"):
        look.place(str(tmp_path / "folder.html"))
    monkeypatch.setattr(look.os, "access", lambda path, how: False)  # root may write anywhere
    with pytest.raises(ValueError, match="nothing may be written into"):
        look.place(str(tmp_path / "page.html"))


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--out", "page.htm"], "a page's name ends with .html"),
        (["--out", "nowhere/p.html"], "there is no folder nowhere"),
        (["--max-new-tokens", "2048"], "a text of 2,057 tokens is more than a page holds, 2,048"),
        (["--prompt", "a", "--max-new-tokens", "0"], "a text of one token"),
        (["--think", "low"], "--think low is for --chat"),
        (["--speculate", "0x"], "is not spelled as auto|0|[1-9][0-9]?"),
        (["--activations"], "--lazy and --activations are for a quantised checkpoint"),
        (["--lazy"], "--lazy and --activations are for a quantised checkpoint"),
        (["--device", "tpu"], "tpu"),
        (["--run", "nowhere"], "nowhere holds no checkpoint"),
    ],
    ids=str,
)
def test_mistakes_are_named(folder, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        look.main(["--run", str(folder), "--prompt", "def f(x):", *argv])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


# ---- in a browser

LIGHT = "return [...document.querySelectorAll('#text span')].map(x => +x.dataset.light)"
PANEL = "return document.getElementById('panel').innerText"


def left(layer, i, head):
    """What a head of six has left of each token of 39 once token i is read: half-lives, added."""
    half = [2 ** (x / 8 - 8) for x in unpacked(layer["half"])][head::6]
    return [2 ** -sum(1 / h for h in half[j + 1 : i + 1]) if j <= i else 0 for j in range(39)]


def test_a_token_that_is_pointed_at_lights_up(folder, tmp_path):
    path, known = made(folder, "--max-new-tokens=30", "--temperature=0", "--speculate=2")
    layers = {one["letter"]: one for one in known["layers"]}
    with browser(tmp_path / "b", 1280, 900) as b:
        b.open(path)
        assert b.run("return document.querySelectorAll('#text span').length") == 39
        before = b.run(PANEL)
        b.hover("#token-20")
        panel = b.run(PANEL)
        assert "token 9 of 39" in before and "token 20 of 39, written" in panel
        rank = known["rank"][20]
        assert ("the likeliest" if rank == 1 else f"rank {rank} of 270") in panel
        surprise = [min(1, -math.log2(max(p or 1, 1e-12)) / 10) for p in known["p"]]
        assert b.run(LIGHT) == pytest.approx(surprise, abs=1e-4)

        b.click("[data-lens=memory]")
        each = [
            left(one, 20, h) for one in known["layers"] if one["letter"] == "M" for h in range(6)
        ]
        assert b.run(LIGHT) == pytest.approx([sum(x) / 12 for x in zip(*each)], abs=1e-4)
        b.hover(".heads i")
        assert "What head 0 of layer 0 still has" in b.run("return caption.textContent")
        assert b.run(LIGHT) == pytest.approx(each[0], abs=1e-4)
        b.click("[data-lens=attention]")
        each = layers["*"]["keep"] * layers["*"]["heads"]
        at = unpacked(layers["*"]["at"], two=True)[20 * each : 21 * each]
        weight = unpacked(layers["*"]["weight"])[20 * each : 21 * each]
        want = [sum(w for j, w in zip(at, weight) if j == i) / 255 / 4 for i in range(39)]
        assert b.run(LIGHT) == pytest.approx(want, abs=1e-4)

        b.click(".chip")  # the first expert of the first MoE layer, kept when the pointer leaves
        picks, each = unpacked(layers["E"]["picks"], two=True), layers["E"]["each"]
        shares = unpacked(layers["E"]["shares"])
        chosen = picks[20 * each]
        want = [0.0] * 39
        for n, e in enumerate(picks):
            want[n // each] += shares[n] / 255 * (e == chosen)
        b.hover("h1")
        assert b.run(LIGHT) == pytest.approx(want, abs=1e-4)
        assert f"expert {chosen} of layer 1" in b.run("return caption.textContent")
        b.hover("#token-5")
        assert "token 20 of 39" in b.run(PANEL)  # held by the click
        b.screenshot(tmp_path / "shot.png")
        seen = b.look()
    assert (tmp_path / "shot.png").stat().st_size > 20_000
    assert seen["window"] == 1280 >= seen["wide"] and not seen["fetched"]


def test_drafts_are_marked(folder, tmp_path):
    path, known = made(folder, "--max-new-tokens=30", "--temperature=0", "--speculate=2")
    with browser(tmp_path / "b") as b:
        b.open(path)
        marks = b.run("return [...document.querySelectorAll('#text span')].map(x => x.className)")
        for i, mark in enumerate(marks):
            fate = known["fates"].get(str(i), dict(place=0, fell=[]))
            assert ("stood" in mark) == (fate["place"] > 0), i
            assert ("fell" in mark) == bool(fate["fell"]), i
            assert ("given" in mark) == (i < 9)
        i = next(i for i, mark in enumerate(marks) if "fell" in mark)
        b.click(f"#token-{i}")
        said = b.run("return document.getElementById('draft').textContent")
        fate = known["fates"][str(i)]
        assert " fell here. The MTP block gave it " in said and ", the model " in said
        chips = b.run("return [...document.querySelectorAll('.drafters .asked')].map(x => x.title)")
        ((picks, shares),) = fate["experts"]
        assert [int(re.match(r"expert (\d+) of the MTP", t)[1]) for t in chips] == picks
        assert len(picks) == 3 and sum(shares) == pytest.approx(1, abs=0.02)
        assert b.run("return document.getElementById('legend').innerText").count("draft") == 2


def test_a_phone_and_the_keyboard(folder, tmp_path):
    path, _ = made(folder, "--max-new-tokens=60")
    with browser(tmp_path / "b", 390, 844, mobile=True) as b:
        b.open(path)
        b.click("#token-3")
        assert "token 3 of 69, given" in b.run(PANEL)
        press = "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))"
        b.run(press, "ArrowRight")
        assert "token 4 of 69" in b.run(PANEL)
        b.run(press, "ArrowLeft")
        b.run(press, "ArrowLeft")
        assert "token 2 of 69" in b.run(PANEL)
        seen = b.look()
        box = "const r = document.getElementById('panel').getBoundingClientRect(); "
        top, bottom = b.run(box + "return [r.top, r.bottom]")
        assert 300 < top < bottom <= 845  # the panel is the lower half, the text above it
    assert seen["window"] == 390 >= seen["wide"]


def test_text_stays_text(folder, tmp_path):
    evil = "</script><img src=x onerror=\"document.title='taken'\"><b>"
    path, known = made(folder, "--max-new-tokens=2", prompt=evil)
    assert "".join(known["tokens"]).startswith(evil)
    with browser(tmp_path / "b") as b:
        b.open(path)
        assert b.run("return document.title") == "What the model did, token by token"
        assert b.run("return document.querySelectorAll('img, b:not(.guess b)').length") == 0
        assert b.run("return document.getElementById('text').textContent").startswith(evil)


def test_this_file_can_fail(model, ids, record, inside, monkeypatch):
    """A half-life in base e, a router without its bias, and weights of the wrong scale are seen."""
    wrong = record._replace(half_lives={i: x / math.log(2) for i, x in record.half_lives.items()})
    with pytest.raises(AssertionError):
        test_half_lives_halve(model, wrong, inside)
    wrong = record._replace(picks={i: (x + 1) % 8 for i, x in record.picks.items()})
    with pytest.raises(AssertionError):
        test_the_chosen_experts_are_those_the_layer_used(model, wrong, inside)
    with pytest.raises(AssertionError):
        test_probabilities_are_softmax_of_the_logits_of_what_came_before(
            model, ids, record._replace(rank=record.rank + 1)
        )
    plain = watch.attention_weights
    monkeypatch.setattr(watch, "attention_weights", lambda q, k: plain(2 * q, k))
    with pytest.raises(AssertionError):
        test_attention_rows_are_what_the_layer_used(model, ids, monkeypatch)
