"""
Calibration: which scale for each 16 weights, from a few batches of text.

The text is run once, unquantised, and of every matrix are kept the largest input and H = x^T x, the
inputs' correlations: whoever changes w by e changes the outputs' square by e H e^T. Then

    max      s_b = amax_b / 6                          nothing is cut off
    mse      that of 126 which moves the block least   min |e_b|^2
    output   that of 126 which moves the output least  min e_b H_bb e_b^T, each block by itself
    gptq     mse's scales; then codes, column by column, each time correcting the columns to come
             for the error made, by H^-1

An expert that no token chose has no H: it falls back to mse. FP8 needs no search: s = amax / 448.

Letters   o outputs  i inputs  E experts, a plain matrix is one  m rows
Not here  which format for which matrix: autoquant.py. Layer by layer: layerwise.py
Sources   arXiv:2604.12374 section 4; 2210.17323 (GPTQ); Model Optimizer: `max`, `mse` and FP8 bit
          for bit, its local_hessian is `output`
Departs   GPTQ damps by 0.01 of H's mean diagonal and keeps the columns' order
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn

import latent_moe
import nvfp4
from quant import packed

METHODS = ("max", "mse", "output", "gptq")


# 1. What calibration hears.


def units(model):
    """{unit: its modules}, of the backbone, in its order: what shares a format.

    q, k and v read the same input and are one unit; a layer's experts, up and down, are one, by the
    name of their module.
    """
    found = {}
    for i, block in enumerate(model.backbone.layers):
        found |= of_block(block, f"backbone.layers.{i}")
    return found


def of_block(block, prefix):
    """The units of one layer, its modules named below `prefix`."""
    found = {}
    for name, m in block.named_modules(prefix=prefix):
        leaf = name.rpartition(".")[2]
        if isinstance(m, latent_moe.Experts):
            found[name] = [name]
        elif isinstance(m, nn.Linear) and ".mixer." in name:
            unit = (
                name.replace(f".{leaf}", ".qkv") if leaf in ("q_proj", "k_proj", "v_proj") else name
            )
            found.setdefault(unit, []).append(name)
    return found


def inside(block, prefix, name):
    """The module that the whole model calls `name`."""
    return block.get_submodule(name.removeprefix(prefix + "."))


def matrices(block, prefix, modules):
    """{name: weight (E, o, i)} of some modules; of experts both stacks."""
    found = {}
    for n in modules:
        m = inside(block, prefix, n)
        if isinstance(m, latent_moe.Experts):
            found |= {f"{n}.{p}": getattr(m, p) for p in ("up_proj", "down_proj")}
        else:
            found[n] = m.weight[None]
    return found


class Stats:
    """Of one matrix's inputs: amax (), their number (E,), and H (E, i, i) if it is wanted."""

    def __init__(self, E, i, correlate):
        self.amax, self.count = torch.zeros(()), torch.zeros(E)
        self.H = torch.zeros(E, i, i) if correlate else None

    def add(self, x, e):
        if len(x):
            self.amax = torch.maximum(self.amax, x.abs().max())
            self.count[e] += len(x)
            if self.H is not None:
                self.H[e] += x.T @ x


@contextmanager
def listening(block, prefix, stats, correlate=True):
    """While it lasts, what a layer's matrices read goes to stats {matrix: Stats}; of k and v, too,
    what they give, as `X.out`.
    """
    hooks, stacks = [], []

    def hear(name, x, e=0, E=1):
        if name not in stats:
            stats[name] = Stats(E, x.shape[-1], correlate and not name.endswith(".out"))
        stats[name].add(x.detach().flatten(0, -2).float(), e)

    def hear_experts(m, n):
        def mm(x, w, count):
            proj = "up_proj" if w is m.up_proj else "down_proj"
            for e, rows in enumerate(x.split(count.tolist())):
                hear(f"{n}.{proj}", rows, e, len(w))
            return latent_moe.grouped_mm(x, w, count)

        return mm

    for n in (n for names in of_block(block, prefix).values() for n in names):
        m = inside(block, prefix, n)
        if isinstance(m, latent_moe.Experts):
            m.mm = hear_experts(m, n)
            stacks.append(m)
        else:
            hooks.append(m.register_forward_pre_hook(lambda m, a, n=n: hear(n, a[0])))
            if n.endswith(("k_proj", "v_proj")):
                hooks.append(m.register_forward_hook(lambda m, a, y, n=n: hear(f"{n}.out", y)))
    try:
        yield stats
    finally:
        for h in hooks:
            h.remove()
        for m in stacks:
            m.mm = latent_moe.grouped_mm


