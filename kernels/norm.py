"""
norm: the gate and the RMSNorm of each group in one pass. mamba.GatedNorm's forward, same numbers.

    v = y silu(z)      r = 1 / sqrt(mean of v^2 over the group + eps)      out = w v r

Backward, with o = d out and k = v r, the normalised value. r depends on every v of its group, which
is the subtracted term: what of the gradient points along k only changes the length, and the length
is divided away.

    dv = r (w o - k mean(w o k))      dw = sum over tokens of o k
    dy = dv silu(z)                   dz = dv y silu'(z)

letters  e channels of a token in g groups; E = e/g numbers share an r
grid     forward (tokens, g): one group of one token (1024 numbers in Super) is one program's
         registers. Backward (tokens / 32, g): 32 tokens one after the other, so dw sums in
         registers; 1/32 of it reaches memory
traffic  forward reads y and z and writes out: 403 MB at 8192 tokens of Super in bf16, the minimum
         (eager: 7 passes). Backward reads o, y, z and writes dy, dz: 671 MB, the minimum; r is
         computed again, not kept.
numbers  fp32 inside, one rounding at the end. dw: partial sums in fp32, added by torch: no atomics.
sizes    4 warps: 8 numbers a thread and tensor in Super, one 16-byte load. A group must fit: at
         most 8192 numbers.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import on_gpu, rows, unit

TOKENS = 32  # a program's in backward


@triton.jit
def _forward(Y, Z, W, OUT, SY, SZ, eps, E: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    SY, SZ = SY * UNIT, SZ * UNIT
    m, g, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    ok, at = i < E, g * E + i
    y = tl.load(Y + m * SY + at, mask=ok, other=0.0).to(tl.float32)
    z = tl.load(Z + m * SZ + at, mask=ok, other=0.0).to(tl.float32)
    v = y * z * tl.sigmoid(z)  # v = y silu(z)
    r = tl.rsqrt(tl.sum(v * v, 0) / E + eps)  # r = 1 / sqrt(mean v^2 + eps)
    out = tl.load(W + at, mask=ok, other=0.0) * v * r  # out = w v r
    tl.store(OUT + m * (tl.num_programs(1) * E) + at, out.to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def _backward(
    Y,
    Z,
    W,
    O,
    DY,
    DZ,
    DW,
    M,
    SY,
    SZ,
    eps,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
):
    SY, SZ = SY * UNIT, SZ * UNIT
    block, g, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    ok, at, width = i < E, g * E + i, tl.num_programs(1) * E
    w = tl.load(W + at, mask=ok, other=0.0)
    dw = tl.zeros((BLOCK,), tl.float32)
    for m in range(block * TOKENS, tl.minimum((block + 1) * TOKENS, M)):
        y = tl.load(Y + m * SY + at, mask=ok, other=0.0).to(tl.float32)
        z = tl.load(Z + m * SZ + at, mask=ok, other=0.0).to(tl.float32)
        o = tl.load(O + m * width + at, mask=ok, other=0.0).to(tl.float32)
        s = tl.sigmoid(z)
        v = y * z * s
        r = tl.rsqrt(tl.sum(v * v, 0) / E + eps)
        k = v * r
        dv = r * (w * o - k * (tl.sum(w * o * k, 0) / E))  # dv = r (w o - k mean(w o k))
        # dy = dv silu(z)
        tl.store(DY + m * width + at, (dv * z * s).to(DY.dtype.element_ty), mask=ok)
        dz = dv * y * s * (1 + z * (1 - s))  # dz = dv y silu'(z)
        tl.store(DZ + m * width + at, dz.to(DZ.dtype.element_ty), mask=ok)
        dw += o * k  # dw = sum of o k
    tl.store(DW + block * width + at, dw, mask=ok)


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):
        (b, t, e), out = y.shape, torch.empty(y.shape, dtype=y.dtype, device=y.device)
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps, wide = groups, eps, unit(y.stride(1), z.stride(1))
        _forward[b * t, groups](
            y,
            z,
            weight,
            out,
            y.stride(1) // wide,
            z.stride(1) // wide,
            eps,
            e // groups,
            triton.next_power_of_2(e // groups),
            wide,
            num_warps=4,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, o):
        y, z, weight = ctx.saved_tensors
        b, t, e = y.shape
        blocks = triton.cdiv(y.shape[0] * y.shape[1], TOKENS)
        own = y.shape[2] // ctx.groups
        dy, dz = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (y, z))
        dw, wide = weight.new_empty(blocks, e), unit(y.stride(1), z.stride(1))
        _backward[blocks, ctx.groups](
            y,
            z,
            weight,
            o.contiguous(),
            dy,
            dz,
            dw,
            b * t,
            y.stride(1) // wide,
            z.stride(1) // wide,
            ctx.eps,
            own,
            triton.next_power_of_2(own),
            TOKENS,
            wide,
            num_warps=4,
        )
        return dy, dz, dw.sum(0), None, None


def gated_norm(y, z, weight, groups, eps=1e-5):
    """norm(y silu(z)) weight, per group: y, z (b, t, e), weight (e,) -> (b, t, e) in y's type."""
    on_gpu("the gated norm", y, z, weight)
    if (
        y.ndim != 3
        or y.shape != z.shape
        or weight.shape != y.shape[2:]
        or y.shape[2] % groups
        or y.numel() == 0
    ):
        raise ValueError(
            f"gated norm: y {tuple(y.shape)}, z {tuple(z.shape)}, weight {tuple(weight.shape)}, "
            f"{groups} groups do not fit"
        )
    if y.shape[2] // groups > 8192 or y.dtype == torch.float64:
        raise ValueError(
            f"the gated norm with fast=True takes groups of up to 8192 numbers of 16 or 32 bits, "
            f"not {y.shape[2] // groups} of {y.dtype}"
        )
    return GatedNorm.apply(rows(y), rows(z), weight.float(), groups, eps)
