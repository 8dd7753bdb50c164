"""The house: who may import whom, what a file opens with, and that every file runs by itself."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import command

import conftest
import pytest

import bounds
from classroom.stages import program

ROOT = Path(__file__).resolve().parent.parent
# file: what of ours it may import, lowest floor first; a file imports only from lower floors.
# Any of them may import bounds.py and command.py: they say what a field and a program are, and
# nothing of the model.
HOUSE = {
    "attention": (),
    "bounds": (),
    "disk": (),
    "checkpoint": ("disk",),
    "command": ("bounds", "shell"),
    "config": ("family",),
    "shell": (),
    "family": (),
    "latent_moe": (),
    "mamba": (),
    "mtp": (),
    "nvfp4": (),
    "four_bits": ("nvfp4",),
    "corpora.foreign": (),
    "tokenizer": ("corpora.foreign",),
    "chat": ("tokenizer",),
    "classroom.page": ("disk",),
    "classroom.watch": (),
    "classroom.microscope": ("classroom.page", "classroom.watch", "config"),
    "classroom.chapters": (),
    "corpora.philox": (),
    "corpora.tokenfiles": (),
    "corpora.download": ("corpora.tokenfiles",),
    "corpora.synthetic": ("corpora.philox",),
    "data": (
        "corpora.download",
        "corpora.philox",
        "corpora.synthetic",
        "corpora.tokenfiles",
        "tokenizer",
    ),
    "decode": ("data", "mtp"),
    "graph": ("latent_moe",),
    "model": ("attention", "config", "latent_moe", "mamba", "mtp"),
    "post.pack": ("config", "data", "model", "mtp"),
    "plot": ("config", "disk"),
    "post.picture": ("disk", "plot"),
    "quant.ondisk": (),
    "quant.statecache": (),
    "quant.packed": ("nvfp4", "quant.ondisk"),
    "quant.lowbit": ("nvfp4", "quant.packed", "quant.statecache"),
    "quant.calibrate": ("latent_moe", "nvfp4", "quant.packed"),
    "quant.autoquant": ("latent_moe", "quant.calibrate", "quant.packed"),
    "quant.distill": ("latent_moe", "quant.calibrate", "quant.packed"),
    "scale.budget": ("config",),
    "scale.shards": ("checkpoint",),
    "speed.rows": ("config", "mamba"),
    "training.settings": ("config", "disk"),
    "post.release": ("chat", "tokenizer"),
    "post.talks": ("chat",),
    "post.tasks": ("chat",),
    "census": ("model", "quant.ondisk", "quant.packed"),
    "hf": ("census", "checkpoint", "model", "post.release", "quant.ondisk", "quant.packed"),
    "scale.slices": ("attention", "mamba"),
    "scale.parallel": (
        "attention",
        "latent_moe",
        "mamba",
        "model",
        "mtp",
        "quant.lowbit",
        "quant.packed",
        "scale.slices",
    ),
    "speculate": ("data", "decode", "mtp"),
    "classroom.pictures": ("plot",),
    "classroom.base": ("classroom.chapters", "classroom.pictures"),
    "classroom.assistant": ("classroom.chapters", "classroom.pictures", "post.picture"),
    "post.rlhf": (),
    "talk": ("chat", "post.tasks", "tokenizer"),
    "post.rollout": ("chat", "decode", "post.tasks", "speculate", "tokenizer"),
    "speed.clock": ("mtp", "speed.rows"),
    "speed.lowmemory": ("config", "model", "quant.autoquant", "quant.calibrate", "quant.packed"),
    "speed.replies": ("config", "model", "post.rollout"),
    "training.safety": ("checkpoint", "disk"),
    "training.live": ("plot",),
    "classroom.stages": ("checkpoint", "disk", "training.safety"),
    "training.journal": ("disk", "latent_moe", "plot", "training.safety"),
    "training.capture": ("graph", "latent_moe"),
    "training.world": (
        "checkpoint",
        "disk",
        "latent_moe",
        "model",
        "nvfp4",
        "quant.lowbit",
        "training.safety",
    ),
    "sample": (
        "checkpoint",
        "data",
        "decode",
        "graph",
        "hf",
        "model",
        "quant.packed",
        "quant.statecache",
        "speculate",
        "talk",
        "tokenizer",
    ),
    "look": (
        "chat",
        "classroom.microscope",
        "classroom.watch",
        "post.tasks",
        "sample",
        "speculate",
        "tokenizer",
    ),
    "scale.room": ("scale.budget", "training.settings"),
    "scale.plan": ("scale.budget", "scale.dryrun"),
    "scale.dryrun": (
        "model",
        "nvfp4",
        "quant.lowbit",
        "scale.budget",
        "scale.parallel",
        "scale.slices",
    ),
    "scale.ranks": (
        "checkpoint",
        "disk",
        "scale.budget",
        "scale.parallel",
        "scale.room",
        "scale.shards",
        "training.safety",
        "training.world",
    ),
    "heal": (
        "chat",
        "checkpoint",
        "data",
        "disk",
        "hf",
        "mtp",
        "post.pack",
        "post.rollout",
        "post.tasks",
        "sample",
        "speculate",
    ),
    "layerwise": (
        "census",
        "disk",
        "hf",
        "quant.autoquant",
        "quant.calibrate",
        "quant.ondisk",
        "quant.packed",
    ),
    "ptq": (
        "census",
        "checkpoint",
        "data",
        "disk",
        "hf",
        "layerwise",
        "quant.autoquant",
        "quant.calibrate",
        "quant.distill",
        "quant.packed",
        "sample",
    ),
    "scale.release": ("census", "checkpoint", "model", "quant.packed", "scale.ranks"),
    "worth": (
        "attention",
        "checkpoint",
        "data",
        "disk",
        "heal",
        "latent_moe",
        "mamba",
        "mtp",
        "sample",
    ),
    "training.pretrain": (
        "config",
        "corpora.synthetic",
        "data",
        "mtp",
        "post.pack",
        "sample",
        "tokenizer",
        "training.settings",
        "worth",
    ),
    "training.merge": (
        "checkpoint",
        "data",
        "disk",
        "model",
        "training.pretrain",
        "training.world",
    ),
    "train": (
        "data",
        "latent_moe",
        "mtp",
        "quant.lowbit",
        "sample",
        "scale.dryrun",
        "scale.plan",
        "scale.ranks",
        "scale.room",
        "training.capture",
        "training.journal",
        "training.live",
        "training.merge",
        "training.pretrain",
        "training.safety",
        "training.settings",
        "training.world",
    ),
    "post.groups": ("data", "post.pack"),
    "post.practice": (
        "chat",
        "checkpoint",
        "config",
        "data",
        "latent_moe",
        "model",
        "post.groups",
        "post.rlhf",
        "post.rollout",
        "post.tasks",
    ),
    "grpo": (
        "checkpoint",
        "disk",
        "post.picture",
        "post.practice",
        "post.rollout",
        "post.tasks",
        "sample",
        "training.journal",
        "training.live",
        "training.safety",
    ),
    "sft": (
        "chat",
        "checkpoint",
        "config",
        "corpora.philox",
        "data",
        "disk",
        "hf",
        "mtp",
        "post.pack",
        "post.picture",
        "post.rollout",
        "post.talks",
        "post.tasks",
        "sample",
        "train",
        "training.settings",
    ),
    "report": (
        "classroom.assistant",
        "classroom.base",
        "classroom.chapters",
        "classroom.page",
        "classroom.stages",
        "disk",
        "sample",
    ),
    "speed.step": ("config", "data", "latent_moe", "model", "train"),
    "bench": (
        "config",
        "decode",
        "latent_moe",
        "model",
        "sample",
        "speed.clock",
        "speed.lowmemory",
        "speed.replies",
        "speed.rows",
        "speed.step",
        "train",
        "training.world",
    ),
}
EVERYWHERE = ("bounds", "command")  # fields, flags and their ends
TOPS = {name.split(".")[0] for name in HOUSE}


# What else may be imported at the top: the standard library, torch, and this. Inside a function:
# what requirements.txt names.
BESIDES = {
    "corpora.philox": {"numpy"},
    "corpora.synthetic": {"numpy"},
    "corpora.tokenfiles": {"numpy"},
    "data": {"numpy"},
    "tokenizer": {"numpy", "tiktoken"},
    "plot": {"matplotlib"},
    "census": {"safetensors"},
    "layerwise": {"safetensors"},
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


def too_long(tree):
    """Functions of more than sixty lines."""
    return [
        f"{n.name} has {n.end_lineno - n.lineno + 1} lines"
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno >= 60
    ]


def faults(name, text):
    """What a file does that the house forbids."""
    tree, allowed = ast.parse(text), HOUSE[name]
    allowed = allowed if name in EVERYWHERE else (*allowed, *EVERYWHERE)
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
        if len(line) > 100 and "://" not in line
    ]
    found += [
        f"line {i}: a comment behind a closing bracket; it belongs above the statement"
        for i, line in enumerate(text.splitlines(), 1)
        if re.match(r"\s*[])}]+[,:]?\s+#", line)
    ]
    found += too_long(tree)
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


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda p: p.stem)
def test_a_kernel_s_functions_are_short_too(path):
    """Kernels are no part of the house: they import triton, and each other."""
    assert not too_long(ast.parse(path.read_text()))


def boxes(house):
    """The same, each wing drawn as one box: {box: the boxes that its files import from}."""
    found = {}
    for name, others in house.items():
        mine = found.setdefault(name.split(".")[0], set())
        mine |= {other.split(".")[0] for other in others} - {name.split(".")[0]}
    return found


def circle(graph):
    """What cannot be put on floors, so that arrows only go down: nothing, if all can."""
    left = dict(graph)
    while free := [name for name, others in left.items() if not others & set(left)]:
        left = {name: others for name, others in left.items() if name not in free}
    return sorted(left)


def test_a_wing_is_one_box():
    """No file outside a wing stands between two of its own."""
    assert not circle(boxes(HOUSE))
    assert circle(boxes({**HOUSE, "quant.packed": ("sample",)}))


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
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1", **dict(env)},
    )


CONCEPTS = [
    *("command", "config", "scale.budget", "attention", "mamba", "latent_moe", "mtp"),
    *("nvfp4", "four_bits", "tokenizer", "checkpoint", "data", "model", "hf", "quant.statecache"),
]
# Runs each file as a script, in a fork of a process that has torch and nothing of ours: a fresh
# interpreter but for the seconds that importing torch takes.
ALONE = """
import json, os, runpy, sys, torch
found = {}
for name, path, *argv in json.loads(sys.argv[1]):
    os.makedirs(name)
    child = os.fork()
    if not child:
        os.chdir(name)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open("../" + name + "." + stream, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [path, *argv]
        if "." in name:                               # a wing does not see the top
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(path)
            runpy.run_path(path, run_name="__main__")
        sys.exit()
    _, status, used = os.wait4(child, 0)
    found[name] = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """-> {concept file: exit code, seconds of CPU time}, and the folder of what they printed."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    beside, flags = {"PYTHONPATH": str(ROOT)}, {"model": ["--preset", "toy"]}
    asked = [[name, str(file(name)), *flags.get(name, [])] for name in CONCEPTS]
    if hasattr(os, "fork"):
        done = run("-c", ALONE, json.dumps(asked), cwd=folder, env=beside)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), folder
    for name, path, *argv in asked:
        (folder / name).mkdir()
        where = ["-m", name] if "." in name else [path]
        done = run(*where, *argv, cwd=folder / name, env=beside)
        (folder / f"{name}.out").write_text(done.stdout, encoding="utf-8")
        (folder / f"{name}.err").write_text(done.stderr, encoding="utf-8")
        found[name] = done.returncode, 0.0
    return found, folder


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_concept_file_runs_by_itself(name, alone):
    found, folder = alone
    code, seconds = found[name]
    said = (folder / f"{name}.out").read_text(encoding="utf-8")
    assert code == 0 and len(said.splitlines()) > 5, (folder / f"{name}.err").read_text()
    left = [p.name for p in (folder / name).iterdir()]
    assert left == ["runs"] * (name == "four_bits")  # its picture
    assert seconds < 20, f"{seconds:.0f} seconds of CPU time"


PARTS = ("bounds", "census", "decode", "disk", "graph", "layerwise", "shell", "speculate", "talk")


@pytest.mark.parametrize("name", sorted(n for n in HOUSE if "." not in n))
def test_started_alone_no_file_at_the_top_says_nothing(name, capsys, monkeypatch):
    """A program does its job, a concept file prints its point; a part of a program names that."""
    last = ast.parse(file(name).read_text()).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    if name not in PARTS:
        assert re.search(r"\b(main|cli)\b", ast.unparse(last.body))
        return
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--run", "runs/toy"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(file(name)), run_name="__main__")
    said = capsys.readouterr()
    head, line = said.err.rstrip("\n").split(", but a part of one: python ")
    script, *words = shlex.split(line)
    main, kind = program(script)
    assert (e.value.code, said.out, head) == (2, "", f"{name}.py is no program")
    if kind:  # it has flags
        bounds.check(kind(**vars(command.parser(kind, script, "").parse_args(words))))


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


def visible():
    """The files at the top, without the caches of tools, which another process may be making."""
    return {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}


def test_an_import_does_nothing_else(tmp_path):
    before = visible()
    done = run("-c", IMPORT, ROOT, *HOUSE, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir()) and visible() == before


FILES, NAMED = pytest.Config.ArgsSource.TESTPATHS, pytest.Config.ArgsSource.ARGS


@pytest.mark.parametrize(
    "source, given, processes",
    [
        (FILES, {}, 2),
        (FILES, dict(numprocesses=0), 0),
        (FILES, dict(numprocesses=5), 5),
        (FILES, dict(capture="no"), None),
        (FILES, dict(usepdb=True), None),
        (NAMED, {}, None),
    ],
)
def test_a_bare_pytest_takes_two_processes(source, given, processes, monkeypatch):
    monkeypatch.setattr(conftest.os, "cpu_count", lambda: 8)
    monkeypatch.delenv(conftest.WORKER, raising=False)
    said = dict(numprocesses=None, dist="no", capture="fd", usepdb=False)
    config = SimpleNamespace(args_source=source, option=SimpleNamespace(**said | given))
    conftest.pytest_cmdline_main(config)
    assert config.option.numprocesses == processes
    assert config.option.dist == ("loadfile" if processes == 2 else "no")


def test_who_shares_the_work_does_not_share_it_again(monkeypatch):
    monkeypatch.setenv(conftest.WORKER, "gw0")
    option = SimpleNamespace(numprocesses=None, dist="no", capture="fd", usepdb=False)
    conftest.pytest_cmdline_main(SimpleNamespace(args_source=FILES, option=option))
    assert option.numprocesses is None and option.dist == "no"


def test_without_xdist_there_is_one_process(monkeypatch):
    monkeypatch.delenv(conftest.WORKER, raising=False)
    config = SimpleNamespace(
        args_source=FILES, option=SimpleNamespace(capture="fd", usepdb=False, dist="no")
    )
    conftest.pytest_cmdline_main(config)
    assert config.option.dist == "no"


def foreign(text):
    """What a file does to the pictures of whoever imports it: chooses a backend, or makes a figure
    that pyplot then keeps.
    """
    for n in ast.walk(ast.parse(text)):
        if isinstance(n, ast.Attribute) and n.attr in ("use", "switch_backend"):
            yield from {ast.unparse(n)} & {"matplotlib.use", "plt.switch_backend", "mpl.use"}
        if isinstance(n, ast.Attribute) and n.attr in ("figure", "subplots", "gcf", "gca"):
            yield from [ast.unparse(n)] * (ast.unparse(n.value).split(".")[-1] in ("plt", "pyplot"))


def test_nobody_touches_the_pictures_of_who_imports_it():
    files = [*ROOT.glob("*.py"), *(p for p in ROOT.glob("*/*.py") if p.parent.name != "tests")]
    assert len(files) > 80
    found = {p.name: [*foreign(p.read_text(encoding="utf-8"))] for p in files}
    assert not {name: what for name, what in found.items() if what}


def test_this_file_can_fail():
    assert len(list(foreign("matplotlib.use('Agg')\nplot.plt.subplots()\nplt.figure()"))) == 3
    assert not list(foreign("fig.subplots()\nplot.sheet()\nplot.figure([])"))
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
        text + "\nlong = (\n    1\n)  # what it is\n",
    ):
        assert faults("mamba", broken)
