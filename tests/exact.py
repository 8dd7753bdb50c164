"""Ranks in four bits with nothing left to the last bit: fp64 around what is rounded, and products
of rounded numbers exact. What then differs is a fault, on any CPU, and not a number that stood on
the edge between two codes.

Imported by tests/ranks.py. Run by torchrun it is train.py: exact.py and train.py's flags.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

import train
from quant import lowbit
from scale import parallel


def grouped(a, b, offs):
    """F.grouped_mm, which has no fp64: rows (m, k) by (E, k, n), or columns (o, m) by rows."""
    spans = list(zip([0, *offs.tolist()], offs.tolist()))
    if a.ndim == b.ndim:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
    return torch.cat([a[i:j] @ matrix for (i, j), matrix in zip(spans, b)])


@contextmanager
def arithmetic():
    """fp64 wherever fp32 was nobody's choice, in products of rounded operands and in sums of ranks.
    A sum of such products has less than 53 bits, so that no order can change it.
    """
    product, mm, default = lowbit.Operands.product, F.grouped_mm, torch.get_default_dtype()

    def wide(self, a, b, ends, owner):
        (a, amax), (b, bmax) = a, b
        F.grouped_mm = grouped
        y = product(self, (a.double(), amax), (b.double(), bmax), ends, owner)
        F.grouped_mm = mm
        return y

    torch.set_default_dtype(torch.float64)
    lowbit.Operands.product, parallel.World.reduce = wide, torch.float64
    try:
        yield
    finally:
        lowbit.Operands.product, parallel.World.reduce = product, torch.float32
        torch.set_default_dtype(default)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with arithmetic():
        train.cli()
