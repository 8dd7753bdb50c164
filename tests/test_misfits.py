"""Files that are whole and hold what does not belong there: each is used or refused in a sentence.

misfits.py makes them, part by part, from good ones. A new part of a checkpoint, a new field of a
conversation comes into these sweeps by itself.
"""

import json

import pytest
import torch
from inputs import Input, released, tried
from misfits import checkpoints, conversations, facts, misfits, quantisations
from test_breaker import a_run

import chat
import checkpoint
import data
import decode
import heal
import latent_moe
import plot
import sample
import train
from config import Config
from model import Nemotron
from post import rollout, talks
from quant import ondisk, statecache
from scale import room
from training import journal, settings

PLAN = {"backbone.layers.0.mixer.in_proj": "NVFP4", "backbone.layers.1.mixer.o_proj": "FP8"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "run", lambda folder: None)
        patch.setattr(sample, "quicken", lambda: None)
        return a_run(tmp_path_factory.mktemp("misfits") / "runs")


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(run, monkeypatch):
    """Part by part missing, of another kind, of another version."""
    monkeypatch.setattr(sample, "quicken", lambda: None)
    resume = ["--out", str(run.parent), "--name", "t", "--resume", "--steps", "1"]
    say = ["--run", str(run), "--max-new-tokens", "1", "--device", "cpu"]
    each, refused = list(checkpoints(run, [(train.cli, resume), (sample.main, say)])), 0
    for given in each:
        how, said = tried(given)
        assert how == "clean", (given.what, how, said)
        refused += "error" in said
    assert len(each) > 60 and refused > 40


def test_counts_of_other_experts_are_refused():
    model = Nemotron(Config.preset("toy"))
    loads = torch.stack([m.load for m in latent_moe.layers(model)])
    assert journal.pending(model, torch.zeros(0)) == []
    assert torch.equal(journal.pending(model, loads + 1)[0], loads + 1)
    for other in (loads[:, 1:], loads[1:], loads[0]):
        with pytest.raises(ValueError, match="the checkpoint counts tokens of"):
            journal.pending(model, other)


def test_what_a_checkpoint_lacks_is_asked_for_in_vain():
    saved = checkpoint.Saved(dict(run=dict(data="x"), step=3), "there")
    assert saved["step"] == 3 and saved.get("model") is None and saved.setting("data") == "x"
    with pytest.raises(ValueError, match="there holds no model"):
        saved["model"]
    with pytest.raises(ValueError, match="there is of a run without a setting decay"):
        saved.setting("decay")
    with (
        pytest.raises(ValueError, match="another dtype does not fit.*size"),
        checkpoint.fitting("another dtype"),
    ):
        torch.nn.Linear(2, 2).load_state_dict(dict(weight=torch.ones(3, 2), bias=torch.ones(2)))


def test_a_quantisation_config_of_another_shape_is_refused(tmp_path):
    good, _ = ondisk.quantization_config(PLAN, ["backbone.layers.1.mixer"], 4)
    ondisk.agree(tmp_path, dict(quantization_config=good), PLAN)
    refused = 0
    for _what, config in quantisations(good):
        try:
            ondisk.agree(tmp_path, dict(quantization_config=config), PLAN)
        except ValueError:
            refused += 1
    assert refused > 80


def test_a_conversation_of_another_shape_is_refused_by_its_line(tmp_path):
    path, enc = tmp_path / "talks.jsonl", chat.with_special(data.tokenizer("bytes"))
    taken = refused = 0
    for talk in conversations():
        path.write_text(json.dumps(talk))
        try:
            for one in talks.read(path):
                chat.encode(enc, chat.parts(*one))
            taken += 1
        except ValueError as e:
            assert "line 1" in str(e)
            refused += 1
    assert taken > 50 and refused > 200


FILES = "config", "generation_config", "tokenizer", "tekken"


def test_json_nested_without_end_is_refused_wherever_it_is_read(tmp_path, monkeypatch):
    """Python's parser gives up with an exception that is no ValueError."""
    monkeypatch.setattr(sample, "quicken", lambda: None)
    folder, deep = released(tmp_path / "hf"), b"[" * 99_999
    header = len(deep).to_bytes(8, "little") + deep
    given = [(folder / f"{name}.json", deep) for name in FILES]
    given += [(folder / "model.safetensors.index.json", deep)]
    given += [(folder / "model.safetensors", header)]
    say = ["--hf", str(folder), "--max-new-tokens", "1", "--device", "cpu"]
    for path, raw in given:
        before = path.read_bytes() if path.exists() else None
        if path.stem == "tekken":
            (folder / "tokenizer.json").rename(folder / "aside")
        path.write_bytes(raw)
        how, said = tried(Input(path.name, lambda: sample.main(say)))
        assert how == "clean" and path.name in said and "is no JSON" in said, (path, how, said)
        path.unlink() if before is None else path.write_bytes(before)
        if path.stem == "tekken":
            (folder / "aside").rename(folder / "tokenizer.json")
    assert tried(Input("", lambda: sample.main(say), (0,)))[0] == "clean"


