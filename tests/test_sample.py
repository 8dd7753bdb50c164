"""sample.py promises that the cache, the padding and the chunks of a prompt change nothing; here it
is held to that.
"""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import rms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import AWKWARD

import checkpoint
import data
import decode
import graph
import sample
from decode import choose, probabilities, stream
from model import Config, Nemotron
from sample import generate

TINY = dict(AWKWARD, num_nextn_predict_layers=0, initializer_range=0.3)


def tiny(pattern="ME*-M*E", dtype=torch.float64, **kw):
    """Awkward sizes, weights so large that every mixer matters, and in fp64 no ties."""
    model = Nemotron(Config(**{**TINY, "hybrid_override_pattern": pattern, **kw})).to(dtype).eval()
    for name, p in model.named_parameters():
        if name.endswith("dt_bias"):
            p.data += 3
    return model


def prompts(*lengths, v=31, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(v, (n,), generator=g).tolist() for n in lengths]


def greedy(model, row, n):
    """The definition: run the whole sequence again for every token, and take the best."""
    row = list(row)
    with torch.no_grad():
        for _ in range(n):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row


# ---- choosing a token


def nucleus(logits, temperature, top_p, top_k):
    """Temperature, top-k and top-p in plain Python, on a list of numbers; and how far the nearest
    decision was from a tie.
    """
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = (
        [i for i in order if logits[i] >= logits[order[top_k - 1]]]
        if 0 < top_k < len(order)
        else order
    )  # ties all stay
    weight = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in kept]
    p, before, result, margin = [w / sum(weight) for w in weight], 0, [0.0] * len(logits), 1.0
    for i, x in zip(kept, p):
        if before < top_p or top_p == 1:
            result[i] = x
        margin, before = min(margin, abs(before - top_p)), before + x
    return [x / sum(result) for x in result], margin


numbers = st.one_of(
    st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=9),  # many ties
    st.lists(st.integers(-512, 512).map(lambda i: i / 64), min_size=2, max_size=9),
)


@settings(max_examples=200)
@given(
    numbers,
    st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.95, 1.0]),
    st.integers(0, 10),
)
def test_probabilities_against_plain_python(logits, temperature, top_p, top_k):
    want, margin = nucleus(logits, temperature, top_p, top_k)
    assume(margin > 1e-5 or top_p == 1)
    got = probabilities(torch.tensor([logits, logits[::-1]]), temperature, top_p, top_k)
    assert got[0].tolist() == pytest.approx(want, abs=1e-5) and got.sum(
        1
    ).tolist() == pytest.approx([1, 1])
    assert got[1].tolist() == pytest.approx(
        nucleus(logits[::-1], temperature, top_p, top_k)[0], abs=1e-5
    )  # row by row


@pytest.mark.parametrize(
    "top_p,kept",
    [(0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4), (1.0, 4)],
)
def test_the_token_that_crosses_top_p_stays(top_p, kept):
    p = torch.tensor([[0.15, 0.05, 0.5, 0.3]])
    got = probabilities(p.log(), 1.0, top_p)
    best = p.sort(descending=True).values[:, :kept]
    torch.testing.assert_close(got.sort(descending=True).values[:, :kept], best / best.sum())
    assert int((got > 0).sum()) == kept


