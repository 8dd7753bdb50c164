"""
The picture of a run: its losses, the balance of its experts, and where the experts' tokens went in
the end.

    python plot.py runs/toy                 draws runs/toy/loss.png again, from log.csv and load.json
    python plot.py runs/a runs/b out.png    the validation curves of several runs in one picture

Not here  anything that is not already on disk: a picture can always be drawn again without training
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

import checkpoint


def run(folder):
    """Draws loss.png of one run folder."""
    rows = checkpoint.read_log(folder / "log.csv")
    load = json.loads((folder / "load.json").read_text())
    fig, (a, b, c) = plt.subplots(
        1, 3, figsize=(15, 4.3), width_ratios=(5, 4, 4), layout="constrained"
    )
    step = [r["step"] for r in rows]
    names = [("train_nats", "next token")] + [
        (f"mtp{k}_nats", f"MTP depth {k}: token t+{k + 1}")
        for k in range(1, 9)
        if f"mtp{k}_nats" in rows[0]
    ]
    for i, (key, label) in enumerate(names):
        a.plot(step, [r[key] for r in rows], f"C{i}", label=label, lw=1.8 if i == 0 else 1)
    seen = [r for r in rows if r.get("val_nats", "") != ""]
    a.plot(
        [r["step"] for r in seen],
        [r["val_nats"] for r in seen],
        "ko",
        ms=4,
        label="next token, validation",
    )
    for r in seen[-1:]:
        a.annotate(
            f"{r['val_bpb']:.2f} bits/byte",
            (r["step"], r["val_nats"]),
            (0, 26),
            textcoords="offset points",
            ha="right",
            weight="bold",
        )
    a.set(xlabel="step", ylabel="nats per token", title="Loss")
    a.legend(frameon=False)

    b.plot(step, [r["max_vio_worst"] for r in rows], "C1", lw=1, label="worst layer")
    b.plot(step, [r["max_vio"] for r in rows], "C0", lw=1.8, label="mean over layers")
    b.set(
        xlabel="step",
        ylabel="MaxVio = busiest expert / mean - 1",
        title="Balance of the experts",
        ylim=(0, None),
    )
    b.legend(frameon=False)
    if any(r["idle"] for r in rows):
        right = b.twinx()
        right.plot(step, [r["idle"] for r in rows], "C3:", lw=1)
        right.set(ylabel="experts without a token in the step, all layers (dotted)", ylim=(0, None))

    if load["tokens"]:
        share = [[n / (sum(row) / len(row)) for n in row] for row in load["tokens"]]
        image = c.imshow(share, aspect="auto", cmap="viridis", vmin=0)
        c.set(xlabel="expert", title="Load of each expert / mean, last interval")
        c.set_yticks(range(len(load["layers"])), load["layers"])
        fig.colorbar(image, ax=c)
    else:
        c.set_axis_off()
    checkpoint.write(folder / "loss.png", lambda f: fig.savefig(f, format="png", dpi=120))
    plt.close(fig)


def compare(folders, out):
    """Draws the validation loss of several runs, in bits per byte, against tokens and against
    seconds.

    Runs whose names differ in their last number only, toy-0 and toy-1, are seeds of one thing: they
    share a colour.
    """
    kinds = [f.name.rstrip("0123456789").rstrip("-") or f.name for f in folders]
    colours = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(kinds))}
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.3), sharey=True, layout="constrained")
    for i, (folder, kind) in enumerate(zip(folders, kinds)):
        label = kind if kind not in kinds[:i] else None
        rows = [r for r in checkpoint.read_log(folder / "log.csv") if r["val_bpb"] != ""]
        for ax, x in zip(axes, ("tokens", "seconds")):
            ax.plot(
                [r[x] for r in rows],
                [r["val_bpb"] for r in rows],
                ".-",
                color=colours[kind],
                label=label,
            )
            ax.set(xlabel=x)
    axes[0].xaxis.set_major_formatter(EngFormatter())
    axes[0].set(ylabel="validation, bits per byte")
    axes[0].legend(frameon=False)
    checkpoint.write(Path(out), lambda f: fig.savefig(f, format="png", dpi=120))
    plt.close(fig)


def main(argv):
    folders = [Path(a) for a in argv if not a.endswith(".png")]
    out = [a for a in argv if a.endswith(".png")]
    lacking = [f for f in folders if not (f / "log.csv").is_file()]
    if not folders or lacking or len(out) > 1 or (len(folders) > 1) != bool(out):
        sys.exit(
            f"plot.py: {lacking[0]} holds no log.csv"
            if lacking
            else "usage: plot.py RUN   or   plot.py RUN RUN ... OUT.png"
        )
    if out:
        compare(folders, out[0])
    else:
        run(folders[0])
    print(out[0] if out else folders[0] / "loss.png")


if __name__ == "__main__":
    main(sys.argv[1:])
