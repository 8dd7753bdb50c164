"""
Can an average of checkpoints stand in for a falling learning rate, and how should the rate fall?

Claim     while the rate is up, the average of the last checkpoints beats the last one, by more the
          longer the window; after the fall it gains nothing (arXiv:2604.12374 figure 11). Merging
          even beats the fall (2507.17634). A minus-sqrt fall beats linear, cosine (2405.18392)

Varied    what happens in the last third: nothing (flat), merging, or three shapes of a fall
Equal     one run of 192 steps that all go on from; then 96 steps of the same batches, to the same
          lowest rate; the averages' coefficients imitate a minus-sqrt fall

Here      both effects are those of noise in the last steps' gradients, which a small model has too;
          but its weights still travel while they are averaged, so merging should gain less
"""

import checkpoint
from ablations import draw, small
from ablations.lab import Claim, Figure, main

ONE, SHORT, SPARSE, LONG = "one run", "4 of 24 steps", "4 of 96 steps", "16 of 96 steps"
ENDS = {"flat": "flat"} | {f"merged {w}": w for w in (SHORT, SPARSE, LONG)}
ENDS |= {f"{fall} fall": fall for fall in small.FALLS}


def cell(settings, seed):
    with small.trained(settings, seed) as made:
        run, model = made.settings, made.model
        found = {"flat": small.nats(model, run)}
        files = checkpoint.steps(run.folder())
        windows = files[-4:], files[-13::4], files[-16:]
        for name, window in zip((SHORT, SPARSE, LONG), windows):
            found[name] = small.nats(small.averaged(model, window), run)
        for fall in small.FALLS:
            model = small.decayed(run, 2 * run.steps // 3, fall)
            found[fall] = small.nats(model, run)
        late = small.averaged(model, checkpoint.steps(run.folder())[-4:])
        found["gain, flat"] = found["flat"] - found[SHORT]
        found["gain, minus-sqrt"] = found["minus-sqrt"] - small.nats(late, run)
        return found


def claim(says, where, published, more, less, reason=""):
    return Claim(says, where, published, ONE, ONE, more, than=less, reason=reason)


REPORT = "arXiv:2604.12374 figure 11", "2 to 4 points better with the rate up, none after"
WSM = "arXiv:2507.17634"
FALL = "arXiv:2405.18392", "minus-sqrt is lower"
CLAIMS = (
    claim(
        "With the rate up, the last checkpoint has a higher loss than the average of the last four",
        *REPORT,
        "flat",
        SHORT,
    ),
    claim(
        "Merging gains more while the rate is up than after its fall",
        *REPORT,
        "gain, flat",
        "gain, minus-sqrt",
    ),
    claim(
        "Four checkpoints spread over 24 steps average to a higher loss than over 96",
        WSM,
        "how long the window is matters more than how many checkpoints",
        SHORT,
        SPARSE,
    ),
    claim(
        "The decayed run ends at a higher loss than the average of 16 checkpoints",
        WSM,
        "MATH +3.5 %, HumanEval +2.9 % for merging",
        "minus-sqrt",
        LONG,
        "96 steps are a third of this run: the average is of places on the way, not around one.",
    ),
    *(
        claim(f"A {fall} fall ends at a higher loss than minus-sqrt", *FALL, fall, "minus-sqrt")
        for fall in ("linear", "cosine")
    ),
)


def picture(found):
    claim = CLAIMS[0]._replace(less=f"merged {SHORT}", more="flat", measure="loss", than="")
    return draw.paired(found.beside(ENDS), "loss", "flat", "nats a byte", claim)


FIGURE = Figure("merge", CLAIMS, picture, {ONE: {}}, cell,
                small.BYTES | dict(steps=288, decay=0.0, save_every=6), quick=dict(steps=144),
                units={"": "nats a byte"})  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
