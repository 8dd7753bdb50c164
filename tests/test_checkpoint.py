"""disk.py and checkpoint.py promise that a kill at any moment loses nothing; here it is killed,
flipped and cut to see.
"""

import errno
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import command

import pytest
import torch
from conftest import ROOT, rms
from hypothesis import given
from hypothesis import strategies as st
from tiny import SMALL, spelled

import checkpoint
import data
import disk
import plot
import train
from training.merge import merge_weights

forks = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs processes that can be forked and killed"
)


def state(step, size=20):
    """What every tensor of a checkpoint holds is its step: a mixture of two would show."""
    return dict(
        model=dict(w=torch.full((size,), float(step))),
        optimizer=dict(m=torch.full((3, 5), float(step))),
        step=step,
    )


def whole(saved):
    n = saved["step"]
    return bool((saved["model"]["w"] == n).all() and (saved["optimizer"]["m"] == n).all())


def names(folder):
    return sorted(p.name for p in (folder / "ckpt").iterdir())


# ---- a kill

# Forks writers that save step after step and report each save that returned; kills them with signal
# 9, in the middle of things or at a chosen line of disk.write and checkpoint.save; reports what had
# been saved and what can be read afterwards.
KILLER = """
import json, os, pathlib, random, signal, sys, time
sys.path[:0] = sys.argv[1:3]
import torch, checkpoint, disk
from test_checkpoint import state, whole
torch.set_num_threads(1)
r, report = random.Random(0), []

def die(*args, **kw):
    os.kill(os.getpid(), signal.SIGKILL)

class Half:                                     # a file that gives up halfway through the bytes
    def __init__(self, f, room):
        self.f, self.room = f, room
    def write(self, raw):
        self.room -= len(raw)
        if self.room < 0:
            self.f.flush()
            die()
        return self.f.write(raw)
    def __getattr__(self, name):
        return getattr(self.f, name)

def at(point, size):
    real = disk.os.replace, torch.save, pathlib.Path.unlink
    if point == "before the bytes": torch.save = die
    if point == "half of the bytes": torch.save = lambda state, f: real[1](state, Half(f, 2 * size))
    if point == "before fsync": disk.os.fsync = die
    if point == "before rename": disk.os.replace = die
    if point == "after rename": disk.os.replace = lambda a, b: (real[0](a, b), die())
    if point == "before removing":
        pathlib.Path.unlink = lambda p, **kw: die() if p.suffix == ".pt" else real[2](p, **kw)

def attempt(folder, size, keep, point):
    begin = 1 + max([checkpoint.number(p) for p in checkpoint.steps(folder)], default=0)
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        for step in range(begin, begin + 10**6):
            if point and step == begin + 2:
                at(point, size)
            checkpoint.save(folder, step, state(step, size), keep)
            os.write(tell, b"%d " % step)
    os.close(tell)
    said = os.read(hear, 1000)
    if not point:
        time.sleep(r.random() * 3 * took[size])
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(hear, 1000):
        said += more
    os.close(hear)
    saved = checkpoint.read(folder)
    report.append(dict(point=point or "anywhere", returned=int(said.split()[-1]),
                       newest=saved["step"], whole=whole(saved),
                       all_whole=all(whole(checkpoint.read(p)) for p in checkpoint.steps(folder)),
                       steps=[checkpoint.number(p) for p in checkpoint.steps(folder)],
                       left=len(list((folder / "ckpt").glob("*.tmp")))))

took = {}
for size, tries in ((20, 10), (5_000_000, 10)):                       # 5 million numbers are 20 MB
    folder = pathlib.Path(sys.argv[3]) / str(size)
    start = time.perf_counter()
    checkpoint.save(folder, 1, state(1, size))
    took[size] = time.perf_counter() - start
    for _ in range(tries):
        attempt(folder, size, 2, None)
for point in ("before the bytes", "half of the bytes", "before fsync", "before rename",
              "after rename", "before removing"):
    attempt(pathlib.Path(sys.argv[3]) / point.replace(" ", "-"), 50_000, 2, point)
print(json.dumps(report))
"""


@forks
def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, ROOT, ROOT / "tests", tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report) == 26 and any(r["left"] for r in report)  # some were indeed interrupted
    for r in report:
        assert (
            r["whole"] and r["all_whole"] and r["newest"] in (r["returned"], r["returned"] + 1)
        ), r
        assert 1 <= len(r["steps"]) <= 3 and r["steps"][-1] == r["newest"] and r["left"] <= 1, r
    new = {
        r["point"]: (r["newest"] - r["returned"], r["left"], len(r["steps"]))
        for r in report
        if r["point"] != "anywhere"
    }
    assert new == {
        "before the bytes": (0, 1, 2),
        "half of the bytes": (0, 1, 2),
        "before fsync": (0, 1, 2),
        "before rename": (0, 1, 2),
        "after rename": (1, 0, 3),
        "before removing": (1, 0, 3),
    }
    for folder in tmp_path.iterdir():  # the next save clears up
        checkpoint.save(folder, 10**6, state(10**6), keep=2)
        assert len(names(folder)) == 2 and not list(folder.glob("ckpt/*.tmp"))


