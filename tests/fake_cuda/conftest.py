"""
The fake card, for tests that run in processes of their own: see believe.py.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
if "hooks" not in sys.modules:
    raise pytest.UsageError("no fake card: PYTHONPATH=tests/fake_cuda python -m pytest -p believe")
import card
import mac
import torch

torch.set_num_threads(1)
(mac if os.environ.get("FAKE_DEVICE") == "mps" else card).install()


@pytest.fixture
def counted():
    """The card, its counters at 0."""
    card.CARD.reset()
    return card.CARD


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Some Python to learn from."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((ROOT / "train.py").read_text() * 8)
    return path
