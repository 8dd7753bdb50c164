"""
What does a stage of long texts do to short ones, and do short batches between the long ones mend
it?

Claim     after the long-context stage short benchmarks lose a little, and alternating long batches
          with short ones repairs it
          arXiv:2604.12374, section 2.6

Varied    what follows 200 steps of 8 x 64 bytes: nothing; 80 steps of 2 x 512; or of 2 x 512 and
          16 x 64 in turn
Equal     the first stage, bit for bit; of the two long stages steps, tokens a step, learning rate
          (4e-4, constant)

Here      eight times the length, where the report has a hundred times. In rows of 512 one byte in
          eight has fewer than 64 behind it, so that the short case is practised less: that
          survives any shrinking. But the stage also is more training, which a model so young needs
"""

from dataclasses import replace

import train
from ablations import draw, small
from ablations.fig_positions import losses
from ablations.lab import Claim, Figure, main
from training.pretrain import Text

SHORT, LONG = 64, 512


class InTurn(Text):
    """Every second batch has rows of SHORT tokens, as many tokens in all."""

    def batch(self, step, world):
        long = self.run
        if step % 2 == 0:
            rows = long.batch * long.length // SHORT
            self.run = replace(long, length=SHORT, batch=rows)
        made = super().batch(step, world)
        self.run = long
        return made


def cell(settings, seed):
    """Nats of a byte with fewer than 64 before it, and with 256 to 512."""
    own = dict(settings)
    stage, more, rate = (own.pop(name) for name in ("stage", "more", "rate"))
    with small.trained(own, seed) as run:
        model = run.model
        if stage:
            end = own["steps"] + more
            rates = dict(lr=rate, lr_min=rate, decay=0.0)
            rows = dict(batch=2, length=LONG, eval_every=end, save_every=end)
            again = replace(run.settings, resume=True, steps=end, **rates, **rows)
            work = InTurn() if stage == "mixed" else Text()
            model, _ = train.fit(again, say=lambda line: None, work=work)
        short, long = losses(model, SHORT, 512), losses(model, LONG, 96)
    return dict(short=float(short.mean()), long=float(long[LONG // 2 :].mean()))


BEFORE, ALONE, MIXED = "no second stage", "long batches", "long and short in turn"
WHERE = "arXiv:2604.12374, section 2.6"
CLAIMS = (
    Claim("Short batches in the long stage leave short texts a lower loss",
          WHERE, "they repair a small loss on benchmarks", ALONE, MIXED, "short"),
    Claim("A stage of long batches alone makes short texts worse than before it",
          WHERE, "a small loss on benchmarks", ALONE, BEFORE, "short",
          reason="A model of 200 steps is far from done, and 80 more of any kind make it better"),
    Claim("The mixed stage makes long texts better than before it",
          WHERE, "that is what the stage is for", BEFORE, MIXED, "long"),
    Claim("Long batches alone make long texts better than the mixed stage does",
          WHERE, "not stated", MIXED, ALONE, "long",
          reason="What this model lacks is practice with text as such: 18 independent rows in two "
          "steps show it more than 4 long ones, and it makes little of a far context yet"),
)  # fmt: skip


FIGURE = Figure(
    name="long",
    base=small.BYTES | dict(steps=200, stage="", more=80, rate=4e-4),
    variants={BEFORE: {}, ALONE: dict(stage="long"), MIXED: dict(stage="mixed")},
    quick=dict(steps=40, more=16),
    units=dict(short="nats a byte", long="nats a byte"),
    cell=cell,
    claims=CLAIMS,
    draw=lambda found: draw.paired(
        found, "short", MIXED, "nats a byte with fewer than 64 before it"
    ),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
