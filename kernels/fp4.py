"""
fp4: quantising. nvfp4.quantize, same bits.

    S = 2688/amax    s = E4M3(amax_b S/6)    q = E2M1(x / (s/S))

grid     _amax, _quantize (m / 32, k / 128)
traffic  _quantize reads x once and writes 4.5 bits a number: 86 MB for [8192, 4096] in bf16. The
         amax of a block is in the tile, that of the tensor is not: _amax reads x first, rotated on
         the way, 67 MB more. x may be a transposed view: that is the column copy. Random bytes,
         where there are any, are 34 MB to write and to read.
numbers  scales in fp32 in nvfp4.scales' order, with divisions that round (div_rn); E4M3 and E2M1 by
         integer and fp32 arithmetic that is right on every GPU and in the interpreter; noise: given
         bytes, or Philox's.

What multiplies such numbers: kernels/fp4mm.py.
"""

import torch
import triton
import triton.language as tl

from kernels import INTERPRETED, on_gpu

BIG = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _e4m3(v):
    """v >= 0 -> the nearest number of E4M3, ties to even, at most 448."""
    v = tl.minimum(v, 448.0)
    bits = v.to(tl.int32, bitcast=True)
    # three bits of mantissa
    kept = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    return tl.where(v < 0.015625, (v + 16384.0) - 16384.0, kept)  # 2^-6: below, steps of 2^-9


@triton.jit
def _step(a):
    """Half of 2^floor(log2 a), a within 1 and 4: the distance of E2M1's numbers around a."""
    return tl.where(a < 2.0, 0.5, tl.where(a < 4.0, 1.0, 2.0))


@triton.jit
def _read(X, R, M, K, SE, SM, SK, BM: tl.constexpr, BK: tl.constexpr, RHT: tl.constexpr):
    """This program's tile of a stack of R rows each, rotated along its columns if asked -> [BM,
    BK/16, 16] fp32.
    """
    rm = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    rk = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    x = tl.load(
        X + rm // R * SE + rm % R * SM + rk.to(tl.int64) * SK, mask=(rm < M) & (rk < K), other=0.0
    )
    NB: tl.constexpr = BK // 16
    if RHT:  # R_ij = sign_i (-1)^|i & j| / 4
        i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
        odd = (i & j) ^ ((i & j) >> 2)
        odd = ((odd ^ (odd >> 1)) ^ (55272 >> i)) & 1
        turn = tl.where(odd == 1, -0.25, 0.25).to(x.dtype)
        x = tl.dot(x.reshape(BM * NB, 16), turn, input_precision="ieee").to(x.dtype)
    return x.to(tl.float32).reshape(BM, NB, 16)


