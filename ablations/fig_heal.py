"""
Does a model that practised draft worse, and does healing mend it?

Claim     reinforcement learning trains the backbone while the MTP block rests; at the end the block
          is trained again, the backbone frozen, on the model's own replies
          arXiv:2604.12374 section 3.2

Varied    what follows fine-tuning: nothing; 200 updates of GRPO; these and 128 steps of healing
Equal     the fine-tuned model of a seed; 5 drafts a round, 60 held-out questions of each of seven
          kinds, at temperature 1

Here      0.3 M parameters. A block that was fitted to another backbone is a matter of the
          backbone's change, which small models have too; the answers are short, so that a round has
          little to win. Six seeds, three minutes a cell, 60 in all. The rows are those of
          receipts/post, where the commands are: made before the lab, no seconds
"""

from ablations import chain, draw
from ablations.lab import Claim, Figure, main

BEFORE, AFTER, HEALED = "fine-tuned", "after 200 updates", "healed"
WHERE = "arXiv:2604.12374 section 3.2"
CLAIMS = (
    Claim("Practice with the MTP block at rest lowers the tokens that a round of drafts yields",
          WHERE, "the block is trained again at the end", BEFORE, AFTER, "accepted"),
    Claim("Healing raises the tokens that a round of drafts yields",
          WHERE, "a frozen backbone's block learns from its own replies",
          HEALED, AFTER, "accepted"),
)  # fmt: skip
FIGURE = Figure(
    name="heal",
    claims=CLAIMS,
    draw=lambda found: draw.paired(found, "accepted", AFTER, "tokens a round, of 6"),
    variants={
        BEFORE: {},
        AFTER: dict(practice=chain.ALL),
        HEALED: dict(practice=chain.ALL, heal=True),
    },
    cell=chain.answers,
    base=chain.SETTINGS,
    quick=chain.QUICK,
    seeds=tuple(range(6)),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
