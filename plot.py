"""
The picture of a run: its losses, what each token further ahead costs, the balance of its experts,
and where the experts' tokens went in the end.

    python plot.py runs/toy                 draws runs/toy/loss.png, from log.csv and load.json
    python plot.py runs/a runs/b out.png    the validation of runs; a-0 and a-1 are seeds of a

A title says what is to be seen, in the run's own numbers. Lines are told apart by colour, by marker
and by a name at their end.

    COLOURS, MARKERS, STYLE      for every picture of this project; name_ends puts the names
    sheet                        a figure and its axes, which go into a file: they belong to no
                                 window and no notebook, whose own pictures are left alone

Not here  anything that is not already on disk: a picture can always be drawn again without training
Sources   the colours are Okabe and Ito's, which colour-blind eyes tell apart
"""

import io
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import command

import matplotlib.pyplot as plt  # nothing here draws with it: plot.plt is for notebooks
from matplotlib.figure import Figure

import bounds
import disk
from bounds import knob
from config import LETTERS

# blue, vermilion, green, purple, orange, sky
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
LARGEST = 1e300  # number that is drawn
# An inch is 80 pixels where README shows a picture of ten, so these are 13 to 16 pixels high.
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


# 1. From a log to lines


def points(rows, key, x="step"):
    """Where a column holds finite numbers: xs, ys. A log of any version may lack any column."""
    kept = [
        (r[x], r[key])
        for r in rows
        if all(isinstance(r.get(k), (int, float)) and abs(r[k]) <= LARGEST for k in (x, key))
    ]
    return [a for a, _ in kept], [b for _, b in kept]


def smooth(ys, reach=3):
    """Each becomes the mean of itself, up to `reach` before it and as many after it. At the end
    there are fewer after it.
    """
    near = [min(reach, i) for i in range(len(ys))]
    return [statistics.mean(ys[i - m : i + m + 1]) for i, m in enumerate(near)]


def name_ends(ax, ends, gap=0.075):
    """Names lines at the right edge: ends are (y, text, colour). Names do not touch."""
    scale = ax.yaxis.get_transform().transform  # of a logarithmic axis too
    places = []
    for y, text, colour in sorted(ends, key=lambda end: end[0]):
        low, here, high = scale([ax.get_ylim()[0], y, ax.get_ylim()[1]])
        at = (here - low) / (high - low)
        places.append([max(at, places[-1][0] + gap) if places else at, text, colour])
    over = max(0.0, places[-1][0] - 1) if places else 0.0
    for at, text, colour in places:
        ax.text(1.015, at - over, text, color=colour, transform=ax.transAxes, va="center")


def sheet(rows=1, columns=1, figsize=None, layout=None, **how):
    """A figure and its axes, as pyplot.subplots gives them; but pyplot does not know of it, so it
    is nowhere shown and needs no closing.
    """
    fig = Figure(figsize=figsize, layout=layout)
    return fig, fig.subplots(rows, columns, **how)


def save(fig, path, source=""):
    """source: a word about what was drawn, kept in the file where nobody sees it."""
    about = dict(Source=source) if source else {}
    disk.write(Path(path), lambda f: fig.savefig(f, format="png", metadata=about))


def png(fig, dpi=72):
    """A figure as the bytes of a file, for a page or a notebook."""
    with io.BytesIO() as f:
        fig.savefig(f, format="png", dpi=dpi)
        return f.getvalue()


# 2. One run


