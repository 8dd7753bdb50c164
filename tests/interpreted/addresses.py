"""
Every address that a kernel reads or writes lies inside one of its tensors, or IndexError.

A GPU (and the interpreter, left alone) reads past the end of a tensor and says nothing: the number
read is some neighbour's, most often harmless, once a year not. Here every unmasked address of every
load, store and atomic is compared with the first and the last byte of each tensor argument of the
launch. A view counts as far as its own elements go, not as far as its storage does.
"""

import numpy as np
from triton.runtime import interpreter

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
spans = []  # (first byte, past the last byte) of this launch's tensors


def note(arg):
    if isinstance(arg, (tuple, list)):
        for a in arg:
            note(a)
    elif hasattr(arg, "base") and hasattr(arg, "block_shape"):  # a tensor descriptor
        note(arg.base)
    elif hasattr(arg, "untyped_storage") and arg.numel():
        last = sum((n - 1) * s for n, s in zip(arg.shape, arg.stride()))
        spans.append((arg.data_ptr(), arg.data_ptr() + (last + 1) * arg.element_size()))


def check(pointers, mask, what):
    at = (
        pointers.data.ravel()
        if mask is None
        else np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
    )
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    inside = np.zeros(at.shape, bool)
    for first, end in spans:
        inside |= (at >= first) & (at + size <= end)
    if not inside.all():
        raise IndexError(
            f"{what} outside every tensor: {int((~inside).sum())} of {inside.size} addresses, "
            f"program {interpreter.interpreter_builder.grid_idx}"
        )


def check_every_address():
    """Patch the interpreter of this process, once."""
    if getattr(Builder, "bounded", False):
        return
    Builder.bounded = True
    start, load, store, atomic = (
        Executor._init_args_hst,
        Builder.create_masked_load,
        Builder.create_masked_store,
        Builder.create_atomic_rmw,
    )

    def launch(self, args, kwargs):
        out = start(self, args, kwargs)
        spans.clear()
        note(list(out[0]) + list(out[1].values()))
        return out

    def checked_load(self, pointers, mask, *rest, **more):
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest, **more)

    def checked_store(self, pointers, value, mask, *rest, **more):
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **more)

    def checked_atomic(self, op, pointers, value, mask, *rest, **more):
        check(pointers, mask, "atomic")
        return atomic(self, op, pointers, value, mask, *rest, **more)

    Executor._init_args_hst, Builder.create_masked_load = launch, checked_load
    Builder.create_masked_store, Builder.create_atomic_rmw = checked_store, checked_atomic
