"""
The pictures of post-training: what a run answers as it learns, from its log.csv and answers.csv.

Not here  anything that is not on disk already: a picture can always be drawn again
"""

import disk
from plot import STYLE, plt, sheet

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
COLOURS = dict(sort=BLUE, third=ORANGE, make=GREEN, call=RED)
LINES = dict(on="-", off=":", low="--", budget="-.")


def cells(rows):
    """(task, mode) of the columns `task-mode-right`."""
    names = [k.removesuffix("-right") for k in rows[0] if k.endswith("-right")]
    return [tuple(n.split("-")) for n in names]


def answers(axis, rows):
    """Share of right answers against steps, a line for each task and mode."""
    for task, mode in cells(rows):
        seen = [r for r in rows if r.get(f"{task}-{mode}-right", "") != ""]
        step, right = [r["step"] for r in seen], [r[f"{task}-{mode}-right"] for r in seen]
        axis.plot(step, right, LINES[mode], color=COLOURS[task], label=f"{task}, {mode}", lw=1.6)
    axis.set(xlabel="step", ylabel="held-out answers, share right", ylim=(0, 1.02))
    below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
    axis.legend(frameon=False, fontsize=9, **below)


def save(fig, path):
    disk.write(path, lambda f: fig.savefig(f, format="png", dpi=120))


@plt.rc_context(STYLE)
def sft(folder):
    """answers.png of a run of sft.py."""
    rows = disk.read_log(folder / "log.csv")
    fig, (a, b) = sheet(1, 2, figsize=(11, 4.6))
    step = [r["step"] for r in rows]
    a.plot(step, [r["train_nats"] for r in rows], color=BLUE, label="next token")
    for k, colour in ((1, SKY), (2, PURPLE)):
        if f"mtp{k}_nats" in rows[0]:
            a.plot(step, [r[f"mtp{k}_nats"] for r in rows], color=colour, lw=1, label=f"MTP {k}")
    a.set(xlabel="step", ylabel="nats per learned token", yscale="log", title="Loss")
    a.legend(frameon=False)
    answers(b, rows)
    last = [r for r in rows if any(k.endswith("-right") and r[k] != "" for k in r)][-1]
    right = {c: last[f"{c[0]}-{c[1]}-right"] for c in cells(rows)}
    best, worst = max(right, key=right.get), min(right, key=right.get)
    b.set(
        title=f"{best[0]} ({best[1]}) ends {right[best]:.0%} right, {worst[0]} {right[worst]:.0%}"
    )
    save(fig, folder / "answers.png")


def grpo(folder):
    """answers.png of a run of grpo.py."""
    save(practice(disk.read_log(folder / "log.csv")), folder / "answers.png")


def ends(reward):
    """How many updates a mean is over, and the first and the last of these means."""
    n = max(1, min(10, len(reward) // 4))
    return n, sum(reward[:n]) / n, sum(reward[-n:]) / n


@plt.rc_context(STYLE)
def practice(rows):
    """The reward of every update, and the answers at each evaluation -> a figure."""
    fig, (a, b) = sheet(1, 2, figsize=(11, 4.6))
    made = [r for r in rows if r["step"]]  # row 0 is the evaluation before
    step, reward = [r["step"] for r in made], [r["reward"] for r in made]
    n, first, last = ends(reward)
    smooth = [sum(reward[max(0, i - n + 1) : i + 1]) / min(n, i + 1) for i in range(len(made))]
    a.plot(step, reward, color=SKY, lw=0.8, label="a step")
    a.plot(step, smooth, color=BLUE, label=f"mean of {n}")
    a.set(xlabel="update", ylabel="reward", title=f"Reward in practice: {first:.2f} to {last:.2f}")
    a.legend(frameon=False)
    answers(b, rows)
    seen = [r for r in rows if any(k.endswith("-right") and r[k] != "" for k in r)]
    mean = [sum(r[f"{t}-{m}-right"] for t, m in cells(rows)) / len(cells(rows)) for r in seen]
    b.set(title=f"Held out, mean of all: {mean[0]:.2f} before, {mean[-1]:.2f} after")
    return fig
