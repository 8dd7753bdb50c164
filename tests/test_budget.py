"""The arithmetic of budget.py against the dry run's step, and the dry run's peak against that of a
real step.
"""

import json
from dataclasses import replace

import peaks
import pytest
import torch
import torch.distributed as dist
from test_parallel import torchrun

import train
from model import Config, Nemotron
from scale import budget, dryrun, parallel, room
from scale import plan as plans
from training.settings import RECIPES

KEYS = "parameters", "states", "peak", "flops", "gather", "reduce", "all-to-all", "far"


def plan(
    preset="toy", world=8, ep=2, cp=1, rows=4, length=512, recompute="", precision="bf16", **more
):
    return train.Run(
        preset=preset,
        world=world,
        ep=ep,
        cp=cp,
        batch=rows * world // cp,
        length=length * cp,
        recompute=recompute,
        precision=precision,
        dry_run=True,
        **more,
    )


def ratios(run, config):
    """Arithmetic over what was followed, for each number."""
    seen = dryrun.predict(run, lambda line: None, config, train.optimiser, train.losses)
    said = dryrun.predict(
        replace(run, quick=True), lambda line: None, config, train.optimiser, train.losses
    )
    return {k: said[k] / seen[k] for k in KEYS if seen.get(k)}


def close(r):
    return {k: round(v, 3) for k, v in r.items() if not 0.9 < v < 1.1}


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(recompute="all", cp=2, ep=4, world=4, rows=2),
        pytest.param(dict(recompute="all"), marks=pytest.mark.slow),
        pytest.param(dict(recompute="mamba,logits"), marks=pytest.mark.slow),
        pytest.param(dict(precision="nvfp4"), marks=pytest.mark.slow),
        pytest.param(dict(precision="mxfp4-2d", recompute="all"), marks=pytest.mark.slow),
        pytest.param(dict(precision="nvfp4", world=8, ep=8, rows=1), marks=pytest.mark.slow),
        pytest.param(dict(recompute="all", rows=4, micro=1), marks=pytest.mark.slow),
        pytest.param(dict(world=16, ep=16, rows=1), marks=pytest.mark.slow),
        pytest.param(dict(world=16, cp=16, rows=1), marks=pytest.mark.slow),
    ],
)
def test_arithmetic_agrees_with_a_step_that_was_followed(how):
    r = ratios(plan(**how), Config.preset("toy"))
    assert not close(r) and ("far" in r) == (
        how.get("world") == 16
    )  # more ranks swap than a machine has


@pytest.mark.parametrize("precision", ["bf16", pytest.param("nvfp4-last", marks=pytest.mark.slow)])
@pytest.mark.parametrize("letter", "M*E-")
def test_each_kind_of_layer(letter, precision):
    """Two layers of a kind, few words, no MTP: then the layer at work is most of the peak."""
    config = replace(
        Config.preset("toy"),
        hybrid_override_pattern=2 * letter,
        vocab_size=32,
        num_nextn_predict_layers=0,
    )
    r = ratios(plan(recompute="all", precision=precision), config)
    del r["flops"]  # the last product is not done again: a quarter of `-`
    assert not close(r)


@pytest.mark.parametrize("recompute", ["", pytest.param("all", marks=pytest.mark.slow)])
def test_experts_keep_codes_once_for_each_piece_that_meets(recompute):
    """Eight sequences meet at an expert of large matrices: rounded eight times, each time kept."""
    toy = Config.preset("toy")
    config = replace(
        toy,
        hybrid_override_pattern="EEE",
        vocab_size=32,
        num_nextn_predict_layers=0,
        moe_intermediate_size=1024,
    )
    how = dict(precision="nvfp4-last", world=8, ep=8, rows=1, length=64, recompute=recompute)
    r = ratios(plan(**how), config)  # of the rest: few rows, padded to sixteens; norms are sent too
    assert not close(dict(peak=r["peak"])) and r["gather"] < 1.1  # a rank has its experts whole


def test_super_at_a_depth_of_eleven_layers():
    config = replace(Config.preset("super"), hybrid_override_pattern="MEMEMEM*EME")
    assert not close(ratios(plan("super", 64, 8, rows=1, length=8192, recompute="all"), config))


def test_nano_has_neither_latent_nor_mtp():
    config = replace(Config.preset("nano"), hybrid_override_pattern="MEMEM*E")
    assert not close(ratios(plan("nano", 16, 8, rows=1, length=8192, recompute="all"), config))


@pytest.mark.parametrize("preset", ["toy", "small", "nano", "super"])
def test_parameters_are_exact(preset):
    with torch.device("meta"):
        count = sum(p.numel() for p in Nemotron(Config.preset(preset)).parameters())
    assert budget.reckon(plan(preset, 1, 1), Config.preset(preset))["parameters"] == count


def test_a_rank_that_cannot_hold_its_part_is_refused_at_once(monkeypatch):
    """Super on 64 ranks of 80 GB keeps too much, makes all of it again, and is named what fits."""
    monkeypatch.setattr(room, "memory", lambda device: 80e9)
    run = train.Run(**{**RECIPES["super"], "preset": "super", "ep": 8})
    device, c = torch.device("cuda"), Config.preset("super")
    with pytest.raises(ValueError, match=r"needs 372\.7 GB .* has 80\.0; with .* needs 56\.5"):
        room.hold(c, run, device, 64, 64, True)
    room.hold(c, replace(run, recompute="all"), device, 64, 64, True)


