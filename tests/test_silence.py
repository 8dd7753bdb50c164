"""Wrong input of the library's functions is an error, never a wrong answer: torch would stretch an
axis of 1, leave rows of a result unwritten, or cut a number off, and say nothing.

A function's operands are spelled in letters, an axis each; every axis of every operand is given
another size in turn. Whatever error comes will do, if something comes. An axis whose letter stands
nowhere else may have any size.
"""

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch

import attention
import latent_moe
import mamba
import mtp
import nvfp4
from model import Cache
from nvfp4 import NVFP4, Recipe
from post import groups, pack, rlhf, rollout, tasks
from quant import autoquant, calibrate, lowbit, packed, statecache

SIZE = dict(b=2, t=3, h=4, p=5, g=2, n=6, w=8, k=4, j=3, m=7, E=4, c=2, i=16, o=32, v=9, s=1, z=16)
SIZE |= dict(x=1, G=8, L=5, e=8, K=4, H=2)


class Call(NamedTuple):
    """f(operand, ...), each (m, k) of letters as in SIZE, of normal numbers or what `made` says."""

    f: object
    letters: str
    made: dict = {}  # by place: sizes -> the operand
    free: str = ""  # letters that other sizes fit as well


def ids(top):
    return lambda *size: torch.randint(top, size)


def ones(*size):
    return torch.ones(size, dtype=torch.bool)


def positive(*size):
    return torch.rand(size)


def counted(*size):
    """Seven rows of four experts: m and E of SIZE."""
    return torch.tensor([2, 0, 4, 1, *[0] * 9])[: math.prod(size)].view(size)


def e4m3(*size):
    return torch.ones(size, dtype=torch.float8_e4m3fn)


def experts(c, pick, gate):
    with torch.no_grad():
        return latent_moe.Experts(SIZE["G"], SIZE["i"], 12)(c, pick, gate)


def stack(x, count):
    """Rows of four packed matrices."""
    held, w = packed.Stack("FP8", 4, 16, 16), calibrate.encode(torch.randn(4, 16, 16), "FP8")
    for name, t in w.items():
        held.get_buffer(name).copy_(t)
    return packed.mm(x, held, torch.tensor(count))


def on_trial(count):
    """A layer that has read three tokens of two rows on trial."""
    cache = mamba.State()
    cache.trial = True
    with torch.no_grad():
        mamba.Mamba2(8, 2, 4, 1, 4)(torch.randn(2, 3, 8), cache)
        cache.keep(torch.tensor(count))
    return cache


def product(x, w, count):
    return lowbit.matmul(x, w, count, lowbit.Operands(Recipe()))


SCAN = dict.fromkeys([1], positive) | {2: lambda *size: -torch.rand(size)}
MOE = {1: lambda *size: torch.rand(*size[:-1], 8).topk(size[-1]).indices}
CALLS = {
    "mamba.ssd_recurrent": Call(mamba.ssd_recurrent, "bthp bth h btgn btgn h bhpn", SCAN),
    "mamba.ssd_masked": Call(mamba.ssd_masked, "bthp bth h btgn btgn h", SCAN),
    "mamba.ssd_chunked": Call(mamba.ssd_chunked, "bthp bth h btgn btgn h bhpn", SCAN),
    "mamba.causal_conv": Call(mamba.causal_conv, "btw wsk w bjw", free="t"),
    "mamba.causal_conv, one token": Call(mamba.causal_conv, "bxw wsk w bjw"),
    "mamba.GatedNorm": Call(mamba.GatedNorm(8, 2), "btw btw"),
    "mamba.write": Call(
        lambda x, dt, A, B, S: mamba.write(S, x, dt, A, B), "bthp bth h btgn bhpn", SCAN
    ),
    "attention.attend": Call(
        lambda q, k, v: attention.attend(q, k, v, 2), "bhte bHLe bHLe", free="L"
    ),
    "attention.attend, one token": Call(
        lambda q, k, v: attention.attend(q, k, v, 4), "bhxe bHLe bHLp"
    ),
    "latent_moe.grouped_mm": Call(latent_moe.grouped_mm, "mi Eoi E", {2: counted}),
    "latent_moe.Experts": Call(experts, "ti tK tK", MOE),
    "latent_moe.Experts, many tokens": Call(experts, "oi oK oK", MOE),
    "mtp.nll": Call(mtp.nll, "btv bt bt", {1: ids(1), 2: ones}, free="v"),
    "nvfp4.pack": Call(nvfp4.pack, "mi mi", {1: ones}),
    "nvfp4.dequantize": Call(
        lambda codes, s, amax: nvfp4.dequantize(NVFP4(codes, s, amax)),
        "bz bc s",
        {0: lambda *size: ids(256)(*size).to(torch.uint8), 1: e4m3, 2: positive},
    ),
    "lowbit.matmul": Call(product, "mi Eoi E", {2: counted}),
    "packed.values": Call(
        lambda codes, s: packed.nvfp4_values(codes, s, torch.ones(())),
        "bz bc",
        {0: lambda *size: ids(256)(*size).to(torch.uint8), 1: e4m3},
    ),
    "calibrate.encode": Call(
        lambda w, H: calibrate.encode(w, "NVFP4", "output", H),
        "Eoi Eii",
        {1: lambda *size: torch.eye(16)[: size[1], : size[2]].expand(size)},
        free="o",
    ),
    "statecache.to_fp16": Call(statecache.to_fp16, "mi mi", {1: ids(1 << 13)}),
    "groups.advantages": Call(groups.advantages, "mi mi", {1: ones}),
    "groups.weights": Call(groups.weights, "bt bt bt bt", {2: positive, 3: ids(2)}),
    "groups.objective": Call(lambda *x: groups.objective(*x, beta=0.1), "bt bt bt bt bt bt"),
    "rlhf.rewards": Call(rlhf.rewards, "mj m m"),
}