@torch.no_grad()
def calibrate(model, batches, correlate=True):
    """Token batches (b, t) through a whole model -> {matrix: Stats}."""
    packed.refuse(model, "calibration")
    stats = {}
    model.eval()
    for ids in batches:
        x = model.backbone.embeddings(ids)
        for i, block in enumerate(model.backbone.layers):
            with listening(block, f"backbone.layers.{i}", stats, correlate):
                x = block(x)
    return stats


# 2. Scales and codes of one stack of matrices.


def scales(w, method, H=None):
    """w (E, o, i) -> s (E, o, i/16) fp32 on E4M3's grid, two (E, 1, 1)."""
    x, amax = w.unflatten(-1, (-1, 16)), w.abs().amax((1, 2), keepdim=True)  # (E, o, i/16, 16)
    two = amax / 2688
    if method == "max":
        return nvfp4.block_scale(x.abs().amax(-1) / (6 * two)).float(), two
    if method == "mse":
        return nvfp4.search(x, amax, lambda e: e.square().sum(-1)), two
    n = x.shape[2]  # H_bb of every block
    own = torch.stack([H[:, 16 * b : 16 * b + 16, 16 * b : 16 * b + 16] for b in range(n)], 1)
    return nvfp4.search(x, amax, lambda e: torch.einsum("eobi,ebij,eobj->eob", e, own, e)), two


def gptq(w, s, two, H, damp=0.01, run=64):
    """w (o, i) -> (o, i) on the grid of its scales: each column rounded, its error spread over the
    columns to come.

    `run` columns are finished before the rest hears of them: the same sums, in one product.
    """
    w, i = w.clone(), w.shape[1]
    sigma = (s * two).repeat_interleave(16, 1)  # (o, i)
    H = H + damp * H.diagonal().mean().clamp(min=1e-20) * torch.eye(i)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    q = torch.empty_like(w)
    for a in range(0, i, run):
        b = min(a + run, i)
        error = torch.zeros(len(w), b - a)
        for c in range(a, b):
            q[:, c] = nvfp4.to_grid(w[:, c] / sigma[:, c]) * sigma[:, c]
            error[:, c - a] = (w[:, c] - q[:, c]) / U[c, c]
            w[:, c:b] -= error[:, c - a, None] * U[c, c:b]
        w[:, b:] -= error @ U[a:b, b:]
    return q