def test_a_line_of_conversations_ends_where_json_lines_end(tmp_path):
    """U+2028 and its like are letters inside a text, and end no line."""
    said = [dict(role="user", content="a\u2028b\u0085c"), dict(role="assistant", content="d")]
    talk = dict(messages=said)
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(talk, ensure_ascii=False) + "\n", encoding="utf-8")
    ((messages, _),) = talks.read(path)
    assert messages[0]["content"] == talk["messages"][0]["content"]


def test_questions_for_a_model_that_knows_no_turns_are_refused(run, tmp_path):
    flags = heal.Flags(run=str(run), out=str(tmp_path / "h"), tasks="sort", steps=1, texts=2)
    with pytest.raises(ValueError, match="knows no <.im_end.>"):
        heal.work(flags)


def test_numbers_too_large_to_draw_are_left_out():
    rows = [dict(step=1, y=10**400), dict(step=2, y=3.0), dict(step=3, y=float("nan"))]
    assert plot.points(rows, "y") == ([2], [3.0])


def test_a_picture_is_drawn_or_its_file_is_named(tmp_path):
    log = "step,tokens,seconds,lr,train_nats,val_nats,val_bpb,max_vio,max_vio_worst,idle\n"
    drawn = refused = 0
    for name, text in facts():
        for file in ("config.json", "load.json"):
            (tmp_path / file).unlink(missing_ok=True)
        (tmp_path / "log.csv").write_text(log + "1,9,1,1,3,3,1,0.1,0.1,0\n2,18,2,1,2,2,1,0.1,0.1,0")
        (tmp_path / name).write_text(text)
        try:
            figure = plot.Figure()
            for draw in plot.panels(tmp_path):
                draw(figure.add_subplot())
                figure.clear()
            plot.layers(tmp_path)
            drawn += 1
        except ValueError as e:
            assert name in str(e)
            refused += 1
    assert drawn > 10 and refused > 60


def test_a_vocabulary_smaller_than_the_presets_is_no_mistake():
    """Before the tokenizer is known, only what --model says is."""
    small = train.Run(model="vocab_size=300")
    assert settings.configure(small).vocab_size == 300
    assert settings.configure(train.Run()).vocab_size == Config.preset("toy").vocab_size
    assert room.sized(small, torch.device("cpu"), say=print) == small
    with pytest.raises(ValueError, match="smaller than the tokenizer's 301"):
        settings.configure(small, 301)


def test_as_many_depths_as_there_can_be_are_drawn(tmp_path):
    names = [f"mtp{k}_nats" for k in range(1, 17)]
    (tmp_path / "log.csv").write_text(f"step,train_nats,{','.join(names)}\n1,3{',4' * 16}\n")
    draw = list(plot.panels(tmp_path))
    draw[1](plot.Figure().add_subplot())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_is_chosen_from_numbers_that_are_not_finite(run, value):
    model, _, _ = sample.load_run(run)
    with torch.no_grad():
        model.backbone.norm_f.weight[1] = value
    for how in (dict(), dict(temperature=1.0, seed=0), dict(speculate=2)):
        with pytest.raises(FloatingPointError, match="logits are not finite"):
            sample.generate(model, [[1, 2]], 3, **how)
    with pytest.raises(FloatingPointError):
        rollout.roll(model, [[1, 2]], 2, 3, 256)


def test_there_are_no_other_ways_to_choose_a_token():
    logits = torch.randn(2, 9)
    for odd in ((-1,), (float("nan"),), (float("inf"),), (1, 0), (1, 1.1), (1, 1.0, -1)):
        with pytest.raises(ValueError, match="need temperature"):
            decode.probabilities(logits, *odd)
    for text in ("fp16:0", "fp16:33", "int8:99999999999", "bf16:5", "fp32:1", "fp4", ":5"):
        with pytest.raises(ValueError):
            statecache.read(text)


def test_this_file_can_fail(run, monkeypatch):
    """Without the table of kinds a checkpoint's list is a traceback."""
    saved = dict(checkpoint.read(run))
    listed = next(s for what, s, _ in misfits(saved) if what == "loads is a list")
    path = checkpoint.steps(run)[-1]
    raw = path.read_bytes()
    monkeypatch.setattr(checkpoint, "KINDS", {})
    checkpoint.store(path, listed)
    resume = ["--out", str(run.parent), "--name", "t", "--resume", "--steps", "1"]
    assert tried(Input("", lambda: train.cli(resume)))[0] == "traceback"
    path.write_bytes(raw)
