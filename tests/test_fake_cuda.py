"""
The CUDA path without a card: its tensors say cuda:0, and PyTorch's rules for CUDA hold. Apple's MPS
without a Mac likewise.

torch asks once, at its import, what there is; so each file of tests/fake_cuda runs in a process of
its own, with the same compiled answers: tests/fake_cuda/believe.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "fake_cuda"
sys.path.insert(0, str(HERE))
import hooks

ON_A_MAC = {"test_mac": ["mps"], "test_commands": ["cuda", "mps"]}
FILES = [
    (p.stem, d) for p in sorted(HERE.glob("test_*.py")) for d in ON_A_MAC.get(p.stem, ["cuda"])
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if why := hooks.lacking():
        pytest.skip(why)
    return hooks.build(tmp_path_factory.mktemp("hooks"))


def run(library, *args, limit=1200, **env):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    beside = dict(FAKE_CUDA_LIBRARY=str(library), PYTHONPATH=str(HERE))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-p", "believe", *map(str, args)],
        cwd=HERE.parents[1],
        env={**inherited, **beside, **env},
        timeout=limit,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, device", FILES)
def test_on_the_fake_card(library, name, device):
    done = run(library, HERE / f"{name}.py", "-m", "not long", FAKE_DEVICE=device)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.long  # 12 minutes of one core's time
def test_the_whole_default_run(library):
    done = run(library, HERE / "test_whole.py", "-m", "long", "-s", limit=6 * 3600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]


BROKEN = """
import card, torch
card.install()
def test_mixed():
    torch.zeros(1, device="cuda") + torch.zeros(1)
def test_waits():
    card.CARD.reset()
    torch.zeros(1, device="cuda").item()
    assert not card.CARD.waits
def test_is_there():
    assert torch.zeros(1, device="cuda").device.type == "cuda"
"""


def test_this_file_can_fail(library, tmp_path):
    path = tmp_path / "test_broken.py"
    path.write_text(BROKEN)
    said = run(library, path).stdout
    assert "2 failed, 1 passed" in said, said[-6000:]
    assert "found at least two devices, cuda:0 and cpu" in said
