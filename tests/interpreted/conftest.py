"""
Kernels in Triton's interpreter: python plays the GPU, on CPU tensors.

    python -m pytest tests/interpreted

Triton decides when it is imported whether it interprets, so these tests need a process of their
own, and tests/test_kernels.py starts it. Before any kernel runs: the interpreter's arithmetic is
repaired (honest.py), every address is checked (addresses.py), and what torch.empty returns is NaN,
so that a number nobody wrote shows.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, by anyone
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
if "triton" in sys.modules:
    raise RuntimeError(
        "triton was imported before tests/interpreted/conftest.py: run python -m pytest "
        "tests/interpreted"
    )
import addresses
import honest

honest.repair()
addresses.check_every_address()
torch.use_deterministic_algorithms(True)  # with the next line: torch.empty is filled with NaN
torch.utils.deterministic.fill_uninitialized_memory = True

# Relative RMS error against fp64, where inputs are exactly those of the kernel: fp32 sums some
# thousand products;
# bf16 keeps 8 bits, so one rounding costs up to 2^-9 = 2e-3, and its mean square 2^-9 / sqrt(3) or
# so.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-3}


def rms(got, want):
    """Root-mean-square error relative to `want`; absolute where want is all zeros. NaN fails every
    `<=`.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (want.norm() if want.any() else 1))


def close(names, got, want, tolerance):
    """Every tensor by name, all at once: a failure shows the whole row."""
    row = {name: rms(a, b) for name, a, b in zip(names, got, want, strict=True)}
    assert all(e <= tolerance for e in row.values()), {k: f"{e:.1e}" for k, e in row.items()}
    return row
