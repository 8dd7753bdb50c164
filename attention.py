"""
Attention as Nemotron 3 has it: few layers of it, few key and value heads, and no positions at all.

    y_i = sum over j <= i of  softmax_j(q_i . k_j / sqrt(e))  v_j          for each query head

In Super 16 query heads share one k and one v. Without positions (NoPE) a query cannot tell in which
order the keys came: the Mamba layers in front of it have written that into them. So nothing has to
be stretched when the text grows from 4 thousand tokens to a million.

A million tokens are read in pieces. A piece attends to the keys before it, all of them, and to its
own, a triangle: two plain products with a softmax each, merged by the sums below them
(attend_in_two), never a mask of t x L numbers.

Nemotron 3 never uses them, but a stack of attention alone needs positions, and a fair baseline has
them: `rotate` turns the pair (x_i, x_(i + e/2)) of every query and key at position n by the angle
n base^(-2i/e), so that q . k depends on how far apart the two stand.

Letters   b batch  t new tokens  L all tokens  h query heads  e head dim
Super     h=32 e=128, 2 key and value heads, in 8 layers of 88: 1,024 bytes a token and layer (bf16)
Not here  kernels: torch's own are this idea at full speed
          slices of a sequence on many ranks: scale/parallel.py
Sources   arXiv:2604.12374 section 2.1; arXiv:2305.13245 (shared heads), 2305.19466 (no positions),
          2104.09864 (rotary ones)
"""

import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class KV:
    """What an attention layer remembers: k and v (b, kv heads, L, e), and each row's length (b,).

    Rows may have read different amounts. The buffer doubles when it is full; what lies beyond a
    row's own length is never looked at, so `drop`ping tokens from the end moves no data. With
    scales (of keys, of values) the buffers hold E4M3 codes, half the bytes of bf16, and `append`
    answers with their numbers.
    """

    holds = "k", "v", "length"

    def __init__(self):
        self.k = self.v = self.length = None
        self.used = 0  # the longest row's length
        self.even = True  # whether all rows are as long
        self.fixed = False

    def fix(self, room):
        """From here on: room for `room` tokens, and tensors say where each row writes.

        So one step is like the next in all but numbers, and can be compiled once.
        """
        self.k, self.v = (F.pad(x, (0, 0, 0, room - x.shape[2])) for x in (self.k, self.v))
        self.used, self.even, self.fixed = room, False, True

    def drop(self, n):
        """Forgets the last n tokens of every row; n is a number, or (b,) when rows differ."""
        self.length = self.length - n
        if self.fixed:
            return
        left = [self.used - n] if isinstance(n, int) else self.length.tolist() or [0]
        if not 0 <= min(left) <= max(left) <= self.used:
            raise ValueError(f"{n} tokens fewer than the {self.used} of a row leave {left}")
        self.used = max(left)
        self.even = self.even if isinstance(n, int) else min(left) == self.used

    def first(self, count=None):
        """The position of the next token: a number, or (b,) when rows may differ."""
        if self.length is None:
            return 0
        return self.used if self.even and count is None else self.length

    def append(self, k, v, count=None, scales=None):
        """Adds t tokens a row, count (b,) of them real -> all keys, all values, where t begins."""
        if scales:
            dtype, (k, v) = k.dtype, (codes(x, s) for x, s in zip((k, v), scales))
        b, heads, t, e = k.shape
        if self.k is None:
            self.k, self.v = k.new_zeros(b, heads, 0, e), v.new_zeros(b, heads, 0, e)
            self.length = torch.zeros(b, dtype=torch.long, device=k.device)
        if not self.fixed and self.used + t > self.k.shape[2]:
            more = max(self.used, t, 64)
            self.k, self.v = (F.pad(old, (0, 0, 0, more)) for old in (self.k, self.v))
        first = self.first(count)
        self.even = self.even and count is None
        if self.even:
            self.k[:, :, first : first + t] = k
            self.v[:, :, first : first + t] = v
        else:
            at = (first[:, None] + torch.arange(t, device=k.device))[:, None, :, None]
            self.k.scatter_(2, at.expand_as(k), k)
            self.v.scatter_(2, at.expand_as(v), v)
        self.used += 0 if self.fixed else t
        self.length = self.length + (t if count is None else count)
        k, v = self.k[:, :, : self.used], self.v[:, :, : self.used]
        if scales:
            k, v = (numbers(x, s, dtype) for x, s in zip((k, v), scales))
        return k, v, first


