"""
Small trainings: what most cells are. A model of 0.2 M parameters reads 300 x 8 x 64 bytes of
Python in a quarter of a minute, or 32,768 facts in a minute and a half.

    BYTES, FACTS                          settings: every one that matters is pinned, so that a
                                          preset may change and these figures do not
    loss(settings, seed)                  a cell: {loss, max_vio} of a finished run
    with trained(settings, seed) as run:  for other cells: run.model, run.log, run.settings, whose
                                          folder with the checkpoints is there until the block ends
    nats, averaged, decayed               what then becomes of it: measured, merged, gone on with

A setting is a field of train.py's Run or of config.py's Config, by its name; no name is in both.
Weights are functions of (seed, the tensor's name), batches of (seed, step): what two variants have
in common begins the same and reads the same.

Facts are what experts are for: three bytes that say which, two that follow from nothing, so that
what counts is how much a model can store. Text of this size hardly asks for experts.

Not here  the grid: lab.py
"""

import math
import tempfile
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import NamedTuple
from unittest import mock

import checkpoint
import data
import plot
import train
import worth
from config import Config
from training.merge import merge_weights

BYTES = dict(
    data="python",
    tokenizer="bytes",
    steps=300,
    batch=8,
    length=64,
    lr=4e-3,
    lr_min=4e-5,
    warmup=0.05,
    decay=0.3,
    weight_decay=0.1,
    clip=1.0,
    mtp_loss=0.3,
    balance=1e-4,
    bias_rate=1e-3,
    precision="fp32",
    eval_tokens=32768,
    hybrid_override_pattern="ME*EME",
    hidden_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_latent_size=32,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=128,
    routed_scaling_factor=2.5,
    intermediate_size=128,
    num_nextn_predict_layers=0,
    initializer_range=0.04,
)
FACTS = BYTES | dict(
    data="facts:32768",
    steps=1200,
    batch=32,
    eval_tokens=16384,
    hybrid_override_pattern="MEME",
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_shared_expert_intermediate_size=64,
    initializer_range=0.08,
)
FALLS = {  # of the learning rate: from 1 to 0
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
}
HERE = dict(device="cpu", threads=1, prompt="", worth=False, log_every=50)


class Trained(NamedTuple):
    model: object  # model.Nemotron
    log: list  # the rows of log.csv
    settings: train.Run


def run(settings, seed, out):
    """Settings by name -> a train.Run in the folder `out`."""
    known = {f.name for f in fields(train.Run)}
    of_run = {name: x for name, x in settings.items() if name in known}
    of_model = {name: x for name, x in settings.items() if name not in known}
    if strange := set(of_model) - {f.name for f in fields(Config)}:
        raise ValueError(f"neither Run nor Config has a field {', '.join(sorted(strange))}")
    rare = dict(eval_every=settings["steps"], save_every=settings["steps"])
    model = ",".join(f"{name}={x}" for name, x in of_model.items())
    return train.Run(**{**HERE, **rare, **of_run, "model": model, "seed": seed, "out": out})


@contextmanager
def trained(settings, seed):
    """A finished run, whose folder is gone when the block ends, and which drew no picture."""
    drawn = mock.patch.object(plot, "run", lambda folder: None)
    with tempfile.TemporaryDirectory() as out, drawn:
        made = run(settings, seed, out)
        model, log = train.fit(made, say=lambda line: None)
        yield Trained(model, log, made)


def last(log, column):
    """The last number of a column that has not one in every row."""
    return next(row[column] for row in reversed(log) if row.get(column, "") != "")


def loss(settings, seed):
    """Validation nats a target, and the mean MaxVio of the run's second half."""
    with trained(settings, seed) as run:
        half = [row["max_vio"] for row in run.log if 2 * row["step"] > settings["steps"]]
        return dict(loss=last(run.log, "val_nats"), max_vio=sum(half) / len(half))


def nats(model, run):
    """Validation nats a target: what the log calls val_nats."""
    corpus = data.corpus(run.data)
    val = data.encode(data.tokenizer(run.tokenizer, corpus.train), corpus.val)
    rows = data.windows(val, run.eval_tokens, run.length, corpus.unit)
    return worth.nats(model.eval(), rows, data.targets(corpus, run.length))


def averaged(model, files):
    """The model, its weights the average of these checkpoints, as training/merge.py makes it."""
    total = {k: 0 * x for k, x in model.state_dict().items()}
    for path, c in zip(files, merge_weights(len(files))):
        for k, x in checkpoint.read(path)["model"].items():
            total[k] += c * x
    model.load_state_dict(total)
    return model


def decayed(run, start, fall):
    """A finished run gone on with from step `start`, its rate falling so -> the model."""

    def rate(t, run):
        x = max(0, t - start) / (run.steps - start)
        return run.lr_min + (run.lr - run.lr_min) * FALLS[fall](x)

    with mock.patch.object(train, "learning_rate", rate):
        again = replace(run, resume=True, from_step=start)
        return train.fit(again, say=lambda line: None)[0]
