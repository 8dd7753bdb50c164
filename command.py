"""
Commands: what every program here shares. A flag is declared once, with its help and its bounds;
what can be foreseen to fail ends in one sentence and the right exit code.

    @dataclass(frozen=True)
    class Flags:
        steps: int = knob(128, "optimiser steps", least=1, most=10**9)
        device: str = knob("auto", "where", choices=("auto", "cpu", "cuda", "mps"))

    def main(argv=None):
        command.run(work, Flags, "heal.py", __doc__, argv)          work(flags) does it, and returns

    knob      a field: default, help, bounds; a number or text without bounds is refused at once
    parser    every field of a dataclass is a flag; only what was given is in the answer
    value     a text -> what a field may hold      check    the same of any object with such fields
    run       parse, check, work; then exit   0 done        1 stopped by the numbers or the machine
                                              2 bad input   130 interrupted
    document  a JSON file, or one sentence that names the file
    device    auto, cpu, cuda or mps -> what is there
    fits      refuses what the memory cannot hold

Bounds hold for whoever makes the object: a command line, a notebook, a file. NaN is in no bounds.

Not here  what the flags mean: each program's own file; how fields bear on each other
Sources   exit codes 2 and 130 as argparse and the shell have them
"""

import argparse
import contextlib
import errno
import json
import os
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
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
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        if self.spells:
            return f"spelled as {self.spells}"
        if kind is str:
            return f"text of {self.least:,} to {self.most:,} characters"
        low = f"from {self.least:,} to" if self.above is None else f"above {self.above:,} and up to"
        return f"{'an integer' if kind is int else 'a number'} {low} {self.most:,}"

    def hold(self, x):
        """Whether a number, or the number of a text's characters, lies within. Never for NaN."""
        low = x >= self.least if self.above is None else x > self.above
        return bool(low and x <= self.most)


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
):
    """A field with its bounds. Text is 1 to 4096 characters if nothing else is said (0 where the
    default is empty). memory: less of it needs less memory, which an error then says; place: no
    flag, but an argument by its place.
    """
    text = isinstance(default, (str, tuple)) or default is MISSING
    if text and most is None:
        least, most = int(default != "") if least is None else least, LONGEST
    bounds = Bounds(least, most, above, tuple(choices), spells)
    known = bounds.choices or spells or most is not None and (least is None) != (above is None)
    if not known and not isinstance(default, bool):
        raise TypeError(f"a knob without bounds: {help or default!r}")
    return field(
        default=default, metadata=dict(help=help, bounds=bounds, memory=memory, place=place)
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
    bounds, one = f.metadata["bounds"], kind(f)
    if x is None and NoneType in kinds(f):
        return ""
    if isinstance(x, (list, tuple)) and {list, tuple} & set(kinds(f)):
        if not x and list in kinds(f):
            return "the list is empty"
        return next(filter(None, (fault(f, y) for y in x)), "")
    fits = isinstance(x, (int, float) if one is float else one)
    if isinstance(x, bool) != (one is bool) or not fits:
        what = "true or false" if one is bool else bounds.words(one)
    elif one is bool:
        return ""
    elif bounds.choices:
        what = "" if x in bounds.choices else bounds.words(one)
    elif one is str and "\0" in x:
        what = "text without NUL characters"
    elif one is str and bounds.spells:
        what = "" if re.fullmatch(bounds.spells, x) else bounds.words(one)
    else:
        size = len(x) if one is str else x
        what = "" if bounds.hold(size) else bounds.words(one)
    return what and f"{brief(x)} is not {what}"


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
    one, bounds = kind(f), f.metadata["bounds"]
    if text == "None" and NoneType in kinds(f):
        return None
    words = {"true": True, "1": True, "false": False, "0": False}
    try:
        x = words[text.lower()] if one is bool else one(text)
    except (ValueError, KeyError):
        what = "true or false" if one is bool else bounds.words(one)
        raise ValueError(f"{brief(text)} is not {what}") from None
    if why := fault(f, x):
        raise ValueError(why)
    return x


def parser(kind, program, about):
    """Every field of a dataclass is a flag. Only what was given is in the answer, so that settings
    of another place can stand behind it.
    """
    p = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} {places(kind)}[--flag value ...]; -h lists the flags",
        description=about.strip().split("\n\n")[0],
        allow_abbrev=False,
    )
    for f in fields(kind):
        p.add_argument(flag(f), default=argparse.SUPPRESS, **how(f))
    return p


