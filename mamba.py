"""
Mamba-2: a linear recurrence that trains like attention and samples like an RNN.

Every head keeps a (p, n) matrix S. Each token first fades S by a_t, then writes its own p numbers
along B_t, then reads S along C_t:

    S_t = a_t S_{t-1} + dt_t x_t B_t^T     a_t = exp(dt_t A) in (0, 1)      A = -exp(A_log)
    y_t = S_t C_t + D x_t                  dt_t = softplus(raw_t + dt_bias)

The same numbers three ways; read them in this order, tests/test_mamba.py holds them together:

    ssd_recurrent    a python loop over the two lines above      t steps               definition and sampling
    ssd_masked       one attention-like (t, t) matrix per head   t^2 work              trains like attention
    ssd_chunked      that matrix inside chunks, S between them   t*c work, t/c steps   training and prefill

Letters   b batch  t time  d model width  h heads  p head dim  g groups (heads sharing B and C)  n state
          c chunks  q, r positions in a chunk  e = h*p inner width  w = e + 2*g*n convolved channels  k taps
Super     h=128 p=64 g=8 n=128, chunks of 128: S is 4 MiB in fp32 per layer and sequence, of
          whatever length
Not here  speed on a GPU: kernels/ssd.py, conv.py, norm.py, same signatures, taken where fast=True
Sources   arXiv:2405.21060 sections 5-7 (the two forms, block decomposition); sizes: the released
          config.json
Departs   1. from Mamba-2's defaults, as the release does: the norm comes after the gate, in g
          groups, not one
          2. from transformers: dt is never clamped (neither was it in training)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

LOG2E = 1 / math.log(2)  # exp(x) = 2^(x * LOG2E)


def ssd_recurrent(x, dt, A, B, C, D=None, state=None):
    """The definition, one token at a time. Also the sampling step: t = 1, state in, state out.

    x (b, t, h, p)  dt (b, t, h), after softplus  A (h,), < 0  B, C (b, t, g, n)  D (h,)  state (b, h, p, n)
    Returns y (b, t, h, p) and the state after the last token.
    """
    b, t, h, p = x.shape
    B, C = (
        v.repeat_interleave(h // v.shape[2], 2) for v in (B, C)
    )  # (b, t, h, n)   Super: h/g = 16
    a = (dt * A).exp()[..., None, None]  # (b, t, h, 1, 1)
    u = (x * dt[..., None])[..., None]  # (b, t, h, p, 1)
    B, C = (v[..., None, :].to(u.dtype) for v in (B, C))  # (b, t, h, 1, n)
    S, y = u.new_zeros(b, h, p, B.shape[-1]) if state is None else state, []
    for i in range(t):
        S = torch.addcmul(a[:, i] * S, u[:, i], B[:, i])  # fade, then write u B^T
        y.append((S * C[:, i]).sum(-1))  # (b, h, p)   read
    y = torch.stack(y, 1).to(x.dtype)
    return (y if D is None else y + D[:, None].to(x.dtype) * x), S


def ssd_masked(x, dt, A, B, C, D=None):
    """The recurrence unrolled: y = (decay * C B^T) (dt x), causal attention whose mask fades, not
    cuts.

    Unrolling S_q gives y_q = sum over r <= q of (a_q a_{q-1} ... a_{r+1}) (C_q . B_r) dt_r x_r: a
    score C_q . B_r, no softmax. With every a = 1 the mask is a lower triangle of ones, and this
    linear attention.
    """
    h = x.shape[2]
    B, C = (v.repeat_interleave(h // v.shape[2], 2) for v in (B, C))  # (b, t, h, n)
    score, mask = torch.einsum("bqhn,brhn->bhqr", C, B), decay((dt * A * LOG2E).mT).to(x.dtype)
    y = torch.einsum("bhqr,brhp->bqhp", score * mask, (x * dt[..., None]).to(x.dtype))
    return y if D is None else y + D[:, None].to(x.dtype) * x


def decay(bits):
    """(..., q) base-2 logs of a -> (..., q, r): a_q ... a_{r+1}, what is left at q of a write at r;
    0 above.

    A power of a difference of running sums, never a quotient of products: those would underflow in
    one chunk. The upper triangle is masked in the exponent: it would overflow there and make a
    zero's gradient NaN.
    """
    s = bits.cumsum(-1)
    upper = torch.full((s.shape[-1],) * 2, -math.inf, dtype=s.dtype, device=s.device).triu(1)
    return (s[..., :, None] - s[..., None, :]).add_(upper).exp2_()  # on a CPU far faster than exp


def ssd_chunked(x, dt, A, B, C, D=None, state=None, chunk=128, fast=False):
    """The mask form inside chunks of q tokens, the recurrence between them. Shapes as in
    ssd_recurrent.

    Every step is one batched matmul per head. The ragged end is padded with dt = 0: such tokens
    neither fade nor write. Decays and S are in the precision of dt (fp32 or more), the operands of
    matmuls in that of x.
    """
    if fast:
        from kernels.ssd import ssd

        return ssd(x, dt, A, B, C, D, state, chunk)
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    q = min(chunk, t)

    def cut(v):  # (b, t, h, ...) -> (b, c, h, q, ...)
        v = F.pad(v, (0, 0) * (v.ndim - 2) + (0, -t % q))
        return v.unflatten(1, (-1, q)).transpose(2, 3).contiguous()

    def per_head(v, w):  # (b,c,g,q,n) (b,c,h,q) -> (b,c,h,q,n)   v * w
        return (v[:, :, :, None] * w.unflatten(2, (g, -1))[..., None]).flatten(2, 3).to(x.dtype)

    u = cut((x * dt[..., None]).to(x.dtype))  # (b, c, h, q, p)   what is written
    a, B, C = cut(dt * (A * LOG2E)), cut(B), cut(C)  # (b, c, h, q)   base-2 logs; (b, c, g, q, n)
    s = a.cumsum(-1)  # (b, c, h, q)   log decay since the chunk began

    # 1. Inside a chunk: attention with a fading mask. The scores are shared by the heads of a
    # group.
    mask = decay(a).unflatten(2, (g, -1)) * (C @ B.mT)[:, :, :, None]  # (b, c, g, h/g, q, r)
    y = mask.to(x.dtype).flatten(2, 3) @ u  # (b, c, h, q, p)

    # 2. What each chunk writes into S, faded to the chunk's end: sum over r of 2^(s_last - s_r) u_r
    # B_r^T.
    U = u.mT @ per_head(B, (s[..., -1:] - s).exp2())  # (b, c, h, p, n)

    # 3. Between chunks: the recurrence again, one step a chunk.
    S = U.new_zeros(b, h, p, n, dtype=dt.dtype) if state is None else state
    entering = []  # S before each chunk
    for write, fade in zip(U.to(dt.dtype).unbind(1), s[..., -1].exp2()[..., None, None].unbind(1)):
        entering.append(S)
        S = fade * S + write

    # 4. What the tokens of a chunk read from before it: 2^(s_q) S C_q.
    y += per_head(C, s.exp2()) @ torch.stack(entering, 1).to(x.dtype).mT

    y = y.transpose(2, 3).flatten(1, 2)[:, :t].to(x.dtype)  # (b, t, h, p)
    return (y if D is None else torch.addcmul(y, D[:, None].to(x.dtype), x)), S


class DepthwiseConv(torch.autograd.Function):
    """y_t = bias + sum of w_i x_{t+i}, each channel by itself: x (b, k-1+t, w), weight (w, 1, k) ->
    (b, t, w)

    Torch's convolution forwards; backward is written out: on a CPU torch's own takes several times
    as long.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)  # a 1 x t image: 10x as fast as conv1d on a CPU
        return F.conv2d(x.mT[:, :, None], weight[:, :, None], bias, groups=x.shape[2])[:, :, 0].mT

    @staticmethod
    def backward(ctx, dy):
        (x, weight), t = ctx.saved_tensors, dy.shape[1]
        k = weight.shape[-1]
        padded = F.pad(dy, (0, 0, k - 1, k - 1))
        dx = DepthwiseConv.apply(padded, weight.flip(-1), None)  # sum of w_i dy_{s-i}
        dw = torch.stack(
            [(x[:, i : i + t] * dy).sum((0, 1)) for i in range(k)], -1
        )  # sum of x_{t+i} dy_t
        return dx, dw[:, None], dy.sum((0, 1)) if ctx.needs_input_grad[2] else None


