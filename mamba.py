"""
Mamba-2: a linear recurrence that trains like attention and samples like an RNN.

Every head keeps a (p, n) matrix S. Each token first fades S by a_t, then writes its own p numbers
along B_t, then reads S along C_t:

    S_t = a_t S_{t-1} + dt_t x_t B_t^T     a_t = exp(dt_t A) in (0, 1)      A = -exp(A_log)
    y_t = S_t C_t + D x_t                  dt_t = softplus(raw_t + dt_bias)

x_t, B_t, C_t and the number raw_t are linear in the token (raw_t one per head). dt_t says how much
the token counts: where it is large, S forgets and writes the new; where it is near 0, the token
passes unnoticed. A is negative so that S can only fade, never grow by itself.

The same numbers three ways; read them in this order, tests/test_mamba.py holds them together:

    ssd_recurrent    a loop over the two lines above        t steps               sampling
    ssd_masked       one (t, t) matrix a head               t^2 work              like attention
    ssd_chunked      that inside chunks, S between them     t*q work, t/q steps   training, prefill

Letters   b batch  t time  d model width  h heads  p head dim  n state  k taps
          g groups of heads that share B and C          c chunks of q tokens
          e = h*p inner width                           w = e + 2*g*n convolved channels
          i, j positions: of who reads, of who wrote
Super     h=128 p=64 g=8 n=128 q=128: S is 4 MiB in fp32 per layer and sequence, however long
Not here  speed on a GPU: kernels/ssd.py, conv.py, norm.py, same signatures, taken where fast=True
Sources   arXiv:2405.21060 sections 5-7 (the forms); sizes: the released config.json
Departs   1. from Mamba-2's defaults, as the release does: the norm comes after the gate, and is
          taken over each of g groups
          2. from transformers: dt is never clamped (neither was it in training)
"""

import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

LOG2E = 1 / math.log(2)  # exp(x) = 2^(x * LOG2E)


def ssd_recurrent(x, dt, A, B, C, D=None, state=None):
    """The definition, one token at a time. Also the sampling step: t = 1, state in, state out.

    x (b, t, h, p)   dt (b, t, h), after softplus   A (h,), < 0   B, C (b, t, g, n)   D (h,)
    Returns y (b, t, h, p) and the state (b, h, p, n) after the last token.
    """
    b, t, h, p = x.shape
    agree(x, dt, A, B, C, D, state)
    a = (dt * A).exp()[..., None, None]  # (b, t, h, 1, 1)
    u = (x * dt[..., None])[..., None]  # (b, t, h, p, 1)
    B, C = (v[..., None, :].to(u.dtype) for v in per_head(h, B, C))  # (b, t, h, 1, n)
    S = u.new_zeros(b, h, p, B.shape[-1]) if state is None else state
    y = []
    for i in range(t):
        S = torch.addcmul(a[:, i] * S, u[:, i], B[:, i])  # fade, then write u B^T
        y.append((S * C[:, i]).sum(-1))  # (b, h, p)   read
    y = torch.stack(y, 1).to(x.dtype)
    return (y if D is None else y + D[:, None].to(x.dtype) * x), S


def agree(x, dt, A, B, C, D=None, state=None):
    """ValueError unless the operands of a scan have the shapes that ssd_recurrent lists."""
    if x.ndim != 4 or B.ndim != 4 or not x.shape[1] or not x.is_floating_point():
        raise ValueError(
            f"x {tuple(x.shape)}, {x.dtype}, and B {tuple(B.shape)}: (b, t, h, p), (b, t, g, n)"
        )
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    want = dict(dt=(b, t, h), A=(h,), B=(b, t, g, n), C=(b, t, g, n))
    want |= dict(D=(h,), state=(b, h, p, n))
    for name, v in dict(dt=dt, A=A, B=B, C=C, D=D, state=state).items():
        if v is not None and tuple(v.shape) != want[name]:
            raise ValueError(
                f"{name} is {tuple(v.shape)}, and beside x {tuple(x.shape)} {want[name]}"
            )
    if g < 1 or h % g:
        raise ValueError(f"{h} heads do not divide into {g} groups")


