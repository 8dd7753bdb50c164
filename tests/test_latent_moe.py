"""
latent_moe.py against a loop over tokens and experts, in the regime of Super (22 of 512) at a tiny
width, in fp64.

    s = sigmoid(W_r u)     T = the k largest of s + bias     p = scale s_T / (sum s_T + 1e-20)
    out = W_2 sum_{e in T} p_e W_down,e relu(W_up,e W_1 u)^2  +  V_down relu(V_up u)^2
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import rms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import latent_moe
from latent_moe import (
    MLP,
    LatentMoE,
    grouped_mm,
    sequence_balance,
    take_balance,
    tokens_each,
    update_bias,
)


def build(
    experts=512,
    k=22,
    d=12,
    latent=4,
    hidden=3,
    shared=5,
    scale=5.0,
    seed=0,
    dtype=torch.float64,
    **kw,
):
    torch.manual_seed(seed)
    return LatentMoE(d, experts, k, hidden, shared, latent, scale, **kw).to(dtype)


def tokens(b, t, d=12, seed=0, dtype=torch.float64):
    return torch.randn(
        b, t, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def bias_of(moe):
    return moe.gate.e_score_correction_bias


def oracle(moe, u, pick=None, weigh_with_bias=False, scale_shared=False, normalise=True):
    """Token by token, expert by expert, from the tensors alone. `pick` settles ties; by default
    Python sorts.
    """
    w = {**dict(moe.named_parameters()), **dict(moe.named_buffers())}
    bias, rows = w["gate.e_score_correction_bias"], []
    for i, x in enumerate(u.flatten(0, 1)):
        s = 1 / (1 + torch.exp(-(w["gate.weight"] @ x)))
        biased = (s + bias).tolist()
        T = (
            sorted(range(len(biased)), key=lambda e: -biased[e])[: moe.top_k]
            if pick is None
            else pick[i].tolist()
        )
        chosen = s + bias if weigh_with_bias else s
        total = sum(chosen[e] for e in T) + 1e-20 if normalise else 1
        c = w["fc1_latent_proj.weight"] @ x if "fc1_latent_proj.weight" in w else x
        r = sum(
            moe.scale
            * chosen[e]
            / total
            * (w["experts.down_proj"][e] @ F.relu(w["experts.up_proj"][e] @ c) ** 2)
            for e in T
        )
        out = w["fc2_latent_proj.weight"] @ r if "fc2_latent_proj.weight" in w else r
        shared = (
            w["shared_experts.down_proj.weight"]
            @ F.relu(w["shared_experts.up_proj.weight"] @ x) ** 2
        )
        rows.append(out + (moe.scale if scale_shared else 1) * shared)
    return torch.stack(rows).view_as(u)


def compare(moe, u, tolerance=1e-10):
    """Outputs, and gradients of every parameter and of the input."""
    u = u.clone().requires_grad_()
    got, want = moe(u), oracle(moe, u)
    assert rms(got, want) <= tolerance
    names, tensors = zip(*moe.named_parameters(), ("u", u))
    weight = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(7))
    for name, g, w in zip(
        names, *(torch.autograd.grad((y * weight).sum(), tensors) for y in (got, want))
    ):
        assert rms(g, w) <= tolerance, name


@pytest.mark.parametrize("latent", [4, None])
@pytest.mark.parametrize("b,t", [(1, 1), (2, 5)])
def test_22_of_512_is_the_loop(latent, b, t):
    moe = build(latent=latent)
    bias_of(moe).copy_(0.2 * torch.randn(512, dtype=torch.float64))
    compare(moe, tokens(b, t))


@pytest.mark.parametrize("experts,k,latent", [(512, 22, 4), (16, 4, None), (7, 3, 5), (1, 1, 4)])
def test_few_tokens_meet_all_experts(monkeypatch, experts, k, latent):
    """In decoding, while k of E for each of m tokens are most experts anyway. One token of Super's
    22 of 512 are not.
    """
    moe, taken = build(experts, k, latent=latent, norm_topk_prob=k > 1), []
    meet_all = latent_moe.Experts.meet_all
    monkeypatch.setattr(
        latent_moe.Experts, "meet_all", lambda *a: taken.append(len(a[1])) or meet_all(*a)
    )
    for m in (1, -(-experts // k), 32, 33):
        u = tokens(1, m)
        with torch.no_grad():
            assert rms(moe(u), oracle(moe, u, normalise=k > 1)) <= 1e-10, m
        moe(u)  # a gradient is wanted: as in training
    assert taken == [m for m in (1, -(-experts // k), 32) if m * k >= experts]


@pytest.mark.parametrize(
    "experts,k,latent,hidden,norm",
    [
        (1, 1, 4, 3, False),
        (2, 2, None, 3, True),
        (7, 3, 5, 1, True),
        (16, 4, 8, 8, True),
        (16, 16, 4, 3, True),
        (5, 1, 1, 4, False),
    ],
)
def test_other_shapes_are_the_loop(experts, k, latent, hidden, norm):
    moe = build(experts, k, latent=latent, hidden=hidden, norm_topk_prob=norm)
    u = tokens(3, 4)
    got, want = moe(u), oracle(moe, u, normalise=norm)
    assert rms(got, want) <= 1e-10
    if norm:
        compare(moe, u)


def test_all_tokens_to_the_same_experts_and_none_to_the_others():
    moe = build(experts=32, k=4)
    bias_of(moe)[[3, 4, 17, 31]] = 10.0
    compare(moe, tokens(2, 6))
    assert moe.load.tolist() == [12 if e in (3, 4, 17, 31) else 0 for e in range(32)]
    idle = [e for e in range(32) if e not in (3, 4, 17, 31)]
    moe(tokens(2, 6)).sum().backward()
    assert (
        not moe.experts.up_proj.grad[idle].any() and moe.experts.up_proj.grad[[3, 4, 17, 31]].any()
    )


def test_ties():
    """A router that prefers nobody: any k different experts will do, each with the same weight."""
    moe, u = build(experts=16, k=5), tokens(2, 3)
    moe.gate.weight.data.zero_()
    pick, gate = moe.route(u)
    assert all(len(set(row)) == 5 for row in pick.tolist())
    assert rms(gate, torch.full_like(gate, 5.0 / 5)) <= 1e-12
    assert rms(moe(u), oracle(moe, u, pick)) <= 1e-10


@pytest.mark.parametrize("latent", [8, None])
def test_fp32_takes_the_one_call_path_to_the_same_place(latent):
    moe = build(experts=16, k=4, d=16, latent=latent, hidden=12, dtype=torch.float32)
    u = tokens(2, 9, d=16, dtype=torch.float32)
    want, got = oracle(moe, u), moe(u)
    assert rms(got, want) <= 1e-6
    names, tensors = zip(*moe.named_parameters())
    for name, g, w in zip(
        names, *(torch.autograd.grad((y**2).sum(), tensors) for y in (got, want))
    ):
        assert rms(g, w) <= 1e-5, name
    moe(u).sum().backward()  # the gradient of a sum is one number with stride 0


def loop_mm(x, w, count):
    rows, start = [], 0
    for e, n in enumerate(count.tolist()):
        rows += [w[e] @ x[i] for i in range(start, start + n)]
        start += n
    return torch.stack(rows) if rows else x.new_zeros(0, w.shape[1])


# whole 16-byte rows go through one call of torch, odd ones through a loop over experts
@pytest.mark.parametrize(
    "count", [[3, 0, 5, 1], [0, 0, 9, 0], [1, 1, 1, 1], [0, 0, 0, 7], [130, 0, 1, 67], [0, 0, 0, 0]]
)
@pytest.mark.parametrize("i,o", [(8, 16), (5, 7), (8, 7), (5, 8), (4, 4), (1, 1)])
@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)]
)
def test_grouped_mm_is_a_loop(count, i, o, dtype, tolerance):
    r = torch.Generator().manual_seed(0)
    f = lambda *s: torch.randn(*s, dtype=torch.float64, generator=r).to(dtype).requires_grad_()
    x, w, seen = f(sum(count), i), f(4, o, i), f(sum(count), o).detach()
    y = grouped_mm(x, w, torch.tensor(count))
    assert y.dtype == dtype
    X, W = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    Y = loop_mm(X, W, torch.tensor(count))
    assert rms(y, Y) <= tolerance
    if sum(count):
        pairs = zip(
            torch.autograd.grad(y, (x, w), seen), torch.autograd.grad(Y, (X, W), seen.double())
        )
        assert all(rms(g, ok) <= tolerance for g, ok in pairs)


def test_the_bias_chooses_but_never_weighs():
    moe, u = build(experts=64, k=8), tokens(2, 10)
    plain = moe(u)
    bias_of(moe).fill_(0.7)  # the same for all: nothing may move
    assert torch.equal(moe(u), plain)
    bias_of(moe).copy_(torch.randn(64, dtype=torch.float64))
    pick, gate = moe.route(u)
    s = torch.sigmoid(u.flatten(0, 1) @ moe.gate.weight.T)
    for row in range(20):
        left_out = [e for e in range(64) if e not in pick[row].tolist()]
        assert (s + bias_of(moe))[row, pick[row]].min() >= (s + bias_of(moe))[row, left_out].max()
        assert rms(gate[row], 5 * s[row, pick[row]] / s[row, pick[row]].sum()) <= 1e-12
    assert rms(oracle(moe, u, weigh_with_bias=True), moe(u)) > 0.1
    assert not isinstance(bias_of(moe), torch.nn.Parameter) and not bias_of(moe).requires_grad
    assert "gate.e_score_correction_bias" in moe.state_dict()


def test_the_scale_reaches_the_routed_experts_only():
    moe, u = build(experts=16, k=4, scale=1.0), tokens(1, 6)
    one = moe(u)
    moe.scale = 5.0
    shared = moe.shared_experts(u)
    assert rms(moe(u) - shared, 5 * (one - shared)) <= 1e-12
    assert rms(oracle(moe, u, scale_shared=True), moe(u)) > 0.1
    moe.shared_experts.down_proj.weight.data.zero_()
    moe.fc2_latent_proj.weight.data.zero_()
    assert not moe(u).any()  # and no residual hides in here


def test_weights_sum_to_the_scale_until_the_scores_vanish():
    moe, u = build(experts=16, k=4, dtype=torch.float32), tokens(1, 3, dtype=torch.float32)
    assert rms(moe.route(u)[1].sum(1), torch.full((3,), 5.0)) <= 1e-6
    moe.gate.weight.data.fill_(-1)
    for logit, want in (
        (-30, 5 / 4),
        (-46, 5 * 1.0530617e-20 / (4 * 1.0530617e-20 + 1e-20)),
        (-200, 0.0),
    ):
        gate = moe.route(torch.full((1, 1, 12), -logit / 12.0))[1]
        assert rms(gate, torch.full_like(gate, want)) <= 1e-4, (
            logit
        )  # 1e-20 in the denominator: small, never NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_stays_in_fp32(dtype):
    """512 experts, near-ties everywhere: autocast leaves the choice the fp32 one, which a bf16
    router does not make.
    """
    moe = build(d=64, dtype=torch.float32)
    u = tokens(4, 64, d=64, dtype=dtype)
    with torch.no_grad():
        s = torch.sigmoid(u.flatten(0, 1).float() @ moe.gate.weight.T)
        want = s.topk(22).indices.sort().values
        score = torch.sigmoid((u.flatten(0, 1).bfloat16() @ moe.gate.weight.bfloat16().T).float())
        rounded = score.topk(22).indices.sort().values
        with torch.autocast("cpu", torch.bfloat16):
            pick, gate = moe.route(u)
            assert moe(u).isfinite().all()
        assert gate.dtype == torch.float32 and torch.equal(pick.sort().values, want)
        assert not torch.equal(rounded, want)
        assert rms(gate, 5 * s.gather(1, pick) / s.gather(1, pick).sum(1, keepdim=True)) <= 1e-6


@pytest.mark.parametrize("latent", [16, None])
def test_bf16_autocast_is_near_fp32_and_reaches_every_parameter(latent):
    moe = build(experts=32, k=4, d=32, latent=latent, hidden=24, shared=48, dtype=torch.float32)
    u = tokens(2, 16, d=32, dtype=torch.float32)
    want = moe(u)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe(u)
    assert rms(got, want) <= 2e-2
    got.float().square().mean().backward()
    for name, p in moe.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), name


def test_projections_run_once_and_in_the_latent():
    """Down once a token, the experts on k copies of it, up once after the sum; router and shared
    expert full width.
    """
    moe, seen = build(experts=16, k=4), {}
    note = lambda name: (
        lambda m, args, out: seen.setdefault(name, []).append(tuple(args[0].shape[-2:]))
    )
    for name in ("fc1_latent_proj", "fc2_latent_proj", "shared_experts", "gate"):
        moe.get_submodule(name).register_forward_hook(note(name))
    mm = moe.experts.mm
    moe.experts.mm = lambda x, w, count: (
        seen.setdefault("mm", []).append((tuple(x.shape), count.tolist())) or mm(x, w, count)
    )
    moe(tokens(1, 6))
    assert seen["fc1_latent_proj"] == [(6, 12)] and seen["fc2_latent_proj"] == [(6, 4)]
    assert [s[-1] for s in seen["shared_experts"] + seen["gate"]] == [12, 12]
    assert [shape for shape, _ in seen["mm"]] == [(24, 4), (24, 3)]
    assert all(count == moe.load.tolist() for _, count in seen["mm"])


def test_the_exchange_seam():
    """Tokens leave as (all of them, whose turn it is by expert, how many for each), and what `meet`
    makes of them must come back in that order: here from two machines, of four experts each.
    """
    moe, u = build(experts=8, k=3), tokens(2, 5)
    want, calls, e = moe(u), [], moe.experts

    def there(c, token, count):
        rows = c[token]
        calls.append((rows.shape, count.tolist()))
        parts = rows.split([int(count[:4].sum()), int(count[4:].sum())])
        made = [
            e.meet(x, count[i : i + 4], e.up_proj[i : i + 4], e.down_proj[i : i + 4])
            for i, x in zip((0, 4), parts)
        ]
        return torch.cat(made)

    e.exchange = there
    torch.testing.assert_close(moe(u), want)
    assert calls[0][0] == (30, 4) and sum(calls[0][1]) == 30 and len(calls) == 1


def test_load_counts_every_choice_since_the_last_update():
    moe, want = build(experts=16, k=4), torch.zeros(16, dtype=torch.long)
    for seed in range(3):  # a global batch in three pieces
        u = tokens(2, 7, seed=seed)
        moe(u)
        s = torch.sigmoid(u.flatten(0, 1) @ moe.gate.weight.T)
        for row in s:
            for e in sorted(range(16), key=lambda e: -row[e])[:4]:
                want[e] += 1
    assert torch.equal(moe.load, want)
    moe.eval()(tokens(2, 7))
    with torch.no_grad():
        moe.train()(tokens(2, 7))  # neither evaluation nor sampling is load
    assert torch.equal(moe.load, want)
    mean = 3 * 14 * 4 / 16
    ((vio, idle),) = update_bias(moe, rate=1e-3)
    signs = [1e-3 * ((mean > n) - (mean < n)) for n in want.tolist()]
    assert rms(bias_of(moe), torch.tensor(signs, dtype=torch.float64)) <= 1e-12
    assert vio == pytest.approx(max(want.tolist()) / mean - 1) and idle == want.tolist().count(0)
    assert not moe.load.any() and "load" not in moe.state_dict()


def loaded(experts, k, load, **kw):
    moe = build(experts, k, **kw)
    moe.load.copy_(torch.tensor(load))
    return moe


@pytest.mark.parametrize(
    "load",
    [[4, 4, 4], [0, 0, 12], [1, 5, 6], [3, 4, 5], [10**9, 1, 1], [10**9 + 1, 10**9, 10**9 - 1]],
)
def test_the_sign_rule_by_hand(load):
    moe, mean = loaded(3, 2, load, dtype=torch.float32), sum(load) / 3
    update_bias(moe, 0.5), moe.load.copy_(torch.tensor(load))
    ((vio, idle),) = update_bias(moe, 0.25)
    assert bias_of(moe).tolist() == [
        0.0 if n == mean else 0.75 if n < mean else -0.75 for n in load
    ]
    assert vio == pytest.approx(max(load) / mean - 1, abs=1e-6) and idle == load.count(0)


def test_nothing_routed_nothing_moved():
    moe = build(experts=8, k=2)
    update_bias(moe)
    assert not bias_of(moe).any()


def test_max_violation_of_a_handful_of_tokens():
    """One token, 2 of 16 experts: the busiest holds 1 where the mean is 1/8, which is E/k - 1 = 7
    above it.
    """
    moe = build(experts=16, k=2)
    moe(tokens(1, 1))
    ((vio, idle),) = update_bias(moe)
    assert idle == 14 and vio == pytest.approx(7)


def test_update_bias_takes_every_layer_by_itself():
    two = torch.nn.Sequential(loaded(4, 2, [0, 2, 2, 4]), MLP(12, 4), loaded(2, 2, [3, 3]))
    notes = update_bias(two, 1.0)
    assert notes.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert bias_of(two[0]).tolist() == [1, 0, 0, -1] and bias_of(two[2]).tolist() == [0, 0]


def test_the_bias_alone_evens_out_a_lopsided_router():
    moe = build(experts=16, k=4, dtype=torch.float32)
    moe.gate.weight.data[:2, 0] += 3.0
    vio = []
    for step in range(60):
        u = tokens(8, 32, seed=step, dtype=torch.float32)
        u[..., 0] = 1
        moe(u)
        vio.append(float(update_bias(moe, 2e-2)[0][0]))
    assert vio[0] > 2 and sum(vio[-10:]) / 10 < 0.6, vio  # the fixed step leaves some jitter


def balance_oracle(score, k, pick_from=None):
    """E/(k T^2) sum_e (sum_t s_te / sum_e' s_te') c_e per sequence, c_e from the top k of the
    scores as they are.
    """
    total = 0
    for b, seq in enumerate(score):
        T, E = seq.shape
        share, count = [0.0] * E, [0] * E
        for t in range(T):
            whole = sum(seq[t, e] for e in range(E))
            for e in range(E):
                share[e] = share[e] + seq[t, e] / whole
            ranked = (seq if pick_from is None else pick_from[b])[t].tolist()
            for e in sorted(range(E), key=lambda e: -ranked[e])[:k]:
                count[e] += 1
        total = total + E / (k * T * T) * sum(share[e] * count[e] for e in range(E))
    return total


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 9), st.data())
def test_sequence_balance_is_its_formula(b, t, E, data):
    k, seed = data.draw(st.integers(1, E)), data.draw(st.integers(0, 99))
    logits = 2 * torch.randn(
        b, t, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    logits.requires_grad_()
    got, want = sequence_balance(logits.sigmoid(), k), balance_oracle(logits.sigmoid(), k)
    assert rms(got, want) <= 1e-12
    assert rms(*(torch.autograd.grad(v, logits)[0] for v in (got, want))) <= 1e-9 or k == E


def test_sequence_balance_in_perfect_balance_and_at_its_worst():
    E, k = 8, 2
    ring = torch.stack(
        [torch.roll(torch.tensor([0.9, 0.8] + [0.1] * 6, dtype=torch.float64), i) for i in range(E)]
    )[None]
    assert sequence_balance(ring, k) == pytest.approx(
        1, abs=1e-12
    )  # everyone is first once and second once
    assert sequence_balance(ring.expand(3, E, E), k) == pytest.approx(
        3, abs=1e-12
    )  # summed over sequences
    one = torch.tensor([0.9, 0.8] + [1e-9] * 6, dtype=torch.float64).expand(1, 8, 8)
    assert sequence_balance(one, k) == pytest.approx(E / k, rel=1e-6)
    halves = torch.cat(
        [ring[:, :1].expand(1, 4, E), ring[:, 4:5].expand(1, 4, E)]
    )  # each sequence lopsided, their sum less
    assert sequence_balance(halves, k) > 2 * 1.4


def test_the_layer_notes_the_balance_of_unbiased_scores():
    moe, u = build(experts=8, k=2, d=6), tokens(3, 5, d=6)
    bias_of(moe).copy_(3 * torch.randn(8, dtype=torch.float64))  # overrules every score
    moe(u)
    s = torch.sigmoid(u @ moe.gate.weight.T)
    assert rms(moe.balance, balance_oracle(s, 2)) <= 1e-12
    assert rms(moe.balance, balance_oracle(s, 2, pick_from=s + bias_of(moe))) > 1e-2
    names, tensors = zip(*moe.named_parameters())
    got = dict(zip(names, torch.autograd.grad(moe.balance, tensors, allow_unused=True)))
    assert (
        rms(got["gate.weight"], torch.autograd.grad(balance_oracle(s, 2), moe.gate.weight)[0])
        <= 1e-9
    )
    assert all(
        g is None for n, g in got.items() if n != "gate.weight"
    )  # no other tensor is touched


def test_balance_adds_up_over_calls_and_layers_and_is_taken_once():
    moe, other = build(experts=8, k=2), build(experts=8, k=3, seed=1)
    both, u, v = torch.nn.ModuleList([moe, other]), tokens(2, 5), tokens(1, 4, seed=1)
    moe(u), moe(v), other(v)
    want = (
        balance_oracle(moe.gate(u), 2)
        + balance_oracle(moe.gate(v), 2)
        + balance_oracle(other.gate(v), 3)
    )
    assert rms(take_balance(both), want) <= 1e-12
    assert moe.balance is None and float(take_balance(both)) == 0
    moe.eval()(u)
    assert moe.balance is None
    with torch.no_grad():
        moe.train()(u)
    assert moe.balance is None


def test_training_on_balance_alone_evens_out_a_lopsided_router():
    """An auxiliary loss that never reached the router has happened elsewhere: flip the knob,
    something must move.
    """
    moe = build(experts=16, k=2, dtype=torch.float32)
    moe.gate.weight.data[:2, 0] += 3.0
    notes = []
    for step in range(60):
        u = tokens(4, 64, seed=step, dtype=torch.float32)
        u[..., 0] = 1
        moe(u)
        loss, load = take_balance(moe) / 4, moe.load.double()
        notes.append((float(loss.detach()), float(load.max() / load.mean() - 1)))
        moe.load.zero_()
        moe.gate.weight.data -= torch.autograd.grad(loss, moe.gate.weight)[0]
    assert notes[-1][0] < 1.1 < notes[0][0] and notes[-1][1] < 0.5 * notes[0][1], (
        notes[0],
        notes[-1],
    )
    assert not bias_of(moe).any()


def test_refusals():
    with pytest.raises(ValueError, match="top-1.*top_k >= 2"):
        build(experts=8, k=1)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"{k}.*8"):
            build(experts=8, k=k)
    build(experts=8, k=1, norm_topk_prob=False)  # its weight is the score: a gradient flows
    build(experts=8, k=8)


def test_mlp():
    torch.manual_seed(0)
    m, x = MLP(5, 9).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    a = x @ m.up_proj.weight.T
    assert rms(m(x), torch.where(a > 0, a * a, 0) @ m.down_proj.weight.T) <= 1e-12
    assert {n: tuple(p.shape) for n, p in m.named_parameters()} == {
        "up_proj.weight": (9, 5),
        "down_proj.weight": (5, 9),
    }


def test_parameter_names_and_shapes_are_the_released_ones():
    assert {n: tuple(p.shape) for n, p in build(experts=8, k=2).state_dict().items()} == {
        "gate.weight": (8, 12),
        "gate.e_score_correction_bias": (8,),
        "fc1_latent_proj.weight": (4, 12),
        "fc2_latent_proj.weight": (12, 4),
        "experts.up_proj": (8, 3, 4),
        "experts.down_proj": (8, 4, 3),
        "shared_experts.up_proj.weight": (5, 12),
        "shared_experts.down_proj.weight": (12, 5),
    }
    assert not {n for n in build(experts=8, k=2, latent=None).state_dict() if "latent" in n}


def test_super_shares_of_the_docstring():
    """40 such layers hold 95 % of all parameters."""
    with torch.device("meta"):
        one = LatentMoE(4096, 512, 22, 2688, 5376, 1024, 5.0)
    assert (
        math.floor(100 * 40 * sum(v.numel() for v in one.state_dict().values()) / 120_668_707_840)
        == 95
    )


def test_this_file_can_fail():
    moe, u = build(experts=64, k=8), tokens(2, 5)
    bias_of(moe).copy_(0.3 * torch.randn(64, dtype=torch.float64))
    for broken in (dict(weigh_with_bias=True), dict(scale_shared=True), dict(normalise=False)):
        assert rms(oracle(moe, u, **broken), moe(u)) > 0.1, broken
    wrong = moe.route(u)[0].roll(1, 0)  # the neighbour's experts
    assert rms(oracle(moe, u, wrong), moe(u)) > 0.05


# On a GPU


class Waits(TorchDispatchMode):
    """The operations for whose answer the host would wait, and those that autocast makes fp32."""

    NAMES = ("_local_scalar_dense", "bincount", "nonzero", "unique", "masked_select", "pow")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.seen += [name] * name.startswith(self.NAMES)
        return func(*args, **(kwargs or {}))


def test_a_training_step_neither_waits_nor_takes_powers():
    """No number is asked for, and no power taken, which CUDA's autocast would make fp32."""
    moe = build(experts=16, k=4, dtype=torch.float32)
    with Waits() as waits:
        moe(tokens(2, 7, dtype=torch.float32)).sum().backward()
        update_bias(moe)
    assert waits.seen == []
    with Waits() as waits:  # it sees what was there before
        pick = torch.tensor([0, 2, 2])
        pick.bincount(minlength=3), torch.ones(2).relu().square(), float(pick.sum())
    assert {"bincount", "pow", "_local_scalar_dense"} <= set(waits.seen)


def test_counts_are_those_of_bincount():
    pick = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens_each(pick, 9), pick.flatten().bincount(minlength=9))
