"""
The lab: verdicts from made-up differences, a grid that is killed and goes on, pairs that begin
equal.
"""

import contextlib
import itertools
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

import checkpoint
import data
import plot
import train
from ablations import __main__ as gallery
from ablations import (
    age,
    cells,
    chain,
    draw,
    fig_fourbit_errors,
    figure,
    lab,
    recall,
    small,
    verdict,
)
from ablations.verdict import Claim
from config import PRESETS, Config
from model import Nemotron
from training import merge
from training.settings import configure

ROOT = Path(__file__).resolve().parent.parent

# 1. Verdicts


@pytest.mark.parametrize(
    "differences, words",
    [
        ([1.0, 1.1, 0.9], "reproduces"),
        ([-1.0, -1.1, -0.9], "reproduces the other way"),
        ([1.0, -1.0, 0.5], "inside the spread (at least 153 seeds would be needed)"),
        ([1.0, -1.0, 0.0], "inside the spread (more than 1,000 seeds would be needed)"),
        ([0.0, 0.0, 0.0], "inside the spread (more than 1,000 seeds would be needed)"),
        ([1.0, 1.1], "too few seeds (2 of 3)"),
        ([], "not measured"),
    ],
)
def test_three_verdicts_and_what_is_none(differences, words):
    assert verdict.judge(differences).words == words


def test_the_interval_is_students():
    """By hand: 0.9, 1.0, 1.1 have s = 0.1, so that half the interval is 4.303 x 0.1 / sqrt(3)."""
    mean, half = verdict.interval([0.9, 1.0, 1.1])
    assert mean == pytest.approx(1.0) and half == pytest.approx(4.303 * 0.1 / 3**0.5)
    scipy = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 5, 10, 11, 20, 100, 999):
        assert verdict.student(freedom) == pytest.approx(scipy.t.ppf(0.975, freedom), rel=1e-3)


def test_the_seeds_that_would_be_needed_are_the_least():
    n = verdict.needed(0.5, 1.0)
    half = lambda n: verdict.student(n - 1) / n**0.5
    assert half(n) < 0.5 <= half(n - 1)


def test_arithmetic_needs_one_seed():
    assert verdict.judge([0.1], exact=True).words == "reproduces (arithmetic)"
    assert verdict.judge([0.0], exact=True).words == "no difference (arithmetic)"


# 2. The grid

GRID = """
import time
from pathlib import Path
from ablations import lab
from ablations.lab import Claim, Figure, main
from plot import Figure as Sheet

HERE = Path({here!r})
lab.RECEIPTS = lab.PICTURES = HERE

def cell(settings, seed):
    with open(HERE / "begun", "a") as f:
        f.write(f"{{settings['size']}}\\n")
    time.sleep(settings["wait"])
    return dict(loss=settings["size"] + seed / 10, path=[(0, 1.0), (1, settings["size"])])

CLAIMS = (Claim("large is larger", "here", "so", "large", "small", "loss"),)
VARIANTS = dict(small=dict(size=1), large=dict(size=2))
FIGURE = Figure("grid", CLAIMS, lambda found: Sheet(), VARIANTS, cell, dict(wait=0),
                module="grid_of_two", seeds=(7,))
"""
END = """
if __name__ == "__main__":
    main(FIGURE, "A grid.")
"""


def grid(tmp_path, change=""):
    (tmp_path / "grid_of_two.py").write_text(GRID.format(here=str(tmp_path)) + change + END)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    return dict(
        args=[sys.executable, "-m", "grid_of_two", "--workers", "1"],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=tmp_path,
    )


def begun(tmp_path):
    path = tmp_path / "begun"
    return path.read_text().split() if path.exists() else []


