"""
fp4: quantising, and products with four-bit operands. nvfp4.quantize, same bits; the products, same sums.

    s = E4M3(amax_b S/6)    q = E2M1(x / (s/S))    S = 2688/amax          D = alpha sum over blocks s_a s_b (q_a . q_b)

grid     _quantize (m / 32, k / 128)   _gemm (m / BM, n / BN)   _decode (n / BN)
traffic  _quantize reads x once and writes 4.5 bits a number: 86 MB for [8192, 4096] in bf16, the minimum (or q s in
         bf16, for products that are emulated). x may be a transposed view: that is the column copy.
         _decode multiplies a few tokens in bf16 by weights of 4.5 bits: bound by reading w, 3.6 times less to read.
tensor   _gemm NATIVE: the tensor core multiplies codes and scales itself (Blackwell, BM >= 128: with 64 the compiler
cores    quietly computes in bf16). Otherwise codes become fp16 by moving their bits to fp16's exponent and mantissa,
         exactly; even and odd columns are two products, so nothing is interleaved.
numbers  scales in fp32 in nvfp4.scales' order, with divisions that round (div_rn); E4M3 and E2M1 by integer and fp32
         arithmetic that is right on every GPU and in the interpreter; noise: given bytes, or Philox's.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import on_gpu

BIG = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _e4m3(v):
    """v >= 0 -> the nearest number of E4M3, ties to even, at most 448."""
    v = tl.minimum(v, 448.0)
    bits = v.to(tl.int32, bitcast=True)
    kept = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)  # three bits of mantissa
    return tl.where(v < 0.015625, (v + 16384.0) - 16384.0, kept)                # 2^-6: below, steps of 2^-9


@triton.jit
def _step(a):
    """Half of 2^floor(log2 a), a within 1 and 4: the distance of E2M1's numbers around a."""
    return tl.where(a < 2.0, 0.5, tl.where(a < 4.0, 1.0, 2.0))


