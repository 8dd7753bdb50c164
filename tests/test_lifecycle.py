"""A run from its first byte to its picture: whatever stops it, at whatever moment, the command it
offers goes on with it, and it ends as if nothing had been; what is not finite is never kept.

    python -m pytest -m slow tests/test_lifecycle.py -s    a hundred kills, counted by moment
"""

import errno
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import test_train
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import offered, row_without_clock
from test_train import (  # noqa: F401 (quick is a fixture)
    assert_same_run,
    everything,
    flags,
    quick,
    quiet,
    refuses,
    run,
    same,
)

import checkpoint
import data
import decode
import disk
import heal
import hf
import plot
import sample
import train
from model import Config, Nemotron
from training import pretrain, safety
from training.settings import climb_and_fall
from training.world import Here

forks = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs processes that can be forked and killed"
)
draw = plot.run


@pytest.fixture
def fresh(monkeypatch):
    """Texts are read again each time, for they change."""
    monkeypatch.setattr(data, "corpus", test_train.corpus.__wrapped__)
    monkeypatch.setattr(data, "encode", test_train.cut.__wrapped__)


# ---- kills


def killed(tmp_path, kills, seed=0):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "text.txt").write_text("".join(f"{n} sheep and {n * n} clouds\n" for n in range(900)))
    small = dict(data=str(folder / "text.txt"), steps=8, eval_every=4, log_every=3, batch=2)
    small["worth"] = True  # what follows the last step is killed too
    r = run(folder, "ME", **small)
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "kills.py",
            folder,
            str(kills),
            str(seed),
            json.dumps(flags(r)),
        ],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(same for _, _, same in found["ends"]), (found, done.stderr[-3000:])
    return found["count"]


@forks
def test_five_kills_and_the_end_is_the_same(tmp_path):
    count = killed(tmp_path, 5)
    assert sum(count.values()) == 5, count


@forks
@pytest.mark.slow
def test_a_hundred_kills_and_the_end_is_the_same(tmp_path):
    count = killed(tmp_path, 100, seed=1)
    print(count)
    assert sum(count.values()) == 100 and len(count) >= 4, count
    assert any("no checkpoint yet" in k for k in count), count


