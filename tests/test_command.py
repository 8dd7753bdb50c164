"""The shared command line: bounds beside the help, one sentence and the right exit code."""

import errno
import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.error import HTTPError, URLError

import command

import pytest
import torch

import bounds
from bounds import knob

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Flags:
    steps: int = knob(128, "optimiser steps", least=1, most=1000, memory=True)
    lr: float = knob(1e-3, "learning rate", above=0, most=10)
    device: str = knob("auto", "where", choices=command.DEVICES)
    name: str = knob("x", "a name")
    also: str = knob("", "another, or none")
    size: int | None = knob(None, "a size, or none", least=1, most=8)
    ends: int | list | None = knob(2, "one id or many", least=0, most=99)
    loud: bool = knob(False, "louder, 100 %")
    stop: tuple = knob((), "texts, 1 to 3 letters", least=1, most=3)


def field(name):
    return {f.name: f for f in fields(Flags)}[name]


FITS = dict(
    steps=(1, 1000),
    lr=(1e-300, 10, 3),
    device=("cpu",),
    name=("a", "ü b"),
    also=("",),
    size=(None, 1, 8),
    ends=(0, [1, 2], None),
    loud=(True, False),
    stop=(["ab"], (), ("a", "b")),
)
UNFIT = dict(
    steps=(0, 1001, 1.5, True, "7", None, math.nan, [3]),
    lr=(0, -1, 10.1, math.nan, math.inf, -math.inf, "1", True, None),
    device=("tpu", "", 3, None),
    name=("", "a" * 4097, "a\0b", 3, None),
    also=("a\0", None),
    size=(0, 9, 2.0, "None", [1]),
    ends=(-1, [], [1, 100], [1, "2"], [True], math.nan),
    loud=("false", 0, 1, None, math.nan),
    stop=(["abcd"], [""], [3]),
)


@pytest.mark.parametrize("name", FITS)
def test_a_declaration_says_what_a_field_may_hold(name):
    assert set(FITS) == {f.name for f in fields(Flags)} == set(UNFIT)
    for x in FITS[name]:
        assert not bounds.fault(field(name), x), x
    for x in UNFIT[name]:
        why = bounds.fault(field(name), x)
        assert why and "\n" not in why and len(why) < 200, x
        with pytest.raises(ValueError, match=name):
            bounds.check(Flags(**{name: x}))


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--steps", "7", "--loud"], dict(steps=7, loud=True)),
        (["--size", "None", "--ends", "3", "--no-loud"], dict(size=None, ends=3, loud=False)),
        (["--stop", "a", "--stop", "b", "--also", ""], dict(stop=["a", "b"], also="")),
    ],
)
def test_only_what_was_given_is_in_the_answer(argv, expected):
    assert vars(command.parser(Flags, "x.py", "X.").parse_args(argv)) == expected


def code_of(capsys, argv, work=lambda flags: None, **how):
    """Exit code and the last line on stderr."""
    try:
        command.run(work, Flags, "x.py", "X.", argv, **how)
        code = 0
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err.strip().rsplit("\n", 1)[-1]


@pytest.mark.parametrize(
    "argv",
    "--steps=0 --steps=nan --steps=1.5 --steps=1e400 --lr=nan --lr=-inf --lr=x --lr= --device= "
    "--name= --loud=3 --nothing=1 --stop=abcd --size=0 --steps".split(),
)
def test_a_bad_flag_is_one_sentence_and_exit_2(capsys, argv):
    code, line = code_of(capsys, [argv])
    assert code == 2 and line.startswith("x.py: error: ") and argv.split("=")[0] in line


ENDS = [
    (ValueError("seven is odd"), 2, "seven is odd"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2, "a.txt"),
    (PermissionError(errno.EACCES, "Permission denied", "b"), 2, "Permission denied: b"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "c"), 2, "Is a directory: c"),
    (ImportError("no module x"), 2, "no module x"),
    (ImportError("no module x", name="x"), 2, "no module x: is it in requirements.txt,"),
    (FloatingPointError("loss nan"), 1, "stopped: loss nan"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "--steps"),
    (MemoryError(), 1, "less of --steps needs less"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 1, "less of --steps needs less"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "--steps"),
    (ConnectionResetError("peer"), 1, "stopped: peer"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (KeyboardInterrupt("go on with --resume"), 130, "go on with --resume"),
]