def rows(tmp_path):
    return figure.read(tmp_path / "grid.csv")


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def working():
    """Processes of the grid that are still there."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes())
    return [line for line in lines if b"grid_of_two" in line]


SLOW_SECOND = "VARIANTS['large']['wait'] = 600\n"


def test_a_killed_grid_goes_on(tmp_path):
    """Killed in its second cell: the first row is there, alone and whole; the cell's process ends;
    the next call runs the second only, the one after that none."""
    process = subprocess.Popen(**grid(tmp_path, SLOW_SECOND), stdout=subprocess.DEVNULL)
    wait_for(lambda: begun(tmp_path) == ["1", "2"])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [r["variant"] for r in rows(tmp_path)] == ["small"]
    if Path("/proc/self").exists():
        wait_for(lambda: not working())
    first = rows(tmp_path)[0]
    run = lambda: (
        subprocess.run(
            **grid(tmp_path), check=True, capture_output=True, text=True, timeout=120
        ).stdout
    )
    assert "1 of 1" in run() and begun(tmp_path) == ["1", "2", "2"]
    assert [(r["variant"], r["seed"], r["loss"]) for r in rows(tmp_path)] == [
        ("small", "7", "1.7"),
        ("large", "7", "2.7"),
    ]
    assert rows(tmp_path)[0] == first and first["versions"].startswith("python 3")
    said = run()
    assert len(begun(tmp_path)) == 3 and " of " not in said.splitlines()[0]
    assert "too few seeds (1 of 3)" in said and (tmp_path / "grid.png").is_file()
    assert len(figure.read(tmp_path / "grid-curves.csv")) == 4


def test_changed_settings_run_again_and_nothing_else(tmp_path, monkeypatch):
    """In this process: which cells are asked for, and what their rows say."""
    asked = []

    def ask(made, settings, seed):
        asked.append((settings["size"], seed))
        return dict(loss=1.0, path=[(0, 1.0)]), 0.1

    monkeypatch.setattr(lab, "ask", ask)
    monkeypatch.setattr(lab, "RECEIPTS", tmp_path)

    def run(large, **flags):
        sizes = dict(small=dict(size=1), large=dict(size=large))
        made = figure.Figure("grid", (), lambda found: plot.Figure(), sizes, seeds=(7,))
        monkeypatch.setattr(lab, "PICTURES", tmp_path)
        lab.work(made, lab.Flags(workers=1, **flags))

    run(2)
    run(2)
    run(3)
    assert asked == [(1, 7), (2, 7), (3, 7)]
    run(2, extra=20)
    run(2, pilot=True)
    run(2, draw=True)
    assert asked[3:] == [(1, 20), (2, 20), (1, 100), (2, 100)]
    assert [(r["series"], r["seed"]) for r in rows(tmp_path)] == [
        *[("full", "7")] * 3,
        *[("extra", "20")] * 2,
        *[("pilot", "100")] * 2,
    ]


@pytest.mark.parametrize(
    "argv",
    [["--workers", "-1"], ["--extra", "nan"], ["--cell", "x"], ["--seed", "1"], ["--pilot=1"],
     ["--quick", "--pilot"], ["--pilot", "--extra", "10"]],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_a_sentence(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab, "RECEIPTS", tmp_path)
    monkeypatch.setattr(lab, "QUICK", tmp_path)
    made = figure.Figure("grid", (), None, dict(one={}))
    with pytest.raises(SystemExit) as end:
        lab.main(made, "A grid.", argv)
    assert end.value.code == 2 and "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_rows_of_the_settings_of_now_count(tmp_path):
    claim = Claim("more", "here", "so", "large", "small", "loss")
    made = figure.Figure("g", (claim,), variants=dict(small=dict(x=1), large=dict(x=2)))
    row = lambda v, seed, loss, x, series="full": dict(
        series=series, variant=v, seed=seed, hash=figure.digest(dict(x=x)), loss=loss
    )
    old = [row("small", 7, 1.0, 4), row("large", 7, 9.0, 3), row("large", 1, 9.0, 2, "pilot")]
    new = [row(v, s, 1.0 * x + 0.1 * s * x, x) for s in range(3) for v, x in
           (("small", 1), ("large", 2))]  # fmt: skip
    lab.append(tmp_path / "g.csv", old + new[:5])
    found = figure.look(made, folder=tmp_path)
    assert found.differences(claim) == {0: 1.0, 1: pytest.approx(1.1)}
    lab.append(tmp_path / "g.csv", new[5:])
    assert figure.look(made, folder=tmp_path).verdict(claim).words == "reproduces"


def test_the_gallery_says_how_settings_came_about_and_in_what_units(tmp_path, monkeypatch):
    """Counted in the receipts: pilot rows, and those of the settings of now."""
    monkeypatch.setattr(figure, "RECEIPTS", tmp_path)
    claim = Claim("more", "here", "so", "large", "small", "size")
    sizes = dict(small=dict(x=1), large=dict(x=2))
    made = figure.Figure("g", (claim,), variants=sizes, units=dict(size="mm"))
    assert gallery.settled(made) == "set by hand, no pilot rows"
    row = lambda series, v, seed, x: dict(
        series=series, variant=v, seed=seed, hash=figure.digest(dict(x=x)), seconds="", size=x
    )
    lab.append(tmp_path / "g.csv", [row("pilot", "small", 100, 1), row("pilot", "large", 100, 9)])
    assert gallery.settled(made) == "by a pilot of 2 rows, 1 at the settings of now"
    assert gallery.minutes(made) == "not written down"
    lab.append(tmp_path / "g.csv", [row("full", v, 0, x) for v, x in (("small", 1), ("large", 2))])
    said = lambda f: gallery.ours(f, claim, figure.look(f).verdict(claim))
    assert said(made) == "+1 mm, 1 seed"
    assert said(replace(made, units={})) == "+1 (size), 1 seed"
    assert said(replace(made, units={"": "cm"})) == "+1 cm, 1 seed"


def test_the_sum_says_how_many_figures_have_no_seconds(tmp_path, monkeypatch):
    """Two cells of a minute each; then a figure beside them whose row is of before the lab."""
    monkeypatch.setattr(figure, "RECEIPTS", tmp_path)
    known, untold = (figure.Figure(name, (), variants=dict(one={})) for name in ("a", "b"))
    row = lambda seed, seconds: dict(
        series="full", variant="one", seed=seed, hash=figure.digest({}), seconds=seconds, loss=1
    )
    lab.append(tmp_path / "a.csv", [row(0, 60.0), row(1, 60.0)])
    lab.append(tmp_path / "b.csv", [row(0, "")])
    monkeypatch.setattr(gallery, "figures", lambda: [(None, known)])
    assert gallery.total().endswith("took 2 CPU minutes.")
    monkeypatch.setattr(gallery, "figures", lambda: [(None, known), (None, untold)])
    said = "took 2 CPU minutes; the rows of 1 figure are of before it and do not say."
    assert gallery.total().endswith(said)


@pytest.mark.parametrize(
    "more, said",
    [
        ([0.8, 1.0, 1.2], None),
        ([0.5, -0.5], None),
        ([0.5, -0.5, 2.0], "inside the spread on 3 others; all 6: +0.833 +- 0.86, inside the spr"),
        ([0.9, 1.0, 0.0], "inside the spread on 3 others; all 6: +0.817 +- 0.43, reproduces."),
        ([-0.5, -0.6, -0.7], "reproduces the other way on 3 others; all 6: +0.2 +- 0.92, inside"),
    ],
)
def test_a_second_series_that_says_otherwise_is_told_with_what_both_say(tmp_path, more, said):
    """The first has the differences 0.9, 1.0, 1.1, and reproduces. By hand: all six of the fourth
    have s = 0.407, and half the interval is 2.571 x 0.407 / sqrt(6) = 0.43."""
    claim = Claim("Large is larger", "here", "so", "large", "small", "loss")
    made = figure.Figure("g", (claim,), variants=dict(small=dict(x=1), large=dict(x=2)))
    for series, first, ds in (("full", 0, [0.9, 1.0, 1.1]), ("extra", 10, more)):
        for seed, d in enumerate(ds, first):
            for v, x, loss in (("small", 1, 0.0), ("large", 2, d)):
                row = dict(series=series, variant=v, seed=seed, hash=figure.digest(dict(x=x)))
                lab.append(tmp_path / "g.csv", [row | dict(loss=loss)])
    found = list(gallery.disputed(*(figure.look(made, s, tmp_path) for s in ("full", "extra"))))
    if said is None:
        assert not found
    else:
        (line,) = found
        assert line.startswith(
            f"Large is larger: not settled. Reproduces on the first 3 seeds, {said}"
        )


def test_a_cell_that_fails_leaves_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(cells.sys, "executable", "false")
    made = figure.Figure("grid", (), None, dict(one={}), seeds=(7,))
    with pytest.raises(ChildProcessError, match="1 of 1 cells failed .one, seed 7."):
        lab.measure(made, (7,), "full", tmp_path, lab.Flags(workers=1))
    assert not rows(tmp_path)


@pytest.mark.parametrize("workers", ["1", "3"])
def test_a_cell_that_fails_costs_no_other_its_row(workers, tmp_path, monkeypatch, capsys):
    """The first of three fails, the others are queued or under way: their rows are kept, the end
    is one sentence and 1, and the next call asks for the failed one alone.
    """
    asked = []

    def ask(made, settings, seed):
        asked.append(settings["size"])
        if asked.count(1) == settings["size"] == 1:
            raise ChildProcessError("failed, exit code 1: see above")
        time.sleep(0.2)
        return dict(loss=settings["size"]), 0.1

    monkeypatch.setattr(lab, "ask", ask)
    for name in ("RECEIPTS", "PICTURES"):
        monkeypatch.setattr(lab, name, tmp_path)
    sizes = dict(one=dict(size=1), two=dict(size=2), three=dict(size=3))
    made = figure.Figure("grid", (), lambda found: plot.Figure(), sizes, seeds=(7,))
    with pytest.raises(SystemExit) as end:
        lab.main(made, "A grid.", ["--workers", workers])
    said = capsys.readouterr().err
    assert end.value.code == 1 and "1 of 3 cells failed (one, seed 7)" in said
    assert {r["variant"] for r in rows(tmp_path)} == {"two", "three"}
    assert sorted(asked) == [1, 2, 3] and not list(tmp_path.glob("*.png"))
    lab.main(made, "A grid.", ["--workers", workers])
    assert sorted(asked) == [1, 1, 2, 3] and len(rows(tmp_path)) == 3


def plus_one(settings, seed):
    """One more."""
    return dict(loss=settings["x"] + 1.0)


def test_a_row_names_the_code_that_made_it(tmp_path, monkeypatch):
    """Other code is reported and nothing is run again; rows of before the column do not say."""
    monkeypatch.setattr(lab, "ask", lambda made, settings, seed: (made.cell(settings, seed), 0.1))
    for module in (lab, figure):
        monkeypatch.setattr(module, "RECEIPTS", tmp_path)
    made = figure.Figure("g", (), cell=plus_one, variants=dict(one=dict(x=1)))
    old = dict(series="full", variant="one", seed=0, hash=figure.digest(dict(x=1)), loss=2.0)
    lab.append(tmp_path / "g.csv", [old])
    lab.measure(made, made.seeds, "full", tmp_path, lab.Flags(workers=1))
    assert [r["code"] for r in rows_of(made)] == ["", *[age.code(made)] * 2]
    assert age.aged(made) == "not known by which code: 1 of 3 rows"
    other = replace(made, cell=lambda settings, seed: dict(loss=settings["x"] + 2.0))
    assert "made by older code: 2 of 3 rows" in age.aged(other)
    lab.measure(other, made.seeds, "full", tmp_path, lab.Flags(workers=1))
    assert len(rows_of(made)) == 3 and {r["loss"] for r in rows_of(made)} == {"2"}


def rows_of(made):
    return figure.read(made.receipts()[0])


def test_comments_and_docstrings_are_no_code():
    one = 'def f(x):\n    """Says."""\n    return g(x)  # so\n'
    assert age.plain(one) == age.plain("def f(x):\n    return g(\n        x)\n")
    assert age.plain(one) != age.plain(one.replace("g(x)", "g(x) + 1"))


# 3. Pairs


def test_variants_begin_with_equal_shared_weights_and_read_equal_batches(tmp_path):
    """Other numbers of experts, another latent: what has the same name and shape is the same."""
    configs = [
        configure(small.run(small.BYTES | change, 5, str(tmp_path)), 257)
        for change in ({}, dict(n_routed_experts=16), dict(moe_latent_size=16), dict(bias_rate=0.0))
    ]
    first, *others = (Nemotron(c, seed=5).state_dict() for c in configs)
    for other in others:
        shared = [n for n in first if n in other and first[n].shape == other[n].shape]
        assert len(shared) > len(first) / 2
        assert all(torch.equal(first[n], other[n]) for n in shared)
    text = torch.arange(5000).numpy() % 251
    runs = [small.run(small.BYTES | c, 5, "") for c in ({}, dict(balance=0.1, lr=1e-3))]
    one, two = (data.batch(text, r.seed, 3, r.batch, r.length + 1) for r in runs)
    assert torch.equal(one, two)
    assert not torch.equal(one, data.batch(text, 6, 3, runs[0].batch, runs[0].length + 1))


def test_rows_of_recall_ask_for_what_they_said():
    """8 of the letters, each with the digit it had; none twice; another step has other rows."""
    for pairs in recall.PAIRS:
        made = recall.rows(3, 5, 64, pairs)
        assert made.shape == (64, 2 * pairs + 16)
        for row in made.tolist():
            line = bytes(row).decode()
            said = dict(zip(line[: 2 * pairs : 2], line[1 : 2 * pairs : 2]))
            assert len(said) == pairs and "".join(said).isalpha()
            asked = line[2 * pairs :]
            assert all(said[k] == v for k, v in zip(asked[::2], asked[1::2]))
        assert not torch.equal(made, recall.rows(3, 6, 64, pairs))
        assert torch.equal(made, recall.rows(3, 5, 64, pairs))


def test_every_setting_of_a_preset_is_pinned():
    """A preset's change changes no figure: but for the vocabulary, which the tokenizer decides."""
    for settings in (small.BYTES, small.FACTS):
        assert set(PRESETS["toy"]) - {"vocab_size"} <= set(settings)
    run = small.run(small.BYTES | dict(routed_scaling_factor=3.0), 0, "")
    assert configure(run, 257).routed_scaling_factor == 3.0
    assert "rotary_base" in Config.__dataclass_fields__ and "seed" in train.Run.__dataclass_fields__
    with pytest.raises(ValueError, match="no_such"):
        small.run(small.BYTES | dict(no_such=1), 0, "")


