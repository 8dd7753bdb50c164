"""
How much of what four bits cost does distillation repair?

Claim     a model quantised to four bits and then taught by its unquantised self comes close to it
          NeMo-RL's documentation of distillation after quantisation; no number is printed

Varied    steps of distillation: 0, 20 and 60, of 1,024 tokens each
Equal     the model, NVFP4 for all weights and inputs, scales by the largest number, test text

Here      a toy of 2.9 M parameters, trained for 880 steps in 6 CPU minutes a seed; a row is one
          model, measured after each. Weights can move to where rounding hurts less in a small
          model as in a large one. Judged by KL: the loss falls too, because training goes on. The
          receipts are of before the lab: no seconds
"""

from ablations import draw, quantised
from ablations.lab import Claim, Figure, main
from quant import distill, packed

ONE, NONE = "one model", "no steps"


def cell(settings, seed):
    """KL to the unrounded model before distillation, and after each number of steps."""
    with quantised.subject(settings, seed) as s:
        plan = s.uniform("NVFP4")
        low = s.quantised(plan, "max")
        found = quantised.named(NONE, s.cost(packed.rounded(low, True)))
        for steps in settings["after"]:
            given = s.model, plan, s.stats, s.more, steps, 1e-4
            learned = distill.distill(*given, say=lambda line: None)
            low = s.quantised(plan, "max", learned)
            found |= quantised.named(f"{steps} steps", s.cost(packed.rounded(low, True)))
    return found


CLAIMS = (
    Claim(
        "Four bits cost more than after 60 steps of distillation",
        "NeMo-RL's documentation of distillation after quantisation",
        "no number",
        ONE,
        ONE,
        NONE,
        than="60 steps",
    ),
)


def picture(found):
    beside = found.beside({name: name for name in (NONE, "20 steps", "60 steps")})
    first = CLAIMS[0]._replace(more=NONE, less="60 steps", measure="loss", than="")
    return draw.paired(beside, "loss", NONE, "KL, nats a token", first, percent=True)


FIGURE = Figure(
    name="distill",
    claims=CLAIMS,
    draw=picture,
    variants={ONE: {}},
    units={"": "nats a token (KL)"},
    cell=cell,
    base=quantised.TOY | dict(after=[20, 60]),
    quick=quantised.QUICK,
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
