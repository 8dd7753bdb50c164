"""
Our readable code beside transformers' on a CPU: the same small Nemotron, trained and sampled from,
in fp32.

    python ablations/peers.py                       two minutes, half of them the compiler's

Both sides take turns, so that whatever else the machine does hits both; the table shows medians,
and of the ratios of one turn the median and the range. A step is forward, backward, clipping and
AdamW on 8 x 256 random tokens, ours with the balance loss and the routers' biases besides.
Generation is greedy, 8 prompts of 64 tokens and 128 new ones each; ours plainly, and through
graph.compiled. --cpu counts the process's CPU seconds, which a busy machine leaves alone: with one
thread.

The plain GPT is what nanoGPT is, a stack of attention and MLP with learned positions, four layers
of the same width (3.7 M parameters); it generates as nanoGPT does, without a cache.

The last line is what no change of ours can get below: the operations of a step's matrix products,
at the rate this machine multiplies large matrices.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

here = sys.path.pop(0)  # a folder of ours is called kernels, as is a package that
import transformers  # transformers looks for: it must not see it
from transformers import NemotronHConfig, NemotronHForCausalLM

sys.path[:0] = [here, str(Path(__file__).resolve().parents[1])]
import command

import graph
import latent_moe
import mtp
import sample
from bounds import knob
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
    decode = graph.compiled(model) if compiled else None

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


class Layer(nn.Module):
    """Attention, then an MLP, each behind a norm."""

    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(d, bias=False) for _ in "am")
        self.qkv, self.out = nn.Linear(d, 3 * d, False), nn.Linear(d, d, False)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d, False), nn.GELU(), nn.Linear(4 * d, d, False))

    def forward(self, x):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        y = F.scaled_dot_product_attention(*qkv.unbind(2), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Plain(nn.Module):
    """A plain GPT; head and embedding are one matrix."""

    def __init__(self, vocabulary, d, layers, heads, length):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.layers = nn.Sequential(*(Layer(d, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(d, bias=False)

    def forward(self, ids):
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        return self.norm(self.layers(x)) @ self.words.weight.T


def plain():
    model = Plain(1024, 256, 4, 4, LENGTH)
    opt = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step():
        ids = torch.randint(1024, (BATCH, LENGTH + 1))
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

    @torch.no_grad()
    def generate():
        ids = torch.randint(1, 1024, (PROMPTS, PROMPT))
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        return ids

    return step, generate


def turns(calls, rounds, clock=time.perf_counter):
    """Seconds of each call, `rounds` times in turn, after a turn that warms up: a list of each."""
    seconds = [[] for _ in calls]
    for i in range(-1, rounds):
        for call, took in zip(calls, seconds):
            start = clock()
            call()
            if i >= 0:
                took.append(clock() - start)
    return seconds


def times(took, theirs):
    """How many times as fast as the better of transformers' two: median of the turns, range."""
    better = min(theirs, key=statistics.median)
    each = [a / b for a, b in zip(better, took)]
    return f"{statistics.median(each):7.2f}x ({min(each):.2f} to {max(each):.2f})"


@dataclass(frozen=True)
class Flags:
    threads: int = knob(2, "CPU threads", least=1, most=1024)
    rounds: int = knob(9, "turns that each of them takes; medians are shown", least=1, most=1 << 20)
    compile: bool = knob(True, "the compiled step as well")
    cpu: bool = knob(False, "CPU seconds of the process, not the clock's")


def work(a):
    torch.set_num_threads(a.threads)
    sample.quicken()  # both sides: it is the process that keeps its memory
    torch.manual_seed(0)
    peers = {
        "transformers, eager experts": theirs("eager"),
        "transformers, grouped_mm experts": theirs("grouped_mm"),
        "a plain GPT": plain(),
        "ours": ours(False),
    }
    clock = time.process_time if a.cpu else time.perf_counter
    train = turns([step for step, _ in peers.values()], a.rounds, clock)
    if a.compile:
        peers["ours, compiled step"] = ours(True)
    text = turns([generate for _, generate in peers.values()], a.rounds, clock)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {a.threads} threads, "
        f"fp32, {a.rounds} rounds, {'CPU' if a.cpu else 'clock'} seconds; ratios to transformers' "
        "better one"
    )
    print(f"{'':34}{'training tok/s':>16}{'':24}{'generating tok/s':>18}")
    for i, name in enumerate(peers):
        fast = f"{'':40}"
        if i < len(train):
            rate = BATCH * LENGTH / statistics.median(train[i])
            fast = f"{rate:16,.0f}{times(train[i], train[:2]):24}"
        rate = PROMPTS * NEW / statistics.median(text[i])
        print(f"{name:34}{fast}{rate:18,.0f}{times(text[i], text[:2]):24}")
    with FlopCounterMode(display=False) as counted:
        peers["ours"][0]()
    x, w = torch.randn(2048, 1024), torch.randn(1024, 1024)
    rate = 2 * x.numel() * 1024 / statistics.median(turns([lambda: x @ w], 50, clock)[0])
    flops = counted.get_total_flops()
    theirs_took, ours_took = (
        statistics.median(t) for t in (min(train[:2], key=statistics.median), train[3])
    )
    print(
        f"products of a step: {flops / 1e9:.1f} GFLOP, {1e3 * flops / rate:.0f} ms at "
        f"{rate / 1e9:.0f} GFLOP/s; in all ours takes {1e3 * ours_took:.0f} ms, "
        f"transformers {1e3 * theirs_took:.0f} ms"
    )


def main(argv=None):
    command.run(work, Flags, "peers.py", __doc__, argv)


if __name__ == "__main__":
    main()
