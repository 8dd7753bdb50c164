"""The arithmetic of budget.py against the dry run's step, and the dry run's peak against that of a
real step.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import data
import train
from model import Config, Nemotron
from scale import budget, dryrun, parallel

KEYS = "parameters", "states", "peak", "flops", "gather", "reduce", "all-to-all", "far"


def plan(preset="toy", world=8, ep=2, cp=1, rows=4, length=512, recompute=False, **more):
    return train.Run(
        preset=preset,
        world=world,
        ep=ep,
        cp=cp,
        batch=rows * world // cp,
        length=length * cp,
        recompute=recompute,
        precision="bf16",
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
        dict(recompute=True),
        dict(recompute=True, cp=2, ep=4, world=4, rows=2),
        pytest.param(dict(recompute=True, rows=4, micro=1), marks=pytest.mark.slow),
        pytest.param(dict(world=16, ep=16, rows=1), marks=pytest.mark.slow),
        pytest.param(dict(world=16, cp=16, rows=1), marks=pytest.mark.slow),
    ],
)
def test_arithmetic_agrees_with_a_step_that_was_followed(how):
    r = ratios(plan(**how), Config.preset("toy"))
    assert not close(r) and ("far" in r) == (
        how.get("world") == 16
    )  # more ranks swap than a machine has


@pytest.mark.parametrize("letter", "M*E-")
def test_each_kind_of_layer(letter):
    """Two layers of a kind, few words, no MTP: then the layer at work is most of the peak."""
    config = replace(
        Config.preset("toy"),
        hybrid_override_pattern=2 * letter,
        vocab_size=32,
        num_nextn_predict_layers=0,
    )
    r = ratios(plan(recompute=True), config)
    del r["flops"]  # the last product is not done again: a quarter of `-`
    assert not close(r)


def test_super_at_a_depth_of_eleven_layers():
    config = replace(Config.preset("super"), hybrid_override_pattern="MEMEMEM*EME")
    assert not close(ratios(plan("super", 64, 8, rows=1, length=8192, recompute=True), config))


def test_nano_has_neither_latent_nor_mtp():
    config = replace(Config.preset("nano"), hybrid_override_pattern="MEMEM*E")
    assert not close(ratios(plan("nano", 16, 8, rows=1, length=8192, recompute=True), config))


@pytest.mark.parametrize("preset", ["toy", "small", "nano", "super"])
def test_parameters_are_exact(preset):
    with torch.device("meta"):
        count = sum(p.numel() for p in Nemotron(Config.preset(preset)).parameters())
    assert budget.reckon(plan(preset, 1, 1), Config.preset(preset))["parameters"] == count


def measured(config, run):
    """The most memory of a real step of one rank, from the profiler's own log of allocations, above
    what it found.
    """
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        world = parallel.World()
        model = world.model(config, 0, True, run.recompute)
        opt = train.optimiser(model, run)
        ids = torch.randint(config.vocab_size, (run.batch, run.length + 1))

        def step():
            pieces = [
                world.rows(piece, config.mtp_num_layers)
                for piece in ids.split(run.micro or run.batch)
            ]
            counts = [run.batch * run.length] * (config.mtp_num_layers + 1)
            train.backward(
                model,
                data.Batch(pieces, counts, run.batch, 0),
                run,
                lambda: torch.autocast("cpu", torch.bfloat16),
            )
            world.clip(list(model.parameters()), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)

        step()  # makes the moments
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
        sizes = [e.nbytes() for e in allocations(seen)]
    finally:
        dist.destroy_process_group()
    alive = most = 0
    for size in sizes:
        alive += size
        most = max(most, alive)
    held = sum(4 * p.numel() for p in map(parallel.local, model.parameters()))
    return 3 * held + most


def allocations(seen):
    return [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        pytest.param(dict(recompute=True), marks=pytest.mark.slow),
        pytest.param(dict(recompute=True, micro=2), marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_is_that_of_a_real_step(how):
    config = Config.preset("toy")
    run = plan(world=1, ep=1, rows=4, length=256, **how)
    seen = dryrun.predict(run, lambda line: None, config, train.optimiser, train.losses)
    real = measured(config, run)
    print(f"predicted {seen['peak']:,}, real {real:,}")
    assert 0.9 < seen["peak"] / real < 1.1


def test_this_file_can_fail():
    """Layers that keep nothing, experts that nobody shares: both are noticed."""
    run, config = plan(), Config.preset("toy")
    right = budget.keeps
    try:
        budget.keeps = lambda c, letter: (4 * c.hidden_size, 0)
        assert "peak" in close(ratios(run, config))
    finally:
        budget.keeps = right
    wrong = budget.reckon(replace(run, ep=1), config)
    assert wrong["gather"] > 1.1 * budget.reckon(run, config)["gather"]
