"""
ssd: Mamba-2's recurrence with its state kept on chip. mamba.ssd_chunked, same signature, same
numbers.

    S_t = a_t S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t        a_t = exp(dt_t A)

A program walks one head of one sequence in chunks of Q tokens and holds S in registers all the way:
between chunks nothing goes to memory, so Q can be small. Small is cheap: work a token grows with Q,
and 2pn/(p+n) = 85 would balance it against updating S. With c_q = log2 of a_1 ... a_q inside the
chunk and c_Q its last, 2^(c_q - c_r) is what is left at q of what came in at r:

    W_qr = (C_q . B_r) 2^(c_q - c_r) dt_r,  r <= q                    scores that fade
    y_q  = sum_r W_qr x_r + 2^(c_q) S C_q + D x_q                     chunk, history, skip
    S    = 2^(c_Q) S + sum_r 2^(c_Q - c_r) dt_r x_r B_r^T             carry

Backward, with Y = dy and G the gradient of S at the chunk's end:

    e_r  = sum_q (C_q . B_r) 2^(c_q - c_r) Y_q + 2^(c_Q - c_r) G B_r  dx = dt e + D Y, ddt = e . x
    G    = 2^(c_Q) G + sum_q 2^(c_q) Y_q C_q^T                        the same walk, from the right
    dc_q = what q reads less what q wrote
    da_q = sum of dc from q on, plus what the end owes                ddt += A da

The last two lines say how the fading is learned. c_q makes all larger that q reads, and all smaller
that later ones read of what q wrote: dc_q is the difference. A log a_q is in c_q and in every later
c, so its gradient da_q is the sum of them, and of what the state at the chunk's end would gain.

letters  h heads of p numbers and a state (p, n); heads h/g at a time share B and C. q, r tokens of
         a chunk: q reads, r was written
grid     _scan (h, segments, b)   _states (p/BP, h, b) left to right for S, right to left for G
         _dx (chunks, h, b)       _dbc (chunks, g, b): loops over its h/g heads: no atomics
         _step (p/BP, h, b): a few tokens, state in, state out, or every state on the way
traffic  forward, Super, 8192 tokens, bf16: x and y 134 MB each, B and C 17 each, dt 4: 306 MB, the
         minimum, in one segment. Fewer than 128 (head, sequence) pairs leave a card idle: then time
         is cut into segments, _states finds what each one writes, and x and B are read twice.
         Backward: the minimum is 478 MB; S and G at chunk starts, written once and read twice in
         x's type, make it 2.7 GB. Step: S twice, all there is.
numbers  S, G, decays and sums fp32; operands of tensor cores in x's type. Decays are powers of
         differences, never quotients: those would be 0 / 0 once both have faded. dc takes rows and
         columns of ONE fp32 W: their rounding must cancel in the sum over time, and with dt e . x
         from bf16 operands dA is 10 to 50 times worse. Padding has dt = 0: no fade, no write.
sizes    p and n from 16, 32, 64, 128. 16 bits: Q = 64, 8 warps: a (64, 128) state in fp32, the
         scores and two chunks in flight fill the registers of Hopper and Blackwell without a spill
         (4 warps: 128 bytes). Q = 32 before Hopper, whose tensor cores want their operands in
         registers too. fp32 has no exact tensor core: Q = 16, fit for checks. Bases are 64-bit
         scalars, offsets inside a tile 32-bit ones. No atomics anywhere.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import INTERPRETED, on_gpu, rows

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2^(x LOG2E)


@triton.jit
def _fade(DT, row, a, T, t0, H, q):
    """dt of a chunk, 0 past the end; c, the base-2 log of what is left of its start; c at its
    end.
    """
    dt = tl.load(DT + row + q * H, mask=t0 + q < T, other=0.0)
    return dt, tl.cumsum(dt * a, 0), tl.sum(dt * a, 0)


@triton.jit
def _states(
    X,
    DT,
    A,
    B,
    START,
    KEPT,
    LAST,
    FADE,
    T,
    H,
    R,
    SX,
    SB,
    SEG,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BP: tl.constexpr,
    REV: tl.constexpr,
    KEEP: tl.constexpr,
):
    """KEEP: S before every chunk (REV: G after it, X and B being dy and C). Else a segment's write
    and fade.
    """
    hs, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, s = hs % H, hs // H  # head, segment
    segments = tl.num_programs(1) // H
    q, n, p = tl.arange(0, Q), tl.arange(0, N), tl.program_id(0) * BP + tl.arange(0, BP)
    tile = p[None, :] * N + n[:, None]  # S is (p, n) in memory, (n, p) here
    a, total, chunks = tl.load(A + h) * LOG2E, 0.0, tl.cdiv(tl.minimum(SEG, T - s * SEG), Q)
    S = tl.zeros((N, BP), tl.float32)
    if KEEP:
        S += tl.load(START + (b * H + h) * P * N + tile)
    for i in range(chunks):
        c = i
        if REV:
            c = chunks - 1 - i
        if KEEP:
            tl.store(KEPT + ((b * chunks + c) * H + h) * P * N + tile, S.to(KEPT.dtype.element_ty))
        t0 = s * SEG + c * Q
        row, ok = b * T + t0, (t0 + q < T)[:, None]
        dt, cs, last = _fade(DT, row * H + h, a, T, t0, H, q)
        x = tl.load(X + row * SX + h * P + q[:, None] * SX + p[None, :], mask=ok, other=0.0)
        Bq = tl.load(B + row * SB + h // R * N + q[:, None] * SB + n[None, :], mask=ok, other=0.0)
        if REV:
            w = tl.exp2(cs)  # G += sum_q 2^(c_q) y_q C_q^T
        else:
            w = tl.exp2(last - cs) * dt  # S += sum_r 2^(c_Q - c_r) dt_r x_r B_r^T
        S = tl.dot(Bq.T, (x * w[:, None]).to(x.dtype), S * tl.exp2(last), input_precision="ieee")
        total += last
    if KEEP:
        tl.store(LAST + (b * H + h) * P * N + tile, S)
    else:
        tl.store(LAST + ((b * (segments + 1) + s + 1) * H + h) * P * N + tile, S)
        tl.store(FADE + (b * segments + s) * H + h, tl.exp2(total))


@triton.jit
def _scan(
    X,
    DT,
    A,
    B,
    C,
    D,
    START,
    Y,
    LAST,
    T,
    H,
    R,
    SX,
    SB,
    SEG,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
):
    h, s, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(1)
    q, n, p = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, P)
    tile = p[None, :] * N + n[:, None]
    a, skip = tl.load(A + h) * LOG2E, tl.load(D + h)
    S = tl.load(START + ((b * segments + s) * H + h) * P * N + tile)
    for t0 in range(s * SEG, tl.minimum((s + 1) * SEG, T), Q):
        row, ok = b * T + t0, (t0 + q < T)[:, None]
        dt, cs, last = _fade(DT, row * H + h, a, T, t0, H, q)
        x = tl.load(X + row * SX + h * P + q[:, None] * SX + p[None, :], mask=ok, other=0.0)
        Bq = tl.load(B + row * SB + h // R * N + q[:, None] * SB + n[None, :], mask=ok, other=0.0)
        Cq = tl.load(C + row * SB + h // R * N + q[:, None] * SB + n[None, :], mask=ok, other=0.0)
        # 2^(c_q) S C_q
        y = tl.dot(Cq, S.to(x.dtype), input_precision="ieee") * tl.exp2(cs)[:, None]
        bits = tl.where(q[:, None] >= q[None, :], cs[:, None] - cs[None, :], float("-inf"))
        # (C_q . B_r) 2^(c_q - c_r) dt_r
        W = tl.dot(Cq, Bq.T, input_precision="ieee") * tl.exp2(bits) * dt[None, :]
        # + sum_r W_qr x_r + D x_q
        y = tl.dot(W.to(x.dtype), x, y, input_precision="ieee") + skip * x.to(tl.float32)
        tl.store(
            Y + (row * H + h) * P + q[:, None] * (H * P) + p[None, :],
            y.to(Y.dtype.element_ty),
            mask=ok,
        )
        u = (x * (tl.exp2(last - cs) * dt)[:, None]).to(x.dtype)
        S = tl.dot(Bq.T, u, S * tl.exp2(last), input_precision="ieee")  # the carry
    if s == segments - 1:
        tl.store(LAST + (b * H + h) * P * N + tile, S)


@triton.jit
def _dx(
    X,
    DT,
    A,
    B,
    C,
    D,
    DY,
    S_IN,
    G_OUT,
    DX,
    DDT,
    DA,
    DD,
    T,
    H,
    R,
    SX,
    SB,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
):
    k, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, n, p = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, P)
    t0 = k * Q
    row, ok = b * T + t0, (t0 + q < T)[:, None]
    own = (row * H + h) * P + q[:, None] * (H * P) + p[None, :]
    state = ((b * tl.num_programs(0) + k) * H + h) * P * N + p[None, :] * N + n[:, None]
    a, skip = tl.load(A + h), tl.load(D + h)
    dt, cs, last = _fade(DT, row * H + h, a * LOG2E, T, t0, H, q)
    S, G = tl.load(S_IN + state), tl.load(G_OUT + state)
    SG = tl.sum(tl.sum(S.to(tl.float32) * G.to(tl.float32), 1), 0)
    Cq = tl.load(C + row * SB + h // R * N + q[:, None] * SB + n[None, :], mask=ok, other=0.0)
    y = tl.load(DY + own, mask=ok, other=0.0)
    # what q reads: history ...
    dc = tl.sum(tl.dot(Cq, S, input_precision="ieee") * y, 1) * tl.exp2(cs)
    x = tl.load(X + row * SX + h * P + q[:, None] * SX + p[None, :], mask=ok, other=0.0)
    Bq = tl.load(B + row * SB + h // R * N + q[:, None] * SB + n[None, :], mask=ok, other=0.0)
    e = tl.dot(Bq, G, input_precision="ieee") * tl.exp2(last - cs)[:, None]  # 2^(c_Q - c_r) G B_r
    end = tl.sum(e * x, 1) * dt  # r's share in S at the end
    bits = tl.where(q[:, None] >= q[None, :], cs[:, None] - cs[None, :], float("-inf"))
    M = tl.dot(Cq, Bq.T, input_precision="ieee") * tl.exp2(bits)
    e = tl.dot(M.to(x.dtype).T, y, e, input_precision="ieee")  # + sum_q M_qr y_q
    W = tl.dot(y, x.T, input_precision="ieee") * M
    dc += tl.sum(W * dt[None, :], 1) - tl.sum(W, 0) * dt - end  # ... and chunk, less what it wrote
    # dx = dt e + D y
    tl.store(DX + own, (e * dt[:, None] + skip * y).to(DX.dtype.element_ty), mask=ok)
    # dc from q on + what the end owes
    da = tl.cumsum(dc, 0, reverse=True) + tl.sum(end, 0) + tl.exp2(last) * SG
    # ddt = e . x + A da
    tl.store(DDT + row * H + h + q * H, tl.sum(e * x, 1) + a * da, mask=t0 + q < T)
    part = (b * tl.num_programs(0) + k) * H + h
    tl.store(DA + part, tl.sum(da * dt, 0))  # dA = sum of dt da
    tl.store(DD + part, tl.sum(tl.sum(x.to(tl.float32) * y, 1), 0))  # dD = sum of x . y


@triton.jit
def _dbc(
    X,
    DT,
    A,
    B,
    C,
    DY,
    S_IN,
    G_OUT,
    DB,
    DC,
    T,
    H,
    SX,
    SB,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
):
    k, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, n, p = tl.arange(0, Q), tl.arange(0, N), tl.arange(0, P)
    t0, G = k * Q, H // R
    row, ok = b * T + t0, (t0 + q < T)[:, None]
    Z = tl.zeros((Q, Q), tl.float32)
    dB = tl.zeros((Q, N), tl.float32)
    dC = tl.zeros((Q, N), tl.float32)
    for r in range(R):  # the heads that share this B and C
        h = g * R + r
        state = ((b * tl.num_programs(0) + k) * H + h) * P * N
        tile = p[:, None] * N + n[None, :]  # S and G as (p, n)
        dt, cs, last = _fade(DT, row * H + h, tl.load(A + h) * LOG2E, T, t0, H, q)
        y = tl.load(DY + (row * H + h) * P + q[:, None] * (H * P) + p[None, :], mask=ok, other=0.0)
        x = tl.load(X + row * SX + h * P + q[:, None] * SX + p[None, :], mask=ok, other=0.0)
        bits = tl.where(q[:, None] >= q[None, :], cs[:, None] - cs[None, :], float("-inf"))
        # (y_q . x_r) 2^(c_q - c_r) dt_r
        Z += tl.dot(y, x.T, input_precision="ieee") * tl.exp2(bits) * dt[None, :]
        u = (x * (tl.exp2(last - cs) * dt)[:, None]).to(x.dtype)
        # 2^(c_Q - c_r) dt_r G^T x_r
        dB = tl.dot(u, tl.load(G_OUT + state + tile), dB, input_precision="ieee")
        # 2^(c_q) S^T y_q
        dC += tl.dot(y, tl.load(S_IN + state + tile), input_precision="ieee") * tl.exp2(cs)[:, None]
    Bq = tl.load(B + row * SB + g * N + q[:, None] * SB + n[None, :], mask=ok, other=0.0)
    Cq = tl.load(C + row * SB + g * N + q[:, None] * SB + n[None, :], mask=ok, other=0.0)
    own = (row * G + g) * N + q[:, None] * (G * N) + n[None, :]
    dC = tl.dot(Z.to(Bq.dtype), Bq, dC, input_precision="ieee")  # + sum_r Z_qr B_r
    tl.store(DC + own, dC.to(DC.dtype.element_ty), mask=ok)
    dB = tl.dot(Z.to(Bq.dtype).T, Cq, dB, input_precision="ieee")  # + sum_q Z_qr C_q
    tl.store(DB + own, dB.to(DB.dtype.element_ty), mask=ok)


@triton.jit
def _step(
    X,
    DT,
    A,
    B,
    C,
    D,
    START,
    Y,
    LAST,
    T,
    H,
    R,
    SX,
    SB,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    EVERY: tl.constexpr,
):
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p = tl.arange(0, N), tl.program_id(0) * BP + tl.arange(0, BP)
    tile = p[:, None] * N + n[None, :]
    a, skip = tl.load(A + h) * LOG2E, tl.load(D + h)
    S = tl.load(START + (b * H + h) * P * N + tile)
    for t in range(T):
        row = b * T + t
        dt = tl.load(DT + row * H + h)
        x = tl.load(X + row * SX + h * P + p).to(tl.float32)
        Bt = tl.load(B + row * SB + h // R * N + n).to(tl.float32)
        Ct = tl.load(C + row * SB + h // R * N + n).to(tl.float32)
        # S_t = a_t S_{t-1} + dt_t x_t B_t^T
        S = tl.exp2(dt * a) * S + (dt * x)[:, None] * Bt[None, :]
        y = tl.sum(S * Ct[None, :], 1) + skip * x  # y_t = S_t C_t + D x_t
        tl.store(Y + (row * H + h) * P + p, y.to(Y.dtype.element_ty))
        if EVERY:
            tl.store(LAST + (row * H + h) * P * N + tile, S)
    if not EVERY:
        tl.store(LAST + (b * H + h) * P * N + tile, S)


def prepare(x, dt, A, B, C, D, state):
    """Checks, and what the kernels take: strided rows, fp32 for all that is not x, B, C, zeros for
    what is None.
    """
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    on_gpu("ssd", x, dt, A, B, C, D, state)
    if {p, n} - {16, 32, 64, 128}:
        raise ValueError(
            f"ssd with fast=True takes a head dim and a state size of 16, 32, 64 or 128, not "
            f"{p} and {n}"
        )
    if not x.dtype == B.dtype == C.dtype or x.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise ValueError(
            f"ssd with fast=True takes x, B, C of one type of 16 or 32 bits, "
            f"not {x.dtype}, {B.dtype}, {C.dtype}"
        )
    if t == 0 or h % g or dt.shape != (b, t, h) or B.shape != C.shape or B.shape[:2] != (b, t):
        raise ValueError(
            f"ssd: x {tuple(x.shape)}, dt {tuple(dt.shape)}, B {tuple(B.shape)}, "
            f"C {tuple(C.shape)} do not fit"
        )
    D = x.new_zeros(h, dtype=torch.float32) if D is None else D.float().contiguous()
    state = (
        x.new_zeros(b, h, p, n, dtype=torch.float32)
        if state is None
        else state.float().contiguous()
    )
    B, C = rows(B), rows(C)
    if B.stride() != C.stride():  # one stride serves both
        B, C = B.contiguous(), C.contiguous()
    return rows(x), dt.float().contiguous(), A.float().contiguous(), B, C, D, state


def tiles(size, hopper):
    """Q, and the launches of _states, of _dbc and of the others, for x of `size` bytes a number:
    see sizes above.
    """

    def launch(warps, stages):
        return dict(num_warps=warps, num_stages=stages)

    if size == 4:
        return 16, launch(8, 1), launch(16, 1), launch(8, 1)
    return 64 if hopper else 32, launch(4, 2), launch(8, 3 if hopper else 2), launch(8, 2)


def fit(x):
    """tiles() for x on its card; the interpreter plays a Hopper. Cards of 12.x have an A100's
    instructions and less shared memory, and take its tiles.
    """
    hopper = INTERPRETED or (9, 0) <= torch.cuda.get_device_capability(x.device) < (12, 0)
    return tiles(x.element_size(), hopper)


def segment(b, t, h, at_least=1024, programs=128):
    """Tokens a program walks: all, unless there are too few programs; then whole 128s, never under
    at_least.
    """
    return max(at_least, -(-t // -(-programs // (b * h) * 128)) * 128) if b * h < programs else t


def chunk_states(x, dt, A, B, start, Q, walk, rev=False):
    """Launches _states: S before every chunk, (b, c, h, p, n), and the last; rev: G after each."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    kept, end, BP = x.new_empty(b, triton.cdiv(t, Q), h, p, n), torch.empty_like(start), min(p, 32)
    sizes = t, h, h // g, x.stride(1), B.stride(1), t, p, n, Q, BP
    _states[p // BP, h, b](x, dt, A, B, start, kept, end, dt, *sizes, rev, True, **walk)
    return kept, end


class SSD(torch.autograd.Function):
    """What the backward needs of S it walks again: storing it in forward would cost more than all
    of forward reads.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, state, cut):
        (b, t, h, p), (g, n), (Q, walk, _, how) = x.shape, B.shape[2:], fit(x)
        ctx.save_for_backward(x, dt, A, B, C, D, state)
        ctx.set_materialize_grads(False)
        strides, BP, s = (x.stride(1), B.stride(1)), min(p, 32), triton.cdiv(t, cut)
        y, last, start = x.new_empty(b, t, h, p), torch.empty_like(state), state
        if s > 1:  # what each segment but the last writes, then the recurrence
            start, fade = state.new_empty(b, s, h, p, n), state.new_empty(b, s - 1, h, 1, 1)
            start[:, 0] = state
            _states[p // BP, h * (s - 1), b](
                x,
                dt,
                A,
                B,
                state,
                state,
                start,
                fade,
                t,
                h,
                h // g,
                *strides,
                cut,
                p,
                n,
                Q,
                BP,
                False,
                False,
                **walk,
            )
            for i in range(s - 1):
                start[:, i + 1].addcmul_(fade[:, i], start[:, i])
        _scan[h, s, b](
            x, dt, A, B, C, D, start, y, last, t, h, h // g, *strides, cut, p, n, Q, **how
        )
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, state = ctx.saved_tensors
        (b, t, h, p), (g, n), (Q, walk, heads, how) = x.shape, B.shape[2:], fit(x)
        dy = x.new_zeros(b, t, h, p) if dy is None else dy.contiguous()
        dlast = torch.zeros_like(state) if dlast is None else dlast.float().contiguous()
        c, strides = triton.cdiv(t, Q), (x.stride(1), B.stride(1))
        S_in, _ = chunk_states(x, dt, A, B, state, Q, walk)
        G_out, dstate = chunk_states(dy, dt, A, C, dlast, Q, walk, rev=True)
        dx, dB, dC = torch.empty_like(dy), B.new_empty(B.shape), C.new_empty(C.shape)
        ddt, (dA, dD) = torch.empty_like(dt), dt.new_empty(2, b, c, h)
        _dx[c, h, b](
            x,
            dt,
            A,
            B,
            C,
            D,
            dy,
            S_in,
            G_out,
            dx,
            ddt,
            dA,
            dD,
            t,
            h,
            h // g,
            *strides,
            p,
            n,
            Q,
            **how,
        )
        _dbc[c, g, b](
            x, dt, A, B, C, dy, S_in, G_out, dB, dC, t, h, *strides, p, n, Q, h // g, **heads
        )
        return dx, ddt, dA.sum((0, 1)), dB, dC, dD.sum((0, 1)), dstate, None


def ssd(x, dt, A, B, C, D=None, state=None, chunk=128):
    """mamba.ssd_chunked: y (b, t, h, p) and the last state. `chunk` changes rounding only, and here
    not even that.

    Up to 16 tokens without a gradient take ssd_steps, so a draft is verified by the arithmetic that
    would sample it.
    """
    grad = torch.is_grad_enabled() and any(
        v is not None and v.requires_grad for v in (x, dt, A, B, C, D, state)
    )
    if x.shape[1] <= 16 and not grad:
        return ssd_steps(x, dt, A, B, C, D, state)
    args = prepare(x, dt, A, B, C, D, state)
    return SSD.apply(*args, segment(x.shape[0], x.shape[1], x.shape[2]))


def ssd_steps(x, dt, A, B, C, D=None, state=None, every=False):
    """mamba.ssd_recurrent for few tokens, no gradient. every: all states, (b, t, h, p, n), for
    whoever may go back.
    """
    with torch.no_grad():
        x, dt, A, B, C, D, state = prepare(x, dt, A, B, C, D, state)
        (b, t, h, p), (g, n) = x.shape, B.shape[2:]
        y = x.new_empty(b, t, h, p)
        last = state.new_empty(b, t, h, p, n) if every else torch.empty_like(state)
        BP = min(p, 16)  # 8 KiB of state a program of one warp: 64 numbers a thread
        _step[p // BP, h, b](
            x,
            dt,
            A,
            B,
            C,
            D,
            state,
            y,
            last,
            t,
            h,
            h // g,
            x.stride(1),
            B.stride(1),
            p,
            n,
            BP,
            every,
            num_warps=1,
        )
    return y, last
