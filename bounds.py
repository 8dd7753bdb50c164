"""
Bounds: what a field may hold is declared once, beside its default and its help.

    @dataclass(frozen=True)
    class Flags:
        steps: int = knob(128, "optimiser steps", least=1, most=10**9)
        device: str = knob("auto", "where", choices=("auto", "cpu", "cuda", "mps"))

    knob      declares a field; a number or text without bounds is refused at once
    fault     why a field may not hold x: the end of a sentence, or nothing
    check     ValueError of the first field of an object that holds what it may not
    build     an object from the fields of a file, perhaps of another version
    value     a text, as a command line has it -> what the field holds

Whoever makes the object asks `check`: a command line, a notebook, a file. NaN is in no bounds.

Not here  how fields become flags, and how a refusal ends a program: command.py; what a field means,
          and how fields bear on each other: the file that declares them
Sources   dataclasses and their metadata, of the standard library
"""

import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import get_args

ENDLESS = 10**9  # of steps, tokens, sequences: nobody has counted further
LONGEST = 4096  # characters of a name or a path


# 1. Declarations


@dataclass(frozen=True)
class Bounds:
    """What a field may hold. Of text: how many characters. Of a list: of each of its elements."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: tuple = ()
    spells: str = ""

    def words(self, kind):
        """As a sentence has it: `an integer from 1 to 8`."""
        if kind is bool:
            return "true or false"
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        if self.spells:
            return f"spelled as {self.spells}"
        if kind is str:
            return f"text of {self.least:,} to {self.most:,} characters"
        low = f"from {self.least:,} to" if self.above is None else f"above {self.above:,} and up to"
        return f"{'an integer' if kind is int else 'a number'} {low} {self.most:,}"

    def hold(self, x):
        """Whether x, of the right type, lies within. Never for NaN."""
        if isinstance(x, bool):
            return True
        if self.choices:
            return x in self.choices
        if self.spells:
            return bool(re.fullmatch(self.spells, x))
        size = len(x) if isinstance(x, str) else x
        low = size >= self.least if self.above is None else size > self.above
        return bool(low and size <= self.most)


def knob(
    default,
    help="",
    least=None,
    most=None,
    above=None,
    choices=(),
    spells="",
    memory=False,
    place=False,
    bare=None,
):
    """A field with its bounds. Text is 1 to 4096 characters if nothing else is said (0 where the
    default is empty). memory: less of it needs less memory, which an error then says; place: no
    flag, but an argument by its place; bare: what the flag means without a value.
    """
    text = isinstance(default, (str, tuple)) or default is MISSING
    if text and most is None:
        least, most = int(default != "") if least is None else least, LONGEST
    bounds = Bounds(least, most, above, tuple(choices), spells)
    known = bounds.choices or spells or most is not None and (least is None) != (above is None)
    if not known and not isinstance(default, bool):
        raise TypeError(f"a knob without bounds: {help or default!r}")
    return field(
        default=default,
        metadata=dict(help=help, bounds=bounds, memory=memory, place=place, bare=bare),
    )


def kinds(f):
    """The types that a field may have, None and list among them: int | None -> (int, NoneType)."""
    return get_args(f.type) or (f.type,)


def kind(f):
    """Its first type, which is that of a list's elements too."""
    return str if kinds(f)[0] is tuple else kinds(f)[0]


def flag(f):
    return f.name if f.metadata["place"] else "--" + f.name.replace("_", "-")


def brief(x):
    text = repr(x)
    return text if len(text) <= 60 else text[:50] + f"... ({len(text):,} characters)"


# 2. Checks


def fault(f, x):
    """Why a field may not hold x, as the end of a sentence; nothing if it may."""
    if x is None and NoneType in kinds(f):
        return ""
    if isinstance(x, (list, tuple)) and {list, tuple} & set(kinds(f)):
        if not x and list in kinds(f):
            return "the list is empty"
        if None in x:
            return f"{brief(x)} holds None"
        return next(filter(None, (fault(f, y) for y in x)), "")
    bounds, one = f.metadata["bounds"], kind(f)
    if one is str and isinstance(x, str) and "\0" in x:
        return f"{brief(x)} is not text without NUL characters"
    return "" if typed(one, x) and bounds.hold(x) else f"{brief(x)} is not {bounds.words(one)}"


def typed(one, x):
    """Whether x is of that type. An integer is a number too; true and false are neither."""
    if isinstance(x, bool) or one is bool:
        return isinstance(x, bool) and one is bool
    return isinstance(x, (int, float) if one is float else one)


def check(settings, name=flag):
    """ValueError of the first field whose value its declaration does not allow. name: how fields
    are called.
    """
    for f in fields(settings):
        if why := fault(f, getattr(settings, f.name)):
            raise ValueError(f"{name(f)}: {why}")
    return settings


def build(kind, given, where, over=None):
    """A `kind` from what another place holds (a file, perhaps of another version), with `over` over
    it. ValueError names what this version does not know, or does not allow.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {brief(given)} is no table of fields")
    if strange := sorted(set(given) - {f.name for f in fields(kind)}):
        raise ValueError(
            f"{where}: {brief(', '.join(strange))} is unknown here: was another version its writer?"
        )
    return check(kind(**{**given, **(over or {})}), lambda f: f"{where}: {f.name}")


def value(f, text):
    """A text as a command line has it -> what the field holds; ValueError ends the sentence."""
    one = kind(f)
    if text == "None" and NoneType in kinds(f):
        return None
    words = {"true": True, "1": True, "false": False, "0": False}
    try:
        x = words[text.lower()] if one is bool else one(text)
    except (ValueError, KeyError):
        wanted = f.metadata["bounds"].words(one)
        raise ValueError(f"{brief(text)} is not {wanted}") from None
    if why := fault(f, x):
        raise ValueError(why)
    return x


if __name__ == "__main__":  # command.part says the like, but stands on this file
    print("bounds.py is no program, but a part of one: python command.py", file=sys.stderr)
    sys.exit(2)