def codes(x, scale):
    """x -> its E4M3 codes under a scale, as bytes: more of what can be done with bytes is done."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def numbers(codes, scale, dtype):
    """Bytes of `codes` -> the numbers they stand for."""
    return codes.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)


def rotate(x, first, base):
    """Rotary positions: x (b, h, t, e) of tokens at first, first + 1, ... -> the same, turned; e is
    even. first: a number, or (b,) when rows differ.
    """
    t, e = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    at = torch.arange(t, device=x.device)
    at = at + (first if isinstance(first, int) else first[:, None, None])  # (t,) or (b, 1, t)
    speed = base ** (-torch.arange(0, e, 2, device=x.device, dtype=wide) / e)  # (e/2,)
    angle = at[..., None] * speed  # (t, e/2) or (b, 1, t, e/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    real, imaginary = x.chunk(2, -1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


def fused(q, *args, one=False, **how):
    """torch's own attention; of one token on a GPU not cuDNN's, which plans anew for every number
    of keys.
    """
    if not (q.is_cuda and one):
        return F.scaled_dot_product_attention(q, *args, **how)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, *args, **how)


def attend(q, k, v, first):
    """Causal attention of new queries over all keys: query i of a row stands at first + i.

    q (b, h, t, e)   k, v (b, kv heads, L, e)   -> (b, h, t, e)
    first: a number, or (b,) when rows differ
    """
    (b, h, t, _), (rows, kv, L, _) = q.shape, k.shape
    if not kv or h % kv:  # torch's CPU kernel would end the process
        raise ValueError(f"{h} heads of queries cannot share {kv} heads of keys")
    even = isinstance(first, int)
    if rows != b or v.shape[:3] != k.shape[:3] or even and not 0 <= first <= L - t:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"q, k and v are {shapes}, and the first query stands at {first}")
    if even:  # nobody sees what comes later
        L = first + t
        k, v = k[:, :, :L], v[:, :, :L]
    if t == 1 and h > kv:  # queries of one head of keys, as if they were tokens
        return attend_to_shared(q, k, v, first)
    if even and (t == 1 or first == 0):  # one sees all, t a triangle
        return fused(q, k, v, is_causal=t > 1, enable_gqa=True, one=t == 1)
    if even and q.device.type == "cpu" and not any(x.requires_grad for x in (q, k, v)):
        return attend_in_two(q, k, v, first)
    out, rows = [], max(1, 2**22 // (b * L))  # the mask stays small
    for i in range(0, t, rows):
        n = min(rows, t - i)
        end = first + i + n if even else L
        at = torch.arange(i, i + n, device=q.device)
        at = at + (first if even else first[:, None, None])  # (n,) or (b, 1, n)
        mask = torch.arange(end, device=q.device) <= at[..., None]  # (n, end) or (b, 1, n, end)
        seen = k[:, :, :end], v[:, :, :end]
        out.append(fused(q[:, :, i : i + n], *seen, mask, enable_gqa=True, one=t == 1))
    return torch.cat(out, 2)


def attend_to_shared(q, k, v, first):
    """`attend` of one new query. Those h/kv heads that share keys ask at once, as that many tokens
    would: then there are as many heads of queries as of keys, so that torch's every kernel takes
    them (with a mask only one that would otherwise copy the keys for each head).
    """
    mask = None
    if not isinstance(first, int):
        mask = (torch.arange(k.shape[2], device=q.device) <= first[:, None])[:, None, None]
    y = fused(q.unflatten(1, (k.shape[1], -1)).squeeze(3), k, v, mask, one=True)  # (b, kv, h/kv, e)
    return y.flatten(1, 2)[:, :, None]


def attend_in_two(q, k, v, first):
    """`attend` for rows of one length, without a mask: its cost is that of the products alone.

    Every query sees all of the keys before the queries, and a triangle of the queries' own. A
    softmax over both is a mean of the two, weighted by the sums of exponentials below each, whose
    logs torch's CPU kernel gives too. It has no gradient of them.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # -> (y, log of the sum)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # it reads rows
    past = flash(q, k[:, :, :first], v[:, :, :first], 0.0, False)
    own = flash(q, k[:, :, first:], v[:, :, first:], 0.0, True)
    both = torch.logaddexp(past[1], own[1])  # (b, h, t)
    return sum(y * (log - both).exp()[..., None].to(y.dtype) for y, log in (past, own))


