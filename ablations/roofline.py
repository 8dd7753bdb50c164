"""
How many tokens a second a GPU writes, from bytes and FLOPs alone: Super beside the two models that
its report compares it with.

    a step of B sequences on n GPUs     t = max( bytes / (n BW), B FLOPs / (n peak) )
    bytes = rest + experts (1 - (1 - k/E)^B) + B (keys and values + 2 state)
    B     = (n memory - weights) / (what a sequence holds)
    tokens a second a GPU = reply / (reply n t / B + prompt FLOPs / (peak share))

    python -m ablations.roofline             8,192 tokens in, 65,536 out, on B200s
    python -m ablations.roofline --gpus 8 --reserve mean

Everything that the report does not say is a flag. The prompt is read at a share of the peak.

Letters   B sequences  n GPUs  k experts of E a token
Sources   arXiv:2604.12374 figure 1 (the claims, the lengths, the precisions of the other two); the
          sizes of GPT-OSS-120B and Qwen3.5-122B: their configurations, and for Qwen's 64 value
          heads the name's 122 B, which 32 would not give; Super's: model.py, and the released
          NVFP4 checkpoint's bytes
Not here  what cards send each other, kernels, sampling, drafts, a scheduler: a bound, no forecast
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import command

import model
from bounds import knob
from config import Config


class Model(NamedTuple):
    """Bytes: of weights that every token needs, of all experts; of a token's keys and values, of a
    sequence's state. flops: of a token without attention; attend: of it for each key."""

    rest: float
    experts: float
    share: float  # k/E
    kv: float
    state: float
    flops: float
    attend: float
    peak: str


def supers(bits):
    """Super: NVFP4 with FP8 keys and FP16 states, or BF16 with FP32 states."""
    c = Config.preset("super")
    rows, _, cache = model.costs(c, 0)
    experts = c.hybrid_override_pattern.count("E") * c.n_routed_experts
    experts *= 2 * c.moe_latent_size * c.moe_intermediate_size
    whole, four = sum(r.parameters for r in rows), bits == "nvfp4"
    return Model(
        rest=74.4e9 - experts * 4.5 / 8 if four else 2 * (whole - experts),
        experts=experts * 4.5 / 8 if four else 2 * experts,
        share=c.num_experts_per_tok / c.n_routed_experts,
        kv=cache["kv"] / 2 if four else cache["kv"],
        state=cache["state"] / 2 if four else cache["state"],
        flops=sum(r.flops for r in rows),
        attend=4 * c.hybrid_override_pattern.count("*") * c.num_attention_heads * c.head_dim,
        peak="fp8" if four else "bf16",
    )


READ = 8192  # tokens behind a sequence, where drafts are priced
GPT_EXPERTS, QWEN_EXPERTS = 36 * 128 * 3 * 2880**2, 48 * 256 * 3 * 3072 * 1024
OTHERS = {
    "GPT-OSS-120B": Model(
        rest=2 * (116_829_156_672 - GPT_EXPERTS),
        experts=GPT_EXPERTS * 4.25 / 8,
        share=4 / 128,
        kv=18 * 2 * 8 * 64,  # FP8, of the 18 layers that see everything
        state=18 * 128 * 2 * 8 * 64,  # of those with a window: its keys and values
        flops=2 * 5.133e9,
        attend=4 * 18 * 64 * 64,
        peak="fp8",
    ),
    "Qwen3.5-122B": Model(
        rest=2 * (122.1e9 - QWEN_EXPERTS),
        experts=2 * QWEN_EXPERTS,
        share=8 / 256,
        kv=12 * 2 * 2 * 256 * 2,
        state=36 * 64 * 128 * 128 * 4,
        flops=2 * 9.0e9,
        attend=4 * 12 * 32 * 256,
        peak="bf16",
    ),
}


def moved(m, sequences, tokens):
    """Bytes that the backbone reads and writes for `tokens` of each sequence at once."""
    touched = 1 - (1 - m.share) ** (sequences * tokens)
    return m.rest + m.experts * touched + sequences * (m.kv * READ + 2 * m.state)


def drafted(c, priced, sequences):
    """Bytes of one more draft of each: the MTP block in BF16, of its experts those touched, and
    the head. priced: what model.costs says of c."""
    parts, block, _ = priced
    head = next(r.parameters for r in parts if r.what == "head")
    share = c.num_experts_per_tok / c.n_routed_experts
    idle = block.parameters - block.active
    experts = idle / (1 - share)
    touched = 1 - (1 - share) ** sequences
    return 2 * (head + block.parameters - experts + experts * touched)


@dataclass(frozen=True)
class Flags:
    prompt: int = knob(8192, "tokens read", least=1, most=1 << 24)
    reply: int = knob(65536, "tokens written", least=1, most=1 << 24)
    gpus: int = knob(0, "GPUs that share a copy; 0: the fewest that hold it", least=0, most=4096)
    batch: int = knob(0, "sequences at once; 0: as many as fit", least=0, most=1 << 20)
    reserve: str = knob("end", "memory of a sequence: end | mean", choices=("end", "mean"))
    super: str = knob("nvfp4", "nvfp4 | bf16", choices=("nvfp4", "bf16"))
    memory: float = knob(180.0, "GB of a GPU that can be used", above=0, most=1e6)
    bandwidth: float = knob(8.0, "TB/s of a GPU's memory", above=0, most=1e6)
    fp8: float = knob(4.5, "PFLOP/s in 8 bits; 4-bit weights count so", above=0, most=1e6)
    bf16: float = knob(2.25, "PFLOP/s in 16 bits", above=0, most=1e6)
    share: float = knob(0.5, "of the peak, when the prompt is read", above=0, most=1)


def models(a):
    return {"Super": supers(a.super), **OTHERS}


def copy(m, a):
    """GPUs of a copy, and the sequences it has room for. ValueError if it has none."""
    tokens = a.prompt + a.reply if a.reserve == "end" else a.prompt + a.reply / 2
    held, weights, memory = m.kv * tokens + m.state, m.rest + m.experts, a.memory * 1e9
    n = a.gpus or max(1, math.ceil((weights + held) / memory))
    room = int((n * memory - weights) / held)
    if room < max(1, a.batch):
        raise ValueError(f"{n} GPUs have room for {max(0, room)} sequences, not {a.batch or 1}")
    return n, a.batch or room


def rate(m, a):
    """Tokens a second a GPU."""
    n, B = copy(m, a)
    keys = a.prompt + a.reply / 2
    moved = m.rest + m.experts * (1 - (1 - m.share) ** B) + B * (m.kv * keys + 2 * m.state)
    peak = getattr(a, m.peak) * 1e15
    step = max(moved / (n * a.bandwidth * 1e12), B * (m.flops + m.attend * keys) / (n * peak))
    read = a.prompt * (m.flops + m.attend * a.prompt / 2) / (peak * a.share)
    return a.reply / (a.reply * n * step / B + read)


def work(a):
    """Prints the three models side by side."""
    found = {name: (*copy(m, a), rate(m, a)) for name, m in models(a).items()}
    print(f"{'':14}{'GPUs':>6}{'sequences':>11}{'tokens/s/GPU':>14}{'Super is':>10}")
    for name, (n, B, tokens) in found.items():
        print(f"{name:14}{n:6}{B:11,}{tokens:14,.0f}{found['Super'][2] / tokens:9.2f}x")


if __name__ == "__main__":
    command.run(work, Flags, "python -m ablations.roofline", __doc__)