@forks
@pytest.mark.slow  # tests/test_lifecycle.py kills at more moments, in forks of a process
def test_training_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "run", lambda folder: None)
    run = train.Run(
        out=str(tmp_path),
        name="a",
        model=spelled(**SMALL, hybrid_override_pattern="ME"),
        data="copy",
        tokenizer="bytes",
        steps=90,
        batch=4,
        length=16,
        eval_tokens=16,
        eval_every=1000,
        log_every=1,
        save_every=3,
        prompt="",
        worth=False,
        threads=1,
        keep=2,
    )
    train.fit(run, lambda line: None)
    before = torch.get_num_threads()
    child = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train.py",
            "--out",
            tmp_path,
            "--name",
            "b",
            "--model",
            run.model,
            "--data",
            "copy",
            "--tokenizer",
            "bytes",
            "--prompt",
            "",
            *"--steps 90 --batch 4 --length 16 --eval-tokens 16 --keep 2 "
            "--eval-every 1000 --log-every 1 --save-every 3 --threads 1 --no-worth".split(),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    after = random.Random(0).randrange(10, 40)
    for line in child.stdout:
        if line.startswith(f"step {after:5}/"):
            break
    time.sleep(random.random() * 0.02)
    child.send_signal(signal.SIGKILL)
    assert (
        child.wait() in (-signal.SIGKILL, 0) and child.stdout.close() is None
    )  # 0: we were too late to kill it
    assert (
        checkpoint.read(tmp_path / "b")["step"] >= (after - 1) // 3 * 3
    )  # a line is printed before its step is saved
    train.fit(replace(run, name="b", resume=True), lambda line: None)
    a, b = (checkpoint.read(tmp_path / n) for n in "ab")
    assert (
        all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        and a["step"] == b["step"] == 90
    )
    for i, s in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in s.items())
    torch.set_num_threads(before)


# ---- damage


def saved_steps(folder, *steps):
    for step in steps:
        checkpoint.save(folder, step, state(step))
    return checkpoint.steps(folder)[-1]


def refused(path, match):
    with pytest.raises(ValueError, match=match) as e:
        checkpoint.read(path)
    return str(e.value)


