"""
Does practice make a fine-tuned model answer more right, and does thought?

Claim     accuracy rises over the updates of reinforcement learning, in all environments at once; a
          larger budget of thought answers more right
          the Nemotron 3 white paper (arXiv:2512.20856), figures 7 and 8

Varied    what follows fine-tuning: nothing, or 200 updates of GRPO on four tasks at once; and how
          much thought the prompt allows
Equal     the fine-tuned model of a seed, 700 held-out questions, 40 tokens a reply

Here      0.3 M parameters and tasks that a program judges. The mechanism is whole: rewards, groups,
          a clipped advantage. What is small is the room for thought: `third` takes eight tokens.
          Six seeds, three minutes a cell, 36 in all. The rows are those of receipts/post, where the
          commands are: made before the lab, no seconds
"""

import statistics

from ablations import chain, draw
from ablations.lab import Claim, Figure, main
from plot import COLOURS, sheet

BEFORE, AFTER = "fine-tuned", "after 200 updates"
KINDS = "sort off", "third on", "third low", "third budget", "third off", "make off", "call off"
CLAIMS = (
    Claim("After 200 updates of practice more answers are right than before",
          "arXiv:2512.20856 figure 7", "accuracy rises over the updates", AFTER, BEFORE, "right"),
    Claim("Reasoning answers more right than answering at once",
          "arXiv:2512.20856 figure 8", "accuracy grows with the budget", AFTER, AFTER, "third on",
          than="third off"),
)  # fmt: skip


def rewards(ax, found):
    """Smoothed, a line a seed and their mean; the share of time that generation takes."""
    lines = [list(line.values()) for line in found.lines("reward")[AFTER].values()]
    n = min(20, len(lines[0]))
    smooth = [[statistics.mean(y[i : i + n]) for i in range(len(y) - n + 1)] for y in lines]
    for y in smooth:
        ax.plot(range(n, n + len(y)), y, color=COLOURS[5], lw=0.8)
    ax.plot(range(n, n + len(smooth[0])), list(map(statistics.mean, zip(*smooth))), lw=2.5)
    spent = [sum(found.values(name)[AFTER].values()) for name in ("generating", "updating")]
    ax.set(xlabel=f"update (thin: {len(lines)} seeds)", ylabel=f"reward, mean of {n} updates")
    ax.set_title(f"{spent[0] / sum(spent):.0%} of an update is generation")


def picture(found):
    """Left: the kinds of question before and after. Right: the reward."""
    fig, (a, b) = sheet(1, 2, figsize=(11, 5), width_ratios=(3, 2))
    for i, (variant, place) in enumerate(((BEFORE, -0.2), (AFTER, 0.2))):
        for x, kind in enumerate(KINDS):
            shares = list(found.values(kind)[variant].values())
            a.bar(x + place, statistics.mean(shares), 0.36, color=COLOURS[i], alpha=0.45)
            a.plot([x + place] * len(shares), shares, "o", color="0.2", mfc="none", ms=4)
        a.text(4.4, 1 - 0.06 * i, variant, color=COLOURS[i], weight="bold")
    a.set_xticks(range(len(KINDS)), [kind.replace(" ", "\n") for kind in KINDS])
    a.set(ylabel="share right, held out (outlines: seeds)", ylim=(0, 1.05))
    a.set_title(draw.title(found, CLAIMS[0], 50))
    rewards(b, found)
    return fig


FIGURE = Figure(
    name="post",
    claims=CLAIMS,
    draw=picture,
    variants={BEFORE: {}, AFTER: dict(practice=chain.ALL)},
    units={"third on": "of the share right"},
    cell=chain.answers,
    base=chain.SETTINGS,
    quick=chain.QUICK,
    seeds=tuple(range(6)),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
