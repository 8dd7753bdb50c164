"""
The lab: a figure is a grid of variants x seeds; a cell of it is one small training or measurement
in a process of its own, with one thread, as many at a time as there are cores.

    python -m ablations.fig_latent             the cells that are lacking, the verdicts, the picture
    python -m ablations.fig_latent --quick     one seed, small: two minutes at most, kept in runs/
    python -m ablations.fig_latent --pilot     one seed apart, to settle the settings: rows `pilot`
    python -m ablations.fig_latent --extra 10  a second series, on as many other seeds: rows `extra`
    python -m ablations.fig_latent --draw      from the receipts alone

A cell's settings are {**base, **variant}, and their hash is in its row (receipts/ablations):
changed settings run again, nothing else does. Changed code does not: the row names the code that
made it, and `python -m ablations` says which rows are of before. A row is written when the cell
ends: a kill loses the cells under way, a failure that cell alone. Curves go to NAME-curves.csv.
Weights and batches are functions of the seed: rows of one seed are a pair.

    FIGURE, main(FIGURE, __doc__)     what a figure's file has; its parts: figure.py

Not here  what differences mean: verdict.py; what most cells do: small.py
"""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import command

import disk
import plot
from ablations.age import code
from ablations.cells import answer, ask
from ablations.figure import PICTURES, RECEIPTS, Figure, digest, look, read
from ablations.verdict import Claim
from bounds import knob

__all__ = ["Claim", "Figure", "main", "report"]
QUICK = Path("runs") / "ablations"  # rows and pictures of --quick
PILOT = 100  # its seed


@dataclass(frozen=True)
class Flags:
    quick: bool = knob(False, "one seed and small settings; rows and picture go to runs/ablations")
    pilot: bool = knob(False, f"seed {PILOT} alone, to settle the settings; draws nothing")
    extra: int = knob(0, "a second series, its first seed; draws nothing", least=0, most=1 << 30)
    draw: bool = knob(False, "no cell: verdicts and picture from the receipts")
    workers: int = knob(0, "cells at a time; 0: as many as there are cores", least=0, most=4096)
    cell: str = knob("", "the lab's own: one cell, [settings, seed] in JSON", least=0, most=1 << 16)


def append(path, rows):
    """Rows at the end of a csv, which is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_log(path, read(path) + rows)


def keep(figure, folder, row, measures):
    """A cell's curves, then its row: without a row it is as if there had been no cell."""
    rows, curves = figure.receipts(folder)
    points = {name: y for name, y in measures.items() if isinstance(y, list)}
    numbers = {name: float(y) for name, y in measures.items() if name not in points}
    key = {name: row[name] for name in ("series", "variant", "seed", "hash")}
    made = [dict(key, curve=c, x=x, y=y) for c, line in points.items() for x, y in line]
    if made:
        append(curves, made)
    append(rows, [row | numbers])
    return ", ".join(f"{name} {y:.4g}" for name, y in numbers.items())


def lacking(figure, seeds, series, folder, quick):
    """(row, settings) of every cell that has no row yet."""
    key = lambda r: (r["series"], r["variant"], str(r["seed"]), r["hash"])
    done = set(map(key, read(figure.receipts(folder)[0])))
    for seed in seeds:
        for variant in figure.variants:
            settings = figure.settings(variant, quick)
            row = dict(series=series, variant=variant, seed=seed, hash=digest(settings))
            if key(row) not in done:
                yield row, settings


def measure(figure, seeds, series, folder, flags):
    """Runs the cells whose rows are lacking: all of them, whichever fail."""
    versions = f"python {platform.python_version()}, torch {metadata.version('torch')}"
    made, failed = dict(versions=versions, code=code(figure)), []
    began, pool = time.monotonic(), ThreadPoolExecutor(flags.workers or os.cpu_count() or 1)
    try:
        cells = lacking(figure, seeds, series, folder, flags.quick)
        jobs = {pool.submit(ask, figure, s, row["seed"]): row for row, s in cells}
        for n, job in enumerate(as_completed(jobs), 1):
            row = jobs[job]
            name = f"{row['variant']}, seed {row['seed']}"
            try:
                measures, seconds = job.result()
                said = keep(figure, folder, row | dict(seconds=round(seconds, 2)) | made, measures)
            except ChildProcessError as e:
                failed, said = [*failed, name], str(e)
            left = (time.monotonic() - began) / n * (len(jobs) - n) / 60
            command.say(f"{n:3} of {len(jobs)}  {name:32} {said}; {left:.1f} minutes left")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failed:
        what = f"{len(failed)} of {len(jobs)} cells failed ({'; '.join(failed)})"
        raise ChildProcessError(f"{what}; the same command runs these again")


def chosen(figure, flags):
    """The series that is asked for, and its seeds."""
    if flags.quick + flags.pilot + bool(flags.extra) > 1:
        raise ValueError("--quick, --pilot and --extra are three series: ask for one")
    if flags.quick:
        return "quick", figure.seeds[:1]
    if flags.pilot:
        return "pilot", (PILOT,)
    if flags.extra:
        return "extra", tuple(range(flags.extra, flags.extra + len(figure.seeds)))
    return "full", figure.seeds


def report(found):
    """Prints every claim, its numbers and its verdict."""
    for claim in found.figure.claims:
        verdict = found.verdict(claim)
        command.say(f"{claim.says}\n    {verdict.numbers():20} {verdict.words}")


def work(figure, flags):
    """The cells, the verdicts, the picture."""
    if flags.cell:
        return answer(figure, flags.cell)
    series, seeds = chosen(figure, flags)
    folder, pictures = (QUICK, QUICK) if flags.quick else (RECEIPTS, PICTURES)
    if not flags.draw:
        with disk.lock(folder / figure.name):
            measure(figure, seeds, series, folder, flags)
    found = look(figure, series, folder, flags.quick)
    report(found)
    if series in ("full", "quick"):
        pictures.mkdir(parents=True, exist_ok=True)
        with plot.plt.rc_context(plot.STYLE):
            plot.save(figure.draw(found), pictures / f"{figure.name}.png", found.stamp())


def main(figure, about, argv=None):
    """A figure's command line; about: its file's docstring."""
    command.run(lambda flags: work(figure, flags), Flags, figure.home(), about, argv)