def draw_loss(ax, rows, floor):
    """Nats a token, of training and of validation; a task's floor if it has one."""
    steps, nats = points(rows, "train_nats")
    ends, title = [], "Loss"
    if nats:
        ax.plot(steps, nats, color=COLOURS[0], alpha=0.25, lw=1)
        ax.plot(steps, smooth(nats), color=COLOURS[0], lw=2)
        ends.append((smooth(nats)[-1], "training\n(smoothed)", COLOURS[0]))
        title = f"Loss: from {nats[0]:.1f} to {nats[-1]:.2f} nats a token"
    seen, val = points(rows, "val_nats")
    bits = points(rows, "val_bpb")[1]
    if val:
        ax.plot(seen, val, MARKERS[1] + "-", color=COLOURS[1], ms=5, lw=1)
        ends.append((val[-1], "validation", COLOURS[1]))
    if val and bits:
        title = f"Loss: {bits[-1]:.3f} bits a byte of unseen text"
        if floor is not None:
            nats_floor = floor * val[-1] / bits[-1]
            ax.axhline(nats_floor, color="0.3", ls="--", lw=1.2)
            ends.append((nats_floor, f"the floor,\n{floor:.3f} bits", "0.3"))
    ax.set(xlabel="optimiser step", ylabel="nats a token", title=title)
    name_ends(ax, ends, gap=0.2)


def dearer(rows, k):
    """What the MTP block's guess at depth k costs above the next token: steps, nats."""
    both = [
        dict(step=r["step"], more=r[f"mtp{k}_nats"] - r["train_nats"])
        for r in rows
        if points([r], f"mtp{k}_nats")[0] and points([r], "train_nats")[0]
    ]
    return points(both, "more")


def draw_ahead(ax, rows, depths):
    """`dearer` of several depths."""
    ends = []
    for i, k in enumerate(depths):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        steps, more = dearer(rows, k)
        if not more:
            continue
        line = smooth(more)
        ax.plot(steps, more, color=colour, alpha=0.2, lw=1)
        ax.plot(steps, line, marker + "-", color=colour, lw=2, ms=5, markevery=0.12)
        ends.append((line[-1], f"t+{k + 1}: {line[-1]:+.2f}", colour))
    costs = ", ".join(end[1].split(": ")[1] for end in ends)
    ax.axhline(0, color="0.3", lw=1)
    ax.set(
        xlabel="optimiser step",
        ylabel="nats above the next token's",
        title=f"Further ahead costs {costs} nats",
    )
    name_ends(ax, ends)


def draw_balance(ax, rows, experts):
    """MaxVio, mean and worst layer; in words how many experts idled, of how many if that is
    known.
    """
    ends, title, said = [], "Balance of the experts", ""
    for i, (key, name) in enumerate(
        (("max_vio", "mean of\nlayers"), ("max_vio_worst", "worst\nlayer"))
    ):
        steps, vio = points(rows, key)
        if vio:
            ax.plot(steps, vio, MARKERS[i] + "-", color=COLOURS[i], lw=2, ms=5, markevery=0.12)
            ends.append((vio[-1], name, COLOURS[i]))
        if vio and key == "max_vio":
            title = f"One step: the busiest has {1 + vio[-1]:.2f} of its share"
    steps, idle = points(rows, "idle")
    if any(idle):
        last = max(s for s, n in zip(steps, idle) if n)
        of = f" of {experts}" if experts else ""
        till = f"none after step {last}" if last < steps[-1] else "some to the end"
        said = f"\nidle experts: at most {max(idle):.0f}{of}, {till}"
    ax.set(
        xlabel="optimiser step" + said,
        ylabel="busiest / mean - 1 (MaxVio)",
        title=title,
        ylim=(0, None),
    )
    name_ends(ax, ends, gap=0.2)


def draw_load(ax, layers, tokens):
    """Each expert's tokens over the mean of its layer. White is the mean, brown above it."""
    share = [[n * len(row) / max(1, sum(row)) for n in row] for row in tokens]
    flat = [x for row in share for x in row]
    reach = min(1.0, max(0.1, *(abs(x - 1) for x in flat)))
    widest = max(map(len, share))
    share = [row + [math.nan] * (widest - len(row)) for row in share]
    image = ax.imshow(share, aspect="auto", cmap="PuOr_r", vmin=1 - reach, vmax=1 + reach)
    ax.set(
        xlabel="expert",
        title=f"Several steps: {min(flat):.2f} to {max(flat):.2f} of their share",
    )
    ax.set_yticks(range(len(layers)), layers)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(False)
    ax.figure.colorbar(
        image, ax=ax, label="tokens / mean", extend="max" if reach == 1 else "neither"
    )


