"""Every field of every program, and of a model, has bounds and refuses what lies outside them."""

from dataclasses import fields

import pytest
from inputs import CHANGES, PROGRAMS, Input, flags, overrides, program, tried, wrong
from test_structure import HOUSE, file

import bounds
from config import Config


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_refuses_what_its_declaration_does_not_allow(name):
    """One value below, one above, NaN, a word, nothing: one sentence each, exit code 2."""
    seen = 0
    for given in flags(name):
        how, said = tried(given)
        assert how == "clean" and ": error: " in said, (given.what, how, said)
        seen += 1
    assert seen >= len(fields(program(name)[0]))


@pytest.mark.parametrize("f", fields(Config), ids=lambda f: f.name)
def test_every_field_of_a_config_does_too(f):
    odd = [float("nan"), "a word", None, [], {}, 1.5, -1, True, "false", 10**30]
    for x in odd:
        if bounds.fault(f, x):
            with pytest.raises(ValueError, match=f.name):
                Config(**{f.name: x})
    assert sum(bool(bounds.fault(f, x)) for x in odd) >= 4
    for text in wrong(f):
        with pytest.raises(ValueError):
            bounds.value(f, text)


def test_model_overrides_are_checked_by_the_same_declarations(tmp_path):
    every = list(overrides(tmp_path))
    for given in every[:: max(1, len(every) // 60)]:
        how, said = tried(given)
        assert how == "clean" and ": error: " in said, (given.what, how, said)
    assert not list(tmp_path.iterdir())


def test_no_field_is_without_bounds():
    for kind in (Config, *(program(name)[0] for name in PROGRAMS)):
        for f in fields(kind):
            assert "bounds" in f.metadata and not bounds.fault(f, f.default), (kind, f.name)


def test_no_program_reads_flags_by_itself():
    """So that no file has bounds, messages or exit codes of its own."""
    for name in HOUSE:
        text = file(name).read_text(encoding="utf-8")
        assert name == "command" or "argparse" not in text, name
        assert name == "command" or "sys.argv" not in text or "p.error" not in text, name


def test_this_file_can_fail(monkeypatch):
    """Without a check, a bad flag passes; a fault of ours is a traceback; silence is told apart."""
    monkeypatch.setattr(bounds, "fault", lambda f, x: "")
    import model

    assert tried(Input("", lambda: model.main(["--context=-5"])))[0] == "silent"

    def broken():
        raise TypeError

    assert tried(Input("", broken))[0] == "traceback" and CHANGES
    assert tried(Input("", lambda: model.main(["--context=7"]), (2,)))[0] == "silent"
