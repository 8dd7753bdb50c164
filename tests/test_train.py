"""train.py tells the story of a run; here every sentence of it is checked against arithmetic done
by other means.
"""

import functools
import hashlib
import json
import math
import re
import struct
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import rms, same
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import SMALL, spelled

import checkpoint
import data
import disk
import latent_moe
import mtp
import plot
import sample
import train
from corpora import synthetic
from model import Config, Nemotron
from scale import room
from training import pretrain
from training.settings import RECIPES, configure
from training.world import Alone, choose_device

BYTES = data.tokenizer("bytes")
COLUMNS = [
    "step",
    "tokens",
    "seconds",
    "lr",
    "train_nats",
    "val_nats",
    "val_bpb",
    "mtp1_nats",
    "mtp2_nats",
    "balance",
    "max_vio",
    "max_vio_worst",
    "idle",
    "grad_norm",
    "tokens_per_second",
]
draw, quiet = plot.run, lambda line: None
corpus, cut = functools.cache(data.corpus), functools.cache(data.encode)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, one text cut once, and no picture, or they would take most of the time.
    test_the_picture draws.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(plot, "run", lambda folder: None)
    monkeypatch.setattr(data, "corpus", corpus)
    monkeypatch.setattr(
        data, "encode", lambda enc, text: cut(BYTES if enc.name == "bytes" else enc, text)
    )
    yield
    torch.set_num_threads(before)


def run(out, pattern="ME*-", changes=(), **kw):
    model = {"hybrid_override_pattern": pattern, **SMALL, **dict(changes)}
    return train.Run(
        **{
            **dict(
                out=str(out),
                model=spelled(**model),
                data="copy",
                tokenizer="bytes",
                steps=8,
                batch=4,
                length=16,
                eval_tokens=96,
                eval_every=1,
                log_every=1,
                save_every=2,
                prompt="",
                worth=False,
                threads=1,
            ),
            **kw,
        }
    )


def flags(run):
    """The command line of a run: every field that is not the default."""
    given = []
    for f in fields(run):
        name, v = f.name.replace("_", "-"), getattr(run, f.name)
        if v != getattr(train.Run, f.name):
            switch = [f"--{name}" if v else f"--no-{name}"]
            given += switch if isinstance(v, bool) else [f"--{name}", str(v)]
    return given


def model_of(run, dtype=torch.float64):
    """Large weights and biases that matter, in fp64: what differs is algebra, not rounding."""
    model = Nemotron(
        configure(replace(run, model=run.model + ",initializer_range=0.2"), 257), run.seed
    ).to(dtype)
    g = torch.Generator().manual_seed(1)
    for moe in latent_moe.layers(model):
        moe.gate.e_score_correction_bias += 0.1 * torch.randn(len(moe.load), generator=g)
    return model


def text(b, t, seed=0):
    return torch.randint(257, (b, t), generator=torch.Generator().manual_seed(seed))


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def targets(run, depths=2):
    return [run.batch * (run.length - k) for k in range(depths + 1)]


def batch(pieces, run):
    return data.Batch([(ids,) for ids in pieces], targets(run), run.batch, run.batch * run.length)


def here():
    world = Alone()
    world.settle(train.Run(device="cpu"), quiet)
    return world


