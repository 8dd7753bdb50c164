"""
Safety: what goes wrong around the steps of a run costs nothing but itself.

    vacant      a folder that holds no checkpoint may be begun in again, any other is gone on with
    branch      a run that goes back keeps every future that it leaves
    moved       why a run that goes on is not bit for bit what it would have been
    Steady      says lines; what cannot be printed or drawn does not stop a run, and is counted
    Ledger      numbers of steps, read seldom on a GPU; a step that is not finite stops the run
    ornament    picture, sample, log: where one fails, a line says what is missing
    offering    a run that is stopped says the command that goes on with it

Not here  one writer a folder: disk.py; nothing but finite numbers in a checkpoint: checkpoint.py;
          exit codes: command.py
"""

import contextlib
import math
import platform
import re
import sys
from pathlib import Path

import torch

import checkpoint
import disk

# What may go wrong in an ornament: the machine's ways to fail, and a library's.
FAILS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


# 1. Where a run may begin


# What a run writes into its folder: a folder with anything else in it is not a run's.
OWN = r"(config|load)\.json|(log|worth)\.csv|loss\.png|answers\..*|ckpt|\.lock|left-.*|.*\.\d+\.tmp"


def vacant(folder):
    """ValueError unless a run can begin here: there is nothing, or only what a run left that was
    stopped before its first checkpoint.
    """
    there = sorted(p.name for p in Path(folder).iterdir()) if Path(folder).exists() else []
    if strange := [name for name in there if not re.fullmatch(OWN, name)]:
        raise ValueError(
            f"{folder} holds {strange[0]}, which no run wrote: --name or --out names another folder"
        )
    if any((Path(folder) / "ckpt").glob("*.pt")) or checkpoint.shards(folder):
        raise ValueError(
            f"{folder} already holds a run: --resume goes on with it "
            f"({disk.resume(folder)}), --name starts another"
        )


def left(folder):
    """left-N-, with an N that nothing in a run's folder has."""
    names = [p.name for p in (*folder.glob("left-*"), *folder.glob("ckpt/left-*"))]
    taken = [int(m[1]) for name in names if (m := re.match(r"left-(\d+)-", name))]
    return f"left-{1 + max(taken, default=0)}-"


def branch(folder, start):
    """Before a run goes on from step `start`, or begins (0): what another future of it left is kept
    as left-N-..., with an N that no other has; the log with the checkpoints that it tells of.
    """
    later = [
        p
        for p in checkpoint.steps(folder) + checkpoint.shards(folder)
        if checkpoint.number(p) > start
    ][::-1]
    logs = [folder / n for n in ("log.csv", "load.json") if later or not start]
    logs = [p for p in logs if p.is_file()]
    prefix = left(folder)
    for p in logs:
        disk.write(p.with_name(prefix + p.name), lambda f, p=p: f.write(p.read_bytes()))
    for p in later:  # the newest first: what is newest afterwards was there before
        p.replace(p.with_name(prefix + p.name))
    for p in logs if not start else ():
        p.unlink()


def machine(device):
    """What decides how sums are rounded, beside the settings: travels in every checkpoint."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    kind = platform.machine()
    return dict(
        torch=str(torch.__version__),
        device=device.type,
        gpu=gpu,
        machine=kind,
        threads=torch.get_num_threads(),
    )


def moved(saved, now):
    """The line that a run needs which goes on elsewhere than it came from; empty if it does not."""
    before = saved.get("machine", {})
    other = [f"{k} {now[k]}, not {v}" for k, v in before.items() if now.get(k, v) != v]
    return f"resume     not bit for bit as if never stopped: {'; '.join(other)}" if other else ""


# 2. What goes wrong


class Steady:
    """`say` that never raises: what a console has no letter for is spelled out, what cannot be said
    at all is counted, and told at the end on the other stream.
    """

    def __init__(self, say):
        self.say, self.lost, self.why = say, 0, ""

    def __call__(self, line):
        self.attempt(lambda: self.spell(line))

    def spell(self, line):
        try:
            self.say(line)
        except UnicodeError:
            self.say(line.encode("ascii", "backslashreplace").decode())

    def attempt(self, tell):
        try:
            tell()
        except FAILS as e:
            self.lost, self.why = self.lost + 1, brief(e)

    def step(self, line, *log):
        """The line of a row of the log; what draws (training/live.py) takes the log too."""
        if hasattr(self.say, "step"):
            self.attempt(lambda: self.say.step(line, *log))
        else:
            self(line)

    def close(self):
        if hasattr(self.say, "close"):
            self.attempt(self.say.close)
        if self.lost:
            with contextlib.suppress(*FAILS):
                print(f"{self.lost} lines could not be printed ({self.why})", file=sys.stderr)


def brief(e):
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:160]}".removesuffix(": ")


def ornament(what, make, say):
    """make(); or a line that says what is missing, and why. Whether it was made."""
    try:
        make()
    except FAILS as e:
        say(f"           no {what} ({brief(e)}); nothing else is missing")
        return False
    return True


class Ledger:
    """What each step gave (depths' nats, balance, the gradient's norm), on the device until read.

    The CPU reads every step, and one that is not finite is not taken. A GPU would have to be waited
    for: there the numbers are read before a line and before a checkpoint, and the first step that
    was not finite stops the run. What was computed since is in no line and in no checkpoint.
    """

    most = 512  # steps that wait to be read

    def __init__(self, folder):
        self.folder, self.steps, self.rows = folder, [], []

    def note(self, step, row):
        self.steps.append(step)
        self.rows.append(row)

    def full(self):
        return not self.rows[-1].is_cuda or len(self.rows) >= self.most

    def read(self):
        """The newest step's numbers. FloatingPointError names the first that is not finite."""
        steps, rows, self.steps, self.rows = self.steps, torch.stack(self.rows).tolist(), [], []
        for step, row in zip(steps, rows):
            if not math.isfinite(sum(row)):
                raise FloatingPointError(self.words(step, row, steps[-1]))
        return rows[-1]

    def words(self, step, row, last):
        kept = checkpoint.steps(self.folder) or checkpoint.shards(self.folder)
        taken = "this step was not taken" if step == last else f"steps {step} to {last} are lost"
        return f"step {step}: loss {row[0]}, gradient norm {row[-1]}; {taken}. " + (
            f"The last checkpoint is {kept[-1]}" if kept else "No checkpoint had been written yet"
        )


def onwards(folder):
    """What can be done about a run that was stopped."""
    if not (folder / "config.json").is_file():
        return "nothing had been written yet: the same command begins again"
    again = disk.resume(folder)
    if checkpoint.steps(folder) or checkpoint.shards(folder):
        return f"what was saved is whole: {again} goes on from the last checkpoint"
    return f"no checkpoint had been written yet: {again} begins again"


@contextlib.contextmanager
def offering(folder, say):
    """However the block is stopped, the command that goes on from there is said."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(f"interrupted; {onwards(folder)}") from e
    except (FloatingPointError, OSError, MemoryError, RuntimeError):
        say(f"stopped    {onwards(folder)}")
        raise
