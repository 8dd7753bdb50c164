"""Run by torchrun from test_parallel.py: N processes against one, everything compared; a piece
broken by its name.

A case is ep,cp,skew,recompute,how. recompute: 0, 1 (all) or mamba+logits. how: nothing; uneven,
bf16, nvfp4 and others of --precision, fast (the kernels, in Triton's interpreter), nvfp4:fast,
abort (a worker dies, once), reduce (gradients summed in bf16); or what is broken, of four bits
behind a colon.
"""

import json
import os
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import exact
import torch
import torch.distributed as dist
from tiny import SMALL
from torch.distributed.tensor import DTensor

import data
import latent_moe
import mtp
import nvfp4
import train
from model import Config, Nemotron, set_paths
from nvfp4 import Recipe
from quant import lowbit
from scale import budget, parallel, slices

fp4mm = None
if os.environ.get("TRITON_INTERPRET"):
    sys.path.insert(0, str(Path(__file__).parent / "interpreted"))
    import honest

    honest.repair()
    from kernels import fp4mm

torch.set_num_threads(1)
parallel.ROWS = 5  # of 32 and fewer: the last piece is short
CHANGES = dict(vocab_size=40, chunk_size=4, num_experts_per_tok=2, initializer_range=0.2)
CONFIG = Config(**{**SMALL, **CHANGES}, hybrid_override_pattern="M*E")
FOUR = replace(CONFIG, hybrid_override_pattern="ME*EM")  # the last is in high precision
WIDE = replace(CONFIG, mamba_head_dim=16, ssm_state_size=16)  # the least that kernels/ssd.py takes
BOTH = replace(WIDE, hybrid_override_pattern="MEM", num_nextn_predict_layers=0)  # last as in FOUR
FORMATS = "nvfp4", "nvfp4-2d", "mxfp4"
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
    length = 2 * RUN.length if four(how) else RUN.length  # blocks have 32 tokens
    rows = 1 if how == "nvfp4:fast" else RUN.batch  # the interpreter takes its time
    some = torch.ones(rows, length + 1, dtype=torch.long)
    if how == "uneven":
        some[0, 6:], some[1], some[3, 21:] = 0, 0, 0
    return some


def steps(model, opt, world, n, first=0, noted=True, how="", cast=nullcontext):
    """n steps as train.fit takes them -> a list of (losses, balance, norm) and the first step's
    gradients.
    """
    out, grads, some = [], None, targets(how)
    depths = CONFIG.mtp_num_layers if model.mtp else 0
    counts = mtp.counts(some[:, 1:].bool(), depths)
    for step in range(first, first + n):
        lowbit.stir(model, RUN.seed, step)
        ids = torch.randint(40, some.shape, generator=torch.Generator().manual_seed(step))
        mine = [x.chunk(world.shares)[world.place] if world else x for x in (ids, some)]
        pieces = []
        for piece, asked in zip(*(x.split(1) for x in mine)):
            ids, mask, t, _ = (
                world.rows(piece, depths) if world else (piece, asked[:, 1:].bool(), None, None)
            )
            pieces.append(
                (ids, mask & world.rows(asked, depths)[0][:, 1:].bool() if world else mask, t)
            )
        seen = train.backward(model, data.Batch(pieces, counts, len(some), 0), RUN, cast)
        *nats, even = (world.total(seen) if world else seen).tolist()
        if world:
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


def alone(config, skew, n, how, cast):
    model = Nemotron(config)
    if four(how):
        lowbit.convert(model, Recipe.read(how.split(":")[0]))
    prepare(model, skew)
    return *steps(
        model, train.optimiser(model, RUN), None, n, how=how, cast=cast
    ), model.state_dict()


def four(how):
    return how.startswith(("nvfp4", "mxfp4", "mxfp8"))


@contextmanager
def rounded(seen):
    """Counts rows of rounded operands, by step and name of the matrix and the operand."""
    plain, kernel = lowbit.Operands.operand, fp4mm and fp4mm.operand

    def note(how, name, q):
        rows = (q[q.any(1)] + 0).detach().numpy()  # not what was padded; of two zeros one
        seen.update((how.random.step, how.name, name, row.tobytes()) for row in rows)

    def operand(self, name, x, *more):
        q, amax = plain(self, name, x, *more)
        note(self, name, q)
        return q, amax

    def codes(how, name, *more):
        q, s, amax = kernel(how, name, *more)
        values = nvfp4.unpack(q) * s.float().repeat_interleave(16, 1)
        note(how, name, values.T if name.startswith("wgrad") else values)
        return q, s, amax

    lowbit.Operands.operand = operand
    if fp4mm:
        fp4mm.operand = codes
    yield seen
    lowbit.Operands.operand = plain
    if fp4mm:
        fp4mm.operand = kernel


def codes(got, want):
    """Of the rows that one process rounds, in the first step and in all: how many all ranks
    together do not have, and how many there are. Every piece and rank has w's, which count once.
    """
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, got)
    together = sum(everybody, Counter())
    one = lambda c: Counter({k: 1 if k[2].endswith("w") else n for k, n in c.items()})
    missing, of = one(want) - one(together), one(want)
    first = min(step for step, *_ in of)
    return [
        sum(n for k, n in c.items() if last or k[0] == first)
        for last in (False, True)
        for c in (missing, of)
    ]


def once(f):
    """f() of the first rank, for all."""
    made = [None if dist.get_rank() else f()]
    dist.broadcast_object_list(made)
    return made[0]


def apart(got, want, learned=False):
    """The largest relative differences of what alone() returns. learned: without the biases of the
    routers, which one token more or less moves by a whole step.
    """
    a, b = torch.tensor(got[0]), torch.tensor(want[0])
    end = {k: x for k, x in want[2].items() if not (learned and k.endswith("correction_bias"))}
    return dict(
        first=float(((a[0] - b[0]) / b[0]).abs().max()),
        loss=float(((a - b) / b).abs().max()),
        grad=distance(got[1], want[1]),
        end=distance(got[2], end),
    )