def test_ties():
    level = torch.zeros(1, 4)
    assert probabilities(level, top_k=2).tolist() == [
        [0.25] * 4
    ]  # nothing says which two are the best
    assert probabilities(level, top_p=0.5).tolist() == [
        [0.5, 0.5, 0, 0]
    ]  # the fewest that hold a half, the first ones
    assert probabilities(level, top_p=0.1).tolist() == [[1, 0, 0, 0]] and int(choose(level)) == 0
    assert probabilities(torch.tensor([[0.0, 9, 9, 1]]), top_k=1).tolist() == [[0, 0.5, 0.5, 0]]
    for k in (0, 4, 5):  # all of them
        assert probabilities(level, top_k=k).tolist() == [[0.25] * 4]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1, 0, -1, -2, 3]])
    p = probabilities(logits, 1.3, 0.9, 5)[0]
    drawn = (
        choose(logits.expand(20_000, 6), 1.3, 0.9, 5, torch.Generator().manual_seed(0)).bincount(
            minlength=6
        )
        / 20_000
    )
    assert torch.all((drawn - p).abs() <= 4 * (p * (1 - p) / 20_000).sqrt()) and p.min() == 0
    assert choose(torch.tensor([[1.0, 3, 2], [5, 4, 3]])).tolist() == [
        1,
        0,
    ]  # temperature 0 is greedy
    assert choose(logits.bfloat16(), 1.0, 0.5).shape == (1,)


# ---- the cache, the padding and the chunks change nothing


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("pattern", ["ME*-M*E", "M", "*-", "E"])
def test_greedy_is_the_best_token_of_the_whole_forward_every_time(b, pattern):
    model, rows = tiny(pattern), prompts(*[5] * b)
    got = generate(model, torch.tensor(rows), 9)
    assert (
        got.tolist() == [greedy(model, row, 9) for row in rows]
        and len({tuple(r) for r in got.tolist()}) == b
    )


@pytest.mark.parametrize("prefill", [1, 3, 1024])
def test_unequal_prompts_get_what_each_gets_alone(prefill):
    model, rows = tiny(), prompts(1, 7, 4, 12)
    assert generate(model, rows, 8, prefill=prefill) == [greedy(model, row, 8) for row in rows]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = tiny(dtype=dtype)
        with torch.no_grad():
            cache = model.new_cache(4)
            together = decode.read(model, cache, rows, prefill)
            alone = torch.cat([model(torch.tensor([row]))[:, -1] for row in rows])
            assert rms(together, alone) <= tolerance
            token = together.argmax(-1)  # and the step after it
            together = model(token[:, None], cache)[:, -1]
            alone = torch.cat(
                [model(torch.tensor([row + [int(t)]]))[:, -1] for row, t in zip(rows, token)]
            )
            assert rms(together, alone) <= tolerance


@pytest.mark.parametrize("lengths", [(23,), (23, 23), (23, 2, 9)])
def test_the_size_of_prefill_changes_nothing(lengths):
    model, rows = tiny(), prompts(*lengths)
    with torch.no_grad():
        want = decode.read(model, model.new_cache(len(rows)), rows, 1024)
        for prefill in (1, 2, 5, 8, 22, 23, 24):
            assert (
                rms(decode.read(model, model.new_cache(len(rows)), rows, prefill), want) <= 1e-10
            ), prefill
    assert (
        len(
            {
                tuple(map(tuple, generate(model, rows, 6, temperature=1.0, seed=4, prefill=n)))
                for n in (1, 5, 24)
            }
        )
        == 1
    )


@pytest.mark.parametrize("lengths", [(5,), (9, 2, 5)])
@pytest.mark.parametrize("pattern", ["ME*-M*E", "M"])
def test_a_cache_of_fixed_room_changes_nothing(pattern, lengths):
    model = tiny(pattern)
    rows = prompts(*lengths)
    assert generate(model, rows, 12, step=model.forward) == generate(model, rows, 12)


@pytest.mark.parametrize("lengths", [(9, 2, 5), pytest.param((9,), marks=pytest.mark.slow)])
def test_a_compiled_step_gives_the_same_text(lengths):
    """Through the real compiler, on rows of unequal length, which together want all experts, and on
    one, which does not.
    """
    model, rows = tiny(dtype=torch.float32), prompts(*lengths)
    try:
        step = graph.compiled(model, tune=False)
    except ValueError as e:
        pytest.skip(str(e))
    taken = []
    assert generate(model, rows, 8, step=lambda *a: taken.append(1) or step(*a)) == generate(
        model, rows, 8
    )
    assert len(taken) == 7
    with pytest.raises(ValueError, match="only plain decoding"):
        generate(model, rows, 8, speculate=2, step=step)


