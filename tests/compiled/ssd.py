"""
kernels/ssd.py at Super's sizes: p 64, n 128, 16 heads a group, x, B and C slices of one tensor.

bf16 is what runs: nothing spills on H100 and B200. On A100 two spill 8
and 16 bytes of a thread. fp32 is what is checked with.
"""
from aot import Row

from kernels.ssd import _dbc, _dx, _scan, _states, _step


def rows(x, Q, walk, heads, warps, stages, cards, wants={}, spill={}):
    """x: the type of x, B, C, y and their gradients; the rest is fp32, sizes and strides are integers.

    walk: warps of _states; heads: warps and stages of _dbc; warps, stages: of the others.
    """
    whole = dict.fromkeys(("T", "H", "R", "SX", "SB", "SEG"), "i32")
    wide = dict.fromkeys(("DT", "A", "D", "START", "LAST", "FADE", "DDT", "DA", "DD"), "*fp32")
    small = dict.fromkeys(("X", "B", "C", "Y", "DY", "DX", "DB", "DC", "S_IN", "G_OUT", "KEPT"), f"*{x}")
    for kernel, what, consts, warps, stages in (
            (_scan, "forward", dict(Q=Q), warps, stages),
            (_states, "a segment's write", dict(Q=Q, BP=32, REV=False, KEEP=False), walk, stages),
            (_states, "S at chunk starts", dict(Q=Q, BP=32, REV=False, KEEP=True), walk, stages),
            (_states, "G at chunk ends", dict(Q=Q, BP=32, REV=True, KEEP=True), walk, stages),
            (_dx, "dx, ddt, dA, dD", dict(Q=Q), warps, stages),
            (_dbc, "dB, dC", dict(Q=Q, R=16), *heads),
            (_step, "a few tokens", dict(BP=16, EVERY=False), 1, 3),
            (_step, "and every state", dict(BP=16, EVERY=True), 1, 3)):
        consts = dict(P=64, N=128, **consts)
        types = {k: v for k, v in {**small, **wide, **whole}.items() if k in kernel.arg_names and k not in consts}
        yield Row(kernel, f"{x} {what}", types, consts, warps, stages, {} if kernel is _step else wants,
                  spill.get(kernel, 0), ("T",), cards)


ROWS = [*rows("bf16", 64, 4, (8, 3), 8, 2, (90, 100), {90: "wgmma", 100: "tcgen05"}),
        *rows("bf16", 32, 4, (8, 2), 8, 2, (80,), {80: "mma.sync"}, {_dx: 16, _states: 8}),
        *rows("fp32", 16, 8, (16, 1), 8, 1, (90,), {}, {_scan: 352, _dbc: 288})]
