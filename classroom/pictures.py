"""
The report's own pictures, each from rows of numbers to the bytes of a PNG.

Not here  the pictures that a run draws itself: plot.py, post/picture.py
Sources   colours, markers and sizes are plot.py's
"""

import plot

BLUE, RED, GREEN, PURPLE, ORANGE, SKY = plot.COLOURS


def png(draw, wide=9.0, high=3.6, columns=1):
    """draw(*axes) -> the bytes."""
    with plot.plt.rc_context(plot.STYLE):
        fig, axes = plot.sheet(1, columns, figsize=(wide, high), squeeze=False)
        draw(*axes.flat)
        return plot.png(fig, dpi=110)


def depths(rows):
    """The depths of MTP that a log has."""
    return [k for k in range(1, 17) if any(plot.points(rows, f"mtp{k}_nats")[0])]


def ahead(rows):
    """What MTP's guess of a later token costs above the next token's."""
    return png(lambda ax: plot.draw_ahead(ax, rows, depths(rows)))


def costs(rows):
    """The same in the end, as smooth as in the picture, in words: +0.17, +0.18."""
    return ", ".join(f"{plot.smooth(plot.dearer(rows, k)[1])[-1]:+.2f}" for k in depths(rows))


def four_bits(exact, four):
    """Two runs on the same batches: how much more the four-bit one loses, and its zero
    gradients."""
    xs, a = plot.points(exact, "train_nats")
    gap = [100 * (y / x - 1) for x, y in zip(a, plot.points(four, "train_nats")[1])]

    def draw(left, right):
        left.plot(xs[1:], gap[1:], color=BLUE, alpha=0.25, lw=1)
        left.plot(xs[1:], plot.smooth(gap)[1:], color=BLUE, lw=2)
        left.axhline(0, color="0.3", lw=1)
        left.set(xlabel="optimiser step", ylabel="training loss above fp32's, %")
        left.set_title(f"Four bits end {plot.smooth(gap)[-1]:+.2f} % away (smoothed)")
        for rows, colour, mark, label in ((exact, BLUE, "o", "fp32"), (four, RED, "s", "NVFP4")):
            steps, zeros = plot.points(rows, "zero_gradients")
            right.plot(steps, [100 * z for z in zeros], mark + "-", color=colour, label=label)
        right.set(xlabel="optimiser step", ylabel="weight gradients that are 0, %")
        right.set_title(f"Zeros at the end: {four[-1]['zero_gradients']:.2%}")
        right.legend(frameon=False)

    return png(draw, columns=2)


def shares(names, values, xlabel, title, colours=BLUE):
    """Bars that lie, one a name, the first on top."""

    def draw(ax):
        bars = ax.barh(names, values, color=colours)
        ax.bar_label(bars, fmt="%.3g", padding=3)
        ax.margins(x=0.12)
        ax.invert_yaxis()
        ax.set(xlabel=xlabel, title=title)
        ax.grid(axis="y", visible=False)

    return png(draw, high=1.4 + 0.3 * len(names))


def merged(steps, title):
    """(name, weight, nats) of each checkpoint, the average last."""
    *each, (_, _, average) = steps

    def draw(ax):
        ax.plot([int(s) for s, _, _ in each], [n for _, _, n in each], "o-", color=BLUE)
        ax.axhline(average, color=RED, ls="--")
        ends = [(each[-1][2], "checkpoints", BLUE), (average, "their average", RED)]
        plot.name_ends(ax, ends)
        ax.set(xlabel="optimiser step", ylabel="validation, nats a token", title=title)

    return png(draw)


def longer(rows, at, short, long):
    """Validation before and after step `at`, where windows become longer."""
    steps, bits = plot.points(rows, "val_bpb")

    def draw(ax):
        for kind, label, colour, mark in (
            (lambda s: s <= at, f"windows of {short:,}", BLUE, "o"),
            (lambda s: s > at, f"windows of {long:,}", RED, "s"),
        ):
            seen = [(s, b) for s, b in zip(steps, bits) if kind(s)]
            ax.plot(*zip(*seen), mark + "-", color=colour, label=label)
        ends = [[b for s, b in zip(steps, bits) if (s <= at) == early][-1] for early in (1, 0)]
        ax.set(xlabel="optimiser step", ylabel="validation, bits a byte")
        ax.set_title(f"{ends[0]:.3f} bits a byte in windows of {short}, {ends[1]:.3f} of {long}")
        ax.legend(frameon=False)

    return png(draw)


def pairs(names, before, after, labels, ylabel, title):
    """Two bars a name."""

    def draw(ax):
        at = range(len(names))
        ax.bar([x - 0.2 for x in at], before, 0.38, color=SKY, label=labels[0])
        ax.bar([x + 0.2 for x in at], after, 0.38, color=BLUE, label=labels[1])
        ax.set_xticks(at, [n.replace(" ", "\n") for n in names])
        ax.set(ylabel=ylabel, title=title)
        ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))

    return png(draw)


def formats(units, colours, title):
    """units: (layer, kind of matrix, format). A square for each, in its format's colour."""
    kinds = list(dict.fromkeys(kind for _, kind, _ in units))
    layers = sorted({layer for layer, _, _ in units})

    def draw(ax):
        for name, colour in colours.items():
            mine = [(layer, kinds.index(kind)) for layer, kind, form in units if form == name]
            if mine:
                ax.scatter(*zip(*mine), color=colour, marker="s", s=160, label=name)
        ax.set_yticks(range(len(kinds)), kinds)
        ax.set_xticks(layers)
        ax.invert_yaxis()
        ax.margins(0.08)
        ax.set(xlabel="layer", title=title)
        ax.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))

    return png(draw, high=1.6 + 0.3 * len(kinds))


def drift(memories, lines, title):
    """{format: errors in percent, one a memory}, on two logarithmic axes. fp16:5 is fp16 rounded
    at random: of the same colour, and dashed."""
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in lines))

    def draw(ax):
        for name, errors in lines.items():
            kind, random, _ = name.partition(":")
            i = kinds.index(kind)
            style = plot.MARKERS[i] + ("--" if random else "-")
            ax.plot(memories, errors, style, color=plot.COLOURS[i], label=name)
        ax.set(xscale="log", yscale="log", xlabel="how many tokens a head remembers")
        ax.set(ylabel="error of the state, percent", title=title)
        ax.legend(frameon=False, ncols=2, fontsize=10)

    return png(draw)
