"""
Which code made a row: the hash of its settings decides what runs again, the one of its code is only
reported, so that a mended cell leaves no doubt which rows are of before.

    code(figure)    a short name of the text of its cell and of small.py; of neither comments nor
                    docstrings nor line breaks
    aged(figure)    a sentence on the rows that other code made, or ''

Not here  the code that these call: train.py, model.py, rounding.py
"""

import ast
import inspect
import textwrap
from pathlib import Path

from ablations.figure import digest, look

SMALL = Path(__file__).with_name("small.py")


class Bare(ast.NodeTransformer):
    """Without strings that nobody takes: docstrings."""

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else node


def plain(source):
    """A program's text as Python would write it."""
    return ast.unparse(Bare().visit(ast.parse(textwrap.dedent(source))))


def code(figure):
    """What a row has in its column `code`."""
    own = inspect.getsource(figure.cell) if figure.cell else ""
    return digest([plain(x) for x in (SMALL.read_text(encoding="utf-8"), own)])


def aged(figure):
    """Of the rows that count, in both series: how many other code made, how many do not say."""
    rows = [r for series in ("full", "extra") for r in look(figure, series).rows]
    made = [r.get("code", "") for r in rows]
    silent = sum(x == "" for x in made)
    others = len(made) - silent - made.count(code(figure))
    said = [f"made by older code: {others} of {len(rows)} rows"] * (others > 0)
    said += [f"not known by which code: {silent} of {len(rows)} rows"] * (silent > 0)
    return "; ".join(said)