def causal_conv(x, weight, bias, window=None, fast=False):
    """Every channel filters its own last k numbers, then SiLU. So x, B and C get a look at k-1
    tokens before.

    x (b, t, w)   weight (w, 1, k)   bias (w,) or None   window (b, k-1, w): the inputs just before x, or None
    Returns y (b, t, w) and the padded input (b, k-1+t, w), from which the next window is cut.
    """
    if fast:
        from kernels.conv import conv

        return conv(x, weight, bias, window)
    if window is None:
        window = x.new_zeros(x.shape[0], weight.shape[-1] - 1, x.shape[2])  # zeros at the start
    x = torch.cat([window.to(x.dtype), x], 1)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if x.shape[1] == weight.shape[-1]:  # one new token: one sum over the taps
        y = (x * weight[:, 0].T.contiguous()).sum(1, keepdim=True)
        y = y if bias is None else y + bias
    else:
        y = DepthwiseConv.apply(x, weight, bias)
    return F.silu(y), x


class GatedNorm(nn.Module):
    """Gate first, then RMSNorm over each group of e/g channels: norm(y * silu(z)) * weight. Inside,
    fp32.

    Per group, so that a group never needs another one's numbers: groups can live on different GPUs,
    exactly.
    """

    def __init__(self, width, groups, eps=1e-5):
        super().__init__()
        self.weight, self.groups, self.eps, self.fast = (
            nn.Parameter(torch.ones(width)),
            groups,
            eps,
            False,
        )

    def forward(self, y, z):  # (b, t, e) twice
        if self.fast:
            from kernels.norm import gated_norm

            return gated_norm(y, z, self.weight, self.groups, self.eps)
        wide = torch.promote_types(y.dtype, torch.float32)
        v = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.groups, -1))  # (b, t, g, e/g)
        v = F.rms_norm(v, v.shape[-1:], eps=self.eps).flatten(2)
        return (v * self.weight).to(y.dtype)


