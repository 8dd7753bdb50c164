"""
One model on many devices: the same run as on one, only cut up.

A rank is one process with one device. N ranks form two grids, each used by other parameters:

    dense     (dp, cp)     a rank's tokens: which sequences (dp), which slice of their time (cp)
    experts   (edp, ep)    a rank's experts: which of them (ep), which rows of their matrices (edp)

    dense matrices   every rank keeps 1/N of each; it is gathered for use and let go of (FSDP2)
    experts          tokens travel instead: all-to-all to the rank that has the expert, and back (`exchange`)
    Mamba            passes on its last k-1 inputs and its S: (S, fade) pairs compose, so log2(cp) steps do
    attention        gathers its two heads of keys and values; late queries change places with a mirror rank

No two ranks hold the same tokens, so two rules make all of it exact: gradients are summed, never averaged, and
losses are divided by the counts of the global batch. No grid needs a factor of its own, the experts' neither.

S is linear in where it starts. With S_r what slice r writes starting from 0, and f_r its fade, the state
that reaches slice r is  S_{r-1} + f_{r-1} (S_{r-2} + f_{r-2} (...)): a prefix scan over the ranks, by doubling;
what comes of it is added to the outputs, y_t = y_t + exp(sum of dt A up to t) S C_t.

Nothing in a model file knows of this. It enters by their seams: experts.exchange and .mm, mamba's conv and
scan, attention's attend, LatentMoE's whole.

    torchrun --nproc-per-node 4 train.py --ep 2 --cp 2             one machine             on several: README

Letters   N ranks  b batch  T time  t its slice on one rank  h heads  p head dim  g groups  n state  E experts
Not here  tensor and pipeline parallelism: not needed to fit. Checkpoints: shards.py; what fits: dryrun.py
Sources   PyTorch's fully_shard, DeviceMesh and torch.distributed.checkpoint; sizes: arXiv:2604.12374
Departs   gathers each matrix by itself, in bf16 under autocast; what is not a matrix stays in fp32 throughout
"""
import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint as recompute

import data
import latent_moe
import mamba
import mtp
from attention import Attention, attend
from model import Block, Nemotron, init_weights

ROWS = 1024                                                  # of logits at a time, with --recompute
all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd  # 2.11


def swap_rows(x, give, take, group):
    """give[r] rows of x go to rank r, take[r] rows come from it. Its gradient is the way back."""
    return collectives.all_to_all_single_autograd(x.contiguous(), take, give, group)


# 1. Experts: tokens go to the rank that has them

def sizes(send, group):
    """send (ranks, E/ranks), rows for each of their experts -> the rows that come, and both as split sizes."""
    come = torch.empty_like(send)
    dist.all_to_all_single(come, send.contiguous(), group=group)
    return come, send.sum(1).tolist(), come.sum(1).tolist()                  # the one wait for the device


def exchange(rows, count, group, sizes=sizes):
    """Rows by expert, all E of them -> rows of my experts from all ranks, their counts, and the way back."""
    send = count.view(group.size(), -1)                                      # (ranks, E/ranks)
    come, give, take = sizes(send, group)
    rows = swap_rows(rows, give, take, group)                                # by rank, then by expert
    expert = torch.arange(send.shape[1], device=rows.device).repeat(group.size())
    order = expert.repeat_interleave(come.flatten(), output_size=sum(take)).argsort(stable=True)
    at = torch.arange(len(order), device=rows.device)
    back = torch.empty_like(order).scatter_(0, order, at)                    # order, inverted
    return (rows.index_select(0, order), come.sum(0),
            lambda out: swap_rows(out.index_select(0, back), take, give, group))


# 2. Time: a rank has a slice of every sequence, and its neighbours have the rest

def lower_right(q, k, v, start, end):
    """Attention of queries start ... end - 1 over keys 0 ... end - 1. A flash kernel needs no mask for that."""
    k, v = k[:, :, :end], v[:, :, :end]
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, causal_lower_right(end - start, end), enable_gqa=True)
    return attend(q, k, v, start)


