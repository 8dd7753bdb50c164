"""attention.py against a softmax written as a loop over queries: rows alike and not, masks and
none, gradients; rotary positions as turns of complex numbers.
"""

import math

import pytest
import torch
from conftest import rms

from attention import KV, Attention, attend, attend_in_two, rotate


def softmax_loop(q, k, v, first, group=lambda i, h, kv: i // (h // kv)):
    (b, h, t, e), kv = q.shape, k.shape[1]
    out = torch.zeros_like(q)
    for row in range(b):
        for head in range(h):
            g = group(head, h, kv)
            for i in range(t):
                seen = int(first if isinstance(first, int) else first[row]) + i + 1
                s = (k[row, g, :seen] @ q[row, head, i]) / math.sqrt(e)
                w = torch.exp(s - s.max())
                out[row, head, i] = (w / w.sum()) @ v[row, g, :seen]
    return out


def qkv(t, L, b=2, h=6, kv=2, e=5, dtype=torch.float64):
    r = torch.Generator().manual_seed(t * 100 + L)
    return [
        torch.randn(b, n, s, e, dtype=torch.float64, generator=r).to(dtype)
        for n, s in ((h, t), (kv, L), (kv, L))
    ]


@pytest.mark.parametrize("t,first", [(1, 0), (7, 0), (1, 6), (3, 4), (5, 1)])
def test_attend_is_a_softmax(t, first):
    q, k, v = qkv(t, first + t)
    want = softmax_loop(q, k, v, first)
    assert rms(attend(q, k, v, first), want) <= 1e-12  # in two parts, merged by their sums
    assert (
        rms(attend(q.clone().requires_grad_(), k, v, first).detach(), want) <= 1e-12
    )  # under a mask
    assert rms(softmax_loop(q, k, v, first, group=lambda i, h, kv: i % kv), want) > 0.1
    k, v = (
        torch.cat([x, torch.full_like(x[:, :, :2], 50.0)], 2) for x in (k, v)
    )  # nonsense beyond every row's end
    assert rms(attend(q, k, v, torch.tensor([first, first])), want) <= 1e-12


@pytest.mark.parametrize("first", [[0, 0], [0, 4], [4, 1], [2, 2]])
@pytest.mark.parametrize("t", [1, 3])
def test_attend_when_rows_have_read_different_amounts(t, first):
    q, k, v = qkv(t, max(first) + t)
    assert rms(attend(q, k, v, torch.tensor(first)), softmax_loop(q, k, v, first)) <= 1e-12


def test_attend_in_blocks_of_queries():
    """So many keys that only one or two queries fit under the mask's budget at once; most keys are
    far and alike.
    """
    L, t = 2**21, 5
    r = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, t, 2, generator=r)
    k, v = torch.zeros(1, 1, L, 2), torch.zeros(1, 1, L, 2)
    k[:, :, -8:], v[:, :, -8:] = (
        torch.randn(1, 1, 8, 2, generator=r),
        torch.randn(1, 1, 8, 2, generator=r),
    )
    k[:, :, :-8, 0] = -1e4
    q[..., 0] = q[..., 0].abs() + 1  # the far keys get no weight: a loop over 8 is enough
    want = softmax_loop(q, k[:, :, -8:], v[:, :, -8:], 8 - t)
    assert rms(attend(q, k, v, L - t), want) <= 1e-5
    assert rms(attend(q, k, v, torch.tensor([L - t])), want) <= 1e-5
    assert rms(attend(q.requires_grad_(), k, v, L - t).detach(), want) <= 1e-5


@pytest.mark.parametrize("first", [0, 4])
def test_attend_gradients_and_causality(first):
    q, k, v = (x.requires_grad_() for x in qkv(6, 6 + first))
    for g, w in zip(
        *(
            torch.autograd.grad((f(q, k, v, first) ** 2).sum(), (q, k, v))
            for f in (attend, softmax_loop_diff)
        )
    ):
        assert rms(g, w) <= 1e-10


@pytest.mark.parametrize("loud", [0, 1])
def test_attend_when_one_part_of_the_keys_drowns_the_other(loud):
    """Scores of several hundred: the sums of exponentials overflow, their logs do not."""
    q, k, v = qkv(3, 10)
    k[:, :, slice(0, 7) if loud == 0 else slice(7, None)] *= 400
    assert rms(attend(q, k, v, 7), softmax_loop(q, k, v, 7)) <= 1e-12


def softmax_loop_diff(q, k, v, first):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT / math.sqrt(q.shape[-1])
    return (
        torch.softmax(s.masked_fill(torch.ones_like(s).triu(first + 1).bool(), -math.inf), -1) @ v
    )


def test_attention_layer_is_its_equation():
    torch.manual_seed(0)
    m, u = (
        Attention(7, heads=6, kv_heads=2, head_dim=5).double(),
        torch.randn(2, 8, 7, dtype=torch.float64),
    )
    heads = lambda w, n: (u @ w.weight.T).view(2, 8, n, 5).transpose(1, 2)
    y = softmax_loop(heads(m.q_proj, 6), heads(m.k_proj, 2), heads(m.v_proj, 2), 0)
    assert rms(m(u), y.transpose(1, 2).reshape(2, 8, 30) @ m.o_proj.weight.T) <= 1e-12


# Rotary positions


