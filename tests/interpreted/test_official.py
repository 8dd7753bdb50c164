"""
kernels/ssd.py beside mamba_ssm's own Triton, on the same inputs: neither fp32 nor bf16 may be the
worse for it.

An optional test: it needs mamba_ssm's source and einops, not its CUDA extension. Theirs chooses
tile sizes by timing; here it gets the first it lists, and a GPU that is only said to be there.

    PYTHONPATH=the/unpacked/sdist python -m pytest tests/interpreted/test_official.py
"""

import contextlib
import importlib.util
import types

import pytest
import torch
from conftest import rms
from test_ssd import NAMES, answers, definition, inputs

from kernels import ssd as kernel
from speed.rows import stranger

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is None, reason="mamba_ssm is not installed"
)


@pytest.fixture
def official(monkeypatch):
    from triton.runtime.autotuner import Autotuner

    init, card = Autotuner.__init__, types.SimpleNamespace(multi_processor_count=132)

    def first(self, fn, names, configs, *a, **k):
        init(self, fn, names, configs[:1], *a, **k)

    monkeypatch.setattr(Autotuner, "__init__", first)
    monkeypatch.setattr(torch.cuda, "device", lambda *a: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: card)
    scan = stranger("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    assert callable(scan), scan
    return lambda *args: scan(
        *args[:5], 32, D=args[5], initial_states=args[6], return_final_states=True
    )


@pytest.mark.filterwarnings("ignore:Deterministic mode")
@pytest.mark.parametrize(
    "dtype,floor,more", [(torch.float32, 1e-6, 1), (torch.bfloat16, 1e-6, 1.1)]
)
@pytest.mark.parametrize(
    "shape", [dict(t=40, p=32, n=32), dict(t=70, h=4, g=1, p=32, n=64)], ids=str
)
def test_it_is_no_less_exact_than_theirs(official, shape, dtype, floor, more):
    """`floor`: below it both are as good as exact, and who is nearer is chance."""
    args = inputs(dtype=dtype, **shape)
    want = definition(args, dtype)
    ours, theirs = (
        [rms(a, b) for a, b in zip(answers(f, args), want, strict=True)]
        for f in (kernel.ssd, official)
    )
    row = {name: (f"{a:.1e}", f"{b:.1e}") for name, a, b in zip(NAMES, ours, theirs)}
    print(row)
    assert all(a <= max(more * b, floor) for a, b in zip(ours, theirs)), row
