"""
Room: whether a run has the memory it needs, before any of it is taken.

    hold      a rank's part of a run, of many ranks that share a model
    sized     a run that says nothing of --micro, and the most sequences at once that fit
    within    the same, of the memory that a world has

By arithmetic, not by trying: scale/budget.py, which knows bf16 products. Numbers in fp32 take about
twice the room of everything that is kept for the gradient. A sixth of the memory stays free, for
what no pencil sees.

Not here  how the arithmetic goes: budget.py; a rank of many, before there are any: dryrun.py; what
          no memory of this machine can hold: training/world.py
"""

from contextlib import nullcontext
from dataclasses import replace

import command

import torch

from scale import budget
from training.settings import configure

FREE = 1 / 6  # of the memory: the allocator's fragments, CUDA itself, libraries


def hold(config, run, device, ranks, shares, bf16):
    """ValueError for what a rank of so many cannot hold, before any of it is made."""
    micro, there = run.at_once(shares), memory(device)
    need, least = (
        needs(replace(run, recompute=again), config, micro, ranks, bf16)
        for again in (run.recompute, "all")
    )
    if need > there:
        raise ValueError(
            f"one of {ranks} ranks needs {need / 1e9:,.1f} GB at the peak by arithmetic, with "
            f"--micro {micro} --recompute {run.recompute or '(nothing)'}, and has "
            f"{there / 1e9:,.1f}; with --recompute all it needs {least / 1e9:,.1f}: train.py "
            f"--preset {run.preset} --plan --world {ranks} finds what fits"
        )


def memory(device):
    """Bytes of a device: of the GPU, else of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return command.machine()


def needs(run, config, micro, ranks, bf16):
    """Bytes at the peak of a step with `micro` sequences at once, on one of `ranks`."""
    seen = budget.reckon(replace(run, micro=micro, world=ranks), config)
    return seen["peak"] + (0 if bf16 else seen["peak"] - seen["states"])


def sized(run, device, ranks=1, shares=1, bf16=True, say=print):
    """run; where --micro is 0 and a rank's share of the batch does not fit at once, with the most
    sequences that do, or 1.
    """
    if run.micro:
        return run
    config, whole = configure(run), run.at_once(shares)
    free, need = (1 - FREE) * memory(device), lambda n: needs(run, config, n, ranks, bf16)
    if need(whole) <= free:
        return run
    smaller = [n for n in range(whole - 1, 0, -1) if whole % n == 0]
    micro = next((n for n in smaller if need(n) <= free), 1)
    say(
        f"room       --micro {micro}: all {whole} sequences at once need {need(whole) / 1e9:,.1f} "
        f"GB by arithmetic, {micro} need {need(micro) / 1e9:,.1f}, and there are "
        f"{memory(device) / 1e9:,.1f}"
    )
    return replace(run, micro=micro)


def within(run, world, say):
    """run, with as many sequences at once as the memory of the world's device holds, if it does not
    say.
    """
    bf16 = world.cast is not nullcontext
    return sized(run, world.device, world.size, world.shares, bf16, say)
