"""The breaker: bad inputs by the thousand, and how programs and the library take them.

    python -m pytest tests/test_breaker.py -m slow -s    counts them; the last four columns: 0

Inputs of programs come from inputs.py: every flag, every field of the files that are read, files
cut short, and some in processes of their own. Inputs of the library are tensors of every dtype,
zeros, infinities and NaN among them: what comes out is finite or a ValueError.
"""

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import (
    CHANGES,
    PROGRAMS,
    TINY,
    Input,
    awkward,
    configs,
    damaged,
    flags,
    indices,
    overrides,
    released,
    tokenizers,
    tried,
)

import bounds
import data
import decode
import heal
import hf
import latent_moe
import mtp
import nvfp4
import plot
import sample
import train
from config import Config
from model import Nemotron
from scale import budget
from speculate import accept

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("clean", "traceback", "hang", "silent", "wrong exit")


def counted(groups, report):
    """{group: Counter of KINDS}, and a line for each input that is not clean."""
    table = {}
    for name, inputs in groups.items():
        table[name] = Counter()
        for given in inputs:
            how, said = tried(given)
            table[name][how] += 1
            if how != "clean":
                report.append(f"{name}: {given.what}: {how}: {said}")
    return table


def shown(table):
    lines = [f"{'':24}" + "".join(f"{k:>12}" for k in KINDS)]
    total = sum(table.values(), Counter())
    for name, row in [*table.items(), ("total", total)]:
        lines.append(f"{name:24}" + "".join(f"{row[k]:12,}" for k in KINDS))
    return "\n".join(lines), total


def a_run(folder):
    """A trained run of one step."""
    folder.mkdir()
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    text = f"--out {folder} --name t --data {folder}/text.txt --tokenizer bytes --steps 1 --batch 2"
    more = " --length 16"
    more += (
        " --eval-tokens 96 --threads 1 --prompt= --log-every 1 --save-every 1 --model " + CHANGES
    )
    train.cli((text + more).split())
    return folder / "t"


def runs(folder):
    """train.py --resume, sample.py, heal.py and plot.py on a run whose files are damaged."""
    run = a_run(folder)
    config, log = run / "config.json", run / "log.csv"
    good, rows = json.loads(config.read_text()), log.read_text()
    resume = ["--out", str(folder), "--name", "t", "--resume", "--steps", "1"]

    def use(path, content, main, argv):
        before = path.read_text()
        path.write_text(content)
        try:
            main(argv)
        finally:
            path.write_text(before)

    odd = (None, "x", -1, 1.5, [], {}, True, 10**20)
    replaced = {"name", "out", "steps", "resume", "merge", "stop", "from_step"}  # by flags
    for f in fields(train.Run):
        for x in odd if f.name not in replaced else ():
            if bounds.fault(f, x):  # what is allowed would train
                text = json.dumps(good | dict(run=good["run"] | {f.name: x}))
                yield Input(f"run.{f.name}={x!r}", lambda t=text: use(config, t, train.cli, resume))
    for text in ("", "{", "[]", '{"run": null}', '{"run": []}', '{"run": {"turbo": 1}}'):
        yield Input(f"config {text}", lambda t=text: use(config, t, train.cli, resume))
    for text in ("", "step\n", "step,train_nats\n1,2\n", "a\n1\n", rows * 2, rows + "x,y\n", "\0"):
        where = (plot.main, [str(run)])
        yield Input(f"log.csv {text[:9]!r}", lambda t=text: use(log, t, *where), (0, 2))
    (saved,) = (run / "ckpt").glob("step-*.pt")
    say = ["--run", str(run), "--max-new-tokens", "1", "--device", "cpu"]
    for given in damaged(saved, sample.main, say, 20):
        yield given._replace(codes=(2,))


def places(folder):
    """Paths that are folders, missing, forbidden, odd."""
    (folder / "here").mkdir()
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 100)
    (folder / "empty.txt").write_bytes(b"")
    for path in ("here", "nowhere", "latin.txt", "empty.txt", "here/x", "\u00fc b", "~", "*"):
        p = str(folder / path)
        base = ["--out", str(folder / "o"), "--name", "n", "--steps", "1", "--threads", "1"]
        yield Input(f"--data {path}", lambda p=p, b=base: train.cli([*b, "--data", p]))
        base += ["--data", "copy"]
        yield Input(f"--tokenizer {path}", lambda p=p, b=base: train.cli([*b, "--tokenizer", p]))
        for main, flag in ((sample.main, "--run"), (sample.main, "--hf"), (heal.main, "--run")):
            more = ["--out", str(folder / "h")] if main is heal.main else []
            yield Input(f"{flag} {path}", lambda p=p, m=main, f=flag, o=more: m([f, p, *o]))
        yield Input(f"hf {path}", lambda p=p: hf.main([p]))
        yield Input(f"plot {path}", lambda p=p: plot.main([p]))


