"""Makes `import model` work from any directory, and holds the one measure of error that the tests
share.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: idle threads sleep, a busy machine stays usable
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
collect_ignore = ["interpreted", "compiled"]  # processes of their own: test_kernels.py starts them
settings.register_profile(
    "repo", deadline=None, derandomize=True, database=None
)  # the same examples on every machine
settings.load_profile("repo")


def rms(got, want):
    """Root-mean-square error relative to `want`; absolute where want is all zeros. NaN fails every
    `<=`.
    """
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (want.norm() if want.any() else 1))