def encode(w, kind, method="mse", H=None):
    """w (E, o, i) -> its packed tensors {weight: (E, ...), ...}, without input_scale.

    A matrix of zeros gets codes and scales of zeros' own: nothing is NaN.
    """
    if kind not in packed.KINDS or method not in METHODS:
        raise ValueError(f"{kind} by {method}: {', '.join(packed.KINDS)} by {', '.join(METHODS)}")
    if w.ndim != 3 or not w.numel() or not nvfp4.wide(w) or not w.float().isfinite().all():
        raise ValueError(f"matrices {tuple(w.shape)}, {w.dtype}: (E, o, i) of finite numbers")
    w = w.detach().float()
    if H is None and method in ("output", "gptq"):
        raise ValueError(f"{method} needs H, the inputs' correlations")
    square = (len(w), w.shape[2], w.shape[2])
    if H is not None and (H.shape != square or not H.isfinite().all()):
        raise ValueError(f"H is {tuple(H.shape)} beside matrices {tuple(w.shape)}, or not finite")
    if kind == "FP8":
        low = w.bfloat16()  # a BF16 weight's quotient is rounded to BF16, as in the release
        exact = torch.equal(low.float(), w)
        each = [nvfp4.export_fp8(x) if x.any() else blank(x) for x in (low if exact else w)]
        return dict(
            weight=torch.stack([q for q, _ in each]), weight_scale=torch.stack([s for _, s in each])
        )
    if w.shape[-1] % 16:
        raise ValueError(f"a matrix of {tuple(w.shape[1:])}: NVFP4 wants rows of a multiple of 16")
    idle = torch.ones(len(w), dtype=torch.bool)
    if method in ("output", "gptq"):
        idle = H.diagonal(dim1=1, dim2=2).sum(1) == 0
    live = w.abs().amax((1, 2)) / 2688 > 0  # of what is as good as zero, no scale is left
    first = method if method in ("max", "mse") else "mse"
    s, two = torch.ones(*w.shape[:2], w.shape[2] // 16), torch.zeros(len(w), 1, 1)
    for some, how in ((live & idle, first), (live & ~idle, "mse" if method == "gptq" else method)):
        if some.any():
            s[some], two[some] = scales(w[some], how, None if H is None else H[some])
    x = w
    if method == "gptq":
        x = torch.stack(
            [
                gptq(w[e], s[e], two[e, 0], H[e]) if live[e] and not idle[e] else w[e]
                for e in range(len(w))
            ]
        )
    sigma = torch.where(two == 0, 1, s * two)[..., None]
    q = nvfp4.to_grid(x.unflatten(-1, (-1, 16)) / sigma).flatten(-2)
    codes = nvfp4.pack(q.flatten(0, 1), (x < 0).flatten(0, 1)).view(*w.shape[:2], -1)
    return dict(weight=codes, weight_scale=s.to(torch.float8_e4m3fn), weight_scale_2=two[:, 0, 0])


def blank(x):
    return torch.zeros(x.shape, dtype=torch.float8_e4m3fn), torch.zeros(())


def input_scale(kind, amax):
    """From the largest input of calibration; of a matrix that read nothing, some number."""
    return amax.clamp(min=1e-12) / (448 if kind == "FP8" else 2688)


# 3. A layer, and a model, in packed matrices.


@torch.no_grad()
def pack_block(block, prefix, plan, stats, method="mse", cache=True):
    """Packs a layer in place as plan {unit: kind or None} says; returns it. cache: FP8 k and v.

    All experts of a layer share one input_scale for each of their two matrices.
    """
    table = of_block(block, prefix)
    kinds = {n: plan[u] for u, names in table.items() if plan.get(u) for n in names}
    made = {n: encoded(block, prefix, n, kind, stats, method) for n, kind in kinds.items()}
    kv = [n.removesuffix(".k_proj") for names in table.values() for n in names if "k_proj" in n]
    short = lambda n: n.removeprefix(prefix + ".")
    packed.swap(block, {short(n): k for n, k in kinds.items()}, map(short, kv if cache else ()))
    for tensors in made.values():
        for name, t in tensors.items():
            owner, _, leaf = name.rpartition(".")
            getattr(inside(block, prefix, owner), leaf).copy_(t)
    for n in kv if cache else ():
        for x in "kv":
            proj = inside(block, prefix, f"{n}.{x}_proj")
            getattr(proj, f"{x}_scale").copy_(input_scale("FP8", stats[f"{n}.{x}_proj.out"].amax))
    return block


def encoded(block, prefix, module, kind, stats, method):
    """{name: tensor} of one module in its format; of experts both stacks."""
    found = {}
    for name, w in matrices(block, prefix, [module]).items():
        H = stats[name].H if name in stats else None
        how = "mse" if H is None and method in ("output", "gptq") else method
        tensors = encode(w, kind, how, H)
        plain = not module.endswith(".experts")
        found |= {f"{name}.{k}": v[0] if plain else v for k, v in tensors.items()}
        if kind != "W4A16_NVFP4":
            amax = stats[name].amax if name in stats else torch.zeros(())
            found[f"{name}.input_scale"] = input_scale(kind, amax)
    return found


def quantize(model, plan, stats, method="mse", cache=True):
    """A packed copy of a model: plan {unit: kind or None}, stats from `calibrate`."""
    packed.refuse(model, "quantising")
    model = copy.deepcopy(model).eval()
    for i, block in enumerate(model.backbone.layers):
        pack_block(block, f"backbone.layers.{i}", plan, stats, method, cache)
    return model
