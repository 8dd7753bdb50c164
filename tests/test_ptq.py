"""Post-training quantisation: Model Optimizer's exports reproduced bit for bit, the four methods,
the scores against what they predict, the knapsack against brute force, and the command.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import hf
from model import Config, Nemotron
from quant import autoquant, calibrate, packed

GOLDEN = Path(__file__).parent / "golden" / "quantised"


def original(name):
    """The BF16 model that Model Optimizer was given, its calibration text, its export, its plan."""
    file = load_file(GOLDEN / name / "model.safetensors")
    weights = load_file(GOLDEN / f"{name}.orig.safetensors")
    found = hf.survey(GOLDEN / name)
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
    made = hf.places(calibrate.quantize(model, plan, stats, "max", cache=bool(kv)))
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
    w[2] = 0
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


def test_this_file_can_fail():
    """Scales of the neighbour's block: no export is reproduced, and no method is any good."""
    w = torch.randn(1, 16, 64) * torch.logspace(-2, 2, 64)
    t = {k: v[0] for k, v in calibrate.encode(w, "NVFP4", "mse").items()}
    good = (packed.values("NVFP4", t) - w[0]).norm()
    t["weight_scale"] = t["weight_scale"].view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn)
    assert (packed.values("NVFP4", t) - w[0]).norm() > 2 * good
