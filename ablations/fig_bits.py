"""
What does each further bit a weight buy, if a search decides which matrices get it?

Claim     a searched map of 4.75 bits a weight keeps 99.8 % of the accuracy; the released map of
          mixed formats costs no more than FP8 everywhere
          arXiv:2604.12374 section 4.2 and table 9, on benchmarks of Super's 120 G parameters

Varied    which matrices are in NVFP4, in FP8 and as they were: by the search, at random, all alike,
          or as the release has them
Equal     the model, calibration and test, scales by weight-MSE, inputs rounded like the weights;
          of searched and random maps the mean bits

Here      a toy of 2.9 M parameters, trained for 880 steps in 6 CPU minutes a seed; a row is one
          model, measured in 20 ways. That matrices differ in what they cost does not shrink with
          the model; which ones are dear may. The receipts are of before the lab: no seconds
"""

from ablations import draw, quantised
from ablations.lab import Claim, Figure, main
from plot import COLOURS, MARKERS, sheet
from quant import packed

ONE, FOUR, EIGHT, RELEASED = "one model", "NVFP4", "FP8", "released map"
DRAWS = [f"random {i}" for i in range(3)]


def cell(settings, seed):
    """KL of each map: a curve over mean bits, and what claims ask for as numbers."""
    found = {}
    with quantised.subject(settings, seed) as s:
        for name, bits, plan, cache, inputs in quantised.maps(s):
            low = s.quantised(plan, cache=cache)
            cost = s.cost(packed.rounded(low, inputs))
            for column, y in quantised.named(name, cost).items():
                found.setdefault(column, []).append((bits, y))
    at = lambda bits, *names: sum(dict(found[name])[bits] for name in names) / len(names)
    return found | {
        "NVFP4 map": at(4.5, FOUR),
        "FP8 map": at(8.0, EIGHT),
        "released": found[RELEASED][0][1],
        "searched, 4.75 bits": at(4.75, "searched"),
        "searched, 5.5 bits": at(5.5, "searched"),
        "random, 5.5 bits": at(5.5, *DRAWS),
    }


def claim(says, where, published, more, less, reason=""):
    return Claim(says, "arXiv:2604.12374 " + where, published, ONE, ONE, more, less, reason)


CLAIMS = (
    claim("NVFP4 everywhere costs more than a searched map of 4.75 bits",
          "section 4.2", "99.8 % of the accuracy at 4.75 bits",
          "NVFP4 map", "searched, 4.75 bits"),
    claim("At 5.5 bits, formats drawn at random cost more than searched ones",
          "section 4.2", "the search is what was used; random maps are our comparison",
          "random, 5.5 bits", "searched, 5.5 bits"),
    claim("FP8 everywhere costs more than the released map",
          "table 9", "MMLU-Pro 83.63 (FP8), 83.33 (NVFP4), of 83.73", "FP8 map", "released",
          "The map was searched for Super; here it has 5.66 bits and costs a little more than 8."),
)  # fmt: skip


# Of every kind of map: its names in `maps`, and where in the picture its own name stands.
KINDS = {
    "searched": (["searched"], (-60, -22)),
    "formats at random": (DRAWS, (12, -4)),
    "NVFP4 everywhere": ([FOUR], (12, 4)),
    "FP8 everywhere": ([EIGHT], (-125, -4)),
    "as released": ([RELEASED], (12, -4)),
}


def picture(found):
    """KL against mean bits; a line or a mark is a seed."""
    fig, ax = sheet(figsize=(10, 5.2))
    for i, (label, (names, place)) in enumerate(KINDS.items()):
        style = dict(color=COLOURS[i], ms=8, mfc="none", mew=2, lw=1.5)
        lines = [line for name in names for line in found.lines(name)[ONE].values()]
        for line in lines:
            ax.plot(*zip(*sorted(line.items())), MARKERS[i] + "-" * (i == 0), **style)
        at = sorted(lines[-1].items())[-2 if i == 0 else -1]
        ax.annotate(label, at, place, textcoords="offset points", color=COLOURS[i], weight="bold")
    ax.set(xlabel=f"mean bits a weight ({len(lines)} seeds)", yscale="log")
    ax.set(ylabel="KL to the unrounded model, nats a token", title=draw.title(found, CLAIMS[0], 90))
    return fig


FIGURE = Figure("bits", CLAIMS, picture, {ONE: {}}, cell, quantised.TOY, quantised.QUICK,
                units={"": "nats a token (KL)"})  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