def processes(folder):
    """A few of all kinds, as a shell starts them."""

    def start(argv, codes, stdin="", **env):
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            timeout=120,
            text=True,
            errors="replace",
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        sys.stderr.write(done.stderr)
        sys.stdout.write(done.stdout)
        sys.exit(done.returncode)

    narrow = dict(PYTHONIOENCODING="cp1252")
    for argv, codes, env in (
        (["train.py", "--clip", "-1"], (2,), {}),
        (["train.py", "--data", ""], (2,), narrow),
        (["sample.py", "--run", str(folder / "\u00fc \u4e2d")], (2,), narrow),
        (["hf.py", str(folder / "no")], (2,), {}),
        (["model.py", "--preset", "toy"], (0,), narrow),
        (["mtp.py", "--steps", "3"], (2,), {}),
        (["config.py"], (0,), narrow),
        (["-m", "scale.budget", "--length", "-5"], (2,), {}),
        (["-m", "scale.release", "--adopt", "a", "b"], (2,), {}),
        (["plot.py", str(folder)], (2,), narrow),
    ):
        yield Input(" ".join(argv), lambda a=argv, c=codes, e=env: start(a, c, **e), codes)


@pytest.mark.slow
def test_programs(tmp_path, monkeypatch, capsys):
    """At least 1,500 inputs: none is a traceback, a hang, a silence or a wrong exit."""
    import contextlib
    import io

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "quicken", lambda: None)
    with contextlib.redirect_stdout(io.StringIO()):
        folder, other = released(tmp_path / "hf"), released(tmp_path / "hf2")
    show = ["--hf", str(folder), "--max-new-tokens", "1", "--temperature", "0", "--device", "cpu"]
    groups = {f"flags of {name}": flags(name) for name in PROGRAMS}
    groups["--model"] = overrides(tmp_path)
    groups["config.json"] = configs(folder)
    groups["safetensors"] = damaged(folder / "model.safetensors", hf.main, [str(folder)])
    groups["index.json"] = indices(other)
    groups["tokenizer.json"] = tokenizers(folder)
    groups["a run's files"] = runs(tmp_path / "runs")
    groups["paths"] = places(tmp_path)
    groups["processes"] = processes(tmp_path)
    assert tried(Input("", lambda: sample.main(show), (0,)))[0] == "clean"
    report = []
    text, total = shown(counted(groups, report))
    with capsys.disabled():
        print("\n" + text, *report, sep="\n")
    assert total.total() >= 1500 and total["clean"] == total.total(), report


# ---- the library


def sound(y):
    """Whether every number of it is finite; nested results too."""
    if isinstance(y, (tuple, list)):
        return all(map(sound, y))
    if isinstance(y, dict):
        return all(map(sound, y.values()))
    if torch.is_tensor(y) and y.is_floating_point():
        return bool(y.double().isfinite().all())
    return not isinstance(y, float) or math.isfinite(y)


