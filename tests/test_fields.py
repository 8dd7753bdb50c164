"""Every field of every file that is read: change it, and a result changes, or it is refused.

A field that is read and ignored gives the same answer with another value: these sweeps find that.
Fields that change no number by their meaning are listed, with the reason.
"""

import base64
import json
from dataclasses import fields, replace

import pytest
import torch
from inputs import TINY

import hf
import sample
import tokenizer
import train
from config import Config
from family import ALIASES, FIXED, IGNORED
from model import Nemotron
from training import settings

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
        bounds = f.metadata["bounds"]
        if isinstance(x, bool):
            new = not x
        elif isinstance(x, str):
            new = next((c for c in bounds.choices if c != x), "fp32" if bounds.spells else x + "y")
        else:
            new = type(x)(bounds.most) if x != bounds.most else type(x)(bounds.least)
        (folder / "config.json").write_text(json.dumps(dict(run=old | {f.name: new})))
        run = settings.complete(dict(resume=True, out=str(tmp_path), name="n"))
        assert getattr(run, f.name) == new != x, f.name


def test_this_file_can_fail(base, monkeypatch, tmp_path):
    """A field that is ignored gives the same numbers, and the sweep sees it."""
    f = next(f for f in fields(Config) if f.name == "routed_scaling_factor")
    plain = globals()["seen"]
    monkeypatch.setitem(globals(), "seen", lambda c: plain(replace(c, routed_scaling_factor=5.0)))
    with pytest.raises(AssertionError):
        test_every_field_of_a_config_is_used(f, plain(BASE))
    assert spelled({}, tmp_path) == "refused"
