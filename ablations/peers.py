"""
Our readable code beside transformers' on a CPU: the same small Nemotron, trained and sampled from,
in fp32.

    python ablations/peers.py                       two minutes, half of them the compiler's

Both sides take turns, so that whatever else the machine does hits both; the table shows medians. A
step is forward, backward, clipping and AdamW on 8 x 256 random tokens, ours with the balance loss
and the routers' biases besides. Generation is greedy, 8 prompts of 64 tokens and 128 new ones each;
ours plainly, and through sample.compiled.

The last line is what no change of ours can get below: the operations of a step's matrix products,
at the rate this machine multiplies large matrices.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

here = sys.path.pop(0)  # a folder of ours is called kernels, as is a package that
import transformers  # transformers looks for: it must not see it
from transformers import NemotronHConfig, NemotronHForCausalLM

sys.path[:0] = [here, str(Path(__file__).resolve().parents[1])]
import latent_moe
import mtp
import sample
from model import Config, Nemotron

SIZES = dict(
    vocab_size=1024,
    hidden_size=256,
    hybrid_override_pattern="MEM*EMEM",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=8,
    mamba_head_dim=64,
    ssm_state_size=64,
    n_groups=2,
    conv_kernel=4,
    chunk_size=64,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_latent_size=64,
    moe_intermediate_size=168,
    moe_shared_expert_intermediate_size=336,
    routed_scaling_factor=2.5,
    initializer_range=0.02,
)
BATCH, LENGTH, PROMPTS, PROMPT, NEW = 8, 256, 8, 64, 128


def theirs(experts):
    """A training step and a generation of transformers' model, with one way to run experts."""
    model = NemotronHForCausalLM(NemotronHConfig(**SIZES, eos_token_id=None, pad_token_id=0))
    model.set_experts_implementation(experts)
    opt = torch.optim.AdamW(model.parameters(), 1e-3)

    def step():
        ids = torch.randint(1024, (BATCH, LENGTH + 1))
        logits = model.train()(input_ids=ids[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

    def generate():
        prompts = torch.randint(1, 1024, (PROMPTS, PROMPT))
        return model.eval().generate(
            prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )

    return step, generate


def ours(compiled):
    model = Nemotron(Config(**SIZES, num_nextn_predict_layers=0))
    opt = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    decode = sample.compiled(model) if compiled else None

    def step():
        ids = torch.randint(1024, (BATCH, LENGTH + 1))
        y, h = ids[:, 1:], model.train().hidden(ids[:, :-1])
        nll = mtp.linear_nll(h, model.lm_head, y, torch.ones_like(y, dtype=torch.bool)) / y.numel()
        (nll + 1e-4 * latent_moe.take_balance(model) / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        latent_moe.update_bias(model)

    def generate():
        return sample.generate(
            model.eval(), torch.randint(1, 1024, (PROMPTS, PROMPT)), NEW, step=decode
        )

    return step, generate


def turns(calls, rounds):
    """Seconds of each call, `rounds` times in turn, after a turn that warms up -> their medians."""
    seconds = [[] for _ in calls]
    for i in range(-1, rounds):
        for call, took in zip(calls, seconds):
            start = time.perf_counter()
            call()
            if i >= 0:
                took.append(time.perf_counter() - start)
    return [statistics.median(took) for took in seconds]


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--no-compile", action="store_true", help="leave out the compiled step")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    sample.quicken()  # both sides: it is the process that keeps its memory
    torch.manual_seed(0)
    peers = {
        "transformers, eager experts": theirs("eager"),
        "transformers, grouped_mm experts": theirs("grouped_mm"),
        "ours": ours(False),
    }
    train = turns([step for step, _ in peers.values()], a.rounds)
    if not a.no_compile:
        peers["ours, compiled step"] = ours(True)
    text = turns([generate for _, generate in peers.values()], a.rounds)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{a.threads} threads, fp32, "
        f"{a.rounds} rounds; ratios to transformers' better one"
    )
    print(f"{'':34}{'training tok/s':>16}{'':8}{'generating tok/s':>18}")
    for i, name in enumerate(peers):
        t = (
            f"{BATCH * LENGTH / train[i]:16,.0f}{min(train[:2]) / train[i]:7.2f}x"
            if i < len(train)
            else " " * 24
        )
        print(f"{name:34}{t}{PROMPTS * NEW / text[i]:18,.0f}{min(text[:2]) / text[i]:7.2f}x")
    with FlopCounterMode(display=False) as counted:
        peers["ours"][0]()
    x, w = torch.randn(2048, 1024), torch.randn(1024, 1024)
    rate = 2 * x.numel() * 1024 / turns([lambda: x @ w], 50)[0]
    flops = counted.get_total_flops()
    print(
        f"products of a step: {flops / 1e9:.1f} GFLOP, {1e3 * flops / rate:.0f} ms at "
        f"{rate / 1e9:.0f} GFLOP/s; in all ours takes {1e3 * train[2]:.0f} ms, "
        f"transformers {1e3 * min(train[:2]):.0f} ms"
    )


if __name__ == "__main__":
    main()
