"""
A chapter of the report: a text, a picture, our numbers beside the published ones, what shrank, the
commands that made it, and their time.

A chapter is made from a chain of stages (classroom/stages.py) that are done. Every result of ours
is read from what they left on disk, every published one from published.csv, with the place that it
is from. Where nothing is published, or nothing can be measured at this size, a dash says so.

Not here  what each chapter says: classroom/base.py and classroom/assistant.py
Sources   published.csv names them, number by number
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

REPORT = "arXiv:2604.12374 "
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Chapter:
    """rows: (what, the published number's name or "", ours). seen: the picture in words."""

    title: str
    place: str
    text: tuple
    picture: bytes
    seen: str
    rows: tuple
    shrank: str
    stages: tuple


def published():
    """{what: (value, source)}"""
    with open(HERE / "published.csv", newline="", encoding="utf-8") as f:
        return {row["what"]: (row["value"], row["source"]) for row in csv.DictReader(f)}


def alike(rows):
    """Of rows of single numbers, what is as published."""
    known = published()
    number = lambda x: float(str(x).replace(",", "").removesuffix(" %"))
    return [what for what, key, ours in rows if number(ours) == number(known[key][0])]


def found(pattern, text):
    """The groups of the first line that matches; ValueError if there is none."""
    if not (m := re.search(pattern, text, re.M)):
        raise ValueError(f"no line matches {pattern!r}: was it printed by another version?")
    return m.groups() if len(m.groups()) > 1 else m[1]


def show(page, chain, c, told):
    """One section of the page. told: the stages whose output stands there already."""
    known = published()
    page.section(c.title)
    page.text(*c.text)
    page.figure(c.picture, c.seen)
    rows = []
    for what, key, ours in c.rows:
        value, source = known[key] if key else ("-", "")
        place = re.sub(r"^(?=\d)", "section ", source.removeprefix(REPORT))
        rows.append((what, value, ours, place))
    page.table(("", "published", "ours", "where in the report"), rows)
    page.text(f"What shrank: {c.shrank}")
    page.shell(*(chain.line(name) for name in c.stages))
    again = "the run above, made once" * (told >= set(c.stages))
    page.text(f"Section {c.place} of the report. Time: {again or times(chain, c.stages)}.")
    for name in c.stages:
        if name not in told:
            page.fold(f"what `{name}` printed", chain.said(name))
        told.add(name)


def times(chain, names):
    each = [chain.record(name) for name in names]
    wall, cpu = (sum(r[key] for r in each) for key in ("seconds", "cpu"))
    again = "; an interrupted stage counts from its last start" * any(r["tries"] > 1 for r in each)
    return f"{spelled(wall)} s, {spelled(cpu)} s of CPU over all threads{again}"


def spelled(seconds):
    """Whole seconds, of a short time a digit that is not 0."""
    return f"{seconds:.0f}" if seconds >= 1 else f"{seconds:.1g}"


def bill(page, chain):
    """Every stage, its command and its time."""
    page.section("All commands, and their time")
    names = list(chain.stages)
    rows = [
        (name, f"`{chain.line(name)}`", spelled(r["seconds"]), spelled(r["cpu"]))
        for name, r in zip(names, map(chain.record, names))
    ]
    page.table(("stage", "command", "seconds", "CPU seconds"), rows)
    about = chain.facts("toy")
    where = [f"{k} {v}" for k, v in {**about["versions"], **about["hardware"]}.items() if v]
    page.text(f"Together {times(chain, names)}. On: {', '.join(where)}.")
