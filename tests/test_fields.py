"""Every field of every file that is read: change it, and a result changes, or it is refused.

A field that is read and ignored gives the same answer with another value: these sweeps find that.
Fields that change no number by their meaning are listed, with the reason.
"""

import base64
import copy
import json
import re
import shutil
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from inputs import TINY
from test_breaker import a_run

import bounds
import chat
import checkpoint
import disk
import heal
import hf
import plot
import sample
import tokenizer
import train
import worth
from config import Config
from family import ALIASES, FIXED, IGNORED
from model import Nemotron
from quant import ondisk
from training import journal, merge, settings

# Fields of Config that by their meaning change no logits of a model with given weights.
SILENT = dict(
    max_position_embeddings="what a server reserves",
    bos_token_id="what a text begins with: the tokenizer's post-processor says it",
    pad_token_id="rows are padded by count, and never attend to padding",
    eos_token_id="what ends a text: sample.py, tested below",
    chunk_size="another order of the same sums",
    initializer_range="of new weights only: tested below",
    time_step_min="of new weights only",
    time_step_max="of new weights only",
    time_step_floor="of new weights only",
    mtp_num_layers="depths trained, for one stored block",
)
OTHER = dict(
    hybrid_override_pattern="ME-*",
    mtp_hybrid_override_pattern="*",
    num_attention_heads=4,
    num_key_value_heads=2,
    mamba_num_heads=8,
    n_groups=1,
    num_experts_per_tok=2,
    moe_latent_size=None,
    layer_norm_epsilon=1e-2,
    routed_scaling_factor=2.0,
    rotary_base=100.0,
    num_nextn_predict_layers=2,
)
BASE = Config(**{**TINY, "mtp_num_layers": 1})


def another(f):
    """A valid value that is not the one in BASE, and what else has to change with it."""
    value = getattr(BASE, f.name)
    if f.name in OTHER:
        return {f.name: OTHER[f.name]}
    if f.name in ("n_group", "topk_group"):
        return dict(n_group=2, topk_group=1 if f.name == "n_group" else 2, num_experts_per_tok=3)
    if isinstance(value, bool):
        return {f.name: not value}
    return {f.name: value * 2}


def seen(config):
    """What a config makes: the shapes of its weights, and logits of weights by name alone."""
    model = Nemotron(config).eval()
    with torch.no_grad():
        for name, p in model.state_dict().items():
            if p.is_floating_point():
                g = torch.Generator().manual_seed(len(name))
                p.copy_(torch.rand(p.shape, generator=g) - 0.4)
        logits = model(torch.arange(12).view(1, -1))
    return [(n, tuple(p.shape)) for n, p in model.state_dict().items()], logits


@pytest.fixture(scope="module")
def base():
    return seen(BASE)


@pytest.mark.parametrize("f", fields(Config), ids=lambda f: f.name)
def test_every_field_of_a_config_is_used(f, base):
    if f.name in SILENT:
        return
    shapes, logits = seen(replace(BASE, **another(f)))
    reference = base
    if f.name == "topk_group":
        reference = seen(replace(BASE, n_group=2, topk_group=1))
    assert shapes != reference[0] or not torch.equal(logits, reference[1]), f.name


def test_the_fields_of_new_weights_are_used():
    first = Nemotron(BASE).state_dict()
    for change in (
        dict(initializer_range=0.1),
        dict(time_step_min=0.05),
        dict(time_step_max=0.9),
        dict(time_step_floor=0.09),
    ):
        other = Nemotron(replace(BASE, **change)).state_dict()
        assert any(not torch.equal(a, b) for a, b in zip(first.values(), other.values())), change


