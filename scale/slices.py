"""
Slices of a sequence: a rank has t of its T tokens, its neighbours have the rest, and every layer's
numbers are those of the whole.

    Mamba       passes on the last k-1 inputs of its convolution, and S: (S, fade) pairs compose, so
                log2(ranks) steps do
    attention   gathers its two heads of keys and values; late queries, which see more of them,
                change places with a mirror rank's

S is linear in where it starts. With S_r what slice r writes starting from 0, and f_r its fade, the
state that reaches slice r is  S_{r-1} + f_{r-1} (S_{r-2} + f_{r-2} (...)): a prefix scan over the
ranks, by doubling; what comes of it is added to the outputs,
y_t = y_t + exp(sum of dt A up to t) S C_t.

Letters   b batch  T time  t its slice on one rank  h heads  p head dim  g groups  n state
Not here  who puts these in the layers' places, and the experts' tokens: parallel.py
Sources   PyTorch's functional collectives, whose gradient is the way back
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import mamba
from attention import attend

# The second is its name in torch 2.11.
all_gather = (
    getattr(collectives, "all_gather_single_autograd", None)
    or collectives.all_gather_tensor_autograd
)


def swap_rows(x, give, take, group):
    """give[r] rows of x go to rank r, take[r] rows come from it. Its gradient is the way back."""
    return collectives.all_to_all_single_autograd(x.contiguous(), take, give, group)


def lower_right(q, k, v, start, end):
    """Attention of queries start ... end - 1 over keys 0 ... end - 1."""
    k, v = k[:, :, :end], v[:, :, :end]
    if q.device.type == "cuda":  # a flash kernel knows this bias without being given a mask
        causal = causal_lower_right(end - start, end)
        return F.scaled_dot_product_attention(q, k, v, causal, enable_gqa=True)
    return attend(q, k, v, start)


class Slice:
    """What crosses the edges of the slices. Every rank takes part in everything, or the others
    would wait.
    """

    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def shift(self, x, k):
        """x of rank r - k, zeros where there is none: all pass theirs on, the last ones to the
        first, who do not want it.
        """
        give, take = [0] * self.size, [0] * self.size
        give[(self.rank + k) % self.size] = take[(self.rank - k) % self.size] = len(x)
        return swap_rows(x, give, take, self.group) * float(self.rank >= k)

    def conv(self, x, weight, bias, window=None, **how):
        return mamba.causal_conv(
            x, weight, bias, self.shift(x[:, 1 - weight.shape[-1] :], 1), **how
        )

    def scan(self, x, dt, A, B, C, D=None, state=None, **how):
        y, S = mamba.ssd_chunked(x, dt, A, B, C, D, **how)  # as if nothing came before
        left = (dt * A).cumsum(1).exp()  # (b, t, h)   what is left of it
        fade, k = left[:, -1, :, None, None], 1  # (b, h, 1, 1)
        while k < self.size:  # k slices are in S now, then 2k
            S, fade, k = S + fade * self.shift(S, k), fade * self.shift(fade, k), 2 * k
        S = self.shift(S, 1).unflatten(1, (B.shape[2], -1))  # (b, g, h/g, p, n)   reaches me
        late = torch.einsum("btgn,bgrpn->btgrp", C.to(S.dtype), S).flatten(2, 3) * left[..., None]
        return y + late.to(y.dtype), S  # (b, t, h, p)

    def attend(self, q, k, v, first):
        """Later queries see more keys. So late halves are attended by the mirror rank: equal work
        for all.
        """
        t, n, mirror = q.shape[2], self.size, self.size - 1 - self.rank

        def gather(x):  # (b, kv, t, e) -> (b, kv, T, e)
            slices = all_gather(x.reshape(1, -1), 0, self.group).view(n, *x.shape)
            return slices.permute(1, 2, 0, 3, 4).flatten(2, 3)

        def trade(x):
            rows = [len(x) if r == mirror else 0 for r in range(n)]
            return swap_rows(x, rows, rows, self.group)

        k, v, half = gather(k), gather(v), t // 2
        early = lower_right(q[:, :, :half], k, v, self.rank * t, self.rank * t + half)
        late = lower_right(trade(q[:, :, half:]), k, v, mirror * t + half, (mirror + 1) * t)
        return torch.cat([early, trade(late)], 2)

    def numbers(self, b, t, device):
        """Which rows of the whole piece my b t rows are, where four bits ask."""
        first = torch.arange(b, device=device) * t * self.size + self.rank * t
        return (first[:, None] + torch.arange(t, device=device)).flatten()

    def largest(self, amax):
        """That of all slices."""
        amax = amax.clone()
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
        return amax

    def whole_sequence(self, count, t):
        """Counts of whole sequences: a slice's share times these is its part of the balance
        loss.
        """
        count = count.clone()
        dist.all_reduce(count, group=self.group)
        return count, t * self.size
