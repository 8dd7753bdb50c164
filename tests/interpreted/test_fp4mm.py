"""
kernels/fp4mm.py against fp64's products of the same codes, to fp32's rounding; a layer and stacked
experts against the emulated recipe of quant/lowbit.py, operand by operand to the bit.
"""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, rms
from safetensors.torch import load_file

import nvfp4
import train
from kernels import fp4, fp4mm
from quant import lowbit

G = load_file(ROOT / "tests" / "golden" / "nvfp4.safetensors")
R = lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(x):
    """x in steps of 2^-10. Of such numbers, below 1,024, fp32 holds every sum of a rotation: 16 of
    them over 4, so no bit depends on the order that a library for matrices adds them in."""
    x = (x * 1024).round() / 1024
    assert x.abs().max() * 16 * 1024 < 2**24
    return x


def products(m, n, k):
    a, b = nvfp4.quantize(R(m, k)), nvfp4.quantize(R(n, k, seed=1))
    exact = nvfp4.dequantize(a).double() @ nvfp4.dequantize(b).double().T
    return a, b, exact


@pytest.mark.parametrize("native", [False, True])
def test_the_product_of_codes(native):
    for m, n, k in ((40, 33, 208), (64, 32, 64)):
        a, b, exact = products(m, n, k)
        assert rms(fp4mm.gemm(a, b, torch.float32, native, BM=32, BN=32, BK=64), exact) < 1e-6


@pytest.mark.parametrize("kind", ["NVFP4", "W4A16_NVFP4"])
def test_packed_weights_go_through_it(kind, monkeypatch):
    """A released matrix and a layer's experts, fast and readable; fp32 is refused."""
    from quant import packed

    def filled(m):
        for b in m.buffers():
            bits = torch.randint(1, 120, b.shape, dtype=torch.uint8)
            b.copy_(torch.rand(b.shape) * 0.01 if b.dtype == torch.float32 else bits.view(b.dtype))
        return m

    x, layer = torch.randn(3, 80).half(), filled(packed.Packed(kind, 48, 80))
    slow, calls, real = layer(x), [], fp4mm.decode
    monkeypatch.setattr(fp4mm, "decode", lambda *a, **kw: calls.append(a) or real(*a, **kw))
    layer.fast = True
    assert rms(layer(x), slow) < 3e-3 and len(calls) == 1
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        layer(x.float())
    stack, count = filled(packed.Stack(kind, 4, 48, 80)), torch.tensor([1, 0, 2, 0])
    slow = packed.mm(x, stack, count)
    stack.fast = True
    assert rms(packed.mm(x, stack, count), slow) < 3e-3 and len(calls) == 4


def test_the_product_that_decodes():
    for m, n, k in ((3, 70, 208), (17, 64, 128)):
        _, b, _ = products(m, n, k)
        x = R(m, k, seed=5).bfloat16()
        assert rms(fp4mm.decode(x, b), x.double() @ nvfp4.dequantize(b).double().T) < 3e-3


def test_golden_products():
    g = lambda name: (
        G[f"gemm/{name}.q"],
        G[f"gemm/{name}.s"].view(torch.float8_e4m3fn),
        G[f"gemm/{name}.amax"],
    )
    y = fp4mm.gemm(g("x"), g("w"), torch.float32, False, BM=64, BN=32)
    assert (y - G["gemm/y"]).abs().max() < 1e-6 * G["gemm/y"].abs().max()


def layer(monkeypatch, text, fast, x, w, dy, count=None):
    """matmul there and back -> y, dx, dw, and what every operand was rounded to: q, s_b, amax by
    name.
    """
    names, seen = ["fprop x", "fprop w", "dgrad dy", "wgrad dy", "wgrad x"], {}
    if fast or "2d" in text:
        names.insert(3 if fast else 2, "dgrad w")  # else the tiles of fprop's
    encode, quantize = nvfp4.encode, fp4.quantize

    def emulated(v, *rest):
        q, s, amax = encode(v, *rest)
        seen[names[len(seen)]] = q.reshape(v.shape).clone(), s.expand_as(q).reshape(v.shape), amax
        return q, s, amax

    def coded(v, *rest, **more):
        q, s, amax = quantize(v, *rest, **more)
        name, turn = names[len(seen)], v.shape if v.ndim == 3 else (1, *v.shape)
        seen[name] = (nvfp4.unpack(q), s.float().repeat_interleave(16, 1), amax)
        if name in ("dgrad w", "wgrad dy", "wgrad x"):
            seen[name] = *(t.view(turn).mT.flatten(0, 1) for t in seen[name][:2]), amax
        return q, s, amax

    monkeypatch.setattr(nvfp4, "encode", emulated)
    monkeypatch.setattr(fp4, "quantize", coded)
    torch.manual_seed(0)
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = lowbit.matmul(x, w, count, lowbit.Operands(replace(nvfp4.Recipe.read(text), fast=fast)))
    y.backward(dy)
    monkeypatch.undo()
    assert len(seen) == len(names)
    return (y, x.grad, w.grad), seen


