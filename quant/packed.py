"""
Weights that stay packed: a released NVFP4 or FP8 matrix, kept as its codes and unpacked where it is
used.

A number of the release is a code and one or two scales, and in memory a matrix needs no more:

    NVFP4   w = e2m1(code) fl(s two)   4.5 bits   weight (o, i/2) uint8, weight_scale (o, i/16) E4M3
                                                  weight_scale_2 ()
    FP8     w = e4m3(code) s           8 bits     weight (o, i) E4M3, weight_scale ()

`Packed` is a Linear that unpacks some of its rows, multiplies by them and goes on to the next.
`Stack` is a layer's experts, of which only those are unpacked that some token chose. Nothing else
of the model notices: names and shapes are the release's.

Serving rounds what goes in as well (W4A4, W8A8), with the tensor scale that calibration stored:

    NVFP4   x -> e2m1(x / (s_b input_scale))   s_b from each 16 of x, by the rule for weights
    FP8     x -> e4m3(x / input_scale)         beyond 448 input_scale: 448 input_scale

`rounded(model)` asks for that, keys and values included. Without it only weights are rounded
(W4A16): what a machine without FP4 units gains from packing is memory.

Letters   o outputs  i inputs  E experts  m rows
Not here  files and their JSON: ondisk.py. Choosing scales and formats: calibrate.py, autoquant.py
Sources   Model Optimizer's dequantize, bit for bit
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import nvfp4
from quant.ondisk import fetch

ROWS = 1 << 20  # numbers unpacked at a time: 4 MB in fp32
FEW = 64  # rows of x, up to which kernels/fp4mm.py's decoding product is the better one
CACHE = ("k_scale", "v_scale")  # stored beside k_proj and v_proj, but not theirs


# 1. Numbers: codes and scales -> fp32, and what serving does to an input.


@functools.cache
def table(kind, device):
    """All numbers that the codes of a byte (NVFP4) or of two (FP8) stand for, two in each entry of
    eight bytes.

    One look-up then moves two numbers. For FP8 a table of 65,536 is four times as fast as
    `.float()`, and for NVFP4 it is slower than one of 256: each the fastest of what was tried.
    """
    if kind == "FP8":
        n = torch.arange(1 << 16)
        one = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        low, high = one[n & 255], one[n >> 8]
    else:
        n, one = torch.arange(256), torch.cat([nvfp4.E2M1, -nvfp4.E2M1])
        low, high = one[n & 15], one[n >> 4]
    return torch.stack([low, high], -1).view(torch.int64).flatten().to(device)


def e4m3_numbers(codes):
    """E4M3 codes (...) -> their numbers (...) in fp32."""
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"codes in {codes.dtype}: E4M3 is read")
    raw = codes.contiguous().view(torch.uint8).flatten()
    if len(raw) % 2 or raw.storage_offset() % 2:
        raw = F.pad(raw, (0, len(raw) % 2))  # a copy: whole pairs, on an even address
    pairs = raw.view(torch.uint16).int()
    numbers = table("FP8", raw.device).index_select(0, pairs).view(torch.float32)
    return numbers[: codes.numel()].view(codes.shape)


def nvfp4_values(codes, scales, two):
    """codes (o, i/2) uint8, scales (o, i/16) E4M3, two () -> (o, i) fp32.

    The scales are multiplied first and rounded, as the release's readers do: (q s) two has another
    last bit.
    """
    if codes.dtype != torch.uint8 or codes.numel() != 8 * scales.numel() or two.numel() != 1:
        raise ValueError(
            f"codes {tuple(codes.shape)}, {codes.dtype}, scales {tuple(scales.shape)} and "
            f"{two.numel()} of all: a scale for 8 bytes"
        )
    s = e4m3_numbers(scales).mul_(two)
    pairs = table("NVFP4", codes.device).index_select(0, codes.flatten().int())
    return pairs.view(torch.float32).view(*scales.shape, 16).mul_(s[..., None]).flatten(1)


def fp8_values(codes, scale):
    """codes (o, i) E4M3, scale () -> (o, i) fp32."""
    return e4m3_numbers(codes).mul_(scale)


def e4m3(x, scale):
    """x as an FP8 tensor with this scale would hold it; beyond 448 scale it saturates."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale


def nvfp4_input(x, scale):
    """x (m, i) as NVFP4 with this tensor scale would hold it: block scales from x, the export's
    rule.
    """
    blocks = x.float().unflatten(-1, (-1, 16))
    s = nvfp4.block_scale(blocks.abs().amax(-1, keepdim=True) / (6 * scale)).float() * scale
    return (nvfp4.to_grid(blocks / s) * s).flatten(-2).to(x.dtype)


# 2. The formats, by Model Optimizer's names.


