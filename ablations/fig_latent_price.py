"""
Is a latent's price that it is narrow, or that it has two more matrices?

Claim     acc, a times as many experts in a latent of width d/a and a times as many a token, beats
          standard experts; in ablations/fig_latent.py it ends behind them instead
          arXiv:2601.18089 figures 5 and 6

Varied    one difference between standard and acc at a time: "square" is standard between two
          projections of 64 x 64, which narrow nothing; acc has half the width, twice the experts
Equal     the routed experts' parameters, and what of them a token takes; the size at which the
          routed path starts, by its scale; weights and batches of the same shape, 100 steps

Here      one Mamba-2 layer, one LatentMoE, 1,024 random facts of 16 bits, 19 times each: a tenth of
          fig_latent's work, in its sizes. It tells who learns first, not who can hold more. A
          pilot's standard knew all facts after 150 steps. A cell trains the three models of a seed
"""

from ablations import draw, small
from ablations.fig_latent import FIGURE as LATENT
from ablations.lab import Claim, Figure, main

FORMS = {
    "standard": LATENT.variants["standard"],
    "square": dict(moe_latent_size=64, routed_scaling_factor=13.5),
    "acc": LATENT.variants["acc"],
}
ONE = "one seed's models"


def cell(settings, seed):
    """The loss of every form."""
    forms = settings.pop("forms")
    return {name: small.loss(settings | form, seed)["loss"] for name, form in forms.items()}


OURS = "our comparison, after arXiv:2601.18089 figure 5", "not stated"
CLAIMS = (
    Claim("Projections that narrow nothing make standard experts end at a higher loss",
          *OURS, ONE, ONE, "square", than="standard"),
    Claim("Between projections, half the width and twice the experts end at a higher loss (acc)",
          *OURS, ONE, ONE, "acc", than="square",
          reason="Nearly all that acc costs here is the price of two more matrices to learn"),
    Claim("After 100 steps standard experts end at a higher loss than acc",
          "arXiv:2601.18089 figures 5, 6", "acc below standard at 16 G and 95 G parameters",
          ONE, ONE, "standard", than="acc"),
)  # fmt: skip


def picture(found):
    claim = CLAIMS[0]._replace(more="square", less="standard", measure="loss", than="")
    forms = found.beside({name: name for name in FORMS})
    return draw.paired(forms, "loss", "standard", "validation nats a value", claim)


FIGURE = Figure(
    name="latent_price",
    claims=CLAIMS,
    draw=picture,
    variants={ONE: dict(forms=FORMS)},
    cell=cell,
    base=LATENT.base | dict(data="facts:1024", batch=16, steps=100),
    quick=dict(steps=20),
    units={"": "nats a value"},
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