@triton.jit
def _owner(OWNER, rm, rk, R, M, K, BY: tl.constexpr):
    """Whose amax: one for each R rows, or (BY 1) what OWNER says of rows rm, or (BY 2) of columns
    rk.
    """
    if BY == 2:
        e = tl.load(OWNER + rk, mask=rk < K, other=0)
    elif BY == 1:
        e = tl.load(OWNER + rm, mask=rm < M, other=0)
    else:
        e = tl.where(rm < M, rm // R, 0)
    return e


@triton.jit
def _amax(
    X,
    AMAX,
    OWNER,
    R,
    M,
    K,
    SE,
    SM,
    SK,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RHT: tl.constexpr,
    BY: tl.constexpr,
):
    x = _read(X, R, M, K, SE, SM, SK, BM, BK, RHT)
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)  # as bits: in order, NaN above all
    # 16 rows, or columns, have one owner
    rm = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM // 16) * 16
    rk = tl.program_id(1) * BK + tl.arange(0, BK // 16) * 16
    top = tl.max(top, 0) if BY == 2 else tl.max(tl.max(top, 1).reshape(BM // 16, 16), 1)
    tl.atomic_max(AMAX + _owner(OWNER, rm, rk, R, M, K, BY), top)


@triton.jit
def _scales(x, amax, BM: tl.constexpr, NB: tl.constexpr, SQUARE: tl.constexpr):
    """Each block's s_b, and what multiplies it: [BM, NB] both. nvfp4.scales, in its order."""
    scale = tl.minimum(tl.div_rn(2688.0, amax), BIG)  # S
    scale = tl.where((amax == 0) | (scale == 0), 1.0, scale)
    block = tl.max(tl.abs(x), 2)  # [BM, NB]
    if SQUARE:
        block = tl.max(block.reshape(BM // 16, 16, NB), 1)
        block = tl.broadcast_to(block[:, None, :], (BM // 16, 16, NB)).reshape(BM, NB)
    s = _e4m3(block * (scale * 0.16666667163372040))  # fl(1/6)
    product = s * tl.div_rn(1.0, scale)
    e = tl.minimum(tl.div_rn(1.0, tl.where(product == 0, 1.0, product)), BIG)
    return s, tl.where(product == 0, BIG, e)


@triton.jit
def _nearest(a):
    """a >= 0 to the nearest number of E2M1, ties to the even code."""
    magic = _step(a) * 12582912.0  # 1.5 2^23: no bits below the step
    return (a + magic) - magic


@triton.jit
def _up(a, noise):
    """a >= 0 rounded up as often as it is near its upper neighbour on E2M1's grid."""
    a = a + noise * 0.00390625 * _step(a)  # exact product: fma or not
    step = _step(a)
    return tl.floor(a / step) * step


@triton.jit
def _drawn(seed, rm, K, BM: tl.constexpr, NB: tl.constexpr):
    """Philox's bytes for this program's tile, 16 a block in one call -> [BM, NB, 16] fp32."""
    at = rm * (K // 16) + tl.program_id(1) * NB + tl.arange(0, NB)[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, at)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3)).reshape(BM, NB, 4)
    byte = (words[:, :, :, None] >> (8 * tl.arange(0, 4))[None, None, None, :]) & 255
    return byte.reshape(BM, NB, 16).to(tl.float32)


@triton.jit(do_not_specialize=["seed"])
def _quantize(
    X,
    AMAX,
    OWNER,
    NOISE,
    Q,
    S,
    Y,
    R,
    M,
    K,
    SE,
    SM,
    SK,
    NM,
    NK,
    seed,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SQUARE: tl.constexpr,
    RHT: tl.constexpr,
    SR: tl.constexpr,
    FAKE: tl.constexpr,
    BY: tl.constexpr,
):
    rm = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    rk = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    ok = (rm < M) & (rk < K)
    NB: tl.constexpr = BK // 16
    x = _read(X, R, M, K, SE, SM, SK, BM, BK, RHT)
    first = tl.program_id(1) * BK + tl.arange(0, NB)[None, :] * 16
    amax = tl.load(AMAX + _owner(OWNER, rm, first, R, M, K, BY))  # [BM, 1] or [1, NB]
    s, e = _scales(x, amax, BM, NB, SQUARE)
    a = tl.minimum(tl.abs(x * e[:, :, None]), 6.0)
    if SR:
        if NOISE is None:
            noise = _drawn(seed, rm, K, BM, NB)
        else:
            given = tl.load(NOISE + rm * NM + rk.to(tl.int64) * NK, mask=ok, other=0)
            noise = given.to(tl.float32).reshape(BM, NB, 16)
        a = _up(a, noise)
    else:
        a = _nearest(a)
    if FAKE:
        y = tl.where(x < 0, -a, a) * s[:, :, None]
        tl.store(Y + rm * K + rk, y.reshape(BM, BK).to(Y.dtype.element_ty), mask=ok)
    else:
        code = tl.where(a < 2.0, a * 2.0, tl.where(a < 4.0, a + 2.0, a * 0.5 + 4.0)).to(tl.int32)
        code += tl.where(x < 0, 8, 0)
        low, high = tl.split(code.reshape(BM, BK // 2, 2))
        half = tl.program_id(1) * (BK // 2) + tl.arange(0, BK // 2)[None, :]
        tl.store(
            Q + rm * (K // 2) + half,
            (low | (high << 4)).to(tl.uint8),
            mask=(rm < M) & (half < K // 2),
        )
        kb = tl.program_id(1) * NB + tl.arange(0, NB)[None, :]
        n = s.to(tl.int32, bitcast=True)  # E4M3's byte of s: exact
        byte = tl.where(s < 0.015625, (s * 512.0).to(tl.int32), (n >> 20) - (120 << 3))
        tl.store(S + rm * (K // 16) + kb, byte.to(tl.uint8), mask=(rm < M) & (kb < K // 16))


def check(what, *tensors):
    on_gpu(what, *tensors)
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        raise ValueError(
            f"{what} with fast=True needs a GPU of compute capability 9.0 or later (E4M3), "
            f"not {'.'.join(map(str, torch.cuda.get_device_capability()))}; use fast=False"
        )


def largest(x, n, owner, sizes, grid, rht, by):
    """amax (n,) of n tensors in one: of a stack, or of the rows or columns that one expert owns."""
    bits = torch.zeros(n, dtype=torch.int32, device=x.device)
    _amax[grid](x, bits, owner, *sizes, BM=32, BK=128, RHT=rht, BY=by)
    return bits.view(torch.float32)


def quantize(
    x,
    tile=(1, 16),
    noise=None,
    rht=False,
    amax=None,
    seed=None,
    fake=False,
    owner=None,
    experts=1,
    by=0,
    whole=None,
):
    """x (M, K), any strides -> codes, scales, amax; fake: q s in bf16, amax. Rounding down the
    columns: x.T.

    x (E, R, K) is a stack with an amax each. by=1: row r of x belongs to expert owner[r]; by=2:
    column c to owner[c]; in runs of whole blocks. rht rotates first; seed: noise from Philox.
    whole: what makes of the amax of a part that of the tensor.
    """
    check("nvfp4.quantize", x, noise, amax)
    (R, K), E = x.shape[-2:], len(x) if x.ndim == 3 else 1
    if (
        x.ndim not in (2, 3)
        or tile not in ((1, 16), (16, 16))
        or K % 16
        or R % (16 if E > 1 or by == 1 else tile[0])
    ):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} does not divide into tiles of {tile}")
    M, strides = E * R, (x.stride(0) if x.ndim == 3 else 0, *x.stride()[-2:])
    grid = triton.cdiv(M, 32), triton.cdiv(K, 128)
    if amax is None:
        amax = largest(x, E * experts, owner, (R, M, K, *strides), grid, rht, by)
        amax = whole(amax) if whole else amax
    y = torch.empty(M, K, dtype=torch.bfloat16, device=x.device) if fake else None
    q = None if fake else torch.empty(M, K // 2, dtype=torch.uint8, device=x.device)
    s = None if fake else torch.empty(M, K // 16, dtype=torch.uint8, device=x.device)
    _quantize[grid](
        x,
        amax,
        owner,
        noise,
        q,
        s,
        y,
        R,
        M,
        K,
        *strides,
        *((0, 0) if noise is None else noise.stride()),
        seed or 0,
        BM=32,
        BK=128,
        SQUARE=tile[0] == 16,
        RHT=rht,
        SR=noise is not None or seed is not None,
        FAKE=fake,
        BY=by,
    )
    return (y, amax) if fake else (q, s.view(torch.float8_e4m3fn), amax)