def nvfp4_tensors(o, i):
    if i % 16:
        raise ValueError(f"a matrix of {o} x {i}: NVFP4 wants rows of a multiple of 16 numbers")
    return dict(
        weight=((o, i // 2), torch.uint8),
        weight_scale=((o, i // 16), torch.float8_e4m3fn),
        weight_scale_2=((), torch.float32),
    )


def fp8_tensors(o, i):
    return dict(weight=((o, i), torch.float8_e4m3fn), weight_scale=((), torch.float32))


INPUT = dict(input_scale=((), torch.float32))


class Kind(NamedTuple):
    bits: float
    tensors: object  # (o, i) -> {name: (shape, dtype)}
    round: object  # (x, input_scale) -> x, or None where inputs are never rounded


KINDS = {
    "NVFP4": Kind(4.5, lambda o, i: nvfp4_tensors(o, i) | INPUT, nvfp4_input),
    "FP8": Kind(8, lambda o, i: fp8_tensors(o, i) | INPUT, e4m3),
    "W4A16_NVFP4": Kind(4.5, nvfp4_tensors, None),
}


def values(kind, t, rows=slice(None)):
    """A matrix's tensors {weight, weight_scale, ...} -> (o, i) fp32, or some of its rows."""
    if kind == "FP8":
        return fp8_values(t["weight"][rows], t["weight_scale"])
    return nvfp4_values(t["weight"][rows], t["weight_scale"][rows], t["weight_scale_2"])


def product(x, kind, t, fast=False):
    """x (m, i) times a packed matrix's transpose -> (m, o), of x's dtype.

    A few rows at a time are unpacked and multiplied, never the whole matrix. The sum is in fp32
    on a CPU, as what was unpacked.
    """
    fast = fast and kind != "FP8" and len(x) <= FEW
    if fast:
        from kernels.fp4mm import decode

        codes = t["weight"], t["weight_scale"], t["weight_scale_2"]
        return decode(x.contiguous(), codes, alpha=t["weight_scale_2"])
    fetch(t)
    o, wide = len(t["weight"]), x.float() if x.device.type == "cpu" else x
    step, y = max(1, ROWS // x.shape[1]) if len(x) <= FEW else o, []
    for r in range(0, o, step):
        w = values(kind, t, slice(r, r + step)).to(wide.dtype)
        y.append(F.linear(wide, w))
    return (y[0] if len(y) == 1 else torch.cat(y, -1)).to(x.dtype)


# 3. The modules.


class Codes(nn.Module):
    """What is packed may move to another device and keeps its dtypes: to a cast, codes look like
    numbers.
    """

    def __init__(self, kind, lead, o, i, device):
        super().__init__()
        self.kind, self.shape = kind, (*lead, o, i)
        self.act = self.fast = False
        for name, (shape, dtype) in KINDS[kind].tensors(o, i).items():
            self.register_buffer(name, torch.empty((*lead, *shape), dtype=dtype, device=device))

    def _apply(self, fn, recurse=True):
        if fn(torch.empty(0)).dtype != torch.float32:
            raise ValueError(
                f"a packed {self.kind} matrix of {tuple(self.shape)} keeps its dtypes: codes "
                f"and scales "
                "cannot be cast; load the checkpoint with the dtype that the rest shall have"
            )
        return super()._apply(fn, recurse)

    def incoming(self, x, t):
        """x as the product reads it: rounded if serving rounds it and somebody asked for that."""
        return KINDS[self.kind].round(x, t["input_scale"]) if self.act and "input_scale" in t else x

    def extra_repr(self):
        return f"{self.kind}, {' x '.join(map(str, self.shape))}"


class Packed(Codes):
    """A linear layer without a bias whose matrix stays in codes.   (..., i) -> (..., o)"""

    def __init__(self, kind, o, i, device=None):
        super().__init__(kind, (), o, i, device)

    def tensors(self):
        return {n: b for n, b in self.named_buffers() if n not in CACHE}

    def forward(self, x):
        t = self.tensors()
        o, i = self.shape
        if x.shape[-1] != i:
            raise ValueError(f"x is {tuple(x.shape)} before a matrix of {o} x {i}")
        rows = self.incoming(x.reshape(-1, i), t)
        return product(rows, self.kind, t, self.fast).view(*x.shape[:-1], o)

    def dense(self):
        """The matrix it stands for, (o, i) fp32."""
        return values(self.kind, self.tensors())


class Stack(Codes):
    """A layer's experts, one of their two matrices: the same tensors with a dimension E in front.

    `loose` instead holds each expert's own tensors, views of the files they came from.
    """

    def __init__(self, kind, E, o, i, device=None):
        super().__init__(kind, (E,), o, i, device)
        self.loose = None

    def __len__(self):
        return self.shape[0]

    def tensors(self, e):
        return self.loose[e] if self.loose else {n: b[e] for n, b in self.named_buffers()}

    def dense(self):
        """All matrices it stands for, (E, o, i) fp32."""
        return torch.stack([values(self.kind, self.tensors(e)) for e in range(len(self))])


def mm(x, w, count):
    """For latent_moe's seam: rows x (m, i) by expert, count (E,) of each, w a Stack -> (m, o).

    Unpacks the experts that got a row, and no other.
    """
    out, at, each = x.new_empty(len(x), w.shape[1]), 0, count.tolist()
    if len(each) != len(w) or sum(each) != len(x) or min(each) < 0:
        raise ValueError(f"{len(x)} rows for {len(w)} experts, of which count has {each}")
    for e, n in enumerate(each):
        if n:
            t = w.tensors(e)
            rows = w.incoming(x[at : at + n], t)
            out[at : at + n] = product(rows, w.kind, t, w.fast)
            at += n
    return out


mm.fast = True  # with Stack.fast it goes through kernels/fp4mm.py: latent_moe.Experts asks


# 4. A model with packed matrices in it.


def swap(model, plan, kv=()):
    """Puts packed modules, still empty, where plan {module: kind} says; returns the model.

    `backbone.layers.1.mixer.experts` is both of a layer's stacks. kv: attention layers whose keys
    and values are kept in FP8. Works on the meta device.
    """
    there = dict(model.named_modules())
    for name, kind in plan.items():
        parent, _, child = name.rpartition(".")
        stacks, one = name.endswith(".experts"), there.get(name)
        if not (hasattr(one, "up_proj") if stacks else isinstance(one, nn.Linear)):
            raise ValueError(f"{name} cannot be {kind}: the model has no such matrix")
        if stacks:
            for proj in ("up_proj", "down_proj"):
                p = getattr(one, proj)
                delattr(one, proj)
                setattr(one, proj, Stack(kind, *p.shape, device=p.device))
            one.mm = mm
        else:
            w = one.weight
            setattr(model.get_submodule(parent), child, Packed(kind, *w.shape, device=w.device))
    for name in kv:
        if not hasattr(there.get(name), "k_proj"):
            raise ValueError(f"{name} cannot keep keys in FP8: the model has no attention there")
        for x in "kv":
            proj = model.get_submodule(f"{name}.{x}_proj")
            proj.register_buffer(f"{x}_scale", torch.ones((), device=proj.weight.device))
    return model


def plan(model):
    """What `swap` was told of this model: {module: kind}, [attention layers with an FP8 cache]."""
    found, kv = {}, []
    for name, m in model.named_modules():
        if isinstance(m, (Packed, Stack)):
            found[name.rpartition(".")[0] if isinstance(m, Stack) else name] = m.kind
        if "k_scale" in m._buffers:
            kv.append(name.rpartition(".")[0])
    return found, kv


def refuse(model, what):
    """One sentence for those who need numbers that can change: `what` cannot take a packed
    model.
    """
    if found := plan(model)[0]:
        kinds = " and ".join(sorted(set(found.values())))
        raise ValueError(
            f"{what}: {len(found)} modules of this model are packed ({kinds}; first "
            f"{next(iter(found))}), and codes cannot be trained, converted or cut up; take the "
            "checkpoint that is not quantised"
        )


def scales(m):
    """(name, scale) of what a module rounds as serving does: inputs, keys and values."""
    for tensors in [m._buffers, *(getattr(m, "loose", None) or ())]:
        for name in ("input_scale", *CACHE):
            if tensors.get(name) is not None:
                yield name, tensors[name]


def rounded(model, on=True):
    """Whether inputs, keys and values are rounded as in serving (W4A4, W8A8), or not (W4A16)."""
    for name, m in model.named_modules():
        for leaf, scale in scales(m) if on else ():
            if not ((scale > 0) & scale.isfinite()).all():
                raise ValueError(f"{name}: its {leaf} is not above 0, so nothing can be rounded")
        if isinstance(m, Codes):
            m.act = on
        if hasattr(m, "round_cache"):
            m.round_cache = on
    return model


def empty(model):
    """Takes the packed modules' tensors away: `put` then gives them views of a file."""
    for m in model.modules():
        if isinstance(m, Stack):
            m.loose = [{} for _ in range(len(m))]
        if isinstance(m, Codes):
            m._buffers = {n: b for n, b in m._buffers.items() if n in CACHE}


def put(model, name, tensor):
    """Gives one tensor, by its released name, to the packed module it belongs to."""
    owner, _, leaf = name.rpartition(".")
    layer, routed, expert = owner.partition(".experts.")
    if routed:
        e, proj = expert.split(".")
        model.get_submodule(f"{layer}.experts.{proj}").loose[int(e)][leaf] = tensor
    else:
        model.get_submodule(owner)._buffers[leaf] = tensor


def loose(model):
    """{released name: view} of the experts whose tensors were left in their files."""
    return {
        f"{name.rpartition('.')[0]}.{e}.{name.rpartition('.')[2]}.{leaf}": t
        for name, m in model.named_modules()
        if isinstance(m, Stack) and m.loose
        for e, tensors in enumerate(m.loose)
        for leaf, t in tensors.items()
    }


def nbytes(model):
    """Bytes of all that the model holds in memory or maps."""
    held = [*model.parameters(), *model.buffers(), *loose(model).values()]
    return sum(t.numel() * t.element_size() for t in held if t.device.type != "meta")
