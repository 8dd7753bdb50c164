"""
Plan: how a run is best cut over --world ranks of a card, found by arithmetic.

    python train.py --preset super --plan --world 64 --gpu h100
    python train.py --preset super --plan --world 128 --gpu b200 --batch 1024

Every way to choose ep, cp, micro and what is made again for the gradient is a row of numbers in
budget.py: the peak of a rank's memory, and the least time of a step. Of those that fit, the one
with the least time is taken; of equals that which computes and sends least, then needs least
memory. All of them are looked at, some hundreds, and for each ep and cp the best is shown, or why
there is none.

Not here  what the arithmetic leaves out: budget.py; a real step, followed: dryrun.py
Sources   cards and links: dryrun.py
"""

from dataclasses import replace
from typing import NamedTuple

from scale import budget
from scale.dryrun import GPUS, divides, seconds

# What is made again, from nothing to everything; by what the layers keep, the largest first.
AGAIN = ("", "logits", "experts", "mamba", "mamba,experts", "mamba,experts,logits", "all")
MICRO = (1, 2, 4, 8, 16)


class Way(NamedTuple):
    """A run cut up in one way, and what that costs: seconds of a step at least, and of computing
    and sending one after the other; bytes at the peak."""

    floor: float
    both: float
    peak: float
    run: object


def weigh(run, c):
    seen = budget.reckon(run, c)
    compute, link = seconds(run, seen)
    return Way(max(compute, link), compute + link, seen["peak"], run)


def ways(run, c, ep, cp):
    """Those of one ep and cp; ValueError if it does not cut the run into equal parts."""
    run = replace(run, ep=ep, cp=cp, micro=0, layers=0)
    divides(run, c)
    share = run.batch * cp // run.world
    sizes = [n for n in MICRO if share % n == 0]
    return [weigh(replace(run, micro=n, recompute=again), c) for n in sizes for again in AGAIN]


def fits(way):
    return way.peak < 0.95 * GPUS[way.run.gpu][0]


def find(run, c):
    """The best way of all or None, and for each (ep, cp) its best way, or why there is none."""
    powers = [n for n in range(1, run.world + 1) if run.world % n == 0]
    table = {}
    for ep in powers:
        for cp in powers:
            try:
                some = ways(run, c, ep, cp)
            except ValueError as e:
                table[ep, cp] = str(e)
            else:
                least = min(some, key=lambda way: way.peak)
                table[ep, cp] = min(filter(fits, some), default=least, key=lambda way: way[:3])
    best = [way for way in table.values() if isinstance(way, Way) and fits(way)]
    return min(best, default=None, key=lambda way: way[:3]), table


def words(way, best):
    """Of a way that was not taken: how far it is from the one that was."""
    numbers = f"{way.floor:9.2f} s {way.peak / 1e9:9.1f} GB   {chosen(way.run)}"
    if not fits(way):
        return f"{numbers}: does not fit, with the least memory that it can have"
    return f"{numbers}: {way.floor / best.floor:.2f} times the least"


def chosen(run):
    return f"--micro {run.micro}" + f" --recompute {run.recompute}" * bool(run.recompute)


def show(run, c, say):
    """Prints the way that is taken, and the table of those that are not."""
    best, table = find(run, c)
    memory = GPUS[run.gpu][0]
    say(
        f"{run.preset} on {run.world} x {run.gpu}, {run.batch} sequences of {run.length:,} tokens "
        f"a step; by arithmetic, 5 % of {memory / 1e9:.0f} GB kept free"
    )
    say(f"{'ep':>5}{'cp':>6}{'at least':>11}{'peak':>12}")
    for (ep, cp), way in table.items():
        if way is not best:
            why = way if isinstance(way, str) else words(way, best)
            say(f"{ep:5}{cp:6}{why if isinstance(way, Way) else '   ' + why}")
    if not best:
        raise ValueError(
            f"nothing fits {run.world} cards of {memory / 1e9:.0f} GB: take more of them, or a "
            "smaller --length"
        )
    say(
        f"take       --ep {best.run.ep} --cp {best.run.cp} {chosen(best.run)}: "
        f"{best.floor:.2f} s a step at least, {best.peak / 1e9:.1f} GB"
    )
    return best
