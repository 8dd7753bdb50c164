"""
Verdicts: what a few paired differences say about a claim.

A claim says that one variant's measure exceeds another's. Both have the same weights and the same
batches for a seed, so a seed gives one difference d. Of n of them

    mean +- t(n-1) s / sqrt(n)        the two-sided 95 % interval, s their standard deviation

lies above 0 (reproduces), below (reproduces the other way), or holds 0 (inside the spread). Then
the least n is said at which an interval around the same mean with the same s would not: a hint of
the size of the experiment, no promise.

Not here  many claims judged at once: of twenty true zeros one is expected to look like something
Sources   Student's t; its quantiles beyond ten degrees of freedom by Cornish and Fisher's expansion
"""

import math
import statistics
from typing import NamedTuple

LEAST = 3  # seeds
MOST = 1000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.959964
SAME, OTHER, INSIDE = "reproduces", "reproduces the other way", "inside the spread"


class Claim(NamedTuple):
    """`measure` of variant `more` exceeds that of variant `less`, or there `than` does."""

    says: str  # one sentence, which is a picture's title if the claim reproduces
    where: str  # paper, figure or table
    published: str  # what was measured there
    more: str
    less: str
    measure: str
    than: str = ""
    reason: str = ""  # why it should survive the shrinking, or did not


class Verdict(NamedTuple):
    words: str
    mean: float
    half: float  # of the interval's width; 0 of arithmetic, NaN of fewer than two seeds
    seeds: int

    def numbers(self):
        """The mean difference and its interval, as a table has them."""
        if self.seeds == 0:
            return "-"
        spread = "" if self.half == 0 or math.isnan(self.half) else f" +- {self.half:.2g}"
        return f"{self.mean:+.3g}{spread}"


def student(freedom):
    """The 97.5 % quantile of t."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z, n = NORMAL, freedom
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n * n)


def interval(differences):
    """Their mean, and half the width of its 95 % interval (NaN of one)."""
    n, mean = len(differences), statistics.mean(differences)
    if n < 2:
        return mean, math.nan
    return mean, student(n - 1) * statistics.stdev(differences) / math.sqrt(n)


def needed(mean, spread):
    """The least number of seeds whose interval would leave 0 out, or None up to MOST."""
    for n in range(LEAST, MOST + 1):
        if student(n - 1) * spread / math.sqrt(n) < abs(mean):
            return n
    return None


def judge(differences, exact=False):
    """A Verdict. exact: arithmetic, which one number decides."""
    n = len(differences)
    if n == 0:
        return Verdict("not measured", math.nan, math.nan, 0)
    mean, half = interval(differences)
    if exact:
        words = SAME if mean > 0 else OTHER if mean < 0 else "no difference"
        return Verdict(f"{words} (arithmetic)", mean, 0.0, n)
    if n < LEAST:
        return Verdict(f"too few seeds ({n} of {LEAST})", mean, half, n)
    if abs(mean) > half:
        return Verdict(SAME if mean > 0 else OTHER, mean, half, n)
    enough = needed(mean, statistics.stdev(differences))
    many = f"at least {enough}" if enough else f"more than {MOST:,}"
    return Verdict(f"{INSIDE} ({many} seeds would be needed)", mean, half, n)