@triton.jit(do_not_specialize=["seed"])
def _quantize(X, AMAX, NOISE, Q, S, Y, M, K, SM, SK, seed, BM: tl.constexpr, BK: tl.constexpr, SQUARE: tl.constexpr,
              RHT: tl.constexpr, SR: tl.constexpr, FAKE: tl.constexpr):
    rm = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    rk = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    ok = (rm < M) & (rk < K)
    NB: tl.constexpr = BK // 16
    x = tl.load(X + rm * SM + rk * SK, mask=ok, other=0.0)
    if RHT:                                                                     # R_ij = sign_i (-1)^|i & j| / 4
        i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
        odd = (i & j) ^ ((i & j) >> 2)
        odd = ((odd ^ (odd >> 1)) ^ (55272 >> i)) & 1
        R = tl.where(odd == 1, -0.25, 0.25).to(x.dtype)
        x = tl.dot(x.reshape(BM * NB, 16), R, input_precision="ieee").to(x.dtype).reshape(BM, BK)
    x = x.to(tl.float32).reshape(BM, NB, 16)
    amax = tl.load(AMAX)
    scale = tl.minimum(tl.div_rn(2688.0, amax), BIG)                            # S
    scale = tl.where((amax == 0) | (scale == 0), 1.0, scale)
    block = tl.max(tl.abs(x), 2)                                                # [BM, NB]
    if SQUARE:
        block = tl.max(block.reshape(BM // 16, 16, NB), 1)
        block = tl.broadcast_to(block[:, None, :], (BM // 16, 16, NB)).reshape(BM, NB)
    s = _e4m3(block * (scale * 0.16666667163372040))                            # fl(1/6)
    product = s * tl.div_rn(1.0, scale)
    e = tl.where(product == 0, BIG, tl.minimum(tl.div_rn(1.0, tl.where(product == 0, 1.0, product)), BIG))
    a = tl.minimum(tl.abs(x * e[:, :, None]), 6.0)
    if SR:
        if NOISE is None:                                                       # 16 bytes a block, one call
            at = rm * (K // 16) + tl.program_id(1) * NB + tl.arange(0, NB)[None, :]
            w0, w1, w2, w3 = tl.randint4x(seed, at)
            words = tl.join(tl.join(w0, w1), tl.join(w2, w3)).reshape(BM, NB, 4)
            byte = (words[:, :, :, None] >> (8 * tl.arange(0, 4))[None, None, None, :]) & 255
            noise = byte.reshape(BM, NB, 16).to(tl.float32)
        else:
            noise = tl.load(NOISE + rm * K + rk, mask=ok, other=0).to(tl.float32).reshape(BM, NB, 16)
        a = a + noise * 0.00390625 * _step(a)                                   # exact product: fma or not
        step = _step(a)
        a = tl.floor(a / step) * step
    else:
        magic = _step(a) * 12582912.0                                           # 1.5 2^23: no bits below the step
        a = (a + magic) - magic
    if FAKE:
        y = tl.where(x < 0, -a, a) * s[:, :, None]
        tl.store(Y + rm * K + rk, y.reshape(BM, BK).to(Y.dtype.element_ty), mask=ok)
    else:
        code = tl.where(a < 2.0, a * 2.0, tl.where(a < 4.0, a + 2.0, a * 0.5 + 4.0)).to(tl.int32)
        code += tl.where(x < 0, 8, 0)
        low, high = tl.split(code.reshape(BM, BK // 2, 2))
        half = tl.program_id(1) * (BK // 2) + tl.arange(0, BK // 2)[None, :]
        tl.store(Q + rm * (K // 2) + half, (low | (high << 4)).to(tl.uint8), mask=(rm < M) & (half < K // 2))
        kb = tl.program_id(1) * NB + tl.arange(0, NB)[None, :]
        n = s.to(tl.int32, bitcast=True)                                        # E4M3's byte of s: exact
        byte = tl.where(s < 0.015625, (s * 512.0).to(tl.int32), (n >> 20) - (120 << 3))
        tl.store(S + rm * (K // 16) + kb, byte.to(tl.uint8), mask=(rm < M) & (kb < K // 16))


@triton.jit
def _fp16(code):
    """A code 0..15 in int32 -> its number in fp16: E2M1's bits at fp16's place, the exponent's bias made up by 2^14."""
    return (((code & 7) << 9) | ((code & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def _unpack(q, s, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Bytes [ROWS, HALF], E4M3 scales [ROWS, HALF/8] -> q s of the even and of the odd columns, exact in fp16."""
    s = tl.broadcast_to(s.to(tl.float16)[:, :, None], (ROWS, HALF // 8, 8)).reshape(ROWS, HALF)
    q = q.to(tl.int32)
    return _fp16(q & 15) * s, _fp16(q >> 4) * s


@triton.jit
def _gemm(A, SA, B, SB, ALPHA, D, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NATIVE: tl.constexpr):
    rm = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    rn = (tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN))[:, None]
    half, group = tl.arange(0, BK // 2)[None, :], tl.arange(0, BK // 16)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        codes, blocks = k // 2 + half, k // 16 + group
        a = tl.load(A + rm * (K // 2) + codes, mask=(rm < M) & (codes < K // 2), other=0)
        b = tl.load(B + rn * (K // 2) + codes, mask=(rn < N) & (codes < K // 2), other=0)
        sa = tl.load(SA + rm * (K // 16) + blocks, mask=(rm < M) & (blocks < K // 16), other=0.0)
        sb = tl.load(SB + rn * (K // 16) + blocks, mask=(rn < N) & (blocks < K // 16), other=0.0)
        if NATIVE:
            acc = tl.dot_scaled(a, sa, "e2m1", b.T, sb, "e2m1", acc)
        else:
            a0, a1 = _unpack(a, sa, BM, BK // 2)
            b0, b1 = _unpack(b, sb, BN, BK // 2)
            acc = tl.dot(a0, b0.T, acc)
            acc = tl.dot(a1, b1.T, acc)
    col = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    tl.store(D + rm * N + col, (acc * tl.load(ALPHA)).to(D.dtype.element_ty), mask=(rm < M) & (col < N))


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
        acc = tl.dot(x0, b0.to(x.dtype).T, acc)                                 # q s has six bits: exact in bf16
        acc = tl.dot(x1, b1.to(x.dtype).T, acc)
    col = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    tl.store(D + rm * N + col, (acc * tl.load(ALPHA)).to(D.dtype.element_ty), mask=(rm < M) & (col < N))


def quantize(x, tile=(1, 16), noise=None, rht=False, amax=None, seed=None, fake=False):
    """x (M, K), any strides -> codes, scales, amax; fake: q s in bf16, amax. Rounding down the columns: x.T.

    rht rotates first (amax is then that of the rotated tensor, and must be given); seed: noise from Philox.
    """
    on_gpu("nvfp4.quantize", x, noise, amax)
    if x.ndim != 2 or x.shape[1] % 16 or x.shape[0] % tile[0] or tile not in ((1, 16), (16, 16)):
        raise ValueError(f"a tensor of shape {tuple(x.shape)} does not divide into tiles of {tile}")
    if rht and amax is None:
        raise ValueError("rht=True needs amax, the largest magnitude after the rotation")
    M, K = x.shape
    amax = x.abs().max().float().view(1) if amax is None else amax
    y = torch.empty(M, K, dtype=torch.bfloat16, device=x.device) if fake else None
    q = None if fake else torch.empty(M, K // 2, dtype=torch.uint8, device=x.device)
    s = None if fake else torch.empty(M, K // 16, dtype=torch.uint8, device=x.device)
    _quantize[triton.cdiv(M, 32), triton.cdiv(K, 128)](
        x, amax, noise, q, s, y, M, K, *x.stride(), seed or 0, BM=32, BK=128, SQUARE=tile[0] == 16, RHT=rht,
        SR=noise is not None or seed is not None, FAKE=fake)
    return (y, amax) if fake else (q, s.view(torch.float8_e4m3fn), amax)


def gemm(a, b, dtype=torch.bfloat16, native=None, BM=128, BN=128, BK=128):
    """a (M, K), b (N, K), both (codes, scales, amax) -> a b^T (M, N). native: None: on a Blackwell."""
    on_gpu("nvfp4.gemm", *a, *b)
    (M, K), N = a[0].shape, len(b[0])
    if b[0].shape[1] != K:
        raise ValueError(f"a has {2 * K} columns, b {2 * b[0].shape[1]}")
    if native is None:
        native = a[0].is_cuda and torch.cuda.get_device_capability()[0] >= 10
    d = torch.empty(M, N, dtype=dtype, device=a[0].device)
    BK = BK if native else min(BK, 64)
    _gemm[triton.cdiv(M, BM), triton.cdiv(N, BN)](*a[:2], *b[:2], a[2] * b[2] / 7225344, d, M, N, 2 * K,
                                                 BM=BM, BN=BN, BK=BK, NATIVE=native, num_warps=8)
    return d


def decode(x, b, BM=16, BN=64, BK=128):
    """x (M, K) in bf16 or fp16, a few rows; b (N, K) as (codes, scales, amax) -> x b^T (M, N), of x's dtype."""
    on_gpu("nvfp4.decode", x, *b)
    M, K, N = *x.shape, len(b[0])
    if 2 * b[0].shape[1] != K or not x.is_contiguous():
        raise ValueError(f"x has {K} columns, b {2 * b[0].shape[1]}; and x must be contiguous")
    d = torch.empty(M, N, dtype=x.dtype, device=x.device)
    _decode[triton.cdiv(N, BN), triton.cdiv(M, BM)](x, b[0], b[1], b[2] / 2688, d, M, N, K, BM=BM, BN=BN, BK=BK)
    return d


class Product(torch.autograd.Function):
    """x (m, i), w (o, i) -> x w^T: nvfp4.QuantizedMM of one matrix, its three products from codes.

    rotate(x) rotates down the columns, or is None; bytes(x) draws a byte for each number, or is None.
    """
    @staticmethod
    def forward(ctx, x, w, rotate, bytes):
        m, (o, i) = len(x), w.shape
        x, w = F.pad(x, (0, -i % 16, 0, -m % 16)), F.pad(w, (0, -i % 16, 0, -o % 16))
        ctx.save_for_backward(x, w)
        ctx.how, ctx.shape = (rotate or (lambda v: v), bytes), (m, o, i)
        return gemm(quantize(x), quantize(w, (16, 16)), x.dtype)[:m, :o]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, w), (rotate, bytes), (m, o, i) = ctx.saved_tensors, ctx.how, ctx.shape
        dy = F.pad(dy, (0, len(w) - o, 0, len(x) - m))
        noise = lambda: bytes(dy).view(dy.shape) if bytes else None
        dx = gemm(quantize(dy, noise=noise()), quantize(w.T, (16, 16)), x.dtype)   # tiles: w's numbers again
        turned, drawn = rotate(dy).T, noise()
        drawn = drawn if drawn is None else drawn.T.contiguous()
        dw = gemm(quantize(turned, noise=drawn), quantize(rotate(x).T), torch.float32)
        return dx[:m, :i], dw[:o, :i], None, None