class Slice:
    """What crosses the edges of the slices. Every rank takes part in everything, or the others would wait."""
    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def shift(self, x, k):
        """What rank r - k has; zeros where there is none."""
        give, take = [0] * self.size, [0] * self.size
        give[(self.rank + k) % self.size] = take[(self.rank - k) % self.size] = len(x)
        return swap_rows(x, give, take, self.group) * float(self.rank >= k)

    def conv(self, x, weight, bias, window=None, **how):
        return mamba.causal_conv(x, weight, bias, self.shift(x[:, 1 - weight.shape[-1]:], 1), **how)

    def scan(self, x, dt, A, B, C, D=None, state=None, **how):
        y, S = mamba.ssd_chunked(x, dt, A, B, C, D, **how)                   # as if nothing came before
        left = (dt * A).cumsum(1).exp()                                      # (b, t, h)   what is left of it
        fade, k = left[:, -1, :, None, None], 1                              # (b, h, 1, 1)
        while k < self.size:                                                 # k slices are in S now, then 2k
            S, fade, k = S + fade * self.shift(S, k), fade * self.shift(fade, k), 2 * k
        S = self.shift(S, 1).unflatten(1, (B.shape[2], -1))                  # (b, g, h/g, p, n)   reaches me
        late = torch.einsum("btgn,bgrpn->btgrp", C.to(S.dtype), S).flatten(2, 3) * left[..., None]
        return y + late.to(y.dtype), S                                       # (b, t, h, p)

    def attend(self, q, k, v, first):
        """Later queries see more keys. So late halves are attended by the mirror rank: equal work for all."""
        t, n, mirror = q.shape[2], self.size, self.size - 1 - self.rank
        def gather(x):                                                       # (b, kv, t, e) -> (b, kv, T, e)
            return all_gather(x.reshape(1, -1), 0, self.group).view(n, *x.shape).permute(1, 2, 0, 3, 4).flatten(2, 3)
        def trade(x):
            rows = [len(x) if r == mirror else 0 for r in range(n)]
            return swap_rows(x, rows, rows, self.group)
        k, v, half = gather(k), gather(v), t // 2
        early = lower_right(q[:, :, :half], k, v, self.rank * t, self.rank * t + half)
        late = lower_right(trade(q[:, :, half:]), k, v, mirror * t + half, (mirror + 1) * t)
        return torch.cat([early, trade(late)], 2)

    def whole(self, count, t):
        """Counts of whole sequences: a slice's share times these is its part of the balance loss."""
        count = count.clone()
        dist.all_reduce(count, group=self.group)
        return count, t * self.size


# 3. The model: every matrix cut up, experts over both grids

def local(p):
    return p.to_local() if isinstance(p, DTensor) else p


def put(p, w):
    """Writes the part of w that this rank holds of p. w is the same on every rank, so nothing is sent."""
    local(p).copy_(local(distribute_tensor(w, p.device_mesh, p.placements, src_data_rank=None))
                   if isinstance(p, DTensor) else w)


@contextmanager
def unnoted(mixer):
    """A router notes what it chose, for the optimiser step. Choosing again for the gradient must not count."""
    notes = isinstance(mixer, latent_moe.LatentMoE) and (mixer.load.clone(), mixer.balance)
    try:
        yield
    finally:                                                                 # left early, by an exception
        if notes:
            mixer.load, mixer.balance = notes


def twice(f, mixer=None):
    """f, of which only the inputs are kept: its gradient does it again."""
    return lambda *args: recompute(f, *args, use_reentrant=False, preserve_rng_state=False,
                                   context_fn=lambda: (nullcontext(), unnoted(mixer)))


def nll_in_pieces(head, h, targets, mask):
    """mtp.nll of head(h), ROWS tokens at a time: nothing else is as large as all the logits."""
    piece = twice(lambda h, targets, mask: mtp.nll(F.linear(h, head.weight)[None], targets, mask))
    return sum(map(piece, *(x.flatten(0, 1).split(ROWS) for x in (h, targets, mask))))


