"""
kernels/experts.py against a loop over tokens and picks in fp64: the sum, and the gradients of all
four inputs.

22 of 512 at a narrow width, experts that get nothing, one that gets everything, one token, rows
that fill no tile, widths that fill no block, both sizes of tile. Bad neighbours: what torch.empty
returns is NaN here.
"""

import pytest
import torch
from conftest import TOLERANCE, close, rms

from kernels import experts as kernel
from latent_moe import Experts, LatentMoE

# bf16: three roundings in a row on the way to r (hid, out, r) and to dc (dh, dx, dc), each u /
# sqrt(3) at most in
# the mean square, u = 2^-8. The readable form has five on that way, and the kernel may not do worse
# than it.
CLOSE = {**TOLERANCE, torch.bfloat16: 2**-8}
NAMES = ("r", "dc", "dgate", "dup", "ddown")


def inputs(m, E, k, l, f, dtype=torch.float32, chosen=None, seed=0):
    """chosen: only these experts are ever picked. The sums' scale is that of the model: gates add
    up to 5.
    """
    r = torch.Generator().manual_seed(seed)
    c = torch.randn(m, l, generator=r).to(dtype)
    score = torch.rand(m, E, generator=r)
    if chosen is not None:
        score[:, chosen] += 1
    pick = score.topk(k).indices
    gate = torch.rand(m, k, generator=r) + 0.1
    up, down = (
        torch.randn(E, f, l, generator=r) / l**0.5,
        torch.randn(E, l, f, generator=r) / f**0.5,
    )
    return c, pick, 5 * gate / gate.sum(1, keepdim=True), up.to(dtype), down.to(dtype)


def definition(c, pick, gate, up, down):
    """r_t = sum_j p_tj W_down,e relu(W_up,e c_t)^2, one token and one expert at a time."""
    return torch.stack(
        [
            sum(p * (down[e] @ (up[e] @ x).relu().square()) for e, p in zip(es, ps))
            for x, es, ps in zip(c, pick.tolist(), gate)
        ]
    )


def answers(form, args, dtype=None):
    c, pick, gate, up, down = args
    wanted = [v.to(dtype or v.dtype).detach().requires_grad_() for v in (c, gate, up, down)]
    r = form(wanted[0], pick, *wanted[1:])
    reading = torch.randn(r.shape, generator=torch.Generator().manual_seed(1)).to(c.dtype)
    return [r, *torch.autograd.grad((r * reading.to(r.dtype)).sum(), wanted)]


LARGE = 232_448  # bytes of shared memory a block has on an H100
CASES = {
    "22 of 512": dict(m=4, E=512, k=22, l=16, f=24),
    "large tiles, ragged rows": dict(m=150, E=3, k=2, l=72, f=136),
    "experts that get nothing": dict(m=20, E=9, k=2, l=32, f=48, chosen=[2, 3, 7]),
    "one takes all": dict(m=70, E=8, k=1, l=20, f=140, chosen=[5]),
    "one token": dict(m=1, E=16, k=4, l=32, f=48),
    "k is E": dict(m=5, E=3, k=3, l=8, f=5),
    "256 columns of a long sum": dict(m=64, E=2, k=2, l=256, f=1032),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, dtype):
    args = inputs(dtype=dtype, **CASES[case])
    close(
        NAMES, answers(kernel.experts, args), answers(definition, args, torch.float64), CLOSE[dtype]
    )


def test_in_bf16_it_is_no_worse_than_the_readable_form():
    args = inputs(dtype=torch.bfloat16, **CASES["large tiles, ragged rows"])

    def readable(c, pick, gate, up, down):
        module = Experts(*up.shape[:1], up.shape[2], up.shape[1])
        return torch.func.functional_call(module, dict(up_proj=up, down_proj=down), (c, pick, gate))

    want = answers(definition, args, torch.float64)
    ours, theirs = (
        [rms(a, b) for a, b in zip(answers(f, args), want)] for f in (kernel.experts, readable)
    )
    assert all(a <= b * 1.02 for a, b in zip(ours, theirs)), (ours, theirs)


def test_both_sizes_of_tile_were_met():
    rows = lambda case: CASES[case]["m"] * CASES[case]["k"]
    many = lambda case: rows(case) >= 64 * CASES[case]["E"]
    met = {
        kernel.tiles(dtype, many(case), LARGE, i, o)[0][:2]
        for case in CASES
        for dtype in TOLERANCE
        for l, f in [(CASES[case]["l"], CASES[case]["f"])]
        for i, o in ((l, f), (f, l))
    }
    assert met == {(16, 64), (16, 128), (64, 64), (128, 128), (128, 256)}


def test_which_card_gets_which_tile():
    """Super, up and down; cards of 99, 163 and 227 KB."""
    tiles = lambda many, shared, *sizes: kernel.tiles(torch.bfloat16, many, shared * 1024, *sizes)
    up, down = (1024, 2688), (2688, 1024)
    stages = lambda *a: tiles(*a)[1]["num_stages"]
    for shared in (99, 163, 227):
        assert tiles(False, shared, *down)[0] == (16, 128, 128)
        assert tiles(True, shared, *up)[0] == (128, 128, 64)
        assert tiles(True, shared, *down)[0] == (128, 128 if shared == 99 else 256, 64)
    assert [stages(True, shared, *up) for shared in (99, 163, 227)] == [4, 4, 3]
    assert [stages(False, shared, *up) for shared in (99, 163, 227)] == [3, 4, 4]
    assert tiles(True, 227, 1023, 1024) == tiles(True, 227, 2688, 1000) == tiles(True, 227)


