"""
experts: every token through its k experts and back, in three launches. latent_moe.Experts, same
numbers.

Sort the m*k (token, expert) slots by expert. Slot r belongs to token t(r), expert e(r), weight p_r:

    hid_r = relu(W_up,e c_t)^2              _grouped: rows gathered by token, relu^2 at once
    out_r = W_down,e hid_r                  _grouped: rows already lie by expert
    r_t   = sum over t's slots p_r out_r    _combine: a token collects its k rows, as it picked them

Backward, with y = dr. The activation is its own note, relu(h) = sqrt(hid), and `out` is not needed
at all:
    z_r   = W_down,e^T y_t            _grouped again, gathered
    dp_r  = z_r . hid_r               in its epilogue: p_r y . W_down hid = p_r z . hid
    dh_r  = 2 sqrt(hid_r) p_r z_r     in its epilogue
    dc_t  = sum of W_up,e^T dh_r      _grouped, then _combine without weights
    dW_up,e   = sum dh_r c_t^T        _weights, the rows of one expert in a loop
    dW_down,e = sum p_r y_t hid_r^T   the same

grid     _grouped (row tiles x column tiles): a tile of rows has one expert; 8 tiles share a column
         of weights in cache. Their number is not known on the host and nobody waits for it: at most
         m k/BM + E, the surplus returns at once, so a CUDA graph can hold all of this.
         _weights (columns, columns, E).
traffic  Super, 8192 tokens, bf16: weights 2.8 GB each way, hid 0.97 GB written and read, rows 0.37
         + 0.37 GB, combine 0.39 GB. Gathering inside saves the copy of c by slot, the epilogue two
         passes over hid. At 256 tokens all is weights, 5.6 GB; at one, 22 experts of them, 0.24 GB.
numbers  products of c's type, sums fp32, one rounding where something is stored. Sorted stably,
         summed in a fixed order, no atomics: the same bits every time, whatever experts the
         neighbours chose.
sizes    BM 128 where an expert has 64 rows or more on average, 16 below, where weights are all that
         matters. BN 128, BK 64 (128 at BM 16, where few rows leave room). A sum of 16 steps or more
         takes BN 256, where that divides the columns and fits the card: one block a multiprocessor,
         a quarter fewer bytes an operation. Else 3 stages where two blocks then fit (H100, B200):
         one is at work while the other begins or ends. 4 where they do not, 3 for 16 rows where a
         block has 99 KB. fp32: 64, 64, 32, for checking.
Not here the sort, which is torch's; quantised experts
Sources  arXiv:2512.14080 for not keeping `out`; tiles from the compiler's tables, not from a
         stopwatch
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import on_gpu, shared_memory


@triton.jit
def _place(TILES, columns):
    """This program's row tile and column tile: 8 row tiles, then the next column."""
    pid = tl.program_id(0)
    group = pid // (8 * columns) * 8
    high = tl.minimum(TILES - group, 8)
    return group + pid % (8 * columns) % high, pid % (8 * columns) // high


