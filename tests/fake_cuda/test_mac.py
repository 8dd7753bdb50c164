"""What a Mac can run on its GPU runs; the rest is refused in one sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_post import CONFIG, updated

import heal
import sample
import train
from model import Nemotron
from post import rollout

ROOT = Path(__file__).resolve().parents[2]
SIZES = "hybrid_override_pattern=MEM*E"
QUICK = dict(batch=2, length=32, log_every=1, eval_every=100, eval_tokens=64, tokenizer="bytes")
PLAIN = dict(prompt="", worth=False, name="run", model=SIZES)


def fitted(tmp_path, text, **more):
    """A short run -> its rows and lines."""
    said = []
    how = {**QUICK, **PLAIN, "steps": 2, "data": str(text), "out": str(tmp_path), **more}
    _, rows = train.fit(train.Run(**how), say=said.append)
    return rows, "\n".join(said)


def test_what_a_mac_would_refuse_is_refused():
    x = torch.zeros(3, device="mps")
    for call, why in (
        (lambda: x.double(), "float64"),
        (lambda: torch.zeros(3, dtype=torch.float64).to("mps"), "float64"),
        (lambda: x.to(torch.float8_e4m3fn), "float8"),
        (lambda: x + torch.zeros(3), "two devices"),
        (lambda: torch.linalg.eigvals(torch.eye(3, device="mps")), "not currently implemented"),
    ):
        with pytest.raises((TypeError, RuntimeError), match=why):
            call()
    assert (x + 1).device.type == "mps" and (x.cpu().double() == 0).all()


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_the_default_run_of_few_steps(tmp_path, text, precision):
    """On MPS by itself; its numbers are the CPU's. Of bf16 only the first step can say so: after an
    update, another order of sums is as far away as fp32 is (0.03 nats, over six seeds).
    """
    runs = []
    for device in ("auto", "cpu"):
        rows, said = fitted(tmp_path, text, name=device, device=device, precision=precision)
        runs.append(rows)
        assert device == "cpu" or "device     mps (no CUDA, Apple's MPS found)" in said
    near = [1e-4, 1e-4] if precision == "auto" else [1e-2, 0.2]
    for there, here, limit in zip(*runs, near, strict=True):
        assert there["train_nats"] == pytest.approx(here["train_nats"], abs=limit)
        assert there["grad_norm"] == pytest.approx(here["grad_norm"], rel=10 * limit)


def test_a_run_goes_on_is_diagnosed_and_merged(tmp_path, text):
    how = dict(steps=4, save_every=2, diagnose=True, model=SIZES.replace("*", ""))
    whole, _ = fitted(tmp_path, text, name="whole", **how)
    fitted(tmp_path, text, **how, stop=2)
    rest, _ = fitted(tmp_path, text, **how, resume=True)
    assert [r["train_nats"] for r in rest][2:] == [r["train_nats"] for r in whole][2:]
    train.merge(train.Run(**{**json_of(tmp_path / "run"), "merge": 2}), say=lambda line: None)


def json_of(folder):
    return json.loads((folder / "config.json").read_text())["run"]


@pytest.mark.parametrize("more", [{}, dict(speculate="2"), dict(temperature="1", seed="0")])
def test_a_run_is_sampled(tmp_path, text, capsys, more):
    fitted(tmp_path, text)
    flags = [x for k, v in more.items() for x in (f"--{k}", v)]
    asked = ["--run", str(tmp_path / "run"), "--prompt", "def ", "--max-new-tokens", "6", *flags]
    said = []
    for device in ("mps", "cpu"):
        sample.main(
            [*asked, "--device", device, *([] if more.get("seed") else ["--temperature=0"])]
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] or more.get("seed")


def test_healing_is_the_cpus():
    config = replace(CONFIG, num_nextn_predict_layers=1)
    ids = torch.randint(64, (4, 20), generator=torch.Generator().manual_seed(0))
    here, there = (
        list(heal.heal(Nemotron(config, 0).to(d), ids, 2, batch=2)) for d in ("cpu", "mps")
    )
    for a, b in zip(here, there):
        assert a.nats == pytest.approx(b.nats, abs=1e-4)


@pytest.mark.parametrize(
    "more, why",
    [
        *[(dict(precision=p), "Apple's MPS has no float8") for p in ("nvfp4", "mxfp4", "mxfp8")],
        (dict(fast=True), "--fast needs a CUDA GPU"),
        (dict(fast=True, device="mps"), "--fast needs a CUDA GPU"),
    ],
)
def test_what_a_mac_cannot_is_said_at_once(tmp_path, text, more, why):
    with pytest.raises(ValueError, match=why):
        fitted(tmp_path, text, **more)
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_update_of_grpo_is_the_cpus():
    here, there = (updated(device, 1, True) for device in ("cpu", "mps"))
    for name, x in here.items():
        assert there[name] == (x if x == "" else pytest.approx(x, abs=1e-5))


def test_replies_are_drawn_there():
    model = Nemotron(CONFIG).to("mps").eval()
    draw = torch.Generator("mps").manual_seed(0)
    said = rollout.roll(model, [[1, 2, 3], [4, 5]], 2, 5, 7, draw)
    assert len(said) == 4 and all(r.reply for r in said)


def test_a_quantised_checkpoint_is_refused():
    folder = ROOT / "tests/golden/quantised/nvfp4"
    with pytest.raises(ValueError, match="is quantised: Apple's MPS has no float8"):
        sample.found(sample.Flags(hf=str(folder), device="mps"))
