"""
What figures measure with: a step's time by hand, products rounded in every way against exact ones,
and post-training's rows against those of its commands.
"""

from dataclasses import replace

import pytest
import torch

import grpo
import sft
import train
from ablations import (
    chain,
    fig_answers,
    fig_environments,
    fig_heal,
    fig_lag,
    fig_post,
    fig_signs,
    figure,
    roofline,
    rounding,
    small,
)
from model import Nemotron
from nvfp4 import Recipe
from training.settings import configure

# 1. Throughput


def test_a_rate_by_hand():
    """10 GB of weights on a card of 20 GB leave room for 10 sequences of 1 GB. A step reads
    10 + 10 (0.5 + 2 x 0.25) GB at 1 TB/s: 20 ms for 10 tokens. Half a second reads the prompt."""
    m = roofline.Model(
        rest=10e9, experts=0, share=1, kv=0.5e6, state=0.5e9, flops=1e9, attend=0, peak="bf16"
    )
    a = roofline.Flags(prompt=500, reply=500, memory=20.0, bandwidth=1.0, bf16=0.001, share=1.0)
    assert roofline.copy(m, a) == (1, 10)
    moved = 10e9 + 10 * (0.5e6 * 750 + 2 * 0.5e9)
    assert roofline.rate(m, a) == pytest.approx(500 / (500 * moved / 1e12 / 10 + 0.5))
    assert roofline.copy(m, replace(a, reserve="mean"))[1] == int(10 / 0.875)
    slow = replace(a, bf16=1e-6, share=1.0)
    assert roofline.rate(m, slow) == pytest.approx(500 / (500 * 1 + 500))


def test_sizes_are_the_models():
    """Bytes of a token's cache, of a sequence's state, of all weights."""
    four, whole = roofline.supers("nvfp4"), roofline.supers("bf16")
    assert (four.kv, four.state) == (4096, 85_114_880)
    assert four.rest + four.experts == 74.4e9
    assert (whole.rest + whole.experts) / 2 == 120_668_707_840
    gpt, qwen = roofline.OTHERS.values()
    assert (gpt.kv, qwen.kv) == (18_432, 24_576)
    assert 64e9 < gpt.rest + gpt.experts < 66e9 and 243e9 < qwen.rest + qwen.experts < 245e9


@pytest.mark.parametrize(
    "change",
    [
        dict(prompt=4096),
        dict(reply=16384),
        dict(gpus=4),
        dict(batch=8),
        dict(reserve="mean"),
        dict(super="bf16"),
        dict(memory=170.0),
        dict(bandwidth=4.0),
        dict(fp8=2.0),
        dict(bf16=1.0),
        dict(share=0.25),
    ],
)
def test_every_flag_has_an_effect(change):
    rates = lambda a: [roofline.rate(m, a) for m in roofline.models(a).values()]
    assert rates(roofline.Flags(**change)) != rates(roofline.Flags())


def test_a_batch_without_room_is_refused():
    with pytest.raises(ValueError, match="room for 272 sequences, not 273"):
        roofline.rate(roofline.supers("nvfp4"), roofline.Flags(batch=273))


# 2. Rounding


