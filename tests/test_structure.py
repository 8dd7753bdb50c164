"""The house: who may import whom, how long a file may be, and that every file and every command of
the README runs.
"""

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# file: what of ours it may import, lowest floor first; a file imports only from floors below its own
HOUSE = {
    "attention": (),
    "checkpoint": (),
    "command": (),
    "config": ("command", "family"),
    "family": (),
    "latent_moe": (),
    "mamba": (),
    "mtp": (),
    "nvfp4": (),
    "tokenizer": (),
    "data": ("tokenizer",),
    "decode": ("mtp",),
    "model": ("attention", "config", "latent_moe", "mamba", "mtp"),
    "plot": ("checkpoint",),
    "post.pack": ("config", "model", "mtp"),
    "quant.lowbit": ("nvfp4",),
    "scale.budget": ("config",),
    "scale.shards": ("checkpoint",),
    "speed.rows": ("config", "mamba"),
    "training.settings": ("command", "config"),
    "hf": ("model",),
    "scale.parallel": ("attention", "latent_moe", "mamba", "model", "mtp"),
    "speculate": ("decode", "mtp"),
    "speed.clock": ("mtp", "speed.rows"),
    "training.journal": ("checkpoint", "latent_moe", "plot"),
    "training.world": ("checkpoint", "latent_moe", "model", "nvfp4", "quant.lowbit"),
    "sample": ("checkpoint", "data", "decode", "hf", "model", "speculate"),
    "scale.dryrun": ("model", "scale.budget", "scale.parallel"),
    "scale.ranks": ("checkpoint", "scale.parallel", "scale.shards", "training.world"),
    "heal": ("checkpoint", "data", "sample", "speculate"),
    "scale.release": ("checkpoint", "hf", "model", "scale.ranks"),
    "training.pretrain": ("config", "data", "mtp", "post.pack", "sample", "training.settings"),
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
        "training.settings",
        "training.world",
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
    "hf": {"safetensors"},
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
    found = [f"imports {other}" for other in ours(tree) if other not in allowed]
    found += [
        f"imports {top} outside a function"
        for top, inside in imports(tree)
        if top in ("kernels", "triton", "transformers", "rustbpe") and not inside
    ]
    found += [
        f"line {i} has {len(line)} columns"
        for i, line in enumerate(text.splitlines(), 1)
        if len(line) > 120
    ]
    found += [
        f"{n.name} has {n.end_lineno - n.lineno + 1} lines"
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 110
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
    ],
)
def test_every_concept_file_runs_by_itself(name, tmp_path):
    before = os.times()
    where = [file(name)] if "." not in name else ["-m", name]  # a wing does not see the top
    beside = {} if "." not in name else {"PYTHONPATH": str(ROOT)}
    done = run(*where, *["--preset", "toy"] * (name == "model"), cwd=tmp_path, env=beside)
    after = os.times()
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 3, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"] * (name == "nvfp4")  # its picture
    seconds = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    assert seconds < 20, f"{seconds:.0f} seconds of CPU time"


IMPORT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
how = lambda: (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
               {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "TORCHINDUCTOR_CACHE_DIR")},   # torch's own
               os.getcwd(), sys.argv[:])
before = how()
many = {name for name in sys.argv if name.startswith("scale.")}                                      # torch's FSDP imports triton by itself
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


# (language, text) of the README's fenced blocks
BLOCKS = re.findall(
    r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
)


def commands():
    """The lines of the README's fenced blocks that call python on a file of ours."""
    for line in "".join(text for kind, text in BLOCKS if not kind).splitlines():
        for part in line.split("#")[0].split("&&"):
            if part.strip().startswith("python ") and ".py" in part:
                yield part.strip()


COMMANDS = list(commands())


def test_the_commands_of_the_readme_exist(monkeypatch, capsys):
    assert len(COMMANDS) > 8
    texts = {}
    for line in COMMANDS:
        file = line.split()[1]
        assert (ROOT / file).is_file(), line
        if flags := re.findall(r"(--[a-z-]+)", line):
            if file not in texts:
                module = importlib.import_module(file.removesuffix(".py"))
                monkeypatch.setattr(sys, "argv", [file, "-h"])
                with pytest.raises(SystemExit):
                    getattr(module, "cli" if file == "train.py" else "main")()
                texts[file] = capsys.readouterr().out
            for flag in flags:
                assert re.search(rf"{flag}(?![\w-])", texts[file]), f"{file} has no {flag}: {line}"


