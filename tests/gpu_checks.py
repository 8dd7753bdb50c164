"""
What test_gpu.py asks of a GPU at Super's sizes, and interpreted/test_checks.py of the interpreter
at small ones.

Each function draws fresh inputs, runs kernel and definition, and returns the relative RMS errors by
name. Short inputs meet the readable form in fp64, all of it. Long ones (some offset past 2^31) are
read at their end alone: the reading is zero before the last `tail` tokens, so that tail, in fp64,
is enough to say what every gradient there is.
"""

import copy
import math

import torch
import torch.nn.functional as F


def rms(got, want):
    """Root-mean-square error relative to `want`; absolute where want is all zeros. NaN fails every
    `<=`.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (want.norm() if want.any() else 1))


def errors(names, got, want):
    return {name: rms(a, b) for name, a, b in zip(names.split(), got, want, strict=True)}


def leaves(args, dtype=None):
    return [v.detach().to(dtype or v.dtype).requires_grad_() for v in args]


def randn(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, device=device, dtype=dtype)


def only_the_end(reading, tail):
    reading[:, :-tail] = 0
    return reading


def sliced(b, t, widths, device, dtype, between=0):
    """Slices of one wide row each, as in_proj leaves them; `between` numbers follow that belong to
    nobody.
    """
    return randn(b, t, sum(widths) + between, device=device, dtype=dtype).split(
        [*widths, between], -1
    )[: len(widths)]


def ssd(device, dtype, b, t, h, g, p, n, between=0, tail=None):
    """mamba.ssd_chunked in fp64, all of it or, after the state that the readable form reaches in
    pieces, the tail.
    """
    from kernels.ssd import ssd as fast
    from mamba import ssd_chunked

    x, B, C = sliced(b, t, (h * p, g * n, g * n), device, dtype, between)
    x, B, C = x.unflatten(-1, (h, p)), (B / n**0.5).unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    dt = (math.log(1e-3) + math.log(100) * torch.rand(b, t, h, device=device)).exp()
    A, D, S = (
        -1 - 15 * torch.rand(h, device=device),
        randn(h, device=device),
        randn(b, h, p, n, device=device),
    )
    reading = only_the_end(randn(b, t, h, p, device=device, dtype=dtype), tail or t)
    end = randn(b, h, p, n, device=device)
    args = leaves((x, dt, A, B, C, D, S))
    y, last = fast(*args)
    got = torch.autograd.grad((y, last), args, (reading, end))
    if tail is None:
        args = leaves(args, torch.float64)
        y2, last2 = ssd_chunked(*args)
        want = torch.autograd.grad((y2, last2), args, (reading.double(), end.double()))
        return errors("y last dx ddt dA dB dC dD dstate", (y, last, *got), (y2, last2, *want))
    with torch.no_grad():
        for i in range(0, t - tail, 4096):
            cut = slice(i, min(i + 4096, t - tail))
            x64, dt64, B64, C64 = (v[:, cut].double() for v in (x, dt, B, C))
            S = ssd_chunked(x64, dt64, A.double(), B64, C64, D.double(), S.double())[1]
    x, dt, B, C = (v[:, -tail:] for v in (x, dt, B, C))
    args = leaves((x, dt, A, B, C, D, S), torch.float64)
    y2, last2 = ssd_chunked(*args)
    want = torch.autograd.grad((y2, last2), args, (reading[:, -tail:].double(), end.double()))
    cut = lambda v: v[:, -tail:]
    return errors(
        "y last dx ddt dB dC dD",
        (cut(y), last, *map(cut, (got[0], got[1], got[3], got[4])), got[5]),
        (y2, last2, want[0], want[1], want[3], want[4], want[5]),
    )


def conv(device, dtype, b, t, w, between=0, tail=None):
    from kernels.conv import conv as fast
    from mamba import causal_conv

    (x,) = sliced(b, t, (w,), device, dtype, between)
    weight, bias = randn(w, 1, 4, device=device), randn(w, device=device)
    window = randn(b, 3, w, device=device, dtype=dtype)
    reading = only_the_end(randn(b, t, w, device=device, dtype=dtype), tail or t)
    args = leaves((x, weight, bias, window))
    y = fast(*args)[0]
    got = [y, *torch.autograd.grad(y, args, reading)]
    if tail:
        window, x, reading = x[:, -tail - 3 : -tail], x[:, -tail:], reading[:, -tail:]
        got[4] = got[1][:, -tail - 3 : -tail]
        got[0], got[1] = got[0][:, -tail:], got[1][:, -tail:]
    args = leaves((x, weight, bias, window), torch.float64)
    y = causal_conv(*args)[0]
    return errors(
        "y dx dweight dbias dwindow", got, [y, *torch.autograd.grad(y, args, reading.double())]
    )


def norm(device, dtype, b, t, groups, own, between=0, tail=None):
    from kernels.norm import gated_norm as fast
    from mamba import GatedNorm

    y, z = sliced(b, t, (groups * own, groups * own), device, dtype, between)
    weight = randn(groups * own, device=device)
    reading = only_the_end(randn(b, t, groups * own, device=device, dtype=dtype), tail or t)
    args = leaves((y, z, weight))
    out = fast(*args, groups)
    got = [
        v[:, -tail:] if tail and v.ndim == 3 else v
        for v in (out, *torch.autograd.grad(out, args, reading))
    ]
    exact = GatedNorm(groups * own, groups).to(device).double()
    exact.weight.data.copy_(weight)
    tail = tail or t
    y, z = leaves((y[:, -tail:], z[:, -tail:]), torch.float64)
    out = exact(y, z)
    want = torch.autograd.grad(out, (y, z, exact.weight), reading[:, -tail:].double())
    return errors("out dy dz dweight", got, (out, *want))


def eager_experts(c, pick, gate, up, down):
    """The definition, expert by expert, in the type it is given."""
    r = torch.zeros_like(c)
    for e in pick.unique().tolist():
        token, slot = (pick == e).nonzero(as_tuple=True)
        out = (c[token] @ up[e].T).relu().square() @ down[e].T
        r = r.index_add(0, token, out * gate[token, slot, None].to(out.dtype))
    return r


def experts(device, dtype, m, E, k, l, f, tail=None, eager=False):
    """With a tail, its tokens pick the last k experts, whose rows lie at the far end. eager: the
    errors of that.
    """
    from kernels.experts import experts as fast

    pick = (
        torch.rand(m, E, device=device).topk(k).indices
        if m * E < 2**30
        else torch.cat(
            [
                torch.rand(len(i), E, device=device).topk(k).indices
                for i in torch.arange(m).split(4096)
            ]
        )
    )
    c, gate = randn(m, l, device=device, dtype=dtype), torch.rand(m, k, device=device) + 0.1
    gate = 5 * gate / gate.sum(1, keepdim=True)
    up, down = (
        randn(E, f, l, device=device, dtype=dtype),
        randn(E, l, f, device=device, dtype=dtype),
    )
    up, down = up.div_(l**0.5), down.div_(f**0.5)
    if tail:
        pick[-tail:] = torch.arange(E - k, E, device=device)
    reading = randn(m, l, device=device, dtype=dtype)
    reading[: -(tail or m)] = 0
    args = leaves((c, gate, up, down))
    r = (eager_experts if eager else fast)(args[0], pick, *args[1:])
    got = r, *torch.autograd.grad(r, args, reading)
    if tail:
        assert not got[3][: E - k].any() and not got[4][: E - k].any()  # nobody read them
        got = *(v[-tail:] for v in got[:3]), got[3][E - k :], got[4][E - k :]
        c, pick, gate, up, down, reading = (
            c[-tail:],
            pick[-tail:] - (E - k),
            gate[-tail:],
            up[E - k :],
            down[E - k :],
            reading[-tail:],
        )
    args = leaves((c, gate, up, down), torch.float64)
    r = eager_experts(args[0], pick, *args[1:])
    return errors("r dc dgate dup ddown", got, (r, *torch.autograd.grad(r, args, reading.double())))


def loss(device, dtype, t, v, d, rows=2048):
    """In fp64 row piece by row piece: all logits at once would not fit."""
    from kernels.loss import linear_nll as fast

    h, weight = (
        randn(1, t, d, device=device, dtype=dtype),
        randn(v, d, device=device, dtype=dtype).div_(d**0.5),
    )
    targets, mask = torch.randint(v, (1, t), device=device), torch.rand(1, t, device=device) < 0.8
    args = leaves((h, weight))
    got = fast(*args, targets, mask, rows=rows)
    got = got, *torch.autograd.grad(got / 7, args)
    total, dh, dW = 0, [], 0
    for x, y, ok in zip(h[0].split(512), targets[0].split(512), mask[0].split(512)):
        x, w = leaves((x, weight), torch.float64)
        one = (F.cross_entropy(x @ w.T, y, reduction="none") * ok).sum()
        more = torch.autograd.grad(one / 7, (x, w))
        total, dW = total + one.detach(), dW + more[1]
        dh.append(more[0])
    return errors("loss dh dW", got, (total, torch.cat(dh)[None], dW))


def texts(device, config, lengths, new, prefill):
    """Whether greedy text is the same by both paths: prompts in pieces, token by token, and drafts
    with rollback.
    """
    from model import Nemotron, set_paths
    from sample import generate

    plain = Nemotron(config, seed=0).to(device).eval()
    fast = copy.deepcopy(plain)
    assert any("kernels/ssd.py" in line for line in set_paths(fast, True))
    rows = [torch.randint(config.vocab_size, (n,)).tolist() for n in lengths]
    want = generate(plain, rows, new, prefill=prefill)
    return [generate(fast, rows, new, prefill=prefill, speculate=d) == want for d in (0, 3)]


def train_step(device, config, batch, length, autocast=False):
    """train.losses of one model, readable and fast, the gradient of every weight, and the loss
    after a step of SGD.
    """
    import train
    from model import Nemotron, set_paths

    plain = Nemotron(config, seed=0).to(device)
    fast = copy.deepcopy(plain)
    table = "\n".join(set_paths(fast, True))
    assert all(f"kernels/{k}.py" in table for k in ("ssd", "conv", "norm")), table
    ids, out = torch.randint(config.vocab_size, (batch, length), device=device), []
    for model in (plain, fast):

        def ask():
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                return sum(train.losses(model, ids))

        first = ask()
        first.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        with torch.no_grad():
            out.append(dict(loss=first.detach(), after=ask(), **grads))
    assert out[0].keys() == out[1].keys()
    return {name: rms(out[1][name], want) for name, want in out[0].items()}
