"""
A Mamba state kept in few bits: what drifts, the longer a head remembers?

Claim     states in FP16 rounded to the nearest make answers longer, rounded at random they do not;
          eight bits cost more in FP8 than in INT8
          arXiv:2604.12374 section 4.3, table 8, and the Nemotron 3 Ultra report, table 16

Varied    the format of the state and how it is rounded; the tokens that a head remembers
Equal     the inputs, 4,096 tokens, three draws; five Philox rounds wherever rounding is random

Here      one head, a = exp(-1/n), against itself in fp32: the error of the state, not the length of
          answers, which a model of these sizes does not write. The arithmetic does not shrink. Of
          inputs of either sign FP16 hardly drifts: that these are of one sign was chosen knowing
          the published effect
"""

import plot
from ablations import draw
from ablations.lab import Claim, Figure, main
from quant import statecache

VARIANTS = {
    "FP16, nearest": "fp16",
    "FP16, at random": "fp16:5",
    "BF16, nearest": "bf16",
    "INT16, at random": "int16:5",
    "INT8, nearest": "int8",
    "INT8, at random": "int8:5",
    "FP8, nearest": "fp8",
    "FP8, at random": "fp8:5",
}
DRAWN = "FP16, nearest", "FP16, at random", "BF16, nearest", "INT8, at random", "FP8, at random"


def cell(settings, seed):
    """Relative error of the state, and its bias, by the tokens that the head remembers."""
    kind, _, rounds = settings["format"].partition(":")
    found = dict(error=[], bias=[])
    for memory in settings["memories"]:  # one after the other: side by side they share out noise
        how = kind, int(rounds) if rounds else None, [memory], settings["tokens"]
        (measured,) = statecache.drifts(*how, seed=seed)
        for name, y in zip(found, measured):
            found[name].append((memory, y))
    return found | {f"error, memory {memory:,}": y for memory, y in found["error"]}


EIGHT = "arXiv:2604.12374 table 8"
LONGER = "FP16 to the nearest: answers longer by 37 to 40 %; at random: by none"


def claim(says, where, published, more, less, memory, reason=""):
    return Claim(says, where, published, more, less, f"error, memory {memory}", reason=reason)


CLAIMS = (
    claim("FP16 to the nearest errs more than at random, memory 10,000 tokens",
          EIGHT, LONGER, "FP16, nearest", "FP16, at random", "10,000"),
    claim("FP16 to the nearest errs more than at random, memory 100 tokens",
          EIGHT, LONGER, "FP16, nearest", "FP16, at random", "100",
          "Random rounding errs more in one step, and 100 tokens add up to few."),
    claim("FP8 at random errs more than INT8 at random, memory 1,000 tokens",
          "the Ultra report, table 16", "verbosity +3.95 % against +2.03 %",
          "FP8, at random", "INT8, at random", "1,000"),
)  # fmt: skip


def picture(found):
    fig, ax = plot.sheet(figsize=(10, 5.4))
    ax.set(xscale="log", yscale="log")
    draw.curves(ax, found.only(*DRAWN), "error")
    ax.set(xlabel="tokens that a head remembers", title=draw.title(found, CLAIMS[0], 90))
    ax.set(ylabel="error of the state after 4,096 tokens, relative")
    return fig


FIGURE = Figure(
    name="state",
    claims=CLAIMS,
    draw=picture,
    variants={name: dict(format=text) for name, text in VARIANTS.items()},
    units={"": "of the state's size"},
    cell=cell,
    base=dict(memories=[10, 100, 1_000, 10_000, 100_000], tokens=4096),
    quick=dict(tokens=512),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
