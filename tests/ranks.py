"""Run by torchrun from test_parallel.py: N processes against one, everything compared; a piece
broken by its name.

A case is ep,cp,skew,recompute,how. how: nothing; uneven, bf16, abort (a worker dies, once); or what
is broken.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import data
import latent_moe
import mtp
import train
from model import Config, Nemotron
from scale import parallel

torch.set_num_threads(1)
parallel.ROWS = 5  # of 32 and fewer: the last piece is short
CONFIG = Config(
    hybrid_override_pattern="M*E",
    vocab_size=40,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=4,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_latent_size=8,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=16,
    intermediate_size=16,
    initializer_range=0.2,
)
RUN = train.Run(batch=4, length=32, lr=1e-3, mtp_loss=0.3, balance=1e-2)


def whole(x):
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


@torch.no_grad()
def prepare(model, skew):
    """Slow decay, so that S matters at the edges; and, if asked, two experts that everybody
    chooses.
    """
    for name, p in model.state_dict().items():
        p = parallel.local(p)
        if name.endswith("A_log"):
            p.fill_(-4.0)
        if name.endswith("dt_bias"):
            p.fill_(0.0)
        if name.endswith("correction_bias") and skew:
            p[:2] += 100.0


def targets(how):
    """Which tokens are to be predicted, (batch, length + 1): all, or few in front and many
    behind.
    """
    some = torch.ones(RUN.batch, RUN.length + 1, dtype=torch.long)
    if how == "uneven":
        some[0, 6:], some[1], some[3, 21:] = 0, 0, 0
    return some


def steps(model, opt, world, n, first=0, noted=True, how="", cast=nullcontext):
    """n steps as train.fit takes them -> a list of (losses, balance, norm) and the first step's
    gradients.
    """
    out, grads, depths, some = [], None, CONFIG.mtp_num_layers, targets(how)
    counts = mtp.counts(some[:, 1:].bool(), depths)
    for step in range(first, first + n):
        ids = torch.randint(
            40, (RUN.batch, RUN.length + 1), generator=torch.Generator().manual_seed(step)
        )
        mine = [x.chunk(world.shares)[world.place] if world else x for x in (ids, some)]
        pieces = []
        for piece, asked in zip(*(x.split(1) for x in mine)):
            ids, mask, t, _ = (
                world.rows(piece, depths) if world else (piece, asked[:, 1:].bool(), None, None)
            )
            pieces.append(
                (ids, mask & world.rows(asked, depths)[0][:, 1:].bool() if world else mask, t)
            )
        nats, even = train.backward(model, data.Batch(pieces, counts, RUN.batch, 0), RUN, cast)
        if world:
            *nats, even = world.total([*nats, even])
            if noted:
                for moe in latent_moe.layers(model):
                    dist.all_reduce(moe.load)
        grads = grads or {k: whole(p.grad).clone() for k, p in model.named_parameters()}
        norm = (
            world.clip(list(model.parameters()), 1.0)
            if world
            else torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        )
        opt.step()
        opt.zero_grad(set_to_none=True)
        routed = sum(float(moe.load.sum()) for moe in latent_moe.layers(model))  # each token once
        latent_moe.update_bias(model, 1e-3)
        out.append([*nats, even, float(norm), routed])
    return out, grads


def distance(got, want):
    return max(
        float(
            (whole(got[k]).double() - want[k].double()).norm() / (want[k].double().norm() + 1e-12)
        )
        for k in want
    )


def alone(skew, n, how, cast):
    model = Nemotron(CONFIG)
    prepare(model, skew)
    return *steps(
        model, train.optimiser(model, RUN), None, n, how=how, cast=cast
    ), model.state_dict()


def apart(got, want):
    """The largest relative differences of what alone() returns."""
    a, b = torch.tensor(got[0]), torch.tensor(want[0])
    return dict(
        first=float(((a[0] - b[0]) / b[0]).abs().max()),
        loss=float(((a - b) / b).abs().max()),
        grad=distance(got[1], want[1]),
        end=distance(got[2], want[2]),
    )


def kinds(tensors):
    return sorted({str(parallel.local(x).dtype) for x in tensors})


def compare(world, skew, again, n, how):
    bf16 = how in ("bf16", "narrow")
    cast = (lambda: torch.autocast("cpu", torch.bfloat16)) if bf16 else nullcontext
    want = alone(skew, n, how, cast)
    many = world.model(CONFIG, bf16=bf16, again=again)
    assert (
        distance(dict(many.named_parameters()), dict(Nemotron(CONFIG).named_parameters())) == 0
    )  # same initialisation
    prepare(many, skew)
    opt, exchange, came, summed, gathered = (
        train.optimiser(many, RUN),
        parallel.exchange,
        [],
        [],
        [],
    )

    def noting(rows, count, group):
        out = exchange(rows, count, group)
        came.append(len(out[0]))
        return out

    names = [
        new if hasattr(dist, new) else old
        for new, old in (  # new since torch 2.13
            ("reduce_scatter_single", "reduce_scatter_tensor"),
            ("all_gather_single", "all_gather_into_tensor"),
        )
    ]
    kept = [getattr(dist, name) for name in names]

    def reduce(output, input, **more):
        summed.append(input)
        return kept[0](output, input, **more)

    def gather(output, input, **more):
        gathered.append(input)
        return kept[1](output, input, **more)

    try:
        parallel.exchange = noting
        for name, new in zip(names, (reduce, gather)):
            setattr(dist, name, new)
        got = (
            *steps(many, opt, world, n, noted=how != "loads", how=how, cast=cast),
            many.state_dict(),
        )
    finally:
        parallel.exchange = exchange
        for name, old in zip(names, kept):
            setattr(dist, name, old)
    each = lambda x: world.total([x * (r == world.rank) for r in range(world.size)])  # by rank
    t = RUN.length // (world.slice.size if world.slice else 1)
    mine = [
        world.rows(x, 0)[0][:, 1:] for x in targets(how).chunk(world.shares)[world.place].split(1)
    ]
    found = dict(
        apart(got, want),
        rows=each(sum(came)),
        targets=each(float(sum(x[:, :t].sum() for x in mine))),
    )
    if bf16:
        found.update(
            rounding=apart(want, alone(skew, n, how, nullcontext)),
            summed=kinds(summed),
            gathered=kinds(gathered),
            weights=kinds(many.parameters()),
            gradients=kinds(got[1].values()),
            moments=kinds(m for s in opt.state.values() for m in s.values()),
        )
    return found


def main():
    for line in sys.argv[1:]:
        ep, cp, skew, again, how = line.split(",")
        world, broken = (
            parallel.World(int(ep), int(cp)),
            how not in ("", "uneven", "bf16", "abort") and how,
        )
        restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if how == "abort" and world.rank and not restarts:
            os.abort()
        keep = (
            {
                k: getattr(parallel.Slice, k)
                for k in ("shift", "conv", "scan", "attend", "whole_sequence")
            }
            if broken
            else {}
        )
        if broken == "halo":
            parallel.Slice.conv = lambda self, *a, **k: parallel.mamba.causal_conv(*a, **k)
        elif broken == "state":
            parallel.Slice.scan = lambda self, *a, **k: parallel.mamba.ssd_chunked(*a, **k)
        elif broken == "keys":
            parallel.Slice.attend = lambda self, *a: parallel.attend(*a)
        elif broken == "balance":
            parallel.Slice.whole_sequence = lambda self, count, t: (count, t)
        exchange, rows, policy = (
            parallel.exchange,
            parallel.World.rows,
            parallel.MixedPrecisionPolicy,
        )
        if broken == "dispatch":
            parallel.exchange = lambda rows, count, group: (
                rows,
                count.view(group.size(), -1).sum(0),
                lambda out: out,
            )
        elif broken == "targets":
            parallel.World.rows = lambda self, ids, depths: (
                lambda i, m, t, docs: (i[:, : t + 1], m[:, :t], t, docs)
            )(*rows(self, ids, depths))
        elif broken == "narrow":
            parallel.MixedPrecisionPolicy = lambda kind, reduced, **more: policy(kind, kind, **more)
        result = compare(world, int(skew), bool(int(again)), 2 if broken else 5, how)
        for k, f in keep.items():
            setattr(parallel.Slice, k, f)
        parallel.exchange, parallel.World.rows, parallel.MixedPrecisionPolicy = (
            exchange,
            rows,
            policy,
        )
        if world.rank == 0:
            print(json.dumps(dict(case=line, restarts=restarts, **result)), flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.barrier()
    dist.destroy_process_group()
