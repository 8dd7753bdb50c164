"""The interpreter is repaired and watched. Without this a new Triton could switch both off and
nobody would know.
"""

import pytest
import torch
import triton
import triton.language as tl
from conftest import rms
from triton.runtime.errors import InterpreterError

import kernels


@triton.jit
def matmul(A, B, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    acc = tl.dot(tl.load(A + at), tl.load(B + at), input_precision="ieee")
    tl.store(OUT + at, acc.to(OUT.dtype.element_ty))


@triton.jit
def mixed(X, Y, OUT, SUM, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(X + i), tl.load(Y + i)
    z = tl.where(x > y, x * y + x, x - y)  # all of it in the dtype of X
    tl.store(OUT + i, z)
    tl.store(SUM, tl.sum(x.to(tl.float32) * y, 0))


@triton.jit
def cast(X, OUT, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(OUT + i, tl.load(X + i).to(OUT.dtype.element_ty))


@triton.jit
def copy(X, OUT, n, N: tl.constexpr, MASK: tl.constexpr):
    i = tl.arange(0, N)
    if MASK:
        tl.store(OUT + i, tl.load(X + i, i < n, 0.0), i < n)
    else:
        tl.store(OUT + i, tl.load(X + i), i < n)


def test_a_bf16_dot_is_a_bf16_dot():
    a, b = torch.randn(2, 32, 32).bfloat16()
    out = torch.empty(32, 32)
    matmul[(1,)](a, b, out, 32)
    assert rms(out, a.double() @ b.double()) < 1e-6


def test_bf16_arithmetic_rounds_after_every_operation():
    x, y = torch.randn(2, 256).bfloat16()
    out, s = torch.empty_like(x), torch.empty(1)
    mixed[(1,)](x, y, out, s, 256)
    assert torch.equal(out, torch.where(x > y, x * y + x, x - y))  # torch rounds every step too
    assert rms(s[0], (x.double() * y.double()).sum()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_round_to_nearest_even(dtype):
    x = torch.cat(
        [torch.randn(2048) * 10 ** torch.linspace(-3, 1, 2048), torch.linspace(-4, 4, 2048)]
    )
    out = torch.empty(4096).to(dtype)
    cast[(1,)](x, out, 4096)
    assert torch.equal(out.float(), x.to(dtype).float())


def test_a_read_past_the_end_is_caught():
    x, out = torch.randn(13), torch.empty(13)
    copy[(1,)](x, out, 13, 16, True)
    assert torch.equal(x, out)
    with pytest.raises(InterpreterError, match="IndexError.*load outside every tensor: 3 of 16"):
        copy[(1,)](x, out, 13, 16, False)


def test_a_view_ends_where_its_elements_do():
    x = torch.randn(32)
    with pytest.raises(InterpreterError, match="IndexError.*3 of 16"):
        copy[(1,)](x[:13], torch.empty(13), 13, 16, False)


def test_what_nobody_wrote_is_nan():
    assert torch.empty(3).isnan().all() and torch.randn(2).new_empty(3).bfloat16().isnan().all()


def test_the_kernels_know_that_they_are_interpreted():
    assert kernels.INTERPRETED
    kernels.on_gpu("anything", torch.zeros(1))


def test_this_file_can_fail():
    """The stock interpreter multiplies the bit patterns of bf16 as integers."""
    a, b = torch.randn(2, 32, 32).bfloat16()
    bits = a.view(torch.int16).double() @ b.view(torch.int16).double()
    assert rms(bits, a.double() @ b.double()) > 1e3
