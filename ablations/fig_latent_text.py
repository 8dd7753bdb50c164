"""
Do experts in a latent lose anything on text, where the width saved buys more of them?

Claim     with experts in a latent of width d/a and a times as many of them, a model with as many a
          token ("eff") equals standard experts, one with a times as many a token ("acc") beats
          them, and one with no more experts is clearly worse
          arXiv:2601.18089 figures 4 to 6 (a = 4), trained on text

Varied    where experts work, their number, how many a token takes; a = 2
Equal     the routed experts' parameters, 200 steps on the same bytes, and the size at which the
          routed path starts, by its scale, as in ablations/fig_latent.py; acc has the standard
          layer's expert FLOPs, eff half of them

Here      MEME of width 64 on 100 kB of Python. `off` is the loss with all routed experts silent: it
          says whether so small a model has a use for them. Matrices start with 0.08, as in
          fig_latent; with Super's start a latent's path would begin too small to be missed
"""

import plot
import worth
from ablations import draw, small
from ablations.lab import Claim, Figure, main

VARIANTS = {
    "standard": dict(moe_latent_size=None),
    "acc": dict(n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=75.0),
    "eff": dict(n_routed_experts=16, routed_scaling_factor=53.0),
}


def cell(settings, seed):
    """The loss, and without the routed experts."""
    with small.trained(settings, seed) as run:
        with worth.without(run.model.eval(), "routed experts off"):
            off = small.nats(run.model, run.settings)
        return dict(loss=small.last(run.log, "val_nats"), off=off)


STANDARD, ACC, EFF = VARIANTS
PAPER = "arXiv:2601.18089 "
CLAIMS = (
    Claim("On text standard experts end at a higher loss than twice as many in half the width",
          PAPER + "figures 5, 6", "acc below standard at 16 G and 95 G parameters",
          STANDARD, ACC, "loss",
          reason="Tokens are few, as with facts: a path of four matrices learns later than one of "
          "two. Silencing the routed experts costs acc less than standard: it has learned less"),
    Claim("On text standard experts end at a higher loss than eff",
          PAPER + "figure 5, table 4", "equal losses", STANDARD, EFF, "loss"),
    Claim("On text eff, with half the expert FLOPs, ends at a higher loss than acc",
          PAPER + "figures 5, 6", "eff equals standard, acc is lower", EFF, ACC, "loss"),
)  # fmt: skip


def picture(found):
    """The loss, what it is without the routed experts, and the loss's paired differences."""
    fig, (a, b, c) = plot.sheet(1, 3, figsize=(12, 3.9), width_ratios=(1, 1, 1.4))
    draw.levels(a, found, "loss", "validation nats a byte")
    draw.levels(b, found, "off", "the same, routed experts silent")
    b.set_yticks(range(len(VARIANTS)), [])
    draw.differences(c, found, "loss", STANDARD, "validation nats a byte")
    fig.suptitle(draw.title(found, CLAIMS[0], 100), x=0.01, ha="left", weight="bold")
    return fig


FIGURE = Figure(
    name="latent_text",
    claims=CLAIMS,
    draw=picture,
    variants=VARIANTS,
    cell=cell,
    base=small.BYTES
    | dict(hybrid_override_pattern="MEME", steps=200, initializer_range=0.08, eval_tokens=16384),
    quick=dict(steps=60),
    units=dict(loss="nats a byte"),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
