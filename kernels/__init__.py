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

INTERPRETED = (
    triton.knobs.runtime.interpret
)  # TRITON_INTERPRET=1: python plays the GPU, on CPU tensors


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


def rows(v):
    """(b, t, ...) whose b*t rows are contiguous and lie at one stride, as slices of (b, t, wide)
    do; else a copy.
    """
    b, t = v.shape[:2]
    return (
        v
        if v[:1, :1].is_contiguous() and (b == 1 or v.stride(0) == t * v.stride(1))
        else v.contiguous()
    )


def _announce(*, src, metadata, metadata_group, times, cache_hit):
    """A kernel's first call compiles it: say so, once, with the time it took."""
    if not cache_hit:
        print(f"compiled {src.fn.__name__} in {times.total / 1e6:.1f} s", flush=True)


if triton.knobs.compilation.listener is None:  # never take the place of somebody else's
    triton.knobs.compilation.listener = _announce
