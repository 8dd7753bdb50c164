"""The pictures: any log that any version wrote can be drawn, titles say what the numbers say, and
lines are told apart without colour.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import matplotlib
import pytest

import disk
import plot

ROOT = Path(plot.__file__).parent
RECEIPTS = ROOT / "receipts"
ROW = dict(step=1, train_nats=5.0)
LOGS = {
    "one row": ([ROW], None),
    "nothing seen yet": ([ROW | dict(val_nats="", val_bpb="", mtp1_nats=5.5, idle=0)], None),
    "not finite": (
        [ROW, dict(step=2, train_nats=math.nan), dict(step=3, train_nats=math.inf)],
        None,
    ),
    "a hole": ([ROW | dict(mtp1_nats=""), dict(ROW, step=2, mtp1_nats=4.0)], None),
    "idle": ([ROW | dict(max_vio=0.5, idle=3)], dict(layers=["a"], tokens=[[1, 2, 3]])),
    "no tokens": ([ROW | dict(max_vio=0.0)], dict(layers=["a"], tokens=[[0, 0]])),
    "unequal": (
        [ROW | dict(max_vio=3.0)],
        dict(layers=["a", "b"], tokens=[[9.0, 0, 0, 0], [1, 1]]),
    ),
    "another loss": ([dict(step=1, reward=0.5)], dict(layers=[], tokens=[])),
}


def write(folder, rows, load):
    keys = dict.fromkeys(k for r in rows for k in r)
    rows = [{k: r.get(k, "") for k in keys} for r in rows]
    (folder / "log.csv").write_text(disk.table(rows))
    if load:
        (folder / "load.json").write_text(json.dumps(load))


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is made."""
    figures, Figure = [], plot.Figure

    def made(**how):
        figures.append(Figure(**how))
        return figures[-1]

    monkeypatch.setattr(plot, "Figure", made)
    return figures