def assert_same_run(a, b):
    """Newest checkpoints and logs of two folders, but for the clock, the settings, and the random
    state, which nothing uses.
    """
    x, y = (
        {k: v for k, v in checkpoint.read(f).items() if k not in ("run", "rng")} for f in (a, b)
    )
    assert (
        x.keys() == y.keys() and {"model", "optimizer", "step", "config", "tokenizer"} <= x.keys()
    )
    assert [k for k in x if not same(x[k], y[k])] == []
    p, q = (
        [
            {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")}
            for r in disk.read_log(f / "log.csv")
        ]
        for f in (a, b)
    )
    assert p == q and [r["step"] for r in p] == list(range(1, len(p) + 1))


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the schedule


def schedule(t, lr_max, lr_min, T, warmup, decay):
    """The three lines of the report's schedule, with T_w = warmup T and T_s = T - decay T."""
    T_w, T_s = warmup * T, T - decay * T
    if t < T_w:
        return lr_max * t / T_w
    if decay == 0 or t < T_s:
        return lr_max
    return lr_min + (lr_max - lr_min) * (1 - ((t - T_s) / (T - T_s)) ** 0.5)


@settings(max_examples=200)
@given(
    st.integers(1, 300),
    st.sampled_from([0, 0.01, 0.05, 0.25, 0.5, 1.0]),
    st.sampled_from([0, 0.1, 0.3, 0.5, 0.77, 1.0]),
)
def test_learning_rate_is_the_formula_at_every_step(T, warmup, decay):
    assume(warmup + decay <= 1)
    r = train.Run(steps=T, warmup=warmup, decay=decay, lr=4e-3, lr_min=4e-5)
    got, T_w, T_s = [train.learning_rate(t, r) for t in range(1, T + 1)], warmup * T, T - decay * T
    for t, lr in enumerate(got, 1):  # where the square root begins, 1e-16 of t is 1e-8 of lr
        assert lr == pytest.approx(schedule(t, 4e-3, 4e-5, T, warmup, decay), rel=1e-6)
    assert 0 < got[0] and max(got) <= 4e-3
    assert not decay or got[-1] == 4e-5  # exactly
    assert all(lr == 4e-3 for t, lr in enumerate(got, 1) if T_w + 1e-6 < t < T_s - 1e-6)


def test_the_ends_of_the_schedule():
    r = train.Run(steps=100, warmup=0.1, decay=0.4, lr=1.0, lr_min=0.01)
    lr = [train.learning_rate(t, r) for t in range(1, 101)]
    assert lr[0] == pytest.approx(0.1) and lr[9] == lr[59] == 1 and lr[60] < 1 and lr[-1] == 0.01
    assert lr[69] == pytest.approx(
        0.01 + 0.99 * (1 - math.sqrt(10 / 40))
    )  # a quarter of the way is half of the fall
    assert [train.learning_rate(t, replace(r, warmup=0)) for t in (1, 2)] == [1, 1]
    assert train.learning_rate(100, replace(r, decay=0)) == 1


def test_the_steps_use_it_and_the_log_says_so(tmp_path, monkeypatch):
    seen, real = [], train.optimiser

    def spy(model, run):
        opt = real(model, run)
        opt.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
        return opt

    monkeypatch.setattr(train, "optimiser", spy)
    _, rows = train.fit(run(tmp_path, "-", steps=10, warmup=0.3, decay=0.5), quiet)
    want = [schedule(t, 4e-3, 4e-5, 10, 0.3, 0.5) for t in range(1, 11)]
    assert np.allclose(seen, [[lr, lr] for lr in want], rtol=1e-9) and np.allclose(
        [r["lr"] for r in rows], want, rtol=1e-9
    )


# ---- the optimiser


def test_decay_is_on_matrices_only(tmp_path):
    r = run(tmp_path, weight_decay=0.125)
    model = model_of(r, torch.float32)
    opt, name = train.optimiser(model, r), {p: n for n, p in model.named_parameters()}
    decayed, plain = (
        [name[p] for p in g["params"]]
        for g in sorted(opt.param_groups, key=lambda g: -g["weight_decay"])
    )
    assert sorted(g["weight_decay"] for g in opt.param_groups) == [0, 0.125]
    assert sorted(decayed + plain) == sorted(name.values())  # each exactly once
    vector = r"norm\.weight|norm_f\.weight|layernorm\.weight|A_log|\.D|dt_bias|conv1d\.bias"
    assert all(re.search(f"({vector})$", n) for n in plain) and not any(
        re.search(f"({vector})$", n) for n in decayed
    )
    assert {
        "lm_head.weight",
        "backbone.embeddings.weight",
        "backbone.layers.1.mixer.gate.weight",
        "mtp.layers.0.eh_proj.weight",
        "backbone.layers.1.mixer.experts.up_proj",
    } <= set(decayed)
    assert all(
        g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 for g in opt.param_groups
    ) and isinstance(opt, torch.optim.AdamW)


def test_clipping_and_three_steps_of_adamw_by_hand(tmp_path, monkeypatch):
    grads, start, real = [], {}, train.optimiser

    def spy(model, run):
        opt, name = real(model, run), {p: n for n, p in model.named_parameters()}
        start.update({n: p.detach().double().clone() for n, p in model.named_parameters()})
        opt.register_step_pre_hook(
            lambda o, *_: grads.append({name[p]: p.grad.double() for p in model.parameters()})
        )
        return opt

    monkeypatch.setattr(train, "optimiser", spy)
    r = run(tmp_path, steps=3, lr=0.02, weight_decay=0.5, clip=0.03)
    model, rows = train.fit(r, quiet)
    for _step, (g, row) in enumerate(zip(grads, rows)):
        assert row["grad_norm"] > 0.06  # logged as it was, ...
        norm = torch.cat([x.flatten() for x in g.values()]).norm()
        assert norm == pytest.approx(0.03, rel=1e-4)  # ... but the whole of it is clipped
    for n, p in model.named_parameters():
        w, m, v = start[n], 0, 0
        for t, g in enumerate(grads, 1):
            lr = schedule(t, 0.02, 4e-5, 3, 0.05, 0.3)
            m, v = 0.9 * m + 0.1 * g[n], 0.95 * v + 0.05 * g[n] ** 2
            w = (
                w
                - lr * (0.5 if p.ndim > 1 else 0) * w
                - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            )
        assert rms(p, w) <= 1e-5, n


def test_a_small_gradient_is_not_scaled_up(tmp_path):
    """Clipping at 1e9 and at twice the norm give the same weights."""
    a, rows = train.fit(run(tmp_path, name="a", steps=2, clip=1e9), quiet)
    b, _ = train.fit(
        run(tmp_path, name="b", steps=2, clip=2 * max(r["grad_norm"] for r in rows)), quiet
    )
    assert same(a.state_dict(), b.state_dict())


# ---- the loss


def brute(model, ids, mask):
    """Summed -log p of depth 0, 1, ..., one target at a time; each depth runs on just the positions
    that have a target.
    """
    T, sums = ids.shape[1] - 1, []
    h = model.hidden(ids[:, :-1])
    for k in range(model.mtp.depths + 1):
        if k:
            h = model.mtp(h[:, : T - k], model.backbone.embeddings(ids[:, k:T]), k)
        logp = model.lm_head(h).log_softmax(-1)
        sums.append(
            -sum(
                logp[b, t, ids[b, t + k + 1]]
                for b in range(len(ids))
                for t in range(T - k)
                if mask[b, t + k]
            )
        )
    return sums


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_losses_are_the_brute_force_sums(tmp_path, depths):
    model, ids = model_of(run(tmp_path, changes=dict(mtp_num_layers=depths))), text(3, 12)
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) < 0.7
    with torch.no_grad():
        for m in (None, mask):
            got, want = (
                train.losses(model, ids, m),
                brute(model, ids, torch.ones(3, 11) if m is None else m),
            )
            assert len(got) == depths + 1
            for g, w in zip(got, want):  # the sums themselves are fp32
                assert float(g) == pytest.approx(float(w), rel=1e-6)


