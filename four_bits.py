"""
Four bits: what each way of rounding costs in error, and what the recipe of training buys with it.

One rounding is best done plainly: blocks of 1x16, to the nearest. By that measure every ingredient
of the recipe is a mistake. But training adds up many roundings, and there other errors count:

    the mean of 64     roundings of the same numbers, added up: some errors average out
    beside a loud one  numbers that share their scale with one 32 times as large: how many of them
                       become 0, and say nothing to any sum

    WAYS      the ways to round        table     the error of one rounding under each of them

Letters   m rows  k columns
Not here  the number format and the recipe: nvfp4.py; what they cost a training run:
          ablations/fig_nvfp4.py
Sources   arXiv:2509.25149 for the rule, from which the windows of the error on N(0, 1) follow
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from nvfp4 import (
    E2M1,
    dequantize,
    export_weight,
    hadamard,
    mx,
    quantize,
    random_bytes,
    to_grid,
    unpack,
)

# 1. Ways to round, and what each costs


class Way(NamedTuple):
    """A way to round: bits a number, values of x (m, k) in fp32, and whether x is rotated first."""

    bits: float
    round: Callable
    rotated: bool = False


def stochastic(x):
    return dequantize(quantize(x, noise=random_bytes(x).view(x.shape)))


def searched(x):
    codes, s, two = export_weight(x, "mse")
    return unpack(codes) * (s.float() * two).repeat_interleave(16, 1)


WAYS = {
    "NVFP4 1x16": Way(4.5, lambda x: dequantize(quantize(x))),
    "NVFP4 16x16": Way(4 + 8 / 256, lambda x: dequantize(quantize(x, (16, 16)))),
    "NVFP4 1x16, rotated": Way(4.5, lambda x: dequantize(quantize(x)), rotated=True),
    "NVFP4 1x16, stochastic": Way(4.5, stochastic),
    "NVFP4 1x16, best scales": Way(4.5, searched),
    "MXFP4 1x32": Way(4.25, lambda x: mx(x, (1, 32), "mxfp4").view_as(x)),
    "MXFP8 1x32": Way(8.25, lambda x: mx(x, (1, 32), "mxfp8").view_as(x)),
}
WINDOWS = {  # of the error on N(0, 1), from the published rule
    "NVFP4 1x16": "9.49 to 9.54",
    "NVFP4 16x16": "11.10 to 11.16",
    "MXFP4 1x32": "11.47 to 11.53",
    "NVFP4 1x16, best scales": "8.10 to 8.16",
}


def there_and_back(way, x):
    """x rounded that way, and the values on the grid themselves, before they are turned back."""
    if not way.rotated:
        y = way.round(x)
        return y, y
    q = way.round(hadamard(x))
    return (q.view(-1, 16) @ hadamard(torch.eye(16)).T).view_as(x), q


def percent(y, x):
    """The relative error of y, in percent."""
    return float(100 * (y.double() - x.double()).norm() / x.double().norm())


def table(x):
    """Errors of x (m, k) under each way to round it -> {name: (bits a number, percent)}."""
    return {name: (w.bits, percent(there_and_back(w, x)[0], x)) for name, w in WAYS.items()}


def beside_loud(way, x, loud):
    """Of the numbers that share 16 with a loud column (k,): percent that become 0, and error.

    Rotated, a number is the mix that its place holds: 0 there is a code that says nothing.
    """
    near = loud.view(-1, 16).any(1, keepdim=True).expand(-1, 16).flatten()
    y, q = there_and_back(way, x)
    quiet = near & ~loud
    return float(100 * (q[:, quiet] == 0).float().mean()), percent(y[:, quiet], x[:, quiet])


def mean_error(way, x, n=64):
    """The error of the mean of n roundings, in percent: what is left when many are added up."""
    return percent(sum(there_and_back(way, x)[0] for _ in range(n)) / n, x)


# 2. A picture


def draw(path, x):
    """Two blocks of one row, one loud and one quiet, each on its own grid; and the quiet one alone
    on the loud one's."""
    from matplotlib.figure import Figure

    q = quantize(x)
    units = (q.scales.float() * q.amax / 2688)[0].tolist()
    loud, quiet = x[0, :16], x[0, 16:32]
    fig = Figure(figsize=(13, 4.4), layout="constrained")
    axes = fig.subplots(1, 3)
    for ax, part, unit, title in (
        (axes[0], loud, units[0], "The loud block's 15 values reach its largest number"),
        (axes[1], quiet, units[1], "The quiet block's own grid is as fine as it needs"),
        (axes[2], quiet, units[0], "On the loud grid the quiet block is lost"),
    ):
        panel(ax, part, unit)
        ax.set_title(f"{title}\n(step near 0: {unit / 2:.2g})", fontsize=11)
    axes[0].set_ylabel("value")
    axes[2].set_ylim(-0.6 * units[0], 0.6 * units[0])
    axes[0].legend(loc="upper right", frameon=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def panel(ax, part, unit):
    """16 numbers, what rounding to E2M1 times the unit makes of them, and the values there are."""
    y = to_grid(part / unit) * unit
    for level in torch.cat([-E2M1, E2M1]).tolist():
        ax.axhline(level * unit, color="0.75", lw=0.7, zorder=0)
    ax.vlines(range(16), part, y, "#D55E00", lw=2)
    ax.plot(part, "ko", ms=6, label="number")
    ax.plot(y, "D", color="#0072B2", ms=6, label="rounded")
    ax.set(xlabel="element of the block (grey: the 15 values it may take)", xticks=range(0, 16, 5))


# 3. The table


def show(n=1024):
    """Prints the error of one rounding, of the mean of 64, and what becomes of a loud one's 16."""
    laplace = torch.distributions.Laplace(0.0, 1.0)
    student = torch.distributions.StudentT(torch.tensor(3.0))
    loud = torch.arange(n) % 128 == 5
    inputs = {
        "N(0,1)": torch.randn(n, n),
        "Laplace": laplace.sample((n, n)),
        "Student-t(3)": student.sample((n, n)),
        "loud columns": torch.randn(n, n) * torch.ones(n).masked_fill(loud, 32),
    }
    results = {name: table(x) for name, x in inputs.items()}
    print(f"\nrelative error in percent, {n} x {n} numbers; loud: 8 columns are 32 times as large")
    print(f"{'':32}{'one rounding':>56}{'mean':>8}{'beside a loud column':>22}")
    heads = "".join(f"{name:>14}" for name in results)
    print(f"{'':26}{'bits':>6}{heads}{'of 64':>8}{'flushed to 0':>14}{'error':>8}   window, N(0,1)")
    for name, way in WAYS.items():
        errors = "".join(f"{r[name][1]:14.2f}" for r in results.values())
        mean = mean_error(way, inputs["N(0,1)"][:32])
        zeros, error = beside_loud(way, inputs["loud columns"], loud)
        row = f"{errors}{mean:8.2f}{zeros:13.0f}%{error:8.1f}"
        print(f"  {name:24}{way.bits:6.2f}{row}   {WINDOWS.get(name, '')}")
    print(
        """
One rounding is best done plainly: 1x16, to the nearest. Training adds up many, and there each part
of the recipe pays for its larger error.
  stochastic   The mean of 64 roundings comes close to the number; to the nearest, 64 are as wrong
               as one. dw is a sum over thousands of tokens, so dy is rounded at random.
  rotated      Beside a loud column most numbers become 0 and say nothing to any sum. Rotated, few
               codes do. One such number comes back with more error, as it takes a share of the loud
               one's; but that has either sign, where what is flushed is always lost.
  16x16        w and its transpose get the same codes: backward uses the weights forward used."""
    )


def main():
    """Prints the errors; saves runs/nvfp4.png: the two-level scale at work."""
    torch.set_num_threads(1)  # these sizes gain nothing from more, and a busy machine loses much
    torch.manual_seed(0)
    show()
    x = torch.randn(16, 32) * torch.tensor([1.0, 0.05]).repeat_interleave(16)
    path = Path("runs") / "nvfp4.png"
    draw(path, x)
    print(f"\n{path}: the same tensor's loud and quiet blocks, each on a grid of its own")


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
