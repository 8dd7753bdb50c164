"""Speculative decoding changes no text and leaves no trace in any cache: greedy exactly, sampling
in distribution.
"""

import copy

import pytest
import torch
from conftest import rms
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample import prompts, tiny

import heal
import mtp
import speculate
from decode import probabilities
from mamba import ssd_recurrent, write
from sample import generate


def built(pattern="ME*-M*E", dtype=torch.float64, blocks=1, **kw):
    return tiny(pattern, dtype, num_nextn_predict_layers=blocks, **kw)


def agreeable(dtype=torch.float32, scale=0.5):
    """A model whose drafts often stand: block and backbone both pass the last token's embedding on,
    nearly.
    """
    model = built(dtype=dtype)
    for p in [
        p
        for layer in [*model.backbone.layers, *model.mtp.layers]
        for p in layer.parameters()
        if p.ndim > 1
    ]:
        p.data *= scale
    model.mtp.layers[0].eh_proj.weight.data = torch.eye(12, 24, dtype=dtype)
    return model


@pytest.mark.parametrize("n", [50, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [prompts(5), prompts(1, 7, 4)], ids=len)
def test_greedy_is_the_plain_text_for_every_d(rows, n):
    model = agreeable(scale=0.1)
    want, tally = generate(model, rows, n), speculate.Tally(7)
    for d in (1, 2, 3, 4, 5, 6, 7, "auto"):
        assert generate(model, rows, n, speculate=d, tally=tally) == want, d
    assert generate(model, rows, n, speculate=3, remember=False) == want
    assert n / 2 < tally.stood[1] < tally.reached[1] - n / 2  # many stood, many fell


@settings(max_examples=15)
@given(
    st.text("M*E-", min_size=1, max_size=5),
    st.integers(1, 2),
    st.sampled_from(["*E", "M", "*M-"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(1, 5),
)
def test_greedy_is_the_plain_text_of_random_models(pattern, blocks, inner, lengths, d, prefill):
    model, rows = (
        built(pattern, blocks=blocks, mtp_hybrid_override_pattern=inner),
        prompts(*lengths),
    )
    assert generate(model, rows, 20, speculate=d, prefill=prefill) == generate(model, rows, 20)


def alike(a, b, tolerance):
    for x, y in zip(a.layers, b.layers):
        if hasattr(x, "S"):
            assert (
                rms(x.S, y.S) <= tolerance and rms(x.conv, y.conv) <= tolerance and x.held is None
            )
        elif x is not None:
            assert x.length.tolist() == y.length.tolist() and x.used == y.used
            for i, n in enumerate(x.length.tolist()):
                assert (
                    rms(x.k[i, :, :n], y.k[i, :, :n]) <= tolerance
                    and rms(x.v[i, :, :n], y.v[i, :, :n]) <= tolerance
                )


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("keep", [[1], [8], [3], [0], [2, 8, 1], [5, 5, 5], [0, 3, 8]], ids=str)
def test_what_is_kept_is_the_cache_of_the_accepted_prefix(keep, dtype, tolerance):
    model, b, count = built(dtype=dtype), len(keep), torch.tensor(keep)
    first, then = torch.randint(31, (b, 6)), torch.randint(31, (b, 8))
    tried, want = model.new_cache(b), model.new_cache(b)
    with torch.no_grad():
        model(first, tried)
        model(first, want)
        tried.trial()
        model(then, tried)
        tried.keep(count, 8)
        if count.any():
            model(then[:, : int(count.max())], want, count)
        alike(tried, want, tolerance)
        again = torch.randint(31, (b, 3))
        assert rms(model(again, tried), model(again, want)) <= tolerance * 10


def test_the_draft_cache_holds_the_accepted_prefix_only():
    """After a whole run it is the cache of one pass over the text, told each next token."""
    model, (row,), kept = agreeable(torch.float64), prompts(7), []
    make = model.new_draft_cache
    model.new_draft_cache = lambda b: kept.append(make(b)) or kept[0]
    text = generate(model, [row], 40, speculate=4)[0]
    n, want = int(kept[0].layers[0].length), make(1)
    with torch.no_grad():
        h = model.hidden(torch.tensor([text[:n]]))
        mtp.follow(model.mtp, want, h, model.backbone.embeddings(torch.tensor([text[1 : n + 1]])))
    assert n >= 40
    alike(kept[0], want, 1e-10)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_write_is_the_state_of_the_recurrence(groups):
    r = lambda *s: torch.randn(*s, dtype=torch.float64)
    x, dt, A, B, S = r(2, 5, 6, 4), r(2, 5, 6).exp(), -r(6).exp(), r(2, 5, groups, 3), r(2, 6, 4, 3)
    for state in (S, None):
        assert (
            rms(write(state, x, dt, A, B), ssd_recurrent(x, dt, A, B, B, state=state)[1]) <= 1e-12
        )


def chi_square(got, p):
    """p-value of counts under p: the chi-square tail, by the incomplete gamma function."""
    p = p[p > 0]
    stat = sum((g - got.sum() * q) ** 2 / (got.sum() * q) for g, q in zip(got, p))
    return float(
        torch.special.gammaincc(torch.tensor((len(p) - 1) / 2).double(), stat.double() / 2)
    )


def wrong(drafts, q, p, generator=None):
    """The tempting mistake: after a fall draw from p, not from what the standing drafts left
    out.
    """
    n, token = speculate.accept(drafts, q, p, generator)
    fresh = torch.multinomial(p[torch.arange(len(p)), n], 1, generator=generator)[:, 0]
    return n, fresh


def pair(rule, how, draws=20_000):
    """(p-value) of the first two tokens: 4 symbols, 3 of them drafted from q, judged by rule
    against p.
    """
    g = torch.Generator().manual_seed(3)
    P, Q = (
        torch.randn(5, 4, generator=g) * 1.5 for _ in range(2)
    )  # row: what the token before was; 4: none
    p, q = (probabilities(v, *how).double() for v in (P, Q))
    d1 = torch.multinomial(q[4].expand(draws, 4), 1, generator=g)[:, 0]
    d2 = torch.multinomial(q[d1], 1, generator=g)[:, 0]
    n, token = rule(
        torch.stack([d1, d2], 1),
        torch.stack([q[4].expand(draws, 4), q[d1]], 1),
        torch.stack([p[4].expand(draws, 4), p[d1], p[d2]], 1),
        g,
    )
    a = torch.where(n == 0, token, d1)
    b = torch.where(n == 1, token, d2)
    b = torch.where(n == 0, torch.multinomial(p[a], 1, generator=g)[:, 0], b)  # the next round's
    want = (p[4][:, None] * p[:4]).flatten()
    got = (4 * a + b).bincount(minlength=16)
    assert got[want == 0].sum() == 0
    return chi_square(got[want > 0].double(), want)


@pytest.mark.parametrize(
    "how", [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.3, 1.0, 3), (0.9, 0.9, 3)], ids=str
)
def test_sampling_is_lossless(how):
    assert pair(speculate.accept, how) > 0.01


def test_a_model_draws_the_same_distribution_speculating():
    """20,480 draws of three tokens each: how often each third token, against the exact
    distribution.
    """
    model = built("M*", torch.float32, vocab_size=5, num_experts_per_tok=2)
    row, how = [1, 2, 3], (1.1, 0.95, 4)

    def after(row):
        with torch.no_grad():
            return probabilities(model(torch.tensor([row]))[:, -1], *how)[0].double()

    first, exact = after(row), torch.zeros(5, dtype=torch.float64)
    for i in range(5):
        second = after(row + [i])
        for j in range(5):
            if first[i] * second[j] > 0:
                exact += first[i] * second[j] * after(row + [i, j])
    got = torch.zeros(5, dtype=torch.float64)
    for seed in range(20):
        out = generate(model, [row] * 1024, 3, *how, speculate=3, seed=seed)
        got += torch.tensor([r[-1] for r in out]).bincount(minlength=5)
    assert got.sum() == 20_480 and chi_square(got[exact > 0], exact) > 0.01


def test_the_same_tokens_stop_a_row():
    model, rows = agreeable(), prompts(6, 2, 4)
    free = generate(model, rows, 30)
    for stop in ({free[0][9]}, {free[1][8], free[2][20]}):
        assert generate(model, rows, 30, speculate=4, stop=stop) == generate(
            model, rows, 30, stop=stop
        )
    assert generate(model, rows, 0, speculate=2) == rows and generate(
        model, rows, 1, speculate=2
    ) == generate(model, rows, 1)


def test_memory_of_seven_drafts():
    """What waits for `keep` is small beside S, and is let go; the key buffers do not grow with what
    fell.
    """
    model, row = built("MM*", torch.float32, ssm_state_size=128, mamba_head_dim=64), prompts(9)
    caches, make = [], model.new_cache
    model.new_cache = lambda b: caches.append(make(b)) or caches[-1]
    text = generate(model, row, 100, speculate=7)
    cache, S = caches[0], caches[0].layers[0].S
    assert cache.layers[2].used == int(cache.layers[2].length) <= len(text[0]) + 7
    with torch.no_grad():
        cache.trial()
        model(torch.zeros(1, 8, dtype=torch.long), cache)
    held = cache.layers[0].held
    assert (
        sum(v.numel() for v in held[:1]) + held[1].numel() < 8 * S.numel()
        and cache.layers[0].S is S
    )


def test_healing_trains_the_block_and_nothing_else():
    model, ids = agreeable(), torch.randint(31, (8, 24))
    before = copy.deepcopy(model.state_dict())
    each = list(heal.heal(model, ids, 30, 1e-2))
    first, last = each[0], each[-1]
    assert sum(last.nats) < sum(first.nats) - 0.1 and len(first.nats) == 2
    assert 0 < sum(last.excess) < sum(first.excess) - 0.1
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved and all(n.startswith("mtp.") for n in moved)


def test_what_healing_minimises_is_the_mean_over_draws_of_the_next_token():
    model, x = built(dtype=torch.float64), torch.randint(31, (2, 9))
    got = next(
        iter(heal.heal(model, x, 1, batch=64))
    ).nats  # 64 of the two texts: both, about as often
    picked = (
        torch.randint(2, (64,), generator=torch.Generator().manual_seed(0)).bincount(minlength=2)
        / 64
    )
    model = built(dtype=torch.float64)
    model.requires_grad_(False)
    h, want = model.hidden(x), []
    p = model.lm_head(h).softmax(-1)
    for k in (1, 2):
        h = model.mtp(h[:, :-1], model.backbone.embeddings(x[:, k:]), k)
        nll = -model.lm_head(h).log_softmax(-1)
        mean = [
            sum(
                float(p[i, t + k, w] * nll[i, t, w])
                for t in range(9 - k)
                for w in range(p.shape[-1])
            )
            / (9 - k)
            for i in (0, 1)
        ]
        want.append(float(picked[0] * mean[0] + picked[1] * mean[1]))
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("speculate", [-1, "fast", 1.5])
def test_mistakes_are_named(speculate):
    with pytest.raises(ValueError, match="speculate="):
        generate(built("M"), [[1]], 3, speculate=speculate)


def test_this_file_can_fail(monkeypatch):
    assert pair(wrong, (1.0, 1.0, 0)) < 1e-6
    monkeypatch.setattr(
        speculate,
        "match",
        lambda drafts, best: (torch.full((len(best),), drafts.shape[1]), best[:, -1]),
    )
    model, rows = agreeable(), prompts(5)
    assert generate(model, rows, 50, speculate=3) != generate(
        model, rows, 50
    )  # believing every draft
