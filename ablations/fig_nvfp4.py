"""
What do four bits cost in training, and which ingredient of the recipe pays for itself?

Claim     training in NVFP4 ends 1 % above high precision, 1.5 % after the decay; each ingredient
          left out raises the loss; MXFP4 costs more
          arXiv:2509.25149 figures 2, 4 and 5, there at 8 and 12 G parameters

Varied    the format of the products, and an ingredient of the recipe left out at a time
Equal     parameters, FLOPs, first weights, batches: 154 thousand bytes, some 0.2 M parameters

Here      an error of rounding does not shrink with the model. What it does to the loss should: the
          published runs differ after hundreds of billions of tokens, and these see none of their
          late effects. Where an ingredient acts is seen better in fig_fourbit_errors.py
"""

from ablations import draw, small
from ablations.lab import Claim, Figure, main
from ablations.verdict import interval
from plot import sheet

FP32, RECIPE, ALL, MX = "fp32", "NVFP4, the recipe", "without all four", "MXFP4"
WITHOUT = {
    "without 16x16 weights": "nvfp4-2d",
    "without the rotation": "nvfp4-rht",
    "without stochastic rounding": "nvfp4-sr",
    "without fp32 last layers": "nvfp4-last",
    ALL: "nvfp4-2d-rht-sr-last",
}
VARIANTS = {FP32: "fp32", RECIPE: "nvfp4", **WITHOUT, MX: "mxfp4"}


def dearer(says, where, published, more, less):
    return Claim(says, "arXiv:2509.25149 " + where, published, more, less, "loss")


CLAIMS = (
    dearer(
        "Training in NVFP4 ends at a higher loss than in fp32",
        "section 3",
        "less than 1 % in the stable phase, 1.5 % in decay",
        RECIPE,
        FP32,
    ),
    *(
        dearer(
            f"NVFP4 {without} ends at a higher loss than the recipe",
            "figure 4",
            "each ingredient left out raises the loss",
            without,
            RECIPE,
        )
        for without in WITHOUT
    ),
    dearer("MXFP4 ends at a higher loss than NVFP4", "figure 5", "2.5 % against 1.5 %", MX, RECIPE),
)


def picture(found):
    """Above: what formats cost. Below: what leaving an ingredient out of the recipe does."""
    fig, axes = sheet(2, 1, figsize=(10, 6.6), height_ratios=(2, 5))
    loss = found.values("loss")
    seeds = len(loss[RECIPE])
    for ax, names in zip(axes, ((FP32, RECIPE, MX), (RECIPE, *WITHOUT))):
        draw.differences(ax, found.only(*names), "loss", names[0], percent=True)
        ax.set_yticks(range(1, len(names)), names[1:])
        what = f"validation loss above that of “{names[0]}”, percent"
        ax.set(ylim=(len(names) - 0.5, 0.5), xlabel=f"{what}\n({draw.OUTLINES.format(seeds)})")
    of = lambda base, name: [100 * (loss[name][s] / x - 1) for s, x in loss[base].items()]
    cost, spread = interval(of(FP32, RECIPE))
    axes[0].set_title(f"Four bits cost {cost:.1f} ± {spread:.1f} % of the loss", size=13)
    apart = [w for w in WITHOUT if abs(interval(of(RECIPE, w))[0]) > interval(of(RECIPE, w))[1]]
    said = "What makes a difference here: " + ", ".join(apart)
    axes[1].set_title(said if apart else "Here no ingredient can be told from none", size=13)
    return fig


FIGURE = Figure(
    name="nvfp4",
    base=small.BYTES,
    variants={name: dict(precision=p) for name, p in VARIANTS.items()},
    quick=dict(steps=60),
    units=dict(loss="nats a byte"),
    cell=small.loss,
    claims=CLAIMS,
    draw=picture,
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
