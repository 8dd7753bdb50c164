"""
Are importance weights needed, if the generator is one update behind the trainer?

Claim     replies are generated with the weights of an update ago; weights truncated at 5, and a
          mask of replies that differ too much, make up for it
          arXiv:2604.12374 section 3.2

Varied    importance weights and mask, or neither
Equal     the fine-tuned model of a seed, 200 updates of GRPO on four tasks, a generator that is one
          update behind, 700 held-out questions

Here      0.3 M parameters, and one update of a small learning rate changes little: raw weights pass
          5 in 0.3 % of the updates. That is against the effect, and does not shrink with the model:
          a longer lag would be needed. Six seeds, three minutes a cell, 36 in all. The rows are
          those of receipts/post, where the commands are: made before the lab, no seconds
"""

from ablations import chain, draw
from ablations.lab import Claim, Figure, main

WITH, WITHOUT = "weights and mask", "neither"
BEHIND = {"practice": chain.ALL, "grpo.lag": 1}
FIGURE = Figure(
    name="lag",
    claims=(
        Claim(
            "One update behind, importance weights answer more right than none",
            "arXiv:2604.12374 section 3.2",
            "weights truncated at 5, and a mask, against the generator's lag",
            WITH,
            WITHOUT,
            "right",
        ),
    ),
    draw=lambda found: draw.paired(found, "right", WITHOUT, "share right, held out"),
    variants={WITH: BEHIND, WITHOUT: BEHIND | {"grpo.truncate": 0.0}},
    cell=chain.answers,
    base=chain.SETTINGS,
    quick=chain.QUICK,
    seeds=tuple(range(6)),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
