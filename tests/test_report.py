"""The report in miniature: a chain of stages that is stopped anywhere ends as if it had not been, a
changed setting does again what it changes and no more, and the page shows all that was made.

The slow half goes through all stages with models of a few thousand parameters.
"""

import csv
import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

import command

import pytest
import torch
from browser import browser
from inputs import CHANGES

import bounds
import report
from classroom import chapters, stages
from classroom.stages import Chain, Stage, once, program
from quant import statecache

SMALL = CHANGES.replace("vocab_size=300,", "")
EVERY = "--log-every 1 --save-every 1"
TEXT = f"--tokenizer bytes --model {SMALL} --batch 2 --length 32 --eval-tokens 256 --steps 6"


def tiny(text):
    """Every stage in about a second. text: a file to learn from."""
    learn = f"--data {text} {TEXT} --eval-every 2 {EVERY}"
    sft = "--steps 3 --stage2 1 --batch 4 --questions 2 --room 6 --eval-every 3"
    rl = "--steps 2 --prompts 2 --group 2 --questions 2 --room 6 --eval-every 2"
    return dict(
        **{name: (learn, 1) for name in ("toy", "mini", "four", "flat")},
        merge=("--merge 2", 1),
        long=(f"--steps 8 --length 64 --eval-every 1 {EVERY}", 1),
        sft=(f"{sft} {EVERY}", 1),
        rl=(f"{rl} {EVERY}", 1),
        heal=("--steps 2 --texts 8 --batch 2", 1),
        talk=("--max-new-tokens 3", 1),
        quantise=("--bits 8 --length 8 --tokens 64 --eval-tokens 64", 1),
    )


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("\n".join(f"{i} and {i % 7} make {i + i % 7}." for i in range(2000)))
    return tiny(path.as_posix())


class Killed(BaseException):
    """What nothing handles."""


def make(out, form):
    said = []
    report.make(report.Flags(out=str(out)), form, said.append)
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory, form):
    """All stages without a stop, and the page."""
    out, before = tmp_path_factory.mktemp("whole") / "report", torch.get_num_threads()
    torch.set_num_threads(1)
    real = statecache.drift
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            statecache, "drift", lambda kind, rounds, memory, tokens: real(kind, rounds, 9, 9)
        )
        make(out, form)
    torch.set_num_threads(before)
    return out


@pytest.fixture
def chain(tmp_path):
    """Three stages as records alone: b stands on a, c on neither."""
    made = Chain(
        [
            Stage("a", "train.py --out {out} --name a --steps 5", "a"),
            Stage("b", "train.py --out {out} --name a --resume --steps 9", "a", ("a",)),
            Stage("c", "model.py --preset toy"),
        ],
        tmp_path / "out",
    )
    for name in made.stages:
        made.folder(name).mkdir(parents=True)
        made.note(name, tries=1, seconds=1.0, cpu=1.0)
    return made


# 1. What is done, and what is done again


def again(chain, **changes):
    """The stages that are not done once these have other words or flags."""
    more = changes.pop("more", chain.more)
    known = [replace(s, words=changes.get(s.name, s.words)) for s in chain.stages.values()]
    other = Chain(known, chain.out, more)
    return [name for name in other.stages if not other.done(name)]


def test_a_changed_setting_does_again_what_stands_on_it(chain):
    assert again(chain) == []
    assert again(chain, c="model.py --preset mini") == ["c"]
    assert again(chain, a="train.py --out {out} --name a --steps 6") == ["a", "b"]
    assert again(chain, more=[("--threads", 2)]) == []
    assert again(chain, more=[("--seed", 2)]) == ["a", "b"]  # model.py has no seed


def test_stages_that_fill_one_folder_begin_again_together(chain):
    """b goes on with a's run: with other words for b, a's folder is not what b begins with."""
    assert again(chain, b="train.py --out {out} --name a --resume --steps 8") == ["a", "b"]


def test_a_folder_of_another_setting_is_kept(chain):
    (chain.out / "a").mkdir()
    (chain.out / "a" / "mine").write_text("x")
    assert chain.prepare(chain.stages["b"], False) == (chain.argv("b"), False)
    assert (chain.out / "a" / "mine").exists()
    assert chain.prepare(chain.stages["a"], False) == (chain.argv("a"), False)
    assert (chain.out / "left-1-a" / "mine").read_text() == "x" and not (chain.out / "a").exists()


