"""
Between a shell and a program: Ctrl-C while it is not yet at work, a library that is not there, and
streams that are closed or that nobody reads.

    interruptible   while a program works, Ctrl-C is an exception; before and after it ends the
                    process with a line and exit code 130
    whole           a process has its three standard streams, whatever it was started with
    mute            nobody reads any more

Who imports this from a program of this project gets the ends above by it; a notebook, or a script
of somebody else, keeps its own.

Not here  ends of a program that works: command.py
Sources   exit code 130 as the shell has it
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

HOME = Path(__file__).resolve().parent


def cut_short(kind, e, trace):
    """Of an exception that nobody took: a library that is not there, or fails while it is imported,
    ends with a line and a code. Any other shows its traceback.
    """
    failed = issubclass(kind, (ImportError, OSError, ValueError)) and library(e, trace)
    if failed and issubclass(kind, ModuleNotFoundError):
        leave(2, f"error: {e}: pip install -r requirements.txt")
    if failed:
        leave(2, f"error: {failed} cannot be imported: {' '.join(str(e).split())[:240]}")
    if issubclass(kind, KeyboardInterrupt):
        leave(130, "interrupted")
    sys.__excepthook__(kind, e, trace)


def interrupt(number, frame):
    """Ctrl-C before a program works and after it. An exception would rise inside of a library, and
    some catch it there and say something else.
    """
    leave(130, "interrupted")


def leave(code, line):
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"\n{Path(sys.argv[0]).name}: {line}\n")
        sys.stderr.flush()
    os._exit(code)


def library(e, trace):
    """Whose import an exception is about; empty if it is a file of ours."""
    while trace.tb_next:
        trace = trace.tb_next
    missing = isinstance(e, ModuleNotFoundError) and e.name
    top = (missing or trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return "" if top == "__main__" or list(HOME.glob(f"{top}*")) else top


def ours():
    """Whether this process was started as a program of this project, and not as another's."""
    started = getattr(sys.modules["__main__"], "__file__", None) or ""
    return HOME in Path(started).resolve().parents


def heard(before, after):
    """Ctrl-C goes to `after` if it went to `before`: who ignores it (nohup) goes on ignoring it."""
    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGINT) is before:
        signal.signal(signal.SIGINT, after)
        return True


@contextlib.contextmanager
def interruptible():
    """While a program works, Ctrl-C is an exception: what is half done is ended properly."""
    taken = heard(interrupt, signal.default_int_handler)
    try:
        yield
    finally:
        if taken:
            heard(signal.default_int_handler, interrupt)


def mute():
    """Nobody reads what is printed: from here on it goes nowhere, and the end of the process does
    not complain.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def whole():
    """Of a process without one of the standard streams (`>&-`): nothing comes, and what is printed
    goes nowhere. Else the next file that is opened would get the stream's number, and a checkpoint
    would hold what a library prints.
    """
    for name, mode in dict(stdin="r", stdout="w", stderr="w").items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
            os.set_inheritable(getattr(sys, name).fileno(), True)


if ours():
    sys.excepthook = cut_short
    heard(signal.default_int_handler, interrupt)


if __name__ == "__main__":  # command.part says the like, but stands on this file
    print("shell.py is no program, but a part of one: python command.py", file=sys.stderr)
    sys.exit(2)
