"""Post-training quantisation: Model Optimizer's exports reproduced bit for bit, the four methods,
the scores against what they predict, the knapsack against brute force, and the command.
"""

import itertools
import json
import re
from pathlib import Path

import command

import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import bounds
import census
import data
import disk
import hf
import ptq
import sample
import train
from model import Config, Nemotron
from quant import autoquant, calibrate, distill, packed

GOLDEN = Path(__file__).parent / "golden" / "quantised"


def original(name):
    """The BF16 model that Model Optimizer was given, its calibration text, its export, its plan."""
    file = load_file(GOLDEN / name / "model.safetensors")
    weights = load_file(GOLDEN / f"{name}.orig.safetensors")
    found = census.survey(GOLDEN / name)
    model = Nemotron(found.config).eval()
    with torch.no_grad():
        for key, v in model.state_dict().items():
            theirs = key.replace("backbone.", "model.", 1)
            v.copy_(weights[theirs] if theirs in weights else file[key])
    ids = load_file(GOLDEN / f"{name}.ref.safetensors")["calib"].long()
    plan = {u: found.plan.get(names[0]) for u, names in calibrate.units(model).items()}
    return model, ids, file, plan, found.kv


@pytest.mark.parametrize("name", ["mixed", "nvfp4", "fp8"])
def test_their_exports_bit_for_bit(name):
    model, ids, file, plan, kv = original(name)
    stats = calibrate.calibrate(model, ids.split(2), correlate=False)
    made = census.places(calibrate.quantize(model, plan, stats, "max", cache=bool(kv)))
    assert set(made) == set(file)
    raw = lambda t: t.contiguous().view(-1).view(torch.uint8)
    for key, want in file.items():
        if key.endswith(("input_scale", "k_scale", "v_scale")):  # theirs is calibrated in BF16
            assert abs(float(made[key] / want) - 1) < 0.02, key
        else:
            assert torch.equal(raw(made[key].to(want.dtype)), raw(want)), key


@pytest.fixture(scope="module")
def small():
    """A model of random weights, text for it, and what calibration heard."""
    model, ids, *_ = original("mixed")
    return model, ids, calibrate.calibrate(model, ids.split(4))


def test_each_method_is_best_at_what_it_minimises(small):
    model, _, stats = small
    name = "backbone.layers.0.mixer.in_proj"
    w, H = model.get_submodule(name).weight[None].detach(), stats[name].H
    error = {}
    for method in calibrate.METHODS:
        t = {k: v[0] for k, v in calibrate.encode(w, "NVFP4", method, H).items()}
        error[method] = packed.values("NVFP4", t) - w[0]
    own = torch.stack([H[0][16 * b : 16 * b + 16, 16 * b : 16 * b + 16] for b in range(4)])
    block = lambda e: float(
        torch.einsum("obi,bij,obj->", e.unflatten(1, (-1, 16)), own, e.unflatten(1, (-1, 16)))
    )
    whole = lambda e: float(((e @ H[0]) * e).sum())
    square = {m: float(e.square().sum()) for m, e in error.items()}
    assert square["mse"] < square["max"] and square["mse"] < square["output"] < square["max"] * 1.5
    assert square["gptq"] > square["mse"]
    assert block(error["output"]) < block(error["mse"]) < block(error["max"])
    assert whole(error["gptq"]) < whole(error["mse"])


def test_an_expert_that_no_token_chose_gets_finite_scales():
    w = torch.randn(3, 8, 32)
    H = torch.eye(32).repeat(3, 1, 1)
    H[1] = 0
    for method in calibrate.METHODS:
        t = calibrate.encode(w, "NVFP4", method, H)
        idle = calibrate.encode(w[1:2], "NVFP4", "max" if method == "max" else "mse")
        assert torch.equal(t["weight"][1], idle["weight"][0])
        assert all(v.float().isfinite().all() for v in t.values())
    for nothing in (0, 1e-44):  # of which fp32 has no 2688th part
        w[2] = nothing
        for kind in ("NVFP4", "FP8"):
            t = calibrate.encode(w, kind, "gptq", H)
            assert all(v.float().isfinite().all() for v in t.values())
            one = {k: v[2] for k, v in t.items()}
            assert not packed.values(kind, one).any()


def test_stacks_are_their_matrices_one_by_one():
    w = torch.randn(4, 6, 48) * torch.logspace(-3, 2, 4)[:, None, None]
    x = torch.randn(4, 100, 48)
    H = x.mT @ x
    for method in calibrate.METHODS:
        both = calibrate.encode(w, "NVFP4", method, H)
        for e in range(4):
            one = calibrate.encode(w[e : e + 1], "NVFP4", method, H[e : e + 1])
            assert all(torch.equal(both[k][e], one[k][0]) for k in both)