class Attention(nn.Module):
    """Grouped-query causal attention: many query heads share few of k and v. rotary_base: None, as
    Nemotron 3 has no positions, or that of a baseline's rotary ones.
    """

    def __init__(self, d, heads, kv_heads, head_dim, rotary_base=None):
        super().__init__()
        if rotary_base and head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of numbers: head_dim={head_dim} is odd")
        self.head_dim, self.rotary_base = head_dim, rotary_base
        self.q_proj = nn.Linear(d, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, d, bias=False)
        self.attend = attend  # seam: scale/parallel.py
        self.round_cache = False  # without a cache, too, as serving's would round: quant/packed.py

    def forward(self, u, cache=None, count=None, docs=None):
        """u (b, t, d) -> (b, t, d). docs: a pack.Docs, if rows hold several documents; not together
        with a cache.
        """
        rows = u.reshape(1, -1, u.shape[-1]) if docs else u  # documents: all behind one another
        q, k, v = (
            proj(rows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (b, h or kv, t, e)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scales = self.cache_scales()
        if scales and cache is None and self.round_cache:
            k, v = (numbers(codes(x, s), s, x.dtype) for x, s in zip((k, v), scales))
        if docs:
            each = zip(*(x.split(docs.lengths, 2) for x in (q, k, v)))
            y = torch.cat([self.attend(*self.turn(q, k, 0), v, 0) for q, k, v in each], 2)
        else:
            first = 0 if cache is None else cache.first(count)
            q, k = self.turn(q, k, first)
            if cache is not None:
                k, v, first = cache.append(k, v, count, scales)
            y = self.attend(q, k, v, first)
        return self.o_proj(y.transpose(1, 2).flatten(2)).view_as(u)

    def turn(self, q, k, first):
        """q and k with their places written into them, if this model does that at all."""
        if self.rotary_base:
            q, k = (rotate(x, first, self.rotary_base) for x in (q, k))
        return q, k

    def cache_scales(self):
        """Those of a checkpoint whose keys and values are kept in FP8: k_scale, v_scale; else
        None.
        """
        k, v = getattr(self.k_proj, "k_scale", None), getattr(self.v_proj, "v_scale", None)
        return None if k is None or v is None else (k, v)


@torch.no_grad()
def main():
    """Prints what the file claims: cut anywhere, the same; blind to order; no mask."""
    torch.set_num_threads(1)  # these sizes gain nothing from more, and a busy machine loses much
    torch.manual_seed(0)
    layer = Attention(256, 16, 1, 16).double()
    x = torch.randn(1, 300, 256, dtype=torch.float64)
    y, cache = layer(x), KV()
    pieces = torch.cat([layer(p, cache) for p in x.split([1, 130, 60, 1, 108], 1)], 1)
    gap = (pieces - y).abs().max()
    print(f"300 tokens read as 1 + 130 + 60 + 1 + 108: largest difference {gap:.1e}")
    order = torch.cat([torch.randperm(299), torch.tensor([299])])
    moved = (layer(x[:, order]) - y)[:, -1].abs().max()
    print(f"the 299 tokens before the last shuffled: its output moves by {moved:.1e}")

    print("\n1,024 queries at the end of L keys, 16 heads of 16 numbers")
    print(f"{'':8} {'ms of one CPU core':>19} {'key and value cache':>26}")
    print(f"{'L':>8} {'in two':>9} {'one mask':>9} {'1 head':>15} {'16 heads':>10}")
    q = torch.randn(1, 16, 1024, 16)
    for L in (2048, 4096, 16384):
        k, v = torch.randn(2, 1, 1, L, 16)
        took = []
        for first in (L - 1024, torch.tensor([L - 1024])):  # rows that may differ take the mask
            start = time.process_time()
            attend(q, k, v, first)
            took.append(1e3 * (time.process_time() - start))
        one = 8 * L * 16 / 1e6  # megabytes, in fp32
        print(f"{L:8,} {took[0]:9.1f} {took[1]:9.1f} {one:12.1f} MB {16 * one:7.1f} MB")


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