def test_an_average_is_that_of_merge_and_a_fall_is_trains(tmp_path):
    """One run of 24 steps: small.nats is the log's val_nats; the average of its last four is the
    file that train.py --merge 4 writes; a minus-sqrt fall ends where --decay would."""
    settings = small.BYTES | dict(steps=24, decay=0.0, save_every=4, eval_tokens=512, length=16)
    with small.trained(settings, 0) as made:
        run, model = made.settings, made.model
        assert small.nats(model, run) == pytest.approx(small.last(made.log, "val_nats"), rel=1e-5)
        files = checkpoint.steps(run.folder())[-4:]
        merge.merge(replace(run, merge=4), say=lambda line: None)
        want = checkpoint.read(next((run.folder() / "ckpt").glob("merged*")))["model"]
        got = small.averaged(model, files).state_dict()
        assert all(torch.allclose(got[k], want[k], atol=1e-6) for k in want)
        fallen = small.decayed(run, 16, "minus-sqrt").state_dict()
        again = replace(run, resume=True, from_step=16, decay=1 / 3)
        want = train.fit(again, say=lambda line: None)[0].state_dict()
        assert all(torch.allclose(fallen[k], want[k], atol=1e-6) for k in want)
        other = small.decayed(run, 16, "linear").state_dict()
        assert not torch.allclose(other["lm_head.weight"], want["lm_head.weight"], atol=1e-6)


