"""sft.py by its commands: from a folder in the released layout, on two ranks, and what it refuses.

The weights of the loss, packing and resuming are tested in test_post.py and test_pack.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import chat
import checkpoint
import data
import disk
import hf
import sft
from config import Config
from model import Nemotron

ROOT = Path(__file__).parents[1]
TINY = (
    "--threads 1 --device cpu --batch 4 --length 192 --questions 2 --room 12 --log-every 1 "
    "--steps 3 --stage2 1 --eval-every 3"
).split()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small model with a tokenizer that knows the template's tokens, as others would read it."""
    enc = chat.with_special(data.tokenizer("bytes"))
    config = Config(
        hidden_size=32,
        hybrid_override_pattern="ME*E",
        vocab_size=data.vocab_size(enc),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=16,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_latent_size=16,
        moe_shared_expert_intermediate_size=32,
    )
    where = tmp_path_factory.mktemp("released") / "small"
    hf.save(Nemotron(config, seed=5), where, enc=enc)
    return where


def copied(released, tmp_path):
    where = tmp_path / "copy"
    where.mkdir()
    for path in released.iterdir():
        (where / path.name).write_bytes(path.read_bytes())
    return where


def fine_tuned(where, released, *flags):
    sft.main(["--hf", str(released), "--out", str(where), *TINY, *flags])
    return checkpoint.read(where / "sft")


def losses(where):
    rows = disk.read_log(where / "sft/log.csv")
    return [r[k] for r in rows if r["step"] for k in ("train_nats", "mtp1_nats", "mtp2_nats")]


def test_a_released_folder_is_gone_on_from(released, tmp_path):
    """Its weights, its vocabulary and its tokenizer: at a vanishing rate nothing else is there."""
    still = fine_tuned(tmp_path / "still", released, *"--lr 1e-12 --lr-min 0 --bias-rate 0".split())
    before = hf.load(released).state_dict()
    assert still["model"].keys() == before.keys()
    for name, w in before.items():
        torch.testing.assert_close(still["model"][name], w, atol=1e-9, rtol=0)
    enc = data.unpack(still["tokenizer"])
    assert data.vocab_size(enc) == still["config"]["vocab_size"] == len(before["lm_head.weight"])
    moved = fine_tuned(tmp_path / "moved", released)
    assert not torch.equal(moved["model"]["lm_head.weight"], before["lm_head.weight"])


def refused(where, released, capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        sft.main(["--hf", str(released), "--out", str(where / "out"), *TINY, *flags])
    assert stop.value.code == 2 and not (where / "out").exists()
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def no_tokenizer(where):
    (where / "tokenizer.json").unlink()


def no_config(where):
    (where / "config.json").unlink()


def cut_short(where):
    path = next(where.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def not_finite(where):
    path = next(where.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["lm_head.weight"][3, 3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def another_tokenizer(where):
    """One with more ids than the model has rows."""
    enc = data.tokenizer("bpe:300", (ROOT / "sft.py").read_text("utf-8"))
    hf.save(Nemotron(Config.preset("mini")), where / "other", enc=chat.with_special(enc))
    (where / "tokenizer.json").write_bytes((where / "other/tokenizer.json").read_bytes())


def without_tags(where):
    """A tokenizer that spells the template's tags in bytes."""
    path = where / "tokenizer.json"
    table = json.loads(path.read_text("utf-8"))
    table["added_tokens"] = []
    path.write_text(json.dumps(table), "utf-8")


@pytest.mark.parametrize(
    "spoil,match",
    [
        (no_tokenizer, "tokenizer"),
        (no_config, "config.json"),
        (cut_short, "safetensors"),
        (not_finite, "lm_head.weight"),
        (another_tokenizer, "do not belong together"),
        (without_tags, "no special token <|im_start|>"),
    ],
)
def test_a_spoilt_folder_ends_in_a_sentence(spoil, match, released, tmp_path, capsys):
    where = copied(released, tmp_path)
    spoil(where)
    assert match in refused(tmp_path, where, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_kernels_want_a_gpu(released, tmp_path, capsys):
    assert "GPU" in refused(tmp_path, released, capsys, "--fast")


def test_a_demonstration_longer_than_a_row_is_found_at_the_start(released, tmp_path, capsys):
    said = refused(tmp_path, released, capsys, "--length", "128")
    assert "148 tokens, more than a row of 128" in said


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(released, tmp_path):
    """The same losses of all three depths, though the rows are shared out."""
    for n in (1, 2):
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        what = ["sft.py", "--hf", released, "--out", tmp_path / str(n), *TINY]
        done = subprocess.run(
            [*map(str, [*ranks, "--nproc-per-node", n, *what])],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    sft.main(["--hf", str(released), "--out", str(tmp_path / "0"), *TINY])
    alone, one, two = (losses(tmp_path / str(n)) for n in (0, 1, 2))
    assert len(alone) == 9 and alone == pytest.approx(one, rel=2e-5)
    assert alone == pytest.approx(two, rel=2e-5)


def test_this_file_can_fail(released, tmp_path):
    other = copied(released, tmp_path)
    path = next(other.glob("*.safetensors"))
    tensors = {n: t * (1.1 if n == "lm_head.weight" else 1) for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    for name, where in (("a", released), ("b", other)):
        fine_tuned(tmp_path / name, where)
    with pytest.raises(AssertionError):
        assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=2e-5)
