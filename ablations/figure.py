"""
A figure: what is varied, what is claimed, and what its receipts hold.

    found = look(FIGURE)                 the rows of its settings of now
    found.values("loss")                 {variant: {seed: number}}
    found.lines("gap")                   {variant: {seed: {x: y}}}, a curve
    found.differences(claim)             {seed: number}; found.verdict(claim)
    found.only("a", "b"), found.beside({label: measure})      fewer variants, or others

Not here  how cells are run: lab.py
"""

import csv
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from ablations import verdict

ROOT = Path(__file__).resolve().parents[1]
UNITS = dict(
    max_vio="of MaxVio (busiest expert / mean - 1)",
    right="of the share right",
    accepted="tokens a round of drafts",
)
RECEIPTS, PICTURES = ROOT / "receipts" / "ablations", ROOT / "docs" / "ablations"


@dataclass(frozen=True)
class Figure:
    """Variants are changes to `base`, and `quick` goes over both.

    cell(settings, seed) -> {measure: number, or [(x, y), ...], a curve}
    draw(found) -> a picture of matplotlib
    exact: arithmetic, which has no seeds
    units: {measure: its unit, as words behind a number}, `""` for all others; beside UNITS
    """

    name: str
    claims: tuple
    draw: object = None
    variants: dict = field(default_factory=dict)
    cell: object = None
    base: dict = field(default_factory=dict)
    quick: dict = field(default_factory=dict)
    seeds: tuple = (0, 1, 2)
    exact: bool = False
    units: dict = field(default_factory=dict)
    module: str = ""  # its file, if that is not ablations/fig_NAME.py

    def home(self):
        """What follows `python -m`."""
        return self.module or "ablations.fig_" + self.name

    def settings(self, variant, quick=False):
        """All that a cell depends on, but for its seed."""
        return {**self.base, **self.variants[variant], **(self.quick if quick else {})}

    def unit(self, measure):
        """Words behind a number, or '' if none are known."""
        known = UNITS | self.units
        return known.get(measure, known.get("", ""))

    def receipts(self, folder=None):
        """The paths of the rows and of the curves."""
        folder = folder or RECEIPTS
        return folder / f"{self.name}.csv", folder / f"{self.name}-curves.csv"


def digest(settings):
    """A short name of settings: the same for the same, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read(path):
    """The rows of a csv, as text; none if there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@dataclass(frozen=True)
class Found:
    """What a figure's receipts hold of one series."""

    figure: Figure
    rows: list
    curves: list

    def values(self, measure):
        """{variant: {seed: number}}, in the figure's order."""
        out = {variant: {} for variant in self.figure.variants}
        for r in self.rows:
            if r.get(measure, "") != "":
                out[r["variant"]][int(r["seed"])] = float(r[measure])
        return out

    def beside(self, measures):
        """Of cells that measure several things of one run, {label: measure}: a Found with the
        labels as variants and `loss` as what is measured.
        """
        rows = [dict(r, variant=x, loss=r[m]) for r in self.rows for x, m in measures.items()]
        return Found(replace(self.figure, variants=dict.fromkeys(measures, {})), rows, [])

    def only(self, *variants):
        """These variants alone, in this order."""
        kept = {v: self.figure.variants[v] for v in variants}
        mine = lambda rows: [r for r in rows if r["variant"] in kept]
        return Found(replace(self.figure, variants=kept), mine(self.rows), mine(self.curves))

    def lines(self, curve):
        """{variant: {seed: {x: y}}}, in the figure's order."""
        out = {variant: {} for variant in self.figure.variants}
        for r in self.curves:
            if r["curve"] == curve:
                line = out[r["variant"]].setdefault(int(r["seed"]), {})
                line[float(r["x"])] = float(r["y"])
        return out

    def differences(self, claim):
        """{seed: more - less}, of the seeds that both have."""
        more = self.values(claim.measure).get(claim.more, {})
        less = self.values(claim.than or claim.measure).get(claim.less, {})
        return {seed: more[seed] - less[seed] for seed in sorted(more.keys() & less.keys())}

    def stamp(self):
        """A short name of all that is drawn, which the picture carries with it."""
        short = lambda x: f"{x:.6g}" if isinstance(x, float) else str(x)
        drawn = lambda r: {k: short(x) for k, x in r.items() if k != "code"}
        rows = [drawn(r) for r in (*self.rows, *self.curves)]
        return digest(rows)

    def verdict(self, claim):
        return verdict.judge(list(self.differences(claim).values()), self.figure.exact)


def look(figure, series="full", folder=None, quick=False):
    """A figure's receipts of one series -> Found: the rows of its settings of now, no others."""
    now = {(v, digest(figure.settings(v, quick))) for v in figure.variants}
    mine = lambda r: r["series"] == series and (r["variant"], r["hash"]) in now
    rows, curves = ([r for r in read(path) if mine(r)] for path in figure.receipts(folder))
    return Found(figure, rows, curves)
