"""kernels/fp4mm.py at Super's sizes: the product of codes on Hopper and Blackwell, decoding."""

from dataclasses import replace

from aot import Row
from fp4 import row

from kernels.fp4mm import _decode, _gemm

GEMM = dict(
    A="*u8",
    SA="*fp8e4nv",
    B="*u8",
    SB="*fp8e4nv",
    ALPHA="*fp32",
    D="*bf16",
    ENDS="*i32",
    EXPERT="*i32",
    ROW="*i32",
    M="i32",
    N="i32",
    K="i32",
    E="i32",
)


def gemm(what, native, by=0):
    consts = dict(BM=128, BN=128, BK=128 if native else 64, BY=by, NATIVE=native, UNIT=128)
    consts |= {} if by else dict(ENDS=None)
    consts |= {} if by == 1 else dict(EXPERT=None, ROW=None)
    return row(
        _gemm,
        what,
        GEMM,
        consts,
        warps=8,
        cards=(100 if native else 90,),
        wants={100: "block_scale", 120: "block_scale"} if native else {90: "wgmma"},
    )


TYPES = {k: v for k, v in GEMM.items() if k in ("B", "SB", "ALPHA", "D", "M", "N", "K")} | dict(
    X="*bf16"
)
ROWS = [
    *(
        gemm(f"{'native' if native else 'dequantised'}{by}", native, i)
        for native in (True, False)
        for i, by in enumerate(("", ", rows by expert", ", sum by expert"))
    ),
    Row(
        _decode,
        "16 rows",
        TYPES,
        dict(BM=16, BN=64, BK=128, UNIT=128),
        wants={90: "mma.sync"},
        cards=(90, 100),
        stages=3,
    ),
]
SMALL = [replace(r, cards=(120,)) for r in ROWS if not r.what.startswith("dequantised")]