@pytest.mark.parametrize("method", calibrate.METHODS)
@pytest.mark.parametrize("power", [-90, 100])
def test_no_method_minds_how_large_the_weights_are(method, power):
    """A power of two changes weight_scale_2 and nothing else, where a square is no fp32 either."""
    w, x = torch.randn(2, 6, 48), torch.randn(2, 100, 48)
    one, other = (calibrate.encode(w * 2.0**p, "NVFP4", method, x.mT @ x) for p in (0, power))
    assert torch.equal(one["weight"], other["weight"])
    assert torch.equal(one["weight_scale"].float(), other["weight_scale"].float())
    assert torch.equal(one["weight_scale_2"] * 2.0**power, other["weight_scale_2"])


def nll(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def divergence(a, b, ids):
    """KL(a || b), nats a token."""
    p, q = (m(ids[:, :-1]).log_softmax(-1) for m in (a, b))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_scores_rank_the_units_as_their_divergence_does(small):
    """One unit at a time in NVFP4, on the text of calibration, against score / 2m."""
    toy = Nemotron(Config.preset("toy")).eval()
    ids = torch.randint(2048, (16, 65))
    stats = calibrate.calibrate(toy, [ids[:, :-1]])
    score = autoquant.sensitivity(toy, ids.split(8), stats, nll)
    guess, seen = [], []
    units = [u for u in score if "NVFP4" in score[u]][::3]
    for u in units:
        low = packed.rounded(calibrate.quantize(toy, {u: "NVFP4"}, stats, "mse", cache=False))
        guess.append(score[u]["NVFP4"] / 2 / ids[:, 1:].numel())
        seen.append(divergence(toy, low, ids))
    rank = lambda xs: torch.tensor(xs).argsort().argsort().double()
    a, b = rank(guess), rank(seen)
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.9, list(zip(units, guess, seen))


def test_the_knapsack_is_brute_force():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = {f"u{i}": 16 * int(n) for i, n in enumerate(torch.randint(1, 9, (6,), generator=g))}
        score = {}
        for u in sizes:
            s = torch.rand(2, generator=g).sort(descending=True).values.tolist()
            score[u] = {"NVFP4": s[0], "FP8": s[1], None: 0.0}
        bits = 4.5 + 6 * float(torch.rand((), generator=g))
        plan = autoquant.assign(score, sizes, bits)
        total = lambda p: sum(score[u][f] for u, f in p.items())
        each = [
            dict(zip(sizes, kinds))
            for kinds in itertools.product(("NVFP4", "FP8", None), repeat=len(sizes))
        ]
        best = min(total(p) for p in each if autoquant.mean_bits(p, sizes) <= bits)
        assert autoquant.mean_bits(plan, sizes) <= bits and abs(total(plan) - best) < 1e-9
    with pytest.raises(ValueError, match="4.4 bits a weight are too few: .* need 4.5"):
        autoquant.assign(score, sizes, 4.4)


def test_a_coarse_table_keeps_the_budget(monkeypatch):
    sizes = {f"u{i}": n for i, n in enumerate((1009, 2003, 4001, 523))}
    score = {u: {"NVFP4": 3.0, "FP8": 1.0, None: 0.0} for u in sizes}
    exact = autoquant.assign(score, sizes, 9)
    monkeypatch.setattr(autoquant, "ENTRIES", 500)
    coarse = autoquant.assign(score, sizes, 9)
    assert autoquant.mean_bits(coarse, sizes) <= 9 and set(exact) == set(coarse)


def test_maps_by_name_and_widths_that_four_bits_cannot_have():
    kinds = {"a.in_proj": ("NVFP4", "FP8"), "a.experts": ("NVFP4", "FP8"), "a.qkv": ("FP8",)}
    released = autoquant.named("released", kinds)
    assert released == {"a.in_proj": "FP8", "a.experts": "NVFP4", "a.qkv": None}
    assert set(autoquant.named("bf16", kinds).values()) == {None}
    with pytest.raises(ValueError, match="a.qkv has rows of no multiple of 16"):
        autoquant.named("nvfp4", kinds)
    with pytest.raises(ValueError, match="choose released"):
        autoquant.named("int4", kinds)


def test_packed_models_are_not_quantised_again():
    with pytest.raises(ValueError, match="calibration: [0-9]+ modules"):
        calibrate.calibrate(hf.load(GOLDEN / "mixed"), [])


# The command.

TINY = "hybrid_override_pattern=MEM*E,hidden_size=64,num_attention_heads=2,num_key_value_heads=1"
TINY += ",head_dim=32,mamba_num_heads=4,n_routed_experts=6,num_experts_per_tok=2,moe_latent_size=32"
FLAGS = ["--tokens", "256", "--eval-tokens", "256", "--length", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps; its text is a task's, so that nothing has to be learned to be read."""
    out = tmp_path_factory.mktemp("runs")
    text = out / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(4000)))
    flags = dict(
        out=str(out), name="tiny", data=str(text), tokenizer="bytes", model=TINY, prompt=""
    )
    flags |= dict(steps=12, batch=4, length=32, eval_tokens=512, threads=1, device="cpu")
    train.fit(train.Run(**flags, save_every=12, eval_every=12), say=lambda line: None)
    return out / "tiny"