def kinds(tensors):
    return sorted({str(parallel.local(x).dtype) for x in tensors})


def compare(world, skew, again, n, how):
    bf16 = how in ("bf16", "narrow")
    cast = (lambda: torch.autocast("cpu", torch.bfloat16)) if bf16 else nullcontext
    fast = how in ("fast", "nvfp4:fast")
    config = {"fast": WIDE, "nvfp4:fast": BOTH}.get(how, FOUR if four(how) else CONFIG)
    if how == "reduce":
        world.reduce = torch.bfloat16
    recipe = Recipe.read(how.split(":")[0], fast) if four(how) else None
    with rounded(Counter()) as theirs:
        want = once(lambda: alone(config, skew, n, how, cast))
    theirs = once(lambda: theirs)
    many = world.model(
        config,
        bf16=bf16,
        again=budget.again(again),
        change=lambda m: recipe and lowbit.convert(m, recipe),
    )
    assert (
        distance(dict(many.named_parameters()), dict(Nemotron(config).named_parameters())) == 0
    )  # same initialisation
    prepare(many, skew)
    set_paths(many, fast)
    opt, exchange, came, summed, gathered = (
        train.optimiser(many, RUN),
        parallel.exchange,
        [],
        [],
        [],
    )

    def noting(c, token, count, meet, *more):
        def met(rows, count, part):
            came.append(len(rows))
            return meet(rows, count, part)

        return exchange(c, token, count, met, *more)

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
        with rounded(Counter()) as ours:
            got = (
                *steps(many, opt, world, n, noted=how != "loads", how=how, cast=cast),
                many.state_dict(),
            )
    finally:
        parallel.exchange = exchange
        for name, old in zip(names, kept):
            setattr(dist, name, old)
    mine = lambda x: torch.tensor([float(x) * (r == world.rank) for r in range(world.size)])
    each = lambda x: world.total(mine(x).double()).tolist()  # by rank
    t = (targets(how).shape[1] - 1) // (world.slice.size if world.slice else 1)
    asked = [
        world.rows(x, 0)[0][:, 1:] for x in targets(how).chunk(world.shares)[world.place].split(1)
    ]
    found = dict(
        apart(got, want, bf16),
        rows=each(sum(came)),
        targets=each(float(sum(x[:, :t].sum() for x in asked))),
    )
    if how == "reduce":
        found["summed"] = kinds(summed)
    if recipe:
        found["codes"] = codes(ours, theirs)
    if bf16:
        found.update(
            rounding=apart(once(lambda: alone(config, skew, n, how, nullcontext)), want, True),
            summed=kinds(summed),
            gathered=kinds(gathered),
            weights=kinds(many.parameters()),
            gradients=kinds(got[1].values()),
            moments=kinds(m for s in opt.state.values() for m in s.values()),
        )
    return found


AGAIN = {"0": "", "1": "all"}


def main():
    for line in sys.argv[1:]:
        ep, cp, skew, again, how = line.split(",")
        world, broken = (
            parallel.World(int(ep), int(cp)),
            how not in ("", "uneven", "bf16", "fast", "reduce", "abort", "nvfp4:fast", *FORMATS)
            and how,
        )
        restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if how == "abort" and world.rank and not restarts:
            os.abort()
        keep = (
            {
                k: getattr(slices.Slice, k)
                for k in ("shift", "conv", "scan", "attend", "whole_sequence", "largest", "numbers")
            }
            if broken
            else {}
        )
        if broken == "halo":
            slices.Slice.conv = lambda self, *a, **k: slices.mamba.causal_conv(*a, **k)
        elif broken == "state":
            slices.Slice.scan = lambda self, *a, **k: slices.mamba.ssd_chunked(*a, **k)
        elif broken == "keys":
            slices.Slice.attend = lambda self, *a: slices.attend(*a)
        elif broken == "balance":
            slices.Slice.whole_sequence = lambda self, count, t: (count, t)
        elif broken == "nvfp4:largest":
            slices.Slice.largest = lambda self, amax: amax
        elif broken == "nvfp4:numbers":
            slices.Slice.numbers = lambda self, b, t, device: torch.arange(b * t)
        exchange, rows, policy = (
            parallel.exchange,
            parallel.World.rows,
            parallel.MixedPrecisionPolicy,
        )
        parts = parallel.World.together
        if broken == "nvfp4:parts":
            parallel.World.together = lambda self: ([self.place], [self.ep])
        if broken == "dispatch":
            parallel.exchange = lambda c, token, count, meet, group, parts: meet(
                c.index_select(0, token), count.view(group.size(), -1).sum(0), 0
            )
        elif broken == "targets":
            parallel.World.rows = lambda self, ids, depths: (
                lambda i, m, t, docs: (i[:, : t + 1], m[:, :t], t, docs)
            )(*rows(self, ids, depths))
        elif broken == "narrow":
            parallel.MixedPrecisionPolicy = lambda kind, reduced, **more: policy(kind, kind, **more)
        n = (
            2 if broken else dict.fromkeys(FORMATS, 3).get(how, 1 if "fast" in how else 5)
        )  # the interpreter takes its time
        n = min(n, 3) if world.size > 2 else n  # and so do many ranks on two cores
        again = AGAIN.get(again, again.replace("+", ","))
        with exact.arithmetic() if four(how) and not fp4mm else nullcontext():
            result = compare(world, int(skew), again, n, how)
        for k, f in keep.items():
            setattr(slices.Slice, k, f)
        parallel.World.together = parts
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
