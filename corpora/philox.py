"""
Random numbers without a state: each is a hash of a key and of its place.

A generator that steps from one number to the next has to be saved, restored and shared out. Philox
turns a counter into a number by ten rounds of multiplying and mixing, under a key; so the numbers
of step 1000 are there without those of the 999 before it, on any rank.

    philox(seed, step, n)   the counters 0, 1, ... under the key (seed, step)

Not here  what is made of them: data.py (where a batch begins), synthetic.py, sft.py
Sources   Salmon et al. 2011; numpy, which promises to keep these bits
"""

from operator import index

import numpy as np


def philox(seed, step, n):
    """n uint64 that depend on (seed, step) alone: integers from 0 on."""
    key = index(seed), index(step)
    if min(key) < 0:
        raise ValueError(f"seed {seed}, step {step}: neither is below 0")
    return np.random.Philox(key=np.array(key, np.uint64)).random_raw(n)