def quantised(run, out, *flags):
    """What ptq.py prints."""
    lines = []
    settings = command.parser(ptq.Flags, "ptq.py", "-").parse_args([*FLAGS, *flags])
    given = dict(run=str(run), out=str(out)) | vars(settings)
    ptq.quantise(bounds.check(ptq.Flags(**given)), lines.append)
    return "\n".join(lines)


def mapped(out):
    return json.loads((out / "hf_quant_config.json").read_text())["quantization"]


def test_a_run_becomes_a_released_folder(run, tmp_path, capsys):
    out = tmp_path / "q"
    said = quantised(run, out, "--bits", "5")
    assert "calibrate  layer   1 of 5" in said and "s left" in said and "wrote" in said
    assert [p.name for p in sorted(out.iterdir())] == [
        "config.json",
        "hf_quant_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    kl = float(re.search(r"KL +([\d.]+) \+-", said)[1])
    mean = float(re.search(r"searched weights +([\d.]+)", said)[1])
    assert 0 < kl < 100 and 4.5 <= mean <= 5
    model, whole = packed.rounded(hf.load(out)), sample.load_run(run)[0]
    val = data.encode(data.tokenizer("bytes"), data.corpus(str(run.parent / "text.txt")).val)
    ids = ptq.windows(val, 256, 32, "-")
    assert abs(1e3 * divergence(whole, model, ids) - kl) < 0.006 + 1e-3 * kl  # of what was written
    sample.main(["--hf", str(out), "--max-new-tokens", "3", "--seed", "0", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("def ")


def reader(dir):
    """A checkpoint's weights in fp32 by released names, read by the published rules and by nothing
    of ours: JSON, bytes, the tables of E2M1 and E4M3.
    """
    said = json.loads((dir / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "modelopt" and said["quant_algo"] == "MIXED_PRECISION"
    raw = (dir / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + n])
    table.pop("__metadata__")

    def array(name):
        kinds = dict(U8="u1", F8_E4M3="u1", F32="<f4", BF16="<u2")
        h = table[name]
        a, b = h["data_offsets"]
        found = numpy.frombuffer(raw[8 + n + a : 8 + n + b], kinds[h["dtype"]]).reshape(h["shape"])
        if h["dtype"] == "BF16":
            found = (found.astype("u4") << 16).view("f4")
        return found

    e2m1 = numpy.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], "f4")
    exponent, mantissa = numpy.divmod(numpy.arange(128), 8)
    e4m3 = numpy.where(exponent, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 512.0)
    e4m3[127] = numpy.nan
    e4m3 = numpy.concatenate([e4m3, -e4m3]).astype("f4")
    found, used = {}, set()
    for module, rule in said["quantized_layers"].items():
        w, s = array(f"{module}.weight"), array(f"{module}.weight_scale")
        assert table[f"{module}.input_scale"]["shape"] == [] and array(f"{module}.input_scale") > 0
        used |= {f"{module}.{x}" for x in ("weight", "weight_scale", "input_scale")}
        if rule["quant_algo"] == "FP8":
            found[f"{module}.weight"] = e4m3[w] * s
        else:
            assert rule == dict(quant_algo="NVFP4", group_size=16)
            two = array(f"{module}.weight_scale_2")
            used.add(f"{module}.weight_scale_2")
            q = numpy.stack([e2m1[w & 15], e2m1[w >> 4]], -1).reshape(len(w), -1)
            found[f"{module}.weight"] = q * (e4m3[s] * two).repeat(16, 1)
    assert not any(
        name.endswith(("_scale", "_scale_2"))
        for name in set(table) - used
        if "proj.k_" not in name and "proj.v_" not in name
    )
    return found | {name: array(name) for name in set(table) - used}


def test_an_independent_reader_takes_the_export(run, tmp_path):
    quantised(run, tmp_path / "q", "--bits", "5")
    weights, model = reader(tmp_path / "q"), hf.load(tmp_path / "q")
    seen = 0
    for name, m in model.named_modules():
        if isinstance(m, packed.Packed):
            assert torch.equal(torch.from_numpy(weights[f"{name}.weight"]), m.dense())
            seen += 1
        elif isinstance(m, packed.Stack):
            layer, _, proj = name.rpartition(".")
            for e, w in enumerate(m.dense()):
                assert torch.equal(torch.from_numpy(weights[f"{layer}.{e}.{proj}.weight"]), w)
            seen += 1
    assert seen > 10


def test_a_folder_goes_the_same_way_as_a_run_module_by_module(run, tmp_path):
    """--hf of what was saved in BF16 gives what the whole model gives, in files of any size."""
    model, enc, _ = sample.load_run(run)
    hf.save(model, tmp_path / "bf16", dtype=torch.bfloat16)
    (tmp_path / "bf16" / "tokenizer.json").write_text(json.dumps(data.pack(enc)))
    text = ["--data", str(run.parent / "text.txt")]
    said = quantised(
        run, tmp_path / "a", "--hf", str(tmp_path / "bf16"), "--shard-bytes", "100000", *text
    )
    assert "wrote" in said and len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    whole = hf.load(tmp_path / "bf16")
    numel, _ = ptq.sizes(ptq.Held(whole))
    made = hf.load(tmp_path / "a")
    train_text = data.encode(enc, data.corpus(text[1]).train)
    ids = ptq.windows(train_text, 256, 32, "-")
    stats = calibrate.calibrate(whole, [ids[:, :-1]], correlate=False)
    score = autoquant.sensitivity(whole, ids.split(8), stats, nll)
    plan = autoquant.assign(score, numel, 4.75)
    want = census.places(calibrate.quantize(whole, plan, stats, "mse"))
    got = census.places(made)
    assert set(got) == set(want)
    same = sum(torch.equal(got[n].float(), want[n].float()) for n in got)
    assert all(torch.allclose(got[n].float(), want[n].float(), rtol=1e-5) for n in got), same


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "at", ["calibrate  layer   3", "score      layer   2", "write      layer   4"]
)
def test_who_was_interrupted_goes_on(run, tmp_path, at, monkeypatch):
    whole = quantised(run, tmp_path / "a", "--shard-bytes", "100000")
    note = ptq.Work.note

    def stop(self, what, i, old=False):
        note(self, what, i, old)
        if f"{what:10} layer {i + 1:3}".startswith(at) and not old:
            raise Stopped

    monkeypatch.setattr(ptq.Work, "note", stop)
    with pytest.raises(Stopped):
        quantised(run, tmp_path / "b", "--shard-bytes", "100000")
    monkeypatch.undo()
    assert not (tmp_path / "b" / "config.json").exists()
    with pytest.raises(ValueError, match="unfinished quantisation with another bits"):
        quantised(run, tmp_path / "b", "--shard-bytes", "100000", "--bits", "6")
    for name, whose in (("text", ptq.data.Corpus), ("weights", ptq)):
        with monkeypatch.context() as patch:
            patch.setattr(whose, *dict(text=("sha256", "x"), weights=("mark", lambda a: "x"))[name])
            with pytest.raises(ValueError, match=f"unfinished quantisation with another {name}"):
                quantised(run, tmp_path / "b", "--shard-bytes", "100000")
    with disk.lock(tmp_path / "b"), pytest.raises(ValueError, match="is in use"):
        quantised(run, tmp_path / "b", "--shard-bytes", "100000")
    again = quantised(run, tmp_path / "b", "--shard-bytes", "100000")
    # the layers of a file that was not finished are done again
    done = "write      layer   1" if at.startswith("write") else at
    assert "going on" in again and done not in again
    assert again.splitlines()[-3] == whole.splitlines()[-3]
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_every_flag_has_an_effect(run, tmp_path):
    out = [0]

    def numbers(*flags):
        out[0] += 1
        folder = tmp_path / str(out[0])
        said = quantised(run, folder, *flags)
        return said, mapped(folder), load_file(folder / "model.safetensors")

    said, plan, tensors = numbers("--bits", "5")
    count = lambda plan: [v["quant_algo"] for v in plan["quantized_layers"].values()].count("FP8")
    differ = lambda other: any(
        not torch.equal(other[n].float(), t.float()) for n, t in tensors.items()
    )
    assert count(numbers("--bits", "7.5")[1]) > count(plan)
    for method in ("max", "output", "gptq"):
        assert differ(numbers("--bits", "5", "--map", "search", "--method", method)[2])
    assert count(numbers("--map", "fp8")[1]) == len(numbers("--map", "fp8")[1]["quantized_layers"])
    assert numbers("--bits", "5", "--no-cache")[1]["kv_cache_quant_algo"] is None
    fewer = numbers("--bits", "5", "--tokens", "64")[2]
    scales = [n for n in set(tensors) & set(fewer) if n.endswith("input_scale")]
    assert any(fewer[n] < tensors[n] for n in scales)
    assert numbers("--bits", "5", "--eval-tokens", "128")[0] != said
    weights = numbers("--bits", "5", "--no-activations")[0]
    kl = lambda text: float(re.search(r"KL +([\d.]+) \+-", text)[1])
    assert kl(weights) < kl(said) and "weights alone rounded" in weights
    assert "distill    step    2 of 2" in numbers("--bits", "5", "--distill", "2")[0]


def test_distillation_s_flags_and_the_text_s_have_an_effect(run, tmp_path):
    out = [0]

    def same(one, other):
        return all(torch.equal(t.float(), other[n].float()) for n, t in one.items())

    def tensors(*flags):
        out[0] += 1
        folder = tmp_path / str(out[0])
        quantised(run, folder, "--map", "nvfp4", "--method", "max", *flags)
        return load_file(folder / "model.safetensors")

    plain, learned = tensors(), tensors("--distill", "2", "--lr", "1e-3")
    assert not same(plain, learned) and same(learned, tensors("--distill", "2", "--lr", "1e-3"))
    assert not same(learned, tensors("--distill", "2", "--lr", "1e-2"))
    assert not same(learned, tensors("--distill", "2", "--lr", "1e-3", "--seed", "1"))
    assert same(plain, tensors("--seed", "1"))  # without distillation nothing is drawn
    assert not same(plain, tensors("--length", "16"))
    other = tmp_path / "other.txt"
    other.write_text("".join(f"x{i} = {{}}\n" for i in range(9000)))
    assert not same(plain, tensors("--data", str(other)))


def test_threads_are_torch_s(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    quantised(run, tmp_path / "a", "--map", "fp8", "--threads", "0")
    assert asked == []  # torch's choice
    quantised(run, tmp_path / "b", "--map", "fp8", "--threads", "3")
    assert asked == [3]


def test_distillation_repairs_and_does_not_touch_mtp():
    toy = Nemotron(Config.preset("toy")).eval()
    ids = torch.randint(2048, (16, 33))
    stats = calibrate.calibrate(toy, [ids[:, :-1]], correlate=False)
    plan = {u: "NVFP4" for u in calibrate.units(toy)}
    low = lambda model: packed.rounded(calibrate.quantize(model, plan, stats, "max", cache=False))
    learned = distill.distill(toy, plan, stats, ids, 12, 3e-4, say=lambda line: None)
    assert divergence(toy, low(learned), ids) < 0.9 * divergence(toy, low(toy), ids)
    assert list(learned.state_dict()) == list(toy.state_dict())
    for (n, a), b in zip(learned.mtp.state_dict().items(), toy.mtp.state_dict().values()):
        assert torch.equal(a, b), n


def test_what_the_command_refuses(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    short = tmp_path / "short.txt"
    short.write_text("a few words " * 40)
    for flags, message in (
        (["--out", str(tmp_path / "there")], "there and not empty"),
        (["--hf", str(GOLDEN / "mixed")], "modules of this model are packed"),
        (["--out", str(GOLDEN / "mixed")], "holds a checkpoint already"),
        (["--distill", "2", "--method", "gptq"], "--method gptq with --distill"),
        (["--data", str(short)], "tokens are too few"),
        (["--hf", str(tmp_path)], "config.json|No such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            quantised(run, tmp_path / "new", *flags)
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_this_file_can_fail():
    """Scales of the neighbour's block: no export is reproduced, and no method is any good."""
    w = torch.randn(1, 16, 64) * torch.logspace(-2, 2, 64)
    t = {k: v[0] for k, v in calibrate.encode(w, "NVFP4", "mse").items()}
    good = (packed.values("NVFP4", t) - w[0]).norm()
    t["weight_scale"] = t["weight_scale"].view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn)
    assert (packed.values("NVFP4", t) - w[0]).norm() > 2 * good
