"""
What does thinking buy, and what does a second stage of fine-tuning that counts every conversation
alike?

Claim     the more a model may think, the more it gets right, smoothly
          the Nemotron 3 white paper (arXiv:2512.20856), figure 8
          low effort is shorter at similar accuracy; a second stage with the mean over conversations
          mends short answers, which the mean over tokens neglects
          arXiv:2604.12374, section 3.1

Varied    tokens of thinking, by the prompt alone; or whether the last 60 of 300 steps of
          fine-tuning are stage 2
Equal     questions, held out, 100 of each kind; weights for thinking, those after 200 updates of
          GRPO on four tasks; for the stages everything else

Here      0.3 M parameters and tasks that a program judges; `third` (the third smallest digit) is
          the one with a use for thought. Six seeds, three minutes a cell at most, 54 in all. The
          rows are those of receipts/post, where the commands are: made before the lab, no seconds
"""

import statistics

from ablations import chain, draw
from ablations.lab import Claim, Figure, main
from plot import COLOURS, MARKERS, sheet

ONE, TWO, PRACTISED = "one stage", "two stages", "after 200 updates"
OFF, LOW, THREE, ON = "third off", "third low", "third budget", "third on"  # 0, 2, 3, 5 to 8 tokens
SHORT, LONG = "third off", "call off"  # answers of 2 tokens, of 27
PAPER, REPORT = "arXiv:2512.20856, figure 8", "arXiv:2604.12374, section 3.1"


def thought(says, more, less, reason=""):
    rises = PAPER, "accuracy rises with the budget", PRACTISED, PRACTISED
    return Claim(says, *rises, more, than=less, reason=reason)


CLAIMS = (
    thought("Three tokens of thought get more right than none", THREE, OFF),
    thought("Two tokens of thought get more right than none", LOW, OFF),
    thought("All the thought there is gets more right than three tokens of it", ON, THREE,
            "The third smallest digit is the third token of the thought, so that three tokens "
            "hold the answer, and every later one is a chance to err"),
    Claim("A reply of full effort is longer than one of low effort",
          REPORT, "low effort is shorter at similar accuracy", PRACTISED, PRACTISED,
          ON + ", tokens", than=LOW + ", tokens"),
    Claim("A second stage that counts conversations alike gets more short answers right",
          REPORT, "it mends long inputs with short outputs", TWO, ONE, SHORT),
    Claim("One stage that counts tokens alike gets more long answers right",
          REPORT, "the mean over tokens follows the long ones", ONE, TWO, LONG),
)  # fmt: skip


def budgets(ax, found):
    """Right answers against tokens, a line a seed and their mean."""
    column = lambda name: found.values(name)[PRACTISED]
    kinds = [(column(f"{kind}, tokens"), column(kind)) for kind in (OFF, LOW, THREE, ON)]
    lines = [[(xs[seed], ys[seed]) for xs, ys in kinds] for seed in sorted(kinds[0][0])]
    for seed, line in enumerate(lines):
        ax.plot(*zip(*line), MARKERS[seed] + "-", color=COLOURS[seed], lw=0.8, ms=5)
    mean = [tuple(map(statistics.mean, zip(*points))) for points in zip(*lines)]
    ax.plot(*zip(*mean), "k-", lw=3)
    ax.set(xlabel="tokens a reply, thought and answer", ylabel="share right, held out")
    ax.set_title(draw.title(found, CLAIMS[0], 50))
    ax.text(0.98, 0.03, f"{len(lines)} seeds, and their mean", transform=ax.transAxes, ha="right")


def picture(found):
    """Left: right answers against tokens. Right: what the second stage changes."""
    fig, (a, b) = sheet(1, 2, figsize=(11, 4.6), width_ratios=(1.2, 1))
    budgets(a, found)
    for i, kind in enumerate((SHORT, LONG)):
        one, two = (found.values(kind)[v] for v in (ONE, TWO))
        for seed in sorted(one):
            b.plot(two[seed] - one[seed], i, MARKERS[seed], color=COLOURS[seed], ms=9)
    b.axvline(0, color="k", lw=1)
    b.set_yticks([0, 1], ["answers of\n2 tokens", "answers of\n27 tokens"])
    b.set(ylim=(1.5, -0.5), xlabel="share right: two stages minus one")
    b.set_title(draw.title(found, CLAIMS[-2], 34))
    return fig


VARIANTS = {ONE: {"sft.stage2": 0}, TWO: {}, PRACTISED: dict(practice=chain.ALL)}
UNITS = {ON + ", tokens": "tokens a reply", "": "of the share right"}
FIGURE = Figure("answers", CLAIMS, picture, VARIANTS, chain.answers, chain.SETTINGS, chain.QUICK,
                tuple(range(6)), units=UNITS)  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