@pytest.mark.parametrize("e, code, words", ENDS, ids=[type(e).__name__ for e, *_ in ENDS])
def test_what_can_be_foreseen_ends_in_one_sentence(capsys, e, code, words):
    def work(flags):
        raise e

    got, line = code_of(capsys, [], work)
    assert got == code and words in line and line.startswith("x.py: ")


@pytest.mark.parametrize("e", [TypeError("ours"), RuntimeError("ours"), KeyError("ours")])
def test_a_fault_of_ours_keeps_its_traceback(capsys, e):
    def work(flags):
        raise e

    with pytest.raises(type(e)):
        code_of(capsys, [], work)


def test_settings_from_another_place_are_checked_too(capsys):
    code, line = code_of(capsys, [], make=lambda given: Flags(steps=-3))
    assert code == 2 and "--steps: -3 is not an integer from 1 to 1,000" in line


PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import command
from tests_flags import Flags
def work(flags):
    for i in range(flags.steps * 1000):
        print("\\u2192 \\u4e2d", i)
command.run(work, Flags, "x.py", "X.")
"""


def started(tmp_path, *argv, **env):
    source = "from dataclasses import dataclass\nfrom bounds import knob\n@dataclass(frozen=True)\n"
    source += "class Flags:\n    steps: int = knob(1, '', least=1, most=9)\n"
    (tmp_path / "tests_flags.py").write_text(source)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(ROOT), *argv],
        cwd=tmp_path,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_reader_that_leaves_is_no_error(tmp_path):
    p = started(tmp_path, "--steps", "9", PYTHONIOENCODING="utf-8")
    p.stdout.readline()
    p.stdout.close()
    assert p.stderr.read() == b"" and p.wait() == 1


@pytest.mark.parametrize("console", ["cp1252", "ascii", "cp437"])
def test_a_console_without_the_letter_shows_a_question_mark(tmp_path, console):
    out, err = started(tmp_path, PYTHONIOENCODING=console).communicate()
    assert err == b"" and out.splitlines()[0] == b"? ? 0" and len(out.splitlines()) == 1000


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff", b"[" * 100_000, b"[1]", b"null", b'"x"', b"3", b"\xff\xfe{\0}\0"]
)
def test_a_document_is_a_dict_or_one_sentence(tmp_path, raw):
    path = tmp_path / "d.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="d.json") as e:
        command.document(path)
    assert len(str(e.value).replace(str(path), "")) < 200
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert command.document(path) == dict(a=1)


def test_a_device_is_there_or_refused():
    assert command.device("cpu") == "cpu" and command.device() in command.DEVICES
    for name in ("tpu", "", "cuda:9", *["cuda"] * (not torch.cuda.is_available())):
        with pytest.raises(ValueError, match="--device"):
            command.device(name)


def test_what_no_memory_holds_is_refused_with_the_numbers():
    command.fits(1, "one byte")
    with pytest.raises(
        ValueError, match=r"weights need [\d,.]+ GB, and this machine has [\d.]+ GB"
    ):
        command.fits(command.machine() + 1, "weights")
    assert 1 << 28 < command.machine() < 1 << 62


@pytest.mark.parametrize(
    "how", [dict(), dict(least=1), dict(most=1), dict(least=0, above=0, most=1)]
)
def test_a_number_without_bounds_is_refused_where_it_is_declared(how):
    with pytest.raises(TypeError, match="without bounds"):
        knob(1, "a number", **how)


def test_a_network_that_is_not_there_is_the_machines_fault():
    """urlopen's error is an OSError without a file: it was exit 2, as if the input were bad."""
    for e in (URLError("Name or service not known"), HTTPError("x", 404, "Not Found", {}, None)):
        code, said = command.ending(e)
        assert code == 1 and said.startswith("stopped: ")


def test_this_file_can_fail(monkeypatch):
    """Bounds that hold everything let the table's numbers in."""
    monkeypatch.setattr(bounds.Bounds, "hold", lambda self, x: True)
    assert not bounds.fault(field("steps"), 0)
    with pytest.raises(AssertionError):
        test_a_declaration_says_what_a_field_may_hold("steps")