def test_a_checkpoint_is_gone_on_with(chain):
    (chain.out / "a" / "ckpt").mkdir(parents=True)
    assert chain.prepare(chain.stages["a"], True) == (chain.argv("a"), False)  # there was none
    (chain.out / "a" / "ckpt").mkdir(parents=True)
    (chain.out / "a" / "ckpt" / "step-00000003.pt").write_text("x")
    assert chain.prepare(chain.stages["a"], True) == ([*chain.argv("a"), "--resume"], True)


def test_a_stage_that_fails_says_so_and_is_not_done(tmp_path, capsys):
    out = []
    chain = Chain([Stage("a", "model.py --preset none")], tmp_path, say=out.append)
    with pytest.raises(SystemExit) as stop:
        chain.run()
    assert stop.value.code == 2 and not chain.done("a")
    assert "model.py: error: argument --preset" in capsys.readouterr().err
    assert out[-1].startswith("[1/1] a, ") and "the same command goes on here" in out[-1]


def test_progress_shows_the_stage_the_time_left_and_the_newest_number(tmp_path, monkeypatch):
    out = []
    monkeypatch.setattr(stages.Watch, "every", 0)
    chain = Chain(
        [Stage("a", "model.py --preset toy", seconds=30), Stage("b", "model.py --preset mini")],
        tmp_path,
        say=out.append,
    )
    chain.run()
    assert out[0] == "[1/2] a, 35 s left: begins" and "[2/2] b, " in out[-1]
    assert any("left: total with MTP" in line for line in out) and "done in" in out[-1]
    assert "MTP block" in chain.said("a") and chain.record("a")["tries"] == 1
    out.clear()
    chain.run()
    assert out == ["2 of 2 stages are done already"]


def test_the_time_left_follows_what_a_stage_says_of_itself(chain):
    """Slow by half in the stage that runs, slow by half in those to come."""
    todo = Chain(chain.stages.values(), chain.out / "new", silent=())
    for name, seconds in dict(a=100, b=40, c=20).items():
        todo.stages[name] = replace(todo.stages[name], seconds=seconds)
    assert todo.remaining("a", 0) == 160
    assert todo.remaining("a", 30) == 130
    assert todo.remaining("a", 30, told=210) == pytest.approx(210 + 60 * 300 / 160)


def test_of_a_flag_that_is_given_twice_the_last_counts():
    assert once("--a 1 --b --c=2 --a 3 --c=4".split()) == ["--a", "3", "--b", "--c=4"]


# 2. The commands and the page's words


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_one_that_its_program_takes(quick):
    """What the page shows is what was called: the same words, and the program knows them all."""
    known = list(report.stages(report.QUICK if quick else {}))
    chain = Chain(known, "runs/report", [("--seed", 3), ("--threads", 1)])
    for stage in known:
        script, *words = chain.argv(stage.name)
        _, kind = program(script)
        shown = shlex.split(chain.line(stage.name))
        assert shown[-len(words) :] == words if words else "-m" in shown
        if kind:
            given = vars(command.parser(kind, script, "").parse_args(words))
            bounds.check(kind(**given))
            for name in {f.name for f in fields(kind)} & {"seed", "threads"}:
                assert given[name] == dict(seed=3, threads=1)[name]
        assert set(stage.needs) <= {s.name for s in known[: known.index(stage)]}
    assert set(report.QUICK) <= {s.name for s in known}


def test_every_flag_reaches_the_stages(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Chain, "run", lambda chain: made.append(chain))
    monkeypatch.setattr(report, "write", lambda chain: "")
    out = str(tmp_path / "r")
    report.main(["--out", out, "--quick", "--seed", "3", "--threads", "1"])
    report.main(["--out", out])
    quick, full = ([c.line(name) for name in c.stages] for c in made)
    assert made[0].out == tmp_path / "r" and f"--out {out}" in quick[1]
    assert "--seed 3 --threads 1" in quick[1] and "--steps 150" in quick[1]
    assert not [line for line in full if "--seed 3" in line or "--threads" in line]
    assert full[1] == f"python train.py --out {out} --name toy --keep 2"