def test_one_token_is_enough_of_a_prompt():
    model = tiny()
    assert (
        generate(model, [[7]], 5)
        == [greedy(model, [7], 5)]
        == generate(model, torch.tensor([[7]]), 5).tolist()
    )
    assert generate(model, [[7], [7, 8]], 5) == [greedy(model, [7], 5), greedy(model, [7, 8], 5)]


# ---- the contract


def test_a_seed_is_a_text():
    model, ids = tiny(), torch.tensor(prompts(4, 4))
    a, b, c = (generate(model, ids, 20, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate(model, ids, 3, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # a seed leaves the global state alone
    a, b = (generate(model, ids, 20, temperature=1.0) for _ in range(2))
    assert not torch.equal(a, b)  # and without one it is used


def test_tensor_in_tensor_out_lists_in_lists_out():
    model, rows = tiny(), prompts(3, 3)
    ids, kept = torch.tensor(rows), [list(r) for r in rows]
    out = generate(model, ids, 4)
    assert out.dtype == torch.int64 and out.shape == (2, 7) and torch.equal(out[:, :3], ids)
    lists = generate(model, rows, 4)
    assert lists == out.tolist() and rows == kept and all(type(i) is int for r in lists for i in r)
    assert generate(model, rows, 0) == rows and torch.equal(generate(model, ids, 0), ids)
    assert generate(model, [torch.tensor(rows[0])], 2)[0] == lists[0][:5]
    assert not out.requires_grad and not model.training


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_finished_row_repeats_its_stop_token_and_its_list_ends_there(temperature):
    model, rows = tiny(), prompts(6, 2, 4)
    free = generate(model, rows, 12, temperature, seed=3)
    stop = {free[0][6 + 3], free[1][2 + 8]}  # what two rows say after 4 and 9 tokens
    new = [r[len(p) :] for r, p in zip(free, rows)]
    ends = [next((i + 1 for i, t in enumerate(r) if t in stop), 12) for r in new]
    assert ends[0] <= 4 and ends[1] <= 9 and len(set(ends)) > 1
    assert generate(model, rows, 12, temperature, seed=3, stop=stop) == [
        p + r[:n] for p, r, n in zip(rows, new, ends)
    ]
    tokens = torch.stack(list(stream(model, rows, 12, temperature, seed=3, stop=stop)), 1).tolist()
    assert len(tokens[0]) == max(ends)  # not one step more than the longest row needs
    for got, want, n in zip(tokens, new, ends):
        assert got == want[:n] + [want[n - 1]] * (max(ends) - n)
    square = generate(model, torch.tensor(prompts(3, 3)), 5, stop=range(31))
    assert square.shape == (2, 4)  # everything stops: one new token each
    assert generate(model, [[free[0][9], 1]], 2, stop={free[0][9]})[0][:2] == [
        free[0][9],
        1,
    ]  # not in the prompt


@pytest.mark.parametrize(
    "rows,kw,message",
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        ([[1]], dict(temperature=-1), "temperature"),
        ([[1]], dict(top_p=0), "top_p"),
        ([[1]], dict(top_p=1.1), "top_p"),
        ([[1]], dict(top_k=-1), "top_k"),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens"),
        ([[1]], dict(prefill=0), "prefill"),
        ([[1]], dict(prefill=-1), "prefill"),
        ([[1]], dict(speculate=3), "speculate=3"),
        ([[31]], {}, "31"),
        ([[-1]], {}, "-1"),
    ],
    ids=str,
)
def test_mistakes_are_named(rows, kw, message):
    """31 is the first id that a vocabulary of 31 has not."""
    with pytest.raises(ValueError, match=message):
        generate(tiny("M"), rows, **{"max_new_tokens": 2, **kw})


# ---- memory


def held(cache):
    """Bytes of everything the cache keeps alive: whole storages, so that a view of something long
    counts as long.
    """
    tensors = [
        v
        for layer in cache.layers
        if layer is not None
        for v in vars(layer).values()
        if torch.is_tensor(v)
    ]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def widest(model, t, prefill, rows=2):
    """The largest output of any module while a prompt of t tokens is read, and what the cache then
    holds.
    """
    sizes, hooks = [], []
    for m in model.modules():
        hooks.append(
            m.register_forward_hook(
                lambda m, i, out: sizes.append(out.numel()) if torch.is_tensor(out) else None
            )
        )
    cache = model.new_cache(rows)
    with torch.no_grad():
        logits = decode.read(model, cache, prompts(*[t] * rows), prefill)
    [h.remove() for h in hooks]
    assert logits.shape == (rows, 31)
    return max(sizes), held(cache)


def test_a_long_prompt_costs_nothing_but_its_keys_and_values():
    short, long = (widest(tiny("MEM-"), t, 16) for t in (64, 1024))
    assert short == long  # neither activations nor state grow
    short, long = (widest(tiny("ME*-"), t, 16) for t in (64, 1024))
    assert short[0] == long[0]
    token = 2 * 2 * 2 * 5 * 8  # rows, k and v, kv heads, head dim, fp64
    assert (
        (1024 - 64) * token <= long[1] - short[1] <= (2 * 1024 - 64) * token
    )  # a buffer that doubles
    assert (
        widest(tiny("MEM-"), 1024, 1024)[0] > 16 * short[0] / 2
    )  # what reading it all at once costs


def test_the_head_runs_on_the_last_state_of_each_row_only():
    model, seen = tiny("M"), []
    model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.shape[:-1].numel()))
    generate(model, prompts(20, 33, 7), 3, prefill=8)
    assert seen == [3, 3, 3]


