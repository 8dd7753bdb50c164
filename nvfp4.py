"""
NVFP4: numbers of four bits that share their scales, and how to train with them.

Four bits spell sixteen numbers, E2M1: +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}. Two scales put them where a tensor lives:
one of 8 bits (E4M3) for every 16 neighbours and one of 32 bits for the whole tensor, so 4.5 bits a number.

    x ~ q s_b amax/2688       q one of the sixteen, s_b one of E4M3's 127, 2688 = 6 * 448, the largest of each
    S = 2688/amax             s_b = E4M3(amax_b S/6)              q = E2M1(x / (s_b/S))

A linear layer y = x w^T is three products, and in training all three take four-bit operands. The 16 neighbours lie
along the sum of the product, so x and dy are quantised twice, along the row and down the column:

    y  = x w^T     x 1x16                      w 16x16: a tile and its transpose are one thing, so that
    dx = dy w      dy 1x16, stochastic         dx is the gradient of the y that was computed
    dw = dy^T x    both 16x1, each run of 16 tokens rotated by R first; dy again stochastic

  2d    tiles for w, without which forward and backward would use two different weights
  rht   R = diag(signs) H/4, H Hadamard's matrix: spreads an outlier over its run; R R^T = I, so dw does not notice
  sr    rounding dy up as often as it is near the upper neighbour: errors average out instead of adding up
  last  the last 15 % of the layers stay in high precision, with all that is small or feeds attention (`chosen`)

Master weights, their gradients and the optimiser stay in fp32. Here four bits are emulated: operands are rounded to
q s_b, every product of two is exact, sums are fp32, alpha = amax amax'/2688^2 multiplies the result.

Letters   m rows (tokens)  o outputs  i inputs  E experts, a plain linear is one; blocks [m/a, a, k/b, b] of a x b
Sources   arXiv:2509.25149 (format, recipe), 2604.12374 section 2.2 (which layers); TransformerEngine's order of fp32
          operations, bit for bit; Model Optimizer's rule for `export_weight`; OCP MX 1.0 for the MX formats
Departs   sizes that are no multiple of 16 are padded with zeros, where TransformerEngine refuses; the random bytes are
          PyTorch's; on CUDA the emulated products of stacked experts are rounded to bf16 before alpha
Not here  speed where the silicon has it: kernels/fp4.py, the same products from codes, with fast=True
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])                             # code + 8 is the negative
BIG = torch.finfo(torch.float32).max
SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]           # one fixed draw, for all layers


class NVFP4(NamedTuple):
    """codes (M, K/2) uint8, even column in the low nibble; scales (M, K/16) E4M3; amax (1,) fp32."""
    codes: torch.Tensor
    scales: torch.Tensor
    amax: torch.Tensor


# 1. The format.

def binade(y):
    """2^floor(log2 |y|), at least 1 and at most 4: twice the distance between E2M1's numbers around y."""
    return (y.view(torch.int32) & 0x7F800000).clamp_(0x3F800000, 0x40800000).view(torch.float32)


def to_grid(y, noise=None):
    """fp32 -> the nearest of E2M1's numbers, ties to the even code, |y| > 6 to 6; y is overwritten.

    With noise (bytes): up with the probability of y's place between its neighbours, in 256ths rounded down.
    """
    y.clamp_(-6, 6)
    if noise is None:
        magic = binade(y).mul_(1.5 * 2 ** 22)                                # the sum has no bits below the grid
        return y.add_(magic).sub_(magic)
    t = noise.float().mul_(1 / 512).mul_(binade(y)).add_(y.abs())            # |y| + noise/256 of a step, exact but once
    step = binade(t).mul_(.5)
    return t.div_(step).floor_().mul_(step).copysign_(y)