def test_report_is_a_table_of_contents():
    text = Path(report.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200


def test_every_published_number_has_its_place():
    with open(chapters.HERE / "published.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == len({r["what"] for r in rows}) > 50
    assert all(r["value"] and r["source"].startswith("arXiv:") for r in rows)
    text = "".join((chapters.HERE / n).read_text() for n in ("base.py", "assistant.py"))
    unused = [r["what"] for r in rows if f'"{r["what"]}"' not in text]
    assert all(what.startswith("blend: ") for what in unused)


# 3. All of it


@pytest.mark.slow
def test_stopped_at_every_stage_it_ends_as_if_it_had_not_been(tmp_path, whole, form, monkeypatch):
    """Each stage is interrupted at its first words, then killed when only its record lacks.

    Words and not numbers: a model of a few thousand parameters may reply without a digit.
    """
    cut, lost = [], []
    plain, note, real = stages.Watch.write, Chain.note, statecache.drift

    def write(watch, text):
        size = plain(watch, text)
        if watch.name not in cut and text.strip():
            cut.append(watch.name)
            raise KeyboardInterrupt
        return size

    def lose(chain, name, **more):
        if "seconds" in more and name not in lost:
            lost.append(name)
            raise Killed
        note(chain, name, **more)

    monkeypatch.setattr(stages.Watch, "write", write)
    monkeypatch.setattr(Chain, "note", lose)
    monkeypatch.setattr(statecache, "drift", lambda kind, rounds, *_: real(kind, rounds, 9, 9))
    stops = 0
    while True:
        try:
            make(tmp_path / "report", form)
            break
        except (SystemExit, KeyboardInterrupt, Killed) as e:
            assert not isinstance(e, SystemExit) or e.code == 130
            stops += 1
            assert stops <= 2 * len(report.STAGES)
    assert cut == lost == [s.name for s in report.STAGES]
    assert numbers(tmp_path / "report") == numbers(whole)


def numbers(out):
    """What the page's numbers are made of, but for times."""
    found = {}
    for path in sorted(out.glob("stages/*/*.csv")):
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        timed = {"seconds", "tokens_per_second", "cpu", "generating", "updating"}
        found[path.parent.name, path.name] = [
            {k: v for k, v in row.items() if k not in timed} for row in rows
        ]
    for name in ("merge", "heal", "quantise", "state"):
        said = (out / "stages" / name / "said.txt").read_text().splitlines()
        found[name] = [
            x for x in said if x.startswith(("before", "after", "fp16", "KL", "    ste"))
        ][-2:]
    return found


@pytest.mark.slow
def test_nothing_is_done_twice(whole, form):
    chain = Chain(list(report.stages(form)), whole)
    assert all(chain.record(name)["tries"] == 1 for name in chain.stages)
    said = make(whole, form)
    assert said == ["13 of 13 stages are done already", f"wrote {whole / 'index.html'}"]


@pytest.mark.slow
@pytest.mark.parametrize("width, mobile", [(1200, False), (390, True)])
def test_a_browser_shows_every_section_picture_and_table(tmp_path, whole, width, mobile):
    with browser(tmp_path / "b", width, mobile=mobile) as b:
        b.open(whole / "index.html")
        seen = b.look()
        b.screenshot(tmp_path / "first.png")
    assert len(seen["sections"]) == len(report.CHAPTERS) + 1
    assert len(seen["pictures"]) == len(report.CHAPTERS)
    assert all(natural > 500 and 500 < wide <= 768 for _, natural, wide in seen["pictures"])
    assert len(seen["tables"]) == len(seen["sections"])
    assert all(rows > 2 and columns == 4 for rows, columns in seen["tables"])
    assert seen["wide"] <= seen["window"] == width and not seen["fetched"]


@pytest.mark.slow
def test_a_number_on_the_page_is_the_one_on_disk(whole, form, tmp_path):
    """Another number in a run's file is another number on the page."""
    chain = Chain(list(report.stages(form)), whole)
    path = chain.folder("toy") / "worth.csv"
    before = path.read_text()
    text = (whole / "index.html").read_text()
    try:
        rows = chain.rows("toy", "worth.csv")
        path.write_text(before.replace(f"{rows[-1]['worth']:.6g}", "7.654"))
        report.write(chain)
        assert "7.65<" not in text and "7.65<" in (whole / "index.html").read_text()
    finally:
        path.write_text(before)
        report.write(chain)


def test_this_file_can_fail(chain, monkeypatch):
    """A chain that takes every record for its own does nothing again, and the sweep sees it."""
    monkeypatch.setattr(Chain, "digest", lambda chain, name: "same")
    for name in chain.stages:
        chain.note(name, seconds=1.0, cpu=1.0, tries=1)
    with pytest.raises(AssertionError):
        test_a_changed_setting_does_again_what_stands_on_it(chain)
    path = chain.folder("a") / "record.json"
    assert json.loads(path.read_text())["command"].startswith("python train.py")
