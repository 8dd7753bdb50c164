"""Shapes, dtypes and edge values of the younger public functions: what is possible gives finite
numbers of the promised shape, everything else one ValueError.

mtp, checkpoint, scale/shards, heal, scale/budget, data, and the operands of mamba's scans.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import TINY

import checkpoint
import data
import disk
import heal
import latent_moe
import mamba
import mtp
import nvfp4
from config import Config
from model import Nemotron
from post import groups
from quant import autoquant
from scale import budget, shards

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
SMALL, ODD = st.integers(1, 5), st.integers(-2, 7)
ONCE = settings(max_examples=40, deadline=None)
MODEL = Nemotron(Config(**TINY)).eval()


def taken(call):
    """What a call gives, or None if it refuses."""
    try:
        return call()
    except ValueError:
        return None


@ONCE
@given(SMALL, st.integers(0, 5), SMALL, DTYPES, st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_mtp_nll(b, t, v, dtype, share, spoiled):
    """Finite of finite logits; 0 where no target counts; NaN only of NaN."""
    logits, mask = torch.randn(b, t, v).to(dtype), torch.rand(b, t) < share
    if spoiled and t:
        logits[0, 0, 0] = math.nan
    nats = mtp.nll(logits, torch.zeros(b, t, dtype=torch.long), mask)
    assert nats.dtype is torch.promote_types(dtype, torch.float32)
    assert bool(nats.isfinite()) != (spoiled and t > 0)
    assert spoiled or mask.any() or nats == 0


@ONCE
@given(SMALL, SMALL, ODD)
def test_mtp_roll_and_counts(b, t, depths):
    """Each depth loses the last target that the one before had; there is no negative depth."""
    found = taken(lambda: mtp.counts(torch.ones(b, t), depths))
    expected = [b * max(0, t - k) for k in range(depths + 1)]
    assert found == (None if depths < 0 else expected)
    x = torch.arange(b * t).view(b, t) + 1
    assert torch.equal(mtp.roll(x)[:, :-1], x[:, 1:]) and not mtp.roll(x)[:, -1].any()


@ONCE
@given(SMALL, SMALL, DTYPES)
def test_mtp_loss_has_one_finite_sum_a_depth(b, t, dtype):
    ids = torch.randint(TINY["vocab_size"], (b, t))
    h, mask = torch.randn(b, t, TINY["hidden_size"]), torch.ones(b, t).to(dtype)
    with torch.no_grad():
        sums = mtp.loss(MODEL.mtp, h, ids, mask, MODEL.backbone.embeddings, MODEL.lm_head)
    assert len(sums) == MODEL.mtp.depths and all(s.isfinite() for s in sums)
    assert all(s == 0 for k, s in enumerate(sums, 1) if k >= t)


@ONCE
@given(st.lists(st.integers(0, 4), max_size=3), DTYPES, st.integers(0, 3), st.integers(1, 9))
def test_checkpoints_of_any_shape_come_back(shape, dtype, keep, steps):
    """Zero-dimensional and empty tensors too; `keep` of them stay; NaN is not written."""
    with TemporaryDirectory() as d:
        folder = Path(d)
        for step in range(1, steps + 1):
            w = torch.randn(shape).to(dtype)
            checkpoint.save(folder, step, dict(step=step, model=dict(w=w)), keep)
        kept = [checkpoint.number(p) for p in checkpoint.steps(folder)]
        assert kept == list(range(1, steps + 1))[-keep if keep else 0 :]
        assert torch.equal(checkpoint.read(folder)["model"]["w"], w)
        if w.numel():
            with pytest.raises(FloatingPointError):
                checkpoint.save(folder, steps + 1, dict(model=dict(w=w * math.nan)), keep)
        assert taken(lambda: checkpoint.read(folder, steps + 1)) is None


CELL = st.one_of(st.integers(-(10**12), 10**12), st.floats(-1e30, 1e30), st.just(""))


@ONCE
@given(st.lists(st.dictionaries(st.sampled_from("abcd"), CELL, min_size=1), max_size=5))
def test_a_log_comes_back(rows):
    with TemporaryDirectory() as d:
        path = Path(d) / "log.csv"
        disk.write_log(path, rows)
        back = disk.read_log(path)
    assert len(back) == len(rows) or all(set(r.values()) == {""} for r in rows)
    for row, other in zip(rows, back) if len(back) == len(rows) else ():
        for k, v in row.items():
            assert other[k] == (v if v == "" else pytest.approx(v, rel=1e-5))


@ONCE
@given(st.sets(st.integers(1, 30), max_size=4), st.sets(st.integers(1, 30)), st.integers(0, 31))
def test_the_newest_whole_checkpoint_of_many_ranks(done, begun, asked):
    """Only a folder with a .metadata counts, and a step that is not there is refused."""
    with TemporaryDirectory() as d:
        for step in done | begun:
            (Path(d) / f"ckpt/step-{step:08d}").mkdir(parents=True)
        for step in done:
            (Path(d) / f"ckpt/step-{step:08d}/.metadata").touch()
        found = taken(lambda: shards.newest(Path(d), asked))
    if asked and asked not in done or not done:
        assert found is None
    else:
        assert checkpoint.number(found) == (asked or max(done))


@ONCE
@given(st.integers(0, 60), ODD, ODD, st.integers(0, 2**32))
def test_heals_prompts(count, n, length, seed):
    """n windows of the text, whatever the seed, or a refusal."""
    tokens = np.arange(count, dtype=np.uint16)
    rows = taken(lambda: heal.prompts(tokens, n, length, seed))
    if n < 1 or length < 1 or count < length + n:
        assert rows is None
    else:
        assert rows.shape == (n, length) and bool((rows.diff(dim=1) == 1).all())


def test_texts_too_short_for_the_block_are_refused():
    """They left a depth without a token: its loss was NaN, and nothing said so."""
    model = Nemotron(Config(**TINY))
    ids = torch.zeros(2, model.mtp.depths, dtype=torch.long)
    with pytest.raises(ValueError, match=f"texts of {model.mtp.depths} tokens leave nothing"):
        next(heal.heal(model, ids, 1, batch=2))


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 3), st.integers(4, 9), st.integers(1, 3))
def test_healing_moves_the_block_alone(n, t, steps):
    model = Nemotron(Config(**TINY))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(TINY["vocab_size"], (n, t))
    for step in heal.heal(model, ids, steps, batch=2):
        assert all(map(math.isfinite, step.nats)) and min(step.excess) > -1e-4
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith("mtp.") for k in moved)


@ONCE
@given(
    st.integers(-2, 64),
    st.integers(-1, 9),
    st.integers(-2, 4096),
    st.sampled_from(["", "all", "mamba,logits"]),
)
def test_a_budget_is_positive_or_refused(world, ep, length, again):
    plan = budget.Plan(world, ep, length, again)
    found = taken(lambda: budget.reckon(plan, Config.preset("toy")))
    if min(world, ep, length) < 1 or world % ep:
        assert found is None
    else:
        numbers = {k: v for k, v in found.items() if k != "parts"} | found["parts"]
        assert all(math.isfinite(v) and v >= 0 for v in numbers.values())
        assert found["peak"] >= found["states"] > 0 and found["flops"] > 0


@ONCE
@given(st.integers(0, 40), ODD, ODD, ODD, ODD)
def test_batches_and_windows(count, size, length, rank, unit):
    tokens = np.arange(count, dtype=np.uint16)
    rows = taken(lambda: data.batch(tokens, 0, 1, size, length, rank, max(1, size), unit))
    possible = min(size, length, unit) >= 1 and 0 <= rank < size and length <= count
    assert (rows is not None) == possible
    assert rows is None or rows.shape == (1, length) and not (rows[:, 0] % unit).any()
    held = taken(lambda: data.windows(tokens, 20, length, unit))
    assert (held is not None) == (min(length, unit) >= 1 and count > length)
    assert held is None or held.shape[1] == length + 1


FORMS = mamba.ssd_recurrent, mamba.ssd_masked, mamba.ssd_chunked


@ONCE
@given(
    st.sampled_from(FORMS), st.integers(0, 4), st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 9])
)
def test_no_operand_of_a_scan_is_stretched(form, operand, axis, size):
    """Another size of any operand's axis is refused: torch would broadcast a size of 1."""
    b, t, h, p, g, n = 1, 6, 4, 3, 2, 5
    shapes = [[b, t, h, p], [b, t, h], [h], [b, t, g, n], [b, t, g, n]]
    shape = shapes[operand]
    whole = shape[axis % len(shape)]
    shape[axis % len(shape)] = size
    lone = operand == 0 and axis == 3  # p stands in x alone
    args = [-torch.rand(s) if i == 2 else torch.rand(s) for i, s in enumerate(shapes)]
    found = taken(lambda: form(*args))
    assert (found is not None) == (size == whole or lone)


