"""kernels/fp4.py at Super's sizes: quantising each way."""

from dataclasses import replace

from aot import Row

from kernels.fp4 import _amax, _quantize

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


def row(kernel, what, types, consts, **more):
    types = {k: v for k, v in types.items() if k not in consts}
    return Row(kernel, what, types, consts, **{"cards": (90, 100), "stages": 3, **more})


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


ROWS = [
    quantize("1x16"),
    quantize("16x16", square=True),
    quantize("1x16 stochastic", sr=True),
    quantize("1x16 stochastic, by expert", noise=True, by=1),
    quantize("rotated, stochastic", rht=True, noise=True, by=2, along="SM"),
    quantize("operand in bf16", fake=True),
    amax("amax", SK=1),
    amax("rotated, by expert", RHT=True, BY=2, SM=1),
]
SMALL = [replace(r, cards=(120,)) for r in ROWS if "16x16" not in r.what]
