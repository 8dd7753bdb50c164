"""Makes `import model` work from any directory, shares a bare `python -m pytest` between two cores,
and holds the measures that tests share: how far from right, and whether the same to the bit.
"""

import os
import sys
from pathlib import Path

# Before torch. Idle threads sleep, so a busy machine stays usable; each of two processes has one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
WORKER = "PYTEST_XDIST_WORKER"  # in the environment of a process that shares the work
if WORKER in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# Processes of their own: test_kernels.py starts them.
collect_ignore = ["interpreted", "compiled", "fake_cuda"]
# The same examples on every machine.
settings.register_profile("repo", deadline=None, derandomize=True, database=None)
settings.load_profile("repo")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All files, and nothing said of -n: two processes, where pytest-xdist is there to make them.

    Files that are named, -s and --pdb stay in this process; so does one that shares the work: it
    asks this too, and would hand its share on without end.
    """
    option = config.option
    if WORKER in os.environ:
        return
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    seen = option.capture == "no" or option.usepdb
    if everything and not seen and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist = min(2, os.cpu_count() or 1), "loadfile"


def rms(got, want):
    """Root-mean-square error relative to `want`; absolute where want is all zeros. NaN fails every
    `<=`.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (want.norm() if want.any() else 1))


def same(a, b):
    """Nested dicts and lists of tensors and numbers, bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
