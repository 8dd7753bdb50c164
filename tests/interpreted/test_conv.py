"""kernels/conv.py is mamba.causal_conv in fp64: numbers, every gradient, windows, one token at a
time, strided inputs, documents; and a long walk is several short ones, bit for bit.
"""

import pytest
import torch
from conftest import TOLERANCE, close, rms

import mamba
from kernels import conv as kernel
from post.pack import Docs

NAMES = ("y", "dx", "dweight", "dbias", "dwindow")


def inputs(t, w, k, dtype=torch.float32, b=1, seed=0, between=3):
    r = torch.Generator().manual_seed(seed)
    f = lambda *s: torch.randn(*s, generator=r)
    x = f(b, t, w + between).to(dtype)[..., :w]  # a slice of rows, as in the model
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
    monkeypatch.setattr(kernel, "SPAN", 16)
    for t in (29, 30):  # t + k - 1 on both sides of a span's end
        compare(inputs(t, 8, 4), TOLERANCE[torch.float32])
    compare(inputs(18, 24, 7, torch.bfloat16, 2, between=8), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_span_knows_what_lies_before_it(monkeypatch, dtype):
    """Where a walk begins changes no bit of dx, nor of the window's gradient."""
    args = inputs(14, 24, 4, dtype)
    o = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = answers(kernel.conv, args, o)
    for span in (4, 8):
        monkeypatch.setattr(kernel, "SPAN", span)
        cut = answers(kernel.conv, args, o)
        assert torch.equal(cut[1], whole[1]) and torch.equal(cut[4], whole[4]), span
        assert rms(cut[2], whole[2]) < 1e-6 and rms(cut[3], whole[3]) < 1e-6, span


def test_the_whole_span():
    compare(inputs(kernel.SPAN + 2, 8, 4), TOLERANCE[torch.float32])


def test_no_window_no_bias():
    x, weight, bias, window = inputs(9, 24, 4)
    compare((x, weight, bias), TOLERANCE[torch.float32])
    with torch.no_grad():
        y, seen = kernel.conv(x, weight, None)
        want, exact = mamba.causal_conv(x.double(), weight.double(), None)
    assert rms(y, want) < 2e-6 and torch.equal(seen.double(), exact)
    o = torch.ones_like(x)
    got = answers(lambda x, weight: kernel.conv(x, weight, None), (x, weight), o)
    zero = answers(kernel.conv, (x, weight, torch.zeros_like(bias)), o)
    assert all(torch.equal(a, b) for a, b in zip(got, zero))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_documents_of_a_row_are_documents_alone(dtype):
    """y and dx of each, bit for bit; dweight and dbias are their sum."""
    lengths = (5, 1, 9)
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    docs = Docs(torch.cat([number, number[:, -1:]], 1))
    x, weight, bias, _ = inputs(sum(lengths), 24, 4, dtype)
    o = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def packed(x, weight, bias):
        wide, together = docs.apart(x, 4)
        return together(kernel.conv(wide, weight, bias)[0]), None

    y, dx, *sums = answers(packed, (x, weight, bias), o)
    alone = [
        answers(kernel.conv, (part, weight, bias), above)
        for part, above in zip(x.split(lengths, 1), o.split(lengths, 1), strict=True)
    ]
    assert torch.equal(y, torch.cat([a[0] for a in alone], 1))
    assert torch.equal(dx, torch.cat([a[1] for a in alone], 1))
    for i, got in enumerate(sums):
        assert rms(got, sum(a[2 + i] for a in alone)) < 1e-6


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
