"""Training on a card that is not there: every precision, by the paths that were named."""

import json

import card
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import latent_moe
import sample
import train

QUICK = dict(batch=2, length=32, log_every=1, eval_every=100, eval_tokens=64, tokenizer="bytes")
PLAIN = dict(prompt="", worth=False, name="run", model="hybrid_override_pattern=MEM*E")


def fitted(tmp_path, text, **more):
    """A short run -> its model, rows and lines."""
    said = []
    how = {**QUICK, **PLAIN, "steps": 2, "data": str(text), "out": str(tmp_path), **more}
    model, rows = train.fit(train.Run(**how), say=said.append)
    return model, rows, "\n".join(said)


def looped():
    """Where rows of experts went through a loop, which reads how many there are."""
    return [at for at, what in card.CARD.waits if at.startswith("latent_moe") and what == "tolist"]


def test_what_cuda_would_refuse_is_refused(counted):
    x, w = torch.randn(4, 8, device="cuda"), torch.randn(2, 8, 16, device="cuda")
    ends = torch.tensor([0, 4], dtype=torch.int32).to("cuda")
    square = torch.randn(8, 8, device="cuda").bfloat16()
    for call in (
        lambda: x + torch.zeros(8),
        lambda: x.index_select(0, torch.tensor([1])),
        lambda: F.grouped_mm(x, w, offs=ends),  # fp32
        lambda: F.grouped_mm(square, square, offs=ends * 2),  # an empty group along the sum
    ):
        with pytest.raises((RuntimeError, AssertionError)):
            call()


def test_what_would_wait_is_counted(counted):
    x = torch.zeros(3, device="cuda")
    assert not counted.waits
    ordinary, pinned = torch.zeros(3), torch.zeros(3).pin_memory()
    pinned.to("cuda", non_blocking=True)
    assert not +counted.waits
    for call in (
        lambda: x.tolist(),
        lambda: float(x[0]),
        lambda: x.cpu(),
        lambda: ordinary.to("cuda"),
        lambda: pinned.to("cuda"),
        lambda: x[x > 0],
        lambda: bool(x.any()),
        lambda: torch.tensor([1.0], device="cuda"),
    ):
        counted.reset()
        call()
        assert sum(counted.waits.values()) == 1, counted.story()


@pytest.mark.parametrize(
    "precision",
    ["auto", "fp32", "fp16", "nvfp4", "nvfp4-2d-rht-sr-last", "mxfp4-last", "mxfp8-last"],
)
def test_every_precision_goes_where_it_says(counted, tmp_path, text, precision):
    _, rows, said = fitted(tmp_path, text, precision=precision, diagnose="4" in precision)
    assert "device     cuda (CUDA found)" in said and torch.tensor(rows[-1]["train_nats"]) < 7
    loop = precision in ("fp32", "fp16")
    assert ("a loop (F.grouped_mm does not take" in said) is loop
    assert bool(looped()) is loop, looped()
    assert bool(counted.grouped) is not loop


def test_fp32_on_the_card_is_the_cpus(tmp_path, text):
    rows = [
        fitted(tmp_path, text, name=d, device=d, precision="fp32", steps=3)[1]
        for d in ("cpu", "cuda")
    ]
    for here, there in zip(*rows):
        assert abs(here["train_nats"] - there["train_nats"]) < 1e-4
        assert abs(here["grad_norm"] - there["grad_norm"]) < 1e-3 * here["grad_norm"]


def test_a_run_that_was_stopped_goes_on(tmp_path, text):
    how = dict(steps=4, save_every=2, precision="nvfp4")
    whole = fitted(tmp_path, text, name="whole", **how)[1]
    fitted(tmp_path, text, **how, stop=2)
    rest = fitted(tmp_path, text, **how, resume=True)[1]
    nats = lambda rows: [r["train_nats"] for r in rows]
    assert nats(rest)[2:] == nats(whole)[2:] and len(rest) == 4


@pytest.mark.parametrize("more", [{}, dict(precision="nvfp4", diagnose=True), dict(micro=1)])
def test_nobody_waits_between_lines(counted, tmp_path, text, monkeypatch, more):
    """Nor to find NaN: the step is read with the others, before a line and before a save."""
    stock, steps = train.gradient, []

    def gradient(*args):
        steps.append(sum(counted.waits.values()))
        return stock(*args)

    monkeypatch.setattr(train, "gradient", gradient)
    fitted(tmp_path, text, steps=4, log_every=4, **more)
    assert steps[3] == steps[2] == steps[1], counted.story()  # the first step has a line


