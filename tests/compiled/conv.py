"""kernels/conv.py at Super's sizes: 10,240 channels, 4 taps; without a window, as in training, and
with.
"""

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
    consts = dict(K=4, BW=128, HAS_WINDOW=window, **consts)
    if not window:
        consts |= dict.fromkeys({"WINDOW", "DWINDOW"} & set(kernel.arg_names))
    types = {k: v for k, v in TYPES.items() if k in kernel.arg_names and k not in consts}
    return Row(kernel, what, types, consts, odd=("T",), stages=3)


ROWS = [
    row(_forward, "training", False, BT=32),
    row(_forward, "one token", True, BT=1),
    row(_forward, "a later chunk", True, BT=32),
    row(_backward, "training", False, BT=16, SPAN=SPAN, TAPS=8),
]
