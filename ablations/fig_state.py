"""
The Mamba state in few bits: what drifts with the memory, how many Philox rounds are enough, and
what the toy notices.

    python ablations/fig_state.py RUN RUN RUN     measures what is lacking, draws
    python ablations/fig_state.py                 the same, without the toy's rows if they lack

A head that remembers n tokens (a = exp(-1/n)) reads 4,096 of them, inputs of one sign, three draws
(statecache.drift; of either sign FP16 hardly drifts: the choice was made knowing that); a sum of
128 neighbours' noise has a spread of 1 if they are independent (statecache.neighbours); and a
trained toy reads validation text token by token with its states rounded, against fp32 states: KL.

Sources   claims: arXiv:2604.12374 section 4.3 and the Ultra report's table 16
Not here  verbosity, which is what the report measures; a model of these sizes writes no answers
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import checkpoint
import data
import ptq
import sample
from quant import statecache

FOLDER = ROOT / "receipts" / "ptq"
MEMORIES = 10, 100, 1_000, 10_000, 100_000
FORMATS = "fp16", "fp16:5", "bf16", "int16:5", "int8", "int8:5", "fp8", "fp8:5"
ROUNDS = 1, 2, 3, 4, 5, 7, 10
BLACK, ORANGE, SKY, GREEN, BLUE, RED = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
)  # Okabe and Ito


def how(text):
    kind, _, rounds = text.partition(":")
    return kind, int(rounds) if rounds else None


def table(name, columns, make):
    """A csv's rows, measured if it is not there."""
    path = FOLDER / name
    if not path.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as f:
            out = csv.writer(f, lineterminator="\n")
            out.writerow(columns)
            for row in make():
                print(*row, flush=True)
                out.writerow(row)
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def drifts():
    for text in FORMATS:
        for memory in MEMORIES:
            for seed in range(3):
                error, bias = statecache.drift(*how(text), memory, 4096, seed=seed)
                yield text, memory, seed, f"{error:.6g}", f"{bias:.6g}"


def spreads():
    for rounds in ROUNDS:
        for seed in range(3):
            yield rounds, seed, f"{statecache.neighbours(rounds, seed=1000 * seed):.4f}"


@torch.no_grad()
def heard(runs):
    """Rows of a trained model that reads 8 x 256 tokens one at a time."""
    for run in runs:
        saved = checkpoint.read(run)
        model, enc, _ = sample.load_run(run)
        val = data.encode(enc, data.corpus(saved["run"]["data"]).val)
        ids, logs = ptq.windows(val, 8 * 256, 256, "text")[:, :-1], {}
        for text in ("fp32", *FORMATS):
            model.store = statecache.read(text)
            cache = model.new_cache(len(ids))
            logits = torch.cat([model(ids[:, i : i + 1], cache) for i in range(256)], 1)
            logs[text] = logits.log_softmax(-1)
            p, q = logs["fp32"], logs[text]
            kl = (p.exp() * (p - q)).sum(-1)
            early, late = float(kl[:, :128].mean()), float(kl[:, 128:].mean())
            yield saved["run"]["seed"], text, f"{early:.4g}", f"{late:.4g}"


def word(worse, better):
    signs = {a > b for a, b in zip(worse, better)}
    return {(True,): "reproduces", (False,): "the other way"}.get(tuple(signs), "inside the spread")


