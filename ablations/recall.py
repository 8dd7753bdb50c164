"""
Recall: rows that name letters with a digit each, and then ask for some of the digits again.

    rows(seed, step, n, pairs)    n of them, a function of (seed, step): k3a7f0a7k3 ...
    Recall                        a work of train.fit: such rows, of PAIRS pairs in turn
    right(model, pairs)           the share of the digits asked for that a model gives

Not here  data.py's corpus `recall`: always eight pairs, and every byte of it is a target
"""

import torch

import data
from corpora.philox import philox
from training.pretrain import Text

PAIRS, ASKED = (4, 8, 16), 8


def rows(seed, step, n, pairs):
    """n rows of `pairs` letters with a digit each, then ASKED of them -> (n, 2 (pairs + ASKED))."""
    dice = torch.from_numpy(philox(seed, step, n * (26 + pairs + ASKED)) >> 2).view(n, -1)
    order, digit, which = dice.long().split([26, pairs, ASKED], 1)
    letter = order.argsort(1)[:, :pairs]
    said = torch.stack([letter + ord("a"), digit % 10 + ord("0")], -1)  # (n, pairs, 2)
    asked = said.gather(1, (which % pairs)[..., None].expand(-1, -1, 2))
    return torch.cat([said, asked], 1).flatten(1)


class Recall(Text):
    """Rows never read before, of so many pairs in turn; the digits asked for are the targets."""

    def batch(self, step, world):
        n = self.run.batch
        ids = rows(self.run.seed, step, n, PAIRS[step % len(PAIRS)])
        asked = torch.zeros_like(ids[:, 1:], dtype=torch.bool)
        asked[:, 1 - 2 * ASKED :: 2] = True
        return data.Batch([world.rows(ids, 0, asked)], [n * ASKED], n, asked.numel())


@torch.no_grad()
def right(model, pairs, n=256):
    """The share of digits asked for that the model gives, of rows of a seed apart."""
    ids = rows(10**6, pairs, n, pairs)
    hits = model.eval()(ids[:, :-1]).argmax(-1) == ids[:, 1:]
    return float(hits[:, 1 - 2 * ASKED :: 2].float().mean())