def calls(g, r, model):
    """Calls of the library with awkward numbers: (name, call, whether what goes in is finite)."""
    x, finite = awkward(g)
    wide = x.abs().max() < 3e38 if finite else True
    yield "nvfp4.quantize", lambda: nvfp4.dequantize(nvfp4.quantize(x)), finite
    yield "nvfp4.export_weight", lambda: nvfp4.export_weight(x, r.choice(["max", "mse"])), finite
    yield (
        "nvfp4.export_fp8",
        lambda: (lambda w, s: (w.float() * s, s))(*nvfp4.export_fp8(x)),
        finite,
    )
    if finite and wide:
        element, tile = r.choice(["mxfp4", "mxfp8"]), (1, 16)
        yield "nvfp4.mx", lambda: nvfp4.mx(x, tile, element), True
        yield "nvfp4.hadamard", lambda: nvfp4.hadamard(x), bool(x.abs().max() < 1e4)
    logits = x.float().clamp(-1e30, 1e30) if finite else x.float()
    heat = r.choice([0, 1e-45, 1e-300, 1e-40, 1e-5, 1.0, 1e5])
    cut = r.choice([1e-300, 1e-5, 0.5, 1.0]), r.choice([0, 1, 3, 10**9])
    if finite:
        yield "decode.choose", lambda: decode.choose(logits, heat, *cut), True
        yield "decode.probabilities", lambda: decode.probabilities(logits, heat or 1.0, *cut), True
        score = logits.abs().clamp(max=1)[None] * r.choice([0.0, 1e-40, 1.0])
        k = r.choice([1, 2, 16])
        yield "latent_moe.sequence_balance", lambda: latent_moe.sequence_balance(score, k), True
        mask = torch.rand(1, len(x), generator=g) < r.choice([0.0, 0.5, 1.0])
        goal = torch.zeros(1, len(x), dtype=torch.long)
        yield "mtp.nll", lambda: mtp.nll(logits[None], goal, mask), bool(logits.abs().max() < 1e8)
        yield "mtp.counts", lambda: mtp.counts(mask, r.choice([0, 1, 5, 64])), True
        p = decode.probabilities(logits)[None].expand(2, -1, -1)
        d = r.choice([0, 1, min(3, len(x) - 1)]) if len(x) > 1 else 0
        drafts = torch.randint(x.shape[1], (2, d), generator=g)
        if d:
            q = p[:, :d]
            yield "speculate.accept", lambda: accept(drafts, q, p[:, : d + 1]), True
    ids = r.choice(
        [[[1]], [[1, 2], [3]], [[]], [], [[1.5]], [[-1]], [[10**9]], [["a"]], [[True]], [[None]]]
    )
    how = dict(
        temperature=r.choice([0, 1e-40, 1.0, -1, math.nan, math.inf]), seed=r.choice([None, 0])
    )
    how |= dict(speculate=r.choice([0, 0, 1]), top_k=r.choice([0, 1, math.nan, 1.5]))
    yield (
        "sample.generate",
        lambda: sample.generate(model, ids, r.choice([0, 1, 2, -1]), **how),
        True,
    )
    n, length = r.choice([0, 1, 2, 9, 100]), r.choice([1, 2, 9, 200])
    tokens = np.arange(n, dtype=np.uint16)
    size, world = r.choice([0, 1, 3]), r.choice([1, 2])
    yield "data.batch", lambda: data.batch(tokens, 0, 1, size, length, 0, world), True
    yield "heal.prompts", lambda: heal.prompts(tokens, r.choice([1, 5]), length, 3), True
    c = Config.preset("toy")
    ranks, ep = r.choice([1, 2, 8]), r.choice([1, 2])
    plan = budget.Plan(
        ranks, min(ep, ranks), r.choice([1, 4, 4096]), r.choice(["", "mamba", "all"])
    )
    yield "budget.reckon", lambda: budget.reckon(plan, c), True


@pytest.mark.slow
def test_library(capsys):
    """At least 600 inputs: finite numbers give finite numbers, everything else a ValueError."""
    r, g = random.Random(0), torch.Generator().manual_seed(0)
    model = Nemotron(Config(**TINY)).eval()
    table, report = {}, []
    for _ in range(70):
        for name, call, finite in calls(g, r, model):
            row = table.setdefault(name, Counter())
            try:
                how = (
                    "clean"
                    if sound(call()) or not finite and name == "nvfp4.hadamard"
                    else "silent"
                )
            except (ValueError, FloatingPointError):
                how = "clean"
            except Exception as e:
                how = "traceback"
                report.append(f"{name}: {type(e).__name__}: {e}")
            row[how] += 1
            if how == "silent":
                report.append(f"{name}: silent")
    text, total = shown(table)
    with capsys.disabled():
        print("\n" + text, *sorted(set(report)), sep="\n")
    assert total.total() >= 600 and total["clean"] == total.total(), report


def test_this_file_can_fail():
    assert not sound((torch.ones(1), dict(a=torch.tensor([math.nan]))))
    assert not sound(math.inf) and sound(torch.ones(2, dtype=torch.long)) and F is not None
    table = dict(a=Counter(clean=2, hang=1))
    assert shown(table)[1]["hang"] == 1
