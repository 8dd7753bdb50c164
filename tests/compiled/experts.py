"""kernels/experts.py at Super's sizes: E 512, k 22, l 1024, f 2688; tiles for 8192 tokens, and for
256 and fewer. And at those of `small`, l 384, f 672, which are no multiples of a step.
"""

import torch
from aot import CARDS, Row

from kernels.experts import _combine, _grouped, _weights, tiles

TENSOR = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
NARROW = {
    80: "mma.sync",
    90: "mma.sync",
    100: "mma.sync",
}  # 16 rows, a quarter of a wgmma: weights bound them
TWO = {90: 2, 100: 2}  # blocks that a multiprocessor has at once, where a wide tile has it alone


def types(x, **more):
    floats = dict.fromkeys(("A", "W", "OUT", "HID", "X", "TOKENS"), f"*{x}")
    return {
        **floats,
        **dict.fromkeys(("ORDER", "EXPERT", "ROW", "ENDS", "WHERE"), "*i32"),
        **dict.fromkeys(("GATE", "DGATE"), "*fp32"),
        **dict.fromkeys(("TILES", "I", "O", "J", "N", "E", "K_TOP"), "i32"),
        **more,
    }


def row(kernel, what, x, consts, warps, stages, wants=None, **more):
    own = {k: v for k, v in types(x).items() if k in kernel.arg_names and k not in consts}
    return Row(
        kernel,
        f"{x} {what}",
        own,
        consts,
        warps,
        stages,
        wants or {},
        odd=("TILES", "E", "K_TOP"),
        **more,
    )


def grouped(dtype, many, wants, cards, l=1024, f=2688, **more):
    """The four launches with the tiles that they get on each card."""
    none = dict(GATE=None, HID=None, DGATE=None)
    flags = lambda *on: {f: f in on for f in ("GATHER", "TURN", "RELU2", "BACK")}
    for what, size, consts in (
        ("up", (l, f), {**none, **flags("GATHER", "RELU2")}),
        ("down", (f, l), {**none, **flags()}),
        ("dh, dgate", (), flags("GATHER", "TURN", "BACK")),
        ("dc", (f, l), {**none, **flags("TURN")}),
    ):
        for sm in cards:
            sizes, how = tiles(dtype, many, CARDS[sm][1] * 1024, *size)
            even = (size[0] if size else l) % sizes[2] == 0
            yield row(
                _grouped,
                f"{what}, {sizes[0]} x {sizes[1]}" + ", uneven" * (not even),
                "bf16" if dtype == torch.bfloat16 else "fp32",
                {**dict(zip(("BM", "BN", "BK"), sizes)), **consts, "EVEN": even},
                how["num_warps"],
                how["num_stages"],
                wants,
                cards=(sm,),
                blocks={} if sizes[1] == 256 or not many else TWO,
                **more,
            )


def weights(x, sizes, warps, stages, wants, **more):
    sizes = dict(zip(("BI", "BJ", "BR"), sizes))
    yield row(
        _weights,
        "dW_up",
        x,
        dict(GATE=None, WEIGH=False, TURN=False, **sizes),
        warps,
        stages,
        wants,
        **more,
    )
    yield row(
        _weights, "dW_down", x, dict(WEIGH=True, TURN=True, **sizes), warps, stages, wants, **more
    )


# What is spilled lies outside the loop: 8 bytes of dc's addresses, where 128 registers are the sums
# of a wide tile.
ROWS = [
    *grouped(torch.bfloat16, True, TENSOR, (80, 90, 100), spill={80: 8}),
    *grouped(torch.bfloat16, False, NARROW, (80, 90, 100)),
    *list(grouped(torch.bfloat16, True, TENSOR, (90,), l=384, f=672))[1::2],
    *weights("bf16", (128, 128, 64), 8, 3, TENSOR, blocks=TWO),
    row(_combine, "weighted", "bf16", dict(K_TOP=22, BN=1024, WEIGH=True), 4, 3),
    *list(grouped(torch.float32, True, {}, (90,)))[::2],
    *weights("fp32", (64, 64, 32), 8, 2, {}, cards=(90,)),
]
SMALL = [
    row
    for many in (True, False)
    for row in grouped(torch.bfloat16, many, {}, (86, 89, 120))
    if "up" in row.what or "dgate" in row.what
]
SMALL += list(weights("bf16", (128, 128, 64), 8, 3, {}, cards=(86, 89, 120)))[1:]
