"""
Does sharing one MTP block between two depths make deep drafts stand longer? The report's claim, on
the toy.

    python ablations/fig_mtp.py           trains what is lacking (9 runs of 5 minutes), measures
    python ablations/fig_mtp.py --draw    only the picture, from receipts/mtp/acceptance.csv

    shared2     one block trained at 2 depths (the release)
    shared1     one block trained at 1 depth
    separate2   two blocks, one a depth; the second drafts on from index 3

Every variant drafts 7 tokens behind the same 64-token prompts from the validation split, at
temperature 1 (at temperature 0 a toy soon repeats itself, and anything predicts that). Rate k: of
the drafts k whose forerunners stood, the share that stood. Writes receipts/mtp/acceptance.csv and
docs/mtp.png.

Sources   arXiv:2604.12374 section 2.1.2 (the claim), figure 4 (the released models, draft length 7)
"""

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import data
import heal
import plot
import sample
import train

TABLE, PICTURE = ROOT / "receipts" / "mtp" / "acceptance.csv", ROOT / "docs" / "mtp.png"
# What the default run was when the receipts were made; it has other experts and another start now.
TOY = (
    "n_routed_experts=16,num_experts_per_tok=4,moe_shared_expert_intermediate_size=256,"
    "routed_scaling_factor=2.5,initializer_range=0.04,"
)
THEN = dict(steps=450, batch=16, length=128, lr=4e-3, lr_min=4e-5, eval_every=150, save_every=50)
VARIANTS = dict(
    shared2=("", "one block,\n2 depths"),
    shared1=("mtp_num_layers=1", "one block,\n1 depth"),
    separate2=("num_nextn_predict_layers=2", "two blocks,\none a depth"),
)


def measure(path, name, seed):
    """Rows of the CSV for one run: with the draft cache and without."""
    model, enc, step = sample.load_run(path)
    val = data.encode(enc, data.corpus(checkpoint.read(path)["run"]["data"]).val)
    for remember in (True, False):
        t = heal.acceptance(model, val, 7, 32, 128, 1.0, seed=0, remember=remember)
        for k in range(1, 8):
            yield dict(
                variant=name,
                seed=seed,
                steps=step,
                cache=int(remember),
                index=k,
                reached=t.reached[k],
                stood=t.stood[k],
                rate=round(t.stood[k] / max(1, t.reached[k]), 4),
                mean_accepted=round(t.tokens / t.rounds, 4),
            )


def pooled(rows, name):
    """All seeds together, with the draft cache: draft, rate, half of its 95 % interval."""
    for k in range(1, 8):
        mine = [r for r in rows if (r["variant"], r["cache"], r["index"]) == (name, 1, k)]
        tried = sum(r["reached"] for r in mine)
        rate = sum(r["stood"] for r in mine) / tried
        yield k, rate, 1.96 * math.sqrt(rate * (1 - rate) / tried)


def lengths(rows, name, cache):
    """Tokens a round of each seed."""
    key = (name, cache, 1)
    return [r["mean_accepted"] for r in rows if (r["variant"], r["cache"], r["index"]) == key]


def verdict(rows):
    """The title: how much longer the shared block's drafts stand, if all its seeds say so."""
    mine, *others = (lengths(rows, name, 1) for name in VARIANTS)
    if any(min(mine) <= max(other) for other in others):
        return "Sharing makes no difference that seeds do not"
    more = [100 * (statistics.mean(mine) / statistics.mean(other) - 1) for other in others]
    return f"A block shared by two depths drafts {min(more):.0f} to {max(more):.0f} % longer"


def parted(rows):
    """The other title: at which drafts the shared block's band is above both others."""
    bands = [list(pooled(rows, name)) for name in VARIANTS]
    apart = [
        str(one[0])
        for one, *others in zip(*bands)
        if all(one[1] - one[2] > other[1] + other[2] for other in others)
    ]
    if not apart:
        return "Acceptance by draft: the 95 % bands nowhere part"
    return "Its later drafts stand more often: the 95 % bands part at " + ", ".join(apart)


def draw_lengths(ax, rows):
    for i, name in enumerate(VARIANTS):
        for cache, fill in ((1, plot.COLOURS[i]), (0, "white")):
            got = lengths(rows, name, cache)
            style = dict(color=plot.COLOURS[i], mfc=fill, mew=1.5, ms=8)
            ax.plot(got, [i] * len(got), plot.MARKERS[i], **style)
            place = (statistics.mean(got), i - 0.22)
            ax.text(*place, f"{place[0]:.2f}", color=plot.COLOURS[i], ha="center", weight="bold")
    ax.set_yticks(range(len(VARIANTS)), [label for _, label in VARIANTS.values()])
    ax.set(xlabel="tokens a round, of 8", ylim=(len(VARIANTS) - 0.5, -0.6), title=verdict(rows))
    ax.text(0.5, 0.02, "full: with a draft cache\nhollow: without one", transform=ax.transAxes,
            ha="center", color="0.3", size=11)  # fmt: skip


def draw_rates(ax, rows):
    ends = []
    for i, (name, (_, label)) in enumerate(VARIANTS.items()):
        at, rates, half = zip(*pooled(rows, name))
        colour = plot.COLOURS[i]
        low, high = ([r + sign * h for r, h in zip(rates, half)] for sign in (-1, 1))
        ax.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
        ax.plot(at, rates, plot.MARKERS[i] + "-", color=colour, lw=2, ms=6)
        ends.append((rates[-1], label, colour))
    ax.set(xlabel="draft", ylabel="accepted / tried, seeds pooled", title=parted(rows))
    plot.name_ends(ax, ends, gap=0.16)


def draw(rows, out):
    with plot.plt.rc_context(plot.STYLE):
        fig, (a, b) = plot.plt.subplots(2, 1, figsize=(10, 7), height_ratios=(4, 5))
        draw_lengths(a, rows)
        draw_rates(b, rows)
        plot.save(fig, out)


def read():
    """The rows of the table, numbers as numbers."""
    with open(TABLE, newline="") as f:
        rows = list(csv.DictReader(f))
    return [{k: v if k == "variant" else float(v) for k, v in r.items()} for r in rows]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("--runs", default="runs", help="where the run folders are, or will be")
    p.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    p.add_argument("--draw", action="store_true", help="only the picture, from the table")
    a = p.parse_args(argv)
    if a.draw:
        return draw(read(), PICTURE)
    sample.quicken()
    rows = []
    for seed in range(a.seeds):
        for name, (changes, _) in VARIANTS.items():
            run = train.Run(
                name=f"{name}-{seed}",
                out=a.runs,
                model=TOY + changes,
                seed=seed,
                threads=1,
                prompt="",
                worth=False,
                **THEN,
            )
            if not checkpoint.steps(run.folder()):
                train.fit(run)
            rows += measure(run.folder(), name, seed)
            last = [r for r in rows[-14:] if r["index"] < 8]
            for r in (last[:7], last[7:]):
                print(
                    f"{name:10} seed {seed} {'cache   ' if r[0]['cache'] else 'no cache'} accepted "
                    f"{r[0]['mean_accepted']:.3f}   " + " ".join(f"{x['rate']:.3f}" for x in r),
                    flush=True,
                )
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with open(TABLE, "w", newline="") as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)
    draw(rows, PICTURE)


if __name__ == "__main__":
    main()
