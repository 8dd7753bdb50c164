"""
What does each ingredient of four-bit training do, seen where it acts?

Claim     stochastic rounding takes the bias out of the gradient, and only gradients want it; the
          rotation keeps what the weight gradient would flush to zero, and the other products do
          not want it; 16 x 16 weight scales let backward use the weights that forward used; blocks
          of 16 with E4M3 scales err less than MXFP4's
          arXiv:2509.25149 figures 4 to 6 and 10 to 14, there as losses of 12 G parameters

Varied    the rounding of the three products, an ingredient at a time
Equal     the products: x, w and dy of every matrix that the recipe takes to four bits, from one
          batch of 512 bytes and a model trained in fp32 (100 steps), the same for all variants

Here      loss differences of so small a model drown in noise (docs/four_bits.md). The errors that
          cause them do not shrink with the model: they are the number format's, on a trained
          model's own activations and gradients. Biases are of 32 draws: the product of two halves'
          mean errors, so that what is merely random is not counted. They are dy's alone, the
          reference being the same product with dy as it is
"""

import torch

import data
from ablations import draw, rounding, small
from ablations.lab import Claim, Figure, main


def cell(settings, seed):
    """Means over the model's products."""
    own = dict(settings)
    how = [own.pop(name) for name in ("four", "extra", "draws")]
    with small.trained(own, seed) as run:
        enc = data.tokenizer("bytes", "")
        ids = data.encode(enc, data.corpus("python").train)
        given = rounding.operands(run.model, data.batch(ids, 1000 + seed, 1, 8, 65))
    torch.manual_seed(seed)
    each = [rounding.errors(g, *how) for g in given]
    return {name: sum(e[name] for e in each) / len(each) for name in each[0]}


WHERE = "arXiv:2509.25149, figure "
KEPT, NO_SR, NO_RHT, NO_TILES = "the recipe", "not stochastic", "no rotation", "no 16 x 16 scales"
CLAIMS = (
    Claim("Without stochastic rounding the weight gradient is biased",
          WHERE + "4", "the loss is higher without", NO_SR, KEPT, "wgrad_bias"),
    Claim("Random rounding of x and w as well only adds error to the forward product",
          WHERE + "10", "gradients alone is best", "all stochastic", KEPT, "fprop"),
    Claim("Without the rotation more of dy is flushed to zero in the weight gradient",
          WHERE + "4", "the loss is higher without", NO_RHT, KEPT, "flushed"),
    Claim("Without the rotation one draw of the weight gradient errs more",
          WHERE + "4", "the loss is higher without", NO_RHT, KEPT, "wgrad",
          reason="The rotation saves small numbers from zero and spreads the error of large ones: "
          "the sum of squares, which the large ones make, is no smaller. These gradients have no "
          "outliers of the kind that billions of parameters grow"),
    Claim("Rotating the other two products as well does not make them more exact",
          WHERE + "11", "dw's operands alone is best", "all rotated", NO_TILES, "fprop"),
    Claim("A rotation of 4 flushes more to zero than one of 16",
          WHERE + "12", "16 is enough, 4 slightly worse", "rotation of 4", KEPT, "flushed"),
    Claim("Without 16 x 16 scales backward uses other weights than forward used",
          WHERE + "14", "mismatched weights are the worst of three", NO_TILES, KEPT, "apart",
          reason="With tiles the two are one by construction; measured is the distance without"),
    Claim("16 x 16 scales are paid for with a less exact forward product",
          WHERE + "14", "1 x 16 with matching weights is best", KEPT, NO_TILES, "fprop"),
    Claim("MXFP4's forward product errs more than NVFP4's",
          WHERE + "5", "loss gap 2.5 % against 1.5 %", "MXFP4", KEPT, "fprop"),
)  # fmt: skip
PANELS = dict(
    wgrad_bias="bias of dw, relative",
    flushed="share of dy that turns 0",
    apart="backward's weights from forward's, relative",
    fprop="error of y, relative",
)


FIGURE = Figure(
    name="fourbit_errors",
    base=small.BYTES | dict(steps=100, four="nvfp4", extra=[], draws=32),
    variants={
        KEPT: {},
        NO_SR: dict(four="nvfp4-sr"),
        NO_RHT: dict(four="nvfp4-rht"),
        NO_TILES: dict(four="nvfp4-2d"),
        "MXFP4": dict(four="mxfp4"),
        "all stochastic": dict(extra=["random_all"]),
        "all rotated": dict(four="nvfp4-2d", extra=["rotate_all"]),
        "rotation of 4": dict(four="nvfp4-rht", extra=["rotate_4"]),
    },
    quick=dict(steps=40, draws=8),
    units=PANELS | dict(wgrad="error of dw, relative"),
    cell=cell,
    claims=CLAIMS,
    draw=lambda found: draw.panels(found, PANELS, draw.title(found, CLAIMS[0], 92)),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