@pytest.mark.parametrize("count", [None, [7, 0, 133, 1, 16], [0, 40, 0, 0, 0]])
@pytest.mark.parametrize("text", ["nvfp4", "nvfp4-2d", "nvfp4-rht-sr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_from_codes_are_the_emulated_ones(monkeypatch, dtype, text, count):
    """Output and both gradients of a layer and of stacked experts, sizes that need padding, the
    same random bytes; every operand's codes and scales bit for bit."""
    E, m = (1, 40) if count is None else (5, sum(count))
    x, w = (
        grid(R(m, 24) * R(m, 1, seed=3).exp()).to(dtype),
        R(E, 40, 24, seed=1) * torch.arange(1.0, E + 1)[:, None, None],
    )
    count = count if count is None else torch.tensor(count)
    (want, ops), (got, codes) = (
        layer(monkeypatch, text, fast, x, w, grid(R(m, 40, seed=9)).to(dtype), count)
        for fast in (False, True)
    )
    if "dgrad w" not in ops:
        ops["dgrad w"] = ops["fprop w"]
    for name in codes:
        assert all(torch.equal(a, b) for a, b in zip(codes[name], ops[name])), name
    for a, b in zip(got, want):
        assert a.dtype == b.dtype and (a - b).abs().max() <= b.abs().max() * (
            1e-6 if a.dtype == torch.float32 else 2**-8
        )


def test_flushed_shares_are_counted_the_same(monkeypatch):
    shares = []
    for fast in (False, True):
        how = lowbit.Operands(nvfp4.Recipe(fast=fast))
        how.flushed = {}
        torch.manual_seed(0)
        x = grid(R(48, 32).relu().square()).requires_grad_()
        lowbit.matmul(
            x, R(2, 32, 32, seed=1).requires_grad_(), torch.tensor([17, 31]), how
        ).sum().backward()
        shares.append({k: v.tolist() for k, v in how.flushed.items()})
    assert (
        shares[1].pop("dgrad w") == shares[0]["fprop w"]
        and shares[0] == shares[1]
        and shares[0]["fprop x"][0] > 0
    )


def test_training_in_four_bits_with_every_kernel(tmp_path):
    """train.py --precision nvfp4 --fast: a step of the whole model, its loss and what it says."""
    losses = []
    for fast in (False, True):
        lines = []
        tiny = (
            "hybrid_override_pattern=EM,hidden_size=32,mamba_num_heads=2,n_routed_experts=4,num_experts_per_tok=2,"
            "moe_latent_size=16,moe_intermediate_size=32,moe_shared_expert_intermediate_size=32,"
            "num_nextn_predict_layers=0"
        )
        run = train.Run(
            name=f"{fast}",
            out=str(tmp_path),
            model=tiny,
            data="recall",
            tokenizer="bytes",
            batch=2,
            length=16,
            eval_tokens=16,
            prompt="",
            device="cpu",
            steps=1,
            precision="nvfp4-last",
            fast=fast,
            diagnose=True,
        )
        _, rows = train.fit(run, say=lines.append)
        losses.append(rows[-1]["train_nats"])
        text = "\n".join(lines)
        assert ("NVFP4 by kernels/fp4mm.py" in text) is fast is (
            "four bits: kernels/fp4mm.py" in text
        ) and rows[-1]["fprop_x"] > 0
    assert abs(losses[1] - losses[0]) < 1e-3 * losses[0]


def test_bad_input_says_why():
    for call in (
        lambda: fp4mm.gemm(nvfp4.quantize(R(16, 16)), nvfp4.quantize(R(16, 32))),
        lambda: fp4mm.decode(R(2, 16), nvfp4.quantize(R(16, 32))),
    ):
        with pytest.raises(ValueError, match="16 columns, b 32"):
            call()


def test_this_file_can_fail():
    a, b, exact = products(32, 32, 64)
    wrong = b[0], b[1].view(torch.uint8).flip(1).view(torch.float8_e4m3fn), b[2]
    assert rms(fp4mm.gemm(a, wrong, torch.float32, False, BM=32, BN=32, BK=64), exact) > 0.01
