"""kernels/norm.py at Super's sizes: 8 groups of 1024."""

from dataclasses import replace

from aot import Row

from kernels.norm import TOKENS, _backward, _forward

TYPES = {
    **dict.fromkeys(("Y", "Z", "OUT", "O", "DY", "DZ"), "*bf16"),
    "W": "*fp32",
    "DW": "*fp32",
    "M": "i32",
    "SY": "i32",
    "SZ": "i32",
    "eps": "fp32",
}
ROWS = [
    Row(
        kernel,
        what,
        {k: v for k, v in TYPES.items() if k in kernel.arg_names},
        dict(E=1024, BLOCK=1024, UNIT=8, **more),
        odd=("M",),
        stages=3,
    )
    for kernel, what, more in (
        (_forward, "gated norm", {}),
        (_backward, "gated norm", dict(TOKENS=TOKENS)),
    )
]
ODD = dict(odd=("SY", "SZ"), wants=dict.fromkeys((80, 90, 100), ("16 bytes", 4)))
ROWS += [replace(ROWS[0], what="rows of 5,144", **ODD)]
SMALL = [replace(r, cards=(86, 89, 120)) for r in ROWS]