def test_a_field_of_config_json_is_computed_fixed_or_ignored_by_name(tmp_path):
    """What is none of the three is refused, so nothing in the file goes unseen."""
    given = BASE.to_hf()
    known = {f.name for f in fields(Config)}
    assert set(given) <= known | set(FIXED) | set(IGNORED) | set(ALIASES) | {"time_step_limit"}
    for key in FIXED:
        with pytest.raises(ValueError, match=key):
            Config.from_hf(given | {key: "another"})
    with pytest.raises(ValueError, match="surprise"):
        Config.from_hf(given | dict(surprise=1))


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_every_end_id_of_either_file_ends_a_text(tmp_path, where):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps(dict(eos_token_id=None)))
    for ids in (7, [7], [2, 7, 9]):
        (tmp_path / where).write_text(json.dumps(dict(eos_token_id=ids)))
        assert hf.ends(tmp_path) == ([ids] if ids == 7 else sorted(ids))
    enc = tokenizer.tokenizer("bytes")
    assert set(sample.stops(enc, ["a"], [7])) == {256, ord("a"), 7}


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_an_end_id_that_the_model_has_not_is_refused(tmp_path, where):
    """No token could be it, so no text would ever end."""
    (tmp_path / "config.json").write_text(json.dumps(dict(vocab_size=9)))
    (tmp_path / where).write_text(json.dumps(dict(vocab_size=9, eos_token_id=[8])))
    assert hf.ends(tmp_path) == [8]
    for odd in (9, [2, 9], -1, "2", 2.0, True, [None]):
        (tmp_path / where).write_text(json.dumps(dict(vocab_size=9, eos_token_id=odd)))
        with pytest.raises(ValueError, match=f"{where}: eos_token_id.*no id of 9"):
            hf.ends(tmp_path)


def spelled(d, tmp_path):
    """The ids that a tokenizer file gives, and its special tokens; or that it is refused."""
    path = tmp_path / "t.json"
    path.write_text(json.dumps(d))
    try:
        enc = tokenizer.tokenizer(str(path))
    except ValueError:
        return "refused"
    text = "a <x> bb  \n cc 12 it's <|endoftext|>"
    return enc.encode_ordinary(text), sorted(enc._special_tokens.items()), enc.max_token_value


def alphabet():
    seen_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen_]
    return dict(zip([*seen_, *rest], map(chr, [*seen_, *range(256, 512)])))


def formats():
    """(name, a good file, {field: another value}) of the three tokenizer formats."""
    pack = tokenizer.pack(tokenizer.tokenizer("bytes"))
    ranks = {base64.b64encode(bytes([255 - i])).decode(): i for i in range(256)}
    yield "pack", pack, dict(ranks=ranks, special={"<y>": 256}, whole=["<|endoftext|>"], begin=[7])
    yield "pack", pack, dict(pattern=r"\p{L}+")
    vocab = {c: b for b, c in alphabet().items()} | {"bb": 256}
    hugging = dict(
        model=dict(type="BPE", vocab=vocab, merges=["b b"]),
        pre_tokenizer=dict(type="ByteLevel", use_regex=True),
        added_tokens=[dict(id=257, content="<x>", special=False)],
        post_processor=None,
        normalizer=None,
    )
    template = dict(
        type="TemplateProcessing",
        single=[dict(SpecialToken=dict(id="<x>")), dict(Sequence=dict(id="A"))],
        special_tokens={"<x>": dict(ids=[257])},
    )
    yield (
        "hugging face",
        hugging,
        dict(
            model=dict(type="BPE", vocab=vocab | {"cc": 258}, merges=["b b", "c c"]),
            pre_tokenizer=dict(type="ByteLevel", use_regex=True, add_prefix_space=True),
            added_tokens=[dict(id=300, content="<x>", special=False)],
            post_processor=template,
            normalizer=dict(type="NFC"),
        ),
    )
    yield "hugging face", hugging, dict(added_tokens=[dict(id=257, content="<x>", special=True)])
    for key, x in dict(byte_fallback=True, dropout=0.1, type="Unigram", merges=["c c"]).items():
        yield f"hugging face {key}", hugging, dict(model=hugging["model"] | {key: x})
    table = [dict(rank=i, token_bytes=base64.b64encode(bytes([i])).decode()) for i in range(256)]
    table.append(dict(rank=256, token_bytes=base64.b64encode(b"bb").decode()))
    settings_ = dict(pattern="(?s:.)", default_num_special_tokens=2, default_vocab_size=259)
    settings_["pattern"] = r"\p{L}+|(?s:.)"
    tekken = dict(config=settings_, vocab=table, special_tokens=[])
    for key, x in dict(
        pattern="(?s:.)", default_num_special_tokens=3, default_vocab_size=258
    ).items():
        yield f"tekken {key}", tekken, dict(config=settings_ | {key: x})
    yield "tekken", tekken, dict(vocab=table[:-1], special_tokens=[dict(rank=0, token_str="<s>")])


@pytest.mark.parametrize("i", range(len(list(formats()))))
def test_every_field_of_a_tokenizer_file_is_used(i, tmp_path):
    name, good, changes = list(formats())[i]
    before = spelled(good, tmp_path)
    assert before != "refused", name
    for key, x in changes.items():
        assert spelled(good | {key: x}, tmp_path) != before, (name, key)