FULL = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    "failure, code",
    [
        (MemoryError(), 1),
        (RuntimeError(FULL), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1),
        (OSError(errno.EMFILE, "Too many open files", "x"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_the_machine_cannot_is_no_damage(tmp_path, monkeypatch, failure, code):
    """It was called damage, and a step back was offered: nothing is wrong with the file."""
    saved_steps(tmp_path, 3, 6)

    def fails(*args, **how):
        raise failure

    with monkeypatch.context() as m:
        m.setattr(torch, "load", fails)
        with pytest.raises(type(failure)) as e:
            checkpoint.read(tmp_path)
    assert command.ending(e.value)[0] == code and "damaged" not in command.ending(e.value)[1]
    with pytest.raises(type(failure)), checkpoint.fitting("it"):
        fails()
    assert checkpoint.read(tmp_path)["step"] == 6


@pytest.mark.parametrize(
    "what", ["empty", "text", "one byte", "half", "less one byte", "zip of something", "zeros"]
)
def test_a_damaged_file_is_named_and_the_one_before_is_offered(tmp_path, what):
    path = saved_steps(tmp_path, 3, 6, 9)
    raw = path.read_bytes()
    path.write_bytes(
        dict(
            zip(
                ["empty", "text", "one byte", "half", "less one byte", "zip of something", "zeros"],
                [
                    b"",
                    b"a b c\n" * 50,
                    b"P",
                    raw[: len(raw) // 2],
                    raw[:-1],
                    b"PK\5\6" + bytes(18),
                    bytes(len(raw)),
                ],
            )
        )[what]
    )
    said = refused(tmp_path, "is damaged")
    assert str(path) in said and "step-00000006.pt" in said and "--from-step 6" in said
    assert refused(path, "is damaged") == said  # by its own name too
    assert whole(checkpoint.read(tmp_path, 6)) and checkpoint.read(tmp_path, 6)["step"] == 6
    for old in checkpoint.steps(tmp_path)[:2]:
        old.unlink()
    assert "none before it" in refused(tmp_path, "is damaged")


def test_no_flipped_bit_passes(tmp_path):
    """In the data every one must be noticed; in what surrounds it, noticed or harmless. One bit in
    the directory of the zip archive says that an entry is a folder: torch then hands out memory
    that nobody has written."""
    path, r = saved_steps(tmp_path, 1, 2), random.Random(0)
    raw, want = path.read_bytes(), checkpoint.read(tmp_path)
    data_at = [
        i for v in ("w", "m") for i in [raw.find(torch.full((3,), 2.0).numpy().tobytes())] if i >= 0
    ]
    directory = raw.find(b"PK\1\2")
    folders = [i + 38 for i in range(directory, len(raw)) if raw[i : i + 4] == b"PK\1\2"]
    flips = [(i, 4) for i in folders] + [
        (i, bit) for i in range(30) for bit in range(8)
    ]  # and the first entry's header
    flips += [(r.randrange(directory, len(raw)), r.randrange(8)) for _ in range(200)]
    flips += [(r.randrange(len(raw)), r.randrange(8)) for _ in range(200)] + [
        (data_at[0] + i, r.randrange(8)) for i in range(80)
    ]
    noticed = 0
    for i, bit in flips:
        broken = bytearray(raw)
        broken[i] ^= 1 << bit
        path.write_bytes(broken)
        try:
            got = checkpoint.read(tmp_path)
        except ValueError as e:
            assert type(e) is ValueError and str(path) in str(e) and "step-00000001.pt" in str(e), (
                i,
                bit,
                e,
            )
            noticed += 1
        else:
            assert (
                whole(got)
                and got["step"] == 2
                and got["model"]["w"].shape == want["model"]["w"].shape
            ), (i, bit)
            assert not data_at[0] <= i < data_at[0] + 80, (i, bit)
    assert noticed > 300


def test_only_tensors_and_plain_data_are_loaded(tmp_path):
    """A checkpoint from a stranger must not run code."""

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    saved_steps(tmp_path, 1)
    checkpoint.save(tmp_path, 2, dict(model=Trap()))
    assert (
        "step-00000001.pt" in refused(tmp_path, "is damaged") and not (tmp_path / "sprung").exists()
    )


def test_what_is_not_there_is_said(tmp_path):
    assert "train one, python train.py" in refused(tmp_path / "nowhere", "holds no checkpoint")
    saved_steps(tmp_path, 2, 4)
    with pytest.raises(
        ValueError, match=r"there is no .*step-00000003\.pt; there are the steps 2, 4"
    ):
        checkpoint.read(tmp_path, 3)
    refused(tmp_path / "ckpt" / "step-00000005.pt", "there are the steps 2, 4")


def test_leftovers_are_never_loaded_and_the_next_save_removes_them(tmp_path):
    path = saved_steps(tmp_path, 1)
    left = path.with_name("step-00000002.pt.123.tmp")
    left.write_bytes(path.read_bytes()[:100])
    assert checkpoint.steps(tmp_path) == [path] and checkpoint.read(tmp_path)["step"] == 1
    checkpoint.save(tmp_path, 3, state(3))
    assert names(tmp_path) == ["step-00000001.pt", "step-00000003.pt"]


# ---- keeping, writing


def test_two_are_kept_and_none_is_removed_before_the_new_one_is_whole(tmp_path, monkeypatch):
    real, seen = torch.save, []

    def spy(state, f):
        seen.append([checkpoint.number(p) for p in checkpoint.steps(tmp_path)])
        real(state, f)

    monkeypatch.setattr(torch, "save", spy)
    for step in (5, 10, 15, 20):
        assert (
            checkpoint.save(tmp_path, step, state(step), keep=2) == checkpoint.steps(tmp_path)[-1]
        )
    assert seen == [[], [5], [5, 10], [10, 15]] and names(tmp_path) == [
        "step-00000015.pt",
        "step-00000020.pt",
    ]

    def full(state, f):
        f.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, 25, state(25), keep=1)
    assert names(tmp_path) == ["step-00000015.pt", "step-00000020.pt"] and whole(
        checkpoint.read(tmp_path)
    )
    monkeypatch.setattr(torch, "save", real)
    checkpoint.save(tmp_path, 20, state(20), keep=2)  # the same step again
    checkpoint.save(tmp_path, 25, state(25), keep=1)
    assert names(tmp_path) == ["step-00000025.pt"]
    for step in (30, 35, 100_000_000):  # nine digits sort behind eight
        checkpoint.save(tmp_path, step, state(step))
    assert len(names(tmp_path)) == 4 and checkpoint.read(tmp_path)["step"] == 100_000_000


def test_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    disk.write(path, lambda f: f.write(b"old"))
    for error in (ValueError, KeyboardInterrupt):

        def fail(f):
            f.write(b"new, but")
            raise error

        with pytest.raises(error):
            disk.write(path, fail)
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    disk.write(path, lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    for lost in (tmp_path, path / "file", tmp_path / "nowhere" / "file"):
        with pytest.raises(OSError) as e:  # the name that was asked for
            disk.write(lost, lambda f: f.write(b"new"))
        assert e.value.filename == str(lost)


def test_everything_is_forced_to_the_disk_before_its_name_exists(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))
        )
    disk.write(tmp_path / "file", lambda f: (f.write(b"x"), order.append("write")))
    assert order == ["write", "fsync", "replace"]


def test_what_is_read_is_what_was_saved(tmp_path):
    enc = data.tokenizer("bytes")
    saved = dict(
        a=torch.randn(3, 2, dtype=torch.float64),
        b=[torch.tensor(1), None, "é"],
        c=dict(x=1.5, y=(1, True)),
        bf=torch.randn(4).bfloat16(),
        tokenizer=data.pack(enc),
    )
    checkpoint.save(tmp_path, 1, saved)
    got = checkpoint.read(tmp_path)
    assert (
        torch.equal(got["a"], saved["a"])
        and torch.equal(got["bf"], saved["bf"])
        and got["c"] == saved["c"]
    )
    assert got["b"][1:] == saved["b"][1:] and data.unpack(got["tokenizer"]).encode(
        "hé!"
    ) == enc.encode("hé!")


# ---- the log

cells = st.one_of(st.integers(-(10**9), 10**9), st.floats(allow_nan=False), st.just(""))


@given(st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_log_survives_the_disk(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    rows = [dict(zip(("step", "train_nats", "val_nats"), r)) for r in table]
    disk.write_log(path, rows)
    once = disk.read_log(path)
    for got, want in zip(once, rows, strict=True):
        assert got.keys() == want.keys()
        for k, v in want.items():
            assert got[k] == (
                pytest.approx(v, rel=1e-5) if isinstance(v, float) else v
            )  # six digits
    disk.write_log(path, once)
    assert disk.read_log(path) == once  # a run that goes on writes it again, unchanged


def test_nan_in_a_log(tmp_path):
    disk.write_log(tmp_path / "log.csv", [dict(a=math.nan, b=-math.inf)])
    (row,) = disk.read_log(tmp_path / "log.csv")
    assert math.isnan(row["a"]) and row["b"] == -math.inf


# ---- where it came from


def test_sources(tmp_path, monkeypatch):
    found = disk.sources()
    assert len(found["sources_sha256"]) == 64 and (found["git"] is None or len(found["git"]) == 40)
    monkeypatch.setattr(disk, "__file__", str(tmp_path / "disk.py"))
    (tmp_path / "a.py").write_bytes(b"x = 1")
    (tmp_path / "b.py").write_bytes(b"y = 2")
    assert disk.sources() == dict(
        sources_sha256=hashlib.sha256(b"x = 1y = 2").hexdigest(), git=None
    )
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))  # a copy of the repository, on a machine without git
    assert disk.sources()["git"] is None


# ---- merging


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 20])
def test_merge_weights_imitate_the_decay(n):
    c = merge_weights(n)
    assert len(c) == n and sum(c) == pytest.approx(1) and min(c) > 0
    w = [
        1 - math.sqrt(i / n) for i in range(n)
    ]  # k + 1 = n checkpoints: w_i = 1 - sqrt(i / (k + 1))
    assert c[-1] == pytest.approx(w[-1])  # c_k = w_k, the last one counts
    assert c[:-1] == pytest.approx([w[j] - w[j + 1] for j in range(n - 1)])
    for i in range(n):  # update i is applied with weight w_i
        assert sum(c[i:]) == pytest.approx(w[i])


