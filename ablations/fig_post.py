"""
The figure of post-training: what three seeds answer after fine-tuning, and after 200 updates.

    python ablations/fig_post.py            docs/post-training.png from receipts/post/*.csv

Not here  the runs: receipts/post/commands.txt
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from post.picture import BLUE, ORANGE, SKY


def read(name):
    with open(ROOT / "receipts/post" / name, newline="") as f:
        return list(csv.DictReader(f))


def right(rows, run):
    """{(task, mode): [one share a seed]}"""
    out = {}
    for r in rows:
        if r["run"] == run:
            out.setdefault((r["task"], r["mode"]), []).append(float(r["right"]))
    return out


def mean(x):
    return sum(x) / len(x)


def main():
    rows, updates = read("answers.csv"), read("updates.csv")
    before, after = right(rows, "sft"), right(rows, "all")
    fig, (a, b) = plt.subplots(1, 2, figsize=(11, 4.3), width_ratios=(3, 2), layout="constrained")
    for i, cell in enumerate(before):
        for x, shares, colour in ((i - 0.2, before[cell], SKY), (i + 0.2, after[cell], BLUE)):
            a.bar(x, mean(shares), 0.38, color=colour)
            a.plot([x] * len(shares), shares, ".", color="black", ms=4)
    a.bar(0, 0, color=SKY, label="fine-tuned")
    a.bar(0, 0, color=BLUE, label="after 200 updates")
    a.set_xticks(range(len(before)), [f"{task}\n{mode}" for task, mode in before])
    gain = mean([mean(after[c]) - mean(before[c]) for c in before])
    won = sum(mean(after[c]) > mean(before[c]) for c in before)
    a.set(ylabel="share right, held out", ylim=(0, 1.05))
    a.set_title(
        f"Practice lifts {won} of {len(before)} kinds of answer, {100 * gain:.0f} points on average"
    )
    a.legend(frameon=False)
    for seed, colour in zip("012", (BLUE, ORANGE, SKY)):
        made = [r for r in updates if r["seed"] == seed]
        reward, n = [float(r["reward"]) for r in made], 20
        step = [int(r["step"]) for r in made][n - 1 :]
        smooth = [mean(reward[i : i + n]) for i in range(len(reward) - n + 1)]
        b.plot(step, smooth, color=colour, label=f"seed {seed}")
    share = sum(float(r["generating"]) for r in updates)
    share /= share + sum(float(r["updating"]) for r in updates)
    b.set(xlabel="update", ylabel=f"reward in practice, mean of {n} updates")
    b.set_title(f"{share:.0%} of an update is generation")
    b.legend(frameon=False)
    fig.savefig(ROOT / "docs/post-training.png", dpi=120)


if __name__ == "__main__":
    main()