@pytest.mark.parametrize("name", LOGS)
def test_any_log_can_be_drawn(tmp_path, name):
    """No experts, no MTP, no validation, a column that an older version did not write."""
    write(tmp_path, *LOGS[name])
    plot.run(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("log", sorted(RECEIPTS.glob("*/log.csv")), ids=lambda p: p.parent.name)
def test_every_receipt_can_be_drawn(tmp_path, log, drawn):
    for path in log.parent.iterdir():
        shutil.copy(path, tmp_path)
    plot.run(tmp_path)
    last = [r["val_bpb"] for r in disk.read_log(log) if r["val_bpb"] != ""][-1]
    titles = [ax.get_title(loc="left") for ax in drawn[0].axes]
    assert f"{last:.3f} bits" in titles[0]


def test_a_floor_is_drawn(tmp_path, drawn):
    """The bits a perfect model would pay, in the nats of the picture."""
    write(tmp_path, [ROW | dict(val_nats=4.0, val_bpb=2.0)], None)
    (tmp_path / "config.json").write_text(json.dumps(dict(corpus=dict(floor=1.5))))
    plot.run(tmp_path)
    assert [3.0, 3.0] in [list(line.get_ydata()) for line in drawn[0].axes[0].lines]


def test_seeds_of_one_thing_share_a_line(tmp_path, drawn):
    """Its colour and marker are its own, and the title says which ends lower."""
    folders = [RECEIPTS / name for name in ("toy-0", "toy-1", "plain-0", "plain-1")]
    plot.compare(folders, tmp_path / "four.png")
    for ax in drawn[0].axes:
        one, other = (line for line in ax.lines if line.get_linestyle() == "-")
        assert one.get_color() != other.get_color() and one.get_marker() != other.get_marker()
        assert len(ax.collections) == 2  # a band each
    named = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert [name.split(":")[0] for name in named] == ["toy", "plain"]
    assert "LatentMoE" in named[0]


def logs(*ends):
    return [[dict(step=1, val_bpb=end)] for end in ends]


def test_a_title_is_what_the_numbers_say():
    assert (
        plot.verdict(dict(a=logs(1.0, 1.2), b=logs(1.3, 1.5))) == "a ends 0.300 bits a byte below b"
    )
    assert (
        plot.verdict(dict(a=logs(1.3, 1.5), b=logs(1.0, 1.2))) == "b ends 0.300 bits a byte below a"
    )
    assert "no more than" in plot.verdict(dict(a=logs(1.0, 1.2), b=logs(1.1, 1.3)))
    assert plot.verdict(dict(a=logs(1.0), b=logs(1.3, 1.5))).endswith("below b (one seed)")


def test_names_do_not_touch():
    _, ax = plot.sheet()
    ax.set_ylim(0, 1)
    plot.name_ends(ax, [(0.5, "a", "k"), (0.51, "b", "k"), (0.99, "c", "k")], gap=0.1)
    heights = [text.get_position()[1] for text in ax.texts]
    assert heights[1] - heights[0] > 0.099 and max(heights) <= 1


def test_smoothing():
    assert plot.smooth([5.0] * 9) == [5.0] * 9 and plot.smooth([1.0]) == [1.0]
    assert plot.smooth([0.0, 3.0, 0.0], reach=1) == [0.0, 1.0, 1.5]


def test_one_seed_has_no_band(tmp_path, drawn):
    plot.compare([RECEIPTS / "toy-0", RECEIPTS / "plain-0"], tmp_path / "two.png")
    plot.compare([RECEIPTS / "toy-0", RECEIPTS / "toy-1"], tmp_path / "seeds.png")
    one, two = ([text.get_text() for text in fig.axes[1].texts] for fig in drawn)
    assert not any("band" in text for text in one) and any("band: 2 seeds" in t for t in two)


def test_texts_that_differ_are_not_compared(tmp_path, drawn):
    for name, text in (("a-0", "one"), ("b-0", "one"), ("c-0", "other")):
        shutil.copytree(ROOT / "receipts/toy-0", tmp_path / name)
        path = tmp_path / name / "config.json"
        said = json.loads(path.read_text())
        path.write_text(json.dumps(said | dict(corpus=said["corpus"] | dict(sha256=text))))
    titles = []
    for other in "bc":
        plot.main([str(tmp_path / f"{x}-0") for x in ("a", other)] + [str(tmp_path / "x.png")])
        titles.append(drawn[-1].axes[0].get_title("left"))
    assert titles == ["a and b differ by no more than seeds do", "Validation loss, of unlike texts"]


def test_a_rate_that_has_fallen_is_not_up():
    """It is up if it is the run's highest, though there be one validation, at the end."""
    rows = [dict(step=i, tokens=i, lr=lr) for i, lr in enumerate((4e-3, 4e-3, 4e-5))]
    rows[2]["val_bpb"] = 2.0
    assert plot.band([rows], "tokens")[4] == [False]
    rows[1]["val_bpb"] = 2.5
    assert plot.band([rows, rows], "tokens")[4] == [True, False]


def test_what_cannot_be_drawn_is_said(tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    (new / "log.csv").touch()
    toys = [str(RECEIPTS / "toy-0"), str(RECEIPTS / "toy-1")]
    for wrong in ([], [str(tmp_path)], toys, [str(new)]):
        with pytest.raises(SystemExit) as e:
            plot.main(wrong)
        assert e.value.code == 2


def test_the_stack_is_the_config(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import draw_stack

    monkeypatch.setattr(draw_stack, "Figure", plot.Figure)

    from config import Config

    for preset in ("super", "toy"):
        c = Config.preset(preset)
        draw_stack.draw(c, tmp_path / "stack.png")
        words = " ".join(text.get_text() for text in drawn[-1].axes[0].texts)
        assert f"{c.num_hidden_layers} layers" in words and f"of {c.n_routed_experts}" in words
        cells = [p for p in drawn[-1].axes[0].patches if type(p).__name__ == "Rectangle"]
        assert len(cells) == c.num_hidden_layers


@pytest.mark.parametrize(
    "idle,said", [((3, 0, 0), "none after step 1"), ((3, 2, 1), "some to the end")]
)
def test_it_says_until_when_experts_idled(drawn, idle, said):
    plot.growing([ROW | dict(step=i, max_vio=0.5, idle=n) for i, n in enumerate(idle, 1)])
    _, ax = drawn[-1].axes
    assert f"at most 3, {said}" in ax.get_xlabel()


def test_a_run_s_pictures_leave_those_of_a_notebook_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")  # as if a person had chosen it
    mine = plot.plt.figure()
    write(tmp_path, *LOGS["one row"])
    plot.run(tmp_path)
    plot.png(plot.growing([ROW]))
    assert matplotlib.get_backend() == "svg" and plot.plt.get_fignums() == [mine.number]
    plot.plt.close(mine)


def test_this_file_can_fail(tmp_path, monkeypatch):
    """Columns that must be there, as they once had to be, are missed."""

    def strict(rows, key, x="step"):
        return [r[x] for r in rows], [r[key] for r in rows]

    monkeypatch.setattr(plot, "points", strict)
    write(tmp_path, *LOGS["one row"])
    with pytest.raises(KeyError):
        plot.run(tmp_path)
