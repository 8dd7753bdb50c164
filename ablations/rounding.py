"""
The three products of a layer, rounded in every way that a recipe has and in some that none has,
and how far they then are from the exact ones.

    operands(model, ids)             x, w, count and dy of a trained model's products, in fp32
    errors(given, four, extra, n)    what n draws of a rounding make of one product's operands

    flushed      the share of dy that becomes 0 in the weight gradient
    fprop, dgrad, wgrad              the relative error of a product, of one draw
    dgrad_bias, wgrad_bias           of the mean of many draws, for what dy's rounding does alone
    apart        how far the weights that backward uses are from those that forward used

    zeros(model, ids, how)          what a four-bit model's experts have no gradient for

Not here  the rounding itself: quant/lowbit.py, nvfp4.py
"""

import torch

import train
from nvfp4 import SIGNS, Recipe, hadamard, rotation
from quant import lowbit


class Rounding(lowbit.Operands):
    """lowbit's, and what no recipe has: kinds of operands (x, w, dy) that stay as they are, random
    rounding of all, a rotation of fprop and dgrad too, a rotation of 4 instead of 16."""

    def __init__(self, recipe, spared=(), random_all=False, rotate_all=False, rotate_4=False):
        super().__init__(recipe)
        self.spared, self.random_all, self.flushed = spared, random_all, {}
        self.rotate_all, self.rotate_4 = rotate_all, rotate_4

    def noise(self, name, x, draw=None):
        return super().noise("dgrad dy" if self.random_all else name, x, draw)

    def operand(self, name, x, dim, owner, experts, draw=None):
        weights = name.startswith("wgrad")
        if self.rotate_all and not weights:
            x = hadamard(x.contiguous(), 0 if dim == 0 else -1)
        if self.rotate_4 and weights:
            x = (quarter_turn().mT @ x.view(-1, 16, x.shape[1])).view_as(x)
        if name.split()[1] not in self.spared:
            return super().operand(name, x, dim, owner, experts, draw)
        x = hadamard(x, 0) if self.recipe.rht and weights else x
        return x, None if self.recipe.format != "nvfp4" else x.new_full((experts,), 2688.0)


def quarter_turn():
    """Hadamard's matrix of 4 with random signs, four times along the diagonal."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0])
    return torch.block_diag(*[signs[:, None] * torch.kron(two, two) / 2] * 4)


def operands(model, ids):
    """x, w, count and dy of every product that the recipe takes to NVFP4, in a pass in fp32."""
    seen, plain = [], lowbit.matmul

    def witness(x, w, count, how):
        y = plain(x, w, count, Rounding(Recipe(), spared=("x", "w", "dy")))
        if how.recipe.format == "nvfp4":
            seen.append([x.detach().flatten(0, -2), w.detach(), count])
            y.register_hook(lambda dy, of=seen[-1]: of.append(dy.flatten(0, -2)))
        return y

    lowbit.convert(model, Recipe())
    lowbit.matmul = witness
    (train.losses(model, ids)[0] / ids[:, 1:].numel()).backward()
    lowbit.matmul = plain
    return seen


def products(x, w, count, dy, how):
    """fprop, dgrad, wgrad."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = lowbit.matmul(x, w, count, how)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def apart(w, how):
    """How far the weights that backward uses are from those that forward used."""
    (experts, o, i), n = w.shape, max(w.shape[1:])
    x, dy = torch.eye(n, i).repeat(experts, 1), torch.eye(n, o).repeat(experts, 1)
    y, dx, _ = products(x, w, torch.full((experts,), n), dy, how)
    forward, backward = y.view(experts, n, o)[:, :i].mT, dx.view(experts, n, i)[:, :o]
    return float((forward - backward).norm() / w.norm())


def bias(draws, want):
    """The size of the draws' mean error, relative; two halves, so that noise has mean 0."""
    one, two = (torch.stack(half).mean(0) - want for half in (draws[::2], draws[1::2]))
    return max(0.0, float((one * two).sum() / want.square().sum())) ** 0.5


def errors(given, four, extra, n):
    """One product's measures. four: a --precision; extra: names of Rounding's own ways."""
    recipe, extra = Recipe.read(four), dict.fromkeys(extra, True)
    how = Rounding(recipe, **extra)
    exact = products(*given, Rounding(Recipe(), spared=("x", "w", "dy")))
    draws = list(zip(*(products(*given, how) for _ in range(n))))
    zeros, numbers = how.flushed["wgrad dy"].tolist()
    found = dict(flushed=zeros / numbers)
    for name, drawn, want in zip(("fprop", "dgrad", "wgrad"), draws, exact):
        found[name] = float((drawn[0] - want).norm() / want.norm())
    if not extra:
        wanted = products(*given, Rounding(recipe, spared=("dy",)))
        found["dgrad_bias"], found["wgrad_bias"] = map(bias, draws[1:], wanted[1:])
        found["apart"] = apart(given[1], Rounding(recipe, spared=("x", "dy")))
    return found


class Signed(Rounding):
    """The recipe's rounding with other signs in its rotation: what `choose` makes of 16 random
    ones, for both operands of a product. exact: rotated, and not rounded."""

    def __init__(self, choose, exact=False):
        super().__init__(Recipe(rht=False), spared=("x", "w", "dy") if exact else ())
        self.choose = choose

    def operand(self, name, x, dim, owner, experts, draw=None):
        if name == "wgrad dy":  # x of the same product comes next
            signs = self.choose(torch.randint(2, (16,)) * 2 - 1)
            plain = rotation("cpu") * torch.tensor(SIGNS)[:, None]  # a sign taken twice is gone
            self.turn = plain * signs[:, None]
        if name.startswith("wgrad"):
            x = (self.turn.T @ x.view(-1, 16, x.shape[1])).view_as(x)
        return super().operand(name, x, dim, owner, experts, draw)


class ExactBackward(Rounding):
    """A recipe's rounding, but for dy of the backward product dx."""

    def operand(self, name, x, dim, owner, experts, draw=None):
        self.spared = ("dy",) if name.startswith("dgrad") else ()
        return super().operand(name, x, dim, owner, experts, draw)


def zeros(model, ids, how):
    """Of a model in four bits, its products made by how(recipe): the share of its experts' first
    matrices whose gradient is exactly 0; the share of their units that have none at all, neither
    for what comes in nor for what goes out.
    """
    parts = [m for module in model.modules() for m in (module, getattr(module, "mm", None))]
    for holder in parts:
        if hasattr(holder, "how"):
            holder.how = how(holder.how.recipe)
    model.zero_grad()
    (train.losses(model.train(), ids)[0] / ids[:, 1:].numel()).backward()
    mine = [m for m in model.modules() if isinstance(getattr(m, "mm", None), lowbit.GroupedMM)]
    first = torch.cat([m.up_proj.grad == 0 for m in mine])  # (layers E, f, l)
    second = torch.cat([m.down_proj.grad == 0 for m in mine])  # (layers E, l, f)
    silent = first.all(2) & second.all(1)
    return dict(zeros=float(first.float().mean()), silent=float(silent.float().mean()))