def verdicts(drift, spread, kl):
    def d(text, memory):
        return [
            100 * float(r["error"])
            for r in drift
            if r["format"] == text and int(r["memory"]) == memory
        ]

    s = lambda n: [float(r["spread"]) for r in spread if int(r["rounds"]) == n]
    k = lambda text: [float(r["kl_late"]) for r in kl if r["format"] == text]
    e = lambda text: [float(r["kl_early"]) for r in kl if r["format"] == text]
    rows = [
        (
            "fp16 to the nearest errs more than at random, memory 10,000",
            d("fp16", 10_000),
            d("fp16:5", 10_000),
        ),
        ("the same, memory 100,000", d("fp16", 100_000), d("fp16:5", 100_000)),
        ("the same, memory 100", d("fp16", 100), d("fp16:5", 100)),
        ("bf16 errs more than fp16, memory 1,000", d("bf16", 1_000), d("fp16", 1_000)),
        (
            "fp8 at random errs more than int8 at random, memory 1,000",
            d("fp8:5", 1_000),
            d("int8:5", 1_000),
        ),
        ("3 rounds are spread wider than independent noise by half", s(3), [1.5] * 3),
        ("4 rounds are spread wider than independent noise by 5 %", s(4), [1.05] * 3),
    ]
    if kl:
        rows += [
            ("the toy notices fp8 more than int8 at random", k("fp8"), k("int8:5")),
            ("the toy notices fp16 more late in a text than early", k("fp16"), e("fp16")),
        ]
    with open(FOLDER / "state-verdicts.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["claim", "verdict", "worse", "better"])
        for claim, worse, better in rows:
            show = lambda xs: " ".join(f"{x:.3g}" for x in xs)
            out.writerow([claim, word(worse, better), show(worse), show(better)])
            print(f"{claim:62} {word(worse, better):18} {show(worse)}  against  {show(better)}")


def pictures(drift, spread):
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    fig, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    styles = {
        "fp16": (RED, "o-", "FP16, to the nearest"),
        "fp16:5": (BLUE, "o-", "FP16, at random"),
        "bf16": (BLACK, "s-", "BF16, to the nearest"),
        "int8:5": (GREEN, "^-", "INT8 blocks, at random"),
        "fp8:5": (ORANGE, "v-", "FP8 blocks, at random"),
    }
    mean = {}
    for text, (colour, style, label) in styles.items():
        ys = [
            [
                100 * float(r["error"])
                for r in drift
                if r["format"] == text and int(r["memory"]) == m
            ]
            for m in MEMORIES
        ]
        mean[text] = [sum(y) / len(y) for y in ys]
        ax.plot(MEMORIES, mean[text], style, color=colour, label=label, lw=2)
        for m, y in zip(MEMORIES, ys):
            ax.plot([m] * len(y), y, ".", color=colour, ms=4)
    times = mean["fp16"][-1] / mean["fp16:5"][-1]
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="tokens that a head remembers",
        ylabel="error of the state after\n4,096 tokens, percent",
        title=f"A long memory drifts {times:.0f} times further if FP16 rounds to the nearest",
    )
    ax.legend(frameon=False, fontsize=11)
    fig.savefig(ROOT / "docs" / "state-memory.png", dpi=120)

    fig, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for n in ROUNDS:
        ys = [float(r["spread"]) for r in spread if int(r["rounds"]) == n]
        ax.bar(str(n), sum(ys) / len(ys), color=BLUE if n > 3 else RED, alpha=0.8)
        ax.plot([str(n)] * len(ys), ys, "k.", ms=5)
    ax.axhline(1, color=BLACK, lw=1, ls="--")
    ax.set(
        xlabel="Philox rounds",
        ylabel="spread of a sum of 128 neighbours'\nnoise (independent: 1)",
        title="Three rounds give neighbours the same noise, four do not",
    )
    fig.savefig(ROOT / "docs" / "state-philox.png", dpi=120)


def main(runs):
    torch.set_num_threads(1)
    drift = table("state-drift.csv", ("format", "memory", "seed", "error", "bias"), drifts)
    spread = table("state-philox.csv", ("rounds", "seed", "spread"), spreads)
    kl = []
    if runs or (FOLDER / "state-toy.csv").is_file():
        columns = "seed", "format", "kl_early", "kl_late"
        kl = table("state-toy.csv", columns, lambda: heard(runs))
    verdicts(drift, spread, kl)
    pictures(drift, spread)


if __name__ == "__main__":
    main(sys.argv[1:])
