"""kernels/fp4.py at Super's sizes: quantising each way, the product of codes on Hopper and Blackwell, decoding."""
from aot import Row

from kernels.fp4 import _decode, _gemm, _quantize

QUANTIZE = dict(X="*bf16", AMAX="*fp32", NOISE="*u8", Q="*u8", S="*u8", Y="*bf16", M="i32", K="i32", SM="i32", SK="i32",
                seed="i32")
GEMM = dict(A="*u8", SA="*fp8e4nv", B="*u8", SB="*fp8e4nv", ALPHA="*fp32", D="*bf16", M="i32", N="i32", K="i32")


def quantize(what, square=False, rht=False, sr=False, fake=False):
    consts = dict(BM=32, BK=128, SQUARE=square, RHT=rht, SR=sr, FAKE=fake, NOISE=None, SK=1)
    consts |= dict(Q=None, S=None) if fake else dict(Y=None)
    return Row(_quantize, what, {k: v for k, v in QUANTIZE.items() if k not in consts}, consts, cards=(90, 100))


TYPES = {k: v for k, v in GEMM.items() if k not in ("A", "SA")} | dict(X="*bf16")
ROWS = [quantize("1x16"), quantize("16x16", square=True), quantize("1x16 stochastic", sr=True),
        quantize("1x16 rotated, stochastic", rht=True, sr=True), quantize("operand in bf16", fake=True),
        Row(_gemm, "native", GEMM, dict(BM=128, BN=128, BK=128, NATIVE=True), warps=8, wants={100: "block_scale"}, cards=(100,)),
        Row(_gemm, "dequantised", GEMM, dict(BM=128, BN=128, BK=64, NATIVE=False), warps=8, wants={90: "wgmma"}, cards=(90,)),
        Row(_decode, "16 rows", TYPES, dict(BM=16, BN=64, BK=128), wants={90: "mma.sync"}, cards=(90, 100))]
