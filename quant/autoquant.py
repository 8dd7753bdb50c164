"""
AutoQuantize: which format for which matrix, under a budget of bits.

What unit u costs in format f is guessed from one backward pass, with the Fisher information's
diagonal, and a knapsack spends the bits:

    score_uf = sum over outputs y of u of (dL/dy (y_f - y))^2     L summed nll of the text, m tokens
    KL       ~ score / 2m     min sum of score_uf  s.t.  sum of bits_f numel_u <= bits sum numel_u

y_f is worked out beside y, from the same unrounded input, with weight and input of this unit alone
in format f. `assign` is exact while its table fits, over multiples of the greatest common divisor
of all costs. More bits never score worse. The router, conv, norms, embedding, head and MTP are
never touched.

Letters   u unit  f format
Not here  scales within a format: calibrate.py. The command: ptq.py
Sources   arXiv:2604.12374 section 4.2 and appendix B.2; Model Optimizer's auto_quantize
"""

import math
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

import latent_moe
from quant import calibrate, packed

BITS = {"NVFP4": 4.5, "FP8": 8, None: 16}
MAPS = ("released", "nvfp4", "fp8", "bf16")
ENTRIES = 1 << 22  # of the knapsack's table, beyond which costs are rounded up to a coarser unit


def formats(weights):
    """What matrices {name: (E, o, i)} can be stored in."""
    four = all(w.shape[-1] % 16 == 0 for w in weights.values())
    return ("NVFP4", "FP8") if four else ("FP8",)


class Beside(nn.Module):
    """A module in another format, run on what the module itself reads."""

    def __init__(self, block, prefix, name, kind, stats, method):
        super().__init__()
        m = calibrate.inside(block, prefix, name)
        tensors = calibrate.encoded(block, prefix, name, kind, stats, method)
        if isinstance(m, latent_moe.Experts):
            self.low = latent_moe.Experts(1, 1, 1)
            self.low.mm = packed.mm
            for p in ("up_proj", "down_proj"):
                w = getattr(m, p)
                delattr(self.low, p)
                setattr(self.low, p, packed.Stack(kind, *w.shape))
        else:
            self.low = packed.Packed(kind, *m.weight.shape)
        for key, t in tensors.items():
            self.low.get_buffer(key.removeprefix(name + ".")).copy_(t)
        packed.rounded(self.low)

    def forward(self, *args):
        return self.low(*args)


@contextmanager
def judging(block, prefix, stats, score, method="mse"):
    """While it lasts, forward and backward passes through a layer add to score {unit: {format:
    ...}}.

    Experts are judged by what their layer puts into the stream, behind the latent projection.
    """
    hooks = []

    def watch(name, unit, low):
        m = calibrate.inside(block, prefix, name)
        stack = isinstance(m, latent_moe.Experts)
        layer = calibrate.inside(block, prefix, name.rpartition(".")[0]) if stack else None
        moved = {}

        def forward(m, args, y):
            with torch.no_grad():
                d = {f: q(*args) - y for f, q in low.items()}
                if stack and isinstance(layer.fc2_latent_proj, nn.Linear):
                    d = {f: F.linear(v, layer.fc2_latent_proj.weight) for f, v in d.items()}
            moved["d"] = d
            if not stack:
                listen(d, y)

        def listen(d, y):
            def judge(g):
                for f, v in d.items():
                    score[unit][f] += float((g.reshape(v.shape) * v).double().square().sum())

            y.register_hook(judge)

        hooks.append(m.register_forward_hook(forward))
        if stack:
            hooks.append(layer.register_forward_hook(lambda m, a, y: listen(moved["d"], y)))

    for unit, names in calibrate.of_block(block, prefix).items():
        kinds = formats(calibrate.matrices(block, prefix, names))
        score.setdefault(unit, dict.fromkeys(kinds, 0.0))
        for n in names:
            watch(n, unit, {f: Beside(block, prefix, n, f, stats, method) for f in kinds})
    try:
        yield score
    finally:
        for h in hooks:
            h.remove()


def settled(score):
    """Scores with more bits never worse, and none for a unit left as it is."""
    found = {}
    for u, s in score.items():
        least, found[u] = math.inf, {}
        for f in sorted(s, key=BITS.get):
            least = found[u][f] = min(s[f], least)
        found[u][None] = 0.0
    return found