def balance_by_hand(model, ids, k=3):
    """E/(k T^2) sum_e (sum_t share) count, averaged over sequences, summed over every use of a
    router; and the losses.
    """
    scores = []
    hooks = [
        m.gate.register_forward_hook(lambda _, i, out: scores.append(out))
        for m in latent_moe.layers(model)
    ]
    parts, total = train.losses(model, ids), 0
    [h.remove() for h in hooks]
    latent_moe.take_balance(model)
    for s in scores:
        for one in s.view(len(ids), -1, s.shape[-1]):  # (t, E)
            T, E = one.shape
            count = torch.bincount(one.topk(k).indices.flatten(), minlength=E)
            total = (
                total + E / (k * T * T) * ((one / one.sum(1, keepdim=True)).sum(0) * count).sum()
            )
    return total / len(ids), parts, len(scores)


@pytest.mark.parametrize("mtp_loss,balance", [(0.3, 1e-4), (0.7, 0.5), (0.0, 0.0)])
def test_the_gradient_is_the_weighted_sum_of_the_gradients_of_the_parts(
    tmp_path, mtp_loss, balance
):
    r = run(tmp_path, "ME*E", mtp_loss=mtp_loss, balance=balance)
    model, ids = model_of(r), text(4, 17)
    *nats, even = train.backward(model, batch(ids.split(4), r), r, nullcontext).tolist()
    got = gradient(model)
    model.zero_grad()
    evened, parts, uses = balance_by_hand(model, ids)
    assert uses == 4  # two layers, and the MTP block at two depths
    parts = [p / n for p, n in zip(parts, targets(r))]
    (parts[0] + mtp_loss / 2 * (parts[1] + parts[2]) + balance * evened).backward()
    assert rms(got, gradient(model)) <= 1e-6 and even == pytest.approx(evened.item(), rel=1e-6)
    assert nats == pytest.approx([p.item() for p in parts], rel=1e-6)
    if mtp_loss:  # and each of them is there
        for lacking in (
            dict(mtp_loss=0.0),
            dict(mtp_loss=2 * mtp_loss),
            dict(balance=balance + 1.0),
        ):
            model.zero_grad()
            train.backward(model, batch(ids.split(4), r), replace(r, **lacking), nullcontext)
            assert rms(gradient(model), got) > 1e-3, lacking


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float32, 1e-6), (torch.float64, 2e-7)]
)  # the sums are fp32 in both
def test_however_the_batch_is_cut_up(tmp_path, micro, dtype, tolerance):
    r = run(tmp_path, "ME*E", balance=0.1)
    model, ids, result = model_of(r, dtype), text(4, 17), {}
    for m in (4, micro):
        model.zero_grad()
        *nats, even = train.backward(model, batch(ids.split(m), r), r, nullcontext).tolist()
        result[m] = (
            gradient(model),
            torch.tensor([*nats, even]),
            torch.stack([x.load for x in latent_moe.layers(model)]),
        )
        [x.load.zero_() for x in latent_moe.layers(model)]
    for got, want in zip(result[micro], result[4]):
        assert rms(got, want) <= tolerance
    assert torch.equal(result[micro][2], result[4][2])


def test_the_bias_moves_once_a_step_by_the_load_of_the_whole_batch(tmp_path, monkeypatch):
    real, seen = latent_moe.update_bias, []

    def spy(model, rate):
        loads = [
            (m.load.clone(), m.gate.e_score_correction_bias.clone())
            for m in latent_moe.layers(model)
        ]
        notes = real(model, rate)
        for (load, before), m, uses in zip(
            loads, latent_moe.layers(model), (1, 2)
        ):  # the MTP block runs twice
            assert load.sum() == 4 * 16 * 3 * uses and m.load.sum() == 0
            want = before + 0.01 * (load.double().mean() - load).sign().float()
            torch.testing.assert_close(m.gate.e_score_correction_bias, want)
        seen.append([load for load, _ in loads])
        return notes

    monkeypatch.setattr(latent_moe, "update_bias", spy)
    biases = []
    for micro in (0, 1, 2):
        model, rows = train.fit(
            run(tmp_path, name=str(micro), micro=micro, steps=3, bias_rate=0.01), quiet
        )
        biases.append(
            torch.stack([m.gate.e_score_correction_bias for m in latent_moe.layers(model)])
        )
    assert len(seen) == 9 and biases[0].abs().max() <= 0.0301 and biases[0].any()
    assert torch.equal(biases[0], biases[1]) and torch.equal(biases[0], biases[2])
    for row, loads in zip(rows, seen[6:]):
        vio = [float(load.max() / load.double().mean() - 1) for load in loads]
        assert (row["max_vio"], row["max_vio_worst"]) == (
            pytest.approx(sum(vio) / 2),
            pytest.approx(max(vio)),
        )
        assert row["idle"] == sum(int((load == 0).sum()) for load in loads)


def test_the_first_row_of_the_log_by_hand(tmp_path):
    r = run(tmp_path, steps=1, seed=4)
    _, (row,) = train.fit(r, quiet)
    tokens = data.encode(data.tokenizer("bytes"), data.corpus("copy").train)
    ids, model = data.batch(tokens, 4, 1, 4, 17), Nemotron(configure(r, 257), 4)
    with torch.no_grad():
        evened, *_ = balance_by_hand(model, ids)
        want = [float(s) / n for s, n in zip(brute(model, ids, torch.ones(4, 16)), targets(r))]
    assert [row["train_nats"], row["mtp1_nats"], row["mtp2_nats"]] == pytest.approx(want, rel=1e-5)
    assert row["balance"] == pytest.approx(float(evened), rel=1e-5)


def test_the_seed_decides_the_weights_and_the_batches(tmp_path):
    r = run(tmp_path)
    a, b, c = (Nemotron(configure(r, 257), seed).state_dict() for seed in (0, 0, 1))
    assert same(a, b) and [k for k in a if torch.equal(a[k], c[k]) and a[k].ndim > 1] == []
    first = [
        train.fit(run(tmp_path, "-", name=str(i), seed=s, steps=1), quiet)[1][0]["train_nats"]
        for i, s in enumerate((0, 0, 1))
    ]
    assert first[0] == first[1] != first[2]


