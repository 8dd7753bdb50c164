"""
Run by torchrun from test_budget.py: the most memory of a real step on each of N ranks.

    torchrun --nproc-per-node 2 tests/peaks.py '{"ep": 2}' '{"cp": 2, "recompute": "all"}'

Each case is fields of train.Run, as json. The numbers are PyTorch's own: the profiler's log of
every allocation of the step, above the states that the step found.
"""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import data
import train
from model import Config
from scale import budget, parallel

CONFIG = replace(
    Config.preset("toy"),
    hybrid_override_pattern="MEM*E",
    vocab_size=1024,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=32,
    n_groups=2,
    chunk_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_latent_size=32,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=128,
)


def run_of(how, ranks):
    """The step of a case: two sequences a rank, or two slices of them."""
    run = train.Run(world=ranks, batch=2 * ranks, length=128, precision="bf16", dry_run=True)
    return replace(run, **how)


def stepper(config, run, world):
    """A model on the ranks, and a function that takes a step with it."""
    model = world.model(config, 0, True, budget.again(run.recompute))
    opt = train.optimiser(model, run)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (run.batch, run.length + 1), generator=draw)
    mine = ids.chunk(world.shares)[world.place]
    counts = [run.batch * run.length] * (config.mtp_num_layers + 1)

    def step():
        pieces = mine.split(run.micro or len(mine))
        pieces = [world.rows(piece, config.mtp_num_layers) for piece in pieces]
        batch = data.Batch(pieces, counts, run.batch, 0)
        train.backward(model, batch, run, lambda: torch.autocast("cpu", torch.bfloat16))
        world.clip(list(model.parameters()), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    return model, step


def most_of(step):
    """Bytes that a step held at once, of what it allocated itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    alive = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def measured(config, run, world):
    """Bytes of this rank at its peak, the least of three steps: a message is let go of when the
    others have come for it, and on a busy machine they come late.
    """
    model, step = stepper(config, run, world)
    step()  # makes the moments
    held = sum(4 * p.numel() for p in map(parallel.local, model.parameters()))
    return 3 * held + min(most_of(step) for _ in range(3))


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for line in sys.argv[1:]:
        run = run_of(json.loads(line), dist.get_world_size())
        each = [None] * run.world
        dist.all_gather_object(each, measured(CONFIG, run, parallel.World(run.ep, run.cp)))
        if dist.get_rank() == 0:
            print(json.dumps([line, each]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