def places(kind):
    return "".join(f"[{f.name}] " for f in fields(kind) if f.metadata["place"])


def how(f):
    """A field's words for argparse."""
    switch, note = isinstance(f.default, bool), f" (default: {f.default})"
    help = (f.metadata["help"] + note * (not switch and f.default not in ("", (), None))).replace(
        "%", "%%"
    )
    if switch:
        return dict(action=argparse.BooleanOptionalAction, help=help)

    def read(text):
        try:
            return value(f, text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    many = tuple in kinds(f)
    if f.metadata["place"]:
        return dict(type=read, help=help, nargs="*" if many else "?")
    return dict(type=read, help=help, metavar=f.name.upper()) | (
        dict(action="append") if many else {}
    )


# 3. Ends

# What torch says, in a RuntimeError, of a machine that is full.
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "can't start new thread",
    "resource temporarily unavailable",
    "storage size calculation overflowed",
    "failed to allocate",
)
NO_DISK = "pytorchstreamwriter"
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE}


def causes(e):
    """An exception and those that it was raised from or during."""
    while e is not None:
        yield e
        e = e.__cause__ or e.__context__


def ending(e, kind=None):
    """Exit code and sentence of a failure that can be foreseen; None of any other."""
    said, first = str(e).strip(), (str(e).strip().splitlines() or [""])[0]
    full = [c for c in causes(e) if isinstance(c, OSError) and c.errno in MACHINE]
    no_memory = isinstance(e, MemoryError) or isinstance(e, OSError) and e.errno == errno.ENOMEM
    if isinstance(e, RuntimeError):
        no_memory |= any(words in said.lower() for words in NO_MEMORY)
    if isinstance(e, KeyboardInterrupt):
        return 130, said or "interrupted"
    if no_memory:
        less = [flag(f) for f in fields(kind) if f.metadata["memory"]] if kind else []
        advice = f"; less of {', '.join(less)} needs less" * bool(less)
        return 1, f"stopped: out of memory ({first[:160] or 'no more is given'}){advice}"
    if full:
        return 1, f"stopped: {full[0].strerror}: {full[0].filename or 'while writing'}"
    if isinstance(e, RuntimeError) and NO_DISK in said.lower():
        return 1, f"stopped: a file could not be written ({first[:160]})"
    if isinstance(e, (FloatingPointError, ConnectionError, TimeoutError)):
        return 1, f"stopped: {said}"
    if isinstance(e, OSError) and e.filename is not None:
        return 2, f"{e.strerror}: {e.filename}"
    if isinstance(e, (ValueError, OSError, ImportError)):
        return 2, said or type(e).__name__
    return None


def mute():
    """Nobody reads what is printed: from here on it goes nowhere, and the end of the process does
    not complain.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line=""):
    """Prints a line at once. A reader who has gone (`| head`) does not stop the work."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        mute()