def test_micro_batches_train_the_same_model(tmp_path):
    logs = [
        [r["train_nats"] for r in train.fit(run(tmp_path, name=str(m), micro=m, steps=4), quiet)[1]]
        for m in (0, 1, 2)
    ]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5) and logs[2] == pytest.approx(
        logs[0], rel=1e-5
    )


# ---- evaluation


@pytest.mark.parametrize(
    "n,eval_tokens", [(100, 96), (100, 10_000), (97, 96), (1000, 40), (1000, 8), (17, 16)]
)
def test_evaluation_by_hand(tmp_path, n, eval_tokens):
    r = run(tmp_path, eval_tokens=eval_tokens)
    model = model_of(r, torch.float32)
    tokens = text(1, n, seed=3)[0].numpy().astype(np.uint16)
    size = torch.randint(1, 9, (257,), generator=torch.Generator().manual_seed(4))
    size[256] = 0  # <|endoftext|> stands for no text
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    got = [pretrain.evaluate(model, tokens, replace(r, micro=m), size, here()) for m in (0, 0, 1)]
    assert got[0] == got[1] and got[2] == pytest.approx(got[0], rel=1e-6)
    assert model.training and all(
        m.load.sum() == 0 and m.balance is None for m in latent_moe.layers(model)
    )
    assert same(state, model.state_dict()) and torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    nats = count = length = 0
    model.double().eval()
    windows, seen = max(1, min(n - 1, eval_tokens) // 16), []
    for w in range(windows):  # from the first token to the last, evenly
        s = math.floor(Fraction(w * (n - 17), windows - 1)) if w else 0
        window = torch.from_numpy(tokens[s : s + 17].astype(np.int64))
        with torch.no_grad():
            logp = model(window[None, :-1])[0].log_softmax(-1)
        for t in range(16):
            nats, count, length = (
                nats - float(logp[t, window[t + 1]]),
                count + 1,
                length + int(size[window[t + 1]]),
            )
            seen.append(s + t + 1)
    assert (
        len(set(seen)) == count == 16 * windows
        and min(seen) == 1
        and (windows == 1 or max(seen) == n - 1)
    )  # no target twice
    assert got[0] == pytest.approx((nats / count, nats / math.log(2) / length), rel=1e-5)


def test_the_log_holds_that_number(tmp_path):
    r = run(tmp_path, steps=2, tokenizer="bpe:300", eval_tokens=200)
    model, rows = train.fit(r, quiet)
    enc = data.unpack(checkpoint.read(r.folder())["tokenizer"])
    val = data.encode(enc, data.corpus("copy").val)
    per_id = torch.tensor([len(enc.decode_single_token_bytes(i)) for i in range(299)] + [0])
    got = pretrain.evaluate(model, val, r, per_id, here())
    assert got == (rows[-1]["val_nats"], rows[-1]["val_bpb"]) and got[0] / got[1] > 1.1 * math.log(
        2
    )  # > 1.1 bytes a token


# ---- stopping and going on


@pytest.mark.parametrize(
    "pattern,kw",
    [("ME*-", {}), ("ME*-", dict(micro=2)), ("M", dict(changes=dict(num_nextn_predict_layers=0)))],
)
def test_eight_steps_are_five_and_three(tmp_path, pattern, kw):
    whole = run(tmp_path / "a", pattern, **kw)
    train.fit(whole, quiet)
    torch.manual_seed(99)  # whatever else happened in this process
    part = run(tmp_path / "b", pattern, **kw)
    _, rows = train.fit(replace(part, stop=5), quiet)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5] and checkpoint.read(part.folder())[
        "step"
    ] == 5
    random = checkpoint.read(part.folder())["rng"]
    torch.rand(7)
    _, rows = train.fit(replace(part, resume=True), quiet)
    assert torch.equal(torch.get_rng_state(), random)
    assert [r["step"] for r in rows] == list(range(1, 9))
    assert_same_run(whole.folder(), part.folder())


def test_the_command_line_goes_on_with_the_runs_own_settings(tmp_path, capsys):
    whole = run(tmp_path / "a", "ME", lr=0.01, seed=3, batch=2)
    train.fit(whole, quiet)
    train.cli(flags(run(tmp_path / "b", "ME", lr=0.01, seed=3, batch=2, stop=5)))
    train.cli(["--out", str(tmp_path / "b"), "--resume"])
    assert_same_run(whole.folder(), tmp_path / "b" / "toy")
    assert "from step 5" in capsys.readouterr().out


def test_going_on_from_an_older_step(tmp_path):
    a = run(tmp_path)
    train.fit(a, quiet)
    last = checkpoint.read(a.folder())
    train.fit(replace(a, resume=True, from_step=4), quiet)
    assert_same_run(a.folder(), a.folder())
    again = checkpoint.read(a.folder())
    assert all(same(last[k], again[k]) for k in ("model", "optimizer", "step"))


def test_after_going_back_the_newest_checkpoint_is_the_new_one(tmp_path):
    """Else the next --resume mixes two histories, and `keep` deletes what was just written."""
    a = run(tmp_path, "M", keep=2)
    train.fit(a, quiet)  # leaves the steps 6 and 8
    train.fit(replace(a, resume=True, from_step=6, lr=0.02, save_every=1, stop=7), quiet)
    newest = checkpoint.read(a.folder())
    assert newest["step"] == 7 and newest["run"]["lr"] == 0.02


