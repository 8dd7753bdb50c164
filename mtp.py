"""
Multi-token prediction: one extra block, used again and again, that looks one token further each time.

The backbone's normalised hidden state h_t predicts token t+1. Tell the block what token t+1 turned out to be,
and it makes a state that predicts token t+2; tell it that one, and it predicts t+3. With E the embeddings:

    v = W_eh [ norm_e(E[token_{t+k}]) ; norm_h(h^(k-1)_t) ]   embedding first, hidden second; h^(0) = backbone
    v = v + Attention(norm(v));  v = v + LatentMoE(norm(v))   the letters of the pattern `*E`
    h^(k)_t = final_norm(v)                                   head(h^(k)_t) predicts token_{t+k+1}

Head and E are the backbone's own. As a training signal it adds 0.3/K times the loss of each of K depths. As a
built-in drafter it proposes the next tokens for almost nothing. The weights are the same at every depth, so
a block trained at K = 2 can draft further.

        position t            0        1        2        3        4
        h^(0) has read        T        Th       The      The_     The_c
        loss:    target       h        e        _        c        a
        depth 1: told         h        e        _        c        a
                 target       e        _        c        a        -      "-" masked: rolled past the end
        depth 2: told         e        _        c        a        -
                 target       _        c        a        -        -

Letters   b batch  t time  d model width  k depth, 1..K
Super     pattern *E, one stored block (2.9 G parameters, its own 512 experts), K = 2
Not here  what a block is: `make_block` comes from the caller, so this file teaches only what is around it
Sources   arXiv:2604.12374 section 2.1.2; arXiv:2412.19437 section 2.2; names and order [e ; h]: the release
Departs   from DeepSeek-V3's text, which writes [h ; e] and gives every depth its own weights
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn


class MTP(nn.Module):
    """`blocks` stored copies of `pattern`, trained at `depths` depths; depth k uses block min(k, blocks).

    make_block(letter) -> a module with x -> x + mixer(norm(x)). Names are the released ones: layers.0 and
    layers.1 are the letters of the pattern, not depths.
    """
    def __init__(self, make_block, d, pattern="*E", blocks=1, depths=2, eps=1e-5):
        super().__init__()
        self.depths, self.size = depths, len(pattern)
        self.layers = nn.ModuleList(make_block(letter) for _ in range(blocks) for letter in pattern)
        for first in self.layers[::self.size]:
            first.enorm, first.hnorm = nn.RMSNorm(d, eps), nn.RMSNorm(d, eps)
            first.eh_proj = nn.Linear(2 * d, d, bias=False)
        for last in self.layers[self.size - 1::self.size]:
            last.final_layernorm = nn.RMSNorm(d, eps)

    def forward(self, h, e, k=1, cache=None, count=None):
        """One depth: h^(k-1) and the embedding of token t+k, both (b, t, d) -> h^(k) (b, t, d)."""
        start = min((k - 1) * self.size, len(self.layers) - self.size)
        block = self.layers[start:start + self.size]
        x = block[0].eh_proj(torch.cat([block[0].enorm(e), block[0].hnorm(h)], -1))
        for i, layer in enumerate(block):
            x = layer(x, cache and cache[start + i], count)
        return block[-1].final_layernorm(x)


def roll(x):
    """Shift left by one in time; the vacated last position is 0 (for a mask: masked).   (b, t) -> (b, t)"""
    return F.pad(x[:, 1:], (0, 1))


def nll(logits, targets, mask):
    """Negative log-likelihood in nats, summed where mask holds.   (b, t, v) (b, t) (b, t) -> scalar, fp32"""
    each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (each * mask.flatten()).sum()


def linear_nll(h, head, targets, mask, fast=False):
    """nll of head(h); fast never holds the logits.   h (b, t, d), head a Linear (v, d) -> scalar, fp32"""
    if fast:
        from kernels.loss import linear_nll as kernel
        return kernel(h, head.weight, targets, mask)
    if hasattr(head, "nll"):                                                 # seam: parallel.py's, in pieces
        return head.nll(h, targets, mask)
    return nll(head(h), targets, mask)


def loss(mtp, h, targets, mask, embed, head, fast=False):
    """The summed loss of every depth: [depth 1, ..., depth K]. Divide each by its own targets, see `counts`.

    h (b, t, d) the backbone's states   targets (b, t) the tokens t+1   mask (b, t) bool, which targets count
    Of a slice of a sequence, targets and mask may be longer than t: they bring what follows the slice.
    """
    sums, t = [], h.shape[1]
    for k in range(1, mtp.depths + 1):
        h = mtp(h, embed(targets[:, :t]), k)                                        # told token t+k ...
        targets, mask = roll(targets), roll(mask)
        sums.append(linear_nll(h, head, targets[:, :t], mask[:, :t], fast))                 # ... asked for token t+k+1
    return sums


def counts(mask, depths):
    """How many targets are left at depth 0 (the main loss), 1, ..., K.   mask (b, t) bool -> K+1 numbers"""
    left = [int(mask.sum())]
    for _ in range(depths):
        mask = roll(mask)
        left.append(int(mask.sum()))
    return left


# ---- the same block as a drafter

def follow(mtp, cache, h, e, count=None):
    """Reads what has been accepted: states h and the embeddings e of the tokens after them, (b, t, d), count
    (b,) of them real -> h^(1) after each row's last one, (b, 1, d).

    One cache serves every draft: the keys of depth 1, over the whole text. A second stored block has its own
    keys, of its own depth: its states are those the block before it made, one token earlier.
    """
    b, t, _ = h.shape
    end = torch.full((b,), t, device=h.device) if count is None else count
    x = h
    for k in range(1, len(mtp.layers) // mtp.size + 1):
        x = mtp(x, e, k, cache.layers, count)
        last = x[torch.arange(b, device=h.device), (end - 1).clamp(min=0)][:, None]
        before = cache.last.get(k, x[:, :1])
        cache.last[k] = torch.where((end > 0)[:, None, None], last, before)
        x = torch.cat([before, x[:, :-1]], 1)
    return cache.last[1]


def draft(mtp, x, d, embed, head, pick, cache=None):
    """d tokens from h^(1), x (b, 1, d): the block's own output and its own guess go in again, whatever d is.

    pick(logits (b, v)) -> tokens (b,), their distribution (b, v) or None. Drafts are read into a copy of the
    cache that is then forgotten; what they wrote into shared buffers lies beyond every row's length. Without
    a cache the block attends to the current position only: cheaper, and not what it was trained for.
    Returns drafts (b, d) and the distributions (b, d, v), or None.
    """
    scratch, drafts, q = cache and [copy.copy(layer) for layer in cache.layers], [], []
    for k in range(1, d + 1):
        token, of = pick(head(x)[:, -1])
        drafts.append(token)
        q.append(of)
        if k < d:
            x = mtp(x, embed(token[:, None]), k + 1, scratch)
    return torch.stack(drafts, 1), None if q[0] is None else torch.stack(q, 1)


def match(drafts, best):
    """Greedy: how many drafts (b, d) are what the model itself says, best (b, d+1), and what it says next."""
    n = (drafts == best[:, :-1]).long().cumprod(1).sum(1)
    return n, best.gather(1, n[:, None])[:, 0]


def accept(drafts, q, p, generator=None):
    """Sampling: how many drafts stand, and the token after them, such that the text is distributed as if drawn
    from p alone. drafts (b, d) were drawn from q (b, d, v); p (b, d+1, v) -> n (b,), tokens (b,)

    Draft x stands with probability min(1, p(x) / q(x)). In place of the first that falls comes a draw from
    max(p - q, 0), normalised: exactly the mass of p that the standing drafts leave out. If none falls, q is 0
    behind the last, and that draw is the free one from p.
    """
    px, qx = (v.gather(2, drafts[..., None])[..., 0] for v in (p[:, :-1], q))
    u = torch.rand(px.shape, device=p.device, dtype=p.dtype, generator=generator)
    n = (u * qx < px).long().cumprod(1).sum(1)
    row = torch.arange(len(p), device=p.device)
    there = p[row, n]
    rest = (there - F.pad(q, (0, 0, 0, 1))[row, n]).clamp(min=0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, there)           # p = q up to rounding
    return n, torch.multinomial(rest, 1, generator=generator)[:, 0]


class Tally:
    """What drafting achieved: rounds that tried draft k, how often it was reached and stood, and seconds.

    `choose` is --speculate auto: the d with the most tokens a second, tokens 1 + a_1 + a_1 a_2 + ... from the
    measured rates a_k, seconds from the quickest rounds, a straight line between the d that were tried.
    """
    def __init__(self, most=7):
        self.most, self.reached, self.stood = most, [0] * (most + 1), [0] * (most + 1)
        self.rounds, self.tokens, self.seconds = 0, 0, {}

    def note(self, d, n, seconds):
        """A round of d drafts, of which n (a list, one a row) stood."""
        for got in n:
            for k in range(1, d + 1):
                self.reached[k] += got >= k - 1
                self.stood[k] += got >= k
        self.rounds, self.tokens = self.rounds + len(n), self.tokens + sum(n) + len(n)
        self.seconds.setdefault(d, []).append(seconds)

    def rate(self, k):
        """Of the drafts k whose forerunners stood, the share that stood too; before any: a half."""
        return (self.stood[k] + .5) / (self.reached[k] + 1)

    def tokens_expected(self, d):
        total, p = 1.0, 1.0
        for k in range(1, d + 1):
            p *= self.rate(k)
            total += p
        return total

    def choose(self):
        """Tries both ends of the range first, and one of them again in every 32nd round."""
        done = sum(map(len, self.seconds.values()))
        if done < 6 or done % 32 == 0:
            return self.most if done % 2 == 0 and done < 6 else done // 32 % self.most + 1
        cost = {d: sorted(s[-9:])[len(s[-9:]) // 2] for d, s in self.seconds.items()}
        low, high = min(cost), max(cost)
        slope = (cost[high] - cost[low]) / max(1, high - low)
        return max(range(1, self.most + 1), key=lambda d: self.tokens_expected(d)
                   / cost.get(d, cost[low] + (d - low) * slope))


def main():
    """Prints the point: trained at two depths, the shared block stays right at depths it never saw."""
    class Block(nn.Module):                                                  # stands in for the real one
        def __init__(self, d):
            super().__init__()
            self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x, cache=None, count=None):
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    v, d, t = 32, 48, 24
    follows = torch.randperm(v)                                              # every word has one successor
    def text(b):
        ids = torch.randint(v, (b, 1))
        for _ in range(t):
            ids = torch.cat([ids, follows[ids[:, -1:]]], 1)
        return ids

    print(f"a language of {v} words, each with one successor; "
          f"log({v}) = {torch.tensor(float(v)).log():.2f} nats is chance")
    print(f"{'':28}" + "".join(f"depth {k:<4}" for k in range(1, 6)))
    for name, blocks, depths in (("shared block, 2 depths", 1, 2), ("shared block, 1 depth", 1, 1),
                                 ("two separate blocks", 2, 2)):
        torch.manual_seed(1)
        embed, head = nn.Embedding(v, d), nn.Linear(d, v, bias=False)
        block = MTP(lambda letter: Block(d), d, pattern="*E", blocks=blocks, depths=depths)
        params = [*embed.parameters(), *head.parameters(), *block.parameters()]
        opt = torch.optim.AdamW(params, 3e-3)
        for step in range(150):
            ids = text(16)
            x, y = ids[:, :-1], ids[:, 1:]
            mask = torch.ones_like(y, dtype=torch.bool)
            sums = loss(block, embed(x), y, mask, embed, head)
            total = sum(s / n for s, n in zip(sums, counts(mask, depths)[1:]))
            opt.zero_grad()
            total.backward()
            opt.step()
        block.depths = 5
        with torch.no_grad():
            sums = loss(block, embed(x), y, mask, embed, head)
        row = "".join(f"{float(s) / n:<10.3f}" for s, n in zip(sums, counts(mask, 5)[1:]))
        print(f"  {name:24}  {row}  {sum(p.numel() for p in block.parameters()):,} parameters")
    left = [n // 16 for n in counts(mask, 5)]
    print(f"targets left at depth 0 ... 5 of {t} positions: {left}: each depth masks one more")


if __name__ == "__main__":
    main()
