"""
kernels/fp4.py is nvfp4.py: codes and scales bit for bit, products to fp32's rounding.

Ragged in rows and columns, both tiles, both roundings, row and column copies, the golden inputs whose ties show a
wrong order of operations.
"""
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, rms
from safetensors.torch import load_file

import nvfp4
from kernels import fp4

G = load_file(ROOT / "tests" / "golden" / "nvfp4.safetensors")
INPUTS = sorted(k.split("/")[0] for k in G if k.endswith("/te1d.q"))
R = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(got, want):
    """Codes, scales and amax, bit for bit."""
    return [bool((a.view(torch.uint8) == b.view(torch.uint8)).all()) for a, b in zip(got, want)] == [True] * 3


@pytest.mark.parametrize("name", INPUTS)
def test_golden_inputs_bit_for_bit(name):
    x = G[f"{name}/x"]
    for tile in ((1, 16), (16, 16)):
        assert same(fp4.quantize(x, tile), nvfp4.quantize(x, tile)), tile
    if f"{name}/rht.qT" in G:
        q, s, _ = fp4.quantize(x.T, rht=True, amax=G[f"{name}/rht.amax"])
        assert torch.equal(q, G[f"{name}/rht.qT"]) and torch.equal(s.view(torch.uint8), G[f"{name}/rht.sT"])


@pytest.mark.parametrize("m,k", [(48, 144), (16, 16), (33, 272)])
def test_ragged_sizes_and_every_byte_of_noise(m, k):
    x = (R(m, k) * R(m, 1, seed=1).exp()).bfloat16()
    noise = torch.randint(0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
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
    x = torch.full((32, 128), .3)
    x[:, ::16] = 1
    q, s, amax = fp4.quantize(x, seed=7)
    y = nvfp4.dequantize(nvfp4.NVFP4(q, s, amax))[x != 1]
    low, high = y.unique().tolist()
    assert low < .3 < high and abs(float(y.mean()) - .3) < (high - low) * (4 * .5 / y.numel() ** .5 + 1 / 256)
    assert not torch.equal(q, fp4.quantize(x, seed=8)[0])


def products(m, n, k):
    a, b = nvfp4.quantize(R(m, k)), nvfp4.quantize(R(n, k, seed=1))
    exact = nvfp4.dequantize(a).double() @ nvfp4.dequantize(b).double().T
    return a, b, exact


@pytest.mark.parametrize("native", [False, True])
def test_the_product_of_codes(native):
    for m, n, k in ((40, 33, 208), (64, 32, 64)):
        a, b, exact = products(m, n, k)
        assert rms(fp4.gemm(a, b, torch.float32, native, BM=32, BN=32, BK=64), exact) < 1e-6


def test_the_product_that_decodes():
    for m, n, k in ((3, 70, 208), (17, 64, 128)):
        _, b, _ = products(m, n, k)
        x = R(m, k, seed=5).bfloat16()
        assert rms(fp4.decode(x, b), x.double() @ nvfp4.dequantize(b).double().T) < 3e-3


def test_golden_products():
    g = lambda name: (G[f"gemm/{name}.q"], G[f"gemm/{name}.s"].view(torch.float8_e4m3fn), G[f"gemm/{name}.amax"])
    y = fp4.gemm(g("x"), g("w"), torch.float32, False, BM=64, BN=32)
    assert (y - G["gemm/y"]).abs().max() < 1e-6 * G["gemm/y"].abs().max()


@pytest.mark.parametrize("text", ["nvfp4", "nvfp4-rht", "nvfp4-sr"])
def test_a_layer_from_codes_is_the_emulated_layer(text):
    """Output and both gradients, sizes that need padding, the same random bytes."""
    recipe, answers = nvfp4.Recipe.read(text), []
    for fast in (False, True):
        torch.manual_seed(0)
        x, w = R(40, 24).requires_grad_(), R(33, 24, seed=1).requires_grad_()
        y = nvfp4.matmul(x, w[None], None, nvfp4.Operands(replace(recipe, fast=fast)))
        y.backward(R(40, 33, seed=2))
        answers.append((y, x.grad, w.grad))
    for a, b in zip(*answers):
        assert rms(b, a) < 1e-6
    assert same(nvfp4.quantize(R(16, 32), fast=True), nvfp4.quantize(R(16, 32)))


def test_bad_input_says_why():
    for call, why in ((lambda: fp4.quantize(R(4, 17)), "does not divide"), (lambda: fp4.quantize(R(16, 16), rht=True), "needs amax"),
                      (lambda: fp4.gemm(nvfp4.quantize(R(16, 16)), nvfp4.quantize(R(16, 32))), "16 columns, b 32"),
                      (lambda: fp4.decode(R(2, 16), nvfp4.quantize(R(16, 32))), "16 columns, b 32")):
        with pytest.raises(ValueError, match=why):
            call()


def test_this_file_can_fail():
    x = G["ties_32x64_f32/x"]
    assert not same(fp4.quantize(x * 1.0000002), nvfp4.quantize(x))
    assert not same(fp4.quantize(x, (16, 16)), nvfp4.quantize(x))
    a, b, exact = products(32, 32, 64)
    wrong = b[0], b[1].view(torch.uint8).flip(1).view(torch.float8_e4m3fn), b[2]
    assert rms(fp4.gemm(a, wrong, torch.float32, False, BM=32, BN=32, BK=64), exact) > .01