# 4. The figures


FIGURES = [made for _, made in gallery.figures()]
LONG = {"merge", "mtp", "ptq", "bits", "distill", "state_toy"}  # more than 20 seconds a cell


@pytest.mark.parametrize(
    "made",
    [pytest.param(f, marks=pytest.mark.slow if f.name in LONG else (), id=f.name) for f in FIGURES],
)
def test_the_first_cell_of_every_figure(made, tmp_path, monkeypatch):
    """The quick path, and what comes out is what the claims ask for."""
    monkeypatch.setattr(chain, "TUNED", tmp_path)
    first = next(iter(made.variants))
    measures = made.cell(made.settings(first, quick=True), made.seeds[0])
    asked = {c.measure for c in made.claims if c.more == first}
    asked |= {c.than or c.measure for c in made.claims if c.less == first}
    assert asked <= set(measures)
    assert all(isinstance(y, list) or y == y for y in measures.values())


@pytest.mark.parametrize("made", FIGURES, ids=lambda f: f.name)
def test_claims_name_variants_and_a_source(made):
    for claim in made.claims:
        assert {claim.more, claim.less} <= set(made.variants), claim
        assert claim.where and claim.published and len(claim.says) < 100, claim


@pytest.mark.parametrize("made", FIGURES, ids=lambda f: f.name)
def test_a_loss_is_of_what_the_model_reads(made):
    """A byte, a fact's value or a token of a vocabulary."""
    if "loss" in {c.measure for c in made.claims}:
        reads = "value" if made.base["data"].startswith("facts") else "byte"
        reads = reads if made.base["tokenizer"] == "bytes" else "token"
        assert made.unit("loss") == f"nats a {reads}"


