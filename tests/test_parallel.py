"""Many processes against one: losses, gradients, steps, checkpoints, restarts, and the dry run's
predictions.
"""

import importlib.util
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import exact
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import SMALL, spelled

import checkpoint
import data
import disk
import hf
import mtp
import train
from model import Config, Nemotron
from scale import dryrun, parallel, shards
from scale import ranks as many
from training import pretrain
from training.settings import RECIPES

ROOT = Path(__file__).resolve().parents[1]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
MODEL = spelled(**SMALL, hybrid_override_pattern="M*E")
EXACT = "tests/exact.py"
RUN = [
    "--model",
    MODEL,
    *"--data copy --tokenizer bytes --steps 6 --batch 4 --length 16 --eval-tokens 96".split(),
    *"--eval-every 6 --log-every 1 --save-every 2 --prompt=".split(),
]


def launched(n, restarts, *args):
    """What torchrun is, for n processes that are started over so many times."""
    run = "-W ignore -m torch.distributed.run --standalone --nproc-per-node".split()
    return [*map(str, (sys.executable, *run, n, "--max-restarts", restarts, *args))]


def torchrun(n, *args, restarts=0, check=True, **env):
    done = subprocess.run(
        launched(n, restarts, *args),
        cwd=ROOT,
        env={**ENV, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def ranks(n, *cases, **env):
    """What tests/ranks.py finds. On a busy machine a worker dies now and then of a damaged heap
    ("malloc(): unaligned tcache chunk"): one of gloo's threads and the main one own the same piece
    of memory. Nothing here is compiled. Then torchrun starts all of them over, and a warning says
    so."""
    lines = torchrun(n, "tests/ranks.py", *cases, restarts=2, **env).stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    if again := max(r.pop("restarts") for r in found):
        warnings.warn(f"a worker died, and all {n} were started over, {again} times", stacklevel=2)
    return {r["case"]: r for r in found}


def same(r):
    return r["first"] < 1e-5 and r["loss"] < 1e-5 and r["grad"] < 1e-5 and r["end"] < 1e-5


GRIDS = {  # ep, cp
    2: [(1, 1), (1, 2), (2, 1), (2, 2)],
    4: [(1, 4), (4, 1), (2, 2), (2, 4), (4, 2), (4, 4)],
}


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_ranks_are_one(n):
    """ep,cp,skew,recompute: loss, every gradient and five steps, MTP on. skew: all tokens go to two
    experts. Four ranks try the grids that two have not, in three steps.
    """
    again = "0", "0", "1", "mamba+logits"
    cases = [f"{ep},{cp},{i % 2},{again[i % 4]}," for i, (ep, cp) in enumerate(GRIDS[n])]
    found = ranks(n, *cases)
    assert set(found) == set(cases) and all(map(same, found.values())), found


def test_a_worker_that_dies_is_noticed():
    """ranks() goes on after a death that is nobody's fault, but says so; a wrong number it would
    report as ever.
    """
    with pytest.warns(UserWarning, match="all 2 were started over, 1 times"):
        assert same(ranks(2, "2,1,0,0,abort")["2,1,0,0,abort"])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_ranks_with_kernels_are_one():
    """--fast on every rank, against the readable forms of one process: experts after the exchange,
    the recurrence and the convolution on slices, the loss at the gathered head.
    """
    case = "2,2,1,0,fast"  # one rank's experts have no row
    found = ranks(2, case, TRITON_INTERPRET="1")[case]
    assert same(found) and found["rows"][0] > found["rows"][1] == 0, found


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_ranks_with_kernels_in_four_bits_are_one():
    """--fast --precision nvfp4: products from codes on every rank's experts and slices, against the
    emulation of one process.
    """
    case = "2,2,0,0,nvfp4:fast"
    found = ranks(2, case, TRITON_INTERPRET="1")[case]
    other, rows, _, _ = found["codes"]
    assert other <= 3 and rows > 1000, found
    assert other or found["loss"] < 1e-6 and found["grad"] < 1e-5, found


@pytest.mark.slow
def test_gradients_summed_in_bf16():
    """--reduce bf16: matrices' alone; a gradient is off by what 8 bits leave, and no more."""
    found = ranks(2, "2,1,0,0,reduce")["2,1,0,0,reduce"]
    assert found["summed"] == ["torch.bfloat16", "torch.float32"]
    assert 1e-4 < found["grad"] < 4e-3 and found["loss"] < 1e-2, found


def alike_in_four_bits(r):
    """Every code, and losses and norm to 1e-6."""
    other, rows, later, _ = r["codes"]
    return other == later == 0 and rows > 10000 and same(r) and r["loss"] < 1e-6


@pytest.mark.slow
def test_ranks_in_four_bits_are_one():
    """FSDP, experts, slices: the codes and block scales of every operand of every product. On two,
    one of them without a token, a rank's experts have rows of two pieces."""
    case = "2,2,0,0,nvfp4"
    found = ranks(4, case)[case]
    assert alike_in_four_bits(found), found
    two = ranks(2, "2,1,1,0,nvfp4", "1,1,0,1,mxfp4")
    assert all(map(alike_in_four_bits, two.values())) and len(two) == 2, two


@pytest.mark.slow
def test_what_four_bits_need_of_other_ranks_can_fail():
    """Without the largest number of all slices, the rows' own random bytes, or pieces apart; and an
    --ep below --cp, which is known to be another rounding: about as far as other bytes."""
    broken = ["2,2,0,0,nvfp4:largest", "2,2,0,0,nvfp4:numbers", "2,1,0,0,nvfp4:parts"]
    found = ranks(2, *broken, "1,2,0,0,nvfp4")
    assert len(found) == 4 and all(r["codes"][0] > 1000 < r["codes"][1] for r in found.values())
    assert found["1,2,0,0,nvfp4"]["grad"] < 1.5 * found["2,2,0,0,nvfp4:numbers"]["grad"], found


@pytest.mark.slow
def test_ranks_with_uneven_counts_are_one():
    """A rank that no token comes to, its experts idle; ranks with few and with many targets: over
    sequences, over time.
    """
    idle, slices = "2,1,1,0,uneven", "1,2,0,0,uneven"
    found = ranks(2, idle, slices)
    assert all(map(same, found.values())) and len(found) == 2, found
    assert found[idle]["rows"][0] > found[idle]["rows"][1] == 0
    assert found[idle]["targets"] == [5, 52] and found[slices]["targets"] == [37, 20]


@pytest.mark.slow
def test_ranks_in_bf16_are_one_in_bf16():
    """Four times nearer to one process under autocast than that is to fp32; weights, summed
    gradients, moments: fp32.
    """
    case, narrow = "2,2,0,1,bf16", "2,1,0,0,narrow"
    found = ranks(2, case, narrow)
    r, wide = found[case], ["torch.float32"]
    # By how much depends on the CPU: its products round slices otherwise than whole sequences.
    assert all(4 * r[k] < r["rounding"][k] for k in ("first", "loss", "grad", "end")), r
    assert r["weights"] == r["gradients"] == r["moments"] == r["summed"] == wide
    assert r["gathered"] == [
        "torch.bfloat16",
        "torch.float32",
    ]  # matrices narrow, the rest as it is
    assert found[narrow]["summed"] != wide  # a sum in bf16 would be seen


def test_this_file_can_fail():
    """Without halo, state, keys, whole counts, dispatch, the targets behind the edge, or
    everybody's loads.
    """
    broken = ["halo", "state", "keys", "balance", "dispatch", "targets", "loads"]
    found = ranks(2, *(f"2,2,0,0,{b}" for b in broken))
    assert len(found) == len(broken) and not any(map(same, found.values())), found


@pytest.mark.slow
def test_four_bits_go_on_on_other_ranks(tmp_path):
    """4 ranks, ep 2 x cp 2, then 2 of other grids, against one process that does it all."""
    model = spelled(**SMALL, hybrid_override_pattern="ME*EM")
    four = ["--precision", "nvfp4", "--micro", 1, "--length", 64, "--model", model]
    flags = [*RUN, *four, "--lr", 1e-3, "--lr-min", 1e-4, "--out", tmp_path]
    torchrun(4, EXACT, *flags, "--name", "many", "--ep", 2, "--cp", 2, "--stop", 2)
    again = "--resume", "--name", "many", "--out", tmp_path
    torchrun(2, EXACT, *again, "--ep", 1, "--cp", 1)
    with exact.arithmetic():
        train.cli([*map(str, flags), "--name", "one", "--no-worth", "--threads", "1"])
    one, many = log(tmp_path / "one"), log(tmp_path / "many")
    assert set(many) == set(one) and max(off(many, one)) < 1e-6, off(many, one)


def log(folder):
    return {r["step"]: r for r in disk.read_log(folder / "log.csv")}


def off(a, b):
    """How far the losses of a are from those of b, by step, relative."""
    names = "train_nats", "mtp1_nats", "mtp2_nats"
    return [max(abs(a[s][k] / b[s][k] - 1) for k in names) for s in b]


def alike(a, b):
    return all(
        abs(a[s][k] - b[s][k]) <= 2e-5 * abs(b[s][k])
        for s in b
        for k in ("train_nats", "mtp1_nats", "mtp2_nats", "balance", "grad_norm")
    ) and set(a) == set(b)


def stage():
    """docs/ranks.md's arguments for the long-context stage's second half and its dry run, and where
    the first half ends.
    """
    text = (ROOT / "docs" / "ranks.md").read_text()
    lines = [
        line
        for line in text.replace("\\\n", " ").splitlines()
        if "--short" in line and "train.py" in line
    ]
    real, dry = (
        next(line for line in lines if line.startswith(who)) for who in ("torchrun", "python")
    )
    return [shlex.split(line.split("train.py")[1]) for line in (real, dry)], int(
        re.search(r"`--steps (\d+)`", text)[1]
    )


def test_the_long_context_stage_of_the_page(monkeypatch, tmp_path):
    """It goes on from the pretrained run with a rate that is constant, every second batch is short,
    and both halves fit.
    """
    (real, dry), half = stage()
    runs, said = [], []
    before = train.Run(**{**RECIPES["super"], "preset": "super"})
    (tmp_path / "super").mkdir()
    (tmp_path / "super/config.json").write_text(json.dumps(dict(run=asdict(before))))
    monkeypatch.setattr(train, "fit", lambda run, say: runs.append(run))
    train.cli([*real, "--out", str(tmp_path)])
    (run,) = runs
    steps = range(before.steps + 1, run.steps + 1)
    assert {train.learning_rate(t, run) for t in steps} == {4.5e-6} and len(steps) > 1000
    assert [run.length_at(t) for t in (1, 2, 3, 4)] == [1048576, 4096, 1048576, 4096]
    tokens = [
        sum(run.batch * t for t in lengths) / 1e9
        for lengths in (  # as in the report
            [run.length] * (half - before.steps),
            [run.length_at(t) for t in range(half + 1, run.steps + 1)],
        )
    ]
    assert [round(t) for t in tokens] == [34, 17], tokens
    predict = dryrun.predict
    monkeypatch.setattr(dryrun, "predict", lambda *a: said.append((a[0], predict(*a))))
    train.cli([*dry, "--quick"])
    same = "ep", "cp", "recompute", "batch", "micro", "precision"
    for run_of, seen in said:
        assert (
            all(getattr(run_of, k) == getattr(run, k) for k in same)
            and seen["peak"] < 0.95 * dryrun.GPUS[run_of.gpu][0]
        )
    assert sorted(r.length for r, _ in said) == [4096, 1048576]


@pytest.mark.slow
def test_a_stage_that_alternates_counts_its_tokens(tmp_path):
    """Every second batch is short: nats are over its own targets, and the log adds up what was
    read.
    """
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        world, run = parallel.World(), train.Run(batch=3, length=16, short=8)
        model, text = (
            world.model(replace(Config.preset("toy"), vocab_size=40)),
            torch.randint(40, (500,)).numpy(),
        )
        work, world.cast = pretrain.Text(), nullcontext
        work.run, work.train, work.depths, work.files = run, text, 2, None
        work.corpus = data.Corpus("numbers", text, text, len(text), "")
        for step, t in ((1, 16), (2, 8), (3, 16)):
            *nats, _, _ = train.gradient(model, work.batch(step, world), run, world).tolist()
            model.zero_grad()
            ids = data.batch(text, run.seed, step, run.batch, t + 1)
            with torch.no_grad():
                want = [
                    s / n
                    for s, n in zip(
                        train.losses(model, ids), mtp.counts(torch.ones(3, t, dtype=torch.bool), 2)
                    )
                ]
            torch.testing.assert_close(torch.tensor(nats), torch.tensor(want))
    finally:
        dist.destroy_process_group()
    stage = [
        *RUN,
        "--steps",
        4,
        "--short",
        8,
        "--lr",
        1e-3,
        "--warmup",
        0,
        "--decay",
        0,
        "--out",
        tmp_path,
    ]
    torchrun(1, "train.py", *stage, "--name", "one")
    torchrun(2, "train.py", *stage, "--name", "two", "--cp", 2, "--stop", 3)
    torchrun(2, "train.py", "--resume", "--name", "two", "--out", tmp_path, "--cp", 1, "--ep", 2)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert alike(two, one)
    for rows in (one, two):
        assert [rows[s]["tokens"] for s in (1, 2, 3, 4)] == [64, 96, 160, 192] and {
            r["lr"] for r in rows.values()
        } == {1e-3}
    refused = torchrun(
        2, "train.py", *stage, "--name", "three", "--cp", 2, "--short", 6, check=False
    )
    assert (
        refused.returncode
        and "--length 6 does not cut into 2 equal slices of at least 4 tokens" in refused.stderr
    )


@pytest.mark.slow
def test_rows_of_several_documents_are_one_process_s_on_two_ranks(tmp_path):
    """--documents: windows cut at file ends, here of five files of which some are a few words."""
    for i, words in enumerate((3, 400, 9, 700, 40)):
        (tmp_path / f"{i}.txt").write_text(" ".join(str(i * 1000 + n) for n in range(words)))
    flags = [*RUN, "--data", tmp_path, "--documents", "--save-every", 6, "--out", tmp_path / "runs"]
    torchrun(1, "train.py", *flags, "--name", "one")
    torchrun(2, "train.py", *flags, "--name", "two")
    done = [sys.executable, "train.py", *flags, "--name", "alone"]
    subprocess.run([*map(str, done)], cwd=ROOT, env=ENV, check=True, timeout=300)
    one, two, alone = (log(tmp_path / "runs" / name) for name in ("one", "two", "alone"))
    assert alike(one, alone) and alike(two, alone)


@pytest.mark.slow
def test_resuming_on_fewer_ranks_goes_on_with_the_same_curve(tmp_path):
    """4, then 2, then 1 ranks, other ep and cp each time, against one process: so the order of the
    data is the same, and losses to 1e-6.
    """
    flags = [*RUN, "--lr", "1e-3", "--lr-min", "1e-4"]
    train.cli([*flags, "--out", str(tmp_path), "--name", "one"])
    out = ["train.py", "--out", tmp_path, "--name", "many"]
    torchrun(4, *out, *flags, "--ep", 2, "--cp", 2, "--stop", 2)
    torchrun(2, *out, "--resume", "--ep", 2, "--cp", 1, "--stop", 4)
    torchrun(1, *out, "--resume", "--ep", 1)
    one, many = log(tmp_path / "one"), log(tmp_path / "many")
    assert alike(many, one) and max(off(many, one)) < 1e-6, off(many, one)
    torchrun(
        2,
        "-m",
        "scale.release",
        "--release",
        "--ep",
        2,
        tmp_path / "many/ckpt/step-00000006",
        tmp_path / "hf",
    )
    torchrun(2, "-m", "scale.release", "--adopt", "--ep", 1, tmp_path / "hf", tmp_path / "back")
    torchrun(1, "-m", "scale.release", "--release", tmp_path / "back", tmp_path / "again")
    a, b = hf.load(tmp_path / "hf").state_dict(), hf.load(tmp_path / "again").state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def crash(tmp_path, name, times, during="step"):
    """Kills a random worker `times` times, in a step or while a checkpoint is half written; the run
    must end by itself.
    """
    where = ["--out", tmp_path, "--name", name]
    args = [*RUN, *"--steps 40 --save-every 2 --eval-every 40 --ep 2".split(), *where]
    p = subprocess.Popen(
        launched(4, times + 2, "train.py", *args),
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folders, killed, committed, halves = tmp_path / name / "ckpt", 0, 0, 0
    errors = threading.Thread(target=lambda: said.append(p.stderr.read()))
    said = []
    errors.start()
    for line in p.stdout:
        if not line.startswith("step") or killed == times or random.random() < 0.7:
            continue
        patience = time.monotonic() + (random.uniform(0, 0.3) if during == "step" else 5)
        while time.monotonic() < patience and p.poll() is None:
            half = [f for f in folders.glob("step-*") if not (f / ".metadata").exists()]
            if during == "save" and half:
                break
        done = [int(f.parent.name.split("-")[1]) for f in folders.glob("step-*/.metadata")]
        assert max(done, default=0) >= committed
        children = Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()
        if children and p.poll() is None:
            os.kill(int(random.choice(children)), signal.SIGKILL)
            committed, killed, halves = max(done, default=0), killed + 1, halves + bool(half)
    errors.join()
    assert p.wait() == 0, said[0][-3000:]
    return killed, halves


@pytest.mark.slow
@pytest.mark.long  # 13 minutes on two idle cores
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("during", ["step", "save"])
def test_killed_workers_lose_nothing_that_was_committed(tmp_path, during, times=10):
    """kill -9, ten times each: torchrun restarts, and the curve is that of an undisturbed run."""
    random.seed(0)
    assert crash(tmp_path, "calm", 0) == (0, 0)
    killed, halves = crash(tmp_path, "killed", times, during)
    assert killed > times // 2 and (halves > times // 2 or during == "step"), (killed, halves)
    assert alike(log(tmp_path / "killed"), log(tmp_path / "calm"))


@pytest.mark.slow
def test_a_run_on_ranks_is_kept_like_one_on_one(tmp_path):
    """Two ranks: begun again without a checkpoint, refused while another writes, old checkpoints
    removed only after the newest was read back, a spoiled one named and not gone on with.
    """
    out = ["train.py", "--out", tmp_path, "--name", "many"]
    (tmp_path / "many" / "ckpt").mkdir(parents=True)
    (tmp_path / "many" / "log.csv").write_text("step\n")
    torchrun(2, *out, *RUN, "--ep", 2, "--keep", 1, "--stop", 4)
    folder = tmp_path / "many"
    assert [checkpoint.number(p) for p in checkpoint.shards(folder)] == [2, 4]
    assert (folder / "left-1-log.csv").is_file() and not (folder / ".lock").exists()
    with disk.lock(folder):
        refused = torchrun(2, *out, "--resume", check=False)
    assert refused.returncode and "is in use: another process is writing" in refused.stderr
    again = torchrun(2, *out, *RUN, check=False)
    assert again.returncode and "already holds a run: --resume goes on with it (" in again.stderr
    torchrun(2, *out, "--resume", "--from-step", 2)
    assert (folder / "ckpt" / "left-2-step-00000004").is_dir()
    assert [checkpoint.number(p) for p in checkpoint.shards(folder)] == [4, 6]
    weights = shards.spoiled(checkpoint.shards(folder)[-1], 0)
    assert weights == ""


def test_a_part_that_cannot_be_read_back_is_named(tmp_path):
    dcp.save(dict(model=dict(w=torch.ones(4), v=torch.ones(3))), checkpoint_id=tmp_path / "good")
    assert shards.spoiled(tmp_path / "good", 0) == ""
    dcp.save(dict(w=torch.tensor([1.0, math.nan])), checkpoint_id=tmp_path / "bad")
    assert shards.spoiled(tmp_path / "bad", 0) == "w (1 of 2 numbers)"
    (part,) = (tmp_path / "good").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-200])
    assert shards.spoiled(tmp_path / "good", 0)
    assert shards.spoiled(tmp_path / "good", 1) == ""  # another rank's


def test_restarts_without_a_store_of_their_own_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        many.start()


def test_the_dry_run_counts_exactly():
    """Rank 0's parameters: ceil(rows / ranks) of a dense tensor, E/ep experts with 1/edp of their
    rows.
    """
    changes = dict(pair.split("=") for pair in MODEL.split(","))
    run = train.Run(
        preset="toy",
        batch=8,
        length=16,
        world=8,
        ep=2,
        cp=2,
        recompute="all",
        precision="bf16",
        dry_run=True,
    )
    config = replace(
        Config.preset("toy"), **{k: v if "pattern" in k else int(v) for k, v in changes.items()}
    )
    lines = []
    seen = dryrun.predict(run, lines.append, config, train.optimiser, train.losses)
    with torch.device("meta"):
        tensors = Nemotron(config).named_parameters()
    want = sum(
        p.numel() // 8 if ".experts." in n else -(-p.shape[0] // 8) * (p.numel() // p.shape[0])
        for n, p in tensors
    )
    assert (
        seen["parameters"] == want
        and seen["flops"] > 0
        and seen["all-to-all"] > 0
        and any("fits" in line for line in lines)
    )
