"""
Makes Triton's interpreter compute what a GPU computes, in bf16, fp8 and NVFP4.

Left alone it keeps bf16 as the integers of its bit patterns and multiplies, adds, sums and compares
*those*; it cuts fp32 off to bf16 where hardware rounds; loses carries on the way to fp8; and reads
the E4M3 scales of dot_scaled as powers of two. None of this raises. So around every operation on a
small float:

    up      bits -> fp32, exact
    down    fp32 -> bits, round to nearest even, by torch

which is what a tensor core does: products of bf16 are exact in fp32, sums are fp32, the result
rounds once. TF32 is not modelled: kernels ask for input_precision="ieee". test_honest.py proves the
repair is in force.
Not here  speed: 0.3 ms a Triton operation, whatever the tile; few big tiles are the cheap test
"""

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

SMALL = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
E2M1 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)  # by code, 0 to 15
Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

ARITHMETIC = dict(
    fadd=np.add,
    fsub=np.subtract,
    fmul=np.multiply,
    fdiv=np.divide,
    precise_divf=np.divide,
    frem=np.fmod,
    minimumf=np.minimum,
    maximumf=np.maximum,
    minnumf=np.fmin,
    maxnumf=np.fmax,
    fneg=np.negative,
    fabs=np.abs,
    fma=lambda x, y, z: x * y + z,
    exp=np.exp,
    exp2=np.exp2,
    log=np.log,
    log2=np.log2,
    sqrt=np.sqrt,
    sin=np.sin,
    cos=np.cos,
    rsqrt=lambda x: 1 / np.sqrt(x),
    fcmpOLT=np.less,
    fcmpOGT=np.greater,
    fcmpOLE=np.less_equal,
    fcmpOGE=np.greater_equal,
    fcmpOEQ=np.equal,
    fcmpONE=np.not_equal,
    fcmpULT=np.less,
    fcmpUGT=np.greater,
    fcmpULE=np.less_equal,
    fcmpUGE=np.greater_equal,
    fcmpUEQ=np.equal,
    fcmpUNE=np.not_equal,
)


def decode(data, dtype):
    """Raw numpy bits -> fp32."""
    return (
        torch.from_numpy(np.ascontiguousarray(data))
        .view(SMALL[dtype])
        .reshape(data.shape)
        .float()
        .numpy()
    )


def up(handle):
    """Numbers numpy can compute with: fp32 for the small floats, the data itself for the others."""
    dtype = handle.dtype.scalar
    return decode(handle.data, dtype) if dtype in SMALL else handle.data


def down(x, dtype):
    """Computed numbers -> the storage of dtype, rounded to nearest even."""
    if dtype not in SMALL:
        return x.astype(interpreter._get_np_dtype(dtype), copy=False)
    small = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(SMALL[dtype])
    return (
        small.view(torch.uint16 if dtype == tl.bfloat16 else torch.uint8)
        .numpy()
        .reshape(np.shape(x))
    )


def repaired(old, compute):
    """One builder method: as before for other types, up - compute - down for the small floats."""

    def op(self, *handles):
        if not any(h.dtype.scalar in SMALL for h in handles):
            return old(self, *handles)
        out, dtype = compute(*map(up, handles)), handles[-1].dtype.scalar
        return Handle(out, tl.int1) if out.dtype == bool else Handle(down(out, dtype), dtype)

    return op


def dot(self, a, b, d, precision, imprecise):
    """Products and sums in fp32, or in the accumulator's type where that is fp64 or int32."""
    x, y = (v.astype(np.float32) if v.dtype == np.float16 else v for v in (up(a), up(b)))
    sums = d.data.dtype if d.data.dtype in (np.int32, np.float64) else np.float32
    return Handle((np.matmul(x, y, dtype=sums) + d.data).astype(d.data.dtype), d.dtype.scalar)


def scaled(handle, kind, along_k, scale, right):
    """An operand of dot_scaled in fp32: codes unpacked along k where it is packed, times its block
    scales.
    """
    if "E2M1" in str(kind):
        axis = (-2 if along_k else -1) if right else (-1 if along_k else -2)
        codes = np.moveaxis(handle.data, axis, -1)  # two codes a byte, the low half first
        pairs = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1)
        v = np.moveaxis(pairs.reshape(*codes.shape[:-1], -1), -1, axis)
    elif handle.dtype.scalar == tl.uint8:  # fp8 passed as bytes
        v = decode(handle.data, tl.float8e4nv if "E4M3" in str(kind) else tl.float8e5)
    else:
        v = up(handle).astype(np.float32)
    if scale is None:
        return v
    s = (
        up(scale) if scale.dtype.scalar in SMALL else np.exp2(scale.data.astype(np.float32) - 127)
    )  # E4M3 or E8M0
    s = np.repeat(s, v.shape[-2 if right else -1] // s.shape[-1], -1)
    return v * (np.swapaxes(s, -1, -2) if right else s)


def dot_scaled(self, a, scale_a, kind_a, b, scale_b, kind_b, fast_math, a_along_k, b_along_k, acc):
    x, y = scaled(a, kind_a, a_along_k, scale_a, False), scaled(b, kind_b, b_along_k, scale_b, True)
    return Handle(np.matmul(x, y) + acc.data, tl.float32)


class Name(str):
    """A format of dot_scaled as Triton 3.6 wants it: with a .value, which an interpreted kernel's
    literal lacks.
    """

    value = property(str)


def repair():
    """Patch the interpreter of this process, once."""
    if getattr(Builder, "honest", False):
        return
    Builder.honest = True
    for name, compute in ARITHMETIC.items():
        if old := getattr(Builder, f"create_{name}", None):
            setattr(Builder, f"create_{name}", repaired(old, compute))
    stock_cast = Builder.cast_impl

    def cast(self, src, to):
        s, d = src.dtype.scalar, to.scalar
        return (
            Handle(down(up(src), d), d) if s in SMALL or d in SMALL else stock_cast(self, src, to)
        )

    Builder.cast_impl = cast
    Builder.create_fp_to_fp = lambda self, src, to, rounding: cast(self, src, to)
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, f"create_{name}", lambda self, src, to: self.cast_impl(src, to))
    Builder.get_bf16 = lambda self, v: Handle(
        down(np.array([v], np.float32), tl.bfloat16), tl.bfloat16
    )
    Builder.create_dot, Builder.create_dot_scaled = dot, dot_scaled
    stock_scaled = TritonSemantic.dot_scaled
    TritonSemantic.dot_scaled = lambda *args: stock_scaled(
        *(Name(a) if isinstance(a, str) else a for a in args)
    )

    stock_reduce = (
        interpreter.ReduceScanOpInterface.apply
    )  # sums and scans of bf16 run in fp32 on a GPU too

    def wide(t):
        if t.dtype.scalar not in SMALL:
            return t
        kind = tl.block_type(tl.float32, list(t.shape)) if t.shape else tl.float32
        return tl.core.tensor(Handle(up(t.handle), tl.float32), kind)

    def reduce(self, v):
        return stock_reduce(self, tuple(map(wide, v)) if isinstance(v, tuple) else v)

    interpreter.ReduceScanOpInterface.apply = reduce
