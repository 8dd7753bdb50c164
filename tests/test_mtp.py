"""
mtp.py is mostly bookkeeping: which token the block is told at (t, k), which it is asked for,
whether that counts.

The oracle is indexing: of a text w_0 w_1 ..., position t has read w_t; depth k is told w_{t+k},
asked for w_{t+k+1}.
"""

import pytest
import torch
from conftest import rms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mtp
from mtp import MTP, counts, nll, roll


class Echo(nn.Module):
    """A block that passes its input on, and counts."""

    def __init__(self, letter=None):
        super().__init__()
        self.letter, self.calls = letter, []

    def forward(self, x, cache=None, count=None, docs=None):
        self.calls.append((cache, count))
        return x


class Mixer(nn.Module):
    """A causal block with weights: x + W (running mean of x), so that order and depth leave a
    trace.
    """

    def __init__(self, d):
        super().__init__()
        self.w = nn.Linear(d, d, bias=False)

    def forward(self, x, cache=None, count=None, docs=None):
        return x + self.w(x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(-1, 1)).tanh()


def norm(x, weight, eps):
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def built(d=6, pattern="*E", blocks=1, depths=2, eps=1e-5, seed=0):
    torch.manual_seed(seed)
    m = MTP(lambda letter: Mixer(d), d, pattern, blocks, depths, eps).double()
    for p in m.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return m


def probe(text, mask, depths, shift=0):
    """loss() with a spy for a block and a blank head: what was told, what was asked, at every (k,
    row, t).

    The gradient of a cross entropy over v equal logits is 1/v everywhere, less 1 at the target, and
    0 where masked.
    """
    told, blank, v, seen = [], [], int(text.max()) + 2, []

    class Spy:
        def __init__(self):
            self.depths = depths

        def __call__(self, h, e, k, docs=None):
            told.append(e[..., 0].long()), seen.append((k, h))
            return h + 1  # so that the chain of h can be followed

    def head(h):
        blank.append(torch.zeros(*h.shape[:2], v, requires_grad=True))
        return blank[-1]

    b, T = mask.shape
    sums = mtp.loss(
        Spy(),
        torch.zeros(b, T, 1),
        text[:, 1 + shift : 1 + shift + T],
        mask,
        lambda ids: ids[..., None].float(),
        head,
    )
    grads = torch.autograd.grad(sum(sums), blank)
    asked = [torch.where(g.abs().sum(-1) > 0, g.argmin(-1), -1) for g in grads]
    return told, asked, [float(s.detach()) for s in sums], seen


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.floats(0, 1), st.integers(0, 999)
)
def test_told_and_asked(b, T, depths, density, seed):
    r = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 50, (b, T + 1), generator=r)
    mask = (
        torch.rand(b, T, generator=r) <= density
    )  # mask[t] belongs to the target w_{t+1}, anywhere
    told, asked, sums, seen = probe(text, mask, depths)
    assert len(told) == len(asked) == len(sums) == depths and [k for k, _ in seen] == list(
        range(1, depths + 1)
    )
    left = [sum(bool(m) for row in mask for m in row)]
    for k in range(1, depths + 1):
        n = 0
        for row in range(b):
            for t in range(T):
                if t + k <= T:
                    assert told[k - 1][row, t] == text[row, t + k], (k, t)
                there = t + k < T and bool(mask[row, t + k])  # rolled past the end: masked
                assert asked[k - 1][row, t] == (text[row, t + k + 1] if there else -1), (k, t)
                n += there
        left.append(n)
        each = torch.tensor(float(text.max() + 2)).log().item()  # log v
        assert sums[k - 1] == pytest.approx(n * each, rel=1e-5)
        assert (seen[k - 1][1] == k - 1).all()  # depth k starts from what depth k-1 made
    assert counts(mask, depths) == left


def test_roll():
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert roll(x).tolist() == [[2, 3, 0], [5, 6, 0]] and x[0, 0] == 1
    assert roll(torch.tensor([[True, True]])).tolist() == [[True, False]]
    assert roll(torch.tensor([[True]])).dtype == torch.bool
    assert roll(x[:, :1]).tolist() == [[0], [0]]


def test_counts():
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    assert (
        counts(mask, 0) == [7]
        and counts(mask, 3) == [7, 6, 4, 3]
        and counts(mask, 6)[-2:] == [0, 0]
    )