def turned(x, first, base):
    """One number at a time: the pair (i, i + e/2) is a complex number, times exp(i n
    base^(-2i/e)).
    """
    (b, h, t, e), y = x.shape, torch.empty_like(x)
    for row in range(b):
        for n in range(t):
            at = n + int(first if isinstance(first, int) else first[row])
            for i in range(e // 2):
                turn = complex(
                    math.cos(at * base ** (-2 * i / e)), math.sin(at * base ** (-2 * i / e))
                )
                for head in range(h):
                    z = complex(x[row, head, n, i], x[row, head, n, i + e // 2]) * turn
                    y[row, head, n, i], y[row, head, n, i + e // 2] = z.real, z.imag
    return y


@pytest.mark.parametrize("first", [0, 5, torch.tensor([3, 70])])
def test_rotary_positions_turn_complex_numbers(first):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert rms(rotate(x, first, 100.0), turned(x, first, 100.0)) <= 1e-12
    assert rms(rotate(x.float(), first, 100.0).double(), turned(x, first, 100.0)) <= 1e-6


def test_rotary_positions_are_those_of_others():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, at = torch.randn(1, 2, 9, 8), torch.arange(4, 13)
    angle = (at[:, None] * 10000 ** (-torch.arange(0, 8, 2) / 8)).repeat(1, 2)[None]
    want, _ = llama.apply_rotary_pos_emb(x, x, angle.cos(), angle.sin())
    assert rms(rotate(x, 4, 10000), want) <= 1e-6


def test_rotary_products_know_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 7, 10, dtype=torch.float64)
    scores = lambda first: rotate(q, first, 50.0) @ rotate(k, first, 50.0).mT
    assert rms(scores(0), scores(1234)) <= 1e-10
    assert rms(rotate(q, 1, 50.0) @ rotate(k, 0, 50.0).mT, scores(0)) > 0.1


def rotary_layer():
    torch.manual_seed(0)
    layer = Attention(12, heads=4, kv_heads=2, head_dim=6, rotary_base=20.0).double()
    return layer, torch.randn(3, 40, 12, dtype=torch.float64)


@torch.no_grad()
def test_a_rotary_layer_is_its_equation_and_minds_the_order():
    layer, u = rotary_layer()
    q, k, v = (
        (u @ m.weight.T).unflatten(-1, (-1, 6)).transpose(1, 2)
        for m in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    y = softmax_loop(turned(q, 0, 20.0), turned(k, 0, 20.0), v, 0)
    assert rms(layer(u), layer.o_proj(y.transpose(1, 2).flatten(2))) <= 1e-12
    order = torch.cat([torch.randperm(39), torch.tensor([39])])
    assert rms(layer(u[:, order])[:, -1], layer(u)[:, -1]) > 1e-2
    layer.rotary_base = None
    assert rms(layer(u[:, order])[:, -1], layer(u)[:, -1]) <= 1e-12


@torch.no_grad()
def test_rotary_positions_from_a_cache():
    """Read in pieces; tokens read and dropped; rows of unequal lengths; a buffer of fixed size."""
    layer, u = rotary_layer()
    whole, cache = layer(u), KV()
    pieces = [layer(p, cache) for p in u[:, :30].split([1, 13, 7, 9], 1)]
    layer(u[:, :3], cache)
    cache.drop(3)
    pieces += [layer(p, cache) for p in u[:, 30:].split([1, 4, 5], 1)]
    assert rms(torch.cat(pieces, 1), whole) <= 1e-12

    cache, count = KV(), torch.tensor([8, 3, 5])
    assert rms(layer(u[:, :8], cache, count)[0], whole[0, :8]) <= 1e-12
    for fix in (False, True):
        if fix:
            cache.fix(64)
        for _step in range(3):
            at = cache.length.clone()
            new = u[torch.arange(3), at][:, None]
            assert rms(layer(new, cache)[:, 0], whole[torch.arange(3), at]) <= 1e-12


def test_what_rotary_positions_cannot_do_is_said():
    with pytest.raises(ValueError, match="head_dim=5 is odd"):
        Attention(7, 2, 1, 5, rotary_base=10000.0)


@pytest.mark.parametrize("first", [0, 7])
def test_queries_may_have_gaps_in_memory(first):
    """The CPU's kernel reads a head's numbers as neighbours, wherever they lie."""
    q, k, v = qkv(10 - first, 10)
    wide = torch.stack([q, -q], -1).flatten(-2)[..., ::2]
    assert wide.stride(-1) == 2 and torch.equal(wide, q)
    with torch.no_grad():
        assert rms(attend(wide, k, v, first), attend(q, k, v, first)) <= 1e-12


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("t", [1, 3])
def test_keys_that_the_queries_cannot_share_are_refused(heads, t):
    """Of no heads at all torch's kernel makes the end of the process."""
    q, k = torch.zeros(1, 4, t, 8), torch.zeros(1, heads, t, 8)
    with pytest.raises(ValueError, match=f"4 heads of queries cannot share {heads} heads of keys"):
        attend(q, k, k, 0)


def test_this_file_can_fail():
    """Two parts of the keys averaged without their sums, or the sums swapped: far from the softmax
    of both.
    """
    q, k, v = qkv(3, 10)
    want = softmax_loop(q, k, v, 7)
    assert rms(attend_in_two(q, k, v, 7), want) <= 1e-12
    own = attend(q, k[:, :, 7:], v[:, :, 7:], 0)
    past = torch.nn.functional.scaled_dot_product_attention(
        q, k[:, :, :7], v[:, :, :7], enable_gqa=True
    )
    assert rms((own + past) / 2, want) > 0.1
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert rms(rotate(x, 1, 100.0), turned(x, 0, 100.0)) > 1e-2  # one position late
    assert rms(rotate(x, 0, 101.0), turned(x, 0, 100.0)) > 1e-4  # another base
