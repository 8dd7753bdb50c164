"""kernels/norm.py is mamba.GatedNorm in fp64: numbers and gradients, groups of awkward sizes,
strided inputs.
"""

import pytest
import torch
from conftest import TOLERANCE, close, rms

import mamba
from kernels.norm import gated_norm

NAMES = ("out", "dy", "dz", "dw")


def inputs(t, groups, own, dtype, b=1, seed=0):
    r = torch.Generator().manual_seed(seed)
    wide = torch.randn(b, t, 2 * groups * own + 5, generator=r).to(
        dtype
    )  # y and z are slices of rows
    y, z, _ = wide.split([groups * own, groups * own, 5], -1)
    return (
        y,
        z,
        torch.randn(groups * own, generator=r),
        torch.randn(b, t, groups * own, generator=r).to(dtype),
    )


def definition(y, z, weight, o, groups):
    norm = mamba.GatedNorm(len(weight), groups).double()
    y, z = (v.detach().double().requires_grad_() for v in (y, z))
    norm.weight.data.copy_(weight)
    out = norm(y, z)
    return [out, *torch.autograd.grad(out, (y, z, norm.weight), o.double())]


def fast(y, z, weight, o, groups):
    y, z, weight = (v.detach().requires_grad_() for v in (y, z, weight))
    out = gated_norm(y, z, weight, groups)
    return [out, *torch.autograd.grad(out, (y, z, weight), o)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("t,groups,own", [(1, 1, 16), (35, 2, 48), (2, 2, 1024)])
def test_forward_and_backward(t, groups, own, dtype):
    args = inputs(t, groups, own, dtype)
    close(NAMES, fast(*args, groups), definition(*args, groups), TOLERANCE[dtype])


def test_what_it_cannot_do_it_says():
    y, z, weight, _ = inputs(3, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        gated_norm(y, z[:, :2], weight, 2)
    with pytest.raises(ValueError, match="16 or 32 bits"):
        gated_norm(y.double(), z.double(), weight, 2)


def test_this_file_can_fail():
    """One group instead of three; the gate's derivative without its second half."""
    args = inputs(4, 3, 48, torch.float32)
    assert rms(fast(*args, 1)[0], definition(*args, 3)[0]) > 1e-2
    y, z, weight, o = args
    assert rms(fast(y, -z, weight, o, 3)[2], definition(*args, 3)[2]) > 0.1
