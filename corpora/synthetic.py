"""
Synthetic corpora: a megabyte each, the same on every machine, and what a perfect model would pay
for it is known.

    recall       8 letters, each with a digit; then 8 times one of them: what was its digit?
    copy         16 letters, and the same again
    arithmetic   two numbers of three digits and their sum
    facts:N      N keys, each with two bytes that follow from nothing: only memory has them

The lines of the first three are drawn evenly from all that their rule allows, so the bits in one
are the logarithm of how many there are. In `copy` that is 16 letters of 4 bits, then 16 letters
that cost nothing: 64 bits in 34 bytes.

    floor = log2(number of different lines) / bytes of a line        bits per byte

A fact costs 16 bits until it is known, and nothing from then on. 8,192 of them are 131 kbit.

Not here  how a text becomes batches: data.py, whose table prints the floors
Sources   our own
"""

import math

import numpy as np

from corpora.philox import philox

TASKS = ("recall", "copy", "arithmetic")
FACTS = 8192  # in `facts`; facts:N has N


def task(name):
    """recall      k3a7...?a7a7...    8 letters, each with a digit; then 8 times one of them
    copy        hbac...|hbac...    16 letters from a to p, and again
    arithmetic  347+058=0405       two numbers and their sum
    """

    def dice(draw, sides, *shape):
        return (
            (philox(TASKS.index(name), draw, math.prod(shape)) % sides)
            .astype(np.int64)
            .reshape(shape)
        )

    if name == "arithmetic":
        return "".join(f"{a:03}+{b:03}={a + b:04}\n" for a, b in dice(0, 1000, 76_923, 2).tolist())
    rows = 29_411
    if name == "copy":
        said = asked = ord("a") + dice(0, 16, rows, 16)  # (rows, 16)
    else:
        key = ord("a") + dice(0, 2**62, rows, 26).argsort(1)[:, :8]  # (rows, 8)     none twice
        said = np.stack([key, ord("0") + dice(1, 10, rows, 8)], -1)  # (rows, 8, 2)
        asked = np.take_along_axis(said, dice(2, 8, rows, 8)[..., None], 1)  # (rows, 8, 2)
    sign = lambda c: np.full((rows, 1), ord(c))
    line = [
        said.reshape(rows, 16),
        sign("|" if name == "copy" else "?"),
        asked.reshape(rows, 16),
        sign("\n"),
    ]
    return np.hstack(line).astype(np.uint8).tobytes().decode()


def entropy_floor(name):
    """Bits per byte of a task's lines: what a perfect model pays, and on average none pays less."""
    if name not in TASKS:
        raise ValueError(f"{name!r} is none of the tasks {', '.join(TASKS)}")
    choices = {"recall": math.perm(26, 8) * 10**8 * 8**8, "copy": 16**16, "arithmetic": 1000**2}
    return math.log2(choices[name]) / (13 if name == "arithmetic" else 34)


def facts(spec):
    """facts:N  k k k v v  k k k v v ...  N different keys of three bytes, each with two bytes that
    follow from nothing: 16 N bits. All N in some order, then all in another, at least 20 times and
    a megabyte: the last 5 % asks for nothing that was not told before.   -> N, (rows, 5) uint8
    """
    asked = str(FACTS) if spec == "facts" else spec.removeprefix("facts:")
    n = int(asked) if asked.isascii() and asked.isdigit() else 0
    if not 1 <= n <= 1 << 20:
        raise ValueError(f"corpus {spec!r}: facts:N has N facts, from 1 to {1 << 20:,}")
    seed = len(TASKS)
    key, first = np.unique(philox(seed, 0, 2 * n + 64) % 2**24, return_index=True)
    key = key[first.argsort()][:n]  # as drawn, none twice
    value = philox(seed, 1, n) % 2**16
    fact = np.stack([key >> 16, key >> 8, key, value >> 8, value], 1).astype(np.uint8)  # (n, 5)
    passes = max(20, -(-200_000 // n))
    order = philox(seed, 2, passes * n).reshape(passes, n).argsort(1, kind="stable")
    return n, fact[order.ravel()]
