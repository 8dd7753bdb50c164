"""What the pages say: every command, flag, number, link and call of README.md, CONTRIBUTING.md,
docs/*.md and notebooks/*.md is the code's.
"""

import ast
import importlib
import inspect
import re
import shlex
import statistics
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
    + sorted(ROOT.glob("notebooks/*.md"))
}
LONG = re.compile(r"\b\d{2,3}(?:,\d{3}){2,}\b|\b\d(?:,\d{3}){3,}\b")  # 10,000,000 and more


class Command(NamedTuple):
    script: str  # a file of ours, from the top
    args: tuple


# 1. Reading a page


def blocks(text):
    """(language, text) of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def commands(text):
    """Calls of our files by python or torchrun, in fenced blocks and between backticks."""
    lines = "".join(block for kind, block in blocks(text) if not kind).replace("\\\n", " ")
    spans = re.findall(r"`((?:python|torchrun) [^`]+)`", prose(text))
    for line in [*lines.splitlines(), *spans]:
        for part in re.split(r"\s#", line)[0].split("&&"):
            words = shlex.split(part)
            if not words or words[0] not in ("python", "torchrun") or "..." in words[:2]:
                continue
            words = words[1:]
            if words[0] == "-m":
                words[1:2] = [place(words[1])]
            at = next((i for i, w in enumerate(words) if w.endswith(".py")), None)
            if at is not None and words[at] != "pytest.py":
                yield Command(words[at], tuple(words[at + 1 :]))


def place(module):
    """The file that `python -m module` runs."""
    path = module.replace(".", "/")
    return path + ("/__main__.py" if (ROOT / path).is_dir() else ".py")


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(text):
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


# 2. What is wrong with it


def help_of(script, monkeypatch, capsys):
    """What -h prints. A file of ablations/ or tests/ is read instead, and the lab, whose flags a
    figure has.
    """
    if "/" in script:
        lab = "ablations/lab.py" if script.startswith("ablations/fig_") else script
        text = "".join((ROOT / path).read_text(encoding="utf-8") for path in (script, lab))
        return " --".join([text, *re.findall(r"^    (\w+): .*= knob\(", text, re.M)])
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, "-h"])
    with pytest.raises(SystemExit):
        getattr(module, "cli" if script == "train.py" else "main")()
    return capsys.readouterr().out


def broken_links(page, text):
    """Links to files that are not there, to headings that are not there, over plain http."""
    for link in links(text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists():
            yield link
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            yield link


def rows_of_ranks(text):
    """Lines of the table that scale/budget.py prints, which differ from what it prints -> numbers
    that are its own.
    """
    from config import Config
    from scale import budget

    config, wrong, own = Config.preset("super"), [], set()
    for line in re.findall(r"^\| \d+ \| [\d,]+ \| .*", text, re.M):
        cells = [cell.strip() for cell in line.split("|")[1:5]]
        one, two = (
            budget.reckon(budget.Plan(int(cells[0]), 8, 8192, again), config)
            for again in ("", "all")
        )
        want = [f"{one['parameters']:,}", *(f"{x['peak'] / 1e9:.1f}" for x in (one, two))]
        wrong += [line] * (cells[1:] != want)
        own.add(cells[1])
    return wrong, own


def sizes():
    """The published numbers, and ours of the same things: must be said, may be said."""
    import model

    must, may = set(), set()
    for preset in ("super", "nano"):
        c = model.Config.preset(preset)
        rows, mtp, _ = model.costs(c)
        total, active = sum(r[2] for r in rows), sum(r[3] for r in rows)
        must |= {total, active, active - c.vocab_size * c.hidden_size}
        may.add(mtp[2] if mtp else 0)
        may.add(c.n_routed_experts * c.hidden_size * c.hybrid_override_pattern.count("E"))
    may |= released_bytes()
    return {f"{n:,}" for n in must}, {f"{n:,}" for n in must | may}


def released_bytes():
    """Of Super-NVFP4, and the weights that its search was about."""
    import census
    import hf
    from quant import calibrate, ondisk

    config = hf.Config.preset("super")
    plan, kv = ondisk.super_map(config.hybrid_override_pattern)
    place = census.places(census.blank(config, plan, kv))
    searched, model = 0, census.blank(config)
    for i, block in enumerate(model.backbone.layers):
        for names in calibrate.of_block(block, str(i)).values():
            found = calibrate.matrices(block, str(i), names)
            searched += sum(w.numel() for w in found.values())
    return {sum(t.numel() * census.stored(n, t).itemsize for n, t in place.items()), searched}


def last_scores(kind):
    """Validation bits per byte at the end of the receipts' seeds."""
    import disk

    logs = sorted(ROOT.glob(f"receipts/{kind}-[0-9]*/log.csv"))
    return [disk.read_log(log)[-1]["val_bpb"] for log in logs]


def wrong_scores(text):
    """Rows of the default run's table that do not end as their receipts do."""
    for label, kind in (("`python train.py", "toy"), ("the same with", "plain")):
        for line in re.findall(rf"^\| {re.escape(label)}.*$", text, re.M):
            *_, each, summary = [cell.strip() for cell in line.strip("|").split("|")]
            scores = last_scores(kind)
            want = f"{statistics.mean(scores):.3f}, {max(scores) - min(scores):.3f}"
            if each != ", ".join(f"{s:.3f}" for s in scores) or summary != want:
                yield line


# 3. Nothing is


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    assert not list(broken_links(page, PAGES[page]))


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_a_page_opens_with_its_question(page):
    first = PAGES[page].splitlines()[0]
    assert first.startswith("# ") and first.endswith("?")
    assert f"]({page})" in PAGES["README.md"], "README does not lead here"