def operands(call, change=None):
    """One call's operands; change: (operand, axis, another size)."""
    made = []
    for place, letters in enumerate(call.letters.split()):
        size = [SIZE[x] for x in letters]
        if change and change[0] == place:
            size[change[1]] = change[2]
        made.append(call.made.get(place, torch.randn)(*size))
    return made


def changes(call):
    """Every axis that has to fit another, with sizes that do not."""
    seen = Counter(call.letters.replace(" ", ""))
    for place, letters in enumerate(call.letters.split()):
        for axis, x in enumerate(letters):
            if x not in call.free and (seen[x] > 1 or x == "s"):
                for size in {1, SIZE[x] + 1, 2 * SIZE[x], SIZE[x] - 1} - {SIZE[x]}:
                    yield place, axis, size


def silent(call):
    """The changes that a function answers as if nothing were wrong."""
    found = []
    for change in changes(call):
        try:
            call.f(*operands(call, change))
        except (ValueError, RuntimeError, IndexError):
            continue
        found.append(change)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_no_axis_is_stretched_or_cut(name):
    call = CALLS[name]
    call.f(*operands(call))
    assert len(list(changes(call))) >= 3 and not silent(call), silent(call)


def refused(call):
    try:
        call()
    except (ValueError, RuntimeError, IndexError):
        return True
    return False


