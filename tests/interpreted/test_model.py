"""The whole model with fast=True: trained, prefilled in chunks, ragged, and sampled, it is the
readable model.
"""

import copy

import pytest
import torch
from conftest import rms

import train
from mamba import Mamba2
from model import Config, Nemotron, set_paths
from post.pack import Docs


def models():
    """Two Mamba layers around attention, 4 heads in 2 groups; the same weights with and without
    kernels.
    """
    c = Config(
        **{
            **vars(Config.preset("toy")),
            "hybrid_override_pattern": "M*M",
            "vocab_size": 64,
            "mamba_num_heads": 4,
            "num_nextn_predict_layers": 0,
        }
    )
    plain = Nemotron(c, seed=0)
    fast = copy.deepcopy(plain)
    table = set_paths(fast, True)
    assert all(f"kernels/{k}.py" in "\n".join(table) for k in ("ssd", "conv", "norm"))
    return plain, fast


def ids(b, t, seed=0):
    return torch.randint(64, (b, t), generator=torch.Generator().manual_seed(seed))


def test_training_is_the_same():
    plain, fast = models()
    out = []
    for m in (plain, fast):
        logits = m(ids(1, 37))
        torch.nn.functional.cross_entropy(logits[0, :-1], ids(1, 37)[0, 1:]).backward()
        out.append((logits, {n: p.grad for n, p in m.named_parameters()}))
    assert rms(out[1][0], out[0][0]) < 1e-5
    worst = {n: rms(out[1][1][n], g) for n, g in out[0][1].items()}
    assert max(worst.values()) < 1e-4, worst  # A_log and dt_bias are small sums of large numbers


def test_documents_in_one_row_are_the_same():
    """post/pack.py, whose boundaries no kernel knows of; losses with weights, MTP on."""
    c = {**vars(Config.preset("toy")), "hybrid_override_pattern": "M*E", "vocab_size": 64}
    plain = Nemotron(Config(**{**c, "mamba_num_heads": 4}), seed=0)
    fast = copy.deepcopy(plain)
    set_paths(fast, True)
    number = torch.tensor([[0, 1, 1] + [2] * 8 + [3] * 5])
    weight = torch.rand(1, 15, generator=torch.Generator().manual_seed(2))
    out = []
    for m in (plain, fast):
        parts = train.losses(m, ids(1, 16), weight, docs=Docs(number))
        sum(parts).backward()
        out.append((torch.stack(parts), {n: p.grad for n, p in m.named_parameters()}))
    assert rms(out[1][0], out[0][0]) < 1e-5
    worst = {n: rms(out[1][1][n], g) for n, g in out[0][1].items() if g is not None}
    assert max(worst.values()) < 2e-4, worst
    assert rms(torch.stack(train.losses(plain, ids(1, 16), weight)), out[0][0]) > 1e-2


def test_prefill_in_chunks_ragged_and_sampling_are_the_same():
    plain, fast = models()
    text, count = ids(2, 30), torch.tensor([21, 18])
    with torch.no_grad():
        out = []
        for m in (plain, fast):
            cache = m.new_cache(2)
            pieces = [
                m(text[:, :5], cache),
                m(text[:, 5:26], cache, count),
                m(text[:, 26:27], cache),
                m(text[:, 27:], cache),
            ]
            out.append(torch.cat([pieces[0], pieces[1][:, :18], *pieces[2:]], 1))
    assert rms(out[1], out[0]) < 1e-5


def test_a_cached_call_with_a_gradient_says_that_there_is_none():
    mixer = Mamba2(32, 4, 16, 2, 16)
    mixer.fast = mixer.norm.fast = True
    cache = Nemotron(
        Config(**{**vars(Config.preset("toy")), "hybrid_override_pattern": "M", "vocab_size": 8})
    ).new_cache(1)
    with pytest.raises(ValueError, match="has no gradient"):
        mixer(torch.randn(1, 3, 32), cache.layers[0])


def test_this_file_can_fail():
    plain, fast = models()
    with torch.no_grad():
        fast.backbone.layers[0].mixer.norm.groups = 1  # fast reads it: another norm
        assert rms(fast(ids(1, 20)), plain(ids(1, 20))) > 1e-3