class World:
    """The grids, and all that train.py does differently on them."""
    def __init__(self, ep=1, cp=1, device="cpu"):
        self.size, self.rank, self.device = dist.get_world_size(), dist.get_rank(), torch.device(device)
        for name, n in (("--ep", ep), ("--cp", cp)):
            if n < 1 or self.size % n:
                raise ValueError(f"{name} {n} does not divide the {self.size} ranks")
        self.flat = init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("all",))
        self.dense = init_device_mesh(self.device.type, (self.size // cp, cp), mesh_dim_names=("dp", "cp"))
        self.experts = init_device_mesh(self.device.type, (self.size // ep, ep), mesh_dim_names=("edp", "ep"))
        self.dp, self.place = self.size // cp, self.dense["dp"].get_local_rank()
        self.ep, self.slice = ep, Slice(self.dense["cp"].get_group()) if cp > 1 else None

    def model(self, config, seed=0, bf16=False, again=False):
        """A model with this rank's part of every parameter, and the numbers that one process would give it."""
        with torch.device("meta"):
            model = Nemotron(config)
        dist.barrier()                                                       # nobody writes before all have looked
        self.shard(model, bf16, again)
        model.to_empty(device=self.device)
        init_weights(model, seed, put)
        return model

    def shard(self, model, bf16=False, again=False):
        """Cuts up a model on the meta device. again: make a layer, and the logits, again for the gradient."""
        matrices = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32 if bf16 else None,
                                        cast_forward_inputs=False)
        for m in list(model.modules()):
            if isinstance(m, latent_moe.Experts):
                self.spread(m, matrices)
            if isinstance(m, Block) and again:
                m.forward = twice(m.forward, m.mixer)
            if self.slice and isinstance(m, mamba.Mamba2):
                m.conv, m.scan = self.slice.conv, self.slice.scan
            if self.slice and isinstance(m, Attention):
                m.attend = self.slice.attend
            if self.slice and isinstance(m, latent_moe.LatentMoE):
                m.whole = self.slice.whole
        for m in list(model.modules()):
            if isinstance(m, nn.Linear):
                fully_shard(m, mesh=self.flat, mp_policy=matrices)
        if again:
            model.lm_head.nll = partial(nll_in_pieces, model.lm_head)
            register_fsdp_forward_method(model.lm_head, "nll")
        for m in (*model.backbone.layers, model.backbone.embeddings, *[model.mtp] * bool(model.mtp), model):
            fully_shard(m, mesh=self.flat)                                   # what is left of it, in fp32
        for m in model.modules():
            if isinstance(m, FSDPModule):                                    # sums, and not gloo's missing mean
                m.set_gradient_divide_factor(1.0)
                m.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(model, "hidden")

    def spread(self, experts, policy):
        """ep ranks share the experts; the edp ranks that have the same ones share the rows of their matrices."""
        E, edp = len(experts.up_proj), self.experts["edp"].size()
        for what, n, by in (("experts", E, self.ep), ("rows of an expert's matrix", experts.up_proj.shape[1], edp),
                            ("rows of an expert's matrix", experts.down_proj.shape[1], edp)):
            if n % by:
                raise ValueError(f"{n} {what} do not divide among {by} ranks: choose another --ep")
        for name, p in list(experts.named_parameters(recurse=False)):
            mine = p.detach()[:E // self.ep]
            mine = DTensor.from_local(mine, self.experts["ep"], [Shard(0)], run_check=False)
            experts.register_parameter(name, nn.Parameter(mine))
        group, mm = self.experts["ep"].get_group(), experts.mm
        experts.mm = lambda x, w, count: mm(x, w.to_local(), count)
        experts.exchange = lambda rows, count: exchange(rows, count, group)
        fully_shard(experts, mesh=self.experts["edp"], shard_placement_fn=lambda p: Shard(1), mp_policy=policy)

    # 4. A step, where it differs from that of one process

    def rows(self, ids, depths):
        """Whole sequences (b, T+1) -> my slice, with the targets that follow it: ids, mask, t as losses wants."""
        cp, r = (self.slice.size, self.slice.rank) if self.slice else (1, 0)
        T = ids.shape[1] - 1
        t = T // cp
        if T % cp or cp > 1 and t < 4:
            raise ValueError(f"--length {T} does not cut into {cp} equal slices of at least 4 tokens")
        mine = ids[:, r * t:r * t + t + 1 + depths]
        pad = (0, t + 1 + depths - mine.shape[1])                            # past the end: masked
        return F.pad(mine, pad), F.pad(torch.ones_like(mine[:, 1:], dtype=torch.bool), pad), t

    def total(self, numbers):
        """The sum over all ranks of each of some numbers."""
        x = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()

    def clip(self, params, largest):
        """clip_grad_norm_ for both grids: every number of the gradient is held by one rank, so squares add up."""
        grads = [local(p.grad) for p in params if p.grad is not None]
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).square().sum()
        dist.all_reduce(norm)
        norm = norm.sqrt()
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, model, tokens, step, run, cast, micro, backward):
        """Gradients of the global batch, clipped -> nats of each depth, balance, norm. Loads of all are noted."""
        T, depths = run.length_at(step), model.mtp.depths if model.mtp else 0
        counts = [run.batch * (T - k) for k in range(depths + 1)]
        ids = data.batch(tokens, run.seed, step, run.batch, T + 1, self.place, self.dp).to(self.device)
        pieces = [self.rows(piece, depths) for piece in ids.split(micro)]
        nats, balance = backward(model, pieces, counts, run, cast)
        *nats, balance = self.total([*nats, balance])
        for moe in latent_moe.layers(model):
            dist.all_reduce(moe.load)
        return nats, balance, float(self.clip(list(model.parameters()), run.clip))


def start(ep=1, cp=1):
    """The World that torchrun started this process in."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
        raise ValueError("--max-restarts wants TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or new workers call on dead ones")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return World(ep, cp, device)


def run(run, fit, say):
    """train.fit as one of the ranks. After a restart by torchrun it goes on from the last whole checkpoint."""
    world = start(run.ep, run.cp)
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    fit(replace(run, resume=run.resume or again), say if world.rank == 0 else lambda line: None, world)
    dist.barrier()
    dist.destroy_process_group()
