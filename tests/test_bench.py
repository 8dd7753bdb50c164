"""bench.py without a GPU: its floors by hand, what it says where it cannot measure, and a model's
speed.
"""

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import bench
from config import Config
from model import Nemotron
from quant import packed
from speed import clock, lowmemory, replies, rows, step

FLOORS = {(name, shape): (nbytes, flops) for name, shape, nbytes, flops in rows.floors()}


def test_floors_by_hand():
    t, x, bc = 8192, 2 * 8192 * 8192, 2 * 8192 * 1024
    assert FLOORS["ssd forward", "t 8192"] == (
        2 * x + 2 * bc + 4 * t * 128,
        2 * t * 128 * (1024 + 8192) + 4 * t * 8192 * 128,
    )
    assert FLOORS["conv forward", "t 8192"][0] == 2 * 2 * t * 10240
    assert FLOORS["norm forward", "t 8192"][0] == 3 * x
    nbytes, flops = FLOORS["experts forward", "t 1"]
    assert (
        nbytes == pytest.approx(22 * 2 * 2 * 1024 * 2688 + 2 * 2 * 1024)
        and flops == 22 * 2 * 2 * 1024 * 2688
    )
    assert FLOORS["loss fwd + bwd", "t 8192"][1] == 3 * 2 * 8192 * 4096 * 131072
    assert rows.floor(3e12, 1, 3e12, 1e12) == 1 and rows.floor(1, 2e12, 3e12, 1e12) == 2


def test_the_floors_need_nothing(capsys):
    bench.main(["--floors", "--only", "ssd"])
    lines = capsys.readouterr().out.splitlines()[3:]
    assert len(lines) == 5 and all(
        r.startswith("ssd") and r.endswith(("bytes", "matrix products")) for r in lines
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flag", ["--kernels", "--fast"])
def test_without_a_gpu_it_says_so(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([flag])
    assert (
        stop.value.code == 2
        and f"{flag} needs a CUDA GPU" in capsys.readouterr().err.splitlines()[-1]
    )


def test_a_model_s_speed_is_shown(capsys):
    bench.main("--device cpu --batch 1 --length 16 --rounds 1".split())
    found = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  ") and line.strip()[:1] in "tpd"
    ]
    assert [r[0] for r in found[-3:]] == ["training,", "prefill", "decoding,"] and all(
        float(r[-1]) > 0 for r in found[-3:]
    )


def test_a_step_is_timed_by_kind():
    """Shares of the kinds and what is around them add up to the step; the products' operations are
    those that are counted by hand."""
    said = []
    rows = step.measure("mini", 2, 32, 1, said.append)
    assert [r[0] for r in rows[:-1]] == list(step.WORDS.values()) and rows[-1][0] == step.AROUND
    assert said[-1].startswith("a step") and all(r[1] > 0 and r[3] > 0 for r in rows[:-1])
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert step.flops("mm", (a, b), a @ b) == 2 * 3 * 4 * 5
    x, w, watch = torch.randn(1, 6, 1, 9), torch.randn(6, 1, 1, 4), step.Watch()
    with watch:
        F.conv2d(x, w, groups=6)
    _, operations, moved = watch.seen["convolutions"][0]
    assert operations == 2 * 6 * 6 * 4 and moved == 4 * (6 * 9 + 6 * 4 + 6 * 6)
    assert step.kind("mm") == step.kind("_grouped_mm") == "products"


def test_replies_are_timed_by_part(monkeypatch):
    """A head that sleeps takes nearly all of the time; the tokens are rows x ROOM."""
    model = Nemotron(Config.preset("mini")).eval()
    tokens, seconds, by = replies.once(model, 3, seed=0)
    assert tokens == 3 * replies.ROOM and 0 < sum(by.values()) < seconds
    assert set(by) == {"Mamba-2", "attention", "LatentMoE", "head"}
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: time.sleep(0.05) or forward(x))
    _, seconds, slow = replies.once(model, 3, seed=0)
    assert slow["head"] / seconds > 0.5 > by["head"] / sum(by.values())


def test_replies_by_command(capsys):
    bench.main("--replies --preset mini --rounds 1 --device cpu".split())
    head, *rows = capsys.readouterr().out.splitlines()[-3:]
    assert [int(r.split()[0]) for r in rows] == [64, 256] and "tokens/s" in head
    assert all(98 <= sum(int(x[:-1]) for x in r.split()[2:]) <= 102 for r in rows)


def test_packed_weights_are_timed_beside_bf16(capsys):
    """On a model of nothing but experts that NVFP4 holds in 4.5 bits of 16."""
    small = replace(lowmemory.sizes(), hybrid_override_pattern="EM", n_routed_experts=64)
    lowmemory.measure(small, rounds=2)
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert "parameters, one row" in title and [r.split()[0] for r in rows] == list(lowmemory.MAPS)
    held = {r.split()[0]: float(r.split()[2]) for r in rows}
    assert held["bf16"] == 1 and 4.5 / 16 < held["nvfp4"] < held["released"] < 0.7
    model = lowmemory.make(small, "released")
    assert set(packed.plan(model)[0].values()) == {"NVFP4", "FP8"}


def test_a_peer_that_is_not_there_says_so():
    assert rows.stranger("no_such_package.ops", "f") == "not installed"
    assert rows.stranger("json", "no_such_name").startswith("installed, but AttributeError")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_kernel_is_correct():
    assert clock.kernel_table("", 5)


def test_this_file_can_fail():
    half = {(name, shape): nbytes for name, shape, nbytes, _ in rows.floors(t=4096)}
    assert half["ssd forward", "t 4096"] == FLOORS["ssd forward", "t 8192"][0] / 2