@pytest.mark.parametrize("made", FIGURES, ids=lambda f: f.name)
def test_a_figure_says_what_is_varied_and_what_is_equal(made):
    path = ROOT / "ablations" / f"fig_{made.name}.py"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    for word in ("Claim ", "Varied ", "Equal ", "Here "):
        assert f"\n{word}" in text.split('"""')[1], word


def test_the_gallery_is_its_receipts_and_its_pictures():
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert page == gallery.page(), "python -m ablations --write"
    drawn = {made.name for made in FIGURES if made.draw and figure.look(made).rows}
    assert drawn == {p.stem for p in figure.PICTURES.glob("*.png")}
    for made in FIGURES:
        if made.name in drawn:
            stamp = Image.open(figure.PICTURES / f"{made.name}.png").text.get("Source")
            again = f"python -m {made.home()} --draw"
            assert stamp == figure.look(made).stamp(), f"{made.name}.png is of other rows: {again}"
    measured = {made.name for made in FIGURES if figure.look(made).rows}
    kept = {p.stem.removesuffix("-curves") for p in figure.RECEIPTS.glob("*.csv")}
    assert measured <= kept <= {made.name for made in FIGURES}


def written(fig):
    """(text, its box in pixels) of all that stands in a picture; ticks out of sight do not."""
    FigureCanvasAgg(fig).draw()
    unseen = set()
    for ax in fig.axes:
        for axis, ends in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not min(ends) <= tick.get_loc() <= max(ends):
                    unseen |= {tick.label1, tick.label2}
    for text in fig.findobj(Text):
        if text not in unseen and text.get_visible() and text.get_text().strip():
            yield text.get_text(), text.get_window_extent(fig.canvas.get_renderer())


