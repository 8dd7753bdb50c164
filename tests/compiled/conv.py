"""kernels/conv.py at Super's sizes: 10,240 channels, 4 taps; without a window, as in training, and
with. Backward is a walk in registers: at least 12 warps a multiprocessor, reads of 8 bytes, and no
shared memory but a row, through which Triton 3.6 passes the weights before the walk.
"""

from dataclasses import replace

from aot import Row

from kernels.conv import SPAN, STEP, _backward, _forward

TYPES = {
    **dict.fromkeys(("X", "WINDOW", "Y", "DY", "DX", "DWINDOW"), "*bf16"),
    **dict.fromkeys(("WEIGHT", "BIAS", "DW"), "*fp32"),
    "T": "i32",
    "W": "i32",
    "SX": "i32",
}


def row(kernel, what, window, warps=4, **consts):
    consts = dict(K=4, BW=128, HAS_WINDOW=window, UNIT=8, **consts)
    if not window:
        consts |= dict.fromkeys({"WINDOW", "DWINDOW"} & set(kernel.arg_names))
    types = {k: v for k, v in TYPES.items() if k in kernel.arg_names and k not in consts}
    return Row(kernel, what, types, consts, warps, stages=3, odd=("T",))


def walk(what, window, of="*bf16", wants="8 bytes"):
    """2 (k-1) + STEP reads of x and k-1 + STEP of dy, none of them in pieces."""
    made = row(_backward, what, window, warps=1, STEP=STEP, SPAN=SPAN)
    types = {k: of if v == "*bf16" else v for k, v in made.types.items()}
    cards = (80, 90, 100, 86, 89, 120)
    wants = dict.fromkeys(cards, (wants, 9 + 2 * STEP))
    return replace(made, types=types, regs=168, shared=512, wants=wants)


def uneven(row, *strides):
    """Rows of a projection that 8 divides and 16 does not: still as many bytes at a time."""
    wants, what = row.wants or dict.fromkeys(row.cards, "16 bytes"), f"{row.what}, rows of 5,144"
    return replace(row, what=what, odd=(*row.odd, *strides), wants=wants)


ROWS = [
    row(_forward, "training", False, BT=32),
    row(_forward, "one token", True, BT=1),
    row(_forward, "a later chunk", True, BT=32),
    walk("training", False),
    walk("a later chunk", True),
    walk("training, fp32", False, "*fp32", "16 bytes"),
]
ROWS += [uneven(ROWS[0], "SX"), uneven(ROWS[3], "SX")]
SMALL = [replace(r, cards=(86, 89, 120)) for r in (ROWS[0], *ROWS[3:6])]
