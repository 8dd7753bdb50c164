"""bench.py without a GPU: its floors by hand, what it says where it cannot measure, and a model's
speed.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from speed import clock, rows

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


def test_a_model_s_speed_is_shown():
    done = subprocess.run(
        [
            sys.executable,
            "bench.py",
            "--device",
            "cpu",
            "--batch",
            "1",
            "--length",
            "16",
            "--rounds",
            "1",
        ],
        cwd=Path(bench.__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = [
        line.split()
        for line in done.stdout.splitlines()
        if line.startswith("  ") and line.strip()[:1] in "tpd"
    ]
    assert [r[0] for r in found[-3:]] == ["training,", "prefill", "decoding,"] and all(
        float(r[-1]) > 0 for r in found[-3:]
    )


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
