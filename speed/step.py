"""
Where a training step's time goes on a CPU: every operation timed, beside the least it could take.

    floor of an operation   max( FLOPs / product, bytes / copy )
    product                 operations a second of one large product of matrices, in this process
    copy                    bytes a second of one large copy, read and written, in this process
    bytes                   what an operation reads and what it writes, once each
    around them             the step without a clock in it, less all operations: Python, autograd

A small tensor is still in a cache, which is faster than memory: then a floor of bytes is too high,
and an operation may lie below it.

    python bench.py --step --batch 8 --length 128     the default run's step

Seconds are the CPU's own, of all threads, so that a busy machine does not count.

Not here  tokens a second: bench.py; beside transformers: ablations/peers.py; GPUs: rows.py
"""

import statistics
import time
from collections import defaultdict
from contextlib import nullcontext

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import data
import latent_moe
import train
from config import Config
from model import Nemotron

# What an operation is, by how its name begins; what is in none of these is `numbers`.
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"),
    "convolutions": ("convolution",),
    "attention": ("_scaled_dot",),
    "losses": ("_log_softmax", "nll_loss"),
    "optimiser": ("_fused_adamw", "_foreach"),
    "moved": (
        "index",
        "gather",
        "scatter",
        "sort",
        "topk",
        "cat",
        "stack",
        "copy",
        "clone",
        "_to_copy",
        "embedding",
        "constant_pad",
        "slice_backward",
        "select_backward",
        "new_zeros",
        "zeros",
    ),
    "numbers": ("",),
}
WORDS = dict(
    products="products of matrices",
    convolutions="convolutions",
    attention="attention, fused",
    losses="log-softmax and its gradient",
    optimiser="clipping and AdamW",
    moved="rows copied, chosen, sorted",
    numbers="one number at a time, and sums",
)
AROUND = "around them: Python, autograd"


def kind(name):
    return next(k for k, begins in KINDS.items() if name.startswith(begins))


def flops(name, args, out):
    """Of the operations that do many for each number that they read; 0 for others."""
    if name in ("mm", "bmm", "_grouped_mm"):
        return 2 * args[0].numel() * args[1].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * args[1].numel() * args[2].shape[-1]
    if name.startswith("convolution"):
        backward = name == "convolution_backward"
        weight, places = (args[2], args[0]) if backward else (args[1], out)
        return (4 if backward else 2) * places.numel() * weight[0].numel()
    if name.startswith("_scaled_dot"):
        backward = "backward" in name
        q, k = args[1:3] if backward else args[:2]
        return (5 if backward else 2) * q.numel() * k.shape[2]  # half of the keys are seen
    return 0


class Watch(TorchDispatchMode):
    """CPU seconds, calls, FLOPs and bytes of every operation: lists by its kind."""

    def __init__(self):
        super().__init__()
        self.seen = defaultdict(list)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        start = time.process_time()
        out = op(*args, **(kwargs or {}))
        took, name = time.process_time() - start, op.__name__.split(".")[0]
        if not op.is_view:
            tensors = [x for x in pytree.tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
            moved = sum(x.numel() * x.element_size() for x in tensors)
            self.seen[kind(name)].append((took, flops(name, args, out), moved))
        return out


def cpu(call, rounds):
    """The median of CPU seconds of `rounds` calls, after one that warms up."""
    took = []
    for _ in range(rounds + 1):
        start = time.process_time()
        call()
        took.append(time.process_time() - start)
    return statistics.median(took[1:])


def rates(rounds=7):
    """FLOPs and bytes that a CPU second is worth, by a product of matrices and by a copy."""
    x, w = torch.randn(2048, 1024), torch.randn(1024, 1024)
    a = torch.randn(1 << 25)
    b = torch.empty_like(a)
    product = 2 * x.numel() * 1024 / cpu(lambda: x @ w, rounds)
    return product, 2 * a.numel() * 4 / cpu(lambda: b.copy_(a), rounds)


def stepper(preset, batch, length):
    """A whole step of train.py's, of random tokens: losses, gradient, clipping, AdamW."""
    model, run = Nemotron(Config.preset(preset)), train.Run(preset=preset, batch=batch)
    opt, draw = train.optimiser(model, run), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, length + 1), generator=draw)
    asked = torch.ones(batch, length, dtype=torch.bool)
    counts = [batch * (length - k) for k in range(model.config.depths + 1)]
    world = train.Alone()
    world.cast = nullcontext

    def step():
        rows = data.Batch([(ids, asked, None, None)], counts, batch, batch * length)
        train.gradient(model, rows, run, world)
        opt.step()
        opt.zero_grad(set_to_none=True)
        latent_moe.update_bias(model)

    return step


def measure(preset, batch, length, rounds, say=print):
    """Prints the table -> its rows: kind, calls, seconds, floor."""
    step, (product, copy) = stepper(preset, batch, length), rates()
    whole, watches = cpu(step, rounds), [Watch() for _ in range(rounds)]
    for watch in watches:
        with watch:
            step()
    rows = []
    for name in KINDS:
        each = [watch.seen[name] for watch in watches]
        seconds = statistics.median(sum(took for took, _, _ in some) for some in each)
        floor = sum(max(f / product, b / copy) for _, f, b in each[0])
        rows.append((WORDS[name], len(each[0]), seconds, floor))
    rows.append((AROUND, 0, whole - sum(seconds for _, _, seconds, _ in rows), 0.0))
    say(
        f"{preset}, {batch} x {length} tokens, {torch.get_num_threads()} threads: a product "
        f"{product / 1e9:.1f} GFLOP/s, a copy {copy / 1e9:.1f} GB/s; medians of {rounds} steps"
    )
    say(f"{'':34}{'calls':>7}{'CPU ms':>9}{'share':>8}{'floor ms':>10}")
    for what, calls, seconds, floor in (
        *rows,
        ("a step", sum(r[1] for r in rows), whole, sum(r[3] for r in rows)),
    ):
        say(f"{what:34}{calls:7}{1e3 * seconds:9.1f}{seconds / whole:8.1%}{1e3 * floor:10.1f}")
    return rows
