"""
Does sharing one MTP block between two depths make deep drafts stand longer? The report's claim, on
the toy.

    python ablations/fig_mtp.py             trains what is lacking (about 5 minutes a run, 9 runs), measures, draws

    shared2     one block trained at 2 depths (the release)     shared1     one block trained at 1 depth
    separate2   two blocks, one a depth; the second drafts on from index 3

Every variant drafts 7 tokens behind the same 64-token prompts from the validation split, at
temperature 1 (at temperature 0 a toy soon repeats itself, and anything predicts that). Rate k: of
the drafts k whose forerunners stood, the share that stood. Writes receipts/mtp/acceptance.csv and
docs/mtp.png.

Sources   arXiv:2604.12374 section 2.1.2 (the claim), figure 4 (the released models, draft length 7)
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import checkpoint
import data
import heal
import sample
import train

VARIANTS = dict(
    shared2=("", "shared block, 2 depths"),
    shared1=("mtp_num_layers=1", "shared block, 1 depth"),
    separate2=("num_nextn_predict_layers=2", "separate blocks, 2 depths"),
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


def draw(rows, out):
    fig, (a, b) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2), layout="constrained")
    for i, (name, (_, label)) in enumerate(VARIANTS.items()):
        mine = [r for r in rows if r["variant"] == name]
        for seed in sorted({r["seed"] for r in mine}):
            line = sorted(
                (int(r["index"]), float(r["rate"]))
                for r in mine
                if r["seed"] == seed and int(r["cache"])
            )
            a.plot(
                *zip(*line),
                f"C{i}.-",
                lw=1,
                alpha=0.8,
                label=label if seed == mine[0]["seed"] else None,
            )
        for cache in (1, 0):
            got = [
                float(r["mean_accepted"])
                for r in mine
                if int(r["cache"]) == cache and int(r["index"]) == 1
            ]
            b.plot([2 * i + 1 - cache] * len(got), got, f"C{i}" + ("o" if cache else "x"))
    a.set(
        xlabel="draft index", ylabel="stood, of those reached", title="Acceptance, one line a seed"
    )
    a.legend(frameon=False)
    b.set(
        ylabel="tokens a round, of 8",
        title="Mean accepted length: o cache, x none",
        xticks=[0.5, 2.5, 4.5],
    )
    b.set_xticklabels([label.replace(", ", ",\n") for _, label in VARIANTS.values()])
    fig.savefig(out, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("--runs", default="runs", help="where the run folders are, or will be")
    p.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    a = p.parse_args(argv)
    sample.quicken()
    rows = []
    for seed in range(a.seeds):
        for name, (changes, _) in VARIANTS.items():
            run = train.Run(
                name=f"{name}-{seed}", out=a.runs, model=changes, seed=seed, threads=1, prompt=""
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
    out = ROOT / "receipts" / "mtp" / "acceptance.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)
    draw(rows, ROOT / "docs" / "mtp.png")


if __name__ == "__main__":
    main()
