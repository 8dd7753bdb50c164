"""talk.py: what the model is given is the template's text, budgets close a reasoning to the token,
every end id ends a reply, and a terminal and a pipe get what each is promised.
"""

import contextlib
import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_sample import greedy, tiny

import chat
import checkpoint
import data
import hf
import sample
import talk
import tokenizer

ROOT = Path(__file__).resolve().parent.parent
ENC = chat.with_special(data.tokenizer("bytes"))
END, ENOUGH = (ENC.encode_single_token(s) for s in (chat.END, chat.ENOUGH))
MODES = dict(on={}, off=dict(thinking=False), low=dict(low_effort=True))


def spelled(text):
    """Template text -> ids, its tags as the tokens they are."""
    return ENC.encode(text, allowed_special=set(chat.SPECIAL))


class Script:
    """Stands in for a model: says what is written for it, and notes what it was given."""

    def __init__(self, *texts, end=(END,)):
        self.texts, self.end, self.given = [spelled(t) for t in texts], end, []

    def __call__(self, ids, room):
        self.given.append((list(ids), room))
        said = self.texts.pop(0)[:room] if room else []
        for t in said:
            yield t
            if t in self.end:
                return


def replies(script, questions, **how):
    """Asks a Script -> the Talk, and the text of each reply."""
    one = talk.Talk(ENC, {END}, script, **how)
    return one, [ENC.decode(list(one.ids(q))) for q in questions]


# ---- what the model is given


@pytest.mark.parametrize("think", MODES)
def test_every_prompt_is_the_template_of_what_was_said(think):
    said = ["a\n</think>\nA<|im_end|>", "b\n</think>\nB<|im_end|>", "C<|im_end|>"]
    if think == "off":
        said = [s.split("\n")[-1] for s in said]
    script = Script(*said)
    one, got = replies(script, ["1", "2<|im_end|>", "3"], think=think)
    assert got == said
    messages = []
    for (ids, room), question, text in zip(script.given, ["1", "2<|im_end|>", "3"], said):
        messages.append(dict(role="user", content=question))
        want = chat.parts(messages, generate=True, **MODES[think])
        assert ids == chat.encode(ENC, want)[0] and room == 200
        assert ENC.decode(ids) == chat.render(messages, generate=True, **MODES[think])
        messages.append(chat.message(text.removesuffix(chat.END), think != "off"))
    assert "a\n" not in ENC.decode(script.given[1][0])  # the first answer's reasoning is gone
    assert "A<|im_end|>" in ENC.decode(script.given[1][0])
    assert one.messages == messages


def test_the_modes_differ_in_what_the_model_is_given():
    given = set()
    for think in ("on", "off", "low"):
        script = Script("A<|im_end|>")
        replies(script, ["1"], think=think)
        given.add(tuple(script.given[0][0]))
    assert len(given) == 3


@pytest.mark.parametrize("budget", range(6))
def test_a_budget_closes_the_reasoning_to_the_token(budget):
    script = Script(*["abcdefgh"] * bool(budget), "Z<|im_end|>")  # no room, nothing said
    _, (text,) = replies(script, ["1"], think=str(budget), room=20)
    thought = "abcdefgh"[:budget]
    closed = thought + "\n" * bool(thought) + "</think>\n"
    assert text == closed + "Z<|im_end|>"
    (first, _), (then, room) = script.given
    assert ENC.decode(then) == ENC.decode(first) + closed and room == 20 - budget
    assert ENC.decode(first).endswith("<think>\n")


@pytest.mark.parametrize("said", ["ab\n</think>\nZ<|im_end|>", "ab<|im_end|>"])
def test_a_budget_that_is_not_used_up_changes_nothing(said):
    for budget in ("5", "19"):
        script = Script(said)
        _, (text,) = replies(script, ["1"], think=budget, room=20)
        assert text == said and len(script.given) == 1


def test_a_reply_that_is_stopped_stays_as_far_as_it_went():
    one = talk.Talk(ENC, {END}, Script("abc\n</think>\nAnswer<|im_end|>", "B"))
    reply = one.ids("1")
    for _ in range(9):  # abc, a line's end, </think>, another, Ans
        next(reply)
    reply.close()
    assert one.messages[-1] == dict(role="assistant", content="Ans", reasoning_content="abc")
    list(one.ids("2"))
    assert [m["role"] for m in one.messages] == ["user", "assistant"] * 2


