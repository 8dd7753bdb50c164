"""Run by test_lifecycle.py: FOLDER KILLS SEED FLAGS. Forks processes that train by the command
line and kills them at chosen and at random moments; then gives the same command again.
It begins again, or names the command that goes on, which is then taken. Prints what came of it.
"""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch._dynamo  # an optimiser imports it, for a second: once, and not in every fork
from conftest import same

import checkpoint
import disk
import plot
import train
from training import safety

MOMENTS = ("anywhere", "before the first checkpoint", "a checkpoint", "the picture")
real = plot.run


def offered(text):
    """The arguments of the command that a text offers, as a shell would cut it."""
    (line,) = set(re.findall(r"\S*python\S* (\S*train\.py .*?--resume(?: --from-step \d+)?)", text))
    return shlex.split(line)[1:]


def same_end(a, b):
    """The last checkpoint and the log bit for bit but for the clock, the picture there, no
    leftovers.
    """
    x, y = checkpoint.read(a), checkpoint.read(b)
    alike = all(same(x[k], y[k]) for k in ("model", "optimizer", "step", "tokens", "loads", "rng"))
    names = [p.name for p in (*b.iterdir(), *(b / "ckpt").iterdir())]
    kept = [n for n in names if not n.startswith("left-") and not n.endswith(".tmp")]
    log = [row_without_clock(f) for f in (a, b)]
    return alike and log[0] == log[1] and "loss.png" in kept and len(checkpoint.steps(b)) >= 4


def row_without_clock(folder):
    clock = ("seconds", "tokens_per_second")
    rows = disk.read_log(folder / "log.csv")
    return [{k: v for k, v in r.items() if k not in clock} for r in rows]


def light(folder):
    disk.write(
        folder / "loss.png",
        lambda f: (f.write(b"half"), f.flush(), time.sleep(0.02), f.write(b"whole")),
    )


def child(args, log, picture):
    pid = os.fork()
    if pid:
        return pid
    plot.run = real if picture else light
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    code = 0
    try:
        train.cli(args)
    except SystemExit as e:
        code = e.code or 0
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def there(moment, run, after):
    """Whether it is now."""
    ckpt = run / "ckpt"
    if moment == "before the first checkpoint":
        return run.exists()
    if moment == "a checkpoint":
        writing = ckpt.exists() and any(".pt." in p.name for p in ckpt.iterdir())
        return writing and len(checkpoint.steps(run)) >= after
    return any("loss.png." in p.name for p in run.iterdir()) if run.exists() else False


def kill(args, log, run, moment, took):
    """Whether it died of it; else it was done before."""
    pid, began = (
        child(args, log, moment == "the picture" and random.random() < 0.2),
        time.monotonic(),
    )
    wait = random.uniform(0, took) if moment == "anywhere" else None
    after = random.randrange(4)  # checkpoints that are there already when one is interrupted
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        try:
            now = time.monotonic() - began > wait if wait is not None else there(moment, run, after)
        except FileNotFoundError:
            now = False
        if now:
            time.sleep(random.random() * (0.1 * took if moment.startswith("before") else 0.002))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        time.sleep(0.0005)
    return False


def to_the_end(args, log):
    _, status = os.waitpid(child(args, log, False), 0)
    return os.waitstatus_to_exitcode(status)


def next_command(args, run):
    """What the same command says now: the command that goes on; or it begins again by itself."""
    try:
        safety.vacant(run)
        return args
    except ValueError as e:
        return offered(str(e))


def main(folder, kills, argv):
    began = time.monotonic()
    assert to_the_end([*argv, "--name", "calm"], folder / "log") == 0, (folder / "log").read_text()
    took = time.monotonic() - began
    count, life, ends = {}, 0, []
    while sum(count.values()) < kills:
        args = [*argv, "--name", f"life {life}"]
        run, life = folder / f"life {life}", life + 1
        for _ in range(min(random.choice((1, 2, 3)), kills - sum(count.values()))):
            moment = MOMENTS[sum(count.values()) % 4]
            if kill(args, folder / "log", run, moment, took):
                early = not checkpoint.steps(run)
                count[moment + ", no checkpoint yet" * early] = (
                    count.get(moment + ", no checkpoint yet" * early, 0) + 1
                )
            args = next_command([*argv, "--name", run.name], run)
        code = to_the_end(args, folder / "log")
        ends.append([run.name, code, code == 0 and same_end(folder / "calm", run)])
        if not ends[-1][2]:
            print((folder / "log").read_text()[-2000:], file=sys.stderr)
    print(json.dumps(dict(count=count, ends=ends)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    random.seed(int(sys.argv[3]))
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[4]))