def write(S, x, dt, A, B):
    """S after t more tokens and nothing else: every write fades to the end, one matmul. As
    ssd_recurrent's.
    """
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    s = (dt * (A * LOG2E)).cumsum(1)  # (b, t, h)   log decay since the first token
    left = dt * (s[:, -1:] - s).exp2()  # (b, t, h)   what the end still has of each write
    u = (x * left[..., None]).unflatten(2, (g, -1)).permute(0, 2, 3, 4, 1)  # (b, g, h/g, p, t)
    U = (u.flatten(2, 3) @ B.to(u.dtype).transpose(1, 2)).view(b, h, p, n)  # B (b, g, t, n)
    return U if S is None else s[:, -1].exp2()[..., None, None] * S + U


def window(seen, k, count):
    """Of rows (b, k-1+t, w) the k-1 inputs that end with each row's own token number count (b,)."""
    at = count[:, None] + torch.arange(k - 1, device=seen.device)
    return seen.take_along_dim(at[..., None], 1)


class State:
    """What a Mamba layer remembers: conv (b, k-1, w), its last inputs; S (b, h, p, n) in fp32.

    Keys and values can be cut off; S cannot be un-written. So while `trial` holds, tokens are read
    and not written: S stays as it is, and what they would write waits in `held` until `keep` knows
    which were right. For Super and 8 tokens that is 26 MB in 40 layers; an S per token would be 1.3
    GB.
    """

    holds = "conv", "S"

    def __init__(self):
        self.conv = self.S = self.held = None  # nothing read yet, that is zeros
        self.trial = False

    def keep(self, count):
        """Of the tokens read on trial, writes the first count (b,). The rest is padding, found out
        late.
        """
        (seen, x, dt, A, B), self.held, self.trial = self.held, None, False
        t, k = x.shape[1], seen.shape[1] - x.shape[1] + 1
        dt = dt * (torch.arange(t, device=x.device) < count[:, None])[..., None]
        self.S, self.conv = write(self.S, x, dt, A, B), window(seen, k, count)


