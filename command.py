"""
Commands: a dataclass of flags becomes a program, and what can be foreseen to fail ends in one
sentence and the right exit code.

    def main(argv=None):
        command.run(work, Flags, "heal.py", __doc__, argv)          work(flags) does it, and returns

    run       parse, check, work; then exit   0 done        1 stopped by the numbers or the machine
                                              2 bad input   130 interrupted
    parser    every field is a flag; only what was given is in the answer
    ending    an exception -> exit code and sentence; nothing if it is a fault of ours
    demo      of a file that prints its point: no flags, the same ends
    part      of a file that is no program: what to type instead

Asked before the work begins, so that it does not fail in the middle:

    document, text    a JSON file, a text file, or one sentence that names the file
    device            auto, cpu, cuda or mps -> what is there
    fits              refuses what the memory cannot hold

Not here  what fields may hold: bounds.py; closed streams, Ctrl-C before the work: shell.py; what
          the flags mean: each program's own file
Sources   exit codes 2 and 130 as argparse and the shell have them
"""

import argparse
import contextlib
import errno
import json
import os
import re
import stat
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.error import URLError

import shell
from bounds import ENDLESS, check, flag, kinds, knob, value

# 1. Flags


def parser(kind, program, about):
    """Every field of a dataclass is a flag. Only what was given is in the answer, so that settings
    of another place can stand behind it.
    """
    p = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} {places(kind)}[--flag value ...]; -h lists the flags",
        description=(about or "").strip().split("\n\n")[0],
        allow_abbrev=False,
    )
    for f in fields(kind):
        p.add_argument(flag(f), default=argparse.SUPPRESS, **how(f))
    return p


def places(kind):
    return "".join(f"[{f.name}] " for f in fields(kind) if f.metadata["place"])


def how(f):
    """A field's words for argparse."""
    help, switch = f.metadata["help"], isinstance(f.default, bool)
    if not switch and f.default not in ("", (), None):
        help += f" (default: {f.default})"
    help = help.replace("%", "%%")
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
    more = dict(action="append") if many else {}
    if f.metadata["bare"] is not None:
        more |= dict(nargs="?", const=f.metadata["bare"])
    return dict(type=read, help=help, metavar=f.name.upper()) | more


# 2. Ends

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
NO_DISK = "pytorchstreamwriter"  # that a file could not be written
# What a system says of a disk that is full or broken, or of too many open files.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE}


def causes(e):
    """An exception and those that it was raised from or during."""
    while e is not None:
        yield e
        e = e.__cause__ or e.__context__


def no_memory(e):
    """Whether it says that the memory is full: Python's, the system's, or torch's."""
    if isinstance(e, RuntimeError):
        return any(words in str(e).lower() for words in NO_MEMORY)
    return isinstance(e, MemoryError) or isinstance(e, OSError) and e.errno == errno.ENOMEM


def innocent(e):
    """Whether it says nothing of what was read: the machine is full, or this user may not read."""
    refused = isinstance(e, OSError) and (isinstance(e, PermissionError) or e.errno in MACHINE)
    return refused or no_memory(e)


def ending(e, kind=None):
    """Exit code and sentence of a failure that can be foreseen; None of any other. kind: the
    program's flags, some of which need less memory if they are less.
    """
    said = str(e).strip()
    first = said.split("\n")[0][:160]
    full = [c for c in causes(e) if isinstance(c, OSError) and c.errno in MACHINE]
    if isinstance(e, KeyboardInterrupt):
        return 130, said or "interrupted"
    if no_memory(e):
        less = [flag(f) for f in fields(kind) if f.metadata["memory"]] if kind else []
        advice = f"; less of {', '.join(less)} needs less" if less else ""
        return 1, f"stopped: out of memory ({first or 'no more is given'}){advice}"
    if full:
        return 1, f"stopped: {full[0].strerror}: {full[0].filename or 'while writing'}"
    if isinstance(e, RuntimeError) and NO_DISK in said.lower():
        return 1, f"stopped: a file could not be written ({first})"
    stops = FloatingPointError, ChildProcessError, ConnectionError, TimeoutError, URLError
    if isinstance(e, stops):
        return 1, f"stopped: {said}"
    if isinstance(e, OSError) and e.filename is not None:
        return 2, f"{e.strerror}: {e.filename}"
    if isinstance(e, ImportError) and e.name:
        return 2, f"{said}: is it in requirements.txt, or in requirements-dev.txt?"
    if isinstance(e, (ValueError, OSError, ImportError)):
        return 2, said or type(e).__name__
    return None


