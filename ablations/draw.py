"""
Pictures of the lab: what variants reach, and how they differ when seeds are paired.

    picture = paired(found, "loss", "standard", "nats a token")     both, side by side
    levels(ax, found, measure)              a bar a variant: the mean of its seeds, and they
    differences(ax, found, measure, base)   a row a variant: its seeds' differences to base's, their
                                            mean and its 95 % interval
    panels(found, {measure: unit}, title)   levels of several measures
    curves(ax, found, curve)                a line a variant, with its seeds around
    sweep(ax, found, measure, lines)        the same of single numbers: {line: {x: variant}}
    published(ax, xs, ys, label)            somebody else's numbers, in grey
    title(found, claim)                     the finding: the claim, and whether it holds here

Not here  numbers that are not in the receipts; colours and sizes: plot.py
"""

import math
import statistics
import textwrap
from dataclasses import replace

import plot
from ablations import verdict
from ablations.figure import Found
from plot import COLOURS, MARKERS

GREY = "0.55"
OUTLINES = "outlines: {} paired seeds; bar: 95 % of their mean"


def title(found, claim, wide=56):
    """The claim if it reproduces here; otherwise what else was seen, before it."""
    seen = found.verdict(claim).words
    said = {verdict.SAME: "", verdict.OTHER: "The other way here: "}.get(seen.split(" (")[0])
    if said is None:
        said = f"{seen.split(' (')[0].capitalize()}: "
    return textwrap.fill(said + claim.says, wide)


def levels(ax, found, measure, unit="", wide=46):
    """Horizontal bars, a variant each; its seeds are outlines. Below a bar's end stands its mean,
    below a short one from zero on.
    """
    values = found.values(measure)
    longest = max((statistics.mean(ys.values()) for ys in values.values() if ys), default=0)
    for i, by_seed in enumerate(values.values()):
        ys = list(by_seed.values())
        if not ys:
            continue
        mean = statistics.mean(ys)
        ax.barh(i, mean, 0.62, color=COLOURS[i % len(COLOURS)], alpha=0.45)
        for j, y in enumerate(ys):
            ax.plot(y, i, MARKERS[j % len(MARKERS)], color="0.2", mfc="none", ms=6, mew=1.3)
        end = dict(x=mean, ha="right") if mean > 0.4 * longest else dict(x=0, ha="left")
        said = f"{mean:,.0f}" if mean >= 1000 else f"{mean:.4g}"
        ax.text(y=i + 0.42, s=said, va="center", size=10, **end)
    ax.locator_params(axis="x", nbins=max(3, wide // 9))
    ax.set_yticks(range(len(values)), [textwrap.fill(v, 18) for v in values])
    ax.set(ylim=(len(values) - 0.4, -0.6), xlabel=textwrap.fill(unit, wide))


def differences(ax, found, measure, base, unit="", percent=False):
    """Rows in the order of `levels`, base's own empty."""
    values = found.values(measure)
    for i, by_seed in enumerate(values.values()):
        both = sorted(by_seed.keys() & values[base].keys())
        scale = {s: 100 / values[base][s] if percent else 1 for s in both}
        ds = [(by_seed[s] - values[base][s]) * scale[s] for s in both]
        if not ds or by_seed is values[base]:
            continue
        mean, half = verdict.interval(ds)
        colour = COLOURS[i % len(COLOURS)]
        if not math.isnan(half):
            ax.plot([mean - half, mean + half], [i, i], color=colour, lw=8, alpha=0.3)
        ax.plot(mean, i, "|", color=colour, ms=20, mew=3)
        for j, d in enumerate(ds):
            ax.plot(d, i, MARKERS[j % len(MARKERS)], color="0.2", mfc="none", ms=6, mew=1.3)
    seeds = len(values[base])
    ax.axvline(0, color="k", lw=1)
    ax.locator_params(axis="x", nbins=5)
    ax.set_yticks(range(len(values)), [])
    note = f"({OUTLINES.format(seeds)})"
    what = f"minus “{base}”, {'percent of it' if percent else unit}"
    ax.set(ylim=(len(values) - 0.4, -0.6), xlabel=textwrap.fill(what, 52) + "\n" + note)


def paired(found, measure, base, unit, claim=None, percent=False):
    """Levels and differences side by side; the title is the first claim's finding."""
    high = 1.9 + 0.62 * len(found.figure.variants)
    fig, (a, b) = plot.sheet(1, 2, figsize=(11, high), width_ratios=(1, 1.1))
    levels(a, found, measure, unit)
    differences(b, found, measure, base, unit, percent)
    fig.suptitle(
        title(found, claim or found.figure.claims[0], 92), x=0.01, ha="left", weight="bold"
    )
    return fig


def panels(found, measures, title):
    """Levels of several measures, {measure: unit}, side by side: a row is a variant."""
    high = 1.9 + 0.5 * len(found.figure.variants)
    fig, axes = plot.sheet(1, len(measures), figsize=(11, high), sharey=True)
    for ax, (measure, unit) in zip(axes, measures.items()):
        levels(ax, found, measure, unit, wide=72 // len(measures))
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    return fig


def curves(ax, found, curve, names=True, band=True):
    """Mean lines and the band from the lowest to the highest seed, or a thin line a seed. names: at
    their ends, so that the scale of y is set before.
    """
    ends = []
    for i, (variant, seeds) in enumerate(found.lines(curve).items()):
        if not seeds:
            continue
        xs = sorted(set.intersection(*(set(line) for line in seeds.values())))
        ys = [[line[x] for line in seeds.values()] for x in xs]
        mean, colour = [statistics.mean(y) for y in ys], COLOURS[i % len(COLOURS)]
        if band:
            ax.fill_between(xs, [*map(min, ys)], [*map(max, ys)], color=colour, alpha=0.2, lw=0)
        else:
            ax.plot(xs, ys, color=colour, lw=0.8)
        marker = MARKERS[i % len(MARKERS)] + "-"
        style = dict(color=colour, lw=2, ms=6, markevery=max(1, len(xs) // 12), label=variant)
        ax.plot(xs, mean, marker, **style)
        ends.append((mean[-1], textwrap.fill(variant, 22), colour))
    if names and ends:
        plot.name_ends(ax, ends, gap=0.09)


def sweep(ax, found, measure, lines):
    """Curves of numbers that stand in rows: {line: {x: variant}}."""
    made = [
        dict(r, variant=line, curve=measure, x=x, y=r[measure])
        for line, at in lines.items()
        for x, variant in at.items()
        for r in found.rows
        if r["variant"] == variant
    ]
    curves(ax, Found(replace(found.figure, variants=lines), [], made), measure)


def published(ax, xs, ys, label):
    """A published curve or points, behind ours."""
    ax.plot(xs, ys, "D--", color=GREY, ms=5, lw=1.5, zorder=1)
    ax.annotate(label, (xs[-1], ys[-1]), (4, 6), textcoords="offset points", color="0.4", size=10)
