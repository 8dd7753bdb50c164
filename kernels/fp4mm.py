"""
fp4mm: products with four-bit operands. nvfp4's codes times its codes, the sums of
quant/lowbit.QuantizedMM.

    D = alpha sum over blocks s_a s_b (q_a . q_b)

grid     _gemm (m / BM + E, n / BN), for dw (o / BM, i / BN, E): every expert's rows are tiles of
         their own, so the last one of each is part empty        _decode (n / BN)
traffic  _gemm reads 4.5 bits a number of both operands. _decode multiplies a few tokens in bf16 by
         weights of 4.5 bits: bound by reading w, 3.6 times less to read.
tensor   _gemm NATIVE: the tensor core multiplies codes and scales itself (Blackwell, BM >= 128:
cores    with 64 the compiler quietly computes in bf16). Otherwise codes become fp16 by moving their
         bits to fp16's exponent and mantissa, exactly; even and odd columns are two products, so
         nothing is interleaved.
numbers  products are exact, sums and alpha in fp32; the codes themselves: kernels/fp4.py
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import fp4
from kernels.fp4 import check


@triton.jit
def _fp16(code):
    """A code 0..15 in int32 -> its number in fp16: E2M1's bits at fp16's place, the exponent's bias
    made up by 2^14.
    """
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0


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
    UNIT: tl.constexpr,
):
    """D = alpha A B^T. BY 1: rows of A by expert, B and alpha of each. BY 2: columns, D of each."""
    K *= UNIT
    e, r0, end, first, last = 0, tl.program_id(0) * BM, M, 0, K
    if BY == 1:
        e = tl.load(EXPERT + tl.program_id(0))
        if e >= E:  # a tile too many: see `tiles`
            return
        r0, end = tl.load(ROW + tl.program_id(0)), tl.load(ENDS + e)
    if BY == 2:
        e = tl.program_id(2)
        first = tl.multiple_of(tl.load(ENDS + e - 1, mask=e > 0, other=0), 16)
        last = tl.multiple_of(tl.load(ENDS + e), 16)
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
    d = (acc * tl.load(ALPHA + e)).to(D.dtype.element_ty)
    tl.store(D + row * N + col, d, mask=(rm < end) & (col < N))


@triton.jit
def _decode(
    X,
    B,
    SB,
    ALPHA,
    D,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UNIT: tl.constexpr,
):
    K = K * UNIT
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


def unit(K):
    """How much of K divides it: of 128 columns a row has 64 bytes of codes and 8 of scales, so that
    16 and 8 are read at once; of 16 the compiler can only read them by 8, and one by one.
    """
    return 128 if K % 128 == 0 else 16


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
    check("nvfp4.gemm", *a, *b, ends)
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
        2 * K // unit(2 * K),
        E,
        BM=BM,
        BN=BN,
        BK=BK,
        BY=by,
        NATIVE=native,
        UNIT=unit(2 * K),
        num_warps=8,
    )
    return d


def decode(x, b, BM=16, BN=64, BK=128, alpha=None):
    """x (M, K) in bf16 or fp16, a few rows; b (N, K) as (codes, scales, amax) -> x b^T (M, N), of
    x's dtype. alpha: the scale of the whole matrix, where that is stored instead of its amax.
    """
    check("nvfp4.decode", x, *b)
    M, K, N = *x.shape, len(b[0])
    if 2 * b[0].shape[1] != K or not x.is_contiguous():
        raise ValueError(f"x has {K} columns, b {2 * b[0].shape[1]}; and x must be contiguous")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}: the decoding product multiplies in bfloat16 or float16")
    d = torch.empty(M, N, dtype=x.dtype, device=x.device)
    alpha, whole = b[2] / 2688 if alpha is None else alpha, unit(K)
    _decode[triton.cdiv(N, BN), triton.cdiv(M, BM)](
        x, *b[:2], alpha, d, M, N, K // whole, BM=BM, BN=BN, BK=BK, UNIT=whole
    )
    return d


def operand(how, name, x, owner=None, ends=None, draw=None):
    """lowbit.Operands.operand as codes, along the sum of the product that `name` belongs to."""
    r, turn = how.recipe, name in ("dgrad w", "wgrad dy", "wgrad x")
    noise, axis = how.noise(name, x, draw), 2 if turn else 1
    if turn:
        x, noise = x.mT, noise if noise is None else noise.T
    q, s, amax = fp4.quantize(
        x,
        (16, 16) if r.two_d and name.endswith("w") else (1, 16),
        noise,
        owner=owner,
        rht=r.rht and name.startswith("wgrad"),
        experts=1 if owner is None else len(ends),
        by=0 if owner is None else axis,
        whole=how.whole(name),
    )
    how.count(name, x, q, s)
    return q, s, amax


class Product(torch.autograd.Function):
    """lowbit.QuantizedMM, its three products from codes: x (m, i), w (E, o, i) -> (m, o), m, o, i
    multiples of 16.
    """

    @staticmethod
    def forward(ctx, x, w, owner, ends, how, draw):
        ctx.save_for_backward(x, w, owner, ends)
        ctx.how, ctx.draw = how, draw
        a, b = operand(how, "fprop x", x, owner, ends), operand(how, "fprop w", w)
        return gemm(a, b, x.dtype, ends=ends, by=int(ends is not None))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w, owner, ends = ctx.saved_tensors
        how = ctx.how
        grouped = ctx.saved_tensors[3] is not None
        dx = gemm(
            operand(how, "dgrad dy", dy, owner, ends, ctx.draw),
            operand(how, "dgrad w", w),
            x.dtype,
            ends=ends,
            by=int(grouped),
        )
        dw = gemm(
            operand(how, "wgrad dy", dy, owner, ends, ctx.draw),
            operand(how, "wgrad x", x, owner, ends),
            torch.float32,
            ends=ends,
            by=2 * grouped,
        )
        return dx, dw.view(w.shape).to(w.dtype), None, None, None, None
