"""
Does the loss that four bits cost grow when the learning rate falls, and does going back to high
precision in time give it back?

Claim     NVFP4's loss is less than 1 % above the high-precision run's while the learning rate is
          up and 1.5 % above it at the end of the decay; a run that returns to high precision when
          the decay begins ends 0.5 % above. Experts' weight gradients hold exact zeros
          arXiv:2509.25149 figures 2 and 3, appendix D; arXiv:2604.12374 figure 6

Varied    the precision: fp32, NVFP4, or NVFP4 up to the decay and fp32 in it
Equal     weights, batches, 400 steps, of which the last 30 % decay

Here      the gap's cause is the format's noise, which a small model has too. That it widens in the
          decay should survive: while the rate is up the steps' own noise hides the rounding's
"""

import math
import statistics
from dataclasses import replace

import train
from ablations import draw, small
from ablations.lab import Claim, Figure, main
from plot import COLOURS, MARKERS, sheet


def cell(settings, seed):
    """Nats before and after the decay, the log of their ratio, and the share of exact zeros in the
    matrices' gradients while the rate is up."""
    own = dict(settings)
    late, up = own.pop("late"), round(own["steps"] * (1 - own["decay"]))
    own |= dict(stop=up, eval_every=up, save_every=up, diagnose=True)
    with small.trained(own, seed) as run:
        before, zeros = small.last(run.log, "val_nats"), [r["zero_gradients"] for r in run.log]
        how = dict(stop=0, precision=late or own["precision"], eval_every=own["steps"])
        log = train.fit(replace(run.settings, resume=True, **how), say=lambda line: None)[1]
    after = small.last(log, "val_nats")
    zeros = statistics.mean(zeros[len(zeros) // 2 :])
    return dict(before=before, after=after, ratio=math.log(after / before), zeros=zeros)


PAPER = "arXiv:2509.25149, "
FP32, FOUR, BACK = "fp32", "NVFP4", "NVFP4, fp32 in the decay"
CLAIMS = (
    Claim("NVFP4 costs more of the loss after the decay than before it",
          PAPER + "figure 2", "below 1 %, then 1.5 %", FOUR, FP32, "ratio"),
    Claim("NVFP4 costs loss while the learning rate is up",
          PAPER + "figure 2", "below 1 %", FOUR, FP32, "before"),
    Claim("NVFP4 costs loss at the end",
          PAPER + "figure 2", "1.5 %", FOUR, FP32, "after"),
    Claim("Going back to high precision for the decay gives some of it back",
          PAPER + "appendix D", "1.5 % becomes 0.5 %", FOUR, BACK, "after"),
    Claim("In four bits more of the gradients are exactly zero",
          "arXiv:2604.12374, figure 6", "7 % of the experts'", FOUR, FP32, "zeros"),
)  # fmt: skip


def picture(found):
    """What a variant's loss is above fp32's of the same seed, before and after the decay."""
    fig, ax = sheet(figsize=(10, 4.6))
    for i, variant in enumerate((FOUR, BACK)):
        gaps = []
        for measure in ("before", "after"):
            values = found.values(measure)
            both = values[variant].keys() & values[FP32].keys()
            gaps.append([100 * (values[variant][s] / values[FP32][s] - 1) for s in sorted(both)])
        at = [0.06 * i, 1 + 0.06 * i]
        style = dict(color=COLOURS[i], lw=3, ms=10, label=variant)
        ax.plot(at, [statistics.mean(g) for g in gaps], MARKERS[i] + "-", **style)
        for pair in zip(*gaps):
            ax.plot(at, pair, "-", color=COLOURS[i], lw=1, alpha=0.5)
    draw.published(ax, [0, 1], [1.0, 1.5], "12 G: below 1 %, then 1.5 %")
    ax.axhline(0, color="k", lw=1)
    ax.set_xticks([0, 1], ["learning rate up", "after the decay"])
    ax.margins(y=0.12)
    ax.set(xlim=(-0.2, 1.6), ylabel="validation loss above fp32's, percent")
    ax.set_title(draw.title(found, CLAIMS[0], 90))
    ax.legend(frameon=False, loc="upper left")
    return fig


UNITS = {"zeros": "of all gradients", "ratio": "of ln(loss), 0.01 is 1 %", "": "nats a byte"}
FIGURE = Figure(
    name="fourbit_phases",
    base=small.BYTES | dict(steps=400, late=""),
    variants={
        FP32: {},
        FOUR: dict(precision="nvfp4"),
        BACK: dict(precision="nvfp4", late="fp32"),
    },
    quick=dict(steps=60),
    units=UNITS,
    cell=cell,
    claims=CLAIMS,
    draw=picture,
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