def per_head(h, *shared):
    """(b, t, g, n) each -> (b, t, h, n): a group's B or C for each of its h/g heads (Super: 16)."""
    return [v.repeat_interleave(h // v.shape[2], 2) for v in shared]


def ssd_masked(x, dt, A, B, C, D=None):
    """The recurrence unrolled: y = (decay * C B^T) (dt x), attention whose mask fades, not cuts.

    Unrolling S_i gives y_i = sum over j <= i of (a_i a_{i-1} ... a_{j+1}) (C_i . B_j) dt_j x_j: a
    score C_i . B_j, no softmax. With every a = 1 the mask is a lower triangle of ones, and this
    linear attention.
    """
    agree(x, dt, A, B, C, D)
    B, C = per_head(x.shape[2], B, C)  # (b, t, h, n)
    score = torch.einsum("bihn,bjhn->bhij", C, B)
    mask = decay((dt * A * LOG2E).mT).to(x.dtype)  # (b, h, t, t)
    y = torch.einsum("bhij,bjhp->bihp", score * mask, (x * dt[..., None]).to(x.dtype))
    return y if D is None else y + D[:, None].to(x.dtype) * x


def decay(bits):
    """Base-2 logs of a -> a_i ... a_{j+1}, what i still finds of a write at j <= i; 0 for later j.

    (..., t) -> (..., t, t). A power of a difference of running sums, never a quotient of products:
    those would underflow in one chunk. The upper triangle is masked in the exponent: it would
    overflow there and make a zero's gradient NaN.
    """
    s = bits.cumsum(-1)
    upper = torch.full((s.shape[-1],) * 2, -math.inf, dtype=s.dtype, device=s.device).triu(1)
    return (s[..., :, None] - s[..., None, :]).add_(upper).exp2_()  # on a CPU far faster than exp


def ssd_chunked(x, dt, A, B, C, D=None, state=None, chunk=128, fast=False):
    """The mask form inside chunks of q tokens, the recurrence between them.

    Shapes as in ssd_recurrent. Every step is one batched matmul per head. The ragged end is padded
    with dt = 0: such tokens neither fade nor write. Decays and S are in the precision of dt (fp32
    or more), the operands of matmuls in that of x. The mask multiplies, and 0 times NaN is NaN: a
    number that is not finite also spoils the outputs before it in its chunk, which the recurrence
    leaves alone.
    """
    if fast:
        from kernels.ssd import ssd

        return ssd(x, dt, A, B, C, D, state, chunk)
    agree(x, dt, A, B, C, D, state)
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least one token")
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    q = min(chunk, t)

    def cut(v):  # (b, t, h, ...) -> (b, c, h, q, ...)
        v = F.pad(v, (0, 0) * (v.ndim - 2) + (0, -t % q)) if t % q else v  # pad by 0 is a copy
        return v.unflatten(1, (-1, q)).transpose(2, 3).contiguous()

    def weigh(v, w):  # v * w: (b, c, g, q, n) (b, c, h, q) -> (b, c, h, q, n)
        return (v[:, :, :, None] * w.unflatten(2, (g, -1))[..., None]).flatten(2, 3).to(x.dtype)

    u = cut((x * dt[..., None]).to(x.dtype))  # (b, c, h, q, p)   what is written
    a = cut(dt * (A * LOG2E))  # (b, c, h, q)   base-2 logs
    B, C = cut(B), cut(C)  # (b, c, g, q, n)
    s = a.cumsum(-1)  # (b, c, h, q)   log decay since the chunk began

    # 1. Inside a chunk: attention with a fading mask; a group's heads share the scores C B^T.
    mask = decay(a).unflatten(2, (g, -1)) * (C @ B.mT)[:, :, :, None]  # (b, c, g, h/g, q, q)
    y = mask.to(x.dtype).flatten(2, 3) @ u  # (b, c, h, q, p)

    # 2. What each chunk adds to S, faded to its end: sum over j of 2^(s_last - s_j) u_j B_j^T.
    U = u.mT @ weigh(B, (s[..., -1:] - s).exp2())  # (b, c, h, p, n)

    # 3. Between chunks: the recurrence again, one step a chunk.
    S = U.new_zeros(b, h, p, n, dtype=dt.dtype) if state is None else state
    entering = []  # S before each chunk
    for write, fade in zip(U.to(dt.dtype).unbind(1), s[..., -1].exp2()[..., None, None].unbind(1)):
        entering.append(S)
        S = fade * S + write

    # 4. What the tokens of a chunk read from before it: 2^(s_i) S C_i.
    y += weigh(C, s.exp2()) @ torch.stack(entering, 1).to(x.dtype).mT

    y = y.transpose(2, 3).flatten(1, 2)[:, :t].to(x.dtype)  # (b, t, h, p)
    return (y if D is None else torch.addcmul(y, D[:, None].to(x.dtype), x)), S


class DepthwiseConv(torch.autograd.Function):
    """y_t = bias + sum over taps i of weight_i x_{t+i}, each channel by itself.

    x (b, k-1+t, w)   weight (w, 1, k)   -> (b, t, w)
    Forward is torch's convolution; backward is written out, because on a CPU torch's own takes
    several times as long.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        image = x.mT[:, :, None]  # one row high: on a CPU 10 times as fast as conv1d
        return F.conv2d(image, weight[:, :, None], bias, groups=x.shape[2])[:, :, 0].mT

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        t, k = dy.shape[1], weight.shape[-1]
        padded = F.pad(dy, (0, 0, k - 1, k - 1))
        dx = DepthwiseConv.apply(padded, weight.flip(-1), None)  # sum over i of w_i dy_{t-i}
        taps = [(x[:, i : i + t] * dy).sum((0, 1)) for i in range(k)]  # sum over t of x_{t+i} dy_t
        dw = torch.stack(taps, -1)[:, None]
        return dx, dw, dy.sum((0, 1)) if ctx.needs_input_grad[2] else None


def causal_conv(x, weight, bias, window=None, fast=False):
    """Every channel filters its own last k numbers, then SiLU: x, B and C see k-1 tokens back.

    x (b, t, w)   weight (w, 1, k)   bias (w,) or None
    window (b, k-1, w): the inputs just before x; None at the start of a text
    Returns y (b, t, w) and the padded input (b, k-1+t, w), from which the next window is cut.
    """
    if fast:
        from kernels.conv import conv

        return conv(x, weight, bias, window)
    (b, _, w), k = x.shape, weight.shape[-1]
    if window is None:
        window = x.new_zeros(b, k - 1, w)  # zeros at the start
    shapes = [None if v is None else tuple(v.shape) for v in (weight, window, bias)]
    if shapes[:2] != [(w, 1, k), (b, k - 1, w)] or shapes[2] not in (None, (w,)):
        raise ValueError(f"weight, window and bias are {shapes} beside x {tuple(x.shape)}")
    x = torch.cat([window.to(x.dtype), x], 1)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.shape[1] == k:  # one new token: one sum over the taps
        y = (x * weight[:, 0].T.contiguous()).sum(1, keepdim=True)
        y = y if bias is None else y + bias
    else:
        y = DepthwiseConv.apply(x, weight, bias)
    return F.silu(y), x


class GatedNorm(nn.Module):
    """Gate, then RMSNorm over each group of e/g channels, in fp32: norm(y * silu(z)) * weight.

    Per group, so that a group never needs another one's numbers: groups can live on different GPUs,
    exactly.
    """

    def __init__(self, width, groups, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps
        self.fast = False  # kernels/norm.py

    def forward(self, y, z):  # (b, t, e) twice
        if self.fast:
            from kernels.norm import gated_norm

            return gated_norm(y, z, self.weight, self.groups, self.eps)
        if y.shape != z.shape or y.shape[2:] != self.weight.shape:
            raise ValueError(
                f"y {tuple(y.shape)}, z {tuple(z.shape)}: (b, t, {len(self.weight)}) both"
            )
        wide = torch.promote_types(y.dtype, torch.float32)
        v = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.groups, -1))  # (b, t, g, e/g)
        v = F.rms_norm(v, v.shape[-1:], eps=self.eps).flatten(2)
        return (v * self.weight).to(y.dtype)


def write(S, x, dt, A, B):
    """The S of ssd_recurrent after t more tokens, by one matmul: every write faded to the end."""
    agree(x, dt, A, B, B, state=S)
    (b, _, h, p), (g, n) = x.shape, B.shape[2:]
    s = (dt * (A * LOG2E)).cumsum(1)  # (b, t, h)   log decay since the first token
    left = dt * (s[:, -1:] - s).exp2()  # (b, t, h)   what the end still has of each write
    u = (x * left[..., None]).unflatten(2, (g, -1)).permute(0, 2, 3, 4, 1)  # (b, g, h/g, p, t)
    U = (u.flatten(2, 3) @ B.to(u.dtype).transpose(1, 2)).view(b, h, p, n)  # B (b, g, t, n)
    return U if S is None else s[:, -1].exp2()[..., None, None] * S + U


def window(seen, k, count):
    """Of rows (b, k-1+t, w) the k-1 inputs that end with each row's own token number count (b,)."""
    at = count[:, None] + torch.arange(k - 1, device=seen.device)
    return seen.gather(1, at[..., None].expand(-1, -1, seen.shape[2]))


class Read(NamedTuple):
    """What t tokens gave that were read on trial: all that `write` and the next window need."""

    seen: torch.Tensor  # (b, k-1+t, w)   the convolution's inputs
    x: torch.Tensor  # (b, t, h, p)
    dt: torch.Tensor  # (b, t, h)
    A: torch.Tensor  # (h,)
    B: torch.Tensor  # (b, t, g, n)


class State:
    """What a Mamba layer remembers: conv (b, k-1, w), its last inputs; S (b, h, p, n) in fp32.

    Keys and values can be cut off; S cannot be un-written. So while `trial` holds, tokens are read
    and not written: S stays as it is, and what they would write waits in `held` until `keep` knows
    which were right. For Super and 8 tokens that is 26 MB in 40 layers; an S per token would be 1.3
    GB.
    """

    holds = "conv", "S"

    def __init__(self, store=None):
        self.conv = self.S = self.held = None  # nothing read yet, that is zeros
        self.trial, self.store = False, store  # seam: quant/statecache.py's, how S is kept
        if store:
            self.holds = "conv", "S", "key"  # of its random numbers

    @property
    def key(self):
        return self.store.key

    @key.setter
    def key(self, key):
        self.store.key = key

    def remember(self, S):
        """Keeps S (fp32) for the next token, rounded if there is a store."""
        self.S = self.store(S).to(self.store.dtype) if self.store else S

    def keep(self, count):
        """Of the tokens read on trial, writes the first count (b,), as if the rest were padding."""
        seen, x, dt, A, B = self.held
        if count.shape != x.shape[:1]:
            raise ValueError(f"count {tuple(count.shape)} of {len(x)} rows")
        t, k = x.shape[1], seen.shape[1] - x.shape[1] + 1
        before = None if self.S is None else self.S.to(dt.dtype)
        self.remember(write(before, x, dt * real(count, t), A, B))
        self.conv = window(seen, k, count)
        self.held, self.trial = None, False


def real(count, t):
    """(b,) -> (b, t, 1): which of a row's t tokens are its own, and not padding on the right."""
    return (torch.arange(t, device=count.device) < count[:, None])[..., None]


class Mamba2(nn.Module):
    """The mixer: projection in, short convolution, recurrence, gated norm, projection out.

    One method for training, prefill, chunked prefill and sampling: with `cache` it goes on from
    there.
    """

    def __init__(
        self,
        d,
        heads,
        head_dim,
        groups,
        state,
        conv_kernel=4,
        chunk=128,
        eps=1e-5,
        conv_bias=True,
        bias=False,
    ):
        super().__init__()
        if heads % groups:
            raise ValueError(f"{heads} Mamba heads cannot be shared out over {groups} groups")
        e, w = heads * head_dim, heads * head_dim + 2 * groups * state
        self.head_dim, self.groups, self.chunk = head_dim, groups, chunk
        self.split = (e, w, heads)
        self.in_proj = nn.Linear(d, e + w + heads, bias)  # rows: z | x B C | raw
        self.conv1d = nn.Conv1d(w, w, conv_kernel, groups=w, bias=conv_bias)
        self.A_log = nn.Parameter(torch.linspace(1, 16, heads).log())
        self.D = nn.Parameter(torch.ones(heads))
        dt = torch.logspace(-3, -1, heads)
        self.dt_bias = nn.Parameter(dt.expm1().log())  # softplus makes dt of it
        self.norm = GatedNorm(e, groups, eps)
        self.out_proj = nn.Linear(e, d, bias)
        self.conv, self.scan = causal_conv, ssd_chunked  # seams: scale/parallel.py
        self.fast = False

    def forward(self, u, cache=None, count=None, docs=None):
        """u (b, t, d) -> (b, t, d). Of rows padded on the right, count (b,) tokens are real. docs:
        a pack.Docs, if rows hold several documents; not together with a cache.
        """
        t = u.shape[1]
        if self.fast and cache is not None and torch.is_grad_enabled():
            raise ValueError(
                "a cached call with fast=True has no gradient: put it under torch.no_grad()"
            )
        if count is not None and count.shape != u.shape[:1]:
            raise ValueError(f"count {tuple(count.shape)} of {len(u)} rows")
        e, w, h = self.split
        z, xBC, raw = self.in_proj(u).split(self.split, -1)
        taps = self.conv1d.weight, self.conv1d.bias
        if docs:
            xBC, together = docs.apart(xBC, self.conv1d.weight.shape[-1])
        xBC, seen = self.conv(xBC, *taps, cache and cache.conv, fast=self.fast)
        if docs:
            xBC = together(xBC)
        x, B, C = xBC.split([e, (w - e) // 2, (w - e) // 2], -1)
        x = x.unflatten(-1, (h, -1))  # (b, t, h, p)
        B, C = (v.unflatten(-1, (self.groups, -1)) for v in (B, C))  # (b, t, g, n)
        wide = torch.promote_types(raw.dtype, torch.float32)  # it decides decay: never bf16
        dt = F.softplus(raw.to(wide) + self.dt_bias)  # (b, t, h)
        if count is not None:
            dt = dt * real(count, t)  # padding: no fading, no writing
        A, D, skip = -self.A_log.to(wide).exp(), self.D, None
        if docs:  # D reads x as it is, before `restart` rescales it
            D, skip = None, self.D[:, None].to(x.dtype) * x
            x, dt = docs.restart(x, dt, A)
        before = None if cache is None or cache.S is None else cache.S.to(wide)
        args = x, dt, A, B, C, D, before
        if t == 1 and not self.fast:  # kernels/ssd.py knows one token itself
            y, S = ssd_recurrent(*args)
        else:
            y, S = self.scan(*args, chunk=self.chunk, fast=self.fast)
        if cache is not None and cache.trial:
            cache.held = Read(seen, x, dt, A, B)  # State.keep writes it, or a part
        elif cache is not None:
            k = self.conv1d.weight.shape[-1]
            cache.remember(S)
            cache.conv = seen[:, t:].clone() if count is None else window(seen, k, count)
        if docs:
            y = y + skip
        return self.out_proj(self.norm(y.flatten(2), z))


def inputs(t, h=8, p=16, g=2, n=16, dtype=torch.float64):
    """Random x, dt, A, B, C of one sequence, for main."""

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype)

    A = -torch.linspace(1, 8, h, dtype=dtype)
    return normal(1, t, h, p), F.softplus(normal(1, t, h) - 2), A, *normal(2, 1, t, g, n)


def main():
    """Prints what the file claims: three forms, one answer; and what each costs as text grows."""
    torch.set_num_threads(1)  # these sizes gain nothing from more, and a busy machine loses much
    torch.manual_seed(0)
    args = inputs(257)
    y, S = ssd_recurrent(*args)
    first, S1 = ssd_chunked(*(v if v.ndim == 1 else v[:, :100] for v in args), chunk=64)
    rest, S2 = ssd_chunked(*(v if v.ndim == 1 else v[:, 100:] for v in args), state=S1, chunk=64)
    print("257 tokens, 8 heads in 2 groups, fp64: largest difference from the recurrence")
    print(f"  mask form            {(ssd_masked(*args) - y).abs().max():.1e}")
    for q in (1, 16, 64, 128):
        print(f"  chunks of {q:<3}        {(ssd_chunked(*args, chunk=q)[0] - y).abs().max():.1e}")
    cut = torch.cat([first, rest], 1)
    print(f"  cut in two at 100    {(cut - y).abs().max():.1e}   state {(S2 - S).abs().max():.1e}")

    print("\nmilliseconds of one CPU core (fp32, 8 heads)")
    print(f"{'tokens':>8} {'recurrence':>12} {'mask':>10} {'chunks':>10}")
    for t in (64, 256, 1024, 4096):
        args = inputs(t, dtype=torch.float32)
        took = [milliseconds(f, *args) for f in (ssd_recurrent, ssd_masked, ssd_chunked)]
        print(f"{t:8} {took[0]:12.1f} {took[1]:10.1f} {took[2]:10.1f}")
    print("the recurrence and the chunks grow with t, the mask with t squared; the chunks keep the")
    print("matmuls and lose the square. What a sampler carries is 8*16*16 numbers at any length.")


def milliseconds(f, *args):
    """CPU time of a call, which other programs do not change: the mean of 0.1 s of calls."""
    f(*args)  # the first call is slower
    calls, start = 0, time.process_time()
    while time.process_time() - start < 0.1:
        f(*args)
        calls += 1
    return 1e3 * (time.process_time() - start) / calls


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
