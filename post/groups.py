"""
Groups (GRPO): each reply is judged against the others to its prompt.

For a prompt with g replies of rewards r_i, everything about reply i comes from the other g-1:

    b_i = mean of the others     s_i = their standard deviation (over g-2)
    A_i = clip((r_i - b_i) / s_i, -50, 50)     s_i = 0: not divided     malformed: A_i = -5

So no second model has to say what a prompt is worth: its other replies do. Four replies, one of
them right: it gets 1 above a mean of 0, whose deviation is 0, so A = 1; the wrong ones are 1/3
below a mean of 1/3 with a deviation of 0.58, so A = -0.58. All right, or all wrong: nothing to
learn.

    loss = sum over kept tokens of  (-w A rho + beta k3)  /  their number
      rho  = pi / pi_old            1 in value: one update a batch. Its gradient is that of log pi
      w    = min(pi_old / pi_gen, 5)      the trainer's opinion of a token over the generator's
      kept : replies whose mean of exp|log pi_old - log pi_gen| is at most 2 (--overlong: that end)
      k3   = pi / pi_gen (e^x - 1 - x)    x = log pi_ref - log pi

Letters   p prompts  g replies to each  b = p g  t time
          pi the model in training, pi_old the same before the update, pi_gen the one that wrote the
          replies, pi_ref the one that practice began with
Not here  the update that uses them: practice.py; a judge's rewards: rlhf.py
Sources   arXiv:2604.12374 section 3.2 and its released configuration; arXiv:2402.03300 (groups)
Departs   deviations below 1e-6, of rewards beyond 1 below 1e-6 of the largest, count as 0: in the
          release fp32's rounding decides
"""

from typing import NamedTuple

import torch

import data
from post import pack


def advantages(r, malformed=None, clip=50.0, penalty=-5.0):
    """r (p, g) rewards, malformed (p, g) bool -> A (p, g). A malformed reply still votes in the
    others' baseline; its own advantage is `penalty`, after the clip.
    """
    g, r = r.shape[1], r.double()
    if g < 2:
        raise ValueError(
            f"a group of {g}: a reply is judged against the others, so take at least 2"
        )
    if not r.isfinite().all():
        raise ValueError("a reward is not a finite number")
    if malformed is not None and malformed.shape != r.shape:
        raise ValueError(f"malformed {tuple(malformed.shape)} of rewards {tuple(r.shape)}")

    def others(x):
        return (x.sum(1, keepdim=True) - x) / (g - 1)

    b = others(r)
    s = ((others(r * r) - b**2).clamp(min=0) * ((g - 1) / max(1, g - 2))).sqrt()
    least = 1e-6 * r.abs().amax(1, keepdim=True).clamp(min=1)  # what rounding leaves of 0
    a = torch.where(s > least, (r - b) / (s + 1e-6), r - b).clamp(-clip, clip)
    return (a if malformed is None else a.masked_fill(malformed, penalty)).float()


def alike(*numbers):
    """ValueError unless each has a number for every token: torch would stretch a row to all."""
    if len({x.shape for x in numbers}) > 1:
        raise ValueError(f"numbers of {[tuple(x.shape) for x in numbers]} tokens")


def weights(old, gen, mask, who, most=5.0, threshold=2.0, replies=0):
    """w of each token, which tokens are kept, and each reply's mean of exp|difference|.

    old, gen, mask: one number a token, of any shape; who: the reply it belongs to, 0 ... b-1.
    replies: b, or 0: looked for in who, for which a GPU is waited.
    """
    alike(old, gen, mask, who)
    apart, b = (old - gen) * mask, replies or int(who.max()) + 1

    def by_reply(x):
        x = (x * mask).flatten()
        return x.new_zeros(b).index_add(0, who.flatten(), x)

    error = by_reply(apart.abs().exp()) / by_reply(torch.ones_like(mask)).clamp(min=1)
    return apart.exp().clamp(max=most), mask * (error <= threshold)[who], error


def objective(logp, old, gen, a, w, ref=None, beta=0.0):
    """The loss of each token. a: the advantage of its reply, a number a token as all the others."""
    alike(logp, old, gen, a, w, *[ref] * bool(beta))
    each = -w * a * (logp - old).exp()
    if beta:
        x = ref - logp
        each = each + beta * (logp - gen).exp() * (x.exp() - 1 - x)
    return each


class Laid(NamedTuple):
    """Replies in packed rows. Each (b, t) but docs: numbers of the target at each place."""

    number: torch.Tensor  # (b, t+1), for pack.Docs, which counts on the CPU
    ids: torch.Tensor  # (b, t+1)
    mask: torch.Tensor  # 1 where the target is a reply's token
    gen: torch.Tensor  # the generator's log-probability of it
    who: torch.Tensor  # which reply

    def pieces(self, micro):
        return [Laid(*p) for p in zip(*(x.split(micro or len(x)) for x in self))]


def lay(rollouts, length, device="cpu"):
    """Prompts with their replies in packed rows of length + 1 tokens."""
    documents = [r.prompt + r.reply for r in rollouts]
    columns = (
        documents,
        [[0.0] * len(r.prompt) + [1.0] * len(r.reply) for r in rollouts],
        [[0.0] * len(r.prompt) + r.logp for r in rollouts],
        [[i] * len(d) for i, d in enumerate(documents)],
    )
    rows = pack.pack(documents, length + 1)
    number, ids, mask, gen, who = pack.lay(rows, length + 1, *columns)
    docs = pack.Docs(number)
    each = ids, docs.end(mask[:, 1:]), docs.end(gen[:, 1:]), who[:, 1:]
    return Laid(number, *(data.send(x, device) for x in each))


def logprobs(model, piece):
    """log pi of every target, (b, t)."""
    docs = pack.Docs(piece.number, piece.ids.device)
    logits = model.logits(model.hidden(piece.ids[:, :-1], docs=docs))
    y = docs.end(piece.ids[:, 1:])
    return logits.log_softmax(-1).gather(2, y[..., None])[..., 0]
