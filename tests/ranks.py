"""Run by torchrun from test_parallel.py: N processes against one, everything compared; a piece broken by its name."""
import json
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import latent_moe
import mtp
import parallel
import train
from model import Config, Nemotron, init_weights

torch.set_num_threads(1)
parallel.ROWS = 5                                                            # of 32 and fewer: the last piece is short
CONFIG = Config(hybrid_override_pattern="M*E", vocab_size=40, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=8, n_groups=2, chunk_size=4, n_routed_experts=8,
                num_experts_per_tok=2, moe_latent_size=8, moe_intermediate_size=8, moe_shared_expert_intermediate_size=16,
                intermediate_size=16, initializer_range=0.2)
RUN = train.Run(batch=4, length=32, lr=1e-3, mtp_loss=0.3, balance=1e-2)


def whole(x):
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


@torch.no_grad()
def prepare(model, skew):
    """Slow decay, so that S matters at the edges; and, if asked, two experts that everybody chooses."""
    for name, p in model.state_dict().items():
        p = parallel.local(p)
        if name.endswith("A_log"):
            p.fill_(-4.0)
        if name.endswith("dt_bias"):
            p.fill_(0.0)
        if name.endswith("correction_bias") and skew:
            p[:2] += 100.0


def steps(model, opt, world, n, first=0, noted=True):
    """n steps as train.fit takes them -> a list of (losses, balance, norm) and the first step's gradients."""
    out, grads, depths = [], None, CONFIG.mtp_num_layers
    counts = [c * RUN.batch for c in mtp.counts(torch.ones(1, RUN.length, dtype=torch.bool), depths)]
    for step in range(first, first + n):
        ids = torch.randint(40, (RUN.batch, RUN.length + 1), generator=torch.Generator().manual_seed(step))
        if world:
            ids = ids.chunk(world.dp)[world.place]
        pieces = [world.rows(p, depths) if world else (p,) for p in ids.split(1)]
        nats, even = train.backward(model, pieces, counts, RUN, nullcontext)
        if world:
            *nats, even = world.total([*nats, even])
            if noted:
                for moe in latent_moe.layers(model):
                    dist.all_reduce(moe.load)
        grads = grads or {k: whole(p.grad).clone() for k, p in model.named_parameters()}
        norm = world.clip(list(model.parameters()), 1.0) if world else torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        routed = sum(float(moe.load.sum()) for moe in latent_moe.layers(model))     # each token once
        latent_moe.update_bias(model, 1e-3)
        out.append([*nats, even, float(norm), routed])
    return out, grads


def distance(got, want):
    return max(float((whole(got[k]).double() - want[k].double()).norm() / (want[k].double().norm() + 1e-12)) for k in want)


def compare(world, skew, again, n, broken):
    one = Nemotron(CONFIG)
    prepare(one, skew)
    want, grads = steps(one, train.optimiser(one, RUN), None, n)
    many = world.model(CONFIG, again=again)
    assert distance(dict(many.named_parameters()), dict(Nemotron(CONFIG).named_parameters())) == 0      # same initialisation
    prepare(many, skew)
    got, mine = steps(many, train.optimiser(many, RUN), world, n, noted=broken != "loads")
    got, want = torch.tensor(got), torch.tensor(want)
    return dict(first=float(((got[0] - want[0]) / want[0]).abs().max()), loss=float(((got - want) / want).abs().max()),
                grad=distance(mine, grads), end=distance(many.state_dict(), one.state_dict()))


def main():
    for line in sys.argv[1:]:
        ep, cp, skew, again, broken = line.split(",")
        world = parallel.World(int(ep), int(cp))
        keep = {k: getattr(parallel.Slice, k) for k in ("shift", "conv", "scan", "attend", "whole")} if broken else {}
        if broken == "halo":
            parallel.Slice.conv = lambda self, *a, **k: parallel.mamba.causal_conv(*a, **k)
        elif broken == "state":
            parallel.Slice.scan = lambda self, *a, **k: parallel.mamba.ssd_chunked(*a, **k)
        elif broken == "keys":
            parallel.Slice.attend = lambda self, *a: parallel.attend(*a)
        elif broken == "balance":
            parallel.Slice.whole = lambda self, count, t: (count, t)
        exchange, rows = parallel.exchange, parallel.World.rows
        if broken == "dispatch":
            parallel.exchange = lambda rows, count, group: (rows, count.view(group.size(), -1).sum(0), lambda out: out)
        elif broken == "targets":
            parallel.World.rows = lambda self, ids, depths: (lambda i, m, t: (i[:, :t + 1], m[:, :t], t))(*rows(self, ids, depths))
        result = compare(world, int(skew), bool(int(again)), 2 if broken else 5, broken)
        for k, f in keep.items():
            setattr(parallel.Slice, k, f)
        parallel.exchange, parallel.World.rows = exchange, rows
        if world.rank == 0:
            print(json.dumps(dict(case=line, **result)), flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.barrier()
    dist.destroy_process_group()
