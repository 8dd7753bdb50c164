"""
The fake card as a plugin of pytest, which loads before any test imports torch:

    PYTHONPATH=tests/fake_cuda python -m pytest -p believe tests/fake_cuda

FAKE_DEVICE=mps before it believes in Apple's instead, for test_mac.py.

hooks.cpp is compiled once a process, 10 s; once for several where FAKE_CUDA_LIBRARY names what
hooks.build made.
"""

import os
import tempfile

import hooks

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: there is no card to compile for
if given := os.environ.get("FAKE_CUDA_LIBRARY"):
    hooks.load(given)
else:
    with tempfile.TemporaryDirectory() as folder:
        hooks.load(hooks.build(folder))
