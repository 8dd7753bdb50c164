"""kernels/fp4.py at Super's sizes: quantising each way, the product of codes on Hopper and
Blackwell, decoding.
"""

from aot import Row

from kernels.fp4 import _amax, _decode, _gemm, _quantize

VIEW = dict(R="i32", M="i32", K="i32", SE="i64", SM="i32", SK="i32")
QUANTIZE = dict(
    X="*bf16",
    AMAX="*fp32",
    OWNER="*i64",
    NOISE="*u8",
    Q="*u8",
    S="*u8",
    Y="*bf16",
    **VIEW,
    NM="i32",
    NK="i32",
    seed="i32",
)
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


def row(kernel, what, types, consts, **more):
    types = {k: v for k, v in types.items() if k not in consts}
    return Row(kernel, what, types, consts, **{"cards": (90, 100), **more})


def quantize(what, square=False, rht=False, noise=False, sr=False, fake=False, by=0, along="SK"):
    consts = dict(BM=32, BK=128, SQUARE=square, RHT=rht, SR=sr or noise, FAKE=fake, BY=by) | {
        along: 1
    }
    consts |= dict(Q=None, S=None) if fake else dict(Y=None)
    consts |= {} if by else dict(OWNER=None)
    consts |= {"NM" if along == "SM" else "NK": 1} if noise else dict(NOISE=None)
    return row(_quantize, what, QUANTIZE, consts)


def amax(what, **consts):
    consts = dict(BM=32, BK=128, RHT=False, BY=0) | consts
    consts |= {} if consts["BY"] else dict(OWNER=None)
    return row(_amax, what, dict(X="*bf16", AMAX="*i32", OWNER="*i64", **VIEW), consts)


def gemm(what, native, by=0):
    consts = dict(BM=128, BN=128, BK=128 if native else 64, BY=by, NATIVE=native)
    consts |= {} if by else dict(ENDS=None)
    consts |= {} if by == 1 else dict(EXPERT=None, ROW=None)
    return row(
        _gemm,
        what,
        GEMM,
        consts,
        warps=8,
        cards=(100 if native else 90,),
        wants={100: "block_scale"} if native else {90: "wgmma"},
    )


TYPES = {k: v for k, v in GEMM.items() if k in ("B", "SB", "ALPHA", "D", "M", "N", "K")} | dict(
    X="*bf16"
)
ROWS = [
    quantize("1x16"),
    quantize("16x16", square=True),
    quantize("1x16 stochastic", sr=True),
    quantize("1x16 stochastic, by expert", noise=True, by=1),
    quantize("rotated, stochastic", rht=True, noise=True, by=2, along="SM"),
    quantize("operand in bf16", fake=True),
    amax("amax"),
    amax("rotated, by expert", RHT=True, BY=2, SM=1),
    *(
        gemm(f"{'native' if native else 'dequantised'}{by}", native, i)
        for native in (True, False)
        for i, by in enumerate(("", ", rows by expert", ", sum by expert"))
    ),
    Row(
        _decode,
        "16 rows",
        TYPES,
        dict(BM=16, BN=64, BK=128),
        wants={90: "mma.sync"},
        cards=(90, 100),
    ),
]
