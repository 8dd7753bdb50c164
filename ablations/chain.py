"""
A small chain of post-training, and what a model then answers: what cells of its figures do.

    SETTINGS                      everything that matters, pinned; 0.3 M parameters
    answers(settings, seed)       a cell: fine-tuning (sft.py); then practice of the tasks named in
                                  `practice` (grpo.py); then, if asked, healing (heal.py)

Of a cell `right` is the share of held-out questions answered right, `accepted` the tokens of a
reply that a round of 5 drafts yields, both means over the seven kinds of question. Beside them
stand the kinds: `third off`, `third off, tokens`, and so on. `reward` is practice's, a curve.
Variants of one seed have the same fine-tuned model, and practise with draws of their own. It is
kept in runs/ablations: the first cell that asks for it pays for it, unless the code is another.
Asked is only the model at a cell's end: answers on the way cost time and change nothing.

Not here  these runs as commands, and their own receipts: receipts/post
"""

import contextlib
import os
import tempfile
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from unittest import mock

import checkpoint
import disk
import grpo
import heal
import sample
import sft
import train
from ablations.figure import digest, read
from config import PRESETS
from post import picture, practice, rollout, tasks

MODEL = {k: v for k, v in PRESETS["mini"].items() if k != "vocab_size"}  # the tokenizer says it
TUNING = dict(
    tasks="sort,third,make,call",
    tokenizer="bpe:320",
    steps=300,
    stage2=60,
    batch=48,
    length=256,
    lr=4e-3,
    lr_min=4e-4,
    warmup=0.05,
    decay=0.3,
    mtp_loss=0.3,
    balance=1e-4,
    bias_rate=1e-3,
)
PRACTICE = dict(
    steps=200,
    prompts=24,
    group=8,
    lr=2e-4,
    clip=50.0,
    penalty=-5.0,
    truncate=5.0,
    threshold=2.0,
    lag=0,
)
HEALING = dict(steps=128, texts=1024, length=128, batch=16, lr=1e-3)
SETTINGS = {f"sft.{k}": x for k, x in TUNING.items()} | {
    f"grpo.{k}": x for k, x in PRACTICE.items()
}
SETTINGS |= {f"heal.{k}": x for k, x in HEALING.items()}
SETTINGS |= MODEL | dict(practice="", heal=False, questions=100)
QUICK = {"sft.steps": 10, "sft.stage2": 2, "sft.batch": 12, "grpo.steps": 2, "grpo.prompts": 4}
QUICK |= {"heal.steps": 4, "heal.texts": 64, "questions": 4}
ALL = "sort,third,make,call"  # to practise
KINDS = "right", "tokens", "formed", "accepted"
TUNED = Path("runs") / "ablations" / "tuned"  # a folder for each fine-tuned model
quiet = lambda line: None


def part(settings, of):
    """The settings whose names begin with `of`."""
    return {k.removeprefix(of): x for k, x in settings.items() if k.startswith(of)}


def tuned(settings, seed):
    """A fine-tuned run's folder, which a cell before may have made."""
    model = ",".join(f"{name}={settings[name]}" for name in MODEL)
    own = part(settings, "sft.")
    rare = dict(eval_every=own["steps"], save_every=own["steps"], questions=1)
    here = dict(name="sft", preset="mini", model=model, device="cpu", threads=1)
    run = sft.Run(**own, **rare, **here, seed=seed)
    code = disk.sources()["sources_sha256"], metadata.version("torch")
    kept = TUNED / digest([asdict(run), code])
    if not kept.is_dir():
        TUNED.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=TUNED) as out:
            run = replace(run, out=out)
            train.fit(run, say=quiet, work=sft.Talks())
            with contextlib.suppress(OSError):  # a neighbour was faster, with the same model
                os.replace(run.folder(), kept)
    return kept


def practised(settings, seed, out, base):
    """A run's folder after practice, and its log."""
    own = part(settings, "grpo.") | dict(tasks=settings["practice"])
    rare = dict(eval_every=own["steps"], save_every=own["steps"], questions=settings["questions"])
    here = dict(name="grpo", out=out, base=str(base), device="cpu", threads=1)
    run = grpo.Run(**own, **rare, **here, seed=seed)
    unasked = mock.patch.object(practice.Practice, "evaluate", lambda self, say: {})
    with unasked, mock.patch.object(picture, "grpo", lambda folder: None):
        return Path(run.folder()), grpo.fit(run, say=quiet)[1]


def healed(settings, folder):
    """Rows of what drafts yield, once the MTP block has learned from the model's own replies."""
    a = heal.Flags(run=str(folder), device="cpu", **part(settings, "heal."))
    saved = checkpoint.read(folder)
    model, enc, _ = sample.load_run(folder)
    questions = saved["run"]["tasks"]
    _, (ids, *documents) = heal.talking(a, saved, model, enc, questions)
    for _ in heal.heal(model, ids, a.steps, a.lr, a.batch, a.seed, *documents):
        pass
    n = min(60, settings["questions"])
    got = rollout.drafted(model, enc, tasks.mixture(questions), n=n, seed=a.seed)
    return [dict(task=task, mode=mode, accepted=x) for (task, mode), x in got.items()]


def asked(settings, folder):
    """Rows of what a fine-tuned model answers, as sft.py writes them."""
    model, enc, _ = sample.load_run(folder)
    mixture = tasks.mixture(settings["sft.tasks"])
    return rollout.report(model, enc, mixture, settings["questions"], sft.Run().room, quiet)


def answers(settings, seed):
    """A cell."""
    folder, log = tuned(settings, seed), []
    with tempfile.TemporaryDirectory() as out:
        if settings["practice"]:
            folder, log = practised(settings, seed, out, folder)
        if settings["heal"]:
            rows = healed(settings, folder)
        else:
            rows = read(folder / "answers.csv") if log else asked(settings, folder)
    found = means(rows)
    log = [row for row in log if row["step"]]
    if log:
        spent = {name: sum(row[name] for row in log) for name in ("generating", "updating")}
        found |= dict(spent, reward=[(row["step"], row["reward"]) for row in log])
    return found


def means(rows):
    """Rows of single kinds of question -> columns, their means among them."""
    found = {}
    for name in KINDS:
        each = {f"{r['task']} {r['mode']}": r.get(name, "") for r in rows}
        known = {kind: float(x) for kind, x in each.items() if x != ""}
        if known and name in ("right", "accepted"):
            found[name] = sum(known.values()) / len(known)
        found |= {kind + f", {name}" * (name != "right"): x for kind, x in known.items()}
    return found
