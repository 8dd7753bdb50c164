"""
How many attention layers does recall need?

Claim     a few attention layers are enough for what a state of fixed size forgets
          arXiv:2604.12374 section 2.1 (few attention layers among Mamba's), after
          arXiv:2406.07887, where pure Mamba-2 falls behind on copying and in-context lookup

Varied    how many of three mixers are attention, and how many pairs a row holds, 4, 8, 16 in turn
Equal     steps, batches, width. An attention layer has fewer parameters than a Mamba layer

Here      letters with a digit each, then eight of the letters, whose digits are asked and learned.
          The state is small, as the rows are: four numbers a channel, where 26 letters are to be
          kept apart. But in 400 steps who learns sooner recalls more, too
"""

from unittest import mock

import train
from ablations import draw, small
from ablations.figure import Found
from ablations.lab import Claim, Figure, main
from ablations.recall import PAIRS, Recall, right
from plot import sheet


def cell(settings, seed):
    """The share of right digits, of every mixture of layers and number of pairs."""
    own, found = dict(settings), {}
    for layers, pattern in own.pop("layers").items():
        taught = small.trained(own | dict(hybrid_override_pattern=pattern), seed)
        with mock.patch.object(train, "Text", Recall), taught as run:
            share = [(pairs, right(run.model, pairs)) for pairs in PAIRS]
        found |= {layers: share} | {f"{layers}, {pairs}": x for pairs, x in share}
    return found


NONE, ONE, TWO = "Mamba alone", "one attention layer", "two attention layers"
LAYERS = {NONE: "MMM", ONE: "M*M", TWO: "M**"}
REPORT, FEW = "arXiv:2604.12374, section 2.1", "few are enough: 8 of 88"
STUDY, MORE, SEED = "arXiv:2406.07887", "hybrids recall more than Mamba-2", "three models"


def claim(says, where, published, more, less, reason=""):
    return Claim(says, where, published, SEED, SEED, more, than=less, reason=reason)


CLAIMS = (
    *(claim(f"Of {n} pairs, one attention layer of three recalls more than Mamba alone",
            STUDY, MORE, f"{ONE}, {n}", f"{NONE}, {n}") for n in (16, 4)),
    claim("Of 16 pairs, two recall more than one", REPORT, FEW, f"{TWO}, 16", f"{ONE}, 16",
          "With two, 400 steps are too few to learn the task; more were not tried"),
    claim("Mamba alone recalls less of 16 pairs than 4", STUDY, MORE, f"{NONE}, 4", f"{NONE}, 16"),
)  # fmt: skip


def picture(found):
    """The share right against the number of pairs."""
    fig, ax = sheet(figsize=(8, 4.6))
    lines = [dict(r, variant=r["curve"], curve="right") for r in found.curves]
    ax.axhline(0.1, color="0.3", ls="--", lw=1.2)
    ax.set(xlabel="pairs in a row", xticks=PAIRS, ylabel="share right (dashed: chance)")
    ax.set(ylim=(0, 1.03))
    draw.curves(ax, Found(Figure("", (), variants=LAYERS), [], lines), "right", band=False)
    ax.text(0.99, 0.02, "thin: a seed", transform=ax.transAxes, ha="right", size=10)
    ax.set_title(draw.title(found, CLAIMS[0]))
    return fig


SIZES = dict(hidden_size=32, head_dim=16, mamba_num_heads=2, n_groups=1, ssm_state_size=4)
SIZES |= dict(chunk_size=16, initializer_range=0.1, batch=32, length=32, layers=LAYERS)
RUN = SIZES | dict(data="recall", steps=400, lr=8e-3, lr_min=8e-5, eval_tokens=64)
FIGURE = Figure("recall", CLAIMS, picture, {SEED: {}}, cell, small.BYTES | RUN, dict(steps=40),
                units={"": "of the digits"}, seeds=tuple(range(6)))  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
