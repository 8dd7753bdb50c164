"""
A microscope: what a model did at every token of a text (watch.py), as one page that can be pointed
at.

    write(record, enc, about, path)      the page: every token, and beside them what happened at one

The page holds the numbers and draws them itself: microscope.js chooses a token and colours the
others, microscope.css says how it looks. Numbers are rounded for it, so that a page can be sent:

    half-lives    to a sixteenth of an octave, from 2^-8 to 2^23 tokens; beyond, the end of that
    shares        of experts, habits, attention: in steps of 1/255
    attention     the 24 tokens that a head looks at most; the others' weights are left out

Not here  the numbers: watch.py; the frame of a page: page.py
"""

import base64
import json
import math
import struct
from pathlib import Path

from classroom.page import Page
from classroom.watch import KINDS, habit, kind
from config import LETTERS

KEEP = 24  # tokens that an attention head is shown to look at
MOST = 2048  # tokens of a text; a page of more would be too much for a browser
NEVER = 255  # the code of a habit of which there was no earlier token to tell

BODY = """
<div id="look">
<div id="top"><div id="lenses" role="group" aria-label="what colours the text"></div>
<p id="caption"></p>{legend}</div>
<div id="text" tabindex="0" aria-label="the text, token by token"></div>
<aside id="panel" aria-live="polite"></aside>
</div>
<noscript><p>This page draws itself: it needs JavaScript, its own, and nothing from elsewhere.</p>
</noscript>
"""
LEGEND = """<p id="legend"><span><i class="stood"></i>drafted, and stood</span>
<span><i class="fell"></i>here a draft fell</span></p>"""
MEANING = (
    (
        "Surprise",
        "-log2 of the probability that the model gave to the token that came, before any "
        "temperature or top-p. Rank 1: no other token was likelier.",
    ),
    (
        "Drafts",
        "With `--speculate` the MTP block drafts several tokens and the model judges them in one "
        "pass. A solid line: drafted, and stood. A dotted line: here a draft fell, and the model "
        "chose instead. Chips: the experts that the block ran the draft through, all its own.",
    ),
    (
        "Mamba-2",
        "A bar a head: its half-life, ln 2 / (dt |A|) tokens. A token with a large dt makes a head "
        "forget; where dt is small the head remembers. Pointed at, a bar colours the earlier "
        "tokens by what is left of them in that head: the product of exp(dt A) since.",
    ),
    (
        "LatentMoE",
        "A chip an expert that the layer chose, darker for a larger share of the gates. Its lower "
        "edge fills by habit: of the earlier tokens of the same kind (word, sign, number, ...), "
        "the share that chose this expert too. Pointed at, a chip colours the tokens it served.",
    ),
    (
        "Attention",
        "A line a head: the tokens it looks at most, and how much. Pointed at, it colours them.",
    ),
)


# 1. Numbers for the page


def small(x):
    """Whole numbers of 0 to 255 -> text."""
    return base64.b64encode(bytes(x.flatten().tolist())).decode()


def large(x):
    """Whole numbers of 0 to 65,535 -> text, two bytes each, the lower first."""
    return base64.b64encode(struct.pack(f"<{x.numel()}H", *x.flatten().tolist())).decode()


def shares(x):
    """Numbers of 0 to 1 in steps of 1/255."""
    return (255 * x).round().clamp(0, 255).int()


def habits(x):
    """The same in steps of 1/254; NaN is NEVER."""
    return (254 * x).round().nan_to_num(NEVER).int()


def octaves(half_life):
    """Tokens -> eighths of an octave above 2^-8."""
    return (8 * (half_life.double().log2() + 8)).round().clamp(0, 255).int()


def shown(raw):
    """The bytes of a token as text; of a part of a character its bytes in hexadecimal."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{b:02x}" for b in raw)


def figures(x, digits=4):
    """A number with few digits; None if it is none."""
    return None if math.isnan(x) else float(f"{x:.{digits}g}")


def layer(record, i, kinds, experts):
    """What the page knows of a layer."""
    if i in record.half_lives:
        half = record.half_lives[i]
        return dict(letter="M", heads=half.shape[1], half=small(octaves(half)))
    if i in record.picks:
        picks = record.picks[i]
        return dict(
            letter="E",
            of=experts,
            each=picks.shape[1],
            picks=large(picks),
            shares=small(shares(record.shares[i])),
            habit=small(habits(habit(picks, kinds))),
            same=small(habits(habit(picks, record.ids))),
        )
    if i in record.weights:
        most, at = record.weights[i].topk(min(KEEP, len(record.ids)))  # (h, t, kept)
        most, at = most.transpose(0, 1), at.transpose(0, 1)
        weight = small(shares(most))
        return dict(letter="*", heads=at.shape[1], keep=at.shape[2], at=large(at), weight=weight)
    return dict(letter="-")


def fate(found, text):
    """A Fate for the page; text: id -> text."""
    return dict(
        place=found.place,
        of=found.of,
        fell=[text(t) for t in found.fell],
        p=figures(found.probability),
        sure=figures(found.draft.sure),
        experts=[
            [pick.tolist(), [figures(x, 2) for x in share.tolist()]]
            for pick, share in found.draft.experts
        ],
    )


def plain(record, spell, special, config):
    """A Record as what JSON can hold. spell: id -> bytes; special: ids of special tokens."""
    kinds = [kind(spell(t), t in special) for t in record.ids]
    text = lambda t: shown(spell(t))
    best = zip(record.best.tolist(), record.best_probability.tolist())
    return dict(
        tokens=[text(t) for t in record.ids],
        kinds=kinds,
        names=KINDS,
        start=record.start,
        vocabulary=config.vocab_size,
        p=[figures(p) for p in record.probability.tolist()],
        rank=record.rank.tolist(),
        best=[[[text(t), figures(p)] for t, p in zip(*row)] for row in best],
        fates={i: fate(found, text) for i, found in record.fates.items()},
        letters=LETTERS,
        layers=[
            dict(place=i, **layer(record, i, kinds, config.n_routed_experts))
            for i in range(config.num_hidden_layers)
        ],
    )


# 2. The page


def bits(record):
    """Mean surprise of the written tokens; of a text that was given whole, of all but the first."""
    written = len(record.ids) > record.start
    p = record.probability[max(1, record.start) if written else 1 :].double()
    return float(-p.log2().mean())


def page(record, spell, special, config, about):
    """The whole page. about: what is shown, in a sentence."""
    out = Page("What the model did, token by token", about)
    out.style(beside("microscope.css"))
    out.raw(BODY.format(legend=LEGEND if record.fates else ""))
    known = json.dumps(plain(record, spell, special, config), separators=(",", ":"))
    safe = known.replace("<", "\\u003c")
    out.raw(f'<script type="application/json" id="record">{safe}</script>')
    out.script(beside("microscope.js"))
    out.raw("<h2>What is shown</h2>")
    out.table(("", "what it means"), MEANING)
    return out


def beside(name):
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def fits(t):
    """ValueError if a text of t tokens is too long for a page."""
    if t > MOST:
        raise ValueError(f"a text of {t:,} tokens is more than a page holds, {MOST:,}")
