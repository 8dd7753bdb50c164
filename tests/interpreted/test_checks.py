"""The bodies of tests/test_gpu.py at small sizes: they should not run for the first time where
there is a GPU.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOLERANCE

sys.path.append(str(Path(__file__).parents[1]))
import gpu_checks as check

from model import Config


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)


def small(name, device, dtype):
    """One short and one long case of every kernel; both read all that the large ones read."""
    return {
        "ssd": lambda: check.ssd(device, dtype, 1, 40, 4, 2, 16, 16),
        "ssd, tail": lambda: check.ssd(device, dtype, 1, 70, 2, 1, 16, 16, between=5, tail=20),
        "conv": lambda: check.conv(device, dtype, 2, 9, 20),
        "conv, tail": lambda: check.conv(device, dtype, 1, 30, 20, between=7, tail=9),
        "norm": lambda: check.norm(device, dtype, 1, 5, 3, 24),
        "norm, tail": lambda: check.norm(device, dtype, 1, 9, 2, 16, between=3, tail=4),
        "experts": lambda: check.experts(device, dtype, 12, 9, 3, 16, 24),
        "experts, tail": lambda: check.experts(device, dtype, 12, 9, 3, 16, 24, tail=4),
        "loss": lambda: check.loss(device, dtype, 9, 70, 16, rows=4),
    }[name]()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "name",
    [
        "ssd",
        "ssd, tail",
        "conv",
        "conv, tail",
        "norm",
        "norm, tail",
        "experts",
        "experts, tail",
        "loss",
    ],
)
def test_every_check_runs_and_passes(name, dtype):
    row = small(name, "cpu", dtype)
    assert max(row.values()) <= {torch.float32: 6e-6, torch.bfloat16: 4e-3}[dtype], row


def test_a_train_step():
    config = replace(
        Config.preset("toy"), hybrid_override_pattern="ME", vocab_size=67, mamba_num_heads=4
    )
    row = check.train_step("cpu", config, 1, 21)
    assert max(row.values()) < 1e-4 and row["loss"] < 1e-6 and len(row) > 20, row


def test_texts():
    config = replace(
        Config.preset("toy"), hybrid_override_pattern="M*", vocab_size=67, mamba_num_heads=4
    )
    assert check.texts("cpu", config, (5, 2), 3, 4) == [True, True]


def test_this_file_can_fail(monkeypatch):
    import kernels.norm as kernel

    right = kernel.gated_norm
    monkeypatch.setattr(kernel, "gated_norm", lambda y, z, w, groups: right(y, z, w, 1))
    assert max(small("norm", "cpu", torch.float32).values()) > 1e-2
    assert max(small("norm, tail", "cpu", torch.float32).values()) > 1e-2
