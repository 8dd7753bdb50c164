"""Quantised checkpoints of Model Optimizer's own making: packed weights, their files, and all that
is refused.

golden/quantised holds three exports (mixed, NVFP4, FP8), the JSON of both spellings, and the logits
that Model Optimizer's numbers give in transformers' model.
"""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attention
import census
import hf
import sample
from model import Config, Nemotron
from quant import lowbit, ondisk, packed, statecache

GOLDEN = Path(__file__).parent / "golden" / "quantised"
FOLDERS = "mixed", "nvfp4", "fp8"
TOP = Config.preset("super")


def reference(name):
    return load_file(GOLDEN / f"{name}.ref.safetensors")


def far(got, want):
    return float((got - want).abs().max() / want.abs().max())


def raw(t):
    return t.contiguous().view(-1).view(torch.uint8)


def changed(tmp_path, name="mixed", tensors=None, **configs):
    """A copy of a golden folder with a change: to its tensors, or to config.json."""
    out = tmp_path / "changed"
    shutil.copytree(GOLDEN / name, out, dirs_exist_ok=True)
    if tensors:
        file = load_file(out / "model.safetensors")
        tensors(file)
        save_file(file, out / "model.safetensors", dict(format="pt"))
    for file, change in configs.items():
        path = out / f"{file}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_logits_are_model_optimizers(name, lazy):
    """Weights alone, then inputs, keys and values rounded too; a cache changes nothing."""
    ref, model = reference(name), hf.load(GOLDEN / name, lazy=lazy)
    assert far(model(ref["ids"]), ref["logits_weights"]) < 2e-5
    packed.rounded(model)
    got = model(ref["ids"])
    assert far(got, ref["logits_all"]) < 2e-5
    cache = model.new_cache(1)
    pieces = torch.cat([model(p, cache) for p in ref["ids"].split([1, 30, 9], 1)], 1)
    assert far(pieces, ref["logits_all"]) < 2e-5
    packed.rounded(model, False)
    assert far(model(ref["ids"]), got) > 1e-3  # the switch has an effect


@torch.no_grad()
def test_lazy_is_packed_bit_for_bit_and_reads_no_expert_that_is_not_asked_for():
    ids = reference("mixed")["ids"]
    whole, lazy = hf.load(GOLDEN / "mixed"), hf.load(GOLDEN / "mixed", lazy=True)
    assert torch.equal(whole(ids), lazy(ids))
    assert packed.nbytes(lazy) == packed.nbytes(whole)
    asked, stack = [], lazy.backbone.layers[1].mixer.experts.up_proj
    stack.tensors = lambda e: asked.append(e) or stack.loose[e]
    lazy(ids[:, :1])
    assert len(asked) == lazy.config.num_experts_per_tok < len(stack)


@pytest.mark.parametrize("name", FOLDERS)
def test_values_are_exact_products(name):
    """Against fp64 and Python's own reading of E4M3; NVFP4 rounds twice, scales first."""
    t = load_file(GOLDEN / name / "model.safetensors")
    for key in [k for k in t if k.endswith("weight_scale")][::5]:
        w, s = t[key.removesuffix("_scale")], t[key]
        if w.dtype == torch.uint8:
            two = t[f"{key}_2"]
            got = packed.nvfp4_values(w, s, two)
            grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            code = torch.stack([w & 15, w >> 4], -1).flatten(1).long()
            q = grid[code & 7] * (1 - 2 * (code >> 3))
            want = q * (s.float() * two).repeat_interleave(16, 1)
        else:
            got, want = packed.fp8_values(w, s), w.float() * s
        assert torch.equal(got, want)


def test_every_code_and_odd_places():
    codes = torch.arange(256).to(torch.uint8)
    want = codes.view(torch.float8_e4m3fn).float()
    for part in (slice(0, 256), slice(1, 255), slice(3, 250), slice(7, 8)):
        got = packed.e4m3_numbers(codes[part].view(torch.float8_e4m3fn))
        assert torch.equal(got.nan_to_num(1e9), want[part].nan_to_num(1e9))