def scales(amax, block):
    """The two scales of blocks with largest magnitude `block` -> s_b, and what multiplies x. fp32, in this order."""
    S = (torch.full_like(amax, 2688) / amax).clamp(max=BIG)
    S = torch.where((amax == 0) | (S == 0), 1, S)                            # all zeros; infinity
    s = (block * (S * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn).float()
    return s, (s * S.reciprocal()).reciprocal().clamp(max=BIG)


def blocks(x, tile):                                                         # (m, k) -> (m/a, a, k/b, b)
    return x.view(len(x) // tile[0], tile[0], -1, tile[1])


def encode(x, tile, noise=None, owner=None, experts=1):
    """(m, k) -> q (m, k) on the E2M1 grid, s_b (m/a, 1, k/b, 1) in fp32, amax: (1,), or (E,) by each row's owner."""
    x = blocks(x.float(), tile)
    block = x.abs().amax((1, 3), keepdim=True)
    if owner is None:
        amax = block.max().view(1)
        s, e = scales(amax, block)
    else:
        owner = owner[::tile[0]]
        amax = x.new_zeros(experts).scatter_reduce_(0, owner, block.amax((1, 2, 3)), "amax")
        s, e = scales(amax[owner].view(-1, 1, 1, 1), block)
    return to_grid(x * e, None if noise is None else noise.view(x.shape)), s, amax


def quantize(x, tile=(1, 16), noise=None, fast=False):
    """x (M, K) -> NVFP4, as TransformerEngine does. tile (16, 16) repeats its scale; noise: a random byte each."""
    if x.ndim != 2 or tile not in ((1, 16), (16, 16)) or x.shape[0] % tile[0] or x.shape[1] % 16 or not x.numel():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} does not divide into tiles of {tile}: "
                         "M rows, K columns, tiles (1, 16) or (16, 16)")
    if noise is not None and (noise.shape != x.shape or noise.dtype != torch.uint8):
        raise ValueError(f"noise is {noise.dtype} {tuple(noise.shape)}: a uint8 for each of {tuple(x.shape)}")
    if fast:
        from kernels.fp4 import quantize
        codes, s, amax = quantize(x, tile, noise)
    else:
        q, s, amax = encode(x.contiguous(), tile, noise)
        codes, s = pack(q.view_as(x), x < 0), s.view(-1, x.shape[1] // 16).repeat_interleave(tile[0], 0)
    if amax.isnan():
        raise ValueError(f"{int(x.isnan().sum())} of {x.numel()} elements are NaN; NVFP4 has no code for that")
    return NVFP4(codes, s.to(torch.float8_e4m3fn), amax)


def pack(q, negative):
    """Numbers of the grid and their signs -> two codes a byte, the even column in the low nibble."""
    code = torch.bucketize(q.abs(), E2M1.to(q.device)).to(torch.uint8) | negative.to(torch.uint8) << 3
    return code[:, ::2] | code[:, 1::2] << 4


def unpack(codes):
    """(M, K/2) -> (M, K) fp32, numbers of the grid."""
    code = torch.stack([codes & 15, codes >> 4], -1).flatten(1).int()
    return torch.cat([E2M1, -E2M1]).to(codes.device)[code]


def dequantize(q):
    """NVFP4 -> (M, K) fp32."""
    f = q.scales.float() * q.amax * (1 / 2688)
    return unpack(q.codes) * f.repeat_interleave(16, 1)


def hadamard(x, dim=-1):
    """x R on every 16 of a dimension, of x's own dtype; sums in fp32. dim 0: down the columns of (m, k)."""
    H = torch.ones(1, 1, device=x.device)
    for _ in range(4):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    R = H * H.new_tensor(SIGNS)[:, None] / 4
    if x.dtype == torch.float64:
        R = R.double()
    wide = x.to(R.dtype)
    if dim == 0:
        return (R.T @ wide.view(-1, 16, x.shape[1])).view_as(x).to(x.dtype)
    return (wide.reshape(-1, 16) @ R).view_as(x).to(x.dtype)


def swizzle(s):
    """Scales (M, K/16) -> the flat order Blackwell's tensor cores read: 128 x 4 at a time, padded with zeros."""
    s = F.pad(s.view(torch.uint8), (0, -s.shape[1] % 4, 0, -s.shape[0] % 128))
    tiles = s.view(len(s) // 128, 4, 32, -1, 4)                              # row = 128 r + 32 j + l, column = 4 c + n
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(torch.float8_e4m3fn)  # (r, c, l, j, n)


def export_weight(w, method="max"):
    """Model Optimizer's rule, for released checkpoints: -> weight uint8, weight_scale E4M3, weight_scale_2 fp32.

    mse: each block takes that of E4M3's 126 scales under which its own error is smallest.
    """
    if method not in ("max", "mse"):
        raise ValueError(f"method {method!r}: max or mse")
    if w.ndim != 2 or w.shape[1] % 16 or not w.isfinite().all():
        raise ValueError(f"a weight of shape {tuple(w.shape)}: (N, K) of finite numbers, K a multiple of 16")
    x = w.float().reshape(len(w), -1, 16)
    block, amax = x.abs().amax(-1), x.abs().max()
    two = amax / torch.full_like(amax, 2688)
    def e4m3(t):
        return torch.where(t == 0, 1, t).clamp(2 ** -9, 448).to(torch.float8_e4m3fn)
    def error(s):
        sigma = (s.float() * two)[..., None]
        return (x - to_grid(x / sigma) * sigma).square().sum(-1)
    if not amax:                                                             # there: NaN scales
        return w.new_zeros(len(w), w.shape[1] // 2, dtype=torch.uint8), e4m3(torch.zeros_like(block)), two
    if method == "max":
        s = e4m3(block / (6 * two))
    else:
        s, least = torch.zeros_like(block).to(torch.float8_e4m3fn), torch.full_like(block, math.inf)
        for v in torch.arange(1, 127, dtype=torch.uint8, device=w.device).view(torch.float8_e4m3fn):
            loss = error(v)
            s = torch.where(loss < least, v, s)
            least = torch.minimum(loss, least)
    q = to_grid(x / (s.float() * two)[..., None])
    return pack(q.flatten(1), w < 0), s, two


def export_fp8(w):
    """FP8 by the same rule: -> weight E4M3, weight_scale fp32. The quotient is rounded to w's own dtype first."""
    scale = w.abs().max().float() / torch.tensor(448.)
    return (w / scale).to(torch.float8_e4m3fn), scale


# 2. Its neighbours: 32 numbers share a power of two, nothing is per tensor.

def mx(x, tile, element, noise=None):
    """MXFP4 (scale rounded down, as OCP says) or MXFP8 (up, as TransformerEngine does) -> rounded values, fp32."""
    x = blocks(x.float(), tile)
    block, bits = x.abs().amax((1, 3), keepdim=True), 0x7F800000
    if element == "mxfp4":
        scale = (block.view(torch.int32) & bits).view(torch.float32).clamp(min=2. ** -100) / 4
        return to_grid(x / scale, None if noise is None else noise.view(x.shape)).mul_(scale)
    scale = (block * (1 / 448)).clamp(min=2. ** -100).view(torch.int32).add_(0x7FFFFF) & bits
    scale = scale.view(torch.float32)
    return (x / scale).clamp_(-448, 448).to(torch.float8_e4m3fn).float().mul_(scale)


# 3. Training.

@dataclass(frozen=True)
class Recipe:
    """What is quantised, and how. `Recipe.read("nvfp4-rht-sr")` is the recipe without two of its ingredients."""
    format: str = "nvfp4"                             # or mxfp4, mxfp8
    two_d: bool = True
    rht: bool = True
    sr: bool = True
    last: float = 0.15                                # share of the layers, at the end, in high precision
    fast: bool = False                                # products from codes, by kernels/fp4.py

    def __post_init__(self):
        if self.fast and self.format != "nvfp4":
            raise ValueError(f"four bits with fast=True are nvfp4; {self.format} has no kernel and needs fast=False")

    @staticmethod
    def read(text, fast=False):
        format, *without = text.split("-")
        off = {"2d": dict(two_d=False), "rht": dict(rht=False), "sr": dict(sr=False), "last": dict(last=0.0)}
        wrong = [word for word in without if word not in off] + [format] * (format not in ("nvfp4", "mxfp4", "mxfp8"))
        if wrong:
            raise ValueError(f"--precision {text!r}: choose auto, fp32, bf16, nvfp4, mxfp4 or mxfp8, and what to leave "
                             f"out as in nvfp4-sr: {', '.join(off)}; there is no {wrong[0]!r}")
        recipe = Recipe(format, fast=fast)
        for word in without:
            recipe = replace(recipe, **off[word])
        return recipe.plain() if format == "mxfp8" else recipe

    def plain(self):
        """The same layers in MXFP8, which needs none of the ingredients."""
        return replace(self, format="mxfp8", two_d=False, rht=False, sr=False, fast=False)

    @property
    def size(self):
        return 16 if self.format == "nvfp4" else 32


def random_bytes(x):
    n = x.numel()
    return torch.empty(-(-n // 8), dtype=torch.int64, device=x.device).random_(-2 ** 63, None).view(torch.uint8)[:n]


class Operands:
    """Rounds the two operands of each product as a recipe says, and counts what that flushes to zero."""
    def __init__(self, recipe):
        self.recipe, self.flushed = recipe, None                             # a dict: counting

    def operand(self, name, x, dim, owner, experts):
        """x (m, k), summed over `dim` -> q s_b of the same shape, amax (E,) or None."""
        r, kind = self.recipe, name.split()[1]
        square = r.two_d and kind == "w"
        tile = (r.size, r.size) if square else (1, r.size) if dim else (r.size, 1)
        if r.rht and name in ("wgrad dy", "wgrad x"):
            x = hadamard(x, 0)
        noise = self.noise(name, x)
        if r.format == "nvfp4":
            q, s, amax = encode(x, tile, noise, owner, experts)
            q = q.mul_(s)
        else:
            q, amax = mx(x, tile, r.format, noise), None
        q = q.view(x.shape)
        self.count(name, x, q)
        return q, amax

    def noise(self, name, x):
        """A random byte for each number, if this operand is rounded stochastically."""
        return random_bytes(x).view(x.shape) if self.recipe.sr and name.endswith("dy") else None

    def count(self, name, x, q, s=None):
        """Adds what became 0 of x. With s: q are codes, and x is not rotated yet."""
        if self.flushed is not None:
            if s is not None:
                q = unpack(q) * s.float().repeat_interleave(16, 1)
                x = (hadamard(x) if self.recipe.rht and name.startswith("wgrad") else x).reshape(q.shape)
            counts = torch.stack([((q == 0) & (x != 0)).sum(), (x != 0).sum()])
            self.flushed[name] = self.flushed.get(name, 0) + counts

    def product(self, a, b, ends, owner):
        """alpha a b. a (m, k), b (E, k, n) -> (m, n); or, for dw, a (o, m), b (m, i) -> (E, o, i)."""
        (a, amax), (b, bmax) = a, b
        if a.is_cuda:                                                        # q s_b has six bits: bf16 holds it
            a, b = a.bfloat16(), b.bfloat16()
        if ends is not None:
            y = F.grouped_mm(a, b, offs=ends).float()
        else:
            b = b[0] if b.ndim == 3 else b
            y = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a @ b
        if amax is None:
            return y
        alpha = amax * bmax / 7225344                                        # 2688^2
        return y.mul_(alpha if ends is None else alpha[owner, None] if y.ndim == 2 else alpha[:, None, None])


class QuantizedMM(torch.autograd.Function):
    """Rows x (m, i), of expert `owner` (m,) each, which ends at row `ends` (E,), times w (E, o, i) -> (m, o)."""
    @staticmethod
    def forward(ctx, x, w, owner, ends, how):
        E, o, _ = ctx.shape = w.shape
        rows = None if owner is None else torch.arange(E, device=w.device).repeat_interleave(o)
        a, (b, bmax) = how.operand("fprop x", x, 1, owner, E), how.operand("fprop w", w.flatten(0, 1), 1, rows, E)
        keep = (b, bmax) if how.recipe.two_d else (w, None)                  # tiles: the transpose is the same numbers
        ctx.save_for_backward(x, *keep, owner, ends, rows)
        ctx.how, ctx.dtype = how, w.dtype
        return how.product(a, (b.view_as(w).mT, bmax), ends, owner).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (E, o, i), how, (x, w, wmax, owner, ends, rows) = ctx.shape, ctx.how, ctx.saved_tensors
        if not how.recipe.two_d:
            w, wmax = how.operand("dgrad w", w.flatten(0, 1), 0, rows, E)
        dx = how.product(how.operand("dgrad dy", dy, 1, owner, E), (w.view(E, o, i), wmax), ends, owner)
        a, amax = how.operand("wgrad dy", dy, 0, owner, E)
        dw = how.product((a.mT, amax), how.operand("wgrad x", x, 0, owner, E), ends, owner)
        return dx.to(x.dtype), dw.view(E, o, i).to(ctx.dtype), None, None, None


def whole(x, size):
    """Pads the last two dimensions with zeros to whole blocks."""
    rest = -x.shape[-1] % size, -x.shape[-2] % size
    return F.pad(x, (0, rest[0], 0, rest[1])) if any(rest) else x


def spread(x, count, size):
    """Pads every expert's rows to whole blocks -> rows, where each went, each row's expert, the experts' ends."""
    if count is None:
        return whole(x, size), None, None, None
    blocks = (count + size - 1) // size * size                               # (E,)
    owner = torch.arange(len(count), device=x.device).repeat_interleave(blocks)                  # (m',)
    shift = (blocks - count).cumsum(0) - (blocks - count)                    # zeros in front of each expert
    at = torch.arange(len(x), device=x.device) + shift.repeat_interleave(count)
    x = F.pad(x, (0, -x.shape[1] % size))
    return x.new_zeros(len(owner), x.shape[1]).index_copy_(0, at, x), at, owner, blocks.cumsum(0).int()


def matmul(x, w, count, how):
    """x (m, i), by expert, count (E,) rows of each, times w (E, o, i) -> (m, o), in the dtype autocast would choose.

    count None: E = 1.
    """
    kind, size, fast = x.device.type, how.recipe.size, how.recipe.fast
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        rows, at, owner, ends = spread(x.to(dtype), count, size)             # (m', i')
        product = QuantizedMM
        if fast:
            from kernels.fp4 import Product as product
        y = product.apply(rows, whole(w, size), owner, ends, how)            # (m', o')
        return (y if at is None else y.index_select(0, at))[:len(x), :w.shape[1]]


class Linear(nn.Module):
    """nn.Linear without a bias; the same Parameter, so names, optimiser and checkpoints do not notice."""
    def __init__(self, weight, recipe):
        super().__init__()
        self.weight, self.how = weight, Operands(recipe)

    def forward(self, x):                                                    # (..., i) -> (..., o)
        return matmul(x.flatten(0, -2), self.weight[None], None, self.how).unflatten(0, x.shape[:-1])


class GroupedMM:
    """For latent_moe's seam `mm`: every expert's rows, weights and gradients are tensors with an amax of their own."""
    def __init__(self, recipe):
        self.how, self.fast = Operands(recipe), recipe.fast

    def __call__(self, x, w, count):
        return matmul(x, w, count, self.how)


HIGH = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1_latent_proj", "fc2_latent_proj")


def chosen(name, layers, recipe):
    """Nemotron 3 Super's choice for a matrix, by its name: a Recipe, or None for high precision."""
    parts = name.split(".")
    if parts[:2] != ["backbone", "layers"] or int(parts[2]) >= layers - math.ceil(recipe.last * layers):
        return None                                                          # embedding, head, MTP; the last layers
    if parts[-1] in HIGH:
        return None
    return recipe.plain() if parts[-1] == "out_proj" else recipe             # Mamba's: too much would flush to zero


def convert(model, recipe=Recipe()):
    """Swaps the model's linears and its experts' products in place -> {name: format}, of what was swapped."""
    layers, swapped = len(model.backbone.layers), {}
    for name, m in list(model.named_modules()):
        how = chosen(name, layers, recipe) if name.count(".") > 2 else None
        if how and isinstance(m, nn.Linear):
            if m.bias is not None:
                raise ValueError(f"{name} has a bias; the quantised linear has none")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear(m.weight, how))
        elif how and hasattr(m, "mm"):
            m.mm = GroupedMM(how)
        else:
            continue
        swapped[name] = how.format
    return swapped


def watch(model, on=True):
    """Starts (or stops) counting what each operand's rounding flushes to zero."""
    for how in counters(model):
        how.flushed = {} if on else None


def counters(model):
    holders = [m for module in model.modules() for m in (module, getattr(module, "mm", None))]
    return [m.how for m in holders if hasattr(m, "how")]


@torch.no_grad()
def diagnose(model):
    """Between backward and step -> shares: zero gradients, dead expert channels, flushed elements of each operand.

    A channel is dead when its row of up_proj and its column of down_proj are both below 1 % of their layer's mean.
    """
    pairs = [(m.up_proj, m.down_proj) for m in model.modules() if hasattr(m, "mm")]
    matrices = [p for name, p in model.named_parameters() if ".mixer." in name and p.ndim > 1]
    gradients = [p.grad for p in matrices if p.grad is not None]
    total = {}
    for how in counters(model):
        for name, n in (how.flushed or {}).items():
            total[name] = total.get(name, 0) + n
        how.flushed = how.flushed and {}
    weak = lambda n: n < .01 * n.mean()
    dead = [weak(up.norm(dim=2)) & weak(down.norm(dim=1)) for up, down in pairs]                 # (E, f) each
    share = lambda xs: sum(int(x.sum()) for x in xs) / max(1, sum(x.numel() for x in xs))
    return {"zero_gradients": share([g == 0 for g in gradients]), "dead_channels": share(dead),
            **{name.replace(" ", "_"): float(n[0] / n[1].clamp(min=1)) for name, n in sorted(total.items())}}


# 4. What it costs in error, with the windows of the published rule.

def table(x):
    """Relative errors of x (m, k) under each way to round it, in percent -> {name: (bits a number, error)}."""
    def error(y):
        return float(100 * (y.view_as(x).double() - x.double()).norm() / x.double().norm())
    def stochastic(x):
        return dequantize(quantize(x, noise=random_bytes(x).view(x.shape)))
    def searched(x):
        w, s, two = export_weight(x, "mse")
        return unpack(w) * (s.float() * two).repeat_interleave(16, 1)
    eye = hadamard(torch.eye(16))
    turn_back = lambda y: (y.view(-1, 16) @ eye.T).view_as(x)
    return {"NVFP4 1x16": (4.5, error(dequantize(quantize(x)))),
            "NVFP4 16x16": (4 + 8 / 256, error(dequantize(quantize(x, (16, 16))))),
            "NVFP4 1x16, rotated": (4.5, error(turn_back(dequantize(quantize(hadamard(x)))))),
            "NVFP4 1x16, stochastic": (4.5, error(stochastic(x))),
            "NVFP4 1x16, best scales": (4.5, error(searched(x))),
            "MXFP4 1x32": (4.25, error(mx(x, (1, 32), "mxfp4"))),
            "MXFP8 1x32": (8.25, error(mx(x, (1, 32), "mxfp8")))}


def draw(path, x):
    """Two blocks of one row, one loud and one quiet, and where each may put its numbers."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    q = quantize(x)
    y, unit = dequantize(q), q.scales.float() * q.amax / 2688
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for b, ax in enumerate(axes):
        part = slice(16 * b, 16 * b + 16)
        for level in torch.cat([-E2M1, E2M1]).tolist():
            ax.axhline(level * float(unit[0, b]), color="C7", lw=.6)
        ax.vlines(range(16), x[0, part], y[0, part], "C3", lw=2)
        ax.plot(x[0, part], "ko", ms=5, label="x")
        ax.plot(y[0, part], "C0D", ms=5, label="q s_b amax/2688")
        ax.set(title=f"block {b}: s_b = {float(q.scales[0, b]):g}, one step near 0 is {float(unit[0, b]) / 2:.3g}",
               xlabel="element; the lines are the block's sixteen numbers")
    axes[0].legend(frameon=False)
    fig.suptitle(f"One tensor, amax {float(q.amax):.3g}; every 16 neighbours have a scale of their own")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def main():
    """Prints the number line and the error table, and saves runs/nvfp4.png: the two-level scale at work."""
    from pathlib import Path
    torch.manual_seed(0)
    line = [" "] * 73
    for v in E2M1.tolist():
        line[round(v * 12)] = "|"
    print("E2M1, the positive half; beyond 6 all is 6\n  " + "".join(line))
    print("  0     .5    1     1.5   2           3           4                       6")
    print("  ties go to the even code: " + ", ".join(
        f"{float(a + b) / 2:g} to {float(to_grid(((a + b) / 2).view(1))):g}" for a, b in zip(E2M1, E2M1[1:])))

    n = 1024
    normal = lambda: torch.randn(n, n)
    loud = torch.ones(n).masked_fill(torch.arange(n) % 128 == 5, 32)
    laplace, student = torch.distributions.Laplace(0., 1.), torch.distributions.StudentT(torch.tensor(3.))
    inputs = {"N(0,1)": normal(), "Laplace": laplace.sample((n, n)), "Student-t(3)": student.sample((n, n)),
              "8 loud columns": normal() * loud}
    results = {name: table(x) for name, x in inputs.items()}
    windows = {"NVFP4 1x16": "9.49 to 9.54", "NVFP4 16x16": "11.10 to 11.16", "MXFP4 1x32": "11.47 to 11.53",
               "NVFP4 1x16, best scales": "8.10 to 8.16"}
    print(f"\nrelative error in percent, {n} x {n} numbers\n{'':26}{'bits':>7}"
          + "".join(f"{name:>16}" for name in results) + "   window, N(0,1)")
    for row, (bits, _) in results["N(0,1)"].items():
        print(f"  {row:24}{bits:7.2f}" + "".join(f"{r[row][1]:16.2f}" for r in results.values())
              + f"   {windows.get(row, '')}")
    x = torch.randn(16, 32) * torch.tensor([1., .05]).repeat_interleave(16)
    path = Path("runs") / "nvfp4.png"
    draw(path, x)
    print(f"\n{path}: the same tensor's loud and quiet blocks, each on a grid of its own")


if __name__ == "__main__":
    main()