# ---- one writer a folder

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import checkpoint
import disk
with disk.lock(sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_until_it_dies(tmp_path, capsys):
    """Every writer is refused in one sentence while another lives; its death opens the lock."""
    a = run(tmp_path, "-", steps=2)
    train.fit(a, quiet)
    before = everything(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, ROOT, a.folder()], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    out = ["--out", tmp_path]
    for argv in ([*out, "--resume", "--steps", 4], [*out, "--merge", 1], flags(a)):
        assert "is in use: another process is writing into it" in refuses(argv, capsys)
    with pytest.raises(ValueError, match="in use"), disk.lock(a.folder()):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert (a.folder() / ".lock").exists()  # left over, and nobody's
    (a.folder() / ".lock").unlink()
    assert everything(tmp_path) == before
    (a.folder() / ".lock").touch()
    train.fit(replace(a, resume=True, steps=4), quiet)
    assert checkpoint.read(a.folder())["step"] == 4 and not (a.folder() / ".lock").exists()


def test_healing_holds_its_folder(tmp_path, monkeypatch):
    """heal.py writes under the same lock; a folder that it could not fill is not left behind."""
    seen = []

    def mend(flags):
        with pytest.raises(ValueError, match="in use"), disk.lock(flags.out):
            pass
        seen.append(1)
        raise ValueError("no run")

    monkeypatch.setattr(heal, "mend", mend)
    with pytest.raises(ValueError, match="no run"):
        heal.work(heal.Flags(out=str(tmp_path / "x" / "healed")))
    assert seen and list(tmp_path.iterdir()) == []


# ---- begun again, gone on with


def test_a_folder_without_a_checkpoint_is_begun_in_again(tmp_path):
    """Whatever of a run is there before its first checkpoint; other people's files are refused."""
    calm = run(tmp_path, "-", name="calm", steps=2)
    train.fit(calm, quiet)
    a = replace(calm, name="a")
    leavings = ("config.json.12.tmp", "config.json", ".lock", "log.csv", "load.json")
    for n in range(len(leavings) + 1):
        folder = tmp_path / str(n)
        (folder / "ckpt").mkdir(parents=True)
        (folder / "ckpt" / "step-00000002.pt.9.tmp").write_bytes(b"half")
        for name in leavings[:n]:
            (folder / name).write_text("{}")
        train.fit(replace(a, name=str(n)), quiet)
        assert_same_run(calm.folder(), folder)
        left = [p.name for p in folder.glob("left-*")]
        assert sorted(left) == sorted(f"left-1-{x}" for x in leavings[3:n])
    for name, there in (("notes.txt", "holds notes.txt"), ("ckpt/step-00000002.pt", "holds a run")):
        path = tmp_path / name[:4] / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(ValueError, match=there):
            train.fit(replace(a, name=name[:4]), quiet)
        assert path.read_text() == "mine"


def test_going_back_keeps_every_future(tmp_path):
    a = run(tmp_path, "-", steps=6, save_every=1)
    train.fit(a, quiet)
    first = {n: checkpoint.read(a.folder(), n) for n in (4, 5, 6)}
    for lr in (0.01, 0.02):
        train.fit(replace(a, resume=True, from_step=3, lr=lr), quiet)
    ckpt = a.folder() / "ckpt"
    for n in (4, 5, 6):
        one, two = (checkpoint.read(ckpt / f"left-{i}-step-{n:08d}.pt") for i in (1, 2))
        assert same(one["model"], first[n]["model"]) and two["run"]["lr"] == 0.01
    assert (
        checkpoint.read(a.folder())["run"]["lr"] == 0.02 and len(checkpoint.steps(a.folder())) == 6
    )
    rates = [disk.read_log(a.folder() / f"left-{i}-log.csv")[-1]["lr"] for i in (1, 2)]
    assert len(rates) == 2 and len(disk.read_log(a.folder() / "log.csv")) == 6


def test_from_step_needs_resume(tmp_path, capsys):
    a = run(tmp_path, "-")
    assert "--from-step 3 needs --resume" in refuses([*flags(a), "--from-step", 3], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("log_every,eval_every,save_every", [(3, 4, 2), (5, 3, 1), (10, 10, 3)])
def test_a_log_does_not_show_where_a_run_was_stopped(tmp_path, log_every, eval_every, save_every):
    how = dict(log_every=log_every, eval_every=eval_every, save_every=save_every)
    whole = run(tmp_path, "E", name="whole", steps=8, **how)
    train.fit(whole, quiet)
    for stop in (1, 3, 4, 5, 7):
        a = replace(whole, name=str(stop))
        train.fit(replace(a, stop=stop), quiet)
        train.fit(replace(a, resume=True), quiet)
        assert row_without_clock(a.folder()) == row_without_clock(whole.folder()), stop
        load = [(r.folder() / "load.json").read_text() for r in (a, whole)]
        assert load[0] == load[1], stop
        seconds = [r["seconds"] for r in disk.read_log(a.folder() / "log.csv")]
        assert seconds == sorted(seconds)


def test_going_on_elsewhere_is_said_in_one_line(tmp_path):
    a, said = run(tmp_path, "-", steps=4, stop=2), []
    train.fit(a, quiet)
    train.fit(replace(a, resume=True, stop=3), said.append)
    assert not [line for line in said if "bit for bit" in line]
    for key in ("torch", "device", "threads", "machine", "gpu"):
        saved = checkpoint.read(a.folder())
        line = safety.moved(
            dict(machine=dict(saved["machine"], **{key: "other"})), saved["machine"]
        )
        assert "not bit for bit" in line and f"{key} {saved['machine'][key]}, not other" in line
    path = checkpoint.steps(a.folder())[-1]
    checkpoint.store(path, dict(saved, machine=dict(saved["machine"], threads=7)))
    train.fit(replace(a, resume=True, stop=0), said.append)
    assert (
        len([line for line in said if "not bit for bit" in line and "threads 1, not 7" in line])
        == 1
    )


# ---- the command that is offered

ODD = ("plain", "with blanks", 'quote\'s "two"', "Übung № 5", "$HOME;ls", "-dash")


FAILURES = (
    KeyboardInterrupt(),
    OSError(errno.ENOSPC, "No space left on device"),
    FloatingPointError("nan"),
    MemoryError(),
)


@pytest.mark.parametrize("name", ODD)
def test_the_offered_command_goes_on_with_this_run(tmp_path, monkeypatch, name):
    """Interrupted, out of disk, not finite, damaged: what is offered is taken by a shell's
    rules.
    """
    text = tmp_path / "the text.txt"
    text.write_text("one two three four five six seven\n" * 60)
    a = run(tmp_path / "an out", "-", name=name, data=str(text), steps=6, save_every=2)
    calm = replace(a, name="calm")
    train.fit(calm, quiet)
    for n, failure in enumerate(FAILURES if name == "plain" else FAILURES[:1]):
        for when in (1, 4) if name == "plain" else (4,):
            b, real, said = replace(a, name=f"{name}{n}{when}"), train.gradient, []

            count = iter(range(1, 10**6))

            def fails(*args, count=count, failure=failure, when=when):
                if next(count) == when:
                    raise failure
                return real(*args)

            monkeypatch.setattr(train, "gradient", fails)
            with pytest.raises(type(failure)) as e:
                train.fit(b, said.append)
            monkeypatch.setattr(train, "gradient", real)
            argv = offered("\n".join([*said, str(e.value)]))
            train.cli(argv)
            assert_same_run(calm.folder(), b.folder())
    damaged = checkpoint.steps(b.folder())[-1]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged") as e:
        checkpoint.read(b.folder())
    argv = offered(str(e.value))
    assert argv[-2:] == ["--from-step", "4"]
    train.cli(argv)
    assert_same_run(calm.folder(), b.folder())


def test_under_torchrun_it_is_torchruns_command(tmp_path, monkeypatch):
    many = dict(TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="4", GROUP_WORLD_SIZE="1")
    for key, value in dict(many, MASTER_ADDR="one", MASTER_PORT="29500").items():
        monkeypatch.setenv(key, value)
    assert disk.resume(tmp_path).startswith("torchrun --nproc-per-node 4 ")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert "--nnodes 2 --master-addr one --master-port 29500" in disk.resume(tmp_path)


# ---- numbers that are not finite


def poisoned(monkeypatch, at, value=math.nan):
    """The optimiser's step number `at` itself makes a number that is not finite."""
    real = train.optimiser

    def optimiser(model, run):
        opt, take, count = real(model, run), None, [0]
        take = opt.step

        def step():
            take()
            count[0] += 1
            if count[0] == at:
                with torch.no_grad():
                    list(model.parameters())[-1].view(-1)[0] = value

        opt.step = step
        return opt

    monkeypatch.setattr(train, "optimiser", optimiser)


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_spoils_the_weights_is_not_saved(tmp_path, monkeypatch, keep, value):
    a, said = run(tmp_path, "-", steps=4, save_every=1, keep=keep), []
    poisoned(monkeypatch, 3, value)
    with pytest.raises(
        FloatingPointError, match=r"step-00000003.pt is not written.*first in model\."
    ):
        train.fit(a, said.append)
    kept = [checkpoint.number(p) for p in checkpoint.steps(a.folder())]
    assert kept == ([2] if keep == 1 else [1, 2]) and not checkpoint.spoiled(
        checkpoint.read(a.folder())
    )
    monkeypatch.undo()
    monkeypatch.setattr(plot, "run", lambda folder: None)
    train.cli(offered("\n".join(said)))
    assert checkpoint.read(a.folder())["step"] == 4


def test_nothing_is_removed_before_its_successor_is_read_back(tmp_path, monkeypatch):
    state = lambda n: dict(model=dict(w=torch.full((3,), float(n))))
    checkpoint.save(tmp_path, 1, state(1))

    def torn(path, save):  # the disk says yes and keeps half
        real(path, save)
        path.write_bytes(path.read_bytes()[:-50])

    real = disk.write
    monkeypatch.setattr(disk, "write", torn)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.save(tmp_path, 2, state(2), keep=1)
    assert [checkpoint.number(p) for p in checkpoint.steps(tmp_path)] == [1, 2]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A run, and a released folder, of a model with one NaN in its last tensor but one."""
    folder, torch_threads = tmp_path_factory.mktemp("spoiled"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "run", lambda folder: None)
        patch.setattr(checkpoint, "spoiled", lambda tree: "")
        a = run(folder, "*", steps=1)
        train.fit(a, quiet)
        saved = checkpoint.read(a.folder())
        saved["model"]["backbone.norm_f.weight"][1] = math.nan
        checkpoint.store(checkpoint.steps(a.folder())[0], saved)
        model = Nemotron(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
        hf.save(model, folder / "hf")
    torch.set_num_threads(torch_threads)
    return a, folder / "hf"


READERS = dict(
    sample=lambda a, out: sample.load_run(a.folder()),
    file=lambda a, out: sample.load_run(checkpoint.steps(a.folder())[0]),
    heal=lambda a, out: heal.work(heal.Flags(run=str(a.folder()), out=str(out / "healed"))),
    merge=lambda a, out: train.merge(replace(a, merge=1), quiet),
    resume=lambda a, out: train.fit(replace(a, resume=True, steps=2), quiet),
)


@pytest.mark.parametrize("reader", [*READERS, "hf", "hf.py"])
def test_every_reader_names_the_first_tensor_that_is_not_finite(spoiled, tmp_path, reader):
    a, released = spoiled
    with pytest.raises(ValueError, match=r"not finite.*norm_f\.weight \(1 of 16 numbers\)"):
        if reader == "hf":
            hf.load(released)
        elif reader == "hf.py":
            hf.show(hf.Flags(str(released)))
        else:
            READERS[reader](a, tmp_path)


@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([None, math.nan, math.inf, -math.inf]),
)
def test_finite_finds_what_is_not(dtype, shape, value):
    x = torch.ones(shape, dtype=dtype)
    if value is not None:
        x.view(-1)[-1] = value
    tree = dict(a=[torch.zeros(2), None, "text", torch.tensor(3)], b=(dict(c=x),))
    found = checkpoint.spoiled(tree)
    assert found == ("" if value is None else f"b.0.c (1 of {x.numel():,} numbers)")


# ---- ornaments


def fails(error):
    def fail(*args, **kw):
        raise error

    return fail


ERRORS = [kind("broken") for kind in safety.FAILS] + [
    ZeroDivisionError("division by zero"),
    KeyError("mtp1_nats"),
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "in use"),
    UnicodeEncodeError("cp1252", "ж", 0, 1, "no such letter"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_finished_run_is_not_lost_to_its_ornaments(tmp_path, monkeypatch, error):
    """Picture, sample, last evaluation, log: each fails in each way; the weights are there."""
    real = disk.write

    def no_log(path, save):
        if path.name in ("log.csv", "load.json"):
            raise error
        real(path, save)

    for n, (where, name, instead, missing) in enumerate(
        (
            (plot, "run", fails(error), "no picture"),
            (sample, "generate", fails(error), "no sample"),
            (pretrain, "evaluate", fails(error), "no evaluation"),
            (disk, "write", no_log, "no log.csv"),
        )
    ):
        a, said = run(tmp_path, "-", name=str(n), steps=2, prompt="ab", eval_every=2), []
        with monkeypatch.context() as patch:
            patch.setattr(where, name, instead)
            train.fit(a, said.append)
        lines = [line for line in said if missing in line]
        assert lines and type(error).__name__ in lines[0], said
        assert checkpoint.read(a.folder())["step"] == 2


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_console_that_fails_stops_nothing(tmp_path, capsys, error):
    model, rows = train.fit(run(tmp_path, "-", steps=2), fails(error))
    assert len(rows) == 2 and checkpoint.read(tmp_path / "toy")["step"] == 2
    assert "lines could not be printed" in capsys.readouterr().err


def test_letters_that_a_console_lacks_are_spelled_out():
    raw = io.BytesIO()
    console = io.TextIOWrapper(raw, encoding="cp1252")
    safety.Steady(lambda line: print(line, file=console, flush=True))("tok → жук")
    assert raw.getvalue().split() == [b"tok", b"\\u2192", b"\\u0436\\u0443\\u043a"]


full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")


@pytest.mark.parametrize(
    "console", [os.devnull, pytest.param("/dev/full", marks=[full, pytest.mark.slow])]
)
def test_a_console_of_windows_and_one_on_a_full_disk(tmp_path, console):
    """As a process: exit 0, and the weights."""
    text = tmp_path / "text.txt"
    text.write_text("жук и → № 5, " * 300, encoding="utf-8")
    a = run(tmp_path, "-", data=str(text), steps=2, prompt="жук")
    with open(console, "w") as out:
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *flags(a)],
            stdout=out,
            stderr=subprocess.PIPE,
            env=dict(os.environ, PYTHONIOENCODING="cp1252"),
        )
    assert done.returncode == 0, done.stderr
    assert checkpoint.read(a.folder())["step"] == 2


def test_a_log_that_cannot_be_gone_on_with_is_set_aside(tmp_path):
    for n, text in enumerate(("a,b\n1,2\n", "step,seconds\nx,1\n", "", "\0", "step\n1,2,3\n")):
        a, said = run(tmp_path, "-", name=str(n), steps=4, stop=2), []
        train.fit(a, quiet)
        (a.folder() / "log.csv").write_text(text)
        train.fit(replace(a, resume=True, stop=0), said.append)
        rows = disk.read_log(a.folder() / "log.csv")
        assert [r["step"] for r in rows] == [3, 4], said
        if text:
            assert (a.folder() / "left-1-log.csv").read_text() == text


LOG = ROOT / "receipts" / "toy-0" / "log.csv"


@pytest.mark.parametrize(
    "lacking", ["nothing", "every other column", "load.json", "rows", "tokens"]
)
def test_any_log_is_drawn(tmp_path, lacking):
    rows = disk.read_log(LOG)
    if lacking == "rows":
        rows = rows[:1]
    if lacking == "every other column":
        rows = [{k: v for i, (k, v) in enumerate(r.items()) if i % 2 == 0} for r in rows]
    disk.write_log(tmp_path / "log.csv", rows)
    if lacking != "load.json":
        tokens = [[0, 0, 0], [1, 2, 3]] if lacking == "tokens" else []
        load = dict(layers=["layer 1", "MTP 1"][: len(tokens)], tokens=tokens)
        (tmp_path / "load.json").write_text(json.dumps(load))
    draw(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


# ---- the same text, or a refusal


def test_another_text_is_refused_by_whatever_reads_it(tmp_path, fresh):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n" * 60)
    a = run(tmp_path, "*", data=str(text), steps=2)
    train.fit(a, quiet)
    text.write_text("seven six five four three two one\n" * 60)
    for name in ("heal", "merge", "resume"):
        with pytest.raises(ValueError, match="this is not the text the run was trained on"):
            READERS[name](a, tmp_path)


@pytest.mark.parametrize("split,at", [("training", 10), ("training", 3700), ("validation", 3990)])
@pytest.mark.parametrize("bad", [257, 60_000])
def test_ids_beyond_the_vocabulary_are_found_at_start(tmp_path, fresh, split, at, bad):
    ids = np.random.default_rng(0).integers(0, 256, 4000).astype("<u2")
    ids[at] = bad
    ids.tofile(tmp_path / "ids.bin")
    a = run(tmp_path / "runs", "-", data=str(tmp_path / "ids.bin"))
    with pytest.raises(ValueError, match=f"has id {bad} in its {split} split"):
        train.fit(a, quiet)
    assert not (tmp_path / "runs").exists()


# ---- promises


def test_a_row_draws_by_its_own_seed_alone():
    """Alone, first, last, beside many; plainly and with drafts; and each its own seed of a list."""
    changes = dict(vocab_size=64, hybrid_override_pattern="M*", hidden_size=32)
    model = Nemotron(replace(Config.preset("toy"), **changes)).eval()
    p, q, r = [5, 6, 7, 8], [9, 3], [1]
    for how in (dict(), dict(speculate=3)):
        new = lambda rows, seed: [
            x[len(row) :]
            for x, row in zip(sample.generate(model, rows, 10, 1.0, seed=seed, **how), rows)
        ]
        alone = new([p], 1)[0]
        assert alone == new([p, q], 1)[0] == new([q, p], 1)[1] == new([q, r, p], 1)[2]
        assert alone == new([q, p], [8, 1])[1] != new([q, p], [1, 8])[1]
        twice = new([p, p], 1)
        assert twice[0] == alone != twice[1]
    for wrong in ([1], [1, 2, 3], 1.5, "1"):
        with pytest.raises(ValueError):
            sample.generate(model, [p, q], 1, 1.0, seed=wrong)
    assert len(set(decode.seeds(3, [p] * 5000))) == 5000


def test_the_devices_generator_travels_too(monkeypatch):
    """No GPU here: what is asked of torch.cuda is what counts, and that a step's draws need
    none.
    """
    here, state = Here(), torch.arange(16, dtype=torch.uint8)
    here.device, here.recipe, given = torch.device("cuda"), object(), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, device: given.append(s))
    saved = here.random()
    assert saved["device_rng"] is state and torch.equal(saved["rng"], torch.get_rng_state())
    here.restore_random(saved)
    assert given == [state]


@settings(max_examples=200)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 300))
def test_a_schedule_stays_within_its_peak_or_is_refused(warmup, decay, steps):
    r = train.Run(warmup=warmup, decay=decay, steps=steps, lr=1.0, lr_min=0.01)
    if warmup + decay > 1.001:
        with pytest.raises(ValueError, match="together at most 1"):
            climb_and_fall(r)
    elif warmup + decay <= 1:
        rates = [train.learning_rate(t, r) for t in range(1, steps + 1)]
        assert all(0 < x <= 1 for x in rates)
        assert decay * steps < 1 or rates[-1] == pytest.approx(0.01)


# ---- the control


def test_this_file_can_fail(tmp_path, monkeypatch):
    """The old ways, and that this file would have seen them."""
    a = run(tmp_path, "-", steps=2)
    monkeypatch.setattr(checkpoint, "spoiled", lambda tree: "")
    poisoned(monkeypatch, 2)
    train.fit(replace(a, name="nan"), quiet)  # saved without a look
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.read(tmp_path / "nan")
    with pytest.raises(ValueError):  # a command for any run, not this one
        (line,) = offered("--resume goes on from the last checkpoint")
    one = torch.Generator().manual_seed(1)  # a generator for all rows
    p = torch.full((2, 64), 1 / 64)
    both = decode.draw(p, one).tolist()
    alone = decode.draw(p[1:], torch.Generator().manual_seed(1)).tolist()
    assert both[1:] != alone
