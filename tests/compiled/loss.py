"""kernels/loss.py at Super's vocabulary: 131,072 words, 4096 at a time."""

from dataclasses import replace

from aot import Row

from kernels.loss import _nll

TYPES = dict(TARGET="*i64", MASK="*i1", NLL="*fp32", V="i32")
ROWS = [
    Row(_nll, f"{x} {what}", dict(Z=f"*{x}", **TYPES), dict(BV=4096, GRAD=grad), 8, 3)
    for x in ("bf16", "fp32")
    for grad, what in ((False, "the loss"), (True, "and its gradient"))
]
SMALL = [replace(r, cards=(86, 89, 120)) for r in ROWS[:2]]
