"""
Does practice in one environment cost what was known of the others?

Claim     reinforcement learning in single environments made others worse, so all of them are
          practised at once
          arXiv:2604.12374 section 3.2

Varied    what 200 updates of GRPO practise: four tasks at once, `third` alone, or `sort` alone
Equal     the fine-tuned model of a seed, updates, replies an update, 700 held-out questions on all
          four tasks

Here      0.3 M parameters, where one task has much less room beside another than in a large model:
          the effect should be larger here, if anything. `third` is asked in four of the seven
          kinds of question. Six seeds. Of one, on a crowded machine, the fine-tuned model took 59
          CPU seconds; the others found it: `third` took 113, all tasks some 140 (196 with it). With
          `sort` between them six seeds come to 45 minutes. The rows are those of receipts/post,
          where the commands are: made before the lab, no seconds. Another processor sums in another
          order and answers otherwise: .621, .690, .671 right (seed 0; fine-tuned, all, third), not
          .631, .654, .650; with AVX2's instructions on that same processor the first is .630
"""

from ablations import chain, draw
from ablations.lab import Claim, Figure, main

BEFORE, ALL, THIRD, SORT = "fine-tuned", "all tasks", "third alone", "sort alone"
WHERE = "arXiv:2604.12374 section 3.2", "practice in one environment alone costs the others"
CLAIMS = (
    Claim("Practice on all tasks answers more right, over all of them, than on one (third)",
          *WHERE, ALL, THIRD, "right"),
    Claim("Practice on all tasks answers more right, over all of them, than on one (sort)",
          *WHERE, ALL, SORT, "right"),
    Claim("Practice on third alone costs what was known of sort",
          *WHERE, BEFORE, THIRD, "sort off"),
)  # fmt: skip
FIGURE = Figure(
    name="environments",
    claims=CLAIMS,
    draw=lambda found: draw.paired(found, "sort off", BEFORE, "share of “sort” right", CLAIMS[2]),
    variants={
        BEFORE: {},
        ALL: dict(practice=chain.ALL),
        THIRD: dict(practice="third"),
        SORT: dict(practice="sort"),
    },
    units={"sort off": "of the share right"},
    cell=chain.answers,
    base=chain.SETTINGS,
    quick=chain.QUICK,
    seeds=tuple(range(6)),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