def given(seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, dy = (torch.randn(*shape, generator=g) for shape in ((64, 32), (1, 48, 32), (64, 48)))
    return x, w, None, dy


def test_spared_operands_give_the_exact_products():
    x, w, count, dy = given()
    how = rounding.Rounding(Recipe(), spared=("x", "w", "dy"))
    y, dx, dw = rounding.products(x, w, count, dy, how)
    for got, want in ((y, x @ w[0].T), (dx, dy @ w[0]), (dw[0], dy.T @ x)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_each_ingredient_does_what_its_measure_says():
    torch.manual_seed(0)
    recipe = rounding.errors(given(), "nvfp4", [], 64)
    assert rounding.errors(given(), "nvfp4-sr", [], 4)["wgrad_bias"] > 2 * recipe["wgrad_bias"]
    assert recipe["apart"] == 0 < rounding.errors(given(), "nvfp4-2d", [], 2)["apart"]
    assert rounding.errors(given(), "mxfp4", [], 2)["fprop"] > recipe["fprop"]
    assert rounding.errors(given(), "nvfp4", ["random_all"], 2)["fprop"] > recipe["fprop"]
    x, w, count, dy = given()
    loud = x, w, count, dy * torch.where(torch.arange(64) % 16 == 3, 100.0, 1.0)[:, None]
    shares = [
        rounding.errors(loud, four, extra, 2)["flushed"]
        for four, extra in (("nvfp4", []), ("nvfp4-rht", ["rotate_4"]), ("nvfp4-rht", []))
    ]
    assert shares == sorted(shares) and shares[0] < shares[2] / 2


def test_operands_are_those_of_the_recipes_products():
    """Of ME*EME the last layer stays; Mamba's in_proj and the MoE's four products are taken."""
    config = configure(small.run(small.BYTES, 0, ""), 257)
    seen = rounding.operands(Nemotron(config), torch.randint(257, (2, 33)))
    assert len(seen) == 10
    for x, w, count, dy in seen:
        assert len(x) == len(dy) and (x.shape[1], dy.shape[1]) == (w.shape[2], w.shape[1])
        assert count is None or count.sum() == len(x)


def test_signs_scatter_what_neighbouring_tokens_have_in_common():
    """Rotated with any signs, both operands give the same product; rounded, more of an x with a
    mean is flushed without any, and of an x without one no more."""
    x, w, count, dy = given()
    for choose in fig_signs.KINDS.values():
        exact = rounding.products(x, w, count, dy, rounding.Signed(choose, exact=True))[2]
        torch.testing.assert_close(exact[0], dy.T @ x, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    lean = x + 3, w, count, dy
    gone = {
        (name, signs): fig_signs.errors(ops, signs, 2)["flushed"]
        for name, ops in (("even", (x, w, count, dy)), ("lean", lean))
        for signs in (fig_signs.NONE, fig_signs.FIXED)
    }
    assert gone["lean", fig_signs.NONE] > 2 * gone["lean", fig_signs.FIXED]
    assert gone["even", fig_signs.NONE] < 1.2 * gone["even", fig_signs.FIXED]


def test_units_without_a_gradient_are_counted():
    """A unit whose weights are all 0 has none, however its products are made; an expert that no
    token takes has none in all its units. The last layer's are not counted."""
    config = configure(small.run(small.BYTES, 0, ""), 257)
    model = Nemotron(config)
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    rounding.lowbit.convert(model, Recipe())
    how = lambda recipe: rounding.Rounding(recipe, spared=("x", "w", "dy"))
    before = rounding.zeros(model, ids, how)
    counted, last = (model.backbone.layers[i].mixer.experts for i in (1, 5))
    with torch.no_grad():
        for experts in (counted, last):
            experts.up_proj[2, :32] = 0
            experts.down_proj[2, :, :32] = 0
    after = rounding.zeros(model, ids, how)
    units = 2 * 8 * 64
    assert before["silent"] < after["silent"] <= before["silent"] + 32 / units
    assert after["zeros"] >= after["silent"]


# 3. Post-training

RUNS = {
    fig_answers: dict(zip(fig_answers.FIGURE.variants, ("more", "sft", "all"))),
    fig_post: {fig_post.BEFORE: "sft", fig_post.AFTER: "all"},
    fig_environments: dict(zip(fig_environments.FIGURE.variants, ("sft", "all", "third", "sort"))),
    fig_lag: {fig_lag.WITH: "lag", fig_lag.WITHOUT: "unweighted"},
    fig_heal: dict(zip(fig_heal.FIGURE.variants, ("sft", "all", "healed"))),
}


@pytest.mark.parametrize("module", RUNS, ids=lambda module: module.FIGURE.name)
def test_rows_of_post_training_are_those_of_its_commands(module):
    """What receipts/post has of a run stands in the lab's rows, kind by kind and as means."""
    said = figure.read(figure.ROOT / "receipts" / "post" / "answers.csv")
    rows = figure.look(module.FIGURE).rows
    assert len(rows) == 6 * len(RUNS[module])
    for row in rows:
        key = RUNS[module][row["variant"]], row["seed"]
        want = chain.means([r for r in said if (r["run"], r["seed"]) == key])
        got = {name: float(row[name]) for name in want}
        assert got == pytest.approx(want, rel=1e-5) and {"accepted"} <= set(got)


@pytest.mark.slow
def test_cells_are_the_commands_runs_and_fine_tune_once(tmp_path, monkeypatch):
    """sft.py and grpo.py also ask on the way, with generators of their own: the same answers. The
    second cell finds the first one's model.
    """
    settings, trained = chain.SETTINGS | chain.QUICK, []
    here = dict(out=str(tmp_path), device="cpu", threads=1, questions=settings["questions"])
    model = ",".join(f"{name}={settings[name]}" for name in chain.MODEL)
    own = chain.part(settings, "sft."), chain.part(settings, "grpo.")
    run = sft.Run(**own[0], **here, name="sft", preset="mini", model=model)
    train.fit(run, say=chain.quiet, work=sft.Talks())
    practice = grpo.Run(**own[1], **here, name="grpo", tasks="third", base=str(run.folder()))
    grpo.fit(practice, say=chain.quiet)
    fit = train.fit
    monkeypatch.setattr(train, "fit", lambda *a, **how: trained.append(a) or fit(*a, **how))
    monkeypatch.setattr(chain, "TUNED", tmp_path / "tuned")
    for name, change in (("sft", {}), ("grpo", dict(practice="third"))):
        want = chain.means(figure.read(tmp_path / name / "answers.csv"))
        got = chain.answers(settings | change, 0)
        assert {kind: got[kind] for kind in want} == pytest.approx(want, rel=1e-5)
        assert want["third on, tokens"] > 2
    assert len(got["reward"]) == settings["grpo.steps"]
    assert len(trained) == len(list(chain.TUNED.iterdir())) == 1
    assert chain.tuned(settings | {"sft.lr": 1e-3}, 0) != chain.tuned(settings, 0)
    assert len(trained) == 2


def test_means_leave_out_what_was_not_measured():
    rows = [dict(task="sort", mode="off", right="", accepted="2"), dict(task="call", mode="off")]
    assert chain.means(rows) == {"accepted": 2.0, "sort off, accepted": 2.0}


def test_this_file_can_fail(monkeypatch):
    monkeypatch.setattr(roofline, "copy", lambda m, a: (1, 11))
    with pytest.raises(AssertionError):
        test_a_rate_by_hand()
    monkeypatch.setattr(rounding.Rounding, "operand", rounding.lowbit.Operands.operand)
    with pytest.raises(AssertionError):
        test_spared_operands_give_the_exact_products()
    monkeypatch.setattr(chain, "means", lambda rows: dict(accepted=1.0))
    with pytest.raises(AssertionError):
        test_rows_of_post_training_are_those_of_its_commands(fig_heal)