def test_the_sort():
    """Every row in exactly one tile, of its own expert; slots of an expert in their own order."""
    for m, E, k, BM, chosen in (
        (40, 512, 22, 16, None),
        (30, 7, 2, 16, [1, 4]),
        (1, 9, 3, 128, None),
        (64, 4, 1, 16, [3]),
        (16, 1, 1, 16, None),
    ):
        pick = inputs(m, E, k, 4, 4, chosen=chosen)[1]
        order, where, ends, expert, row = kernel.route(pick, E, BM)
        flat = pick.flatten()
        assert torch.equal(order.long(), flat.argsort(stable=True)) and torch.equal(
            order[where.long()], torch.arange(m * k).int()
        )
        assert torch.equal(ends.long(), flat.bincount(minlength=E).cumsum(0))
        seen = torch.zeros(m * k)
        for e, r0 in zip(expert.tolist(), row.tolist()):
            if e < E:
                end = min(r0 + BM, int(ends[e]))
                assert end > r0 and (flat[order[r0:end].long()] == e).all()
                seen[r0:end] += 1
        assert (seen == 1).all() and int((expert < E).sum()) <= len(expert) <= m * k // BM + min(
            E, m * k
        )


def test_the_same_bits_every_time_whoever_the_neighbours_are():
    c, pick, gate, up, down = inputs(24, 16, 4, 16, 24)
    all_of_them = kernel.experts(c, pick, gate, up, down)
    assert torch.equal(kernel.experts(c, pick, gate, up, down), all_of_them)
    assert torch.equal(kernel.experts(c[5:9], pick[5:9], gate[5:9], up, down), all_of_them[5:9])


def test_the_module_takes_this_path_when_asked():
    torch.manual_seed(0)
    for latent in (8, None):  # None: experts at full width
        moe = LatentMoE(24, 12, 3, 16, 8, latent, 5.0)
        u, ask = (
            torch.randn(2, 7, 24),
            lambda: (moe(u), *torch.autograd.grad(moe(u).square().sum(), list(moe.parameters()))),
        )
        plain = ask()
        moe.experts.fast = True
        fast = ask()
        close([str(i) for i in range(len(plain))], fast, plain, 3e-6)
        assert not torch.equal(fast[0], plain[0])  # it really went another way


def test_under_autocast_it_is_the_bf16_kernel():
    c, pick, gate, up, down = inputs(9, 6, 2, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel.experts(c, pick, gate, up, down)
    assert torch.equal(
        got, kernel.experts(c.bfloat16(), pick, gate, up.bfloat16(), down.bfloat16())
    )


def test_what_it_cannot_do_it_says():
    c, pick, gate, up, down = inputs(4, 6, 2, 16, 24)
    with pytest.raises(ValueError, match="fp32 or bf16, not torch.float64"):
        kernel.experts(c.double(), pick, gate, up, down)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.experts(c, pick, gate[:3], up, down)
    module = Experts(6, 16, 24)
    module.fast, module.mm = True, lambda rows, w, count: None
    with pytest.raises(ValueError, match="no place for an mm without a kernel"):
        module(c, pick, gate)


@pytest.mark.parametrize("E", [1, 6])
def test_rows_that_came_from_other_ranks_go_through_the_kernel(E):
    """`meet`, what is between an exchange's ways there and back: forward and every gradient, with
    an expert that nobody chose; and a rank that no row came to has a gradient of zeros."""
    torch.manual_seed(E)
    module, counts = Experts(E, 16, 24), torch.tensor([5, 0, 3, 40, 1, 2][-E:])
    for count in counts, counts * 0:
        rows = torch.randn(int(count.sum()), 16)
        seen = {}
        for module.fast in (False, True):
            x = rows.clone().requires_grad_()
            out = module.meet(x, count, module.up_proj, module.down_proj)
            args = x, module.up_proj, module.down_proj
            seen[module.fast] = out, *torch.autograd.grad(out.square().sum(), args)
        close(("out", "x", "up", "down"), seen[True], seen[False], 2e-6)


def test_this_file_can_fail():
    """Weights of the neighbouring pick, a wrong expert in one slot, an activation without its
    square.
    """
    args = c, pick, gate, up, down = inputs(20, 9, 2, 32, 48)
    want = answers(definition, args, torch.float64)
    wrong = pick.clone()
    wrong[3, 1] = (wrong[3] + 1).max() % 9
    for broken in (
        (c, pick, gate.flip(1), up, down),
        (c, wrong, gate, up, down),
        (c, pick, gate, up, down.flip(0)),
    ):
        assert rms(answers(kernel.experts, broken)[0], want[0]) > 1e-2
    assert rms(kernel.experts(c, pick, gate, up, down).relu(), want[0]) > 1e-2