def test_nll_is_a_sum_in_fp32():
    logits, targets = torch.randn(2, 4, 7), torch.randint(7, (2, 4))
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool()
    want = sum(
        -torch.log_softmax(logits[i, j], 0)[targets[i, j]]
        for i in range(2)
        for j in range(4)
        if mask[i, j]
    )
    assert rms(nll(logits, targets, mask), want) <= 1e-6
    low = nll(logits.bfloat16(), targets, mask)
    assert (
        low.dtype == torch.float32
        and rms(low, nll(logits.bfloat16().float(), targets, mask)) <= 1e-6
    )
    assert float(nll(logits, targets, mask & False)) == 0


@pytest.mark.parametrize("pattern", ["*E", "M", "*EM"])
def test_one_depth_is_its_equation(pattern):
    d, eps = 6, 1e-2
    m, r = built(d, pattern, eps=eps), torch.Generator().manual_seed(1)
    h, e = (torch.randn(2, 5, d, dtype=torch.float64, generator=r) for _ in range(2))
    w = dict(m.named_parameters())
    v = torch.cat(
        [norm(e, w["layers.0.enorm.weight"], eps), norm(h, w["layers.0.hnorm.weight"], eps)], -1
    )
    v = v @ w["layers.0.eh_proj.weight"].T  # [embedding ; hidden]
    for layer in m.layers:
        v = layer(v)
    assert (
        rms(m(h, e), norm(v, w[f"layers.{len(pattern) - 1}.final_layernorm.weight"], eps)) <= 1e-12
    )
    assert rms(m(e, h), m(h, e)) > 0.1


def test_embedding_first_hidden_second():
    d = 4
    m = MTP(Echo, d, "*E", 1, 1).double()
    h, e = torch.randn(2, 1, 3, d, dtype=torch.float64)
    half = torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    m.layers[0].eh_proj.weight.data = torch.cat(half, 1)
    assert rms(m(h, e), norm(e, 1, 1e-5)) <= 1e-4
    m.layers[0].eh_proj.weight.data = torch.cat(half[::-1], 1)
    assert rms(m(h, e), norm(h, 1, 1e-5)) <= 1e-4


def test_names_are_the_released_ones():
    """layers.0 and layers.1 are the letters of the pattern, not the depths; further blocks count
    on.
    """
    letters = []
    m = MTP(lambda letter: letters.append(letter) or Echo(letter), 4, "*E", blocks=2, depths=2)
    assert letters == ["*", "E", "*", "E"]
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {
        f"layers.{i + j}.{n}.weight": s
        for i in (0, 2)
        for j, n, s in (
            (0, "enorm", (4,)),
            (0, "hnorm", (4,)),
            (0, "eh_proj", (4, 8)),
            (1, "final_layernorm", (4,)),
        )
    }


@pytest.mark.parametrize(
    "blocks,depths,expected",
    [(1, 3, [0, 0, 0]), (2, 2, [0, 1]), (2, 4, [0, 1, 1, 1]), (3, 2, [0, 1])],
)
def test_depth_k_uses_block_k_or_the_last(blocks, depths, expected):
    """Which stored block does depth k run through? Disturb them one by one and see which depths
    notice.
    """
    h, e = torch.randn(2, 1, 5, 6, dtype=torch.float64)
    for i in range(blocks):
        m = built(blocks=blocks, depths=depths)
        before = [m(h, e, k) for k in range(1, depths + 1)]
        for p in m.layers[2 * i : 2 * i + 2].parameters():
            p.data += 0.1 * torch.randn_like(p)
        moved = [not torch.equal(m(h, e, k), old) for k, old in enumerate(before, 1)]
        assert moved == [x == i for x in expected]


def test_count_and_the_right_cache_reach_every_layer():
    m = MTP(Echo, 4, "*E", blocks=2, depths=3)
    h, count = torch.randn(1, 2, 4), torch.tensor([2])
    for k in (1, 2, 3):
        m(h, h, k, ["a", "b", "c", "d"], count)
    assert [[c for c, n in layer.calls] for layer in m.layers] == [
        ["a"],
        ["b"],
        ["c", "c"],
        ["d", "d"],
    ]
    assert all(n is count for layer in m.layers for _, n in layer.calls)


def chained(m, text, mask, embed, head, h):
    """The losses of every depth by indexing alone: for every t and k, told w_{t+k}, asked for
    w_{t+k+1}.
    """
    b, T = mask.shape
    sums = []
    for k in range(1, m.depths + 1):
        e = torch.zeros_like(h)
        for t in range(T):
            e[:, t] = embed.weight[text[:, t + k]] if t + k <= T else embed.weight[0]
        h = m(h, e, k)
        total = 0
        for row in range(b):
            for t in range(T - k):
                if mask[row, t + k]:
                    total = (
                        total - torch.log_softmax(head.weight @ h[row, t], 0)[text[row, t + k + 1]]
                    )
        sums.append(total)
    return sums