def test_every_file_at_the_top_has_its_place():
    """README leads to every lesson and command."""
    assert not {p.name for p in ROOT.glob("*.py")} - set(links(PAGES["README.md"]))


def test_every_picture_is_shown():
    shown = {
        ((ROOT / page).parent / link).resolve() for page in PAGES for link in links(PAGES[page])
    }
    assert not {p.resolve() for p in ROOT.glob("docs/*.png")} - shown


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder(page):
    assert not re.findall(r"@[A-Z]+@|\bTODO\b|\bXXX\b", PAGES[page])


def test_commands_exist(monkeypatch, capsys):
    found = {c for text in PAGES.values() for c in commands(text)}
    assert len(found) > 25
    texts = {}
    for c in sorted(found):
        assert (ROOT / c.script).is_file(), c
        for flag in (a for a in c.args if re.match("--[a-z]", a)):
            if c.script not in texts:
                texts[c.script] = help_of(c.script, monkeypatch, capsys)
            assert re.search(rf"{flag}(?![\w-])", texts[c.script]), f"{c.script} has no {flag}"


def test_training_commands_are_runs(monkeypatch):
    """Every flag and value is taken; the run itself does not start."""
    import train

    runs, own = [], {f.name: f.default for f in fields(train.Run)}
    for name in ("fit", "merge"):
        monkeypatch.setattr(train, name, lambda run, say: runs.append(run))
    monkeypatch.setattr("scale.dryrun.predict", lambda run, *rest: runs.append(run))
    monkeypatch.setattr("scale.plan.show", lambda run, *rest: runs.append(run))
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # --resume and --merge find a run
    monkeypatch.setattr("command.document", lambda path: dict(run=own))
    lines = [
        c.args
        for text in PAGES.values()
        for c in commands(text)
        if c.script == "train.py" and not {"S", "-h"} & set(c.args)  # S: any seed
    ]
    for argv in lines:
        train.cli(list(argv))
    twice = sum("--short" in argv and "--dry-run" in argv for argv in lines)  # long, short
    assert len(runs) == len(lines) + twice > 10
    for r in runs:
        assert train.configure(r, 1).hybrid_override_pattern and r.batch % (r.micro or r.batch) == 0


def test_no_command_spoils_the_toy():
    """What goes on with a run and changes what it was does so in a folder of its own."""
    for page, text in PAGES.items():
        for c in commands(text):
            if c.script == "train.py" and "--resume" in c.args:
                name = c.args[c.args.index("--name") + 1] if "--name" in c.args else None
                changed = {"--mtp-loss", "--lr", "--steps", "--decay"} & set(c.args)
                assert name != "toy" or not changed, (page, c)


def test_the_python_of_the_pages_exists():
    """Modules, functions, keywords and fields of the notebook example; what it does is tested
    elsewhere.
    """
    found = [
        ast.parse(block)
        for text in PAGES.values()
        for kind, block in blocks(text)
        if kind == "python" and block.startswith("import ")  # a sample is no program
    ]
    calls = [n for tree in found for n in ast.walk(tree) if isinstance(n, ast.Call)]
    calls = [n for n in calls if isinstance(n.func, ast.Attribute)]
    assert len(calls) > 2
    for n in calls:
        function = getattr(importlib.import_module(n.func.value.id), n.func.attr)
        inspect.signature(function).bind(*n.args, **{k.arg: k.value for k in n.keywords})


def test_the_numbers_are_the_code():
    import census
    from config import Config

    must, may = sizes()
    readme = PAGES["README.md"]
    assert not {n for n in must if n not in readme}
    assert f"{len(census.census(Config.preset('super'))):,}" in readme
    for page, text in PAGES.items():
        wrong, ranks = rows_of_ranks(text)
        assert not wrong
        assert set(LONG.findall(text)) <= may | ranks, f"{page}: no other number this large"


def test_the_scores_are_the_receipts():
    assert not list(wrong_scores(PAGES["README.md"]))


def stale_resumes(text):
    """Commands that go on with a toy to a step which the default run has already passed."""
    from training.settings import Run

    for c in commands(text):
        if c.script == "train.py" and {"--resume", "--steps"} <= set(c.args):
            small = "--preset" not in c.args
            if small and int(c.args[c.args.index("--steps") + 1]) <= Run().steps:
                yield c


@pytest.mark.parametrize("page", PAGES)
def test_a_run_that_goes_on_has_somewhere_to_go(page):
    assert not list(stale_resumes(PAGES[page]))


def test_this_file_can_fail():
    good = PAGES["README.md"]
    assert list(broken_links("README.md", "[a](gone.py) [b](#nowhere) [c](http://x.org)")) == [
        "gone.py",
        "#nowhere",
        "http://x.org",
    ]
    (c,) = commands("```\ntorchrun -n 2 train.py --epp 2 \\\n  --cp 2   # words\n```\n")
    assert c == ("train.py", ("--epp", "2", "--cp", "2"))
    assert [c.script for c in commands("see `python gone.py --x` and `python -m a.b`")] == [
        "gone.py",
        "a/b.py",
    ]
    line = next(x for x in PAGES["docs/ranks.md"].splitlines() if x.startswith("| 64 |"))
    assert rows_of_ranks(line)[0] == []
    assert rows_of_ranks(line.replace(",4", ",5"))[0] != []
    score = next(x for x in good.splitlines() if x.startswith("| `python train.py"))
    assert not list(wrong_scores(score)) and list(wrong_scores(re.sub(r"\d \|$", "x |", score)))
    assert list(stale_resumes(PAGES["docs/drafts.md"].replace("--steps 1090", "--steps 560")))
    assert LONG.findall("120,668,707,841 of 10,000") == ["120,668,707,841"]