@triton.jit
def _product(acc, a, w, ok, within, i, I, stride, BK: tl.constexpr, EVEN: tl.constexpr):
    """acc + a w over all I columns of a, BK at a time; EVEN: they divide into BK."""
    for k in range(0, I, BK):
        if EVEN:
            x = tl.load(a, mask=ok[:, None], other=0.0)
            y = tl.load(w, mask=within[None, :], other=0.0)
        else:
            x = tl.load(a, mask=ok[:, None] & (k + i < I)[None, :], other=0.0)
            y = tl.load(w, mask=within[None, :] & (k + i < I)[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee")
        a += BK
        w += stride
    return acc


@triton.jit
def _backward(acc, HID, OUT, GATE, DGATE, rows, ok, col, O, BM: tl.constexpr, BN: tl.constexpr):
    """dh, and this tile's part of dp, from one half of z's columns, then from the other: both at
    once would take the registers of a second block.
    """
    gate = tl.load(GATE, mask=ok, other=0.0).to(tl.float32)
    halves, part = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split(), tl.zeros((BM,), tl.float32)
    for half in tl.static_range(2):
        z, n = halves[half], col * BN + half * (BN // 2) + tl.arange(0, BN // 2)
        own, both = rows + n[None, :], ok[:, None] & (n < O)[None, :]
        hid = tl.load(HID + own, mask=both, other=0.0).to(tl.float32)
        part += tl.sum(z * hid, 1)  # dp = z . hid
        dh = z * gate[:, None] * 2 * tl.sqrt(hid)  # dh = 2 sqrt(hid) p z
        tl.store(OUT + own, dh.to(OUT.dtype.element_ty), mask=both)
    tl.store(DGATE, part, mask=ok)


@triton.jit
def _grouped(
    A,
    W,
    OUT,
    ORDER,
    EXPERT,
    ROW,
    ENDS,
    GATE,
    HID,
    DGATE,
    TILES,
    I,
    O,
    E,
    K_TOP,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATHER: tl.constexpr,
    TURN: tl.constexpr,
    RELU2: tl.constexpr,
    BACK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """OUT_r = A_r W_e^T, W (E, O, I); TURN: W (E, I, O). GATHER: A's rows are tokens. BACK: the
    epilogue of z.
    """
    columns = tl.cdiv(O, BN)
    tile, col = _place(TILES, columns)
    e = tl.load(EXPERT + tile)
    if e >= E:  # the surplus
        return
    r0, end = tl.load(ROW + tile), tl.load(ENDS + e)
    m, n, i = tl.arange(0, BM), col * BN + tl.arange(0, BN), tl.arange(0, BK)
    ok, within = r0 + m < end, n < O
    slot = tl.load(ORDER + r0 + m, mask=ok, other=0)
    if GATHER:
        a = A + (slot // K_TOP).to(tl.int64)[:, None] * I + i[None, :]
    else:
        a = A + r0.to(tl.int64) * I + m[:, None] * I + i[None, :]
    if TURN:
        w = W + e.to(tl.int64) * I * O + i[:, None] * O + n[None, :]
    else:
        w = W + e.to(tl.int64) * I * O + n[None, :] * I + i[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    acc = _product(acc, a, w, ok, within, i, I, BK * O if TURN else BK, BK, EVEN)
    rows = r0.to(tl.int64) * O + m[:, None] * O
    if BACK:
        part = DGATE + slot.to(tl.int64) * columns + col
        _backward(acc, HID, OUT, GATE + slot, part, rows, ok, col, O, BM, BN)
    else:
        if RELU2:
            acc = tl.maximum(acc, 0.0)  # hid = relu(h)^2
            acc = acc * acc
        both = ok[:, None] & within[None, :]
        tl.store(OUT + rows + n[None, :], acc.to(OUT.dtype.element_ty), mask=both)


@triton.jit
def _combine(X, WHERE, GATE, OUT, N, K_TOP: tl.constexpr, BN: tl.constexpr, WEIGH: tl.constexpr):
    t, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for j in range(K_TOP):  # always in the order of the picks
        row = tl.load(WHERE + t * K_TOP + j).to(tl.int64)
        x = tl.load(X + row * N + n, mask=n < N, other=0.0).to(tl.float32)
        if WEIGH:
            x = x * tl.load(GATE + t * K_TOP + j).to(tl.float32)
        acc += x  # r_t = sum p_r out_r
    tl.store(OUT + t.to(tl.int64) * N + n, acc.to(OUT.dtype.element_ty), mask=n < N)


@triton.jit
def _weights(
    X,
    TOKENS,
    OUT,
    ORDER,
    ENDS,
    GATE,
    I,
    J,
    K_TOP,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    WEIGH: tl.constexpr,
    TURN: tl.constexpr,
):
    """OUT_e = sum over e's rows X_r (I) TOKENS_t (J)^T, times p_r if WEIGH; (E, I, J), or (E, J, I)
    with TURN.
    """
    e = tl.program_id(2)
    i, j = tl.program_id(0) * BI + tl.arange(0, BI), tl.program_id(1) * BJ + tl.arange(0, BJ)
    start, end = tl.load(ENDS + e - 1, mask=e > 0, other=0), tl.load(ENDS + e)
    r, acc = tl.arange(0, BR), tl.zeros((BI, BJ), tl.float32)
    rows = r[None, :] * I + i[:, None]
    for r0 in range(start, end, BR):
        ok = r0 + r < end
        slot = tl.load(ORDER + r0 + r, mask=ok, other=0)
        at = X + tl.cast(r0, tl.int64) * I  # one number for all: the rest of an address has 32 bits
        x = tl.load(at + rows, mask=ok[None, :] & (i < I)[:, None], other=0.0)
        y = tl.load(
            TOKENS + (slot // K_TOP).to(tl.int64)[:, None] * J + j[None, :],
            mask=ok[:, None] & (j < J)[None, :],
            other=0.0,
        )
        if WEIGH:
            gate = tl.load(GATE + slot, mask=ok, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) * gate[None, :]).to(x.dtype)
        acc = tl.dot(x, y, acc, input_precision="ieee")
    at = OUT + e.to(tl.int64) * I * J
    if TURN:
        both = (j < J)[:, None] & (i < I)[None, :]
        tl.store(at + j[:, None] * I + i[None, :], acc.T.to(OUT.dtype.element_ty), mask=both)
    else:
        both = (i < I)[:, None] & (j < J)[None, :]
        tl.store(at + i[:, None] * J + j[None, :], acc.to(OUT.dtype.element_ty), mask=both)


def tiles(dtype, many, shared, i=0, o=0):
    """BM, BN, BK and the launch for sums of i numbers in o columns: see sizes above.

    many: 64 rows an expert, or more; shared: bytes that a block of the card may have.
    """
    if dtype == torch.float32:
        return (64 if many else 16, 64, 32), dict(num_warps=4, num_stages=2)
    held = lambda BM, BN, BK: 2 * BK * (BM + BN)  # bytes of a stage
    narrow, square, wide = (16, 128, 128), (128, 128, 64), (128, 256, 64)
    if not many:  # one of the stages is at work and in registers
        return narrow, dict(num_warps=4, num_stages=4 if 3 * held(*narrow) <= shared else 3)
    if i >= 16 * 64 and o % 256 == 0 and 3 * held(*wide) <= shared:
        return wide, dict(num_warps=8, num_stages=4)
    return square, dict(num_warps=8, num_stages=3 if 2 * 3 * held(*square) <= shared else 4)


def route(pick, E, BM):
    """The slots in order of their experts, and which row tile is whose. Nothing here waits for the
    GPU.

    -> order (m*k,) slots by expert   where (m*k,) its inverse   ends (E,) past an expert's last row
       expert, row (tiles,): a tile's expert (E: no tile) and first row
    """
    by, order = pick.flatten().sort(stable=True)
    at = torch.arange(len(order), device=pick.device)
    where = torch.empty_like(order).scatter_(0, order, at)
    ends = torch.searchsorted(by, torch.arange(E, device=pick.device), right=True)
    count = ends.diff(prepend=ends.new_zeros(1))
    last = ((count + BM - 1) // BM).cumsum(0)  # (E,) past each expert's last tile
    at = torch.arange(len(order) // BM + min(E, len(order)), device=pick.device)
    expert = torch.searchsorted(last, at, right=True)
    mine = expert.clamp(max=E - 1)
    row = ends[mine] - count[mine] + (at - last[mine] + (count[mine] + BM - 1) // BM) * BM
    return [v.int() for v in (order, where, ends, expert, row)]


class Routed(torch.autograd.Function):
    """Keeps hid and what it was given, nothing else."""

    @staticmethod
    def forward(ctx, c, pick, gate, up, down):
        (m, l), k, (E, f, _) = c.shape, pick.shape[1], up.shape
        card = m * k >= 64 * E, shared_memory(c.device)
        order, where, ends, expert, row = notes = route(pick, E, tiles(c.dtype, *card)[0][0])
        hid, out, r = c.new_empty(m * k, f), c.new_empty(m * k, l), torch.empty_like(c)
        grouped(c, up, hid, notes, k, card, GATHER=True, RELU2=True)
        grouped(hid, down, out, notes, k, card)
        combine(out, where, gate, r, k)
        ctx.save_for_backward(c, gate, up, down, hid, *notes)
        ctx.card = card
        return r

    @staticmethod
    @once_differentiable
    def backward(ctx, y):
        c, gate, up, down, hid, *notes = ctx.saved_tensors
        (order, where, ends, _, _), y, (E, f, l), k = notes, y.contiguous(), up.shape, gate.shape[1]
        BN = tiles(c.dtype, *ctx.card)[0][1]
        dh, dx, dc = torch.empty_like(hid), c.new_empty(len(order), l), torch.empty_like(c)
        dgate = c.new_empty(len(order), triton.cdiv(f, BN), dtype=torch.float32)
        grouped(
            y, down, dh, notes, k, ctx.card, gate, hid, dgate, GATHER=True, TURN=True, BACK=True
        )
        grouped(dh, up, dx, notes, k, ctx.card, TURN=True)
        combine(dx, where, None, dc, k)
        dup, ddown = torch.empty_like(up), torch.empty_like(down)
        B = (64, 64, 32) if c.dtype == torch.float32 else (128, 128, 64)
        grid = triton.cdiv(f, B[0]), triton.cdiv(l, B[1]), E
        how = dict(num_warps=8, num_stages=2 if B[2] == 32 else 3)
        _weights[grid](dh, c, dup, order, ends, gate, f, l, k, *B, False, False, **how)
        _weights[grid](hid, y, ddown, order, ends, gate, f, l, k, *B, True, True, **how)
        return dc, None, dgate.sum(1).view_as(gate).to(gate.dtype), dup, ddown


def grouped(
    a,
    w,
    out,
    notes,
    k,
    card,
    gate=None,
    hid=None,
    dgate=None,
    GATHER=False,
    TURN=False,
    RELU2=False,
    BACK=False,
):
    """Launches _grouped: out (m*k, o) = a (m or m*k, i) times w[e] (o, i), or w[e] (i, o) with
    TURN.
    """
    order, _, ends, expert, row = notes
    E, i, o = w.shape if TURN else (w.shape[0], w.shape[2], w.shape[1])
    (BM, BN, BK), how = tiles(a.dtype, *card, *(() if BACK else (i, o)))
    grid = (len(expert) * triton.cdiv(o, BN),)
    _grouped[grid](
        a,
        w,
        out,
        order,
        expert,
        row,
        ends,
        gate,
        hid,
        dgate,
        len(expert),
        i,
        o,
        E,
        k,
        BM,
        BN,
        BK,
        GATHER,
        TURN,
        RELU2,
        BACK,
        i % BK == 0,
        **how,
    )


def combine(x, where, gate, out, k):
    """Launches _combine: out (m, n), each row the sum of its token's k rows of x (m*k, n), weighted
    by gate.
    """
    m, n = out.shape
    BN = min(1024, triton.next_power_of_2(n))
    _combine[m, triton.cdiv(n, BN)](x, where, gate, out, n, k, BN, gate is not None, num_warps=4)


def experts(c, pick, gate, up, down):
    """latent_moe.Experts: c (m, l), pick and gate (m, k), up (E, f, l), down (E, l, f) -> (m,
    l).
    """
    on_gpu("experts", c, pick, gate, up, down)
    (m, k), (E, f, l) = pick.shape, up.shape
    if torch.is_autocast_enabled(c.device.type):
        c = c.to(torch.get_autocast_dtype(c.device.type))
    if c.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"experts with fast=True takes fp32 or bf16, not {c.dtype}")
    if m == 0 or c.shape != (m, l) or gate.shape != (m, k) or down.shape != (E, l, f):
        raise ValueError(
            f"experts: c {tuple(c.shape)}, pick {tuple(pick.shape)}, gate {tuple(gate.shape)}, "
            f"up {tuple(up.shape)}, down {tuple(down.shape)} do not fit"
        )
    if m * k >= 2**31:
        raise ValueError(
            f"experts with fast=True numbers slots in 32 bits: {m:,} tokens of {k} experts "
            f"are too many"
        )
    c, up, down = c.contiguous(), up.to(c.dtype).contiguous(), down.to(c.dtype).contiguous()
    return Routed.apply(c, pick, gate.contiguous(), up, down)
