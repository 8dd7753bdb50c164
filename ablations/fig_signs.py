"""
Must the rotation before the weight gradient have random signs, and new ones for every product?

Claim     Hadamard's matrix alone, without random signs, ends at a higher loss; one vector of signs
          for all products is as good as a new one for each
          arXiv:2509.25149 figure 13, there at 12 G parameters; at 1.2 G no difference was seen

Varied    the signs s of x diag(s) H/4: none, the recipe's vector, or drawn for every product
Equal     the products: x, w and dy of every matrix that the recipe takes to four bits, from one
          batch of 512 bytes and a model trained in fp32 (100 steps); both operands share s

Here      H's first column sums 16 neighbouring tokens. What they have in common (a channel's mean,
          and behind relu squared no number is negative) all lands there if no signs scatter it: an
          outlier of the rotation's own making, whatever the model's size. Errors are of 16 draws
"""

import torch

import data
from ablations import draw, rounding, small
from ablations.lab import Claim, Figure, main
from nvfp4 import SIGNS
from plot import sheet

NONE, FIXED, FRESH = "no signs", "one vector", "new for each product"
KINDS = {NONE: torch.ones_like, FIXED: lambda drawn: torch.tensor(SIGNS), FRESH: torch.clone}


def errors(given, signs, n):
    """The relative error of dw, of one draw and of n draws' mean; the share of x flushed to 0."""
    how = rounding.Signed(KINDS[signs])
    want = rounding.products(*given, rounding.Signed(KINDS[signs], exact=True))[2]
    draws = [rounding.products(*given, how)[2] for _ in range(n)]
    zeros, numbers = how.flushed["wgrad x"].tolist()
    one = sum(float((d - want).norm() / want.norm()) for d in draws) / n
    return dict(error=one, bias=rounding.bias(draws, want), flushed=zeros / numbers)


def cell(settings, seed):
    """Means over the model's products, of each kind of signs."""
    own = dict(settings)
    n = own.pop("draws")
    with small.trained(own, seed) as run:
        ids = data.encode(data.tokenizer("bytes", ""), data.corpus("python").train)
        given = rounding.operands(run.model, data.batch(ids, 1000 + seed, 1, 8, 65))
    torch.manual_seed(seed)
    found = {}
    for signs in KINDS:
        each = [errors(g, signs, n) for g in given]
        found |= {f"{m}, {signs}": sum(e[m] for e in each) / len(each) for m in each[0]}
    return found


MODEL, WHERE = "one model", "arXiv:2509.25149, figure 13"
WORSE, SAME = "without signs the loss is higher", "one fixed vector is as good as new ones"


def claim(says, published, measure, more, less, reason=""):
    more, less = f"{measure}, {more}", f"{measure}, {less}"
    return Claim(says, WHERE, published, MODEL, MODEL, more, than=less, reason=reason)


CLAIMS = (
    claim("Without random signs one draw of the weight gradient errs more",
          WORSE, "error", NONE, FIXED,
          "The error's square is made by the large numbers, which are no better off scattered"),
    claim("Without random signs more of x is flushed to zero in the weight gradient",
          WORSE, "flushed", NONE, FIXED),
    claim("With one vector a draw errs more than with new signs", SAME, "error", FIXED, FRESH),
    claim("With one vector the mean of 16 draws errs more than with new signs",
          SAME, "bias", FIXED, FRESH,
          "x is rounded to the nearest: by one vector in the same way each time, so that a mean "
          "keeps the error. In training x changes from step to step, which is not measured here"),
)  # fmt: skip


def picture(found):
    """What is flushed, and the error of a mean, by kind of signs."""
    units = dict(flushed="share of x that turns 0", bias="error of dw, mean of 16 draws, relative")
    fig, axes = sheet(1, 2, figsize=(11, 3.8))
    for ax, (measure, unit) in zip(axes, units.items()):
        draw.levels(ax, found.beside({k: f"{measure}, {k}" for k in KINDS}), "loss", unit)
    axes[1].set_yticklabels([])
    fig.suptitle(draw.title(found, CLAIMS[1], 92), x=0.01, ha="left", weight="bold")
    return fig


UNITS = {"": "of dw's size"} | {f"flushed, {kind}": "of x" for kind in KINDS}
FIGURE = Figure("signs", CLAIMS, picture, {MODEL: {}}, cell,
                small.BYTES | dict(steps=100, draws=16), quick=dict(steps=40, draws=4),
                units=UNITS)  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
