"""kernels/ssd.py at Super's sizes: p 64, n 128, 16 heads a group. bf16 is what runs; fp32 is what is checked with."""
from aot import Row

from kernels.ssd import _dbc, _dx, _scan, _states, _step

TENSOR = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def rows(x, Q, stages, wants):
    """x: the type of x, B, C, y and their gradients; the rest is fp32, sizes and strides are integers."""
    small, wide = dict.fromkeys(("X", "B", "C", "Y", "DY", "DX", "DB", "DC", "S_IN", "G_OUT", "KEPT"), f"*{x}"), \
        dict.fromkeys(("DT", "A", "D", "START", "LAST", "FADE", "DDT", "DA", "DD"), "*fp32")
    whole = dict.fromkeys(("T", "H", "R", "SX", "SB", "SC", "SEG"), "i32")
    for kernel, what, consts, warps in (
            (_states, "a segment's write", dict(Q=Q, BP=32, REV=False, KEEP=False), 4),
            (_scan, "forward", dict(Q=Q), 8),
            (_states, "S at chunk starts", dict(Q=Q, BP=32, REV=False, KEEP=True), 4),
            (_states, "G at chunk ends", dict(Q=Q, BP=32, REV=True, KEEP=True), 4),
            (_dx, "dx, ddt, dA, dD", dict(Q=Q), 8), (_dbc, "dB, dC", dict(Q=Q, R=16), 8)):
        consts = dict(P=64, N=128, **consts)
        types = {k: v for k, v in {**small, **wide, **whole}.items() if k in kernel.arg_names and k not in consts}
        yield Row(kernel, f"{x} {what}", types, consts, warps, stages, wants, odd=("T",))
    if x == "bf16":
        for every, what in ((False, "a few tokens"), (True, "and every state")):
            types = {k: v for k, v in {**small, **wide, **whole}.items() if k in _step.arg_names}
            yield Row(_step, what, types, dict(P=64, N=128, BP=16, EVERY=every), 1, 2, odd=("T",))


ROWS = [*rows("bf16", 64, 2, TENSOR), *rows("fp32", 32, 1, {})]
