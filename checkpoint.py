"""
A run on disk, written so that a kill at any moment loses nothing that was already there.

    runs/<name>/config.json          the run's settings, the model's config, hashes, versions, hardware
    runs/<name>/log.csv, load.json   one row per logged step; where the experts' tokens went in the end
    runs/<name>/ckpt/step-*.pt       model, optimiser, step, random state, tokenizer: to go on bit for bit

Every file is written under another name, forced to the disk, and renamed: the rename is when it exists. A
checkpoint ends with the sha256 of what torch.save wrote, which `read` checks: torch.load checks nothing.

Merging: the average of the last checkpoints of a run at constant learning rate stands in for a run that
decays it. An average of theta_j = theta_0 + (updates 1 ... j) gives update i the weight w_i = sum of the
coefficients c_j over j >= i, so the coefficients that imitate a decay curve w_0 = 1 >= w_1 >= ... are its
differences: c_j = w_j - w_{j+1}.

Not here  models over many ranks; what is in a checkpoint, which train.py decides
Sources   arXiv:2604.12374 section 2.5 and arXiv:2507.17634 (merging; parametrising the curve by i/n is ours)
"""
import csv
import hashlib
import io
import math
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import torch


# What torch.load raises on bytes that are not what was written.
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
          pickle.UnpicklingError)


def write(path, save):
    """Calls save(f) on a temporary file, then renames it to path: path is whole, or still what it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())                             # on the disk before the name is
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def steps(folder):
    """Every finished checkpoint of a run, oldest first."""
    return sorted((Path(folder) / "ckpt").glob("step-*.pt"))


def number(path):
    """The step in a checkpoint's name."""
    return int(path.stem.split("-")[1])


def digest(f, size):
    """sha256 of the first `size` bytes of an open file, which is then at their end."""
    f.seek(0)
    sha = hashlib.sha256()
    while size and (block := f.read(min(size, 1 << 20))):
        sha.update(block)
        size -= len(block)
    return sha.digest()


def store(path, state):
    """Writes one checkpoint and, behind it, its sha256 (readers of zip archives do not mind)."""
    def whole(f):
        torch.save(state, f)
        f.write(digest(f, f.tell()))
    write(path, whole)


def save(folder, step, state, keep=0):
    """Writes ckpt/step-*.pt; then, and only then, removes all but the newest `keep` (0: removes none)."""
    (folder / "ckpt").mkdir(parents=True, exist_ok=True)
    for left in (folder / "ckpt").glob("*.tmp"):             # of a process that was killed
        left.unlink()
    path = folder / "ckpt" / f"step-{step:08d}.pt"
    store(path, state)
    for old in steps(folder)[:-keep] if keep else []:
        old.unlink()
    return path


def read(path, step=0):
    """A run's newest checkpoint (or that of `step`), or a .pt file. Of a damaged one, ValueError tells."""
    path = Path(path)
    files = sorted(path.parent.glob("step-*.pt")) if path.suffix == ".pt" else steps(path)
    if path.suffix != ".pt":
        if not files:
            raise ValueError(f"{path} holds no checkpoint (ckpt/step-*.pt): train one first, python train.py")
        path = files[0].with_name(f"step-{step:08d}.pt") if step else files[-1]
    if not path.is_file():
        there = ", ".join(str(number(f)) for f in files) or "(none)"
        raise ValueError(f"there is no {path}; there are the steps {there}")
    try:
        with open(path, "rb") as f:
            if digest(f, path.stat().st_size - 32) != f.read():
                raise OSError("wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as e:
        before = [f for f in files if f.name < path.name]
        offer = (f"; the one before it is {before[-1]}: train.py --resume --from-step {number(before[-1])} "
                 "goes on from it" if before else ", and there is none before it")
        why = f"{type(e).__name__}: {str(e).splitlines()[0][:80]}"
        raise ValueError(f"{path} is damaged ({why}){offer}") from e


def write_log(path, rows):
    """Rows (dicts; what one lacks is an empty cell) as a csv, whole or not at all."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, dict.fromkeys(k for r in rows for k in r), restval="")
    table.writeheader()
    table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    write(path, lambda f: f.write(text.getvalue().encode()))


def read_log(path):
    """A csv as a list of dicts of numbers; an empty cell stays empty."""
    number = lambda v: v if v == "" else float(v) if set(v) & set(".enai") else int(v)
    with open(path, newline="") as f:
        return [{k: number(v) for k, v in r.items()} for r in csv.DictReader(f)]


def sources():
    """What exactly was run: sha256 of this project's own files, and the git commit if there is one."""
    here, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for f in sorted(here.glob("*.py")):
        digest.update(f.read_bytes())
    commit = None
    if (here / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() if git.returncode == 0 else None
    return dict(sources_sha256=digest.hexdigest(), git=commit)


def merge_weights(n):
    """Coefficients of n successive checkpoints, oldest first: a minus-sqrt decay over them; they sum to 1."""
    w = [1 - math.sqrt(i / n) for i in range(n + 1)]         # 1 ... 0
    return [w[j] - w[j + 1] for j in range(n)]


def main():
    """Prints the point: a writer killed at any moment leaves no broken file; a flipped bit does not pass."""
    import random
    import sys
    import tempfile
    import time
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        save(folder, 1, dict(w=torch.zeros(2_000_000)))
        writer = ("import sys, torch, checkpoint, pathlib\nprint(flush=True)\n"
                  "n = 1 + checkpoint.number(checkpoint.steps(sys.argv[1])[-1])\n"
                  "while True:\n    w = torch.full((2_000_000,), float(n))\n"
                  "    checkpoint.save(pathlib.Path(sys.argv[1]), n, dict(w=w), keep=2)\n    n += 1")
        for attempt in range(3):
            p = subprocess.Popen([sys.executable, "-c", writer, d], stdout=subprocess.PIPE,
                                 cwd=Path(__file__).resolve().parent)
            p.stdout.readline()
            time.sleep(random.uniform(.2, .5))
            p.kill()
            p.wait()
            w = read(folder)["w"]
            whole, unfinished = bool((w == w[0]).all()), len(list((folder / "ckpt").glob("*.tmp")))
            print(f"killed while writing: step {number(steps(folder)[-1])} is the newest, "
                  f"whole and consistent: {whole}; unfinished files: {unfinished}")
        path = steps(folder)[-1]
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        try:
            read(folder)
        except ValueError as e:
            print("one bit flipped:", str(e).replace(d, "..."))
    print("\nweights that imitate a minus-sqrt decay, oldest checkpoint first:")
    for n in (2, 5, 10):
        print(f"  {n:2} checkpoints  " + " ".join(f"{c:.3f}" for c in merge_weights(n)))


if __name__ == "__main__":
    main()
