"""
mamba.py says one thing three ways, and a fourth time with a cache; these tests are what makes that
true.

The oracles below are written from the equations (S_t = a_t S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t
+ D x_t), one token at a time, in fp64: there a disagreement means algebra, not rounding. 1e-10
leaves room for the order of summation.
"""

import math

import pytest
import torch
from conftest import rms
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba import GatedNorm, Mamba2, State, causal_conv, ssd_chunked, ssd_masked, ssd_recurrent

NAMES = ("x", "dt", "A", "B", "C", "D", "state")


def oracle(x, dt, A, B, C, D=None, state=None, group=lambda i, h, g: i // (h // g)):
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    own = [group(i, h, g) for i in range(h)]  # the group each head reads
    S = torch.zeros(b, h, p, n, dtype=x.dtype) if state is None else state
    y = []
    for i in range(t):
        a = torch.exp(dt[:, i] * A)
        S = a.view(b, h, 1, 1) * S + (dt[:, i].view(b, h, 1) * x[:, i]).view(b, h, p, 1) * B[
            :, i, own
        ].view(b, h, 1, n)
        y.append((S * C[:, i, own].view(b, h, 1, n)).sum(-1))
        if D is not None:
            y[-1] = y[-1] + D.view(1, h, 1) * x[:, i]
    return torch.stack(y, 1), S


def inputs(t, g, h=8, p=3, n=5, b=2, seed=0, dt=(1e-3, 1.0)):
    """x, dt, A, B, C, D, state: dt log-uniform, A in (-16, -1)."""
    r = torch.Generator().manual_seed(seed)
    f = lambda *s: torch.randn(*s, generator=r, dtype=torch.float64)
    u = lambda *s: torch.rand(*s, generator=r, dtype=torch.float64)
    low, high = map(math.log, dt)
    return [
        f(b, t, h, p),
        (low + (high - low) * u(b, t, h)).exp(),
        -1 - 15 * u(h),
        f(b, t, g, n),
        f(b, t, g, n),
        f(h),
        f(b, h, p, n),
    ]


def with_grads(form, args, seed=1):
    """Outputs, and the gradients of a random reading of both of them with respect to every
    input.
    """
    args = [v.clone().requires_grad_() for v in args]
    y, S = form(*args)
    r = torch.Generator().manual_seed(seed)
    wy, wS = (torch.randn(v.shape, generator=r, dtype=torch.float64).to(v.dtype) for v in (y, S))
    return [y, S, *torch.autograd.grad((y * wy).sum() + (S * wS).sum(), args)]


def test_the_oracle_itself_against_plain_numbers():
    x, dt, A, B, C, D, state = inputs(t=4, g=2, h=4, p=2, n=3, b=1)
    want, S = oracle(x, dt, A, B, C, D, state)
    for h, g in ((0, 0), (1, 0), (2, 1), (3, 1)):
        for p in range(2):
            s = [float(state[0, h, p, n]) for n in range(3)]
            for t in range(4):
                for n in range(3):
                    write = float(dt[0, t, h] * x[0, t, h, p] * B[0, t, g, n])
                    s[n] = math.exp(float(dt[0, t, h] * A[h])) * s[n] + write
                y = sum(s[n] * float(C[0, t, g, n]) for n in range(3)) + float(D[h] * x[0, t, h, p])
                assert abs(y - want[0, t, h, p]) < 1e-12
            assert all(abs(s[n] - S[0, h, p, n]) < 1e-12 for n in range(3))


# T = 1, T < chunk, T = chunk, T not a multiple, many chunks; one group, some groups, a group per
# head
@pytest.mark.parametrize("g", [1, 2, 4, 8])
@pytest.mark.parametrize("t", [1, 7, 16, 61, 257])
def test_three_forms_one_answer_and_one_gradient(t, g):
    full = inputs(t, g)
    for D in (False, True):
        for state in (False, True):
            keep = [
                v
                for name, v in zip(NAMES, full)
                if (name != "D" or D) and (name != "state" or state)
            ]
            named = lambda form, **kw: (
                lambda *a: form(*a[:5], D=a[5] if D else None, state=a[-1] if state else None, **kw)
            )
            want = with_grads(named(oracle), keep)
            forms = {"recurrent": named(ssd_recurrent), "chunked": named(ssd_chunked, chunk=16)}
            for name, form in forms.items():
                for what, got, ok in zip(
                    ("y", "S", *("grad " + n for n in NAMES)), with_grads(form, keep), want
                ):
                    assert rms(got, ok) <= 1e-10, (name, what, D, state)
            if not state:  # the mask form returns no state: read y alone
                only_y = lambda form: lambda *a: (form(*a), torch.zeros(1, dtype=torch.float64))
                masked = with_grads(
                    only_y(lambda *a: ssd_masked(*a[:5], D=a[5] if D else None)), keep
                )
                ok = with_grads(only_y(lambda *a: named(oracle)(*a)[0]), keep)
                assert all(rms(g1, g2) <= 1e-10 for g1, g2 in zip(masked, ok)), (
                    D,
                    [rms(*z) for z in zip(masked, ok)],
                )


@pytest.mark.parametrize(
    "form",
    [ssd_recurrent, lambda *a: ssd_chunked(*a, chunk=2), lambda *a: ssd_masked(*a[:6])],
    ids=["recurrent", "chunked", "masked"],
)
def test_gradients_against_finite_differences(form):
    args = [v.requires_grad_() for v in inputs(t=5, g=2, h=4, p=2, n=2, b=1, dt=(0.05, 0.5))]
    assert torch.autograd.gradcheck(form, args)


@pytest.mark.parametrize("chunk", [1, 2, 3, 16, 61, 64, 1000])
def test_chunk_size_is_no_part_of_the_answer(chunk):
    args = inputs(t=61, g=2)
    for got, want in zip(ssd_chunked(*args, chunk=chunk), oracle(*args)):
        assert rms(got, want) <= 1e-10


def test_no_state_is_a_state_of_zeros():
    args = inputs(t=20, g=4)[:6]
    zero = torch.zeros(2, 8, 3, 5, dtype=torch.float64)
    for form in (ssd_recurrent, lambda *a: ssd_chunked(*a, chunk=8)):
        assert all(torch.equal(u, v) for u, v in zip(form(*args), form(*args, zero)))


def test_inputs_are_left_alone():
    args = inputs(t=20, g=4)
    before = [v.clone() for v in args]
    ssd_recurrent(*args), ssd_chunked(*args, chunk=8), ssd_masked(*args[:6])
    assert all(torch.equal(u, v) for u, v in zip(args, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "p,n,chunk", [(3, 5, 16), (64, 128, 128)]
)  # ragged vectors, and Super's own sizes
def test_the_future_does_not_leak(dtype, p, n, chunk):
    t, cut = 2 * chunk + 2, chunk + chunk // 2
    old = [v.to(dtype) for v in inputs(t, g=2, h=4, p=p, n=n, b=1)]
    new = [v.to(dtype) for v in inputs(t, g=2, h=4, p=p, n=n, b=1, seed=9)]
    for i in (2, 5, 6):  # A, D and the first state are no future
        new[i] = old[i]
    for i in (0, 1, 3, 4):
        new[i][:, :cut] = old[i][:, :cut]
    forms = [
        lambda *a: ssd_chunked(*a, chunk=chunk)[0],
        lambda *a: ssd_recurrent(*a)[0],
        lambda *a: ssd_masked(*a[:6]),
    ]
    for form in forms:
        y, z = form(*old), form(*new)
        assert torch.equal(y[:, :cut], z[:, :cut]) and not torch.equal(
            y, z
        )  # bit for bit, no tolerance


@pytest.mark.parametrize("chunk", [1, 16, 128])
def test_extreme_decays(chunk):
    """dt A from -50 to -1e-6, mixed token by token: exp underflows inside every chunk, and 1 - a is
    lost in others.
    """
    args = inputs(t=300, g=2, h=4, p=8, n=8, dt=(1e-6, 50.0))
    args[2] = -torch.ones(4, dtype=torch.float64)
    want = with_grads(oracle, args)
    for got, ok in zip(with_grads(lambda *a: ssd_chunked(*a, chunk=chunk), args), want):
        assert rms(got, ok) <= 1e-10
    small = with_grads(lambda *a: ssd_chunked(*a, chunk=chunk), [v.float() for v in args])
    for name, got, ok in zip(("y", "S", *NAMES), small, want):
        assert got.isfinite().all(), name
        assert rms(got, ok) <= 2e-4, (
            name
        )  # fp32 running sums reach -1e3 in 128 tokens: their last bit is 6e-5


@pytest.mark.parametrize("log_a", [-50.0, -1e4, -1e-6, 0.0])
def test_one_decay_everywhere(log_a):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        args = [v.to(dtype) for v in inputs(t=70, g=2)]
        args[1], args[2] = torch.full_like(args[1], 2.0), torch.full_like(args[2], log_a / 2)
        got = with_grads(lambda *a: ssd_chunked(*a, chunk=32), args)
        for name, u, v in zip(
            ("y", "S", *NAMES), got, with_grads(oracle, [v.double() for v in args])
        ):
            assert u.isfinite().all(), name  # A's gradient is 1e-20 where a is: only noise is left
            assert rms(u, v) <= tolerance or (u.double() - v).norm() <= tolerance / 10, name


def test_fp32_where_super_lives():
    """8 groups, p 64, n 128, fresh dt and A, four chunks of 128: what fp32 costs."""
    args = inputs(t=512, g=8, h=16, p=64, n=128, b=1, dt=(1e-3, 1e-1))
    want = ssd_recurrent(*args)  # equals the oracle: see above
    for name, form in (
        ("recurrent", ssd_recurrent),
        ("chunked", lambda *a: ssd_chunked(*a, chunk=128)),
    ):
        error = [rms(got, ok) for got, ok in zip(form(*(v.float() for v in args)), want)]
        print(f"fp32 against fp64, {name}: y {error[0]:.1e}  S {error[1]:.1e}")
        assert max(error) <= 1e-5


def test_bf16_inputs_keep_the_state_in_fp32():
    args = inputs(t=40, g=2)
    mixed = [v.bfloat16() if i in (0, 3, 4) else v.float() for i, v in enumerate(args)]
    for form in (ssd_recurrent, lambda *a: ssd_chunked(*a, chunk=16)):
        y, S = form(*mixed)
        assert (y.dtype, S.dtype) == (torch.bfloat16, torch.float32)
        want = oracle(*(v.double() for v in mixed))
        assert (
            rms(y, want[0]) <= 1e-2 and rms(S, want[1]) <= 1e-2
        )  # bf16 has 8 bits: half of one is 2e-3


def test_a_carried_state_is_never_rounded_to_bf16():
    """Nothing is written (x = 0), so what comes out is what went in, faded: to fp32's last bits,
    whatever x's type.
    """
    x, dt, A, B, C, D, state = inputs(t=40, g=2)
    for form in (ssd_recurrent, lambda *a: ssd_chunked(*a, chunk=16)):
        _, S = form(
            0 * x.bfloat16(),
            dt.float(),
            A.float(),
            B.bfloat16(),
            C.bfloat16(),
            D.float(),
            state.float(),
        )
        assert rms(S, (dt.sum(1) * A).exp()[..., None, None] * state) <= 1e-5


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("t", [1, 2, 9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_causal_conv_is_a_loop(k, t, bias, carried):
    r = torch.Generator().manual_seed(k)
    f = lambda *s: torch.randn(*s, generator=r, dtype=torch.float64)
    x, w, c, window = (
        f(2, t, 5),
        f(5, 1, k),
        f(5) if bias else None,
        f(2, k - 1, 5) if carried else None,
    )
    y, seen = causal_conv(x, w, c, window)
    assert torch.equal(
        seen,
        torch.cat([torch.zeros(2, k - 1, 5, dtype=x.dtype) if window is None else window, x], 1),
    )
    for i in range(t):
        v = torch.zeros(2, 5, dtype=x.dtype) if c is None else c.expand(2, 5)
        for j in range(k):  # tap k-1 meets the token itself
            past = i - (k - 1) + j
            if past >= 0:
                v = v + w[:, 0, j] * x[:, past]
            elif window is not None:
                v = v + w[:, 0, j] * window[:, k - 1 + past]
        assert rms(y[:, i], v * torch.sigmoid(v)) <= 1e-12


@pytest.mark.parametrize("t", [1, 6])
def test_causal_conv_gradients(t):
    r = torch.Generator().manual_seed(t)
    f = lambda *s: torch.randn(*s, generator=r, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: causal_conv(*a)[0], (f(2, t, 3), f(3, 1, 4), f(3), f(2, 3, 3))
    )
    assert torch.autograd.gradcheck(
        lambda x, w: causal_conv(x, w, None)[0], (f(2, t, 3), f(3, 1, 2))
    )


def gated_norm(y, z, weight, groups, eps, gate_first=True):
    gate, out = z * torch.sigmoid(z), torch.empty_like(y)
    v = y * gate if gate_first else y
    size = y.shape[-1] // groups
    for row in range(y.shape[0]):
        for t in range(y.shape[1]):
            for g in range(groups):
                s = slice(g * size, (g + 1) * size)
                out[row, t, s] = (
                    v[row, t, s] / ((v[row, t, s] ** 2).mean() + eps).sqrt() * weight[s]
                )
    return out if gate_first else out * gate


def test_gated_norm():
    r = torch.Generator().manual_seed(0)
    f = lambda *s: torch.randn(*s, generator=r, dtype=torch.float64)
    y, z, weight = f(2, 5, 12) * f(12).exp(), f(2, 5, 12), f(12)
    for groups, eps in ((1, 1e-5), (3, 1e-5), (3, 0.5), (12, 1e-5)):
        norm = GatedNorm(12, groups, eps).double()
        norm.weight.data.copy_(weight)
        assert rms(norm(y, z), gated_norm(y, z, weight, groups, eps)) <= 1e-12
    norm = GatedNorm(12, 3).double()
    norm.weight.data.copy_(weight)
    assert rms(norm(y, z), gated_norm(y, z, weight, 3, 1e-5, gate_first=False)) > 0.1
    assert rms(norm(y, z), gated_norm(y, z, weight, 1, 1e-5)) > 0.1
    assert norm.float()(y.bfloat16(), z.bfloat16()).dtype == torch.bfloat16


def test_gated_norm_takes_its_statistics_in_fp32():
    """1e3 squared is no number of fp16; and 4,096 squares summed in bf16 would stop growing."""
    y, z = torch.full((1, 1, 4096), 1e3), torch.full((1, 1, 4096), 1e3)
    for dtype in (torch.float16, torch.bfloat16):
        out = GatedNorm(4096, 2).to(dtype)(y.to(dtype), z.to(dtype))
        assert rms(out, torch.ones_like(out)) <= 4e-3


def mixer(d=7, heads=6, head_dim=4, groups=3, state=5, chunk=4, seed=0, dtype=torch.float64, **kw):
    torch.manual_seed(seed)
    m = Mamba2(d, heads, head_dim, groups, state, chunk=chunk, **kw).to(dtype)
    for p in m.parameters():  # nothing left at a neutral value
        p.data += 0.3 * torch.randn_like(p)
    m.dt_bias.data += 4  # or D x would drown the recurrence in 9 tokens
    return m


def mixer_oracle(
    m,
    u,
    heads=6,
    head_dim=4,
    groups=3,
    state=5,
    order="zxBCd",
    group=lambda i, h, g: i // (h // g),
    k=4,
):
    """The mixer from its tensors alone, row by row and head by head."""
    w = dict(m.named_parameters())
    size = dict(z=heads * head_dim, x=heads * head_dim, B=groups * state, C=groups * state, d=heads)
    rows = dict(zip(order, w["in_proj.weight"].split([size[c] for c in order])))
    assert len(w["in_proj.weight"]) == sum(size.values())
    out = []
    for row in u:  # (t, d)
        part = {name: row @ matrix.T for name, matrix in rows.items()}
        raw = torch.cat([part["x"], part["B"], part["C"]], -1)
        raw = torch.cat([torch.zeros(k - 1, raw.shape[1], dtype=raw.dtype), raw])
        v = sum(raw[j : j + len(row)] * w["conv1d.weight"][:, 0, j] for j in range(k)) + w.get(
            "conv1d.bias", 0
        )
        v = v * torch.sigmoid(v)
        e, gn = size["x"], size["B"]
        x, B, C = v[:, :e], v[:, e : e + gn], v[:, e + gn :]
        x, B, C = x.view(-1, heads, head_dim), B.view(-1, groups, state), C.view(-1, groups, state)
        dt = torch.log1p(torch.exp(part["d"] + w["dt_bias"]))
        y, _ = oracle(
            x[None], dt[None], -torch.exp(w["A_log"]), B[None], C[None], w["D"], group=group
        )
        normed = gated_norm(y.flatten(2), part["z"][None], w["norm.weight"], groups, 1e-5)[0]
        out.append(normed @ w["out_proj.weight"].T)
    return torch.stack(out)


@pytest.mark.parametrize("t", [1, 2, 4, 5, 11])
@pytest.mark.parametrize("bias", [True, False])
def test_the_mixer_is_its_equations(t, bias):
    m, u = (
        mixer(conv_bias=bias),
        torch.randn(2, t, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(t)),
    )
    got, want = m(u), mixer_oracle(m, u)
    assert rms(got, want) <= 1e-10
    names, tensors = zip(*m.named_parameters())
    pairs = zip(
        names,
        torch.autograd.grad((got**2).sum(), tensors),
        torch.autograd.grad((want**2).sum(), tensors),
    )
    for name, g, w in pairs:
        assert rms(g, w) <= 1e-9, name


def test_parameter_names_and_shapes_are_the_released_ones():
    m = Mamba2(7, 6, 4, 3, 5)
    assert {n: tuple(p.shape) for n, p in m.state_dict().items()} == {
        "in_proj.weight": (24 + 24 + 15 + 15 + 6, 7),
        "conv1d.weight": (54, 1, 4),
        "conv1d.bias": (54,),
        "A_log": (6,),
        "D": (6,),
        "dt_bias": (6,),
        "norm.weight": (24,),
        "out_proj.weight": (7, 24),
    }


def test_a_fresh_mixer_is_in_the_regime_it_claims():
    m = Mamba2(7, 6, 4, 3, 5)
    dt, A = torch.nn.functional.softplus(m.dt_bias), m.A_log.exp()
    assert 0.00099 < dt.min() < dt.max() < 0.101 and 0.99 < A.min() < A.max() < 16.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_future_does_not_leak_through_the_mixer(dtype):
    m = mixer(chunk=8, dtype=dtype)
    u = torch.randn(2, 30, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    v = u.clone()
    v[:, 13:] = 9.0
    assert torch.equal(m(u)[:, :13], m(v)[:, :13]) and not torch.equal(m(u), m(v))


def states_equal(a, b, tolerance=1e-10):
    return rms(a.S, b.S) <= tolerance and rms(a.conv, b.conv) <= tolerance


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 99))
def test_any_partition_gives_the_whole(pieces, chunk, seed):
    m = mixer(chunk=chunk, seed=seed)
    u = torch.randn(
        2, sum(pieces), 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    whole, cache = State(), State()
    want = m(u, whole)
    assert rms(want, m(u)) <= 1e-12  # noting the state changes nothing
    got = torch.cat([m(piece, cache) for piece in u.split(pieces, 1)], 1)
    assert rms(got, want) <= 1e-10 and states_equal(cache, whole)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=5),
    st.integers(0, 99),
)
def test_padded_rows_are_what_each_row_is_alone(rounds, seed):
    """Three rows read unequal amounts, right-padded with large nonsense, several times, down to
    nothing at all.
    """
    m, cache = mixer(seed=seed), State()
    alone, r = [State() for _ in range(3)], torch.Generator().manual_seed(seed)
    for counts in rounds:
        t = max(*counts, 1)
        u = torch.randn(3, t, 7, dtype=torch.float64, generator=r)
        for row, n in enumerate(counts):
            u[row, n:] = 1e3
        y = m(u, cache, torch.tensor(counts))
        for row, n in enumerate(counts):
            if n:
                assert rms(y[row : row + 1, :n], m(u[row : row + 1, :n], alone[row])) <= 1e-10
    for row in range(3):
        if alone[row].S is None:  # count 0 all along: as if nothing had been read
            assert not cache.S[row].any() and not cache.conv[row].any()
        else:
            assert rms(cache.S[row : row + 1], alone[row].S) <= 1e-10
            assert rms(cache.conv[row : row + 1], alone[row].conv) <= 1e-10


def test_count_without_cache_changes_no_real_token():
    m, u = mixer(), torch.randn(2, 11, 7, dtype=torch.float64)
    got, want = m(u, count=torch.tensor([11, 4])), m(u)
    assert torch.equal(got[0], want[0]) and rms(got[1, :4], want[1, :4]) <= 1e-12


def test_fp32_decoding_is_the_full_pass():
    m = mixer(d=32, heads=8, head_dim=16, groups=2, state=16, chunk=16, dtype=torch.float32)
    u, cache = torch.randn(3, 50, 32), State()
    with torch.no_grad():
        got = torch.cat([m(piece, cache) for piece in u.split([20, *[1] * 30], 1)], 1)
        assert rms(got, m(u)) <= 1e-5


def test_the_cache_does_not_grow_and_keeps_nothing_alive():
    m, cache, sizes = mixer(), State(), []
    with torch.no_grad():
        for t in (50, 1, 7, 200, 1):
            m(torch.randn(2, t, 7, dtype=torch.float64), cache)
            sizes.append(sum(v.untyped_storage().nbytes() for v in (cache.S, cache.conv)))
    assert set(sizes) == {8 * 2 * (6 * 4 * 5 + 3 * 54)}
    with torch.no_grad():
        m(torch.randn(2, 90, 7, dtype=torch.float64), cache, torch.tensor([90, 3]))
    assert sum(v.untyped_storage().nbytes() for v in (cache.S, cache.conv)) == sizes[0]


def test_super_state_is_four_mebibytes_a_sequence():
    m, cache = Mamba2(8, heads=128, head_dim=64, groups=8, state=128), State()
    with torch.no_grad():
        m(torch.randn(1, 3, 8), cache)
    assert cache.S.numel() * cache.S.element_size() == 4_194_304 and cache.conv.shape == (
        1,
        3,
        10_240,
    )


def test_a_step_does_not_write_into_the_old_state():
    """Drafting needs this: who keeps cache.S and cache.conv can go back to them."""
    m, cache = mixer(), State()
    for t in (5, 1, 3):
        m(torch.randn(2, 4, 7, dtype=torch.float64), cache)
        S, conv = cache.S, cache.conv
        kept = S.clone(), conv.clone()
        m(torch.randn(2, t, 7, dtype=torch.float64), cache)
        assert torch.equal(S, kept[0]) and torch.equal(conv, kept[1])


@pytest.mark.parametrize("cast", ["autocast", "parameters"])
def test_bf16(cast):
    """Under autocast, or with bf16 parameters, S stays fp32, prefilled or stepped, and nothing
    drifts.
    """
    m = mixer(d=32, heads=8, head_dim=16, groups=2, state=16, chunk=16, dtype=torch.float32)
    u, cache, exact = torch.randn(2, 60, 32), State(), State()
    with torch.no_grad():
        if cast == "parameters":
            m.bfloat16()
            want = Mamba2(32, 8, 16, 2, 16, chunk=16)
            want.load_state_dict(m.state_dict())
            u, full = u.bfloat16(), want(u.bfloat16().float(), exact)
        else:
            full = m(u, exact)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
            for i, piece in enumerate(u.split([40, *[1] * 20], 1)):
                y = m(piece, cache)
                assert y.dtype == torch.bfloat16 and cache.S.dtype == torch.float32
                assert (
                    rms(y, full[:, :40] if i == 0 else full[:, 39 + i : 40 + i]) <= 4e-2
                )  # several bf16 matmuls deep
    assert rms(cache.S, exact.S) <= 2e-2


def test_gradients_under_autocast_reach_every_parameter():
    m = mixer(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        m(torch.randn(2, 9, 7)).float().square().mean().backward()
    for name, p in m.named_parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), name


def test_refuses_heads_that_groups_cannot_share():
    with pytest.raises(ValueError, match="6.*4"):
        Mamba2(7, heads=6, head_dim=4, groups=4, state=5)


def test_this_file_can_fail():
    args = inputs(t=61, g=4)
    x, dt, A, B, C, D, state = args
    want, S = oracle(*args)
    late = oracle(x, dt.roll(1, 1), A, B, C, D, state)  # decay one token late
    other = oracle(*args, group=lambda i, h, g: i % g)  # heads dealt out like cards
    forgot = oracle(x, dt, A, B, C, D)  # the state that came in
    for broken, _ in (late, other, forgot):
        assert rms(broken, want) > 0.05
    m, u = mixer(), torch.randn(1, 9, 7, dtype=torch.float64)
    for broken in (dict(order="xzBCd"), dict(order="zxCBd"), dict(group=lambda i, h, g: i % g)):
        assert rms(mixer_oracle(m, u, **broken), m(u)) > 0.05