def sensitivity(model, batches, stats, loss, method="mse"):
    """{unit: {format: score}} of a whole model. loss(model, ids) -> summed nll."""
    model.eval()
    score = {}
    with ExitStack() as all:
        for i, block in enumerate(model.backbone.layers):
            all.enter_context(judging(block, f"backbone.layers.{i}", stats, score, method))
        for ids in batches:
            loss(model, ids).backward()
            model.zero_grad(set_to_none=True)
    return settled(score)


def assign(score, sizes, bits):
    """The plan {unit: format} of least total score whose mean bits over all sizes {unit: numel} are
    at most `bits`.

    Exact, as long as the table has at most ENTRIES entries; beyond, costs are rounded up to the
    unit that fits, so that the budget still holds.
    """
    if not score or not all(math.isfinite(x) for s in score.values() for x in s.values()):
        raise ValueError("no units to choose for, or a score that is not a finite number")
    if wrong := [u for u, s in score.items() if not (s and s.keys() <= BITS.keys())]:
        raise ValueError(f"{wrong[0]} has scores of {list(score[wrong[0]])}: formats are {[*BITS]}")
    if wrong := [u for u in score if type(sizes.get(u)) is not int or sizes[u] < 1]:
        raise ValueError(f"{wrong[0]} has {sizes.get(wrong[0])} weights: an integer above 0")
    if not 0 < bits < math.inf:
        raise ValueError(f"{bits} bits a weight: above 0, and finite")
    cost = {u: {f: round(2 * BITS[f]) * sizes[u] for f in s} for u, s in score.items()}  # half bits
    budget = int(2 * bits * sum(sizes[u] for u in score))
    step = math.gcd(*(c for cs in cost.values() for c in cs.values()))
    step *= max(1, -(-(budget // step) // ENTRIES))
    room = budget // step
    best = torch.zeros(room + 1, dtype=torch.float64)
    choice = torch.empty(len(score), room // 4 + 1, dtype=torch.uint8)
    for i, s in enumerate(score.values()):
        u, options = list(score)[i], list(s)
        rows = torch.full((len(options), room + 1), math.inf, dtype=torch.float64)
        for j, f in enumerate(options):
            c = -(-cost[u][f] // step)
            if c <= room:
                rows[j, c:] = best[: room + 1 - c] + s[f]
        best, pick = rows.min(0)
        choice[i] = squeezed(pick)
    if best[room].isinf():
        least = sum(min(c.values()) for c in cost.values()) / 2 / sum(sizes[u] for u in score)
        raise ValueError(f"{bits} bits a weight are too few: the cheapest formats need {least:.4g}")
    plan, at = {}, room
    for u, pick in reversed(list(zip(score, choice))):
        plan[u] = list(score[u])[int(pick[at // 4]) >> 2 * (at % 4) & 3]
        at -= -(-cost[u][plan[u]] // step)
    return dict(reversed(plan.items()))


def squeezed(pick):
    """Numbers 0 to 3 -> four a byte: the table of choices is by far the largest thing here."""
    four = F.pad(pick.to(torch.uint8), (0, -len(pick) % 4)).view(-1, 4)
    return four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6


def mean_bits(plan, sizes):
    return sum(BITS[plan[u]] * n for u, n in sizes.items()) / sum(sizes.values())


def named(name, kinds):
    """A fixed map by name, for units {unit: formats it can have}: `released` is the release in
    spirit.

    Routed experts NVFP4, shared experts and Mamba FP8, the rest as it is.
    """
    if name not in MAPS:
        raise ValueError(f"map {name!r}: choose {', '.join(MAPS)}")
    rules = dict(nvfp4=lambda u: "NVFP4", fp8=lambda u: "FP8", bf16=lambda u: None)

    def released(u):
        if u.endswith(".experts"):
            return "NVFP4"
        return "FP8" if "shared_experts" in u or u.endswith(("in_proj", "out_proj")) else None

    plan = {u: rules.get(name, released)(u) for u in kinds}
    for u, kind in plan.items():
        if kind and kind not in kinds[u]:
            raise ValueError(
                f"map {name}: {u} has rows of no multiple of 16 numbers, not for {kind}"
            )
    return plan
