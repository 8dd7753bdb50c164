"""
loss: the head and its cross-entropy together, some rows at a time. mtp.nll of the logits, without
the logits.

With v words, logits are by far the largest thing a model makes, and only their sums are wanted:

    z  = W h        nll  = mask (log sum_j exp z_j - z_target)
                    dz_j = mask (exp z_j / sum - [j = target])
    dh = W^T dz     dW   = sum over rows dz h^T

So take `rows` rows: three matrix products, which cuBLAS does as well as anyone, and between the
first and the others one kernel that reads z twice, puts dz where z was, and keeps a number a row.
The gradient is made in the forward pass, because z is there; backward only multiplies it by the
number that comes from above.

letters  h (d,) what the last layer says of a token, a row; W (v, d) the head; z (v,) its logits
grid     _nll: one program a row, walking its v logits twice. The first walk keeps the largest so
         far and the sum of exp(z - largest): when a larger one comes, the sum is scaled down to it
traffic  z is written by the product, read twice and written by _nll, read by two products: 10.7 GB
         at 8192 rows of 131,072 in bf16, most of a second read from cache; the materialised loss
         does it in fp32, three times
memory   rows v for z, and dW in fp32: 0.5 + 2.1 GB in Super; z^T h is added to dW by the product
         itself. Materialised: z in bf16 and fp32, log-softmax, and both gradients, 17 GB
numbers  z has h's type, as the head's own output; sums and dW are fp32, so more rows do not round
         more often
Not here a product fused with the softmax: it would have to beat cuBLAS at what cuBLAS is for
Sources  the scheme of arXiv:2410.10989, section 3.2
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import on_gpu


@triton.jit
def _nll(Z, TARGET, MASK, NLL, V, BV: tl.constexpr, GRAD: tl.constexpr):
    row = tl.program_id(0)
    z, j = Z + row.to(tl.int64) * V, tl.arange(0, BV)
    high, total = float("-inf"), 0.0
    mask = tl.load(MASK + row).to(tl.float32)
    target = tl.where(mask > 0, tl.load(TARGET + row), 0)  # what is masked may name no word
    right = tl.load(z + target).to(tl.float32)  # before dz takes its place
    for v in range(0, V, BV):
        x = tl.load(z + v + j, mask=v + j < V, other=float("-inf")).to(tl.float32)
        top = tl.maximum(high, tl.max(x, 0))
        total = total * tl.exp(high - top) + tl.sum(tl.exp(x - top), 0)
        high = top
    # log sum exp z - z_target, weighted
    tl.store(NLL + row, tl.where(mask > 0, mask * (high + tl.log(total) - right), 0.0))
    if GRAD:
        for v in range(0, V, BV):
            x = tl.load(z + v + j, mask=v + j < V, other=float("-inf")).to(tl.float32)
            # softmax - [j = target]
            dz = tl.exp(x - high) / total - tl.where(v + j == target, 1.0, 0.0)
            dz = tl.where(mask > 0, mask * dz, 0.0)
            tl.store(z + v + j, dz.to(Z.dtype.element_ty), mask=v + j < V)


def add_product(sums, a, b):
    """sums (fp32) += a b, in place and in one call: cuBLAS adds what it multiplied before it
    rounds. A CPU has no such product of bf16.
    """
    if sums.is_cuda:
        return torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    return sums.addmm_(a.float(), b.float())


class LinearNLL(torch.autograd.Function):
    """The loss, and its gradients already made; backward may run once, for it hands them over."""

    @staticmethod
    def forward(ctx, h, weight, targets, mask, rows, dtype):
        m, v, grad = len(h), len(weight), ctx.needs_input_grad[:2]
        w, each = weight.to(dtype), h.new_empty(m, dtype=torch.float32)
        dh = torch.empty_like(h) if grad[0] else None
        dW = torch.zeros_like(weight, dtype=torch.float32) if grad[1] else None
        for i in range(0, m, rows):
            x, part = h[i : i + rows].to(dtype), slice(i, i + rows)
            z = x @ w.T
            _nll[len(x),](
                z,
                targets[part],
                mask[part],
                each[part],
                v,
                min(4096, triton.next_power_of_2(v)),
                any(grad),
                num_warps=8,
            )
            if grad[0]:
                dh[part] = z @ w
            if grad[1]:
                add_product(dW, z.T, x)
        ctx.made = dh, dW
        ctx.dtype = weight.dtype
        return each.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, above):
        if ctx.made is None:
            raise RuntimeError(
                "linear_nll with fast=True hands over its gradients once: this is a second one"
            )
        (dh, dW), ctx.made = ctx.made, None
        dh = dh if dh is None else dh.mul_(above)
        dW = dW if dW is None else dW.mul_(above).to(ctx.dtype)
        return dh, dW, None, None, None, None


def linear_nll(h, weight, targets, mask, rows=2048):
    """mtp.nll(F.linear(h, weight), targets, mask), fp32.   h (b, t, d), weight (v, d), targets,
    mask (b, t)
    """
    on_gpu("linear_nll", h, weight, targets, mask)
    auto = torch.is_autocast_enabled(h.device.type)
    dtype = (
        torch.get_autocast_dtype(h.device.type)
        if auto
        else torch.promote_types(h.dtype, weight.dtype)
    )
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"linear_nll with fast=True takes fp32 or bf16, not {dtype}")
    if (
        h.shape[:-1] != targets.shape
        or mask.shape != targets.shape
        or h.shape[-1:] != weight.shape[1:]
    ):
        raise ValueError(
            f"linear_nll: h {tuple(h.shape)}, weight {tuple(weight.shape)}, targets "
            f"{tuple(targets.shape)}, mask {tuple(mask.shape)} do not fit"
        )
    return LinearNLL.apply(
        h.flatten(0, -2).contiguous(), weight, targets.flatten(), mask.flatten(), rows, dtype
    )
