"""Programs as a shell starts them: with streams closed, interrupted while they are still being
imported, without docstrings, with a run's name that is a path; each over all of them.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import command

import pytest
from inputs import PROGRAMS, Input, program, tried
from test_structure import HOUSE, file

import disk
import grpo
import shell
from training import settings

ROOT = Path(__file__).resolve().parent.parent
PROC = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
ONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def script(name):
    """How a shell starts a program."""
    return ["-m", name] if "." in name else [str(ROOT / f"{name}.py")]


@PROC
@pytest.mark.slow
def test_a_closed_stream_is_nobodys_number(tmp_path):
    """No traceback, the same exit code, and never a file of the work in a stream's place."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/streams.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=ONE,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, closed, how, code, there, said in found:
        assert not said and code == dict(good=0, bad=2)[how], (name, closed, how, code, said)
        taken = [there[number] for number in closed]
        assert len(there) == 3 and set(taken) == {os.devnull}, (name, closed, how, there)
    assert len({name for name, *_ in found}) == len(PROGRAMS) and len(found) > 80
    out, err = ((tmp_path / s).read_text() for s in ("stdout", "stderr"))
    assert "Traceback" not in err and "usage: hf.py" in err and "usage" not in out


def mapped(pid, library):
    try:
        return library in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return True


def cut_while_importing(argv, late):
    """Ctrl-C `late` seconds after torch's own library is there -> exit code, what was said."""
    p = subprocess.Popen(
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=ONE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while p.poll() is None and not mapped(p.pid, "libtorch_cpu"):
        time.sleep(0.002)
    time.sleep(late)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    return p.returncode, (out + err).decode()


@PROC
@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_interrupt_while_torch_is_imported_is_a_line(name):
    for late in (0.0, 0.05, 0.15, 0.4):
        code, said = cut_while_importing([*script(name), "--nothing"], late)
        assert "Traceback" not in said, said
        done = code in (2, -signal.SIGINT) and "unrecognized arguments: --nothing" in said
        assert done or code == 130 and "interrupted" in said, (code, said)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_library_that_is_not_there_is_a_line(name, tmp_path):
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    )
    done = subprocess.run(
        [sys.executable, *script(name), "--nothing"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ONE | dict(PYTHONPATH=str(tmp_path)),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    asked = "error: No module named 'torch': pip install -r requirements.txt"
    without = "--nothing" in done.stderr and name in ("plot", "scale.budget")
    assert asked in done.stderr or without, done.stderr


def test_a_library_that_fails_is_a_line_and_a_fault_of_ours_a_traceback():
    plot = [sys.executable, str(ROOT / "plot.py"), "--nothing"]
    junk = subprocess.run(plot, capture_output=True, text=True, env=ONE | dict(MPLBACKEND="junk"))
    said = "plot.py: error: matplotlib cannot be imported: Key backend: 'junk'"
    assert junk.returncode == 2 and said in junk.stderr and "Traceback" not in junk.stderr
    for where, name, whose in (
        ("matplotlib.rcsetup", None, "matplotlib"),
        ("quant.packed", None, ""),
        ("__main__", None, ""),
        ("__main__", "torch._C", "torch"),
        ("__main__", "training.nothing", ""),
    ):
        try:
            raised = "raise ModuleNotFoundError('', name=name) if name else ImportError"
            exec(raised, dict(__name__=where, name=name))
        except ImportError as e:
            assert shell.library(e, e.__traceback__) == whose, (where, name)


def test_another_programs_interrupt_is_its_own():
    """What is imported from a notebook or a script leaves how that ends alone."""
    ask = "import sys; sys.path.insert(0, sys.argv[1]); import command, shell; "
    ask += "print(sys.excepthook is sys.__excepthook__, shell.ours())"
    done = subprocess.run([sys.executable, "-c", ask, str(ROOT)], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_without_docstrings_a_program_still_has_flags(capsys):
    """python -OO leaves none."""
    command.parser(program("train")[0], "train.py", None).print_help()
    assert "--steps STEPS" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "sft", "grpo"])
@pytest.mark.parametrize("led", ["..", ".", "../other", "/there", "a/../../b", "./"])
def test_a_runs_name_stays_below_out(name, led, tmp_path):
    main = program(name)[1]
    here = tmp_path / "runs"
    how, said = tried(Input(led, lambda: main([f"--name={led}", "--out", str(here)])))
    assert how == "clean" and f"--name {led!r} names no folder under" in said, (how, said)
    assert not list(tmp_path.iterdir())
    assert disk.below("runs", "a/b") == Path("runs/a/b")


@pytest.mark.parametrize("name", ["train", "sft", "grpo"])
def test_a_run_that_was_moved_goes_on_where_it_is(name, tmp_path, monkeypatch):
    """What its config.json says of its place is where it was begun."""
    kind = program(name)[0]
    complete = grpo.complete if name == "grpo" else partial(settings.complete, kind=kind)
    run = dict(asdict(kind()), out=str(tmp_path / "there"), name="other")
    monkeypatch.chdir(tmp_path)
    named = kind(out="runs", name="a/b")
    for here, given in ((kind().folder(), {}), (named.folder(), dict(name="a/b", out="runs"))):
        here.mkdir(parents=True)
        (here / "config.json").write_text(json.dumps(dict(run=run)))
        new = complete(dict(given, resume=True))
        assert new.folder() == here and new.resume and new.steps == kind().steps


ODD = "", "[]", "null", '{"run": []}', '{"run": {"data": 7}}', '{"program": [7]}', "[" * 99_999


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:16])
def test_a_command_is_offered_whatever_config_json_holds(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    words = shlex.split(disk.resume(tmp_path))
    assert "--resume" in words and tmp_path.name in words


def test_every_file_that_can_be_started_ends_as_programs_do():
    for name in HOUSE:
        text = file(name).read_text(encoding="utf-8")
        if "__main__" in text and name not in ("bounds", "command", "shell"):
            assert re.search(
                r"\bcommand\.(run|part)\(|\bdemo\(main|import .*\bmain$", text, re.M
            ), name


def test_this_file_can_fail(monkeypatch):
    assert not mapped(os.getpid(), "no such library")
    monkeypatch.setattr(disk, "below", lambda out, name: Path(out) / name)
    with pytest.raises(AssertionError):
        test_a_runs_name_stays_below_out("grpo", "..", Path("/dev/null/nowhere"))