def test_flags_given_on_resume_replace_the_runs_own(tmp_path, monkeypatch):
    a, seen, real = run(tmp_path, "-", stop=2), [], train.optimiser
    train.fit(a, quiet)
    monkeypatch.setattr(train, "optimiser", lambda *args: seen.append(real(*args)) or seen[-1])
    train.fit(replace(a, resume=True, stop=0, steps=4, lr=0.5, weight_decay=0.025), quiet)
    assert disk.read_log(a.folder() / "log.csv")[2]["lr"] == pytest.approx(
        schedule(3, 0.5, 4e-5, 4, 0.05, 0.3), rel=1e-5
    )
    assert sorted(g["weight_decay"] for g in seen[0].param_groups) == [0, 0.025]


def test_a_run_that_goes_on_cannot_become_another_model(tmp_path):
    """--model and --tokenizer cannot be honoured then, so they are refused and not ignored."""
    a = run(tmp_path, "-", stop=2)
    train.fit(a, quiet)
    for other in (
        replace(a, model=a.model + ",intermediate_size=32"),
        replace(a, tokenizer="bpe:300"),
    ):
        with pytest.raises(ValueError):
            train.fit(replace(other, resume=True, stop=0), quiet)


def test_a_kill_between_any_two_files_loses_no_step_and_no_row(tmp_path, monkeypatch):
    whole, real = run(tmp_path, "-", name="whole", steps=4), disk.write
    train.fit(whole, quiet)
    for n in range(1, 7):
        a, left = replace(whole, name=str(n)), [n]

        def write(path, save):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(path, save)

        monkeypatch.setattr(disk, "write", write)
        with pytest.raises(KeyboardInterrupt):
            train.fit(a, quiet)
        monkeypatch.setattr(disk, "write", real)
        if checkpoint.steps(a.folder()):
            train.fit(replace(a, resume=True), quiet)
            assert_same_run(whole.folder(), a.folder())
        else:
            assert n < 4  # config.json, and what belongs to the first checkpoint


# ---- what goes wrong


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    real, steps = latent_moe.update_bias, []

    def poison(model, rate):
        notes = real(model, rate)
        steps.append(0)
        if len(steps) % 8 == 5:  # after step 5, so that step 6 sees it
            model.backbone.norm_f.weight.data[0] = math.nan
        return notes

    monkeypatch.setattr(latent_moe, "update_bias", poison)
    a = run(tmp_path, name="a")
    with pytest.raises(FloatingPointError, match=r"step 6: .*not taken.*step-00000004\.pt"):
        train.fit(a, quiet)
    saved = checkpoint.read(a.folder())
    assert saved["step"] == 4 and all(v.isfinite().all() for v in saved["model"].values())
    steps.clear()
    with pytest.raises(SystemExit) as e:
        train.cli(flags(replace(a, name="b")))
    err = capsys.readouterr().err
    assert (
        e.value.code == 1
        and "step 6" in err
        and "step-00000004.pt" in err
        and "Traceback" not in err
    )
    monkeypatch.setattr(
        latent_moe, "update_bias", real
    )  # and from there it goes on as if nothing had been
    train.fit(replace(a, resume=True), quiet)
    train.fit(replace(a, name="c"), quiet)
    assert_same_run(a.folder(), tmp_path / "c")


def test_nan_before_any_checkpoint_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match="No checkpoint"):
        train.fit(run(tmp_path, "-", lr=1e30, lr_min=1e30, warmup=0.0, save_every=100), quiet)