def say(line=""):
    """Prints a line at once. A reader who has gone (`| head`) does not stop the work."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        shell.mute()


def run(work, kind, program, about, argv=None, make=None):
    """Parses argv, makes a `kind` of what was given (or what `make` makes of it), checks it, and
    calls work with it. Returns when that is done; every failure that can be foreseen ends the
    process with one sentence and its code. An exception that nobody foresaw passes: it is a fault
    of ours, and its traceback is needed.
    """
    shell.whole()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console without the letter shows a question mark
            stream.reconfigure(errors="replace")
    p = parser(kind, program, about)
    try:
        with shell.interruptible():
            given = vars(p.parse_args(argv))
            settings = make(given) if make else kind(**given)
            work(check(settings))
            sys.stdout.flush()
    except BrokenPipeError:
        shell.mute()
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


def part(line):
    """The end of a file that is no program, if it is started as one: the command whose work it
    does, and exit code 2.
    """
    name = Path(sys.argv[0]).name
    print(f"{name} is no program, but a part of one: {line}", file=sys.stderr)
    sys.exit(2)


# 3. Asked before the work begins


def document(path, kind=dict):
    """A JSON file -> the dict (or what kind says) in it."""
    return parsed(Path(ending_file(path)).read_bytes(), path, kind)


def ending_file(path):
    """path, if reading it comes to an end: ValueError for a pipe, which nobody may ever write, and
    for a device. What this process was started with (/dev/stdin, a shell's <(...)) may be either.
    """
    kind, name = os.stat(path).st_mode, str(path)
    given = name == os.devnull or re.match(r"/dev/(stdin$|fd/)|/proc/[^/]+/fd/", name)
    if not (given or stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise ValueError(f"{path} is a pipe or a device, where a file belongs")
    return path


def parsed(raw, path, kind=dict):
    """The same of bytes that were read from there. An editor's byte order mark is no fault."""
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:  # no JSON, no UTF-8, or nested without end
        raise ValueError(f"{path} is no JSON: {str(e)[:160]}") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path} holds a {type(found).__name__} where a {kind.__name__} belongs")
    return found


def text(path):
    """A UTF-8 file -> its text, without a byte order mark."""
    return spelled(Path(ending_file(path)).read_bytes(), path)


def spelled(raw, path):
    """The same of bytes that were read from there. All line breaks become one kind."""
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        byte = e.object[e.start]
        raise ValueError(f"{path} is not UTF-8: byte {byte:#04x} at {e.start:,}") from None


DEVICES = ("auto", "cpu", "cuda", "mps")


def devices():
    """The names of those that this machine has, the best first."""
    import torch

    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    return [*found, "cpu"]


def device(asked="auto", mps=True, fast=False):
    """The name of a device that this machine has, ready for use. mps: whether auto may mean
    Apple's; fast: whether kernels are to run there.
    """
    name = choose(asked, mps)
    if name == "cuda":
        ready(fast)
    if name == "mps" and fast:
        raise ValueError("--fast needs a CUDA GPU: on Apple's MPS leave it out")
    return name


def float8(device, what):
    """ValueError for what needs float8 on a device that has none."""
    if str(device).startswith("mps"):
        raise ValueError(f"{what}: Apple's MPS has no float8; --device cpu has")


def ready(fast=False):
    """A CUDA card for exact fp32: by default its convolutions would round to TF32. ValueError for
    what a card that is there cannot do.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    card, arches = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    name = ".".join(map(str, card))
    oldest = min((int(a[3:].rstrip("af")) for a in arches if a.startswith("sm_")), default=0)
    if 10 * card[0] + card[1] < oldest:
        raise ValueError(
            f"this PyTorch is built for {', '.join(arches)}, and the GPU has compute capability "
            f"{name}: an older PyTorch, or --device cpu"
        )
    if fast and card < (8, 0):
        raise ValueError(
            f"--fast needs a GPU of compute capability 8.0 or later, not {name}: leave it out"
        )


def choose(asked, mps):
    """`device`, before it is known whether it can be used."""
    import torch

    there = devices()
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


def main():
    """Prints the point: what bounds let in, and how failures end."""

    @dataclass(frozen=True)
    class Flags:
        steps: int = knob(128, "optimiser steps", least=1, most=ENDLESS)
        lr: float = knob(1e-3, "learning rate", above=0, most=10)
        batch: int = knob(16, "sequences a step", least=1, most=ENDLESS, memory=True)

    print("what the flags of this program let in:")
    for f in fields(Flags)[:2]:
        print(f"{flag(f):8}{f.metadata['bounds'].words(kinds(f)[0])}")
        for text in ("7", "-1", "nan", "a word", "", "1e400"):
            try:
                print(f"  {text!r:10}-> {value(f, text)!r}")
            except ValueError as e:
                print(f"  {text!r:10}{e}")
    seen = [
        ValueError("x is 3"),
        FloatingPointError("loss nan"),
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device", "log.csv"),
        KeyboardInterrupt("go on with --resume"),
        TypeError("ours"),
    ]
    print("\nhow it ends: exit code and sentence")
    for e in seen:
        code, sentence = ending(e, Flags) or ("", "a fault of ours: its traceback is needed")
        print(f"  {type(e).__name__:20}{code:4} {sentence}")
    print(f"\nthis machine: {device()}, {machine() / 1e9:.1f} GB")


if __name__ == "__main__":
    demo(main, __doc__)