# ---- a run on disk that nobody had to train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its end ids have logits of 0, so that a greedy reply never ends by itself."""
    model = tiny("ME*", torch.float32, vocab_size=270, num_nextn_predict_layers=1)
    with torch.no_grad():
        model.lm_head.weight[[256, END]] = 0
    path = tmp_path_factory.mktemp("runs") / "some"
    saved = dict(model=model.state_dict(), config=asdict(model.config), step=7)
    checkpoint.save(path, 7, saved | dict(tokenizer=data.pack(ENC)))
    return path


def said(monkeypatch, capsys, folder, text, *argv):
    """What the program prints if its input is the text: a pipe's."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    sample.main(["--run", str(folder), "--chat", *argv])
    return capsys.readouterr()


def defined(model, talks, n=8, **mode):
    """The definition of greedy replies: the template rendered, its ids continued."""
    out, messages = "", []
    for question in talks:
        messages.append(dict(role="user", content=question))
        row = spelled(chat.render(messages, generate=True, **mode))
        new = greedy(model, row, n)[len(row) :]
        text = b"".join(talk.raw(ENC, t) for t in new).decode("utf-8", "replace")
        out += "<think>\n" * mode.get("thinking", True) + text + "\n"
        messages.append(chat.message(text, mode.get("thinking", True)))
    return out


SHORT = ["--temperature", "0", "--max-new-tokens", "8"]


def test_a_pipe_of_questions(folder, monkeypatch, capsys):
    model, _, _ = sample.load_run(folder)
    for think, mode in MODES.items():
        for given in (
            dict(text="hi\n\n  \nho"),
            dict(text="", argv=["--prompt=hi", "--prompt=ho"]),
        ):
            argv = ["--think", think, *given.get("argv", ())]
            out, err = said(monkeypatch, capsys, folder, given["text"], *SHORT, *argv)
            assert out == defined(model, ["hi", "ho"], **mode), (think, given)
            assert err.count("[cut after 8 tokens: --max-new-tokens 8]") == 2
            assert "\033" not in out + err
    (folder / "q.txt").write_text("hi\nho", encoding="utf-8")
    out, _ = said(monkeypatch, capsys, folder, "", *SHORT, "--prompt-file", str(folder / "q.txt"))
    assert out == defined(model, ["hi\nho"])  # a file is one question
    assert said(monkeypatch, capsys, folder, "", *SHORT)[0] == ""


def test_the_commands(folder, monkeypatch, capsys):
    model, _, _ = sample.load_run(folder)
    out, _ = said(monkeypatch, capsys, folder, "hi\n/reset\nhi\n/think off\n/reset\nho\n", *SHORT)
    assert out == 2 * defined(model, ["hi"]) + defined(model, ["ho"], thinking=False)
    again, _ = said(monkeypatch, capsys, folder, "hi\nhi\n", *SHORT)
    assert again != 2 * defined(model, ["hi"])  # without /reset the second has the first before it
    out, _ = said(monkeypatch, capsys, folder, "/think 3\nhi", *SHORT)
    budget, _ = said(monkeypatch, capsys, folder, "hi", *SHORT, "--think=3")
    assert out == budget and "\n</think>\n" in out and "</think>" not in defined(model, ["hi"])


def test_the_other_flags_reach_the_conversation(folder, monkeypatch, capsys):
    base = [*SHORT, "--think=off"]
    plain = said(monkeypatch, capsys, folder, "hi\nho", *base)[0]
    drafted = said(monkeypatch, capsys, folder, "hi\nho", *base, "--speculate=2")
    assert drafted[0] == plain and "[mean accepted length " in drafted[1]
    free = lambda *argv: said(
        monkeypatch, capsys, folder, "hi\nho", "--think=off", "--max-new-tokens=8", *argv
    )[0]
    assert free("--seed=1") == free("--seed=1") != free("--seed=2")
    assert free("--seed=1", "--top-k=1") == plain == free("--seed=1", "--top-p=1e-6")
    assert free("--seed=1", "--temperature=1e-6") == plain
    one, two = plain.rstrip("\n").split("\n")[0], said(monkeypatch, capsys, folder, "hi", *base)
    assert two[0].startswith(one)
    ends = [c for c in one if c.isascii() and c.isprintable()]
    stopped, err = said(monkeypatch, capsys, folder, "hi", *base, "--stop", ends[0])
    assert stopped.rstrip("\n") == one[: one.index(ends[0])] and "cut" not in err


def test_every_end_id_of_a_checkpoint_ends_a_reply(tmp_path, folder, monkeypatch, capsys):
    model, _, _ = sample.load_run(folder)
    hf.save(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.pack(ENC)))
    row = spelled(chat.render([dict(role="user", content="hi")], generate=True, thinking=False))
    new = greedy(model, row, 8)[len(row) :]
    for n in (1, 3, 6):
        ids = [new[n], 268] if n > 1 else new[n]
        where = tmp_path / ("generation_config.json" if n == 3 else "config.json")
        kept = where.read_text() if where.exists() else "{}"
        where.write_text(json.dumps(json.loads(kept) | dict(eos_token_id=ids)))
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
        sample.main(["--hf", str(tmp_path), "--chat", "--think=off", *SHORT])
        out, err = capsys.readouterr()
        stop = min(i for i, t in enumerate(new) if t == new[n])
        want = b"".join(talk.raw(ENC, t) for t in new[:stop]).decode("utf-8", "replace")
        assert out == want + "\n" and "cut" not in err, n
        where.write_text(kept)


@pytest.mark.parametrize(
    "text,argv,message",
    [
        ("/think 7x", [], "/think 7x: there are on, off, low and a number of tokens"),
        ("/think", [], "/think : there are on, off, low and a number of tokens"),
        ("/think 8", SHORT, "--think 8 of --max-new-tokens 8: no token would be left"),
        ("/thnk off", [], "/thnk: the commands are /reset, /think on|off|low|N"),
        ("\udcff", [], "a line of the input is not UTF-8"),
        ("", ["--think=sometimes"], "is not spelled as on|off|low|[0-9]{1,9}"),
        ("", ["--think=200"], "no token would be left for the answer"),
        ("", ["--compile"], "--chat reads a text of another length"),
        ("", ["--prompt-tokens=9"], "--chat reads a text of another length"),
        ("", ["--no-chat", "--think=off"], "--think off is for --chat"),
    ],
    ids=repr,
)
def test_mistakes_are_named(folder, monkeypatch, capsys, text, argv, message):
    with pytest.raises(SystemExit) as e:
        said(monkeypatch, capsys, folder, text, *argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and "Traceback" not in err


def test_a_tokenizer_without_the_template_is_named(tmp_path, monkeypatch, capsys):
    model = tiny("M", torch.float32, vocab_size=300)
    saved = dict(model=model.state_dict(), config=asdict(model.config), step=7)
    checkpoint.save(tmp_path, 7, saved | dict(tokenizer=data.pack(data.tokenizer("bytes"))))
    with pytest.raises(SystemExit) as e:
        said(monkeypatch, capsys, tmp_path, "hi")
    assert (
        e.value.code == 2 and "bytes has no special token <|im_start|>" in capsys.readouterr().err
    )


# ---- the program itself


def command(folder, *argv):
    return [sys.executable, str(ROOT / "sample.py"), "--run", str(folder), "--chat", *argv]


class Terminal:
    """A program on a pseudo-terminal: what it prints, and what is typed."""

    def __init__(self, argv):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= dict(TERM="xterm", OMP_NUM_THREADS="1")
            os.execv(argv[0], argv)
        self.shown = ""

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        """Where something was not as expected the program would write on, beside other tests."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def stop(self, pattern):
        """Types Ctrl-C until the pattern is there. One that comes just before the program waits
        for a line is noticed with the next key only.
        """
        return self.press("\x03", pattern)

    def press(self, key, pattern):
        """Types a key until the pattern is there."""
        for _ in range(20):
            self.type(key)
            with contextlib.suppress(AssertionError):
                return self.until(pattern, 3)
        return self.until(pattern, 3)

    def until(self, pattern, seconds=60):
        """Reads until the pattern is there -> what was shown up to its end."""
        end = time.monotonic() + seconds
        while not (m := re.search(pattern, self.shown, re.S)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.shown[-2000:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.fd, 1 << 16).decode("utf-8", "replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.shown, re.S), self.shown[-2000:]
        before, self.shown = self.shown[: m.end()], self.shown[m.end() :]
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def end(self):
        """Types Ctrl-D until the program ends -> its exit code. One that comes while the terminal
        is being made ready for a line is lost, as it is for a person.
        """
        for i in range(300):
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.pid = 0
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                time.sleep(0.1)  # without its terminal the program takes a while to end
                if i % 10 == 0:
                    self.type("\x04")
                if select.select([self.fd], [], [], 0.1)[0]:
                    os.read(self.fd, 1 << 16)
        raise AssertionError("it does not end")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="pseudo-terminals are for Unix")
def test_a_person_at_a_terminal(folder):
    """Reasoning is dimmed, Ctrl-C stops a reply and a line, a mistake is said, Ctrl-D ends."""
    argv = "--temperature 0 --think 4 --max-new-tokens 100000000 --prefill 64".split()
    prompt = r"\r\n> \Z"  # the last that is shown: a reply may hold the sign too
    with Terminal(command(folder, *argv)) as t:
        t.until(prompt)
        t.type("hi\n")
        t.until(re.escape(talk.DIM))
        dimmed = t.until(re.escape(talk.PLAIN))
        assert chat.ENOUGH not in dimmed
        t.until(".{200}")  # it would go on
        t.stop(prompt)
        t.type("/think 7x\n")
        t.until("/think 7x: there are on, off, low and a number of tokens" + prompt)
        t.type("half a line")
        t.stop(prompt)
        t.type("/think off\n")
        t.until(prompt)
        t.type("ho\n")
        answer = t.until(".{300}")
        assert talk.DIM not in answer
        t.stop(prompt)
        assert t.end() == 0


@pytest.mark.slow
@pytest.mark.skipif(not (hasattr(os, "fork") and shutil.which("bash")), reason="needs bash's jobs")
def test_a_job_in_the_background_waits_for_its_terminal(folder):
    """The shell stops it where it would ask; fg and Ctrl-Z do as everywhere."""
    stopped, prompt = r"Stopped .*\$ \Z", r"\r\n> \Z"
    argv = "--temperature 0 --think off --max-new-tokens 100000000".split()
    with Terminal([shutil.which("bash"), "--norc", "--noprofile", "-i"]) as t:
        t.type(f"PS1='$ '; stty -echo; {shlex.join(command(folder, *argv))} &\n")
        t.until("Ctrl-D ends")
        t.press("\n", stopped)  # the shell tells of it when it asks for the next line
        t.type("fg\n")
        t.until(prompt)
        t.type("hi\n")
        t.until(".{300}")
        t.type("\x1a")
        t.until(stopped)
        t.type("fg\n")
        t.until(".{300}")  # it goes on writing
        t.stop(prompt)
        assert t.end() == 0


def test_an_interrupt_ends_a_program_nobody_types_to(folder):
    argv = command(folder, "--temperature", "0", "--max-new-tokens", "100000000")
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as p:
        p.stdin.write(b"hi\n")
        p.stdin.flush()
        assert p.stdout.read(20).startswith(b"<think>\n")
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and b"interrupted" in err and b"Traceback" not in err


def test_this_file_can_fail(monkeypatch):
    """A template that keeps old reasoning, and a budget of one token more, are seen."""
    keeps = lambda messages, **how: chat.parts(messages, truncate=False, **how)
    with monkeypatch.context() as m:
        m.setattr(talk, "chat", SimpleNamespace(**vars(chat) | dict(parts=keeps)))
        with pytest.raises(AssertionError):
            test_every_prompt_is_the_template_of_what_was_said("on")
    allowance = talk.allowance
    monkeypatch.setattr(talk, "allowance", lambda think, room: allowance(str(int(think) + 1), room))
    with pytest.raises((AssertionError, IndexError)):
        test_a_budget_closes_the_reasoning_to_the_token(2)
