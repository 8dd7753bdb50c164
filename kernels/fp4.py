"""
fp4: quantising, and products with four-bit operands. nvfp4.quantize, same bits; nvfp4.QuantizedMM,
same sums.

    S = 2688/amax    s = E4M3(amax_b S/6)    q = E2M1(x / (s/S))
    D = alpha sum over blocks s_a s_b (q_a . q_b)

grid     _amax, _quantize (m / 32, k / 128)   _decode (n / BN)
         _gemm (m / BM + E, n / BN), for dw (o / BM, i / BN, E): every expert's rows are tiles of
         their own, so the last one of each is part empty
traffic  _quantize reads x once and writes 4.5 bits a number: 86 MB for [8192, 4096] in bf16. The
         amax of a block is in
         the tile, that of the tensor is not: _amax reads x first, rotated on the way, 67 MB more. x
         may be a transposed view: that is the column copy. Random bytes, where there are any, are
         34 MB to write and to read. _decode multiplies a few tokens in bf16 by weights of 4.5 bits:
         bound by reading w, 3.6 times less to read.
tensor   _gemm NATIVE: the tensor core multiplies codes and scales itself (Blackwell, BM >= 128:
         with 64 the compiler
cores    quietly computes in bf16). Otherwise codes become fp16 by moving their bits to fp16's
         exponent and mantissa,
         exactly; even and odd columns are two products, so nothing is interleaved.
numbers  scales in fp32 in nvfp4.scales' order, with divisions that round (div_rn); E4M3 and E2M1 by
         integer and fp32
         arithmetic that is right on every GPU and in the interpreter; noise: given bytes, or
         Philox's.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import INTERPRETED, on_gpu

BIG = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _e4m3(v):
    """v >= 0 -> the nearest number of E4M3, ties to even, at most 448."""
    v = tl.minimum(v, 448.0)
    bits = v.to(tl.int32, bitcast=True)
    kept = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(
        tl.float32, bitcast=True
    )  # three bits of mantissa
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
    rm = (
        tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM // 16) * 16
    )  # 16 rows, or columns, have one owner
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


@triton.jit
def _fp16(code):
    """A code 0..15 in int32 -> its number in fp16: E2M1's bits at fp16's place, the exponent's bias
    made up by 2^14.
    """
    return (((code & 7) << 9) | ((code & 8) << 12)).to(tl.int16).to(
        tl.float16, bitcast=True
    ) * 16384.0


@triton.jit
def _unpack(q, s, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Bytes [ROWS, HALF], E4M3 scales [ROWS, HALF/8] -> q s of the even and of the odd columns,
    exact in fp16.
    """
    s = tl.broadcast_to(s.to(tl.float16)[:, :, None], (ROWS, HALF // 8, 8)).reshape(ROWS, HALF)
    q = q.to(tl.int32)
    return _fp16(q & 15) * s, _fp16(q >> 4) * s


@triton.jit
def _gemm(
    A,
    SA,
    B,
    SB,
    ALPHA,
    D,
    ENDS,
    EXPERT,
    ROW,
    M,
    N,
    K,
    E,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BY: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """D = alpha A B^T. BY 1: rows of A by expert, B and alpha of each. BY 2: columns by expert, D
    of each.
    """
    e, r0, end, first, last = 0, tl.program_id(0) * BM, M, 0, K
    if BY == 1:
        e = tl.load(EXPERT + tl.program_id(0))
        if e >= E:  # a tile too many: see `tiles`
            return
        r0, end = tl.load(ROW + tl.program_id(0)), tl.load(ENDS + e)
    if BY == 2:
        e = tl.program_id(2)
        first, last = tl.load(ENDS + e - 1, mask=e > 0, other=0), tl.load(ENDS + e)
    rm = (r0.to(tl.int64) + tl.arange(0, BM))[:, None]
    rn = (tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    half, group = tl.arange(0, BK // 2)[None, :], tl.arange(0, BK // 16)[None, :]
    own = rn + e.to(tl.int64) * N if BY == 1 else rn  # B's rows
    acc = tl.zeros([BM, BN], tl.float32)
    at, bt = A + rm * (K // 2) + first // 2, B + own * (K // 2) + first // 2
    sat, sbt = SA + rm * (K // 16) + first // 16, SB + own * (K // 16) + first // 16
    left = last - first
    for k in range(0, left, BK):
        codes, blocks = k // 2 + half, k // 16 + group
        a = tl.load(at + codes, mask=(rm < end) & (codes < left // 2), other=0)
        b = tl.load(bt + codes, mask=(rn < N) & (codes < left // 2), other=0)
        sa = tl.load(sat + blocks, mask=(rm < end) & (blocks < left // 16), other=0.0)
        sb = tl.load(sbt + blocks, mask=(rn < N) & (blocks < left // 16), other=0.0)
        if NATIVE:
            acc = tl.dot_scaled(a, sa, "e2m1", b.T, sb, "e2m1", acc)
        else:
            low, high = _unpack(a, sa, BM, BK // 2)
            low_b, high_b = _unpack(b, sb, BN, BK // 2)
            acc = tl.dot(low, low_b.T, acc)
            acc = tl.dot(high, high_b.T, acc)
    col = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    row = rm + e.to(tl.int64) * M if BY == 2 else rm
    tl.store(
        D + row * N + col,
        (acc * tl.load(ALPHA + e)).to(D.dtype.element_ty),
        mask=(rm < end) & (col < N),
    )


@triton.jit
def _decode(X, B, SB, ALPHA, D, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rm = (tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    rn = (tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    half, group = tl.arange(0, BK // 2)[None, :], tl.arange(0, BK // 16)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        codes, blocks, rk = k // 2 + half, k // 16 + group, k + tl.arange(0, BK)[None, :]
        x = tl.load(X + rm * K + rk, mask=(rm < M) & (rk < K), other=0.0)
        x0, x1 = tl.split(x.reshape(BM, BK // 2, 2))
        b = tl.load(B + rn * (K // 2) + codes, mask=(rn < N) & (codes < K // 2), other=0)
        sb = tl.load(SB + rn * (K // 16) + blocks, mask=(rn < N) & (blocks < K // 16), other=0.0)
        b0, b1 = _unpack(b, sb, BN, BK // 2)
        acc = tl.dot(x0, b0.to(x.dtype).T, acc)  # q s has six bits: exact in bf16
        acc = tl.dot(x1, b1.to(x.dtype).T, acc)
    col = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    tl.store(
        D + rm * N + col, (acc * tl.load(ALPHA)).to(D.dtype.element_ty), mask=(rm < M) & (col < N)
    )


def _check(what, *tensors):
    on_gpu(what, *tensors)
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        raise ValueError(
            f"{what} with fast=True needs a GPU of compute capability 9.0 or later (E4M3), "
            f"not {'.'.join(map(str, torch.cuda.get_device_capability()))}; use fast=False"
        )


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
):
    """x (M, K), any strides -> codes, scales, amax; fake: q s in bf16, amax. Rounding down the
    columns: x.T.

    x (E, R, K) is a stack with an amax each. by=1: row r of x belongs to expert owner[r]; by=2:
    column c to owner[c]; in runs of whole blocks. rht rotates first; seed: noise from Philox.
    """
    _check("nvfp4.quantize", x, noise, amax)
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
        bits = torch.zeros(E * experts, dtype=torch.int32, device=x.device)
        _amax[grid](x, bits, owner, R, M, K, *strides, BM=32, BK=128, RHT=rht, BY=by)
        amax = bits.view(torch.float32)
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


def tiles(ends, M, BM):
    """Rows by expert, in tiles that have one expert -> each tile's expert (E: none) and first row,
    on the device.

    Their number is data; nobody waits for it: at most M/BM + E.
    """
    count = ends.diff(prepend=ends.new_zeros(1))
    own = (count + BM - 1) // BM
    last = own.cumsum(0)  # (E,) past each expert's last tile
    at = torch.arange(M // BM + len(ends), device=ends.device)
    expert = torch.searchsorted(last, at, right=True)
    mine = expert.clamp(max=len(ends) - 1)
    return expert.int(), ((ends - count)[mine] + (at - (last - own)[mine]) * BM).int()


def gemm(a, b, dtype=torch.bfloat16, native=None, BM=128, BN=128, BK=128, ends=None, by=0):
    """a (M, K), b (N, K), both (codes, scales, amax) -> a b^T (M, N). native: None: on a Blackwell.

    by=1: rows of a up to ends[0] times b's first expert, ...: b (E N, K) -> (M, N); ends are
    multiples of 16. by=2: columns of both up to ends[0] are the first expert's, ...: -> (E, M, N).
    """
    _check("nvfp4.gemm", *a, *b, ends)
    E = 1 if by == 0 else len(ends)
    (M, K), N = a[0].shape, len(b[0]) // (E if by == 1 else 1)
    if b[0].shape[1] != K:
        raise ValueError(f"a has {2 * K} columns, b {2 * b[0].shape[1]}")
    if native is None:
        native = a[0].is_cuda and torch.cuda.get_device_capability()[0] >= 10
    d = torch.empty(*[E] * (by == 2), M, N, dtype=dtype, device=a[0].device)
    expert, row = tiles(ends, M, BM) if by == 1 else (None, None)
    BK = BK if native else min(BK, 64)
    grid = len(expert) if by == 1 else triton.cdiv(M, BM), triton.cdiv(N, BN), E if by == 2 else 1
    _gemm[grid](
        *a[:2],
        *b[:2],
        a[2] * b[2] / 7225344,
        d,
        ends,
        expert,
        row,
        M,
        N,
        2 * K,
        E,
        BM=BM,
        BN=BN,
        BK=BK,
        BY=by,
        NATIVE=native,
        num_warps=8,
    )
    return d


def decode(x, b, BM=16, BN=64, BK=128, alpha=None):
    """x (M, K) in bf16 or fp16, a few rows; b (N, K) as (codes, scales, amax) -> x b^T (M, N), of
    x's dtype. alpha: the scale of the whole matrix, where that is stored instead of its amax.
    """
    _check("nvfp4.decode", x, *b)
    M, K, N = *x.shape, len(b[0])
    if 2 * b[0].shape[1] != K or not x.is_contiguous():
        raise ValueError(f"x has {K} columns, b {2 * b[0].shape[1]}; and x must be contiguous")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}: the decoding product multiplies in bfloat16 or float16")
    d = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _decode[triton.cdiv(N, BN), triton.cdiv(M, BM)](
        x, b[0], b[1], b[2] / 2688 if alpha is None else alpha, d, M, N, K, BM=BM, BN=BN, BK=BK
    )
    return d


def operand(how, name, x, owner=None, ends=None):
    """nvfp4.Operands.operand as codes, along the sum of the product that `name` belongs to."""
    r, turn = how.recipe, name in ("dgrad w", "wgrad dy", "wgrad x")
    noise = how.noise(name, x)
    if turn:
        x, noise = x.mT, noise if noise is None else noise.T
    q, s, amax = quantize(
        x,
        (16, 16) if r.two_d and name.endswith("w") else (1, 16),
        noise,
        owner=owner,
        rht=r.rht and name.startswith("wgrad"),
        experts=1 if owner is None else len(ends),
        by=0 if owner is None else 2 if turn else 1,
    )
    how.count(name, x, q, s)
    return q, s, amax


class Product(torch.autograd.Function):
    """nvfp4.QuantizedMM, its three products from codes: x (m, i), w (E, o, i) -> (m, o), m, o, i
    multiples of 16.
    """

    @staticmethod
    def forward(ctx, x, w, owner, ends, how):
        ctx.save_for_backward(x, w, owner, ends)
        ctx.how = how
        return gemm(
            operand(how, "fprop x", x, owner, ends),
            operand(how, "fprop w", w),
            x.dtype,
            ends=ends,
            by=int(ends is not None),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, w, owner, ends), how, grouped = (
            ctx.saved_tensors,
            ctx.how,
            ctx.saved_tensors[3] is not None,
        )
        dx = gemm(
            operand(how, "dgrad dy", dy, owner, ends),
            operand(how, "dgrad w", w),
            x.dtype,
            ends=ends,
            by=int(grouped),
        )
        dw = gemm(
            operand(how, "wgrad dy", dy, owner, ends),
            operand(how, "wgrad x", x, owner, ends),
            torch.float32,
            ends=ends,
            by=2 * grouped,
        )
        return dx, dw.view(w.shape).to(w.dtype), None, None, None
