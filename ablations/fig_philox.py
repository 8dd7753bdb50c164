"""
How many Philox rounds does random rounding of a state need?

Claim     with three rounds answers are 10.7 % longer, with four as long as before; the deployed
          kernels take five
          arXiv:2604.12374 section 4.3, table 8

Varied    the rounds: 1 to 10, of which 10 are Philox's standard
Equal     the noise that 16 tokens' states of 16,384 numbers are rounded with, three draws of keys

Here      not answers but their likely cause: an output of Mamba sums 128 neighbours of the state,
          so that noise which neighbours share does not average out. Measured is how much wider the
          spread of such a sum is than that of independent noise. Bits do not shrink: this is
          Philox as it is deployed
"""

from ablations import draw
from ablations.lab import Claim, Figure, main
from plot import sheet
from quant import statecache

ROUNDS = 1, 2, 3, 4, 5, 7, 10
WIDE, NEAR = 1.5, 1.05  # times independent noise


def rounds(n):
    return f"{n} round" + "s" * (n > 1)


def cell(settings, seed):
    """Spread of a sum of 128 neighbours' noise, beside two bounds."""
    given = dict(seed=1000 * seed, n=settings["numbers"])
    spread = statecache.neighbours(settings["rounds"], **given)
    return dict(spread=spread, wide=WIDE, near=NEAR)


EIGHT = "arXiv:2604.12374 table 8"
THREE, FOUR = rounds(3), rounds(4)
CLAIMS = (
    Claim("With three Philox rounds neighbours' noise is spread wider than 1.5 independent ones",
          EIGHT, "three rounds: answers longer by 10.7 %", THREE, THREE, "spread", than="wide"),
    Claim("With four Philox rounds it is within 5 % of independent noise",
          EIGHT, "four rounds: answers as long as before", FOUR, FOUR, "near", than="spread"),
)  # fmt: skip


def picture(found):
    fig, ax = sheet(figsize=(10, 4.6))
    draw.levels(ax, found, "spread", "")
    ax.axvline(1, color="k", ls="--", lw=1.5)
    ax.text(1.03, len(ROUNDS) - 0.62, "independent noise", size=10, color="0.3")
    ax.set(xlabel="spread of a sum of 128 neighbours' noise, times that of independent noise")
    ax.set(title=draw.title(found, CLAIMS[0], 90))
    return fig


FIGURE = Figure(
    name="philox",
    claims=CLAIMS,
    draw=picture,
    variants={rounds(n): dict(rounds=n) for n in ROUNDS},
    units=dict(spread="times independent noise", near="times independent noise"),
    cell=cell,
    base=dict(numbers=1 << 14),
    quick=dict(numbers=1 << 12),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
