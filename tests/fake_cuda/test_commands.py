"""
sft.py, grpo.py, heal.py and sample.py --chat by their commands, one after the other, on a card and
on a Mac that are not there. In fp32 their first numbers are the CPU's.

Fails if  an evaluation of sft.py forgets the run's cast: experts then go through a loop where
          F.grouped_mm was said; a step of it waits for the card (ids copied from ordinary memory
          do); a command stays on the CPU (heal.py that drops --device does)
Not here  the device of a generator: this card takes the CPU's, a real one would not
"""

from dataclasses import replace

import card
import pytest
import torch
from test_post import CONFIG

import chat
import checkpoint
import data
import disk
import grpo
import heal
import hf
import sample
import sft
import train
from model import Nemotron

THERE = card.THERE.type
QUICK = "--threads 1 --tasks sort --questions 2 --room 6 --length 192".split()
SFT = "--batch 4 --steps 4 --stage2 1 --eval-every 4 --log-every 4".split()
GRPO = "--steps 2 --prompts 2 --group 3 --eval-every 2 --log-every 1".split()
HEAL = "--steps 2 --texts 4 --length 192 --batch 2 --tasks sort".split()
SAY = "--chat --prompt sort --max-new-tokens 5 --temperature 0".split()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small model in the released layout, with a tokenizer that knows the template's tokens."""
    enc = chat.with_special(data.tokenizer("bytes"))
    config = replace(CONFIG, vocab_size=data.vocab_size(enc), num_nextn_predict_layers=1)
    where = tmp_path_factory.mktemp("released") / "small"
    hf.save(Nemotron(config, seed=5), where, enc=enc)
    return where


def tuned(released, where, *flags, name="sft"):
    """sft.py -> its log."""
    begin = ["--hf", str(released), "--out", str(where), "--name", name]
    sft.main([*begin, *QUICK, *SFT, *flags])
    return disk.read_log(where / name / "log.csv")


def looped(counted):
    return [at for at, what in counted.waits if at.startswith("latent_moe") and what == "tolist"]


@pytest.fixture(scope="module")
def runs(released, tmp_path_factory):
    """sft.py's run, on the CPU, which the others go on from."""
    where = tmp_path_factory.mktemp("runs")
    tuned(released, where, "--device", "cpu")
    return where


def test_tuning_is_the_cpus(released, runs, tmp_path, counted, capsys):
    there = tuned(released, tmp_path, "--precision", "fp32")
    assert f"device     {THERE} (" in capsys.readouterr().out
    for a, b in zip(disk.read_log(runs / "sft/log.csv"), there, strict=True):
        assert a["train_nats"] == pytest.approx(b["train_nats"], abs=1e-3)
        assert a["sort-off-tokens"] == b["sort-off-tokens"]
    if THERE == "cuda":  # fp32's loop over experts waits, and is named
        assert looped(counted)


def test_tuning_in_bf16_begins_as_the_cpus(released, runs, tmp_path, counted):
    there = tuned(released, tmp_path, "--precision", "bf16", "--steps", "1")
    (here, *_), (first,) = disk.read_log(runs / "sft/log.csv"), there
    assert first["train_nats"] == pytest.approx(here["train_nats"], abs=3e-2)
    assert counted.launches


@pytest.mark.skipif(THERE == "mps", reason="counts the waits of a CUDA card")
def test_tuning_waits_for_nothing_between_lines(released, tmp_path, counted, capsys, monkeypatch):
    """Nor does its evaluation take the loop over experts: it rounds as the training does."""
    stock, marks = train.gradient, []

    def gradient(*args):
        marks.append(sum(counted.waits.values()))
        return stock(*args)

    monkeypatch.setattr(train, "gradient", gradient)
    tuned(released, tmp_path)
    said = capsys.readouterr().out
    assert "bf16 autocast" in said and "experts      F.grouped_mm" in said
    assert marks[3] == marks[2] == marks[1], counted.story()  # the first step has a line
    assert not looped(counted), counted.story()


def test_practice_is_the_cpus(runs, tmp_path, counted):
    """Of the first update: a later one's replies may be others, by a last digit."""
    logs = []
    for device in ("cpu", "auto"):
        assert not counted.launches
        base = ["--base", str(runs / "sft"), "--out", str(tmp_path), "--name", device]
        grpo.main([*base, *QUICK, *GRPO, "--device", device])
        logs.append(disk.read_log(tmp_path / device / "log.csv"))
    assert counted.launches
    here, there = logs
    assert [r["step"] for r in here] == [r["step"] for r in there] == [0, 1, 2]
    for k in ("reward", "tokens", "malformed", "norm"):
        assert here[1][k] == pytest.approx(there[1][k], abs=1e-3), k


def test_healing_by_the_command(runs, tmp_path, capsys, counted):
    """On a Mac if asked: there auto is the CPU."""
    said = []
    for device in ("cpu", THERE):
        assert not counted.launches
        out = ["--out", str(tmp_path / device), "--device", device]
        heal.main(["--run", str(runs / "sft"), *out, *HEAL])
        said.append(capsys.readouterr().out)
        before, after = (checkpoint.read(p)["model"] for p in (runs / "sft", tmp_path / device))
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        assert moved and all(n.startswith("mtp.") for n in moved)
    assert counted.launches
    first = [next(s for s in text.splitlines() if s.startswith("before")) for text in said]
    assert first[0] == first[1]


@pytest.mark.parametrize("more", [[], ["--speculate", "2"], ["--precision", "bf16"]], ids=str)
def test_a_conversation(runs, capsys, counted, more):
    said = []
    for device in ("cpu", THERE):
        assert not counted.launches
        sample.main(["--run", str(runs / "sft"), *SAY, "--device", device, *more])
        said.append(capsys.readouterr().out)
    assert counted.launches
    assert said[0].startswith(chat.THINK) and (said[0] == said[1] or "bf16" in more)
