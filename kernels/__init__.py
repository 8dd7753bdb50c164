"""
The fast paths: one Triton file per idea, each the same function as its readable form, with the same
signature.

A reader needs none of them. They are imported inside `if fast:` alone, and a fast path that cannot
run says why in one sentence: nothing falls back. Every file reads equation, grid, traffic,
numerics; kernel; wrapper; autograd.
"""

import importlib.util

if importlib.util.find_spec("triton") is None:
    raise ModuleNotFoundError(
        "fast=True needs the package triton, which is not installed; fast=False does not"
    )

import torch
import triton

# TRITON_INTERPRET=1: python plays the GPU, on CPU tensors
INTERPRETED = triton.knobs.runtime.interpret


def on_gpu(what, *tensors):
    """Every tensor (None is skipped) on the current GPU, or one sentence."""
    tensors = [v for v in tensors if v is not None]
    if INTERPRETED:
        return
    if not torch.cuda.is_available():
        raise ValueError(
            f"{what} with fast=True needs a CUDA GPU, and torch sees none here; use fast=False"
        )
    here = torch.device("cuda", torch.cuda.current_device())
    for v in tensors:
        if v.device != here:
            raise ValueError(
                f"{what} with fast=True needs its tensors on {here}, the current GPU, not on "
                f"{v.device}"
            )


def shared_memory(device):
    """Bytes that a block may have: 101,376 on cards of 8.6, 8.9 and 12.x, about twice as much on
    an A100, H100 or B200. The interpreter plays an H100.
    """
    if INTERPRETED:
        return 232_448
    utils = triton.runtime.driver.active.utils
    return utils.get_device_properties(device.index or 0)["max_shared_mem"]


def unit(*strides):
    """8 where all of them are multiples of it, else 1. The compiler asks of a stride only whether
    16 divides it, and where it does not, reads number by number: so a kernel gets stride / unit
    and unit, and reads 8 of bf16 at once. Of `small` a projection's rows have 5,144.
    """
    return 8 if all(n % 8 == 0 for n in strides) else 1


def rows(v):
    """(b, t, ...) whose b*t rows are contiguous and lie at one stride, as slices of (b, t, wide)
    do; else a copy.
    """
    b, t = v.shape[:2]
    strided = b == 1 or v.stride(0) == t * v.stride(1)
    return v if strided and v[:1, :1].is_contiguous() else v.contiguous()


def _announce(*, src, metadata, metadata_group, times, cache_hit):
    """A kernel's first call compiles it: say so, once, with the time it took."""
    if not cache_hit:
        print(f"compiled {src.fn.__name__} in {times.total / 1e6:.1f} s", flush=True)


if triton.knobs.compilation.listener is None:  # never take the place of somebody else's
    triton.knobs.compilation.listener = _announce