def run(work, kind, program, about, argv=None, make=None):
    """Parses argv, makes a `kind` of what was given (or what `make` makes of it), checks it, and
    calls work with it. Returns when that is done; every failure that can be foreseen ends the
    process with one sentence and its code. An exception that nobody foresaw passes: it is a fault
    of ours, and its traceback is needed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console without the letter shows a question mark
            stream.reconfigure(errors="replace")
    p = parser(kind, program, about)
    try:
        given = vars(p.parse_args(argv))
        settings = make(given) if make else kind(**given)
        work(check(settings))
        sys.stdout and sys.stdout.flush()
    except BrokenPipeError:
        mute()
        sys.exit(1)
    except (
        ValueError,
        OSError,
        ImportError,
        MemoryError,
        RuntimeError,
        FloatingPointError,
        KeyboardInterrupt,
    ) as e:
        code, sentence = ending(e, kind) or (None, "")
        if code is None:
            raise
        if code == 2:
            p.error(sentence)
        p.exit(code, "\n" * (code == 130) + f"{p.prog}: {sentence}\n")


@dataclass(frozen=True)
class NoFlags:
    """Of a file that only prints its point."""


def demo(show, about):
    """The same ends for such a file: `python mamba.py` calls show(); any flag is refused."""
    run(lambda flags: show(), NoFlags, Path(sys.argv[0]).name, about)


# 4. What several programs ask for


def document(path, kind=dict):
    """A JSON file -> the dict (or what kind says) in it. Files that an editor gave a byte order
    mark are read too.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:  # no JSON, no UTF-8, or nested without end
        raise ValueError(f"{path} is no JSON: {brief(str(e))[1:-1]}") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path} holds a {type(found).__name__} where a {kind.__name__} belongs")
    return found


def text(path):
    """A UTF-8 file -> its text, without a byte order mark."""
    try:
        return Path(path).read_text("utf-8-sig")  # \r\n becomes \n
    except UnicodeDecodeError as e:
        byte = e.object[e.start]
        raise ValueError(f"{path} is not UTF-8: byte {byte:#04x} at {e.start:,}") from None


DEVICES = ("auto", "cpu", "cuda", "mps")


def device(asked="auto", mps=True):
    """The name of a device that this machine has. mps: whether auto may mean Apple's."""
    import torch

    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    there.append("cpu")
    if asked not in DEVICES:
        raise ValueError(f"--device {asked!r}: choose auto, cpu, cuda or mps")
    if asked != "auto" and asked not in there:
        raise ValueError(
            f"--device {asked}: this PyTorch ({torch.__version__}) finds {there[0]} only"
        )
    if asked != "auto":
        return asked
    return there[0] if mps or there[0] == "cuda" else "cpu"


def machine():
    """Bytes of memory that this process may have: the machine's, or a stricter limit on it."""
    found = []
    if hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        import resource  # where there is sysconf, there is this

        found.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" where there is none
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min((n for n in found if 0 < n < 1 << 62), default=1 << 62)


def fits(size, what):
    """ValueError if `what` needs more bytes than there can be."""
    if size > machine():
        raise ValueError(
            f"{what} need {size / 1e9:,.1f} GB, and this machine has {machine() / 1e9:,.1f} GB"
        )


def main(argv=None):
    """Prints the point: what bounds let in, and how failures end."""

    @dataclass(frozen=True)
    class Flags:
        steps: int = knob(128, "optimiser steps", least=1, most=ENDLESS)
        lr: float = knob(1e-3, "learning rate", above=0, most=10)
        device: str = knob("auto", "where", choices=DEVICES)

    def show(flags):
        print("the flags of this program, and what they let in:")
        for f in fields(Flags):
            print(f"  {flag(f):10}{f.metadata['bounds'].words(kind(f))}")
            for x in ("7", "-1", "nan", "a word", "1e400"):
                try:
                    print(f"  {'':10}{x!r:10} -> {value(f, x)}")
                except ValueError as e:
                    print(f"  {'':10}{x!r:10} {e}")
        for e in (ValueError("x is 3"), FloatingPointError("loss nan"), MemoryError(), TypeError()):
            print(f"{type(e).__name__:20} ends with {ending(e, Flags)}")

    run(show, Flags, "command.py", __doc__, argv)


if __name__ == "__main__":
    main()
