"""What a notebook shows of a run: one bar and one picture that grow where they stand, and no line
twice; on a console nothing has changed.
"""

import base64
import sys
import types

import pytest

import grpo
import plot
import sft
import train
from training import live

RUN = dict(
    preset="mini",
    model="hybrid_override_pattern=ME",
    tokenizer="bytes",
    prompt="",
    steps=6,
    batch=2,
    length=16,
    log_every=1,
    eval_every=3,
    eval_tokens=64,
    save_every=6,
    threads=1,
    worth=False,
)


def run(tmp_path, **kw):
    """A small run on a small text."""
    text = tmp_path / "a.txt"
    text.write_text("so it goes, and so it went\n" * 200)
    return train.Run(**{**RUN, "out": str(tmp_path), "data": str(text), **kw})


class Screen:
    """IPython's display: what stands in each place, and everything that ever stood there."""

    def __init__(self):
        self.places, self.history = [], []

    def __call__(self, bundle, raw, display_id):
        assert raw and display_id
        place = len(self.places)
        self.places.append(None)
        put = lambda bundle, raw: (
            self.places.__setitem__(place, bundle),
            self.history.append((place, bundle)),
        )
        put(bundle, raw)
        return types.SimpleNamespace(update=put)


@pytest.fixture
def screen(monkeypatch):
    """As if a notebook's kernel ran this process."""
    shown = Screen()
    monkeypatch.setattr(live, "in_notebook", lambda: True)
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=shown))
    return shown


def png(bundle):
    return base64.b64decode(bundle["image/png"])


def test_a_run_is_a_bar_and_a_picture(tmp_path, screen, capsys):
    _, rows = train.fit(run(tmp_path, prompt="a"))
    bar, picture = screen.places
    assert 'value="6" max="6"' in bar["text/html"] and bar["text/plain"] == "6 of 6 steps"
    assert png(picture)[:8] == b"\x89PNG\r\n\x1a\n"
    bars = [b["text/html"] for place, b in screen.history if place == 0]
    assert all(f'value="{step}"' in "".join(bars) for step in range(7))
    assert any("tok/s" in b for b in bars) and "tok/s" not in bars[-1]
    assert "validation" in bars[-1] and "step " not in bars[-1].split("<pre>")[1]
    said = capsys.readouterr()
    assert said.out.startswith("sample     ") and "step" not in said.out and not said.err
    assert len(rows) == 6


def test_the_last_picture_is_the_log_s(tmp_path, screen, monkeypatch):
    seen = []
    monkeypatch.setattr(plot, "png", lambda fig: seen.append(fig) or b"")
    _, rows = train.fit(run(tmp_path))
    last = seen[-1].axes[0].lines
    assert [list(line.get_xdata()) for line in last][0] == [1, 2, 3, 4, 5, 6]
    assert list(last[-1].get_ydata()) == [r["val_nats"] for r in rows if r["val_nats"] != ""]


def test_practice_shows_its_reward(tmp_path, screen, monkeypatch):
    small = dict(tasks="sort", questions=2, room=8, threads=1, out=str(tmp_path))
    base = sft.Run(steps=1, stage2=0, batch=4, tokenizer="bytes", **small)
    train.fit(base, lambda line: None, work=sft.Talks())
    assert not screen.places
    figures = []
    monkeypatch.setattr(plot, "png", lambda fig: figures.append(fig) or b"")
    grpo.fit(grpo.Run(base=str(base.folder()), steps=2, prompts=2, group=2, log_every=1, **small))
    assert 'value="2" max="2"' in screen.places[0]["text/html"]
    assert "reward" in figures[-1].axes[0].get_ylabel()


def test_a_console_has_its_lines(tmp_path, capsys):
    train.fit(run(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 6
    assert sum("validation" in line for line in lines) == 2


def test_ipython_on_a_console_is_a_console(monkeypatch):
    console, kernel = types.SimpleNamespace(), types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert not live.in_notebook() and live.teller() is print
    for shell, notebook in ((None, False), (console, False), (kernel, True)):
        there = types.SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", there)
        assert live.in_notebook() == notebook


def test_pictures_take_their_share_of_the_time_and_no_more(screen, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    shown = live.Live(lambda rows: now.__setitem__(0, now[0] + 2), screen)
    monkeypatch.setattr(plot, "png", lambda fig: b"")
    for i in range(1, 101):
        now[0] += 1
        shown.step("a line", [dict(step=i)], i, 100)
    pictures = sum(place == 1 for place, _ in screen.history)
    assert 4 <= pictures <= 1 + live.SHARE * (now[0] - 100) / 2


def test_a_picture_that_fails_stops_nothing_and_is_told(tmp_path, screen, monkeypatch, capsys):
    def fails(rows):
        raise ValueError("no ink")

    monkeypatch.setattr(plot, "growing", fails)
    monkeypatch.setattr(live.teller, "__defaults__", (fails,))
    model, rows = train.fit(run(tmp_path))
    assert len(rows) == 6 and len(screen.places) == 1
    assert "could not be printed (ValueError: no ink)" in capsys.readouterr().err


def test_what_is_said_is_text_and_not_markup(screen):
    shown = live.Live(None, screen)
    shown("a < b & <b>c</b>")
    assert "a &lt; b &amp; &lt;b&gt;" in screen.places[0]["text/html"]


def test_this_file_can_fail(tmp_path, screen, capsys, monkeypatch):
    monkeypatch.setattr(train, "teller", lambda: print)  # as it was: lines everywhere
    train.fit(run(tmp_path))
    assert not screen.places and capsys.readouterr().out.count("\nstep ") == 6
