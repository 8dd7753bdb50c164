"""
kernels/ssd.py is mamba.ssd_recurrent, the definition, in fp64: numbers and every gradient, states
at both ends.

All three ways through it: one segment, several (the cut is forced small), and steps. Groups
strictly between one and all heads, ragged ends, inputs that are slices of one wide tensor as the
model's are. Sizes stay small in the number of programs, not in tiles: the interpreter charges by
the operation.
"""

import math

import pytest
import torch
from conftest import TOLERANCE, close, rms

from kernels import ssd as kernel
from mamba import ssd_chunked, ssd_recurrent

NAMES = ("y", "last", "dx", "ddt", "dA", "dB", "dC", "dD", "dstate")


def inputs(t, dtype=torch.float32, b=1, h=4, g=2, p=16, n=32, seed=0):
    """As the model's: x, B, C slices of one tensor; dt log-uniform in (0.001, 0.1); A in (-16,
    -1).
    """
    r = torch.Generator().manual_seed(seed)
    f = lambda *s: torch.randn(*s, generator=r)
    u = lambda *s: torch.rand(*s, generator=r)
    wide = torch.cat([f(b, t, h * p), f(b, t, g * n) / n**0.5, f(b, t, g * n)], -1).to(dtype)
    x, B, C = wide.split([h * p, g * n, g * n], -1)
    dt = (math.log(1e-3) + (math.log(0.1) - math.log(1e-3)) * u(b, t, h)).exp()
    return (
        x.unflatten(-1, (h, p)),
        dt,
        -1 - 15 * u(h),
        B.unflatten(-1, (g, n)),
        C.unflatten(-1, (g, n)),
        f(h),
        f(b, h, p, n),
    )


def answers(form, args, seed=1, last=True):
    """Outputs and all gradients of a random reading of them; the reading has the dtype of y."""
    args = [v.detach().requires_grad_() for v in args]
    y, S = form(*args)
    r = torch.Generator().manual_seed(seed)
    wy = torch.randn(y.shape, generator=r).to(
        args[0].dtype if y.dtype != torch.float64 else torch.bfloat16
    )
    wS = torch.randn(S.shape, generator=r)
    loss = (y * wy.to(y.dtype)).sum() + ((S * wS.to(S.dtype)).sum() if last else 0)
    return [y, S, *torch.autograd.grad(loss, args)]


def definition(args, reading=torch.float32, **more):
    """fp64, with the very numbers the kernel got, and the reading rounded as it was there."""
    args = [v.double().requires_grad_() for v in map(torch.detach, args)]
    y, S = ssd_recurrent(*args)
    r = torch.Generator().manual_seed(1)
    wy, wS = (
        torch.randn(y.shape, generator=r).to(reading).double(),
        torch.randn(S.shape, generator=r).double(),
    )
    return [y, S, *torch.autograd.grad((y * wy).sum() + (S * wS).sum(), args)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "t,more", [(1, {}), (40, {}), (70, dict(b=2)), (65, dict(h=2, g=1, p=64, n=128))]
)
def test_forward_and_backward(t, more, dtype):
    args = inputs(t, dtype, **more)
    got, want = answers(kernel.ssd, args), definition(args, dtype)
    close(NAMES, got, want, TOLERANCE[dtype] * (1 if dtype != torch.float32 else 3))


def test_several_segments(monkeypatch):
    args = inputs(200, b=2)
    monkeypatch.setattr(kernel, "segment", lambda b, t, h: 64)  # 4 segments, the last of 8 tokens
    close(NAMES[:2], kernel.ssd(*args), definition(args)[:2], TOLERANCE[torch.float32])


def test_the_length_of_a_segment():
    assert kernel.segment(1, 8192, 128) == 8192  # Super: one program a head
    for b, t, h in ((1, 8192, 64), (1, 100000, 8), (1, 100, 8), (3, 5000, 32)):
        cut = kernel.segment(b, t, h)
        assert cut % 128 == 0 and cut >= 1024 and (b * h * -(-t // cut) <= 256)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_steps_are_the_recurrence_and_leave_every_state(dtype):
    args = inputs(5, dtype, b=2)
    want = [
        ssd_recurrent(
            *(
                v.double() if v.ndim < 3 or v.ndim == 4 and i == 6 else v[:, :k].double()
                for i, v in enumerate(args)
            )
        )
        for k in range(1, 6)
    ]
    y, states = kernel.ssd_steps(*args, every=True)
    close(
        ("y", "states"),
        (y, states),
        (want[-1][0], torch.stack([S for _, S in want], 1)),
        TOLERANCE[dtype],
    )
    again, last = kernel.ssd_steps(*args)
    assert torch.equal(again, y) and torch.equal(last, states[:, -1])
    one = [
        kernel.ssd_steps(*(v[:, :1] if 2 < v.ndim and i < 6 else v for i, v in enumerate(args)))[0]
    ]
    assert torch.equal(one[0], y[:, :1])  # one token or five: the same bits


def test_no_state_no_skip_and_pieces():
    x, dt, A, B, C, D, state = inputs(50)
    with torch.no_grad():
        y, S = kernel.ssd(x, dt, A, B, C)
        close(("y", "S"), (y, S), ssd_recurrent(*(v.double() for v in (x, dt, A, B, C))), 2e-6)
        cut = lambda a, b: (x[:, a:b], dt[:, a:b], A, B[:, a:b], C[:, a:b], None)
        first, S1 = kernel.ssd(*cut(0, 21))
        rest, S2 = kernel.ssd(*cut(21, 50), S1)
    close(("y", "S"), (torch.cat([first, rest], 1), S2), (y, S), 2e-6)


def test_tokens_without_dt_change_nothing():
    """Padding on the right, as Mamba2 does for ragged rows: dt = 0."""
    x, dt, A, B, C, D, state = inputs(40)
    dt = torch.where(torch.arange(40)[None, :, None] < 23, dt, 0.0)
    _, S = kernel.ssd(x, dt, A, B, C, D, state)
    _, short = kernel.ssd(x[:, :23], dt[:, :23], A, B[:, :23], C[:, :23], D, state)
    assert rms(S, short) < 1e-6


def test_the_readable_function_takes_this_path_when_asked():
    args = inputs(40)
    assert torch.equal(ssd_chunked(*args, fast=True)[0], kernel.ssd(*args)[0])
    assert rms(ssd_chunked(*args, fast=True)[0], ssd_chunked(*args)[0]) < 2e-6


def test_what_it_cannot_do_it_says():
    args = inputs(8, n=32, p=16)
    with pytest.raises(ValueError, match="state size of 16, 32, 64 or 128, not 16 and 24"):
        kernel.ssd(*inputs(8, n=24))
    with pytest.raises(ValueError, match="16 or 32 bits"):
        kernel.ssd(*(v.double() for v in args))
    with pytest.raises(ValueError, match="do not fit"):
        kernel.ssd(args[0], args[1][:, :-1], *args[2:])


def test_this_file_can_fail():
    """Heads that read the wrong group, a mask one token off, a decay gradient without the end's
    share.
    """
    args = inputs(40)
    x, dt, A, B, C, D, state = args
    y, S = kernel.ssd(*args)
    want = definition(args)
    assert rms(kernel.ssd(x, dt, A, B.flip(2), C, D, state)[0], want[0]) > 1e-2
    assert rms(kernel.ssd(x, dt, A, B.roll(1, 1), C, D, state)[0], want[0]) > 1e-2
    got = answers(kernel.ssd, args, last=False)
    assert rms(got[4], want[4]) > 1e-2 and rms(got[8], want[8]) > 1e-2