class Mamba2(nn.Module):
    """The mixer: one projection in, a short convolution, the recurrence, the gated norm, one
    projection out.

    One method for training, prefill, chunked prefill and sampling: with `cache` it goes on from
    there.
    """

    def __init__(
        self, d, heads, head_dim, groups, state, conv_kernel=4, chunk=128, eps=1e-5, conv_bias=True
    ):
        super().__init__()
        if heads % groups:
            raise ValueError(f"{heads} Mamba heads cannot be shared out over {groups} groups")
        e, w = heads * head_dim, heads * head_dim + 2 * groups * state
        self.head_dim, self.groups, self.chunk, self.fast = head_dim, groups, chunk, False
        self.split = (e, w, heads)
        self.in_proj = nn.Linear(d, e + w + heads, bias=False)  # rows: z | x B C | dt
        self.conv1d = nn.Conv1d(w, w, conv_kernel, groups=w, bias=conv_bias)
        self.A_log = nn.Parameter(torch.linspace(1, 16, heads).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(
            torch.logspace(-3, -1, heads).expm1().log()
        )  # softplus: 0.001 ... 0.1
        self.norm = GatedNorm(e, groups, eps)
        self.out_proj = nn.Linear(e, d, bias=False)
        self.conv, self.scan = (
            causal_conv,
            ssd_chunked,
        )  # seams: parallel.py's, for slices of a sequence

    def forward(self, u, cache=None, count=None):
        """u (b, t, d) -> (b, t, d). count (b,): of rows padded on the right, how many tokens are
        real.
        """
        t = u.shape[1]
        if self.fast and cache is not None and torch.is_grad_enabled():
            raise ValueError(
                "a cached call with fast=True has no gradient: put it under torch.no_grad()"
            )
        e, w, h = self.split
        z, xBC, dt = self.in_proj(u).split(self.split, -1)
        xBC, seen = self.conv(
            xBC, self.conv1d.weight, self.conv1d.bias, cache and cache.conv, fast=self.fast
        )
        x, B, C = xBC.split([e, (w - e) // 2, (w - e) // 2], -1)
        x = x.unflatten(-1, (h, -1))  # (b, t, h, p)
        B, C = (v.unflatten(-1, (self.groups, -1)) for v in (B, C))  # (b, t, g, n)
        wide = torch.promote_types(dt.dtype, torch.float32)  # it decides decay: never bf16
        dt = F.softplus(dt.to(wide) + self.dt_bias)  # (b, t, h)
        if count is not None:  # padding: no fading, no writing
            dt = dt * (torch.arange(t, device=u.device) < count[:, None])[..., None]
        args = x, dt, -self.A_log.to(wide).exp(), B, C, self.D, cache and cache.S
        one = t == 1 and not self.fast  # kernels/ssd.py knows one token itself
        y, S = ssd_recurrent(*args) if one else self.scan(*args, chunk=self.chunk, fast=self.fast)
        if cache is not None and cache.trial:
            cache.held = seen, x, dt, args[2], B  # State.keep writes it, or a part
        elif cache is not None:
            cache.S, k = S, self.conv1d.weight.shape[-1]  # (b, k-1, w)   no view of all
            cache.conv = seen[:, t:].clone() if count is None else window(seen, k, count)
        return self.out_proj(self.norm(y.flatten(2), z))


def main():
    """Prints what the file claims: three forms, one answer; and what each costs as the text grows."""
    import time

    torch.manual_seed(0)

    def inputs(t, h=8, p=16, g=2, n=16, dtype=torch.float64):
        r, A = lambda *s: torch.randn(*s, dtype=dtype), -torch.linspace(1, 8, h, dtype=dtype)
        return r(1, t, h, p), F.softplus(r(1, t, h) - 2), A, r(1, t, g, n), r(1, t, g, n)

    args = inputs(257)
    y, S = ssd_recurrent(*args)
    first, S1 = ssd_chunked(*(v if v.ndim == 1 else v[:, :100] for v in args), chunk=64)
    rest, S2 = ssd_chunked(*(v if v.ndim == 1 else v[:, 100:] for v in args), state=S1, chunk=64)
    print("257 tokens, 8 heads in 2 groups, fp64: largest difference from the recurrence")
    print(f"  mask form            {(ssd_masked(*args) - y).abs().max():.1e}")
    for c in (1, 16, 64, 128):
        print(f"  chunks of {c:<3}        {(ssd_chunked(*args, chunk=c)[0] - y).abs().max():.1e}")
    cut = torch.cat([first, rest], 1)
    print(f"  cut in two at 100    {(cut - y).abs().max():.1e}   state {(S2 - S).abs().max():.1e}")

    print(
        "\nmilliseconds on this CPU (fp32, 8 heads); "
        "the state a sampler carries has 8*16*16 numbers at any length"
    )
    print(f"{'tokens':>8} {'recurrence':>12} {'mask':>10} {'chunks':>10}")
    for t in (64, 256, 1024, 4096):
        args, took = inputs(t, dtype=torch.float32), []
        for f in (ssd_recurrent, ssd_masked, lambda *a: ssd_chunked(*a, chunk=64)):
            times = []
            for _ in range(3):
                start = time.perf_counter()
                f(*args)
                times.append(time.perf_counter() - start)
            took.append(1e3 * min(times))
        print(f"{t:8} {took[0]:12.1f} {took[1]:10.1f} {took[2]:10.1f}")
    print(
        "the recurrence and the chunks grow with t, the mask with t squared; "
        "the chunks keep the matmuls and lose the square"
    )


if __name__ == "__main__":
    main()