# ---- text


def test_the_printer_waits_for_whole_characters(capsys):
    enc, written = data.tokenizer("bytes"), "aé日🙂!"
    show, seen = sample.Printer(enc), []
    for i in written.encode():  # one byte a token
        show(i)
        seen.append(capsys.readouterr().out)
    assert seen == ["a", "", "é", "", "", "日", "", "", "", "🙂", "!"]
    for i in (0x80, ord("b")):  # no character begins like that
        show(i)
    assert capsys.readouterr().out == "\ufffdb"
    assert sample.raw(enc, 97) == b"a" and sample.raw(enc, 9999).decode() == "\ufffd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on disk that nobody had to train: 257 random rows in the head, and 43 ids that the
    tokenizer does not know.
    """
    model, enc = tiny("ME*", torch.float32, vocab_size=300), data.tokenizer("bytes")
    path = tmp_path_factory.mktemp("runs") / "some"
    checkpoint.save(
        path,
        7,
        dict(
            model=model.state_dict(), config=asdict(model.config), step=7, tokenizer=data.pack(enc)
        ),
    )
    return path


def said(capsys, folder, *argv):
    sample.main(["--run", str(folder), "--max-new-tokens", "12", *argv])
    out, err = capsys.readouterr()
    assert "prompt tokens in" in err and "tokens/s after" in err
    return out


def test_a_run_and_a_prompt(folder, capsys):
    model, enc, step = sample.load_run(folder)
    assert step == 7 and enc.name == "bytes" and not model.training
    assert sample.load_run(checkpoint.steps(folder)[0])[2] == 7  # the file itself
    for n in range(2, 13):  # also where a character is left unfinished
        want = b"".join(sample.raw(enc, i) for i in greedy(model, b"ab", n)).decode(
            "utf-8", "replace"
        )
        assert (
            said(
                capsys, folder, "--prompt", "ab", "--temperature", "0", "--max-new-tokens", str(n)
            )[:-1]
            == want
        )
    a, b, c = (said(capsys, folder, "--prompt", "ab", "--seed", s) for s in "112")
    assert a == b != c and a.startswith("ab")
    assert said(capsys, folder, "--temperature", "0").startswith("def ")  # the default prompt
    (folder / "p.txt").write_text("ab", encoding="utf-8")
    assert said(capsys, folder, "--prompt-file", str(folder / "p.txt"), "--seed", "1") == a
    sample.main(
        ["--run", str(folder), "--prompt", "abc", "--prompt-tokens", "50", "--max-new-tokens", "2"]
    )
    assert "[50 prompt tokens" in capsys.readouterr().err


def test_several_prompts_and_stop(folder, capsys):
    model, enc, _ = sample.load_run(folder)
    rows = [list(b"ab"), list(b"Z"), list(b"hello")]
    new = [greedy(model, r, 12)[len(r) :] for r in rows]
    stop = next(t for i, t in enumerate(new[0]) if i > 1 and 32 < t < 127 and t not in new[0][:i])

    def shown(i, show_stop):
        n = next((j for j, t in enumerate(new[i]) if t in (stop, 256)), 12)
        return b"".join(sample.raw(enc, t) for t in new[i][: n + show_stop]).decode(
            "utf-8", "replace"
        )

    argv = ["--temperature", "0", "--stop", chr(stop), "--prompt", "ab"]
    out = said(capsys, folder, *argv, "--prompt", "Z", "--prompt", "hello")
    assert out.strip("\n") == "\n".join(
        f"--- {p!r}\n{p}{shown(i, False)}" for i, p in enumerate(("ab", "Z", "hello"))
    ).strip("\n")
    assert said(capsys, folder, *argv).strip("\n") == ("ab" + shown(0, False)).strip(
        "\n"
    )  # the same text, alone


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--run", "nowhere"], "nowhere holds no checkpoint"),
        (["--hf", "nowhere"], "nowhere"),
        (["--stop", "ab"], "it must be one"),
        (["--top-p", "0"], "--top-p: 0.0 is not a number above 0 and up to 1"),
        (["--temp", "1"], "unrecognized arguments: --temp"),
        (["--prompt-file", "nowhere"], "nowhere"),
        (["--device", "tpu"], "tpu"),
        (["--max-new-tokens", "-1"], "--max-new-tokens: -1 is not an integer"),
        (["--prefill", "0"], "prefill"),
    ],
    ids=str,
)
def test_command_line_mistakes_are_named(folder, capsys, argv, message):
    with pytest.raises(SystemExit) as e:
        sample.main((["--run", str(folder)] if argv[0] not in ("--run", "--hf") else []) + argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "what", [[1, 2], dict(a=torch.zeros(2)), torch.zeros(2)], ids=["list", "state dict", "tensor"]
)
def test_a_file_of_something_else_is_named(tmp_path, capsys, what):
    torch.save(what, tmp_path / "other.pt")
    with pytest.raises(SystemExit) as e:
        sample.main(["--run", str(tmp_path / "other.pt")])
    assert e.value.code == 2 and "other.pt" in capsys.readouterr().err


# ---- the control


def test_this_file_can_fail():
    p = [0.5, 0.3, 0.15, 0.05]
    assert nucleus([math.log(x) for x in p], 1, 0.6, 0)[0] == pytest.approx(
        [0.625, 0.375, 0, 0]
    )  # by hand
    model, (row,) = tiny(), prompts(9)
    with torch.no_grad():
        whole, cache = model(torch.tensor([row]))[:, -1], model.new_cache(1)
        model(
            torch.tensor([row[:5] + [0] + row[5:8]]), cache
        )  # padding that was not named is not padding
        assert rms(model(torch.tensor([row[8:]]), cache)[:, -1], whole) > 1e-2
        assert (
            rms(model(torch.tensor([row[1:]]))[:, -1], whole) > 1e-2
        )  # the first token matters until the end
        cache = model.new_cache(1)
        model(torch.tensor([row]), cache)
    cache.layers[0].conv = torch.zeros(1, 500, 1)[:, 490:]
    assert held(cache) > 500 * 4  # a view counts as what it keeps alive
    assert greedy(model, row, 8) != greedy(tiny("ME*-M*M"), row, 8)
