"""
The gallery: every figure's claims, what was published, what came out here, and the verdict.

    python -m ablations            the list
    python -m ablations --write    docs/ablations.md, from the receipts alone

Not here  how a figure is made: lab.py; a figure: fig_*.py
"""

import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import command

from ablations import verdict
from ablations.age import aged
from ablations.figure import ROOT, digest, look, read
from bounds import knob

PAGE = ROOT / "docs" / "ablations.md"
HEAD = """# Which figures of the reports survive being made small?

{total}

A claim says that one variant's number is above another's. Both begin with the same weights and
read the same batches for a seed, so that a seed gives one difference. **Reproduces**: the 95 %
interval of the differences' mean (Student's t) lies above zero. **The other way**: below it.
**Inside the spread**: it holds zero. "Ours" is the mean difference, half its interval, and their
unit. What a pilot run settled stands in the receipts as `pilot`, and does not count; `second` is
the same on other seeds. Where the two verdicts differ neither series settles the claim: that is
said below the table, with what the seeds of both say together; the verdict counted is the first.
A claim that failed stays, with its reason. Small is 0.1 to 4 M parameters: a verdict says what
happens here, not who is right.

```
python -m ablations
python -m ablations --write
```

The first lists what follows, the second writes this page from
[receipts](../receipts/ablations). A row there names the code that made it, by a hash of its cell
and of [small.py](../ablations/small.py) without their comments: the list says which rows are of
other code, and nothing is run again. Every figure has `--quick`, two minutes for a class.
How one is made: [CONTRIBUTING.md](../CONTRIBUTING.md#a-figure).
"""
HOW = """
`ours` is what the claim calls the larger minus the smaller, the mean over paired seeds +- half its
95 % interval (Student's t): above zero the claim reproduces, below it is the other way, and an
interval that holds zero is inside the spread."""


def figures():
    """Every FIGURE in ablations/fig_*.py, by name."""
    for path in sorted((ROOT / "ablations").glob("fig_*.py")):
        module = importlib.import_module(f"ablations.{path.stem}")
        if hasattr(module, "FIGURE"):
            yield module, module.FIGURE


def seconds(figure):
    """CPU seconds of all its rows, of pilots too; 0 where they did not write it down."""
    return sum(float(r["seconds"] or 0) for r in read(figure.receipts()[0]))


def question(module):
    """The first sentences of a figure's file."""
    return cell(inspect.getdoc(module).split("\n\n")[0])


def minutes(figure):
    spent = seconds(figure) / 60
    return f"{spent:.1f}" if spent else "not written down"


def settled(figure):
    """How its settings came about, as far as its receipts tell."""
    if figure.exact:
        return "arithmetic, nothing to settle"
    pilots = [r for r in read(figure.receipts()[0]) if r["series"] == "pilot"]
    if not pilots:
        return "set by hand, no pilot rows"
    now = {digest(figure.settings(v)) for v in figure.variants}
    kept = sum(r["hash"] in now for r in pilots)
    many = f"{len(pilots)} row" + "s" * (len(pilots) != 1)
    return f"by a pilot of {many}, {kept} at the settings of now"


def ours(figure, claim, found):
    """A verdict's numbers with their unit, and its seeds."""
    unit = figure.unit(claim.measure) or f"({claim.measure})"
    return f"{found.numbers()} {unit}, {found.seeds} seed" + "s" * (found.seeds != 1)


def judged():
    """(figure, claim, its verdict, the second series' or None) of every claim."""
    for _, figure in figures():
        full, extra = look(figure), look(figure, "extra")
        for claim in figure.claims:
            second = extra.verdict(claim)
            yield figure, claim, full.verdict(claim), second if second.seeds else None


