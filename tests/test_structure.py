"""The house: who may import whom, what a file opens with, and that every file runs by itself."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# file: what of ours it may import, lowest floor first; a file imports only from lower floors.
# Any of them may import command.py: it says what a program is, and nothing of the model.
HOUSE = {
    "attention": (),
    "checkpoint": (),
    "command": (),
    "config": ("family",),
    "family": (),
    "latent_moe": (),
    "mamba": (),
    "mtp": (),
    "nvfp4": (),
    "tokenizer": (),
    "chat": ("tokenizer",),
    "data": ("tokenizer",),
    "decode": ("mtp",),
    "model": ("attention", "config", "latent_moe", "mamba", "mtp"),
    "post.pack": ("config", "model", "mtp"),
    "plot": ("checkpoint", "config"),
    "quant.ondisk": (),
    "quant.statecache": (),
    "quant.packed": ("nvfp4", "quant.ondisk"),
    "quant.lowbit": ("nvfp4", "quant.packed"),
    "quant.calibrate": ("latent_moe", "nvfp4", "quant.packed"),
    "quant.autoquant": ("latent_moe", "quant.calibrate", "quant.packed"),
    "quant.distill": ("latent_moe", "quant.calibrate", "quant.packed"),
    "scale.budget": ("config",),
    "scale.shards": ("checkpoint",),
    "speed.rows": ("config", "mamba"),
    "training.settings": ("config",),
    "post.release": ("chat", "tokenizer"),
    "post.tasks": ("chat",),
    "hf": ("checkpoint", "model", "post.release", "quant.ondisk", "quant.packed"),
    "scale.parallel": ("attention", "latent_moe", "mamba", "model", "mtp", "quant.packed"),
    "speculate": ("decode", "mtp"),
    "post.picture": ("checkpoint",),
    "post.rlhf": (),
    "post.rollout": ("chat", "decode", "post.tasks", "speculate"),
    "speed.clock": ("mtp", "speed.rows"),
    "training.safety": ("checkpoint",),
    "training.journal": ("checkpoint", "latent_moe", "plot", "training.safety"),
    "training.world": (
        "checkpoint",
        "latent_moe",
        "model",
        "nvfp4",
        "quant.lowbit",
        "training.safety",
    ),
    "sample": (
        "chat",
        "checkpoint",
        "data",
        "decode",
        "hf",
        "model",
        "post.tasks",
        "quant.packed",
        "quant.statecache",
        "speculate",
    ),
    "scale.dryrun": ("model", "scale.budget", "scale.parallel"),
    "scale.ranks": (
        "checkpoint",
        "scale.parallel",
        "scale.shards",
        "training.safety",
        "training.world",
    ),
    "heal": (
        "chat",
        "checkpoint",
        "data",
        "hf",
        "mtp",
        "post.pack",
        "post.rollout",
        "post.tasks",
        "sample",
        "speculate",
    ),
    "ptq": (
        "checkpoint",
        "command",
        "data",
        "hf",
        "quant.autoquant",
        "quant.calibrate",
        "quant.distill",
        "quant.ondisk",
        "quant.packed",
        "sample",
    ),
    "scale.release": ("checkpoint", "hf", "model", "quant.packed", "scale.ranks"),
    "worth": (
        "attention",
        "checkpoint",
        "command",
        "data",
        "heal",
        "latent_moe",
        "mamba",
        "mtp",
        "sample",
    ),
    "training.pretrain": (
        "config",
        "data",
        "mtp",
        "post.pack",
        "sample",
        "training.settings",
        "worth",
    ),
    "training.merge": ("checkpoint", "data", "model", "training.pretrain", "training.world"),
    "train": (
        "checkpoint",
        "command",
        "config",
        "latent_moe",
        "mtp",
        "quant.lowbit",
        "sample",
        "scale.dryrun",
        "scale.ranks",
        "training.journal",
        "training.merge",
        "training.pretrain",
        "training.safety",
        "training.settings",
        "training.world",
    ),
    "grpo": (
        "chat",
        "checkpoint",
        "command",
        "config",
        "data",
        "latent_moe",
        "model",
        "post.pack",
        "post.picture",
        "post.rlhf",
        "post.rollout",
        "post.tasks",
        "sample",
    ),
    "sft": (
        "chat",
        "checkpoint",
        "command",
        "config",
        "data",
        "hf",
        "mtp",
        "post.pack",
        "post.picture",
        "post.rollout",
        "post.tasks",
        "sample",
        "train",
        "training.settings",
    ),
    "bench": (
        "config",
        "decode",
        "latent_moe",
        "model",
        "speed.clock",
        "speed.rows",
        "train",
        "training.world",
    ),
}
TOPS = {name.split(".")[0] for name in HOUSE}


# What else may be imported at the top: the standard library, torch, and this. Inside a function:
# what requirements.txt names.
BESIDES = {
    "data": {"numpy"},
    "tokenizer": {"numpy", "tiktoken"},
    "plot": {"matplotlib"},
    "post.picture": {"matplotlib"},
    "hf": {"safetensors"},
    "ptq": {"safetensors"},
}


def imports(tree):
    """(top name, whether it stands inside a function) of every import in a file."""
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    for n in ast.walk(tree):
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            for name in [n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names]:
                yield name.split(".")[0], id(n) in inside


def ours(tree):
    """Our own files that a file imports, by their dotted names."""
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name for a in n.names if a.name in HOUSE)
        elif isinstance(n, ast.ImportFrom):
            yield from {n.module} & set(HOUSE) or (
                f"{n.module}.{a.name}" for a in n.names if f"{n.module}.{a.name}" in HOUSE
            )


def file(name):
    return ROOT / (name.replace(".", "/") + ".py")


def wants_kernels(tree):
    """Whether an import of kernels stands anywhere but under `if fast:` (or `if self.fast:`) in a
    function.
    """
    asked = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for i in ast.walk(f)
        if isinstance(i, ast.If) and getattr(i.test, "id", getattr(i.test, "attr", "")) == "fast"
        for body in i.body
        for n in ast.walk(body)
    }
    return any(
        isinstance(n, (ast.Import, ast.ImportFrom))
        and id(n) not in asked
        and any(
            m.split(".")[0] == "kernels"
            for m in [getattr(n, "module", None) or "", *(a.name for a in n.names)]
        )
        for n in ast.walk(tree)
    )


def catches_everything(tree):
    """except:, except Exception:, also in a tuple."""
    for n in ast.walk(tree):
        if isinstance(n, ast.ExceptHandler):
            if n.type is None or {"Exception", "BaseException"} & {
                getattr(x, "id", "") for x in ast.walk(n.type)
            }:
                return True
    return False


def faults(name, text):
    """What a file does that the house forbids."""
    tree, allowed = ast.parse(text), HOUSE[name]
    doc = ast.get_docstring(tree) or ""
    found = [f"imports {other}" for other in ours(tree) if other not in (*allowed, "command")]
    found += [
        f"imports {top} outside a function"
        for top, inside in imports(tree)
        if top in ("kernels", "triton", "transformers", "rustbpe") and not inside
    ]
    found += [
        f"line {i} has {len(line)} columns"
        for i, line in enumerate(text.splitlines(), 1)
        if len(line) > 100 and "://" not in line
    ]
    found += [
        f"{n.name} has {n.end_lineno - n.lineno + 1} lines"
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 60
    ]
    found += ["no legend in its docstring"] * ("Sources" not in doc and "Not here" not in doc)
    found += [
        f"imports {top}, which is neither torch nor the standard library"
        for top, inside in imports(tree)
        if not inside
        and top not in {*sys.stdlib_module_names, *TOPS, "torch"} | BESIDES.get(name, set())
    ]
    found += [
        f"imports {top}, which requirements.txt does not name"
        for top, _ in imports(tree)
        if top not in {*sys.stdlib_module_names, *TOPS, *REQUIRED, "kernels"}
    ]
    found += ["imports kernels without `if fast:`"] * wants_kernels(tree) + [
        "catches everything"
    ] * catches_everything(tree)
    return found + elsewhere(text)


REQUIRED = re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), re.M)


def elsewhere(text):
    """Paths of one machine."""
    return [f"names {m[0]}" for m in re.finditer(r"/(tmp|work|root|home|Users)/\w?", text)]


def test_every_file_is_in_the_house():
    here = [
        *ROOT.glob("*.py"),
        *(p for wing in TOPS for p in ROOT.glob(f"{wing}/*.py") if p.stem != "__init__"),
    ]
    assert {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in here} == set(HOUSE)


@pytest.mark.parametrize("name", HOUSE)
def test_the_house_rules(name):
    assert not faults(name, file(name).read_text())


def test_every_test_file_shows_that_it_can_fail():
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)) and "\ndef test_this_file_can_fail(" in text, (
            path.name
        )
        assert path == Path(__file__).resolve() or not elsewhere(text), path.name


def run(*args, cwd, env=()):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1", **dict(env)},
    )


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "command",
        "scale.budget",
        "attention",
        "mamba",
        "latent_moe",
        "mtp",
        "nvfp4",
        "tokenizer",
        "checkpoint",
        "data",
        "model",
        "hf",
        "quant.statecache",
    ],
)
def test_every_concept_file_runs_by_itself(name, tmp_path):
    before = os.times()
    where = [file(name)] if "." not in name else ["-m", name]  # a wing does not see the top
    beside = {} if "." not in name else {"PYTHONPATH": str(ROOT)}
    done = run(*where, *["--preset", "toy"] * (name == "model"), cwd=tmp_path, env=beside)
    after = os.times()
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 5, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"] * (name == "nvfp4")  # its picture
    seconds = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    assert seconds < 20, f"{seconds:.0f} seconds of CPU time"


IMPORT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torchs_own = ("GOMP_SPINCOUNT", "TORCHINDUCTOR_CACHE_DIR")
how = lambda: (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
               torch.is_grad_enabled(), os.getcwd(), sys.argv[:],
               {k: v for k, v in os.environ.items() if k not in torchs_own})
before = how()
many = {name for name in sys.argv if name.startswith("scale.")}  # torch's FSDP imports triton
for name in sorted(sys.argv[2:], key=many.__contains__):
    assert name in many or not {"triton", "transformers", "kernels"} & set(sys.modules)
    __import__(name)
assert how() == before
assert not {"transformers", "kernels"} & set(sys.modules)
"""


def test_an_import_does_nothing_else(tmp_path):
    before = sorted(ROOT.iterdir())
    done = run("-c", IMPORT, ROOT, *HOUSE, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir()) and sorted(ROOT.iterdir()) == before


def test_this_file_can_fail():
    text = (ROOT / "mamba.py").read_text()
    assert not faults("mamba", text)
    for broken in (
        "import model\n" + text,
        "import triton\n" + text,
        text + "\ndef long():\n" + "    print()\n" * 60,
        text.replace("Sources", "From").replace("Not here", ""),
        "import numpy\n" + text,
        text + "\nimport surprise\n",
        text + "\ndef f():\n    from kernels.ssd import ssd\n",
        text + "\n# /" + "tmp/x\n",
        text + "\ntry:\n    pass\nexcept (OSError, Exception):\n    pass\n",
        text + "\ntry:\n    pass\nexcept Exception:\n    pass\n",
        text + "# " + "x" * 100,
    ):
        assert faults("mamba", broken)
