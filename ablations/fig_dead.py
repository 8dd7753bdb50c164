"""
Where do four bits leave experts without a gradient, and do such units grow in number?

Claim     by the end 7 % of the weights' gradients are exactly zero, about three times as many as
          in high precision, and going back to it restores them. Most zeros of the experts' first
          matrix come from the second one's backward product, and some channels die of it
          arXiv:2604.12374 figures 6 to 8

Varied    how the products of one and the same gradient are made: in four bits, in four bits but for
          dy in the backward product dx, or in fp32
Equal     weights and batch (2,048 bytes): a run in NVFP4, at a quarter of its 80 steps and after
          them. Counted are the experts of the layers that the recipe takes to four bits

Here      a unit of an expert whose input and output weights all have gradient zero learns nothing
          from the batch. A norm cannot shrink to the report's 1 % in 80 steps: weight decay
          leaves 97 % of a matrix without gradient. What precedes it can be counted
"""

import torch

import checkpoint
import data
from ablations import draw, small
from ablations.lab import Claim, Figure, main
from ablations.rounding import ExactBackward, Rounding, zeros

FOUR, BACK, HIGH = "four bits", "four bits, dx of exact dy", "fp32"
HOW = {FOUR: Rounding, BACK: ExactBackward}
HOW[HIGH] = lambda recipe: Rounding(recipe, spared=("x", "w", "dy"))
EARLY, LATE = "early", "late"


def cell(settings, seed):
    """Both shares, early and late, of the three ways to make the products."""
    with small.trained(settings, seed) as run:
        ids = data.encode(data.tokenizer("bytes", ""), data.corpus("python").train)
        batch, found = data.batch(ids, 1000 + seed, 1, 32, 65), {}
        files = checkpoint.steps(run.settings.folder())
        for time, path in ((EARLY, files[0]), (LATE, files[-1])):
            run.model.load_state_dict(checkpoint.read(path)["model"])
            torch.manual_seed(seed)
            for kind, how in HOW.items():
                shares = zeros(run.model, batch, how)
                found |= {f"{m}, {kind}, {time}": x for m, x in shares.items()}
    return found


MODEL, REPORT = "one model", "arXiv:2604.12374, figure "


def claim(says, figure, published, more, less, reason=""):
    return Claim(says, REPORT + figure, published, MODEL, MODEL, more, than=less, reason=reason)


CLAIMS = (
    claim("In four bits more units of experts have no gradient than in fp32, weights the same",
          "7", "3 times the zeros of BF16", f"silent, {FOUR}, {LATE}", f"silent, {HIGH}, {LATE}"),
    claim("In four bits more of the first matrices' gradients are zero than in fp32",
          "7", "3 times the zeros of BF16", f"zeros, {FOUR}, {LATE}", f"zeros, {HIGH}, {LATE}"),
    claim("Units without a gradient grow in number over training in four bits",
          "6", "dead channels after 23 T tokens", f"silent, {FOUR}, {LATE}",
          f"silent, {FOUR}, {EARLY}", reason="In 80 steps units wake up: nothing dies yet"),
    claim("dy's rounding in the backward product adds zeros to the first matrices' gradients",
          "8", "nearly all come from there", f"zeros, {FOUR}, {LATE}", f"zeros, {BACK}, {LATE}"),
)  # fmt: skip


def picture(found):
    """Units without a gradient, early and late."""
    ways = {f"{k}, {t}": f"silent, {k}, {t}" for t in (EARLY, LATE) for k in (FOUR, HIGH)}
    base = f"{HIGH}, {LATE}"
    shown = CLAIMS[0]._replace(more=f"{FOUR}, {LATE}", less=base, measure="loss", than="")
    unit = "share of experts' units without gradient"
    return draw.paired(found.beside(ways), "loss", base, unit, shown)


FIGURE = Figure(
    name="dead",
    base=small.BYTES | dict(precision="nvfp4", steps=80, save_every=20),
    variants={MODEL: {}},
    quick=dict(steps=40, save_every=10),
    units={"": "of the experts' units"}
    | {f"zeros, {kind}, {LATE}": "of the numbers" for kind in HOW},
    cell=cell,
    claims=CLAIMS,
    draw=picture,
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