@pytest.mark.parametrize("blocks,depths", [(1, 1), (1, 2), (2, 2), (1, 4)])
def test_loss_is_the_brute_force_and_teaches_embedding_head_and_backbone(blocks, depths):
    m, b, T, d, v = built(blocks=blocks, depths=depths), 2, 7, 6, 9
    torch.manual_seed(3)
    embed, head = nn.Embedding(v, d).double(), nn.Linear(d, v, bias=False).double()
    text, h = (
        torch.randint(v, (b, T + 1)),
        torch.randn(b, T, d, dtype=torch.float64, requires_grad=True),
    )
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]]).bool()
    got, want = (
        mtp.loss(m, h, text[:, 1:], mask, embed, head),
        chained(m, text, mask, embed, head, h),
    )
    assert all(rms(g, w) <= 1e-6 for g, w in zip(got, want))  # nll is fp32
    used = list(m.layers[: 2 * min(blocks, depths)].parameters())
    for to in ([embed.weight, head.weight, h], used):
        for g, w in zip(
            torch.autograd.grad(sum(got), to, retain_graph=True),
            torch.autograd.grad(sum(want), to, retain_graph=True),
        ):
            assert g.any() and rms(g, w) <= 1e-5


def test_depth_2_starts_from_the_normalised_state_of_depth_1():
    m, seen = built(), []
    m.layers[0].hnorm.register_forward_hook(lambda mod, args, out: seen.append(args[0]))
    m.layers[1].final_layernorm.register_forward_hook(lambda mod, args, out: seen.append(out))
    embed, head = nn.Embedding(9, 6).double(), nn.Linear(6, 9).double()
    h = torch.randn(1, 5, 6, dtype=torch.float64)
    mtp.loss(m, h, torch.randint(9, (1, 5)), torch.ones(1, 5).bool(), embed, head)
    assert seen[0] is h and seen[2] is seen[1]


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_perfect_predictor_is_perfect_at_its_own_offset_only(offset):
    """A block that shouts w_{t+k+offset}: free of loss when asked for exactly that."""
    text = torch.stack([torch.randperm(32) for _ in range(2)])  # no token twice: no luck

    class Oracle:
        depths = 3

        def __call__(self, h, e, k, docs=None):
            hot = [nn.functional.one_hot(text[:, min(t + k + offset, 31)], 32) for t in range(20)]
            return torch.stack(hot, 1) * 100.0

    mask = torch.ones(2, 20).bool()
    each = mtp.loss(
        Oracle(), torch.zeros(2, 20, 1), text[:, 1:21], mask, lambda ids: ids, lambda h: h
    )
    per_target = [float(s) / n for s, n in zip(each, counts(mask, 3)[1:])]
    assert all(x == 0 for x in per_target) if offset == 1 else all(x > 90 for x in per_target)


def test_the_table_of_the_docstring():
    """The_cat: its rows, read back from the code."""
    text = torch.tensor([[ord(c) for c in "The_ca"]])
    told, asked, _, _ = probe(text, torch.ones(1, 5).bool(), 2)
    show = lambda row: "".join("-" if c <= 0 else chr(c) for c in row[0].tolist())
    assert [show(x) for x in told] == ["he_ca", "e_ca-"] and [show(x) for x in asked] == [
        "e_ca-",
        "_ca--",
    ]
    lines = [line.replace("told", "target").split() for line in mtp.__doc__.splitlines()]
    rows = ["".join(x[x.index("target") + 1 :][:5]) for x in lines if "target" in x and len(x) > 5]
    assert rows == ["he_ca", "he_ca", "e_ca-", "e_ca-", "_ca--"]


def test_the_future_does_not_leak():
    m = built().float()
    h, e = torch.randn(2, 1, 9, 6)
    first = m(h, e)
    h[:, 5:], e[:, 5:] = 9.0, 9.0
    assert torch.equal(m(h, e)[:, :5], first[:, :5])


def test_this_file_can_fail():
    m, T, v = built(), 7, 9
    embed, head = nn.Embedding(v, 6).double(), nn.Linear(6, v, bias=False).double()
    text, h, mask = (
        torch.randint(v, (2, T + 1)),
        torch.randn(2, T, 6, dtype=torch.float64),
        torch.ones(2, T).bool(),
    )
    want = torch.stack(chained(m, text, mask, embed, head, h))
    late = torch.stack(
        mtp.loss(m, h, text[:, :-1], mask, embed, head)
    )  # the inputs where the targets belong
    assert rms(late, want) > 0.01
    told, asked, _, _ = probe(text, mask[:, :-1], 2, shift=1)
    assert not torch.equal(told[0][:, 0], text[:, 1])