MODEL = object()  # never asked
MATRIX = torch.randn(1, 4, 32)
NUMBERS = {
    "a top-k beyond the kept groups": lambda: latent_moe.choose(torch.rand(3, 8), 6, 4, 2),
    "counts that leave rows over": lambda: latent_moe.grouped_mm(
        torch.randn(8, 16), torch.randn(4, 16, 16), torch.ones(4, dtype=torch.long)
    ),
    "counts of more rows than there are": lambda: latent_moe.grouped_mm(
        torch.randn(8, 16), torch.randn(4, 16, 16), torch.tensor([9, 1, 1, 1])
    ),
    "a latent of nothing": lambda: latent_moe.LatentMoE(8, 4, 2, 4, 4, latent=0),
    "a bias's rate that is no number": lambda: latent_moe.update_bias(torch.nn.Module(), math.nan),
    "a bias's rate below 0": lambda: latent_moe.update_bias(torch.nn.Module(), -1),
    "integers in a scan": lambda: mamba.ssd_masked(
        *(torch.ones(s, dtype=torch.long) for s in ((1, 2, 2, 2), (1, 2, 2), (2,))),
        *torch.ones(2, 1, 2, 1, 2),
    ),
    "a count for one of two rows": lambda: mamba.Mamba2(8, 2, 4, 1, 4)(
        torch.randn(2, 3, 8), count=torch.tensor([1])
    ),
    "a count for one of two rows kept": lambda: on_trial([2]),
    "a count beyond the rows": lambda: on_trial([2, 4]),
    "a count below 0": lambda: on_trial([2, -1]),
    "packed rows of no expert": lambda: stack(torch.randn(7, 16), [1, 2, 3, 0]),
    "more packed rows than there are": lambda: stack(torch.randn(7, 16), [5, 3, 1, 1]),
    "a packed count below 0": lambda: stack(torch.randn(7, 16), [5, 3, 1, -2]),
    "packed counts of three experts": lambda: stack(torch.randn(7, 16), [5, 1, 1]),
    "fewer tokens kept than none": lambda: one_attention().keep(torch.tensor([1, -1]), 3),
    "more tokens kept than read": lambda: one_attention().keep(torch.tensor([4, 4]), 3),
    "depth 0": lambda: mtp.MTP(lambda letter: mtp.Plain(4), 4, blocks=2)(
        *torch.randn(2, 1, 3, 4), 0
    ),
    "depth -1": lambda: mtp.MTP(lambda letter: mtp.Plain(4), 4, blocks=2)(
        *torch.randn(2, 1, 3, 4), -1
    ),
    "no block": lambda: mtp.MTP(lambda letter: mtp.Plain(4), 4, blocks=0),
    "targets that torch ignores": lambda: mtp.nll(
        torch.randn(1, 2, 3), torch.full((1, 2), -100), torch.ones(1, 2)
    ),
    "runs of 16 over two rows": lambda: nvfp4.hadamard(torch.randn(2, 8)),
    "a rotation of integers": lambda: nvfp4.hadamard(torch.ones(2, 16, dtype=torch.int32)),
    "a rotation along another axis": lambda: nvfp4.hadamard(torch.randn(2, 16, 16), 1),
    "codes of an odd row": lambda: nvfp4.pack(torch.ones(2, 3), ones(2, 3)),
    "scales that are no bytes": lambda: nvfp4.swizzle(torch.ones(2, 4)),
    "a format that nobody knows": lambda: Recipe("nvfp5"),
    "a share above 1": lambda: Recipe(last=1.5),
    "a share that is no number": lambda: Recipe(last=math.nan),
    "two matrices where there is one": lambda: product(
        torch.randn(4, 16), torch.randn(2, 16, 16), None
    ),
    "a method that nobody knows": lambda: calibrate.encode(MATRIX, "NVFP4", "best"),
    "a kind that nobody knows": lambda: calibrate.encode(MATRIX, "NVFP5"),
    "a matrix of NaN": lambda: calibrate.encode(MATRIX * math.nan, "NVFP4"),
    "bits without end": lambda: autoquant.assign({"a": {None: 0.0}}, {"a": 16}, math.inf),
    "bits below 0": lambda: autoquant.assign({"a": {None: 0.0}}, {"a": 16}, -4),
    "a document without its numbers": lambda: pack.lay([[0]], 4, [[1, 2]], [[1.0]]),
    "a row that is too short": lambda: pack.lay([[0, 1]], 4, [[1, 2, 3], [4, 5]]),
    "documents with a gap": lambda: pack.Docs(torch.tensor([[0, 0, 2, 2]])),
    "documents that come back": lambda: pack.Docs(torch.tensor([[0, 1, 0, 1]])),
    "a judge's NaN": lambda: rlhf.base(torch.full((3, 3), math.nan)),
    "fewer problems than none": lambda: tasks.problems(dict(sort=1), -1, 0),
    "replies of nothing": lambda: rollout.roll(MODEL, [[1]], 2, 0, 0),
    "no reply": lambda: rollout.roll(MODEL, [[1]], 0, 5, 0),
    "a query before the first key": lambda: attention.attend(
        torch.randn(1, 2, 3, 8), *torch.randn(2, 1, 1, 3, 8), -1
    ),
    "more tokens dropped than read": lambda: read_three().drop(5),
    "fewer dropped than none": lambda: read_three().drop(torch.tensor([-1])),
}


def one_attention():
    cache = Cache("*", 2)
    cache.layers[0].append(*torch.randn(2, 2, 1, 5, 8))
    return cache


def read_three():
    cache = attention.KV()
    cache.append(*torch.randn(2, 1, 1, 3, 8))
    return cache


@pytest.mark.parametrize("what", NUMBERS)
def test_a_number_that_means_nothing_is_refused(what):
    assert refused(NUMBERS[what])


def test_one_query_does_not_see_the_keys_behind_it():
    """Where a token stands decides what it sees, of one token as of many."""
    q, k, v = torch.randn(1, 4, 1, 8), *torch.randn(2, 1, 2, 5, 8)
    for first in range(5):
        alone = attention.attend(q, k[:, :, : first + 1], v[:, :, : first + 1], first)
        assert torch.equal(attention.attend(q, k, v, first), alone)
        assert torch.allclose(attention.attend(q, k, v, torch.tensor([first])), alone)


def test_this_file_can_fail(monkeypatch):
    monkeypatch.setattr(groups, "alike", lambda *numbers: None)
    assert (0, 0, 1) in silent(CALLS["groups.objective"])
    assert not refused(lambda: None)