def alone(config, run):
    """Bytes at the peak of a real step of one rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        return peaks.measured(config, run, parallel.World())
    finally:
        dist.destroy_process_group()


def predicted(config, run):
    """The peak as it was followed, and by arithmetic."""
    how = lambda line: None, config, train.optimiser, train.losses
    return [dryrun.predict(replace(run, quick=quick), *how)["peak"] for quick in (False, True)]


def far(predictions, real):
    """Those that are more than 5 % off a real peak, with all the numbers."""
    off = [abs(p / r - 1) for p in predictions for r in real]
    return [] if max(off) < 0.05 else [f"{max(off):.1%}", predictions, real]


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        pytest.param(dict(recompute="all"), marks=pytest.mark.slow),
        pytest.param(dict(recompute="all", micro=2), marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_that_of_a_real_step(how):
    config = Config.preset("toy")
    run = plan(world=1, ep=1, rows=4, length=256, **how)
    assert not far(predicted(config, run)[:1], [alone(config, run)])


REAL = {
    2: [
        dict(),
        dict(ep=2),
        dict(cp=2),
        dict(ep=2, micro=1),
        dict(ep=2, recompute="mamba"),
        dict(ep=2, recompute="experts"),
        dict(ep=2, recompute="logits"),
        dict(ep=2, recompute="attention"),
        dict(ep=2, recompute="all"),
        dict(ep=2, cp=2, recompute="mamba,experts,logits"),
    ],
    4: [dict(ep=2, cp=2), dict(ep=4, recompute="all"), dict(cp=4, recompute="logits")],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", REAL)
def test_the_predicted_peaks_are_those_of_real_ranks(ranks):
    """On every rank, whatever tokens come to its experts; followed, and by arithmetic as --plan."""
    cases = {json.dumps(how): how for how in REAL[ranks]}
    real = dict(map(json.loads, torchrun(ranks, "tests/peaks.py", *cases).stdout.splitlines()))
    for case, how in cases.items():
        wrong = far(predicted(peaks.CONFIG, peaks.run_of(how, ranks)), real[case])
        assert not wrong, (case, wrong)


def test_what_is_made_again_adds_up():
    """All parts together are all; a part more keeps less and computes more."""
    config, names = Config.preset("toy"), [n for n in budget.PARTS if n != "mlp"]
    some = [budget.reckon(plan(recompute=",".join(names[:n])), config) for n in range(5)]
    assert some[-1] == budget.reckon(plan(recompute="all"), config)
    for less, more in zip(some, some[1:]):
        assert more["flops"] > less["flops"]
        assert sum(more["parts"][k] for k in ("kept", "loss")) < sum(
            less["parts"][k] for k in ("kept", "loss")
        )


@pytest.mark.parametrize("preset, world, batch", [("super", 128, 128), ("nano", 16, 64)])
def test_the_plan_is_the_best_of_all_that_fit(preset, world, batch):
    config = Config.preset(preset)
    run = replace(plan(preset, world, 1, length=8192), batch=batch)
    best, table = plans.find(run, config)
    assert plans.fits(best) and all(world % n == 0 for pair in table for n in pair)
    for (ep, cp), shown in table.items():
        if isinstance(shown, str):
            with pytest.raises(ValueError):
                plans.ways(run, config, ep, cp)
            continue
        for way in plans.ways(run, config, ep, cp):
            assert not plans.fits(way) or best[:3] <= shown[:3] <= way[:3]
    quick = replace(best.run, quick=True)
    seen = dryrun.predict(quick, lambda line: None, config, train.optimiser, train.losses)
    assert (seen["peak"], max(dryrun.seconds(quick, seen))) == (best.peak, best.floor)


def test_a_plan_says_what_it_takes_and_why_not_the_rest():
    said, run = [], replace(plan("nano", 16, 1, length=8192), batch=64)
    best = plans.show(run, Config.preset("nano"), said.append)
    assert said[-1].startswith(f"take       --ep {best.run.ep} --cp {best.run.cp} --micro")
    assert any("times the least" in line for line in said) and len(said) == 27
    with pytest.raises(ValueError, match="nothing fits 8 cards of 80 GB"):
        plans.show(replace(plan("super", 8, 1), batch=8), Config.preset("super"), said.append)


def test_this_file_can_fail():
    """Layers that keep nothing, experts that nobody shares: both are noticed."""
    run, config = plan(), Config.preset("toy")
    right = budget.keeps
    try:
        budget.keeps = lambda c, letter: (4 * c.hidden_size, 0)
        assert "peak" in close(ratios(run, config))
        assert far(predicted(peaks.CONFIG, peaks.run_of({}, 2)), [16_748_736])
    finally:
        budget.keeps = right
    wrong = budget.reckon(replace(run, ep=1), config)
    assert wrong["gather"] > 1.1 * budget.reckon(run, config)["gather"]