@pytest.mark.parametrize("more", [{}, dict(micro=1)], ids=str)
def test_a_captured_step_is_the_step_itself(counted, tmp_path, text, monkeypatch, more):
    """Bit for bit. Between two lines the host starts the graph, the optimiser and what moves the
    routers' biases: a fifth of the launches, and it waits for nothing.
    """
    stock, marks, rows, costs, loads = latent_moe.update_bias, [], [], [], []

    def mark(model, rate):
        loads.append([m.load.held.tolist() for m in latent_moe.layers(model)])
        totals = counted.launches, counted.waits
        marks.append([counted.replays, *(sum(x.values()) for x in totals)])
        return stock(model, rate)

    monkeypatch.setattr(latent_moe, "update_bias", mark)
    for capture in (False, True):
        how = dict(name=str(capture), steps=4, log_every=4, capture=capture, **more)
        rows += fitted(tmp_path, text, **how)[1]
        costs.append([b - a for a, b in zip(*marks[-3:-1])])
    for row in rows:
        del row["seconds"], row["tokens_per_second"]
    assert rows[:2] == rows[2:] and loads[:4] == loads[4:]
    (_, plain, _), captured = costs
    print("launches of a step:", costs)
    assert captured[0] == 1 and captured[2] == 0 and captured[1] < plain / 5, costs


@pytest.mark.parametrize(
    "more, why",
    [
        (dict(precision="fp32"), "experts' products in float32 wait for a Fake H100"),
        (dict(precision="fp16"), "experts' products in float16 wait for a Fake H100"),
        (dict(precision="nvfp4"), "--capture with --precision nvfp4"),
        (dict(device="cpu"), "for one process on CUDA"),
    ],
)
def test_a_step_that_cannot_be_captured_is_refused(tmp_path, text, more, why):
    with pytest.raises(ValueError, match=why):
        fitted(tmp_path, text, capture=True, **more)
    assert not (tmp_path / "run" / "config.json").exists()


def test_not_a_number_is_found_at_the_next_line(tmp_path, text, monkeypatch):
    stock, steps = latent_moe.update_bias, []

    def poison(model, rate):
        steps.append(0)
        if len(steps) == 3:
            model.backbone.norm_f.weight.data.fill_(torch.nan)
        return stock(model, rate)

    monkeypatch.setattr(latent_moe, "update_bias", poison)
    with pytest.raises(
        FloatingPointError, match="step 4: loss nan.* steps 4 to 6 are lost. No check"
    ):
        fitted(tmp_path, text, steps=8, log_every=100, save_every=6)
    assert not list((tmp_path / "run" / "ckpt").iterdir())


def test_a_checkpoint_asks_once_whether_all_is_finite(counted):
    held = dict(model=[torch.ones(3, device="cuda") for _ in range(5)], here=torch.ones(2))
    counted.reset()
    assert checkpoint.spoiled(held) == "" and sum(counted.waits.values()) == 1, counted.story()
    held["model"][3][1] = held["here"][0] = torch.nan
    assert checkpoint.spoiled(held) == "model.3 (1 of 3 numbers)"


def test_a_small_card_takes_fewer_at_once(tmp_path, text, monkeypatch):
    monkeypatch.setattr(card.Properties, "total_memory", 90_000_000)
    fitted(tmp_path, text, batch=8, length=64, steps=1)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert kept["micro"] == 4


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A run's folder."""
    where = tmp_path_factory.mktemp("runs")
    fitted(where, text, steps=1)
    return where / "run"


def sampled(run, capsys, *flags):
    """sample.py -> its text and what it says beside."""
    asked = ["--run", str(run), "--prompt", "def ", "--max-new-tokens", "6", "--temperature", "0"]
    sample.main([*asked, *flags])
    return capsys.readouterr()


def test_a_run_is_sampled_by_the_command(counted, run, capsys):
    texts = []
    for more in ([], ["--compile"]):
        counted.reset()
        texts.append(sampled(run, capsys, "--precision", "bf16", *more).out)
        assert counted.replays == (5 if more else 0)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "more",
    [
        "--speculate 3",
        "--speculate auto",
        "--compile",
        "--compile --speculate 3",
        "--prefill 2",
        "--prompt-tokens 40",
        "--state fp16:5",
    ],
)
def test_a_run_is_sampled_as_on_the_cpu(counted, run, capsys, more):
    here = sampled(run, capsys, "--device", "cpu", *more.replace("--compile", "").split())
    assert not counted.launches
    there = sampled(run, capsys, *more.split())
    assert counted.launches and bool(counted.replays) is ("--compile" in more)
    assert here.out == there.out
