"""The Mamba state in few bits: the random numbers, the rounding, the drift, and the seam in the
model.
"""

from dataclasses import replace

import pytest
import torch

from graph import compiled
from model import Config, Nemotron
from quant import statecache
from quant.statecache import Store, drift, mix, neighbours, noise, philox, read, to_blocks, to_fp16
from sample import generate


def test_philox_gives_the_published_words():
    got = [f"{w:08x}" for w in philox(torch.zeros(1, dtype=torch.int64), 0)[0].tolist()]
    assert got == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_three_rounds_leave_neighbours_alike_and_four_do_not():
    assert neighbours(3) > 2
    for rounds in (4, 5, 10):
        assert abs(neighbours(rounds) - 1) < 0.05


@pytest.mark.parametrize("x", [1.0003, -3.1416, 1e-5, 70.1, 3e-7, 0.0])
def test_rounding_at_random_is_unbiased_and_within_a_step(x):
    S = torch.full((1 << 20,), x)
    got = to_fp16(S, noise(S, mix(torch.tensor(7)), 5)).double()
    step = max(2.0**-24, 2.0 ** (torch.tensor(abs(x)).log2().floor().item() - 10)) if x else 0
    assert (got - S.double()).abs().max() <= step
    assert abs(float(got.mean() - S[0].double())) <= 4 * step / 2 / 2**10 + step / 2**13


def test_fp16_keeps_what_it_can_hold_and_its_largest_number():
    S = torch.randn(4096).half().float()
    assert torch.equal(to_fp16(S), S)
    assert torch.equal(to_fp16(S, torch.full(S.shape, 8191)), S)  # no bit is left to carry into
    far = torch.tensor([1e6, -1e6])
    assert (
        to_fp16(far).tolist() == to_fp16(far, torch.tensor([8191, 0])).tolist() == [65504, -65504]
    )


@pytest.mark.parametrize("kind", ["int8", "int16", "fp8"])
def test_blocks_keep_their_largest_and_err_by_less_than_a_step(kind):
    S = torch.randn(2, 3, 4, 128) * torch.logspace(-6, 6, 2)[:, None, None, None]
    r = noise(S, mix(torch.tensor(1)), 5)
    top, amax = statecache.TOPS[kind], S.abs().amax(-1, keepdim=True)
    step = amax / (14 if kind == "fp8" else top)
    for got in (to_blocks(S, kind), to_blocks(S, kind, r)):
        assert ((got - S).abs() <= step * 1.001).all() and not torch.equal(got, S)
    assert torch.equal(to_blocks(torch.zeros(128), kind, r[0, 0, 0]), torch.zeros(128))
    with pytest.raises(ValueError, match="blocks of 128"):
        to_blocks(torch.zeros(100), kind)


def test_nearest_drifts_over_a_long_memory_and_random_does_not():
    near, bias = drift("fp16", None, 1e5, 4096)
    random, even = drift("fp16", 5, 1e5, 4096)
    assert near > 3 * random and bias < -0.02 and abs(even) < 0.005
    near, _ = drift("fp16", None, 100, 1024)
    random, _ = drift("fp16", 5, 100, 1024)
    assert near < random  # a short memory forgets the errors, and nearest makes the smaller ones


def test_a_store_draws_anew_each_time_and_repeats_with_its_seed():
    S = torch.randn(1, 2, 4, 128)
    a, b, c = Store("fp16", 5, seed=3), Store("fp16", 5, seed=3), Store("fp16", 5, seed=3, layer=1)
    first, again = a(S), a(S)
    assert torch.equal(first, b(S)) and not torch.equal(first, again)
    assert not torch.equal(first, c(S))


@pytest.fixture(scope="module")
def model():
    return Nemotron(Config.preset("toy")).eval()


@torch.no_grad()
def test_the_seam_rounds_what_is_kept_and_nothing_else(model):
    ids = torch.randint(2048, (2, 12))
    exact = model(ids, model.new_cache(2))
    for text, dtype in (
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("int8:5", torch.float32),
    ):
        model.store = read(text)
        cache = model.new_cache(2)
        first = model(ids[:, :6], cache)
        states = [x.S for x in cache.layers if hasattr(x, "S")]
        assert states[0].dtype == dtype
        assert torch.equal(first, exact[:, :6]) or (first - exact[:, :6]).abs().max() < 1e-4
        rest = model(ids[:, 6:], cache)
        assert 0 < (rest - exact[:, 6:]).abs().max() < 0.5
        model.store = read("fp32")
        cache = model.new_cache(2)
        whole = torch.cat([model(ids[:, :6], cache), model(ids[:, 6:], cache)], 1)
        assert (whole - exact).abs().max() < 1e-4
    model.store = None


@torch.no_grad()
def test_the_key_is_a_tensor_that_a_step_carries_on(model):
    model.store = read("fp16:5", seed=1)
    cache = model.new_cache(1)
    model(torch.tensor([[1, 2, 3]]), cache)
    keys = [x.key for x in cache.layers if hasattr(x, "S")]
    assert all(any(t is k for t in cache.tensors()) for k in keys)
    assert len({int(k) for k in keys}) == len(keys)
    before = [int(k) for k in keys]
    model(torch.tensor([[4]]), cache)
    after = [int(x.key) for x in cache.layers if hasattr(x, "S")]
    assert all(a == b + 1 for a, b in zip(after, before))
    model.store = None


@pytest.mark.slow
def test_a_compiled_step_draws_the_same_numbers():
    """Its key is an input and an output: a key built in would draw the same noise at every step."""
    small = replace(
        Config.preset("toy"),
        hybrid_override_pattern="ME*M",
        hidden_size=64,
        vocab_size=64,
        num_nextn_predict_layers=0,
    )
    model = Nemotron(small).eval()
    model.store = read("fp16:5", seed=3)
    caches, step = [model.new_cache(1) for _ in range(2)], compiled(model, tune=False)
    with torch.no_grad():
        for cache in caches:
            model(torch.arange(9)[None], cache)
            cache.fix(64)
        for i in range(4):
            ids = torch.tensor([[i]])
            assert (step(ids, caches[0]) - model(ids, caches[1])).abs().max() < 1e-4
            pairs = [(a, b) for a, b in zip(caches[0].layers, caches[1].layers) if hasattr(a, "S")]
            assert all(a.S.dtype == torch.float16 and int(a.key) == int(b.key) for a, b in pairs)
            same = [float((a.S == b.S).float().mean()) for a, b in pairs]
            assert min(same) > 0.95  # but for what stood on a step's edge; other noise: a half


def test_speculation_with_a_rounded_state_runs_and_with_fp32_loses_nothing(model):
    prompt = torch.randint(2048, (1, 8))
    model.store = read("fp16:5")
    assert generate(model, prompt, 12, speculate=3).shape[1] >= 20
    model.store = read("fp32")
    plain = generate(model, prompt, 12)
    assert torch.equal(generate(model, prompt, 12, speculate=3), plain)
    model.store = None


def test_what_is_no_format():
    for text in ("fp17", "fp16:x", "fp16:0", "bf16:5", "fp32:5"):
        with pytest.raises(ValueError, match="state|rounds"):
            read(text)


def test_this_file_can_fail():
    """Noise that is always the same rounds to the nearest of a shifted grid: the mean shows it."""
    S = torch.full((1 << 16,), 1.0003)
    assert abs(float(to_fp16(S, torch.zeros(S.shape)).double().mean() - 1.0003)) > 1e-5