def growing(rows):
    """What one watches while a run goes on: the loss, and the balance of its experts."""
    draw = [lambda ax: draw_loss(ax, rows, None)]
    if any(points(rows, "max_vio")[1]):
        draw.append(lambda ax: draw_balance(ax, rows, None))
    return figure(draw)


def facts(folder):
    """A run's config.json; an empty one where there is none."""
    path = folder / "config.json"
    found = command.document(path) if path.is_file() else {}
    for name, part in (("corpus", "floor"), ("config", "hybrid_override_pattern")):
        if not isinstance(found.setdefault(name, {}), dict):
            raise ValueError(f"{path}: its {name} is no table")
        kind = (float, int, NoneType) if part == "floor" else str
        if part in found[name] and not isinstance(found[name][part], kind):
            raise ValueError(f"{path}: its {name} has {bounds.brief(found[name][part])} as {part}")
    return found


def loads(folder):
    """A run's load.json -> layers, and of each the tokens of its experts; no layers if none is
    told.
    """
    path = folder / "load.json"
    found = command.document(path) if path.is_file() else {}
    layers, tokens = found.get("layers") or [], found.get("tokens") or []
    number = lambda n: isinstance(n, (int, float)) and 0 <= n < math.inf
    row = lambda r: isinstance(r, list) and r and all(map(number, r))
    lists = isinstance(layers, list) and isinstance(tokens, list)
    if not lists or tokens and len(layers) != len(tokens) or not all(map(row, tokens)):
        raise ValueError(f"{path} is no table of the tokens of every layer's experts")
    return [str(x) for x in layers], tokens


def panels(folder):
    """What there is to draw of a run: functions of an axis."""
    rows, about = disk.read_log(folder / "log.csv"), facts(folder)
    names, tokens = loads(folder)
    depths = [k for k in range(1, 17) if any(points(rows, f"mtp{k}_nats")[0])]
    yield lambda ax: draw_loss(ax, rows, about["corpus"].get("floor"))
    if depths:
        yield lambda ax: draw_ahead(ax, rows, depths)
    if tokens:
        yield lambda ax: draw_balance(ax, rows, sum(map(len, tokens)))
        yield lambda ax: draw_load(ax, names, tokens)


def figure(draw):
    """Panels, two in a row. draw: functions of an axis."""
    high, wide = math.ceil(len(draw) / 2), min(2, len(draw))
    with plt.rc_context(STYLE):
        fig = Figure(figsize=(11, 3.8 * high))
        cells = fig.subfigures(high, wide, squeeze=False, hspace=0.03, wspace=0.02)
        for cell, one in zip(cells.flat, draw):
            one(cell.subplots())
    return fig


def run(folder):
    """Draws loss.png of one run folder."""
    with plt.rc_context(STYLE):
        save(figure(list(panels(folder))), folder / "loss.png")


# 3. Several runs


def kind(folder):
    """toy-0 and toy-1 are seeds of one thing, toy."""
    return folder.name.rstrip("0123456789").rstrip("-") or folder.name


def layers(folder):
    """What a run's model is made of, in words: 4 Mamba-2, 4 LatentMoE, 1 attention."""
    pattern = facts(folder)["config"].get("hybrid_override_pattern", "")
    return ", ".join(f"{pattern.count(x)} {LETTERS[x]}" for x in LETTERS if x in pattern)


def band(logs, x):
    """The validation of seeds of one thing -> x (their mean), lowest, mean and highest bits, and
    whether the learning rate is still up; point by point as far as all seeds go.
    """
    peak = max((lr for rows in logs for lr in points(rows, "lr")[1]), default=0)
    logs = [[r for r in rows if points([r], "val_bpb", x)[0]] for rows in logs]
    xs, ys, rates = (
        list(zip(*(points(rows, k)[1] for rows in logs))) for k in (x, "val_bpb", "lr")
    )
    up = [len(rates) == len(ys) and min(rate) >= 0.999 * peak for rate in rates]
    return (
        [statistics.mean(p) for p in xs],
        *([f(p) for p in ys] for f in (min, statistics.mean, max)),
        up,
    )