@pytest.mark.parametrize("form", [mamba.ssd_recurrent, mamba.ssd_chunked])
def test_a_state_of_other_rows_is_refused(form):
    args = [torch.rand(2, 3, 4, 3), torch.rand(2, 3, 4), -torch.rand(4)]
    args += [torch.rand(2, 3, 2, 5)] * 2
    for shape in ((1, 4, 3, 5), (2, 4, 3, 1), (2, 1, 3, 5), (4, 3, 5)):
        with pytest.raises(ValueError, match="state is"):
            form(*args, state=torch.zeros(shape))
    with pytest.raises(ValueError, match="chunk=0"):
        mamba.ssd_chunked(*args, chunk=0)


@pytest.mark.parametrize("count", [[3, 6], [-1, 2], [1], [1, 1, 1], [1.5, 2.0], 3])
def test_a_count_that_the_rows_have_not_is_refused(count):
    ids = torch.zeros(2, 5, dtype=torch.long)
    MODEL(ids, MODEL.new_cache(2), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="count"):
        MODEL(ids, MODEL.new_cache(2), torch.tensor(count))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_only_numbers_are_rounded(dtype):
    x = torch.zeros(16, 32).to(dtype)
    for way in (nvfp4.quantize, nvfp4.export_weight, nvfp4.export_fp8):
        with pytest.raises(ValueError):
            way(x)
    for odd in ((1, 0), (1, 5), (3, 32)):
        with pytest.raises(ValueError):
            nvfp4.mx(torch.zeros(16, 32), odd, "mxfp4")
    with pytest.raises(ValueError, match="mxfp5"):
        nvfp4.mx(torch.zeros(16, 32), (1, 32), "mxfp5")


def test_what_is_not_finite_decides_nothing():
    for x in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            groups.advantages(torch.tensor([[x, 1.0]]))
        with pytest.raises(ValueError, match="finite"):
            autoquant.assign({"a": {"NVFP4": x, None: 0.0}}, {"a": 16}, 4.5)
    for k in (0, -1, 9):
        with pytest.raises(ValueError, match="experts"):
            latent_moe.sequence_balance(torch.rand(1, 3, 8), k)


def test_this_file_can_fail(monkeypatch):
    monkeypatch.setattr(mamba, "agree", lambda *args: None)
    with pytest.raises(AssertionError):
        test_no_operand_of_a_scan_is_stretched.hypothesis.inner_test(mamba.ssd_masked, 4, 2, 1)
