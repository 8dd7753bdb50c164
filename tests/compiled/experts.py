"""kernels/experts.py at Super's sizes: E 512, k 22, l 1024, f 2688; tiles for 8192 tokens, and for
256 and fewer.
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


def grouped(x, sizes, warps, stages, wants, **more):
    sizes, none = dict(zip(("BM", "BN", "BK"), sizes)), dict(GATE=None, HID=None, DGATE=None)
    flags = lambda *on: {f: f in on for f in ("GATHER", "TURN", "RELU2", "BACK")} | dict(EVEN=True)
    for what, consts in (
        ("up", {**none, **flags("GATHER", "RELU2")}),
        ("down", {**none, **flags()}),
        ("dh, dgate", flags("GATHER", "TURN", "BACK")),
        ("dc by slot", {**none, **flags("TURN")}),
    ):
        yield row(
            _grouped,
            f"{what}, {sizes['BM']} rows",
            x,
            {**sizes, **consts},
            warps,
            stages,
            wants,
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


def plan(tokens, sm):
    """The launch that runs there: tile, warps, stages."""
    sizes, how = tiles(torch.bfloat16, 22 * tokens, 512, CARDS[sm][1] * 1024)
    return sizes, how["num_warps"], how["num_stages"]


ROWS = [
    *grouped("bf16", *plan(8192, 80), TENSOR),
    *grouped("bf16", *plan(256, 80), NARROW),
    *weights("bf16", (128, 128, 64), 8, 3, TENSOR),
    row(_combine, "weighted", "bf16", dict(K_TOP=22, BN=1024, WEIGH=True), 4, 3),
    *list(grouped("fp32", (64, 64, 32), 4, 2, {}, cards=(90,)))[::2],
    *weights("fp32", (64, 64, 32), 8, 2, {}, cards=(90,)),
]
SMALL = [
    row
    for tokens in (8192, 256)
    for row in grouped("bf16", *plan(tokens, 86), {}, cards=(86, 89, 120))
    if "up" in row.what or "dgate" in row.what
]
SMALL += list(weights("bf16", (128, 128, 64), 8, 3, {}, cards=(86, 89, 120)))[1:]
