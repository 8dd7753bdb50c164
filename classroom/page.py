"""
A page: sections, pictures and tables in one file of HTML that any browser shows, and prints.

    page = Page("Title", "what it is about, in a sentence")
    page.section("Architecture")
    page.text("One mixer a layer; `M` is Mamba-2.", "A second paragraph.")
    page.figure(png, "what is to be seen, in words", "what it says")
    page.table(("", "published", "ours"), [("parameters", "120.6 B", 120_668_707_840)])
    page.shell("python train.py")
    page.fold("what it printed", "step 1 ...")
    page.write("runs/report/index.html")

Pictures travel inside the file, so that it can be sent and kept. Nothing is fetched: the page
itself forbids it to the browser. It fits a phone: what is too wide there to be read, a picture or a
table, moves inside its own frame.

Text is text: `<` stays `<`. Between backticks it is code, [words](https://...) is a link. What
makes its own HTML (a microscope, say) has `raw`, `style` and `script`.

Not here  what is shown: report.py
Sources   data URLs: RFC 2397; default-src 'none': W3C's Content Security Policy
"""

import base64
import html
import re
from pathlib import Path

import disk

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
body { font: 17px/1.55 Georgia, serif; color: #1a1a1a; background: #fff; margin: 0 auto;
       max-width: 48rem; padding: 1rem; overflow-wrap: break-word; }
h1 { line-height: 1.15; }
h2 { margin-top: 2.5em; border-top: 2px solid #0072b2; padding-top: .4em; }
h1, h2, nav, th, figcaption, caption, summary { font-family: system-ui, sans-serif; }
a { color: #0060a0; } nav ol { columns: 14rem; padding-left: 1.5rem; font-size: .85rem; }
figure { margin: 1.2em 0; overflow-x: auto; } figure > * { max-width: 100%; height: auto; }
figcaption, caption { font-size: .85rem; color: #444; text-align: left; }
.wide { overflow-x: auto; margin: 1.2em 0; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3em .9em; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td code { overflow-wrap: anywhere; } th:first-child, td:first-child { min-width: 7em; }
code span { display: inline-block; max-width: 100%; vertical-align: top; }
code, pre { font: .82rem/1.45 ui-monospace, monospace; background: #f3f5f7; }
pre { padding: .7em; white-space: pre-wrap; overflow-wrap: anywhere; }
@media screen and (max-width: 40rem) {
  figure > img, figure > svg { max-width: none; width: 36rem; } th, td { padding: .3em .5em; }
}
@media print { body { max-width: none; font-size: 11pt; } nav { display: none; }
               figure, table, pre { break-inside: avoid; } h2 { break-after: avoid; }
               figure, .wide { overflow: visible; } details { display: none; } }
"""
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def words(text):
    """Text -> HTML: escaped, with `code` and [links](https://...)."""
    safe = html.escape(str(text))
    safe = re.sub(r"`([^`]+)`", lambda m: f"<code>{whole(m[1])}</code>", safe)
    return re.sub(r"\[([^\]]+)\]\((https://[^)\s]+)\)", r'<a href="\2">\1</a>', safe)


def whole(command):
    """HTML of a command of several words, none of which is broken at its hyphens."""
    parts = re.split(r"( +|\n)", command)
    return "".join(f"<span>{x}</span>" if x.strip() else x for x in parts) if parts[1:] else command


def anchor(title):
    """The name of a section's place, as in page.html#long-context."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def spelled(x):
    """A whole number with its thousands apart; everything else as it is."""
    return f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else str(x)


def numeric(column):
    """Whether a column of texts holds nothing but numbers."""
    return all(re.fullmatch(r"[-+]?[\d.,]+( ?%)?", x) for x in column)


class Page:
    """HTML that grows from the top to the bottom."""

    def __init__(self, title, lead=""):
        self.title, self.lead = title, lead
        self.parts, self.sections, self.styles, self.scripts = [], [], [STYLE], []

    def section(self, title):
        """A heading, and a line of the contents at the top."""
        if anchor(title) in map(anchor, self.sections):
            raise ValueError(f"a second section {title!r}: links could not tell them apart")
        self.sections.append(title)
        self.raw(f'<h2 id="{anchor(title)}">{words(title)}</h2>')

    def text(self, *paragraphs):
        for paragraph in paragraphs:
            self.raw(f"<p>{words(paragraph)}</p>")

    def figure(self, picture, alt, caption=""):
        """picture: the bytes of a PNG, or a text that is an <svg>. alt: for who cannot see it."""
        if isinstance(picture, bytes):
            coded = base64.b64encode(picture).decode()
            shown = f'<img src="data:image/png;base64,{coded}" alt="{html.escape(alt)}">'
        else:
            shown = picture.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
        below = f"<figcaption>{words(caption)}</figcaption>" if caption else ""
        self.raw(f"<figure>{shown}{below}</figure>")

    def table(self, head, rows, caption=""):
        """Columns of numbers stand to the right. ValueError if a row has not as many cells as the
        head."""
        if odd := [row for row in rows if len(row) != len(head)]:
            raise ValueError(f"a row of {len(odd[0])} cells under a head of {len(head)}: {odd[0]}")
        top = "".join(f'<th scope="col">{words(x)}</th>' for x in head)
        cells = [[spelled(x) for x in row] for row in rows]
        opening = ['<td class="number">' if numeric(c) else "<td>" for c in zip(*cells)]
        cells = [[re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", x) for x in row] for row in cells]
        lines = ["".join(f"{td}{words(x)}</td>" for td, x in zip(opening, row)) for row in cells]
        body = "\n".join(f"<tr>{line}</tr>" for line in lines)
        said = f"<caption>{words(caption)}</caption>" if caption else ""
        whole = f"<table>{said}<thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table>"
        self.raw(f'<div class="wide">{whole}</div>')

    def shell(self, *commands):
        """Lines to paste into a shell."""
        self.raw(f"<pre><code>{whole(html.escape(chr(10).join(commands)))}</code></pre>")

    def fold(self, summary, text):
        """Long text, shown to who asks for it."""
        inside = f"<summary>{words(summary)}</summary><pre>{html.escape(text)}</pre>"
        self.raw(f"<details>{inside}</details>")

    def raw(self, markup):
        self.parts.append(markup)

    def style(self, css):
        self.styles.append(css)

    def script(self, code):
        """Code of the page's own, which runs when the page is there."""
        if "</" in code:
            raise ValueError("a script with '</' in it may end too early: write '<\\/'")
        self.scripts.append(code)

    def contents(self):
        lines = [f'<li><a href="#{anchor(s)}">{words(s)}</a></li>' for s in self.sections]
        return f"<nav><ol>{''.join(lines)}</ol></nav>" if lines else ""

    def html(self):
        """The whole file."""
        head = HEAD.format(
            policy=POLICY, title=html.escape(self.title), style="\n".join(self.styles)
        )
        lead = f"<p>{words(self.lead)}</p>" if self.lead else ""
        top = f"<h1>{words(self.title)}</h1>{lead}{self.contents()}"
        scripts = [f"<script>{code}</script>" for code in self.scripts]
        return head + "\n".join([top, *self.parts, *scripts, "</body>\n</html>\n"])

    def write(self, path):
        disk.write(Path(path), lambda f: f.write(self.html().encode()))
