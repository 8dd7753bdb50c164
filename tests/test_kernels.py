"""
The Triton kernels on a machine without a GPU: interpreted for their numbers, compiled for their
registers.

Triton decides at import whether it interprets or compiles, so neither can happen in this process.
What is quick of tests/interpreted runs in one of its own, each slow file in another, the lists of
tests/compiled in a third; they fail here with what they printed:

    python -m pytest tests/interpreted    numbers: every kernel against fp64, every address checked
    python tests/compiled/aot.py          registers, spills, instructions on A100, H100, B200
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
INTERPRETED = sorted(p.stem for p in (HERE / "interpreted").glob("test_*.py"))
COMPILED = sorted(p.stem for p in (HERE / "compiled").glob("*.py") if p.stem != "aot")
KERNELS = sorted(p.stem for p in (HERE.parent / "kernels").glob("*.py") if p.stem != "__init__")
here = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not here, reason="triton is not installed: pip install -r requirements-dev.txt"
)


def run(*args, **env):
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_"))
    }
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=HERE.parent,
        env={**inherited, **env},
        timeout=3000,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


SLOW = {"test_checks", "test_experts", "test_fp4mm"}  # 20 seconds and more
GROUPS = [
    pytest.param(sorted({*INTERPRETED} - SLOW), id="quick"),
    *(pytest.param([name], id=name, marks=pytest.mark.slow) for name in sorted(SLOW)),
]


@needs_triton
@pytest.mark.parametrize("names", GROUPS)
def test_interpreted(names):
    files = [HERE / "interpreted" / f"{name}.py" for name in names]
    done = run("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *files)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]


@needs_triton
def test_compiled():
    done = run(HERE / "compiled" / "aot.py", *COMPILED)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]


@needs_triton
@pytest.mark.slow
def test_compiled_for_smaller_cards():
    """RTX 30, 40 and 50, A10 and L4: a block has 99 KB of shared memory."""
    done = run(HERE / "compiled" / "aot.py", "--small", *COMPILED)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]


def test_every_kernel_is_interpreted_and_compiled():
    assert {f"test_{k}" for k in KERNELS} <= set(INTERPRETED) and set(KERNELS) == set(COMPILED)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_file_is_a_lesson(name):
    """It opens with grid, traffic, numbers; imports torch, triton, kernels alone. The same bits
    every time: no atomics but of a maximum, which is the same in any order."""
    text = (HERE.parent / "kernels" / f"{name}.py").read_text()
    tree = ast.parse(text)
    assert all(word in ast.get_docstring(tree) for word in ("grid ", "traffic ", "numbers "))
    tops = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
    }
    assert {t.split(".")[0] for t in tops} <= {"torch", "triton", "kernels"}, tops
    assert max(map(len, text.splitlines())) <= 120 and not re.search(r"tl\.atomic_(?!max\b)", text)


def test_asking_for_what_cannot_run_says_why():
    """No Triton: one sentence at the import. No GPU: one sentence at the call. Never another
    path.
    """
    hidden = "u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a); import kernels"
    done = run("-c", "import importlib.util as u; f = u.find_spec; " + hidden)
    assert done.returncode and "fast=True needs the package triton" in done.stdout.splitlines()[-1]
    if here:
        done = run(
            "-c",
            "import kernels, torch; kernels.on_gpu('ssd', torch.zeros(1))",
            CUDA_VISIBLE_DEVICES="",
        )
        assert (
            done.returncode
            and "ssd with fast=True needs a CUDA GPU" in done.stdout.splitlines()[-1]
        )


BROKEN = """
import sys
sys.path[:0] = [{compiled!r}]
import aot, triton, triton.language as tl
@triton.jit
def copy(X, OUT, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(OUT + i, tl.load(X + i, i < n, 0), i < n)
types = dict(X="*fp32", OUT="*fp32", n="i32")
few = dict(regs=1, shared=1, blocks={{90: 2}})
row = aot.Row(copy, "a copy", types, dict(N=1024), wants={{90: "wgmma"}}, cards=(90,), **few)
made = aot.make(row, 90)
made.stack, made.shared = 8, 1 << 20
print(*aot.faults(row, 90, made), sep="\\n")
"""


@needs_triton
def test_this_file_can_fail(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN.format(compiled=str(HERE / "compiled")))
    lines = run(tmp_path / "broken.py").stdout.splitlines()
    said = [line.split()[0] for line in lines[-6:]]
    assert said == ["spills", "wants", "takes", "takes", "leaves", "has"], lines