@pytest.mark.parametrize("rows", [1, 3, packed.FEW + 1])
@pytest.mark.parametrize("kind,o,i", [("NVFP4", 5, 48), ("FP8", 7, 33), ("W4A16_NVFP4", 300, 1024)])
@torch.no_grad()
def test_a_packed_linear_is_a_linear_at_any_size(kind, o, i, rows):
    layer = packed.Packed(kind, o, i)
    for _name, b in layer.named_buffers():
        bits = torch.randint(0, 120, b.shape, dtype=torch.uint8)
        b.copy_(torch.rand(b.shape) if b.dtype == torch.float32 else bits.view(b.dtype))
    x = torch.randn(2, rows, i)
    assert far(layer(x), x @ layer.dense().T) < 1e-6
    low = layer(x.bfloat16())
    assert (
        low.dtype == torch.bfloat16
        and far(low.float(), x.bfloat16().float() @ layer.dense().T) < 0.01
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_load_save_load_is_the_same(name, tmp_path):
    for lazy in (False, True):
        hf.save(hf.load(GOLDEN / name, dtype=torch.bfloat16, lazy=lazy), tmp_path / str(lazy))
        got = load_file(tmp_path / str(lazy) / "model.safetensors")
        want = load_file(GOLDEN / name / "model.safetensors")
        assert set(got) == set(want)
        small = [n for n in got if got[n].dtype != want[n].dtype]
        assert all(n.endswith(hf.SMALL) for n in small)  # kept in fp32 here, as in training
        assert all(torch.equal(raw(got[n].to(want[n].dtype)), raw(want[n])) for n in got)
        a, b = (census.survey(d) for d in (GOLDEN / name, tmp_path / str(lazy)))
        assert (a.plan, a.kv) == (b.plan, b.kv)
    said = json.loads((tmp_path / "True" / "hf_quant_config.json").read_text())["quantization"]
    cache = "FP8" if a.kv else None
    assert (said["quant_algo"], said["kv_cache_quant_algo"]) == ("MIXED_PRECISION", cache)


@pytest.mark.parametrize("name", FOLDERS)
def test_both_spellings_of_the_json_give_one_plan(name, tmp_path):
    want = census.survey(GOLDEN / name).plan
    out = changed(tmp_path, name)
    for file in ("config", "hf_quant_config"):
        shutil.copy(GOLDEN / f"{name}.modelopt_{file}.json", out / f"{file}.json")
    assert census.survey(out).plan == want
    given = json.loads((out / "config.json").read_text())
    del given["quantization_config"]  # then the other file speaks
    (out / "config.json").write_text(json.dumps(given))
    assert census.survey(out).plan == want


def test_the_released_map():
    plan, kv = ondisk.super_map(TOP.hybrid_override_pattern)
    names = census.census(TOP, plan, kv)
    assert len(names) == 165_860
    place = census.places(census.blank(TOP, plan, kv))
    assert sum(t.numel() * census.stored(n, t).itemsize for n, t in place.items()) == 80_297_329_824
    inside, _ = ondisk.quantization_config(plan, kv, TOP.n_routed_experts)
    kinds = [v["quant_algo"] for v in inside["quantized_layers"].values()]
    assert (len(kinds), kinds.count("FP8"), kinds.count("NVFP4")) == (41_100, 139, 40_961)


def test_the_map_of_a_folder_is_printed(capsys):
    hf.main([str(GOLDEN / "mixed")])
    out = capsys.readouterr().out
    assert "84 modules, 11 FP8, 73 NVFP4" in out and "FP8 in 2 layers" in out
    assert "378 tensors, 373,192 bytes" in out


@torch.no_grad()
def test_keys_and_values_are_kept_in_codes():
    ref, model = reference("mixed"), hf.load(GOLDEN / "mixed")
    cache = model.new_cache(1)
    model(ref["ids"], cache)
    kv = next(x for x in cache.layers if isinstance(x, attention.KV))
    assert kv.k.dtype == kv.v.dtype == torch.uint8
    for name in census.survey(GOLDEN / "mixed").kv:
        model.get_submodule(name).k_proj.k_scale.fill_(0.01)  # saturates
        model.get_submodule(name).v_proj.v_scale.fill_(0.01)
    low = model(ref["ids"], model.new_cache(1))
    assert far(low, model(ref["ids"])) > 1e-2


def test_what_a_folder_may_not_say(tmp_path):
    def gone(leaf):
        return lambda t: t.pop(next(k for k in sorted(t) if k.endswith(leaf)))

    def other(q):
        layers = q["quantization_config"]["quantized_layers"]
        layers["backbone.layers.0.mixer.in_proj"] = dict(quant_algo="NVFP4", group_size=16)

    def less(q):
        del q["quantization_config"]["quantized_layers"]["backbone.layers.0.mixer.in_proj"]

    def more(q):
        layers = q["quantization_config"]["quantized_layers"]
        layers["backbone.layers.2.mixer.in_proj"] = dict(quant_algo="FP8")

    def awq(q):
        q["quantization_config"]["quant_method"] = "awq"

    def odd(t):
        t["backbone.layers.0.mixer.in_proj.weight"] = torch.zeros(328, 64, dtype=torch.int32)

    def bare(t):
        n = "backbone.layers.1.mixer.experts.0.up_proj.weight_scale"
        t[n] = t[n].view(torch.uint8)

    def keys(t):
        t["backbone.layers.0.mixer.k_proj.k_scale"] = torch.ones(())

    cases = [
        (dict(tensors=bare), "wrong dtype .*experts.0.up_proj.weight_scale is U8, it must be"),
        (dict(tensors=keys), "layers.0.mixer cannot keep keys in FP8: the model has no attention"),
        (
            dict(config=other),
            "disagree about 1 modules, first backbone.layers.0.mixer.in_proj: NVFP4",
        ),
        (dict(config=less), "in_proj: not quantised there, FP8 in the files"),
        (dict(config=more), "layers.2.mixer.in_proj: FP8 there, not quantised in the files"),
        (dict(config=awq), "quant_method 'awq'"),
        (
            dict(tensors=gone(".weight_scale_2")),
            "U8, that is codes, and .*weight_scale_2 is missing",
        ),
        (dict(tensors=gone(".weight_scale")), "codes, and .*weight_scale is missing"),
        (
            dict(tensors=gone("0.mixer.in_proj.input_scale")),
            "in_proj: FP8 there|missing .*in_proj.input_scale",
        ),
        (dict(tensors=odd), "holds tensors in I32"),
    ]
    for i, (change, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message) as e:
            hf.load(changed(tmp_path / str(i), **change))
        assert "Traceback" not in str(e.value)


@pytest.mark.parametrize("name", ["backbone.norm_f", "backbone.layers.0", "lm_head.x", "a.experts"])
def test_what_is_no_matrix_cannot_be_packed(name):
    with torch.device("meta"), pytest.raises(ValueError, match=f"{name} cannot be FP8: the model"):
        packed.swap(Nemotron(Config.preset("toy")), {name: "FP8"})


@torch.no_grad()
def test_numbers_may_lie_at_any_address(tmp_path):
    """The format aligns nothing: whoever writes tensors in another order may leave them so."""
    out, want = changed(tmp_path, "nvfp4"), hf.load(GOLDEN / "nvfp4", lazy=True)
    data = (out / "model.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + n].rstrip() + b" "
    head += b" " * (len(head) % 2 == 0)  # every number of two bytes or more is at an odd address
    (out / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data[8 + n :])
    ids = reference("nvfp4")["ids"]
    for lazy in (False, True):
        assert torch.equal(hf.load(out, lazy=lazy)(ids), want(ids))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_truncated_file_is_refused_before_it_is_mapped(lazy, tmp_path):
    out = changed(tmp_path)
    data = (out / "model.safetensors").read_bytes()
    for n in (4, 100, len(data) // 2, len(data) - 1):
        (out / "model.safetensors").write_bytes(data[:n])
        with pytest.raises(ValueError, match="truncated"):
            hf.load(out, lazy=lazy)


def test_nothing_lazy_about_a_folder_that_is_not_quantised(tmp_path):
    hf.save(Nemotron(Config.preset("toy")), tmp_path)
    with pytest.raises(ValueError, match="is not quantised"):
        hf.load(tmp_path, lazy=True)


def test_codes_are_not_cast_trained_converted_or_cut_up(tmp_path):
    model = hf.load(GOLDEN / "mixed")
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        with pytest.raises(ValueError, match="keeps its dtypes") as e:
            cast(copy.deepcopy(model))
        assert "\n" not in str(e.value)
    assert model.to("cpu") is model
    with pytest.raises(ValueError, match="four bits: [0-9]+ modules"):
        lowbit.convert(model)
    from scale import parallel

    with pytest.raises(ValueError, match="ranks that share a model: [0-9]+ modules"):
        parallel.World.shard(object.__new__(parallel.World), model)
    import train

    shutil.copytree(GOLDEN / "mixed", tmp_path / "toy")
    with pytest.raises(ValueError, match="is a quantised checkpoint"):
        train.complete(dict(out=str(tmp_path), resume=True))


def said(capsys, *flags):
    sample.main(["--hf", str(GOLDEN / "mixed"), "--prompt", "ab", "--max-new-tokens", "24", *flags])
    return capsys.readouterr()


def test_the_flags_of_sample_have_effects(capsys, monkeypatch):
    """--lazy changes no letter, --activations and --state do; what has no place is one sentence."""
    flags = "--temperature", "0", "--seed", "0"
    plain = said(capsys, *flags)
    assert "320 ids: taken for bytes" in plain.err
    assert said(capsys, *flags, "--lazy").out == plain.out
    assert said(capsys, *flags, "--activations").out != plain.out
    kept, real = [], statecache.to_blocks
    monkeypatch.setattr(statecache, "to_blocks", lambda *a: kept.append(a) or real(*a))
    said(capsys, *flags, "--state", "int8:5")
    assert len(kept) == 24 * 3  # a call for the prompt, then one a token; in three Mamba layers
    assert all(a[1] == "int8" and a[2] is not None for a in kept)
    for wrong, message in (
        (["--compile"], "--compile: 15 modules of .* are packed"),
        (["--state", "fp17"], "no format of the state"),
    ):
        with pytest.raises(SystemExit) as e:
            said(capsys, *flags, *wrong)
        assert e.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_files_are_written_as_safetensors_reads_them(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{i}.{str(dtype)[6:]}": torch.randint(0, 99, shape, generator=g).to(dtype)
        for i, shape in enumerate([(), (3,), (2, 5), (0, 4), (7, 3)])
        for dtype in (*ondisk.DTYPES.values(), torch.int64)
    }
    with open(tmp_path / "t.safetensors", "wb") as f:
        ondisk.store(f, tensors)
    got = load_file(tmp_path / "t.safetensors")
    assert set(got) == set(tensors)
    for n, t in tensors.items():
        assert (
            got[n].dtype == t.dtype and got[n].shape == t.shape and torch.equal(raw(got[n]), raw(t))
        )


def test_rows_of_an_odd_width():
    with pytest.raises(ValueError, match="multiple of 16"):
        packed.Packed("NVFP4", 4, 40)


def test_this_file_can_fail():
    """Nibbles the other way round, scales of the neighbour: the logits show both."""
    ref, model = reference("nvfp4"), hf.load(GOLDEN / "nvfp4")
    layer = model.backbone.layers[0].mixer.in_proj
    layer.weight.copy_(layer.weight << 4 | layer.weight >> 4)
    with torch.no_grad():
        assert far(model(ref["ids"]), ref["logits_weights"]) > 1e-2
    model = hf.load(GOLDEN / "nvfp4")
    layer = model.backbone.layers[0].mixer.in_proj
    layer.weight_scale.copy_(layer.weight_scale.roll(1, 1))
    with torch.no_grad():
        assert far(model(ref["ids"]), ref["logits_weights"]) > 1e-2