def refuses(argv, capsys, code=2):
    with pytest.raises(SystemExit) as e:
        train.cli([str(a) for a in argv])
    err = capsys.readouterr().err
    assert e.value.code == code and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "argv,message",
    [
        (
            ["--step", "3"],
            "unrecognized arguments: --step",
        ),  # neither a typo nor an abbreviation passes
        (["--steps", "many"], "'many' is not an integer from 1"),
        (
            ["--preset", "huge"],
            "'huge' is not one of 'toy', 'tiny-nv', 'small'",
        ),
        (
            ["--model", "hybrid_override_pattern=MQE"],
            "may only hold the letters M, E, * and -, not Q",
        ),
        (["--model", "vocab_size=100"], "vocab_size=100 is smaller than the tokenizer's 257"),
        (["--model", "nope=3"], "there is no field 'nope'"),
        (["--model", "hidden_size=big"], "hidden_size: 'big' is not an integer from 1 to 262,144"),
        (["--model", "mamba_num_heads=5"], "mamba_num_heads=5 is not a multiple of n_groups=2"),
        (
            ["--length", "50000"],
            "the validation split has 49999 tokens, fewer than one sequence of 50000",
        ),
        (["--micro", "3"], "--batch 8 is not a multiple of --micro 3"),
        (["--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda', 'mps'"),
        (["--precision", "fp8"], "'fp8' is not spelled as auto|fp32|bf16|"),
        (["--warmup", "2"], "2.0 is not a number from 0 to 1"),
        (["--warmup", "0.8"], "--warmup 0.8 and --decay 0.3 are shares of the same steps"),
        (["--steps", "0"], "argument --steps: 0 is not an integer from 1"),
        (["--data", "nowhere"], "'nowhere' is no file"),
        (["--tokenizer", "words"], "tokenizer 'words' is not bytes, bpe:N, nemotron or a file"),
        (["--resume"], "holds no run"),
        (["--merge", "2"], "holds no run"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, capsys, argv, message):
    err = refuses(["--out", tmp_path, "--data", "copy", "--tokenizer", "bytes", *argv], capsys)
    assert message in err and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(tmp_path, capsys):
    assert re.search(
        "--device cuda: this PyTorch .* finds (cpu|mps) only",
        refuses(["--out", tmp_path, "--device", "cuda"], capsys),
    )


@pytest.mark.parametrize(
    "kw",
    [
        dict(eval_every=0),
        dict(log_every=0),
        dict(save_every=0),
        dict(batch=0),
        dict(micro=-1),
        dict(length=2),
        dict(seed=-1),
        dict(threads=-1),
        dict(keep=-1),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused_by_name(tmp_path, kw):
    """A sequence of 2 tokens has no target at MTP depth 2."""
    with pytest.raises(ValueError, match="|".join(k.replace("_", ".") for k in kw)):
        train.fit(run(tmp_path, **kw), quiet)
    assert list(tmp_path.iterdir()) == []


def test_what_an_existing_run_refuses(tmp_path, capsys):
    a = run(tmp_path, "-", steps=4)
    train.fit(a, quiet)
    before = everything(tmp_path)
    assert "already holds a run: --resume goes on with it" in refuses(flags(a), capsys)
    assert "this is not the text the run was trained on" in refuses(
        ["--out", tmp_path, "--resume", "--data", "recall"], capsys
    )
    assert "--merge 3: " in refuses(["--out", tmp_path, "--merge", "3"], capsys)
    assert "there are the steps 2, 4" in refuses(
        ["--out", tmp_path, "--resume", "--from-step", "3"], capsys
    )
    assert "holds no run" in refuses(["--out", tmp_path, "--resume", "--name", "other"], capsys)
    assert everything(tmp_path) == before


# ---- the command line


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as e:
        train.cli(["-h"])
    text = re.sub(r"\s+", "", capsys.readouterr().out)  # argparse wraps and breaks at hyphens
    assert e.value.code == 0
    for f in fields(train.Run):
        default = getattr(train.Run, f.name)
        assert (
            "--" + f.name.replace("_", "-") in text
            and re.sub(r"\s+", "", f.metadata["help"]) in text
        )
        assert (
            isinstance(default, bool)
            or default == ""
            or f"(default:{default})".replace(" ", "") in text
        ), f.name


def caught(monkeypatch, argv):
    runs = []
    monkeypatch.setattr(train, "fit", lambda run, say: runs.append(run))
    train.cli(argv)
    return runs[0]


def test_a_flag_is_a_field(tmp_path, monkeypatch):
    r = run(tmp_path, micro=2, lr=0.5, name="n", clip=2.0)
    assert caught(monkeypatch, flags(r)) == r and caught(monkeypatch, []) == train.Run()


def test_presets_bring_their_recipe_and_flags_come_first(monkeypatch):
    names = {f.name: type(getattr(train.Run, f.name)) for f in fields(train.Run)}
    for preset, recipe in RECIPES.items():
        assert all(type(v) is names[k] for k, v in recipe.items())
        assert configure(train.Run(preset=preset, tokenizer="bytes"), 257).hybrid_override_pattern
        r = caught(monkeypatch, ["--preset", preset, "--batch", "96"])
        assert asdict(r) == {**asdict(train.Run()), **recipe, "preset": preset, "batch": 96}
        assert not r.batch % (r.micro or r.batch) and r.eval_tokens > r.length


def test_the_super_recipe_is_the_reports():
    r = train.Run(preset="super", **RECIPES["super"])
    tokens = r.steps * r.batch * r.length
    assert (r.length, r.batch, r.lr, r.lr_min) == (8192, 3072, 4.5e-4, 4.5e-6)
    assert tokens == pytest.approx(25e12, rel=1e-5) and r.decay * tokens == pytest.approx(
        5e12, rel=1e-3
    )
    assert r.warmup * tokens == pytest.approx(
        200e9, rel=1e-3
    ) and r.decay * r.steps == pytest.approx(198_682, rel=1e-3)
    assert r.warmup * r.steps == pytest.approx(7949, rel=1e-3) and r.save_every == 1000
    assert (r.weight_decay, r.clip, r.mtp_loss, r.balance, r.bias_rate) == (
        0.1,
        1.0,
        0.3,
        1e-4,
        1e-3,
    )
    assert (r.precision, r.tokenizer) == ("bf16", "nemotron") and configure(
        replace(r, model=""), 131_072
    ) == Config()


@pytest.mark.parametrize(
    "change,value",
    [
        ("moe_latent_size=None", None),
        ("moe_latent_size=12", 12),
        ("use_conv_bias=0", False),
        ("initializer_range=1e-3", 1e-3),
        ("hybrid_override_pattern=*-", "*-"),
    ],
)
def test_changes_to_a_preset_have_the_fields_type(change, value):
    config = configure(train.Run(model=change), 257)
    got = getattr(config, change.split("=")[0])
    assert got == value and type(got) is type(value)
    assert config == replace(Config.preset("toy"), vocab_size=257, **{change.split("=")[0]: value})


# ---- what a run leaves


def test_what_a_run_leaves(tmp_path):
    how = dict(steps=4, prompt="ab", log_every=2, eval_every=4, worth=True)
    a, said = run(tmp_path, name="x", **how), []
    model, rows = train.fit(a, said.append)
    folder = tmp_path / "x"
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "config.json",
        "load.json",
        "log.csv",
        "step-00000002.pt",
        "step-00000004.pt",
        "worth.csv",
    ]
    assert (folder / "log.csv").read_text().splitlines()[0].split(",") == COLUMNS
    log = disk.read_log(folder / "log.csv")
    assert [r["step"] for r in log] == [1, 2, 4] and [r["tokens"] for r in log] == [64, 128, 256]
    assert [r["val_nats"] == "" for r in log] == [True, True, False]
    for read, made in zip(log, rows):
        assert read == {
            k: v if isinstance(v, (int, str)) else pytest.approx(v, rel=1e-5)
            for k, v in made.items()
        }

    about, corpus = json.loads((folder / "config.json").read_text()), data.corpus("copy")
    whole = (corpus.train + corpus.val).encode()
    assert about["run"] == asdict(a) and about["config"] == asdict(model.config)
    assert about["corpus"] == dict(
        name="copy",
        bytes=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
        floor=synthetic.entropy_floor("copy"),
    )
    assert about["versions"]["torch"] == torch.__version__ and about["hardware"]["threads"] == 1
    assert len(about["sources_sha256"]) == 64 and "git" in about

    load = json.loads((folder / "load.json").read_text())
    assert load["layers"] == ["layer 1", "MTP 1"]
    assert [sum(row) for row in load["tokens"]] == [
        2 * 4 * 16 * 3,
        2 * 2 * 4 * 16 * 3,
    ]  # of the last interval

    story = "\n".join(said)
    for word in (
        "device ",
        "numbers ",
        "data ",
        "model ",
        "paths ",
        "run ",
        "step     4/4",
        "validation",
        "sample ",
    ):
        assert word in story
    assert (
        str(folder) in story
        and corpus.sha256[:12] in story
        and "F.scaled_dot_product_attention" in story
    )
    assert re.search(r"step     1/4 .* loss .* mtp1 .* mtp2 .* tok/s", story)


def test_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "run", draw)
    for name, pattern, kw in (
        ("a", "ME", {}),
        ("b", "-", dict(changes=dict(mtp_hybrid_override_pattern="-"))),
    ):
        train.fit(run(tmp_path, pattern, name=name, steps=3, **kw), quiet)
        raw = (tmp_path / name / "loss.png").read_bytes()
        wide, high = struct.unpack(">II", raw[16:24])
        assert raw[:8] == b"\x89PNG\r\n\x1a\n" and wide > 1200 and high > 400 and len(raw) > 10_000


def test_a_notebook_can_call_it(tmp_path, capsys):
    model, log = train.fit(run(tmp_path, "M", steps=2), say=quiet)
    assert (
        isinstance(model, Nemotron)
        and [r["step"] for r in log] == [1, 2]
        and list(log[0]) == COLUMNS
    )
    assert capsys.readouterr() == ("", "") and model(text(1, 5)).shape == (1, 5, 257)


@pytest.mark.parametrize("pattern", ["*-*-", "M", "-", "E"])
@pytest.mark.parametrize("mtp", ["*E", "-", None])
def test_every_pattern_trains(tmp_path, pattern, mtp):
    changes = dict(mtp_hybrid_override_pattern=mtp) if mtp else dict(num_nextn_predict_layers=0)
    model, rows = train.fit(run(tmp_path, pattern, changes=changes, steps=2, prompt="a"), quiet)
    assert (model.mtp is None) == (mtp is None) and ("mtp2_nats" in rows[0]) == (mtp is not None)
    assert rows[1]["train_nats"] < rows[0]["train_nats"] and all(
        math.isfinite(r["grad_norm"]) for r in rows
    )


def test_loss_falls(tmp_path):
    """The copy task is 16 letters and then the same again: log 257 = 5.5 nats at first, log 16 =
    2.8 for knowing the letters.
    """
    r = run(
        tmp_path,
        "ME*",
        dict(hidden_size=32, initializer_range=0.04),
        steps=60,
        batch=8,
        length=32,
        log_every=20,
        eval_every=60,
        save_every=60,
        lr=0.01,
    )
    _, rows = train.fit(r, quiet)
    assert rows[0]["train_nats"] == pytest.approx(math.log(257), abs=0.1)
    assert rows[-1]["train_nats"] < 3.1 and rows[-1]["val_nats"] < 3.1
    assert rows[-1]["val_bpb"] == pytest.approx(
        rows[-1]["val_nats"] / math.log(2), rel=1e-6
    )  # a byte a token


def test_a_narrow_run_is_autocast_and_keeps_fp32_parameters(tmp_path):
    logs = {}
    for precision in ("fp32", "bf16", "fp16"):
        said = []
        model, logs[precision] = train.fit(
            run(tmp_path, name=precision, steps=4, precision=precision), said.append
        )
        assert any(
            line.startswith("numbers") and precision in line and "as asked" in line for line in said
        )
        saved = checkpoint.read(tmp_path / precision)
        kept = [
            *saved["model"].values(),
            *(v for s in saved["optimizer"]["state"].values() for v in s.values()),
        ]
        assert {v.dtype for v in kept} == {torch.float32}
    exact, *rough = ([r["val_nats"] for r in logs[p]] for p in logs)
    for nats, rel in zip(rough, (1e-2, 1e-3)):
        assert exact != nats and nats == pytest.approx(exact, rel=rel)


def test_a_loss_in_fp16_is_scaled_and_its_gradient_is_not(tmp_path):
    """Without the scale many small gradients are 0; with it they are those of fp32."""
    r = run(tmp_path, precision="fp16")
    ids = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = data.Batch([(ids,)], mtp.counts(torch.ones(4, 32, dtype=torch.bool), 2), 4, 128)
    grads = {}
    for scale, precision in ((1.0, "fp32"), (1.0, "fp16"), (None, "fp16")):
        world = Alone()
        world.settle(replace(r, precision=precision), lambda line: None)
        world.scale = scale or world.scale
        model = Nemotron(Config(**{**SMALL, "vocab_size": 300}, hybrid_override_pattern="ME*E"))
        model.backbone.norm_f.weight.requires_grad_(False)  # has no gradient to divide
        train.gradient(model, batch, r, world)
        made = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        grads[scale, precision] = torch.cat(made)
    exact, plain, scaled = grads.values()
    lost = lambda g: int(((g == 0) & (exact != 0)).sum())
    far = lambda g: float((g - exact).norm() / exact.norm())
    assert lost(scaled) * 10 < lost(plain) and far(scaled) < 0.01, (lost(plain), lost(scaled))


# ---- merging


def test_merging_by_hand(tmp_path, capsys):
    a = run(tmp_path, keep=0, decay=0.0)
    train.fit(a, quiet)  # leaves the steps 2, 4, 6, 8
    before, said = everything(a.folder()), []
    model, results = train.merge(replace(a, merge=3), said.append)
    w = [
        1,
        1 - math.sqrt(1 / 3),
        1 - math.sqrt(2 / 3),
        0,
    ]  # of the updates: the falling learning rate
    c = [w[0] - w[1], w[1] - w[2], w[2] - w[3]]
    states = [checkpoint.read(a.folder(), step)["model"] for step in (4, 6, 8)]
    for k, got in model.state_dict().items():
        want = sum(x * s[k].double() for x, s in zip(c, states))
        assert rms(got, want) <= 1e-6 and got.dtype == torch.float32, k
    assert [name for name, *_ in results] == ["step 4", "step 6", "step 8", "merged"]
    assert [weight for _, weight, *_ in results[:3]] == pytest.approx(c) and len(
        {nats for *_, nats, _ in results}
    ) == 4
    log = {r["step"]: r["val_nats"] for r in disk.read_log(a.folder() / "log.csv")}
    assert [nats for *_, nats, _ in results[:3]] == pytest.approx(
        [log[s] for s in (4, 6, 8)], rel=1e-5
    )
    after = everything(a.folder())
    (new,) = set(after) - set(before)
    assert all(after[k] == v for k, v in before.items()) and len(checkpoint.steps(a.folder())) == 4
    merged, enc, step = sample.load_run(a.folder() / new)
    assert (
        same(merged.state_dict(), model.state_dict())
        and step == 8
        and enc.name == "bytes"
        and not merged.training
    )
    assert (
        sample.load_run(a.folder())[0]
        .state_dict()["lm_head.weight"]
        .equal(states[-1]["lm_head.weight"])
    )
    train.cli(["--out", str(tmp_path), "--merge", "1"])  # one checkpoint is its own average
    assert "weight 1.000" in capsys.readouterr().out


# ---- the control


def test_this_file_can_fail(tmp_path):
    assert (
        abs(schedule(60, 1, 0.01, 100, 0.1, 0.4) - schedule(61, 1, 0.01, 100, 0.1, 0.4)) > 1e-2
    )  # one step late
    r = run(tmp_path)
    model, ids = model_of(r), text(3, 12)
    with torch.no_grad():
        whole, cut = (
            brute(model, ids, torch.ones(3, 11)),
            brute(model, ids[:, 1:], torch.ones(3, 10)),
        )
        assert all(abs(float(a) - float(b)) > 1e-2 * float(a) for a, b in zip(whole, cut))
    train.backward(model, data.Batch([(ids,)], [33, 30, 27], r.batch, 36), r, nullcontext)
    right = gradient(model)
    for weights in (
        (1, 0.3, 0.3),
        (1, 0.15, 0),
        (1, 0, 0),
    ):  # not divided by K, a depth missing, none
        model.zero_grad()
        sum(
            w * s / n for w, s, n in zip(weights, train.losses(model, ids), (33, 30, 27))
        ).backward()
        assert rms(gradient(model), right) > 1e-2
    assert not same(dict(a=[torch.zeros(2)]), dict(a=[torch.full((2,), 1e-30)]))


# Cards that are not here: torch is told what it would say of them


def card(monkeypatch, capability, arches=("sm_75", "sm_80", "sm_90"), bf16=True):
    says = dict(
        is_available=lambda: True,
        get_device_capability=lambda *a: capability,
        get_arch_list=lambda: list(arches),
        is_bf16_supported=lambda including_emulation=True: bf16 or including_emulation,
    )
    for name, answer in says.items():
        monkeypatch.setattr(torch.cuda, name, answer)


@pytest.mark.parametrize(
    "capability, more, words",
    [
        ((7, 5), dict(fast=True), "--fast needs a GPU of compute capability 8.0 or later, not 7.5"),
        ((6, 1), {}, "built for sm_75, sm_80, sm_90, and the GPU has compute capability 6.1"),
    ],
)
def test_what_a_card_cannot_do_is_refused(monkeypatch, capability, more, words):
    card(monkeypatch, capability)
    with pytest.raises(ValueError, match=re.escape(words)):
        choose_device(train.Run(device="cuda", **more), quiet)
    card(monkeypatch, (8, 0))
    choose_device(train.Run(device="cuda", **more), quiet)


@pytest.mark.parametrize("gigabytes, micro", [(80, 16), (40, 8), (24, 4), (8, 1)])
def test_as_many_sequences_at_once_as_the_card_holds(monkeypatch, gigabytes, micro):
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: properties)
    said, cuda = [], torch.device("cuda")
    small = train.complete(dict(preset="small"))
    assert room.sized(small, cuda, say=said.append) == replace(small, micro=micro)
    assert f"--micro {micro}: all 128 sequences at once" in said[0]
    assert room.sized(replace(small, micro=2), cuda) == replace(small, micro=2)  # as asked
    assert room.sized(train.Run(), cuda) == train.Run()  # all of it fits
    assert room.needs(small, Config.preset("small"), 4, 1, False) > 1.3 * room.needs(
        small, Config.preset("small"), 4, 1, True
    )


def test_emulated_bf16_is_not_chosen_and_fp32_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for bf16, want in ((False, "numbers    fp32"), (True, "numbers    bf16")):
        card(monkeypatch, (7, 5), bf16=bf16)
        said = []
        choose_device(train.Run(device="cuda"), said.append)
        assert want in "\n".join(said) and not torch.backends.cudnn.allow_tf32


def test_a_mac_is_told_what_it_cannot_round(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for precision in ("nvfp4", "mxfp4-2d", "mxfp8"):
        with pytest.raises(ValueError, match=f"--precision {precision}: Apple's MPS has no float8"):
            choose_device(train.Run(device="mps", precision=precision), quiet)
    for precision in ("auto", "fp32", "bf16"):
        choose_device(train.Run(device="mps", precision=precision), quiet)
