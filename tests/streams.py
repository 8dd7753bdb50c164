"""Run by test_shell.py: FOLDER. Every program in forks of one process, with standard streams
closed as a shell's `>&-` closes them; prints [[program, closed, good or bad, exit code, what is at
the three numbers afterwards, stderr], ...] in JSON.
"""

import contextlib
import io
import itertools
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import inputs
import torch
import torch._dynamo  # an optimiser imports it, for a second: once, and not in every fork

NAMES = "stdin", "stdout", "stderr"


def good(folder, closed):
    """program: arguments with which it does its work, in a second, in a place of its own."""
    place = folder / str(closed)
    run, page = folder / "runs" / "t", folder / "look.html"
    few = "--max-new-tokens 2 --device cpu".split()
    text = "--bits 8 --tokens 64 --eval-tokens 64 --length 16 --threads 1".split()
    short = "--steps 1 --texts 2 --length 40 --device cpu".split()
    again = ["--out", run.parent, "--name", "t", "--resume", "--steps", "2"]
    return dict(
        train=again,
        sample=["--run", run, *few],
        look=["--run", run, "--out", page, *few[:2]],
        heal=["--run", run, "--out", place / "healed", *short],
        hf=[folder / "hf"],
        model=["--preset", "toy"],
        plot=[run],
        ptq=["--run", run, "--out", place / "quantised", *text],
        worth=["--run", run, "--eval-tokens", "96", "--threads", "1"],
        data=[],
    ) | {"scale.budget": []}


def prepare(folder):
    from test_breaker import a_run

    with contextlib.redirect_stdout(io.StringIO()):
        a_run(folder / "runs")
        inputs.released(folder / "hf")


def close(numbers):
    for number in numbers:
        os.close(number)
        setattr(sys, NAMES[number], None)


def child(main, argv, closed, notes):
    """In a fork: what happens goes to the file `notes`."""
    code, said = 0, ""
    close(closed)
    try:
        main(list(map(str, argv)))
    except SystemExit as e:
        code = e.code
    except BaseException:
        said = traceback.format_exc()
    there = []
    for number in range(3):
        with contextlib.suppress(OSError):
            there.append(os.readlink(f"/proc/self/fd/{number}"))
    with open(notes, "w") as f:
        json.dump([code, there, said], f)
    os._exit(0)


def tried(main, argv, closed, notes):
    pid = os.fork()
    if not pid:
        child(main, argv, closed, notes)
    os.waitpid(pid, 0)
    return json.loads(notes.read_text())


def main(folder):
    prepare(folder)
    sys.stdin = open(os.devnull)
    os.dup2(sys.stdin.fileno(), 0)
    real, found = os.dup(1), []
    for number in (1, 2):
        os.dup2(os.open(folder / NAMES[number], os.O_WRONLY | os.O_CREAT), number)
    for name, closed in itertools.product(inputs.PROGRAMS, ((0,), (1,), (2,), (0, 1, 2))):
        kind, start = inputs.program(name)
        for how, argv in dict(good=good(folder, closed).get(name), bad=["--nothing"]).items():
            if argv is not None:
                found.append([name, closed, how, *tried(start, argv, closed, folder / "notes")])
    os.write(real, json.dumps(found).encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
