"""
A dry run: what one rank of many would hold, send and compute, found out on a laptop.

The real model, cut up by parallel.py as for N ranks, takes a real training step, but with tensors that have
shapes and no numbers, and messages that go nowhere (PyTorch's fake tensors and fake process group). Every
allocation, multiplication and message of rank 0 is seen and added up:

    memory     parameters, gradients, AdamW's moments, and the most that was ever alive at once
    traffic    bytes of gathers, reductions and all-to-alls, by kind
    time       floor = max(FLOPs / peak, bytes / link): what no program beats with these figures

Routing is taken to be balanced. Not seen: fragmentation and the buffers of NCCL, some GB; attention counts as
a flash kernel, the rest as the readable code, whose temporary tensors a fused kernel would not make.

    python train.py --preset super --dry-run --world 64 --ep 8 --gpu h100 --recompute --batch 64
    ... --layers 11    that many layers and twice that many, extrapolated to all: half a minute
    ... --quick        no step at all: budget.py's arithmetic

Not here  the values: nothing is learned. How the model is cut up: parallel.py; by arithmetic: budget.py
Sources   dense bf16 peaks, memory and links: NVIDIA's data sheets of H100 SXM and B200
"""
import time
import weakref
from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import budget
import parallel
from model import Nemotron

# bytes of memory, FLOP/s, NVLink and network in bytes/s
GPUS = dict(h100=(80e9, 989e12, 450e9, 50e9), b200=(180e9, 2250e12, 900e9, 50e9))
KINDS = {"all_gather": "gather", "allgather": "gather", "reduce_scatter": "reduce", "all_to_all": "all-to-all",
         "alltoall": "all-to-all", "all_reduce": "sum", "allreduce": "sum"}