@pytest.mark.slow
@pytest.mark.parametrize("made", FIGURES, ids=lambda f: f.name)
def test_nothing_written_in_a_picture_is_cut_or_covered(made):
    """As it is saved, 160 dots an inch: all texts within the sheet, and three dots between two."""
    with plot.plt.rc_context(plot.STYLE):
        fig = made.draw(figure.look(made))
        fig.set_dpi(plot.STYLE["savefig.dpi"])
        texts = list(written(fig))
    assert len(texts) > 5
    for said, box in texts:
        cut = box.x0 < 0 or box.y0 < 0 or box.x1 > fig.bbox.x1 or box.y1 > fig.bbox.y1
        assert not cut, f"{said!r} leaves the picture"
    for (one, a), (two, b) in itertools.combinations(texts, 2):
        beside = min(a.x1, b.x1) - max(a.x0, b.x0) <= -3
        assert beside or min(a.y1, b.y1) - max(a.y0, b.y0) < 2, f"{one!r} covers {two!r}"


FILES = sorted((ROOT / "ablations").glob("fig_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_flag_that_a_figure_does_not_have_draws_nothing(path, monkeypatch, capsys):
    """-h prints the help, another flag is refused, and no picture or receipt is touched."""
    kept = lambda: {
        p: p.stat().st_mtime_ns for d in ("docs", "receipts") for p in (ROOT / d).rglob("*.*")
    }
    before = kept()
    for given, code in (("-h", 0), ("--nonsense", 2)):
        monkeypatch.setattr(sys, "argv", [str(path), given])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        assert end.value.code == code
    assert "--nonsense" in capsys.readouterr().err and kept() == before


def test_this_file_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "student", lambda freedom: 0.0)
    assert verdict.judge([1.0, -1.0, 0.5]).words == "reproduces"
    with pytest.raises(AssertionError):
        test_three_verdicts_and_what_is_none([1.0, -1.0, 0.5], "inside the spread (at least 157")
    wide = lambda found: draw.panels(found, dict(wgrad="dw", fprop="y"), "A title " * 20)
    with pytest.raises(AssertionError, match="leaves the picture"):
        made = replace(fig_fourbit_errors.FIGURE, draw=wide)
        test_nothing_written_in_a_picture_is_cut_or_covered(made)
    monkeypatch.setattr(age, "plain", lambda source: "")
    with pytest.raises(AssertionError):
        test_a_row_names_the_code_that_made_it(tmp_path / "codes", monkeypatch)
    monkeypatch.setattr(figure, "digest", lambda settings: "")
    with pytest.raises(AssertionError):
        test_only_rows_of_the_settings_of_now_count(tmp_path)
