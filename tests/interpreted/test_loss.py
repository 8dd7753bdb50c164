"""
kernels/loss.py is mtp.nll(F.linear(h, weight)), in fp64: the sum, and the gradients of states and
head.

Vocabularies that fill no block, rows that fill no piece, masked targets (their gradient is exactly
zero), logits large enough that exp overflows, and the training loss of a whole model with its MTP
heads.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, close, rms

import mtp
import train
from kernels import loss as kernel
from model import Config, Nemotron

NAMES = ("loss", "dh", "dW")


def inputs(b, t, v, d=24, dtype=torch.float32, size=1.0, seed=0):
    r = torch.Generator().manual_seed(seed)
    h, weight = (
        torch.randn(b, t, d, generator=r).to(dtype),
        (size * torch.randn(v, d, generator=r) / d**0.5).to(dtype),
    )
    return h, weight, torch.randint(v, (b, t), generator=r), torch.rand(b, t, generator=r) < 0.8


def answers(form, h, weight, targets, mask, dtype=None, **more):
    h, weight = (x.to(dtype or x.dtype).detach().requires_grad_() for x in (h, weight))
    loss = form(h, weight, targets, mask, **more)
    return [loss, *torch.autograd.grad(loss / 7, (h, weight))]


def definition(h, weight, targets, mask):
    z = h @ weight.T
    return ((z.logsumexp(-1) - z.gather(-1, targets[..., None])[..., 0]) * mask).sum()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "b,t,v,rows", [(2, 9, 130, 5), (1, 1, 7, 2048), (1, 6, 5000, 4), (3, 4, 64, 12)]
)
def test_loss_and_gradients(b, t, v, rows, dtype):
    args = inputs(b, t, v, dtype=dtype)
    close(
        NAMES,
        answers(kernel.linear_nll, *args, rows=rows),
        answers(definition, *args, torch.float64),
        TOLERANCE[dtype],
    )


def test_masked_rows_leave_no_trace():
    h, weight, targets, mask = inputs(2, 8, 50)
    _, dh, dW = answers(kernel.linear_nll, h, weight, targets, mask)
    assert (dh[~mask] == 0).all() and (dh[mask] != 0).any()
    other = targets.where(mask, -100)  # a masked target may be any number
    assert torch.equal(answers(kernel.linear_nll, h, weight, other, mask)[2], dW)
    nothing = answers(kernel.linear_nll, h, weight, targets, mask & False)
    assert all((x == 0).all() for x in nothing)


def test_logits_of_any_size():
    args = inputs(2, 6, 90, size=300.0)
    close(
        NAMES,
        answers(kernel.linear_nll, *args),
        answers(definition, *args, torch.float64),
        2e-6 * 30,
    )  # z itself: 300 * 6e-8


def test_mixed_types_as_in_training():
    """fp32 weights under autocast: bf16 products, and the head's gradient stays fp32 until it is
    handed over.
    """
    h, weight, targets, mask = inputs(2, 9, 130)
    with torch.autocast("cpu", torch.bfloat16):
        got = answers(kernel.linear_nll, h, weight, targets, mask, rows=5)
    want = answers(definition, h.bfloat16(), weight.bfloat16(), targets, mask, torch.float64)
    close(NAMES, got, want, TOLERANCE[torch.bfloat16])
    assert got[1].dtype == got[2].dtype == torch.float32


def test_without_gradients_nothing_is_kept():
    h, weight, targets, mask = inputs(2, 9, 130)
    assert (
        rms(
            kernel.linear_nll(h, weight, targets, mask),
            definition(h.double(), weight.double(), targets, mask),
        )
        < 2e-6
    )
    kept = torch.autograd.grad(kernel.linear_nll(h.requires_grad_(), weight, targets, mask), h)[0]
    assert rms(kept, answers(definition, h, weight, targets, mask, torch.float64)[1] * 7) < 2e-6


def test_never_all_logits():
    """No tensor as large as the logits is ever made: the largest is a piece of them, or the head's
    gradient.
    """
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        v.nbytes
                        for v in (out if isinstance(out, tuple) else (out,))
                        if isinstance(v, torch.Tensor)
                    ),
                ]
            )
            return out

    h, weight, targets, mask = inputs(4, 16, 256)
    with Watch():
        answers(kernel.linear_nll, h, weight, targets, mask, rows=8)
    assert largest == 4 * 256 * 24 < 4 * 64 * 256


def test_the_training_loss_takes_this_path_when_asked():
    model = Nemotron(replace(Config.preset("toy"), vocab_size=67))
    ids = torch.randint(67, (2, 9), generator=torch.Generator().manual_seed(0))

    def ask():
        parts = train.losses(model, ids)
        return [
            *parts,
            *torch.autograd.grad(
                sum(parts), [model.lm_head.weight, model.backbone.embeddings.weight]
            ),
        ]

    plain = ask()
    model.fast = True
    fast = ask()
    assert len(plain) == 2 + 1 + model.mtp.depths
    close([str(i) for i in range(len(plain))], fast, plain, 3e-6)
    assert any(not torch.equal(a, b) for a, b in zip(fast, plain))


def test_a_mask_may_be_weights():
    h, weight, targets, mask = inputs(2, 9, 130)
    some = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) * mask
    got = answers(kernel.linear_nll, h, weight, targets, some)
    want = answers(definition, h, weight, targets, some, torch.float64)
    close([str(i) for i in range(len(got))], got, want, 2e-6)
    unweighted = answers(definition, h, weight, targets, some > 0, torch.float64)
    assert max(rms(a, b) for a, b in zip(got, unweighted)) > 1e-2


def test_what_it_cannot_do_it_says():
    h, weight, targets, mask = inputs(2, 3, 20)
    with pytest.raises(ValueError, match="fp32 or bf16, not torch.float64"):
        kernel.linear_nll(h.double(), weight, targets, mask)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.linear_nll(h, weight, targets[:, :2], mask)
    loss = kernel.linear_nll(h.requires_grad_(), weight, targets, mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second one"):
        loss.backward()


def test_this_file_can_fail():
    h, weight, targets, mask = args = inputs(2, 9, 130)
    want = answers(definition, *args, torch.float64)
    for broken in (
        (h, weight, mtp.roll(targets), mask),
        (h, weight, targets, mask | True),
        (h, weight.roll(1, 0), targets, mask),
    ):
        got = answers(kernel.linear_nll, *broken)
        assert max(rms(a, b) for a, b in zip(got, want)) > 1e-2
    assert rms(F.cross_entropy(h[0] @ weight.T, targets[0]), want[0]) > 1e-2