def test_the_training_commands_of_the_readme_are_runs(monkeypatch):
    """Every flag and value is taken; the run itself does not start."""
    import train

    runs, own = [], {f.name: f.default for f in fields(train.Run)}
    for name in ("fit", "merge"):
        monkeypatch.setattr(train, name, lambda run, say: runs.append(run))
    monkeypatch.setattr("scale.dryrun.predict", lambda run, *rest: runs.append(run))
    monkeypatch.setattr(
        Path, "is_file", lambda path: True
    )  # --resume and --merge find a run to go on with
    monkeypatch.setattr(Path, "read_text", lambda path, **kw: json.dumps(dict(run=own)))
    lines = [shlex.split(line)[2:] for line in COMMANDS if line.split()[1] == "train.py"]
    for argv in lines:
        train.cli(argv)
    assert (
        len(runs) == len(lines) + sum("--short" in line for line in lines) > 3
    )  # two dry runs: long, short
    for r in runs:
        assert train.configure(r, 1).hybrid_override_pattern and r.batch % (r.micro or r.batch) == 0


def test_the_python_of_the_readme_exists():
    """Modules, functions, keywords and fields that its notebook example uses; what it does is
    tested elsewhere.
    """
    blocks = [
        text for kind, text in BLOCKS if kind == "python" and text.startswith("import ")
    ]  # a sample is no program
    calls = [n for block in blocks for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Call)]
    assert len(calls) > 2
    for n in calls:
        function = getattr(importlib.import_module(n.func.value.id), n.func.attr)
        inspect.signature(function).bind(*n.args, **{k.arg: k.value for k in n.keywords})


def test_the_numbers_of_the_readme_are_the_code():
    sys.path.insert(0, str(ROOT))
    import hf
    import model
    from scale import budget

    text = (ROOT / "README.md").read_text()
    for preset in ("super", "nano"):
        rows, mtp, _ = model.costs(model.Config.preset(preset))
        total, active = sum(r[2] for r in rows), sum(r[3] for r in rows)
        for n in (
            total,
            active,
            active
            - model.Config.preset(preset).vocab_size * model.Config.preset(preset).hidden_size,
        ):
            assert f"{n:,}" in text, (preset, n)
    assert f"{model.costs(model.Config.preset('super'))[1][2]:,}" in text
    assert f"{len(hf.census(model.Config.preset('super'))):,}" in text
    routers = (
        model.Config.preset("super").n_routed_experts * 4096 * 40
    )  # the difference that the README explains
    ours = {
        f"{n:,}"
        for preset in ("super", "nano")
        for rows, mtp, _ in [model.costs(model.Config.preset(preset))]
        for c in [model.Config.preset(preset)]
        for total, active in [(sum(r[2] for r in rows), sum(r[3] for r in rows))]
        for n in (
            total,
            active,
            active - c.vocab_size * c.hidden_size,
            mtp[2] if mtp else 0,
            routers,
        )
    }
    for line in re.findall(
        r"^\| \d+ \| [\d,]+ \| .*", text, re.M
    ):  # what budget.py prints, rank by rank
        cells = [cell.strip() for cell in line.split("|")[1:5]]
        one, two = (
            budget.reckon(budget.Plan(int(cells[0]), 8, 8192, again), model.Config.preset("super"))
            for again in (False, True)
        )
        assert cells[1:] == [
            f"{one['parameters']:,}",
            f"{one['peak'] / 1e9:.1f}",
            f"{two['peak'] / 1e9:.1f}",
        ], line
        ours.add(cells[1])
    assert (
        set(re.findall(r"\b\d{2,3}(?:,\d{3}){2,}\b|\b\d(?:,\d{3}){3,}\b", text)) <= ours
    )  # and no other number this large
    assert not re.findall(r"@[A-Z]+@", text), "a placeholder"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_this_file_can_fail():
    text = (ROOT / "mamba.py").read_text()
    assert not faults("mamba", text)
    for broken in (
        "import model\n" + text,
        "import triton\n" + text,
        text + "\ndef long():\n" + "    print()\n" * 120,
        text.replace("Sources", "From").replace("Not here", ""),
        "import numpy\n" + text,
        text + "\nimport surprise\n",
        text + "\ndef f():\n    from kernels.ssd import ssd\n",
        text + "\n# /" + "tmp/x\n",
        text + "\ntry:\n    pass\nexcept (OSError, Exception):\n    pass\n",
        text + "\ntry:\n    pass\nexcept Exception:\n    pass\n",
        text + "# " + "x" * 120,
    ):
        assert faults("mamba", broken)
