"""kernels/conv.py is mamba.causal_conv in fp64: numbers, every gradient, windows, one token at a
time, strided inputs.
"""

import pytest
import torch
from conftest import TOLERANCE, close, rms

import mamba
from kernels import conv as kernel

NAMES = ("y", "dx", "dweight", "dbias", "dwindow")


def inputs(t, w, k, dtype=torch.float32, b=1, seed=0):
    r = torch.Generator().manual_seed(seed)
    f = lambda *s: torch.randn(*s, generator=r)
    x = f(b, t, w + 3).to(dtype)[..., :w]  # a slice of rows, as in the model
    return x, f(w, 1, k), f(w), f(b, k - 1, w).to(dtype)


def answers(form, args, o):
    args = [v.detach().requires_grad_() for v in args]
    y, _ = form(*args)
    return [y, *torch.autograd.grad(y, args, o.to(y.dtype))]


def compare(args, tolerance):
    o = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(args[0].dtype)
    exact = [v.double() for v in args]
    close(
        NAMES[: len(args) + 1],
        answers(kernel.conv, args, o),
        answers(mamba.causal_conv, exact, o),
        tolerance,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("t,w,k", [(1, 24, 4), (33, 130, 4), (40, 24, 2)])
def test_forward_and_backward(t, w, k, dtype):
    compare(inputs(t, w, k, dtype, b=2 if t == 1 else 1), TOLERANCE[dtype])


def test_several_spans(monkeypatch):
    monkeypatch.setattr(kernel, "SPAN", 32)
    for t in (61, 62):  # t + k - 1 on both sides of a span's end
        compare(inputs(t, 8, 4), TOLERANCE[torch.float32])


def test_no_window_no_bias():
    x, weight, bias, window = inputs(9, 24, 4)
    compare((x, weight, bias), TOLERANCE[torch.float32])
    with torch.no_grad():
        y, seen = kernel.conv(x, weight, None)
        want, exact = mamba.causal_conv(x.double(), weight.double(), None)
    assert rms(y, want) < 2e-6 and torch.equal(seen.double(), exact)


def test_one_token_at_a_time_is_all_of_them():
    x, weight, bias, window = inputs(6, 24, 4)
    with torch.no_grad():
        y, seen = kernel.conv(x, weight, bias, window)
        steps = []
        for i in range(6):
            one, padded = kernel.conv(x[:, i : i + 1], weight, bias, window)
            window = padded[:, 1:]
            steps.append(one)
    assert torch.equal(torch.cat(steps, 1), y) and torch.equal(window, seen[:, 6:])


def test_what_it_cannot_do_it_says():
    x, weight, bias, window = inputs(3, 24, 4)
    with pytest.raises(ValueError, match="16 or 32 bits"):
        kernel.conv(x.double(), weight, bias)
    with pytest.raises(ValueError, match="2 to 7 taps"):
        kernel.conv(x, weight[..., :1], bias)


def test_this_file_can_fail():
    """Taps the wrong way round; a window that nobody reads."""
    x, weight, bias, window = inputs(9, 24, 4)
    want = mamba.causal_conv(*(v.double() for v in (x, weight, bias, window)))[0]
    assert rms(kernel.conv(x, weight.flip(-1), bias, window)[0], want) > 0.1
    assert rms(kernel.conv(x, weight, bias)[0], want) > 0.1
