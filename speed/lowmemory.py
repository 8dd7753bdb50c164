"""
What packed weights save in memory, and what they cost in time: one token after another, of a model
of 0.4 G random parameters, in BF16 and in two maps.

All three take turns, token by token, so that a busy machine is busy for all of them; what counts is
the ratio.

    python bench.py --packed

Not here  how a matrix is packed: quant/packed.py; what its rounding does: ptq.py
"""

import statistics
import time

import torch

from config import Config
from model import Nemotron
from quant import autoquant, calibrate, packed

MAPS = "bf16", "released", "nvfp4"


def sizes():
    """Mostly experts, as Super is: 22 of 128 read a token."""
    return Config(
        hidden_size=1024,
        hybrid_override_pattern="MEMEMEM*EMEMEMEME",
        vocab_size=8192,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=64,
        mamba_num_heads=32,
        mamba_head_dim=64,
        n_groups=8,
        ssm_state_size=64,
        chunk_size=64,
        n_routed_experts=128,
        num_experts_per_tok=22,
        moe_latent_size=256,
        moe_intermediate_size=672,
        moe_shared_expert_intermediate_size=1344,
        num_nextn_predict_layers=0,
    )


def make(config, name, seed=0):
    """A model of random numbers, BF16 but for the packed matrices of this map."""
    with torch.device("meta"):
        model = Nemotron(config)
    units = calibrate.units(model)
    kinds = autoquant.named(name, {unit: ("NVFP4", "FP8") for unit in units})
    plan = {module: kind for unit, kind in kinds.items() if kind for module in units[unit]}
    packed.swap(model, plan)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    model.to_empty(device="cpu").eval()
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.normal_(0, 0.02, generator=g)
    for b in model.buffers():
        if b.dtype == torch.uint8:
            b.random_(0, 256, generator=g)
        else:
            b.copy_(torch.full(b.shape, 0.01))
    return model


def one(model, cache, token):
    began = time.perf_counter()
    model(token, cache)
    return 1e3 * (time.perf_counter() - began)


@torch.no_grad()
def table(config, rounds, say=print):
    """A line a map: bytes held, milliseconds a token, and both over BF16's."""
    models = {name: make(config, name) for name in MAPS}
    caches = {name: m.new_cache(1) for name, m in models.items()}
    g = torch.Generator().manual_seed(1)
    ms = {name: [] for name in MAPS}
    for i in range(rounds + 2):
        token = torch.randint(config.vocab_size, (1, 1), generator=g)
        for name, m in models.items():
            took = one(m, caches[name], token)
            ms[name] += [took] * (i >= 2)  # the first two warm up
    held = {name: packed.nbytes(m) for name, m in models.items()}
    say(f"{'map':10}{'held, MB':>10}{'of bf16':>9}{'ms a token':>12}{'of bf16':>9}   range")
    for name in MAPS:
        ratios = sorted(a / b for a, b in zip(ms[name], ms["bf16"]))
        size, middle = held[name] / held["bf16"], statistics.median(ratios)
        say(
            f"{name:10}{held[name] / 1e6:10.0f}{size:9.2f}{statistics.median(ms[name]):12.1f}"
            f"{middle:9.2f}   {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )


def measure(config, rounds):
    with torch.device("meta"):
        n = sum(p.numel() for p in Nemotron(config).parameters())
    print(f"{n / 1e6:.0f} M parameters, one row, {torch.get_num_threads()} threads")
    table(config, rounds)