def total():
    """The sentence that sums up."""
    both = [(v, second) for _, _, v, second in judged()]
    found = [v for v, _ in both]
    same = [word(v) == word(w) for v, w in both if w and min(v.seeds, w.seeds) >= verdict.LEAST]
    firm = [v for v in found if v.seeds >= verdict.LEAST]
    count = lambda what: sum(word(v) == what for v in firm)
    each = [seconds(f) for _, f in figures()]
    spent, silent = sum(each) / 60, sum(not x for x in each)
    many = f"{silent} figure" + "s" * (silent != 1)
    untold = f"; the rows of {many} are of before it and do not say" * (silent > 0)
    return (
        f"Of {len(firm)} claims with a verdict from three seeds or more, "
        f"{count(verdict.SAME)} reproduce, {count(verdict.OTHER)} the other way, and "
        f"{count(verdict.INSIDE)} cannot be told from the spread of seeds; "
        f"{len(found) - len(firm)} more are arithmetic or not finished. On other seeds "
        f"{sum(same)} of {len(same)} came out as before. The lab's own cells took "
        f"{spent:.0f} CPU minutes{untold}."
    )


def word(found):
    """A verdict without the seeds that it would need."""
    return found.words.split(" (")[0]


def disputed(full, extra):
    """A sentence for each claim of which the second series' verdict is another: what the seeds of
    both say.
    """
    for claim in full.figure.claims:
        one, two = full.verdict(claim), extra.verdict(claim)
        if min(one.seeds, two.seeds) < verdict.LEAST or word(one) == word(two):
            continue
        each = [*full.differences(claim).values(), *extra.differences(claim).values()]
        both = verdict.judge(each)
        yield (
            f"{claim.says}: not settled. {word(one).capitalize()} on the first {one.seeds} seeds, "
            f"{word(two)} on {two.seeds} others; all {both.seeds}: {both.numbers()}, {both.words}."
        )


def cell(text):
    return " ".join(text.split()).replace("|", "/")


def section(module, figure):
    """A figure's part of the page."""
    full, extra = look(figure), look(figure, "extra")
    lines = [
        f"## {figure.name}",
        "",
        question(module),
        "",
        "```",
        f"python -m {figure.home()}",
        "```",
        "",
    ]
    lines += ["| claim | published | ours | verdict | second |", "|---|---|---|---|---|"]
    for claim in figure.claims:
        one, two = full.verdict(claim), extra.verdict(claim)
        second = f"{word(two)}, {two.numbers()}" if two.seeds else "-"
        said = f"{claim.published} ({claim.where})"
        lines.append(
            "| "
            + " | ".join(map(cell, (claim.says, said, ours(figure, claim, one), one.words, second)))
            + " |"
        )
    lines += [""] + [f"{cell(c.says)}: {cell(c.reason)}\n" for c in figure.claims if c.reason]
    lines += [f"{cell(line)}\n" for line in disputed(full, extra)]
    lines += [f"CPU minutes: {minutes(figure)}. Settings: {settled(figure)}.", ""]
    picture = f"ablations/{figure.name}.png"
    if (ROOT / "docs" / picture).is_file():
        lines += [f"![{question(module)}]({picture})", ""]
    return "\n".join(lines)


def page():
    """docs/ablations.md."""
    parts = [HEAD.format(total=total()), *(section(m, f) for m, f in figures())]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def listing():
    """The lines of the list."""
    yield total()
    yield HOW
    each = list(judged())
    for module, figure in figures():
        yield f"\n{question(module)}"
        yield f"    python -m {figure.home()}"
        yield f"    CPU minutes: {minutes(figure)}; settings: {settled(figure)}"
        if said := aged(figure):
            yield f"    {said}"
        for f, claim, found, second in each:
            if f is figure:
                yield f"  {claim.says}\n    published  {claim.published} ({claim.where})"
                again = f"; on other seeds {second.words}, {second.numbers()}" if second else ""
                yield f"    ours       {ours(figure, claim, found)}: {found.words}{again}"
        yield from (f"  {line}" for line in disputed(look(figure), look(figure, "extra")))


@dataclass(frozen=True)
class Flags:
    write: bool = knob(False, "write the gallery, docs/ablations.md, from the receipts")


def work(flags):
    if flags.write:
        Path(PAGE).write_text(page(), encoding="utf-8")
        command.say(f"{PAGE.relative_to(ROOT)}: {total()}")
        return
    for line in listing():
        command.say(line)


if __name__ == "__main__":
    command.run(work, Flags, "python -m ablations", __doc__)
