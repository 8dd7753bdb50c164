"""
kernels/fp4.py is nvfp4.py: codes and scales bit for bit.

Ragged in rows and columns, both tiles, both roundings, row and column copies, the golden inputs
whose ties show a wrong order of operations.
"""

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import nvfp4
from kernels import fp4

G = load_file(ROOT / "tests" / "golden" / "nvfp4.safetensors")
INPUTS = sorted(k.split("/")[0] for k in G if k.endswith("/te1d.q"))
R = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(got, want):
    """Codes, scales and amax, bit for bit."""
    return [
        bool((a.view(torch.uint8) == b.view(torch.uint8)).all()) for a, b in zip(got, want)
    ] == [True] * 3


@pytest.mark.parametrize("name", INPUTS)
def test_golden_inputs_bit_for_bit(name):
    x = G[f"{name}/x"]
    for tile in ((1, 16), (16, 16)):
        assert same(fp4.quantize(x, tile), nvfp4.quantize(x, tile)), tile
    if f"{name}/rht.qT" in G:
        q, s, amax = fp4.quantize(x.T, rht=True)
        assert torch.equal(q, G[f"{name}/rht.qT"]) and torch.equal(
            s.view(torch.uint8), G[f"{name}/rht.sT"]
        )
        assert torch.equal(amax, G[f"{name}/rht.amax"])


@pytest.mark.parametrize("m,k", [(48, 144), (16, 16), (33, 272)])
def test_ragged_sizes_and_every_byte_of_noise(m, k):
    x = (R(m, k) * R(m, 1, seed=1).exp()).bfloat16()
    noise = torch.randint(
        0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    assert same(fp4.quantize(x), nvfp4.quantize(x))
    assert same(fp4.quantize(x, noise=noise), nvfp4.quantize(x, noise=noise))
    if m % 16 == 0:
        assert same(fp4.quantize(x, (16, 16)), nvfp4.quantize(x, (16, 16)))
        assert same(fp4.quantize(x.T), nvfp4.quantize(x.T.contiguous()))


def test_fake_is_the_operand_of_the_emulated_product():
    x = R(32, 64)
    y, amax = fp4.quantize(x, fake=True)
    q, s, want = nvfp4.encode(x, (1, 16))
    assert torch.equal(y.float(), (q * s).view_as(x)) and amax == want


def test_philox_has_the_right_mean():
    """0.3 beside 1: six times as much is 1.8, between 1.5 and 2."""
    x = torch.full((32, 128), 0.3)
    x[:, ::16] = 1
    q, s, amax = fp4.quantize(x, seed=7)
    y = nvfp4.dequantize(nvfp4.NVFP4(q, s, amax))[x != 1]
    low, high = y.unique().tolist()
    assert low < 0.3 < high and abs(float(y.mean()) - 0.3) < (high - low) * (
        4 * 0.5 / y.numel() ** 0.5 + 1 / 256
    )
    assert not torch.equal(q, fp4.quantize(x, seed=8)[0])


def test_bad_input_says_why():
    for call, why in (
        (lambda: fp4.quantize(R(4, 17)), "does not divide"),
        (lambda: fp4.quantize(R(3, 40, 16)), "does not divide"),
    ):
        with pytest.raises(ValueError, match=why):
            call()


def test_this_file_can_fail():
    x = G["ties_32x64_f32/x"]
    assert not same(fp4.quantize(x * 1.0000002), nvfp4.quantize(x))
    assert not same(fp4.quantize(x, (16, 16)), nvfp4.quantize(x))
