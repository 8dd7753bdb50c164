"""
conv: every channel filters its own last k numbers, then SiLU. mamba.causal_conv, same signature,
same numbers.

    c_t = bias + sum over i < k of w_i x_{t-k+1+i}       x_{-k+1} ... x_{-1}: the window
    y_t = silu(c_t) = c_t sigmoid(c_t)

Backward. An input is read by k outputs, its own and the k-1 after it, so its gradient is the same
filter run the other way:

    d_t  = dy_t silu'(c_t)               silu'(c) = g (1 + c (1 - g)),  g = sigmoid(c)
    dx_s = sum over j < k of w_{k-1-j} d_{s+j}
    dw_i = sum over t of d_t x_{t-k+1+i}

A walk along the tokens needs no number twice if it carries the last k-1 of x and of d: x_t and dy_t
come in, with the x before it x_t gives c_t and so d_t, which goes into dw and, with the d before
it, gives dx_{t-k+1}, which goes out.

letters  b sequences, t (or T) tokens, w (or W) channels, k (or K) taps: the numbers of a filter
grid     forward (w / 128, t / 32, b): a program has a tile of 32 tokens by 128 channels. Backward
         (w / 128, t / 256, b): a program walks 256 tokens
traffic  forward reads x and writes y: 336 MB at 8192 tokens of Super in bf16, the minimum; the k
         shifted reads of a tile are the same lines, from cache. Backward reads x and dy, writes dx:
         503 MB, the minimum, and 4 % more: before its first token a program reads 2(k-1) of x and
         k-1 of dy, after its last it writes k+1 sums.
numbers  fp32 inside, one rounding at the end (in bf16 the readable form rounds c too, and is the
         less exact one). dw and dbias: partial sums of 256 tokens in fp32, added by torch: no
         atomics.
sizes    128 channels are 256 bytes of a row in bf16. Forward: 32 rows of them and 4 warps (of 32
         threads), 32 numbers a thread. Backward: 1 warp, so 4 channels a thread, for each of which
         it holds k weights and the bias, k+1 sums, k-1 of x and of d: 64 registers at k = 4. No
         thread needs another one's numbers: no shared memory, no barrier. 4 tokens are read before
         the first of them is used: 2 KB on their way for every warp.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import on_gpu, rows, unit

SPAN, STEP = 256, 4  # backward: tokens of a program, and of them on their way at once


@triton.jit
def _input(X, WINDOW, b, t, T, W, SX, ch, K: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """x_t in fp32, for a column of times: from x, from the window if t < 0, zero beyond both."""
    x = tl.load(
        X + b * T * SX + t.to(tl.int64) * SX + ch, mask=(t >= 0) & (t < T) & (ch < W), other=0.0
    ).to(tl.float32)
    if HAS_WINDOW:
        old = (t >= 1 - K) & (t < 0) & (ch < W)
        x += tl.load(WINDOW + (b * (K - 1) + t + K - 1) * W + ch, mask=old, other=0.0).to(
            tl.float32
        )
    return x


@triton.jit
def _sums(X, WINDOW, WEIGHT, BIAS, b, t, T, W, SX, ch, K: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """c_t for a column of times."""
    c = tl.load(BIAS + ch, mask=ch < W, other=0.0) + tl.zeros_like(t).to(tl.float32)
    for i in tl.static_range(K):
        w = tl.load(WEIGHT + ch * K + i, mask=ch < W, other=0.0)
        # c_t = bias + sum w_i x_{t-k+1+i}
        c += w * _input(X, WINDOW, b, t - K + 1 + i, T, W, SX, ch, K, HAS_WINDOW)
    return c


@triton.jit
def _forward(
    X,
    WINDOW,
    WEIGHT,
    BIAS,
    Y,
    T,
    W,
    SX,
    K: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UNIT: tl.constexpr,
):
    b, SX = tl.program_id(2).to(tl.int64), SX * UNIT
    ch = (tl.program_id(0) * BW + tl.arange(0, BW))[None, :]
    t = (tl.program_id(1) * BT + tl.arange(0, BT))[:, None]
    c = _sums(X, WINDOW, WEIGHT, BIAS, b, t, T, W, SX, ch, K, HAS_WINDOW)
    y = c * tl.sigmoid(c)  # y_t = silu(c_t)
    tl.store(
        Y + b * T * W + t.to(tl.int64) * W + ch, y.to(Y.dtype.element_ty), mask=(t < T) & (ch < W)
    )


@triton.jit
def _dy(DY, b, t, T, W, ch):
    """dy_t in fp32, zero outside the sequence."""
    ok = (t >= 0) & (t < T) & (ch < W)
    return tl.load(DY + b * T * W + t.to(tl.int64) * W + ch, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _slope(dy, x, at: tl.constexpr, w, bias, K: tl.constexpr):
    """d_t of dy_t and of x_{t-k+1} ... x_t, which are x[at], x[at + 1], ..."""
    c = bias
    for i in tl.static_range(K):
        c += w[i] * x[at + i]  # c_t = bias + sum w_i x_{t-k+1+i}
    g = tl.sigmoid(c)
    return dy * g * (1 + c * (1 - g))  # d_t = dy_t silu'(c_t)


@triton.jit
def _more(dw, d, x, at: tl.constexpr, K: tl.constexpr):
    """The sums of the k taps and of the bias, and one token more."""
    sums = ()
    for i in tl.static_range(K):
        sums += (dw[i] + d * x[at + i],)  # dw_i = sum d_t x_{t-k+1+i}
    return sums + (dw[K] + d,)


@triton.jit
def _backward(
    X,
    WINDOW,
    WEIGHT,
    BIAS,
    DY,
    DX,
    DWINDOW,
    DW,
    T,
    W,
    SX,
    K: tl.constexpr,
    STEP: tl.constexpr,
    BW: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UNIT: tl.constexpr,
):
    block, b, SX = tl.program_id(1), tl.program_id(2).to(tl.int64), SX * UNIT
    ch = (tl.program_id(0) * BW + tl.arange(0, BW))[None, :]
    row, before = tl.arange(0, 1)[:, None], block * SPAN - K + 1  # t + row: a column of one time
    bias, zero = tl.load(BIAS + ch, mask=ch < W, other=0.0), tl.zeros((1, BW), tl.float32)
    w, dw, x, d = (), (zero,), (), ()
    for i in tl.static_range(K):
        w += (tl.load(WEIGHT + ch * K + i, mask=ch < W, other=0.0),)
        dw += (zero,)
    # What the first token finds behind it: k-1 of x and of d, which want k-1 of x behind themselves
    for i in tl.static_range(1 - K, K - 1):
        x += (_input(X, WINDOW, b, before + i + row, T, W, SX, ch, K, HAS_WINDOW),)
    for i in tl.static_range(K - 1):
        d += (_slope(_dy(DY, b, before + i + row, T, W, ch), x, i, w, bias, K),)
    x = x[K - 1 :]
    for t in range(block * SPAN, tl.minimum((block + 1) * SPAN, T + K - 1), STEP):
        dy = ()
        for u in tl.static_range(STEP):  # all reads first, so that they travel together
            x += (_input(X, WINDOW, b, t + u + row, T, W, SX, ch, K, False),)
            dy += (_dy(DY, b, t + u + row, T, W, ch),)
        for u in tl.static_range(STEP):
            new = _slope(dy[u], x, u, w, bias, K)
            dw, dx = _more(dw, new, x, u, K), w[0] * new
            for j in tl.static_range(K - 1):
                dx += w[K - 1 - j] * d[u + j]  # dx_s = sum w_{k-1-j} d_{s+j}
            d += (new,)
            s = t + u - K + 1 + row  # it lags by k-1: it starts at the window's first token
            at, ok = DX + b * T * W + s.to(tl.int64) * W + ch, (s >= 0) & (s < T) & (ch < W)
            tl.store(at, dx.to(DX.dtype.element_ty), mask=ok)
            if HAS_WINDOW:
                at, ok = DWINDOW + (b * (K - 1) + s + K - 1) * W + ch, (s < 0) & (ch < W)
                tl.store(at, dx.to(DWINDOW.dtype.element_ty), mask=ok)
        x, d = x[STEP:], d[STEP:]
    part = (b * tl.num_programs(1) + block) * (K + 1)
    for i in tl.static_range(K + 1):
        tl.store(DW + (part + i) * W + ch, dw[i], mask=ch < W)


class Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, window):
        b, t, w = x.shape
        k = weight.shape[1]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ctx.save_for_backward(x, weight, bias, window)
        BT, wide = min(32, triton.next_power_of_2(t)), unit(x.stride(1))
        _forward[triton.cdiv(w, 128), triton.cdiv(t, BT), b](
            x,
            window,
            weight,
            bias,
            y,
            t,
            w,
            x.stride(1) // wide,
            k,
            BT,
            128,
            window is not None,
            wide,
            num_warps=4,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, window = ctx.saved_tensors
        (b, t, w), k, wide = x.shape, weight.shape[1], unit(x.stride(1))
        blocks = triton.cdiv(t + k - 1, SPAN)  # the last k-1 inputs start k-1 steps late
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dw = weight.new_empty(b, blocks, k + 1, w)
        dwindow = None if window is None else torch.empty_like(window)
        _backward[triton.cdiv(w, 128), blocks, b](
            x,
            window,
            weight,
            bias,
            dy.contiguous(),
            dx,
            dwindow,
            dw,
            t,
            w,
            x.stride(1) // wide,
            k,
            STEP,
            128,
            SPAN,
            window is not None,
            wide,
            num_warps=1,
        )
        dw = dw.sum((0, 1))
        return dx, dw[:k].T, dw[k], dwindow


def conv(x, weight, bias, window=None):
    """mamba.causal_conv: y (b, t, w), and the padded input, or None while gradients are recorded:
    nobody reads it then.

    x (b, t, w)   weight (w, 1, k)   bias (w,) or None   window (b, k-1, w) or None: the past
    """
    on_gpu("the convolution", x, weight, bias, window)
    k = weight.shape[-1]
    if (
        weight.shape != (x.shape[2], 1, k)
        or not 2 <= k <= 7
        or x.numel() == 0
        or x.dtype == torch.float64
    ):
        raise ValueError(
            f"the convolution with fast=True takes 2 to 7 taps a channel and 16 or 32 bits, "
            f"not x {tuple(x.shape)} of {x.dtype} with weight {tuple(weight.shape)}"
        )
    bias = weight.new_zeros(x.shape[2]) if bias is None else bias
    window = None if window is None else window.to(x.dtype).contiguous()
    y = Conv.apply(rows(x), weight[:, 0].float().contiguous(), bias.float().contiguous(), window)
    if torch.is_grad_enabled():
        return y, None
    return y, torch.cat(
        [x.new_zeros(x.shape[0], k - 1, x.shape[2]) if window is None else window, x], 1
    )