def test_every_setting_of_a_run_comes_back(tmp_path):
    """config.json's `run`: what --resume reads is what was written, field by field."""
    folder = tmp_path / "n"
    folder.mkdir()
    replaced = {"name", "out", "resume", "merge", "stop", "from_step"}  # given, or begun anew
    old = {f.name: f.default for f in fields(train.Run)}
    for f in fields(train.Run):
        if f.name in replaced:
            continue
        x = f.default
        allowed = f.metadata["bounds"]
        if isinstance(x, bool):
            new = not x
        elif isinstance(x, str):
            words = (*allowed.choices, "fp32", "all", x + "y")
            new = next(c for c in words if c != x and not bounds.fault(f, c))
        else:
            new = type(x)(allowed.most) if x != allowed.most else type(x)(allowed.least)
        (folder / "config.json").write_text(json.dumps(dict(run=old | {f.name: new})))
        run = settings.complete(dict(resume=True, out=str(tmp_path), name="n"))
        assert getattr(run, f.name) == new != x, f.name


# ---- the JSON of a quantised checkpoint

PLAN = {
    "backbone.layers.0.mixer.in_proj": "FP8",
    "backbone.layers.1.mixer.experts": "NVFP4",
    "backbone.layers.1.mixer.shared_experts.up_proj": "W4A16_NVFP4",
}
KV = ["backbone.layers.2.mixer"]


def leaves(x, before=()):
    """The path to every value that is neither a dict nor a list; of lists to the first."""
    for key, value in x.items() if isinstance(x, dict) else enumerate(x[:1]):
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*before, key))
        else:
            yield (*before, key)


def altered(x, path):
    """A copy with another value of the same kind at a path."""
    x = copy.deepcopy(x)
    inner = x
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    others = {bool: lambda: not old, str: lambda: "x" + old}
    inner[path[-1]] = others.get(type(old), lambda: old * 2)()
    return x


def one_algorithm():
    """The other spelling: one algorithm for all that is not excluded, and all of it said once."""
    rule = ondisk.rule("FP8")
    group = dict(input_activations=rule, weights=rule, targets=["Linear"])
    said = dict(quant_algo="FP8", ignore=[], quant_method="modelopt", config_groups=dict(g=group))
    return said | dict(kv_cache_scheme=rule)


def described():
    """(what a file says, the kinds and the cache that its tensors have): both files, both
    spellings.
    """
    inside, beside = ondisk.quantization_config(PLAN, KV, 2)
    yield inside, PLAN, KV
    yield beside["quantization"], PLAN, KV
    yield one_algorithm(), {m: "FP8" for m in PLAN}, KV
    four = dict(quant_algo="NVFP4", group_size=16, exclude_modules=["*up_proj*"])
    mixed = {m: "NVFP4" for m in list(PLAN)[:2]}
    yield four | dict(kv_cache_quant_algo="FP8"), mixed, KV


@pytest.mark.parametrize("i", range(4))
def test_every_field_of_a_quantisation_config_is_used(i, tmp_path):
    """config_groups, kv_cache_scheme and the others: another value is refused. `producer` names the
    writer, and is no statement about numbers; exclusions have their own values.
    """
    said, plan, kv = list(described())[i]
    assert ondisk.agree(tmp_path, dict(quantization_config=said), plan, kv) == ""
    for path in leaves(said):
        if path[0] not in ("producer", "ignore", "exclude_modules"):
            with pytest.raises(ValueError):
                ondisk.agree(tmp_path, dict(quantization_config=altered(said, path)), plan, kv)
                print(path)
    for key in {"ignore", "exclude_modules"} & set(said):
        odd = said | {key: ["*in_proj*"]}
        if said["quant_algo"] != "MIXED_PRECISION":
            with pytest.raises(ValueError, match="in_proj: not quantised there"):
                ondisk.agree(tmp_path, dict(quantization_config=odd), plan, kv)


def test_a_cache_that_is_announced_and_not_there_is_said_in_a_line(tmp_path):
    said = dict(quantization_config=one_algorithm())
    plan = {m: "FP8" for m in PLAN}
    assert "no file holds its scales" in ondisk.agree(tmp_path, said, plan)
    less = {k: v for k, v in one_algorithm().items() if k != "kv_cache_scheme"}
    with pytest.raises(ValueError, match="layers.2.mixer has scales of an FP8 cache"):
        ondisk.agree(tmp_path, dict(quantization_config=less), plan, KV)


