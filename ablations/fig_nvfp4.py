"""
What four bits cost, and which ingredient of the recipe pays for itself: the same small model,
trained eight ways.

    python ablations/fig_nvfp4.py            trains what is missing, then writes table and picture
    python ablations/fig_nvfp4.py --draw     only the picture, from receipts/nvfp4

Every variant starts from the same weights and sees the same batches for a seed; three seeds. The
gap of a variant is its validation loss over that of fp32 with the same seed, minus one; the spread
is the gap's standard deviation.

Sources   after arXiv:2509.25149 figures 4 to 6, there 12 and 8 G parameters; here some 0.2 M,
          minutes on one core
Not here  the late effects: those runs differ after hundreds of billions of tokens, these see
          154 thousand
"""

import csv
import functools
import math
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import plot
import train

VARIANTS = {
    "fp32": "fp32",
    "nvfp4": "the recipe",
    "nvfp4-2d": "without 16x16 weights",
    "nvfp4-rht": "without the rotation",
    "nvfp4-sr": "without stochastic rounding",
    "nvfp4-last": "without fp32 last layers",
    "nvfp4-2d-rht-sr-last": "without all four",
    "mxfp4": "MXFP4 instead",
}
SEEDS, STEPS = (0, 1, 2), 300
MODEL = (
    "hybrid_override_pattern=ME*EME,hidden_size=64,num_attention_heads=2,num_key_value_heads=1,"
    "mamba_num_heads=4,ssm_state_size=16,n_routed_experts=8,num_experts_per_tok=2,moe_latent_size=32,"
    "moe_intermediate_size=64,moe_shared_expert_intermediate_size=128,num_nextn_predict_layers=0,"
    "routed_scaling_factor=2.5,initializer_range=0.04"
)
TABLE, PICTURE = ROOT / "receipts" / "nvfp4" / "ablation.csv", ROOT / "docs" / "nvfp4-ablation.png"


def rows():
    if not TABLE.is_file():
        return []
    with open(TABLE, newline="") as f:
        return [
            dict(r, seed=int(r["seed"]), val_nats=float(r["val_nats"])) for r in csv.DictReader(f)
        ]


def measure():
    """One line of the table a run, written as soon as the run is over."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    for name in ("corpus", "encode"):  # read and encoded once, not 24 times
        setattr(data, name, functools.cache(getattr(data, name)))
    done = {(r["precision"], r["seed"]) for r in rows()}
    for seed in SEEDS:
        for precision in VARIANTS:
            if (precision, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as out:
                run = train.Run(
                    out=out,
                    model=MODEL,
                    tokenizer="bytes",
                    steps=STEPS,
                    batch=8,
                    length=64,
                    worth=False,
                    seed=seed,
                    lr=4e-3,
                    precision=precision,
                    eval_every=STEPS,
                    save_every=STEPS,
                    log_every=100,
                    eval_tokens=32768,
                    prompt="",
                    device="cpu",
                    threads=1,
                )
                log = train.fit(run, say=lambda line: None)[1]
                facts = (run.folder() / "config.json").read_text().replace(out, "runs")
                TABLE.with_name("config.json").write_text(facts)
            first = not TABLE.is_file()
            with open(TABLE, "a", newline="") as f:
                table = csv.writer(f, lineterminator="\n")
                if first:
                    table.writerow(["precision", "seed", "steps", "train_nats", "val_nats"])
                table.writerow(
                    [
                        precision,
                        seed,
                        STEPS,
                        f"{log[-1]['train_nats']:.6f}",
                        f"{log[-1]['val_nats']:.6f}",
                    ]
                )
            print(precision, seed, log[-1]["val_nats"], flush=True)


def gaps(base):
    """{precision: [gap of each seed]}: loss above that of `base` with the same seed, in percent of
    it.
    """
    loss = {(r["precision"], r["seed"]): r["val_nats"] for r in rows()}
    seeds = [seed for p, seed in loss if p == base]
    found = {
        p: [100 * (loss[p, s] / loss[base, s] - 1) for s in seeds if (p, s) in loss]
        for p in VARIANTS
        if p != base
    }
    return {p: g for p, g in found.items() if len(g) > 1}


def interval(g):
    """Mean, and half of its 95 % interval (Student's t)."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(g), 2.6)
    return statistics.mean(g), t * statistics.stdev(g) / math.sqrt(len(g))


def draw_gaps(ax, found, words):
    """A row a variant: its seeds, their mean, and the mean's interval."""
    for i, (p, g) in enumerate(found.items()):
        mean, half = interval(g)
        colour = plot.COLOURS[0] if abs(mean) <= half else plot.COLOURS[1]
        ax.plot([mean - half, mean + half], [i, i], color=colour, lw=7, alpha=0.25)
        ax.plot([mean], [i], "|", color=colour, ms=20, mew=3)
        for marker, y in zip(plot.MARKERS, g):
            ax.plot([y], [i], marker, color="0.25", ms=6, mfc="none", mew=1.3)
        print(f"{p:24}{words[p]:30}{mean:+7.2f} % +- {statistics.stdev(g):.2f}   {len(g)} seeds")
    ax.axvline(0, color="k", lw=1)
    ax.set_yticks(range(len(found)), [words[p] for p in found])
    ax.set(ylim=(len(found) - 0.5, -0.5))


def draw():
    """Above: what formats cost against fp32. Below: what leaving an ingredient out of the recipe
    does, paired by seed.
    """
    cost = {p: g for p, g in gaps("fp32").items() if p in ("nvfp4", "mxfp4")}
    apart = {p: g for p, g in gaps("nvfp4").items() if p.startswith("nvfp4-")}
    known = [VARIANTS[p] for p, g in apart.items() if abs(interval(g)[0]) > interval(g)[1]]
    count = f"{statistics.mean(cost['nvfp4']):.1f} %"
    with plot.plt.rc_context(plot.STYLE):
        sizes = dict(figsize=(10, 6.4), height_ratios=(2, 5))
        fig, (a, b) = plot.plt.subplots(2, 1, **sizes)
        draw_gaps(a, cost, VARIANTS | dict(nvfp4="NVFP4, the recipe", mxfp4="MXFP4"))
        a.set(title=f"Four bits cost {count} of the loss", xlabel="loss above fp32's, percent")
        draw_gaps(b, apart, VARIANTS)
        b.set(
            title="What is worth its place here: " + ", ".join(known)
            if known
            else "At 0.2 M parameters no ingredient can be told from none",
            xlabel="loss above the recipe's with the same seed, percent\n"
            "(outlines: three seeds; bar: 95 % interval of their mean)",
        )
        plot.save(fig, PICTURE)


if __name__ == "__main__":
    if "--draw" not in sys.argv[1:]:
        measure()
    draw()