def test_an_average_is_a_decayed_run():
    """Four updates in one dimension: the merge of what they left is the sum of the updates, each at
    its faded rate.
    """
    updates, thetas = [Fraction(3), Fraction(-1, 2), Fraction(7, 3), Fraction(-2)], [Fraction(5)]
    for u in updates:
        thetas.append(thetas[-1] + u)
    c = merge_weights(5)
    decayed = 5 + sum((1 - math.sqrt(i / 5)) * u for i, u in enumerate(map(float, updates), 1))
    assert sum(x * float(t) for x, t in zip(c, thetas)) == pytest.approx(decayed)


# ---- the control


def test_this_file_can_fail(tmp_path):
    assert not whole(dict(state(3), step=4)) and not whole(
        {**state(3), "optimizer": state(2)["optimizer"]}
    )
    path = saved_steps(tmp_path, 1, 2)
    raw = bytearray(path.read_bytes())
    raw[raw.find(torch.full((3,), 2.0).numpy().tobytes()) + 9] ^= (
        1  # what torch alone does not notice
    )
    path.write_bytes(raw)
    assert not whole(torch.load(path, weights_only=True))
    refused(tmp_path, "is damaged")
    path.write_bytes(path.read_bytes()[:100])  # a writer without a temporary name
    refused(tmp_path, "is damaged")
    assert rms(torch.tensor(merge_weights(4)), torch.full((4,), 0.25)) > 0.1