# ---- a run's own files

LOG = dict(
    step=1,
    tokens=32,
    seconds=1.0,
    lr=1e-3,
    train_nats=3.0,
    mtp1_nats=3.5,
    val_nats=3.1,
    val_bpb=4.5,
    max_vio=0.5,
    max_vio_worst=0.9,
    idle=2,
)


def lines(folder, several):
    """Everything that a picture of a log shows: the points of its lines, and its words."""
    if several:
        other = folder.parent / "other"
        shutil.copytree(folder, other, dirs_exist_ok=True)
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plot, "save", lambda fig, path: seen.append(fig))
            plot.compare([folder, other], folder / "x.png")
        fig = seen[0]
    else:
        fig = plot.figure(list(plot.panels(folder)))
    found = []
    for ax in fig.findobj(plot.plt.Axes):
        found += [line.get_xydata().tolist() for line in ax.lines]
        found += [t.get_text() for t in (*ax.texts, ax.xaxis.label)] + [ax.get_title("left")]
    plot.plt.close(fig)
    return found


@pytest.mark.parametrize("column", LOG)
def test_every_column_of_a_log_is_drawn(column, tmp_path):
    """log.csv, which plot.py reads: another number in a column changes a picture."""
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "load.json").write_text(json.dumps(dict(layers=["a"], tokens=[[3, 5]])))
    rows = [LOG | dict(step=s, val_bpb=5.0 - s, tokens=32 * s, lr=1.0) for s in (1, 2, 3)]
    several = column in ("tokens", "seconds", "lr")
    disk.write_log(folder / "log.csv", rows)
    before = lines(folder, several)
    rows[-1] = rows[-1] | {column: rows[-1][column] * 2}
    disk.write_log(folder / "log.csv", rows)
    assert lines(folder, several) != before


# What programs read of the run that a checkpoint is of, by the reader. All of config.json's are
# read when it goes on: test_every_setting_of_a_run_comes_back.
READ = dict(
    same_model=("preset", "model", "tokenizer", "precision"),
    before=("stop", "steps", "log_every", "eval_every"),
    restore=("batch", "length"),
    merge=("decay",),
    heal=("data", "tasks", "room"),
    worth=("data", "length"),
)


def test_every_value_of_a_checkpoints_run_that_is_asked_for_has_a_test():
    """By the sources: what is asked of `saved["run"]` stands in READ."""
    asked = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "training").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        asked |= set(re.findall(r"""(?:setting\(|\["run"\]\.get\()"(\w+)\"""", text))
    known = {name for names in READ.values() for name in names}
    assert {"decay", "tasks", "room", "batch"} <= asked <= known


def of_run(**changes):
    return checkpoint.Saved(dict(run=asdict(train.Run(**changes)), step=6), "there")


@pytest.mark.parametrize("name", READ["same_model"])
def test_a_run_goes_on_as_the_model_that_it_was(name):
    other = dict(preset="mini", model="n_groups=1", tokenizer="bytes", precision="bf16")
    said = []
    settings.same_model(train.Run(), of_run(), said.append)
    assert not said
    try:
        settings.same_model(train.Run(), of_run(**{name: other[name]}), said.append)
    except ValueError as e:
        said.append(str(e))
    assert len(said) == 1 and other[name] in said[0]


@pytest.mark.parametrize(
    "name,value", [("stop", 0), ("steps", 6), ("log_every", 6), ("eval_every", 6)]
)
def test_the_last_row_of_a_run_that_was_stopped(name, value, tmp_path):
    """--stop's own row stays if it was due: the saved run says when rows are due."""

    def rows(**changes):
        folder = tmp_path / "r"
        folder.mkdir(exist_ok=True)
        disk.write_log(folder / "log.csv", [LOG | dict(step=s) for s in (1, 6)])
        run = train.Run(out=str(tmp_path), name="r", **base)
        log = journal.Journal(run, Nemotron(BASE), print, ("val_nats",), of_run(**base | changes))
        return log.rows

    base = dict(stop=6, steps=12, log_every=10, eval_every=10)
    assert len(rows()) == 1
    kept = rows(**{name: value})
    assert len(kept) == 2
    assert kept[1]["val_nats"] == (3.1 if name != "log_every" else "")