class Meter(TorchDispatchMode):
    """Sees every operation: adds up FLOPs and messages, and follows what is alive. `held` lives from the start."""
    def __init__(self, held):
        super().__init__()
        self.flops, self.sent, self.alive, self.peak, self.sizes = 0, Counter(), 0, 0, {}
        self.resize = torch.UntypedStorage.resize_
        for t in held:
            self.see(t)

    def see(self, t):
        """Notes a tensor's memory once, until it is let go of. The key lives as long as the memory."""
        storage = t.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = 0
            weakref.finalize(storage, self.gone, storage._cdata)
        self.grow(storage._cdata, storage.nbytes())

    def grow(self, key, size):
        self.alive += size - self.sizes[key]
        self.sizes[key] = size
        self.peak = max(self.peak, self.alive)

    def gone(self, key):
        self.alive -= self.sizes.pop(key)

    def __enter__(self):
        def resize(storage, size):                           # how FSDP lets go of what it has gathered
            result = self.resize(storage, size)
            if storage._cdata in self.sizes:
                self.grow(storage._cdata, size)
            return result
        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *how):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*how)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, name = op(*args, **(kwargs or {})), op.__name__
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor):
                self.see(t)
        if name.startswith(("mm.", "bmm.", "_grouped_mm.", "addmm.")):
            a, b = args[1:3] if name.startswith("addmm") else args[:2]
            self.flops += 2 * a.numel() * b.shape[-1]        # every row of a, or column, meets one matrix
        elif "attention" in name and "flash" in name:
            q, k = args[1:3] if "backward" in name else args[:2]
            sees = k.shape[2] - q.shape[2] / 2               # keys that a query meets, on average
            self.flops += round((10 if "backward" in name else 4) * q.numel() * sees)
        elif kind := next((k for k in KINDS if k in name and "copy" not in name), None):
            tensors = [t for t in pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            largest = max((t.numel() * t.element_size() for t in tensors), default=0)
            self.sent[KINDS[kind]] += largest * (2 if KINDS[kind] == "sum" else 1)       # a sum: there and back
            if name.startswith("all_to_all") and len(args[1]) > budget.MACHINE:          # split sizes, one a rank
                self.sent["far"] += largest
        return out


def balanced(send, group):
    """In place of parallel.sizes: every rank sends every other the same, every expert gets the same."""
    n, per = group.size(), balanced.rows // group.size()
    return send.new_full(send.shape, per // send.shape[1]), [per] * n, [per] * n


def step(run, config, optimiser, losses):
    """One real training step of rank 0 under fake tensors -> dict of what was seen."""
    rows = min(run.micro or run.batch, run.batch * run.cp // run.world)
    pieces = run.batch * run.cp // (run.world * rows)
    world = parallel.World(run.ep, run.cp)
    with torch.device("meta"):
        model = Nemotron(config)
    world.shard(model, True, run.recompute)
    t, depths = run.length // run.cp, config.mtp_num_layers if model.mtp else 0
    balanced.rows = rows * t * config.num_experts_per_tok
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        opt = optimiser(model, run)
        ids = torch.zeros(rows, t + 1 + depths, dtype=torch.long)
        mask = torch.ones(rows, t + depths, dtype=torch.bool)
        def piece():
            with torch.autocast("cpu", torch.bfloat16):
                parts = losses(model, ids, mask, t)
            (sum(parts) + parallel.latent_moe.take_balance(model)).backward()
        def finish():
            world.clip(list(model.parameters()), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
        piece()
        finish()                                             # makes the moments, and what DTensor keeps for itself
        moments = [m for state in opt.state.values() for m in state.values() if isinstance(m, torch.Tensor)]
        meter = Meter([parallel.local(x) for x in (*model.parameters(), *model.buffers(), *moments)])
        states = meter.alive
        with meter:
            piece()
            one = Counter(meter.sent, flops=meter.flops)
            if pieces > 1:                                   # beside the gradients of the first, and so are the rest
                piece()
            finish()
    held = sum(parallel.local(p).numel() for p in model.parameters())
    seen = Counter(meter.sent, flops=meter.flops)
    more = {k: (pieces - 2) * (seen[k] - one[k]) if pieces > 2 else 0 for k in seen}
    return dict(parameters=held, states=states, peak=meter.peak, **{k: n + more[k] for k, n in seen.items()})


def follow(run, c, optimiser, losses):
    """The step of the whole model; of two depths, with --layers, a line through what was seen, drawn on."""
    dist.init_process_group("fake", rank=0, world_size=run.world, store=FakeStore())
    seams = torch.Tensor.bincount, parallel.exchange.__defaults__, parallel.lower_right
    try:
        torch.Tensor.bincount = lambda x, minlength: x.new_zeros(minlength).index_add(0, x, torch.ones_like(x))
        parallel.exchange.__defaults__ = (balanced,)
        parallel.lower_right = lambda q, k, v, start, end: F.scaled_dot_product_attention(
            q, k[:, :, :end], v[:, :, :end], enable_gqa=True)
        if run.layers:                                       # a line through two depths, drawn on to the end
            kinds = Counter(c.hybrid_override_pattern)       # as many of each letter, in proportion
            if any(k * run.layers % c.num_hidden_layers for k in kinds.values()):
                raise ValueError(f"--layers {run.layers} cannot hold the letters in the proportions {dict(kinds)}")
            cut = lambda n: replace(c, hybrid_override_pattern="".join(
                x * (k * n // c.num_hidden_layers) for x, k in kinds.items()))
            a, b = (step(run, cut(n), optimiser, losses) for n in (run.layers, 2 * run.layers))
            far = (c.num_hidden_layers - run.layers) / run.layers
            return {k: round(a[k] + far * (b[k] - a[k])) for k in a}
        return step(run, c, optimiser, losses)
    finally:
        torch.Tensor.bincount, parallel.exchange.__defaults__, parallel.lower_right = seams
        dist.destroy_process_group()


def predict(run, say, config, optimiser, losses):
    """Prints what a rank holds, sends and computes in a step, and how long that takes at least."""
    began, c = time.perf_counter(), config
    if run.gpu not in GPUS:
        raise ValueError(f"--gpu {run.gpu!r}: choose {' or '.join(GPUS)}")
    if run.layers < 0 or 2 * run.layers > c.num_hidden_layers:
        raise ValueError(f"--layers {run.layers}: at most half of the {c.num_hidden_layers} layers")
    for name, n in (("ep", run.ep), ("cp", run.cp)):
        if n < 1 or run.world % n:
            raise ValueError(f"--{name} {n} does not divide --world {run.world}")
    if run.batch % (run.world // run.cp):
        raise ValueError(f"--batch {run.batch} does not divide among {run.world // run.cp} groups of ranks")
    if run.precision == "fp32":
        raise ValueError("--precision fp32: the dry run follows bf16 products, take --precision bf16")
    seen = budget.reckon(run, c) if run.quick else follow(run, c, optimiser, losses)
    memory, peak_flops, nvlink, network = GPUS[run.gpu]
    tokens = run.batch * run.length
    sent = {k: seen.get(k, 0) for k in ("gather", "reduce", "all-to-all", "sum")}
    far = seen.get("far", 0)                                 # of the all-to-alls, those that leave a machine
    link = (sent["gather"] + sent["reduce"] + far) / network + (sent["all-to-all"] - far) / nvlink
    compute = seen["flops"] / peak_flops
    say(f"{run.preset}: {c.num_hidden_layers} layers, rank 0 of {run.world}, ep {run.ep}, cp {run.cp}, "
        f"{tokens:,} tokens a step" + ("; by arithmetic" if run.quick else
                                          f"; from {run.layers} and {2 * run.layers} layers" * bool(run.layers)))
    say(f"parameters {seen['parameters']:,} on this rank; with moments {seen['states'] / 1e9:.2f} GB")
    say(f"peak       {seen['peak'] / 1e9:.2f} GB: {'fits' if seen['peak'] < .95 * memory else 'does not fit'} "
        f"the {memory / 1e9:.0f} GB of an {run.gpu} (5 % kept free)")
    if run.quick:
        say("of it      " + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in seen["parts"].items()) + ": see budget.py")
    say("sent       " + ", ".join(f"{k} {v / 1e9:.2f} GB" for k, v in sent.items()) +
        f"; of the all-to-all {far / 1e9:.2f} GB between machines" * bool(far))
    say(f"time       at least {max(compute, link):.2f} s a step: {seen['flops'] / 1e12:.1f} TFLOP take {compute:.2f} s "
        f"at {peak_flops / 1e12:.0f} TFLOP/s;\n           messages take {link:.2f} s "
        f"(NVLink {nvlink / 1e9:.0f} GB/s, network {network / 1e9:.0f} GB/s)")
    say(f"           worked out in {time.perf_counter() - began:.0f} s")
    return seen
