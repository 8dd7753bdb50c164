"""
kernels/ssd.py at Super's sizes: p 64, n 128, 16 heads a group, x, B and C slices of one tensor.

bf16 is what runs: nothing spills on H100 and B200. On A100 two spill 8
and 16 bytes of a thread. fp32 is what is checked with.
"""

from dataclasses import replace

from aot import Row

from kernels.ssd import _dbc, _dx, _scan, _states, _step, tiles


def rows(x, size, cards, wants=None, spill=None):
    """x: the type of x, B, C, y and their gradients; the rest is fp32, sizes and strides are
    integers.
    """
    Q, walk, heads, how = tiles(size, 80 not in cards)  # the launches that run, not a copy of them
    step = dict(num_warps=1, num_stages=3)
    whole = dict.fromkeys(("T", "H", "R", "SX", "SB", "SEG"), "i32")
    wide = dict.fromkeys(("DT", "A", "D", "START", "LAST", "FADE", "DDT", "DA", "DD"), "*fp32")
    small = dict.fromkeys(
        ("X", "B", "C", "Y", "DY", "DX", "DB", "DC", "S_IN", "G_OUT", "KEPT"), f"*{x}"
    )
    for kernel, what, consts, launch in (
        (_scan, "forward", dict(Q=Q), how),
        (_states, "a segment's write", dict(Q=Q, BP=32, REV=False, KEEP=False), walk),
        (_states, "S at chunk starts", dict(Q=Q, BP=32, REV=False, KEEP=True), walk),
        (_states, "G at chunk ends", dict(Q=Q, BP=32, REV=True, KEEP=True), walk),
        (_dx, "dx, ddt, dA, dD", dict(Q=Q), how),
        (_dbc, "dB, dC", dict(Q=Q, R=16), heads),
        (_step, "a few tokens", dict(BP=16, EVERY=False), step),
        (_step, "and every state", dict(BP=16, EVERY=True), step),
    ):
        consts = dict(P=64, N=128, **consts)
        types = {
            k: v
            for k, v in {**small, **wide, **whole}.items()
            if k in kernel.arg_names and k not in consts
        }
        yield Row(
            kernel,
            f"{x} {what}",
            types,
            consts,
            launch["num_warps"],
            launch["num_stages"],
            {} if kernel is _step or not wants else wants,
            (spill or {}).get(kernel, 0),
            odd=("T",),
            cards=cards,
        )


ROWS = [
    *rows("bf16", 2, (90, 100), {90: "wgmma", 100: "tcgen05"}),
    *rows("bf16", 2, (80,), {80: "mma.sync"}, {_dx: 16, _states: 8}),
    *rows("fp32", 4, (90,), {}, {_scan: 352, _dbc: 288}),
]
# The A100's tiles, which fill the 255 registers that a thread can have; what is over is spilled.
SPILLS = {_scan: {120: 80}, _states: {86: 8, 89: 8}, _dx: {86: 32, 89: 32, 120: 24}}
SMALL = rows("bf16", 2, (80,), {}, SPILLS)
SMALL = [replace(r, cards=(86, 89, 120)) for r in SMALL]
