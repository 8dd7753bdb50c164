"""
Live: how a run tells of itself while it goes on. On a console a line is a line. In a notebook the
steps are one bar and one picture, which grow where they stand, and the lines lie folded below.

    teller(draw)    print; in a notebook a Live
    Live            takes lines as print does; and with each row of the log, `step`, all of them

What is said after the first step in several lines (a sample, a table) is there to be read, and is
printed as it is.

Not here  what the picture shows: plot.py, post/picture.py
Sources   IPython's display protocol: a display with an id is updated where it stands
"""

import base64
import html
import importlib
import sys
import time

import plot

SHARE = 0.1  # of the time, at most, goes into pictures


def teller(draw=plot.growing):
    """What takes a run's lines if nobody else does. draw: the rows of a log -> a figure."""
    if not in_notebook():
        return print
    return Live(draw, importlib.import_module("IPython.display").display)


def in_notebook():
    """Whether a notebook's kernel runs this process. Imports nothing that is not there already."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class Live:
    """draw(rows) -> a figure; display: IPython's, or one like it."""

    def __init__(self, draw, display):
        self.draw, self.display = draw, display
        self.lines, self.rows, self.done, self.steps = [], [], 0, 1
        self.places = {}  # name: the handle of a display
        self.drawn = self.took = 0.0  # when the last picture was there, and how long it took

    def __call__(self, line):
        if self.rows and "\n" in line:
            print(line)
        else:
            self.lines.append(line)
            self.tell(line.strip())

    def step(self, line, rows, done, steps):
        """`done` of `steps` are done. rows: the log so far; line: its last row in words."""
        self.rows, self.done, self.steps = rows, done, steps
        self.tell(line)
        if time.perf_counter() - self.drawn > self.took / SHARE:
            self.paint()

    def close(self):
        """The last picture, and the bar without a word that is only true for a moment."""
        if self.rows:
            self.paint()
        self.tell(f"{self.done} of {self.steps} steps")

    def tell(self, words):
        """The bar, beside it `words`, and the lines below."""
        said = html.escape("\n".join(self.lines))
        page = (
            f'<progress value="{self.done}" max="{self.steps}"></progress> {html.escape(words)}'
            f"<details><summary>what the run said</summary><pre>{said}</pre></details>"
        )
        self.put("bar", {"text/html": page, "text/plain": words})

    def paint(self):
        began = time.perf_counter()
        picture = base64.b64encode(plot.png(self.draw(self.rows))).decode()
        self.put("picture", {"image/png": picture, "text/plain": f"{self.done} of {self.steps}"})
        self.drawn = time.perf_counter()
        self.took = self.drawn - began

    def put(self, name, bundle):
        """A display's content, where it stands or, the first time, as the cell's next output."""
        if name in self.places:
            self.places[name].update(bundle, raw=True)
        else:
            self.places[name] = self.display(bundle, raw=True, display_id=True)