def draw_kind(ax, logs, x, unit, i, label):
    """A line through the means of the seeds -> the last. Hollow: the learning rate is up."""
    at, low, mean, high, up = band(logs, x)
    at = [a / unit for a in at]
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    ax.fill_between(at, low, high, color=colour, alpha=0.25, lw=0)
    ax.plot(at, mean, marker + "-", color=colour, lw=2, ms=7, label=label)
    hollow = [(a, m) for a, m, u in zip(at, mean, up) if u]
    if hollow:
        ax.plot(*zip(*hollow), marker, color=colour, ms=7, mfc="white", mew=1.5)
    return mean[-1:]


def compare(folders, out):
    """Draws the validation loss of several runs, in bits per byte, against tokens and against
    seconds. Seeds of one thing share a line, and the band between the best and the worst of them.
    """
    runs, made = {}, {}
    for folder in folders:
        runs.setdefault(kind(folder), []).append(disk.read_log(folder / "log.csv"))
        made.setdefault(kind(folder), layers(folder))
    seeds = max(map(len, runs.values()))
    texts = {facts(folder)["corpus"].get("sha256") for folder in folders}
    title = verdict(runs) if len(texts) == 1 else "Validation loss, of unlike texts"
    with plt.rc_context(STYLE):
        fig, axes = sheet(1, 2, figsize=(11, 4.8), sharey=True)
        for ax, x, unit in ((axes[0], "tokens", 1e6), (axes[1], "seconds", 60)):
            ends = []
            for i, (name, logs) in enumerate(runs.items()):
                last = draw_kind(ax, logs, x, unit, i, f"{name}: {made[name]}".rstrip(": "))
                ends += [(y, f"{name}\n{y:.3f}", COLOURS[i % len(COLOURS)]) for y in last]
        axes[0].set(xlabel="million tokens read", ylabel="validation, bits a byte", title=title)
        axes[1].set(xlabel="minutes")
        name_ends(axes[1], ends, gap=0.13)
        said = f"band: {seeds} seeds\n" * (seeds > 1) + "hollow: learning rate still up"
        axes[1].text(
            0.97, 0.97, said, transform=axes[1].transAxes, ha="right", va="top", color="0.3"
        )
        axes[0].legend(frameon=False, loc="upper right", fontsize=11)
        save(fig, out)


def verdict(runs):
    """The title: who ends lower, if every seed does; otherwise that they do not differ."""
    ends = {
        name: [y for log in logs for y in points(log, "val_bpb")[1][-1:]]
        for name, logs in runs.items()
    }
    if len(ends) != 2 or not all(ends.values()):
        return "Validation loss"
    (a, low), (b, high) = sorted(ends.items(), key=lambda end: statistics.mean(end[1]))
    if max(low) >= min(high):
        return f"{a} and {b} differ by no more than seeds do"
    apart = statistics.mean(high) - statistics.mean(low)
    seeds = " (one seed)" if min(len(low), len(high)) == 1 else ""
    return f"{a} ends {apart:.3f} bits a byte below {b}{seeds}"


@dataclass(frozen=True)
class Flags:
    paths: tuple = knob((), "a run folder; or several, and the OUT.png to draw them in", place=True)


def work(a):
    folders = [Path(p) for p in a.paths if not p.endswith(".png")]
    out = [Path(p) for p in a.paths if p.endswith(".png")]
    for f in folders:
        if not (f / "log.csv").is_file():
            raise ValueError(f"{f} holds no log.csv")
        if not disk.read_log(f / "log.csv"):
            raise ValueError(f"{f}/log.csv has no row yet")
    if not folders or len(out) > 1 or (len(folders) > 1) != bool(out):
        raise ValueError("give one folder: plot.py RUN   or several: plot.py RUN RUN ... OUT.png")
    if out:
        compare(folders, out[0])
    else:
        run(folders[0])
    print(out[0] if out else folders[0] / "loss.png")


def main(argv=None):
    command.run(work, Flags, "plot.py", __doc__, argv)


if __name__ == "__main__":
    main()
