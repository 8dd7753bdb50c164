"""kernels/conv.py at Super's sizes: 10,240 channels, 4 taps; without a window, as in training, and
with.
"""

from dataclasses import replace

from aot import Row

from kernels.conv import SPAN, _backward, _forward

TYPES = {
    **dict.fromkeys(("X", "WINDOW", "Y", "DY", "DX", "DWINDOW"), "*bf16"),
    **dict.fromkeys(("WEIGHT", "BIAS", "DW"), "*fp32"),
    "T": "i32",
    "W": "i32",
    "SX": "i32",
}


def row(kernel, what, window, **consts):
    consts = dict(K=4, BW=128, HAS_WINDOW=window, UNIT=8, **consts)
    if not window:
        consts |= dict.fromkeys({"WINDOW", "DWINDOW"} & set(kernel.arg_names))
    types = {k: v for k, v in TYPES.items() if k in kernel.arg_names and k not in consts}
    return Row(kernel, what, types, consts, odd=("T",), stages=3)


def uneven(row, *strides):
    """Rows of a projection that 8 divides and 16 does not: still 16 bytes at a time."""
    wants, what = dict.fromkeys(row.cards, "16 bytes"), f"{row.what}, rows of 5,144"
    return replace(row, what=what, odd=(*row.odd, *strides), wants=wants)


ROWS = [
    row(_forward, "training", False, BT=32),
    row(_forward, "one token", True, BT=1),
    row(_forward, "a later chunk", True, BT=32),
    row(_backward, "training", False, BT=16, SPAN=SPAN, TAPS=8),
]
ROWS += [uneven(ROWS[0], "SX")]
SMALL = [replace(r, cards=(86, 89, 120)) for r in (ROWS[0], ROWS[3])]