@pytest.mark.parametrize("name", READ["restore"])
def test_tokens_of_a_checkpoint_that_has_not_counted_them(name):
    opt = SimpleNamespace(param_groups=[{}])
    world = SimpleNamespace(load=lambda *args: None, restore_random=lambda saved: None)
    tokens = lambda **changes: train.restore(of_run(**changes), None, opt, train.Run(), world)[1]
    assert tokens() == 6 * 8 * 128 and tokens(**{name: 16}) != tokens()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "run", lambda folder: None)
        patch.setattr(sample, "quicken", lambda: None)
        return a_run(tmp_path_factory.mktemp("fields") / "runs")


def test_a_merge_says_whether_the_rate_fell(trained, monkeypatch):
    """By the decay that the checkpoint was trained with, not by the flags of now."""
    path, asked = checkpoint.steps(trained)[-1], []
    raw, saved = path.read_bytes(), dict(checkpoint.read(trained))
    monkeypatch.setattr(merge, "verdict", lambda results, decay: asked.append(decay) or "")
    run = train.Run(**saved["run"] | dict(merge=1))
    for decay in (0.0, 0.25):
        checkpoint.store(path, saved | dict(run=saved["run"] | dict(decay=decay)))
        merge.merge(run, lambda line: None)
    path.write_bytes(raw)
    assert asked == [0.0, 0.25]


@pytest.mark.parametrize("program", ["heal", "worth"])
def test_the_text_and_the_length_are_the_runs_own(program, trained, monkeypatch, capsys):
    """Programs that look at a finished run take its text, and its length, from the checkpoint."""
    monkeypatch.setattr(sample, "quicken", lambda: None)
    saved = dict(checkpoint.read(trained))
    model, enc, _ = sample.load_run(trained)
    seen = []
    monkeypatch.setattr(worth, "measure", lambda model, rows, *args: seen.append(rows.shape))
    monkeypatch.setattr(worth, "table", lambda found: [])
    monkeypatch.setattr(worth, "write", lambda *args: None)

    def use(**changes):
        held = checkpoint.Saved(saved | dict(run=saved["run"] | changes), trained)
        monkeypatch.setattr(checkpoint, "read", lambda path: held)
        if program == "heal":
            heal.writing(heal.Flags(run=str(trained), texts=2, length=40), held, model, enc, "")
        else:
            worth.work(worth.Flags(run=str(trained)))

    use()
    with pytest.raises(ValueError, match="nowhere"):
        use(data="nowhere")
    if program == "worth":
        use(length=20)
        assert [s[1] for s in seen] == [17, 21]


def test_what_a_run_practised_and_how_long_its_replies_were(trained, monkeypatch):
    """heal.py: `tasks` says which questions, `room` how many tokens a reply has."""
    saved = dict(checkpoint.read(trained))
    model, _, step = sample.load_run(trained)
    enc, asked = chat.with_special(tokenizer.tokenizer("bytes")), []
    monkeypatch.setattr(sample, "load_run", lambda *args: (model, enc, step))
    monkeypatch.setattr(heal, "heal", lambda *args: [])
    real = heal.rollout.roll
    monkeypatch.setattr(heal.rollout, "drafted", lambda *args, **how: {("sort", "off"): 1.0})
    monkeypatch.setattr(heal.rollout, "roll", lambda *a: asked.append(a[3]) or real(*a))
    monkeypatch.setattr(heal.checkpoint, "save", lambda *args: None)
    for changes in (dict(tasks="sort", room=3), dict(tasks="sort", room=5), dict(tasks="nothing")):
        held = checkpoint.Saved(saved | dict(run=saved["run"] | changes), trained)
        monkeypatch.setattr(checkpoint, "read", lambda path, held=held: held)
        flags = heal.Flags(run=str(trained), out="nowhere", texts=2, length=160)
        if changes["tasks"] == "nothing":
            with pytest.raises(ValueError, match="there is no task 'nothing'"):
                heal.mend(flags)
        else:
            heal.mend(flags)
    assert asked == [3, 5]


def test_this_file_can_fail(base, monkeypatch, tmp_path):
    """A field that is ignored gives the same numbers, and the sweep sees it."""
    f = next(f for f in fields(Config) if f.name == "routed_scaling_factor")
    plain = globals()["seen"]
    monkeypatch.setitem(globals(), "seen", lambda c: plain(replace(c, routed_scaling_factor=5.0)))
    with pytest.raises(AssertionError):
        test_every_field_of_a_config_is_used(f, plain(BASE))
    assert spelled({}, tmp_path) == "refused"
