"""
What four bits cost, and which ingredient of the recipe pays for itself: the same small model,
trained eight ways.

    python ablations/fig_nvfp4.py            trains what is missing, then writes the table and the picture again
    python ablations/fig_nvfp4.py --draw     only the latter, from what is there

Every variant starts from the same weights and sees the same batches for a seed; three seeds. The
gap of a variant is its validation loss over that of fp32 with the same seed, minus one; the spread
is the gap's standard deviation.

Sources   after arXiv:2509.25149 figures 4 to 6, there 12 and 8 G parameters; here some 0.2 M,
          minutes on one core
Not here  the late effects: those runs differ after hundreds of billions of tokens, these see 154 thousand
"""

import csv
import functools
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import data
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
    "moe_intermediate_size=64,moe_shared_expert_intermediate_size=128,num_nextn_predict_layers=0"
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


def gaps():
    """{precision: [gap of each seed]}, in percent of fp32's loss with that seed."""
    base = {r["seed"]: r["val_nats"] for r in rows() if r["precision"] == "fp32"}
    found = {
        p: [
            100 * (r["val_nats"] / base[r["seed"]] - 1)
            for r in rows()
            if r["precision"] == p and r["seed"] in base
        ]
        for p in VARIANTS
        if p != "fp32"
    }
    return {p: g for p, g in found.items() if g}


def draw():
    fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for i, (p, g) in enumerate(gaps().items()):
        mean, spread = statistics.mean(g), statistics.stdev(g) if len(g) > 1 else 0.0
        ax.barh(i, mean, xerr=spread, color="C0" if p == "nvfp4" else "C7", alpha=0.6, capsize=3)
        ax.plot(g, [i] * len(g), "k.", ms=5)
        print(f"{p:24}{VARIANTS[p]:30}{mean:+7.2f} % +- {spread:.2f}   {len(g)} seeds")
    ax.set_yticks(range(len(gaps())), [VARIANTS[p] for p in gaps()])
    ax.invert_yaxis()
    ax.axvline(0, color="k", lw=0.8)
    ax.set(xlabel="validation loss above fp32's, percent (dots: seeds)")
    fig.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    if "--draw" not in sys.argv[1:]:
        measure()
    draw()
