"""
Supervised fine-tuning: a model that goes on with a text learns to answer, in a format and in the
modes it is asked in.

Conversations are packed into rows (post/pack.py), and only what the assistant says is learned
(chat.py). With O_c the learned tokens of conversation c and l_t the loss of one:

    stage 1    sum_c sum_{t in O_c} l_t / sum_c |O_c|       every token counts alike: long ones lead
    stage 2    mean over c of  sum_{t in O_c} l_t / |O_c|   every conversation does: short ones gain

Both are one weighted mean, of weights 1 and 1/|O_c|; the MTP losses take the same weights, rolled
along. The loop is train.py's own (train.fit): this file only says what is learned.

    python sft.py                             a small model learns post/tasks.py from nothing
    python sft.py --base runs/mini            on top of a pretrained run of train.py
    python sft.py --base runs/mini --data talks.jsonl     lines {"messages": [...], "tools": [...]}
    python sft.py --hf DIR                    on top of a checkpoint in the released layout
    torchrun --nproc-per-node 2 sft.py        the same run on many devices

Not here  the loop: train.py; what is asked: post/tasks.py; practice instead of examples: grpo.py
Sources   arXiv:2604.12374 section 3.1: the two stages, MTP 0.3, balance 1e-4
Departs   sizes and learning rate are a small model's, and the rate falls; the release's is constant
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import command

import bounds
import chat
import checkpoint
import data
import disk
import hf
import mtp
import sample
import train
from bounds import ENDLESS, knob
from config import PRESETS, Config
from corpora.philox import philox
from post import pack, picture, rollout, talks, tasks
from training import settings


@dataclass(frozen=True)
class Run(settings.Run):
    """Everything a run depends on. Each field is a flag of the command line."""

    preset: str = knob("mini", "without --base and --hf: the model that begins", choices=PRESETS)
    name: str = knob("sft", "the run's folder under --out")
    base: str = knob("", "a pretrained run of train.py to go on from")
    hf: str = knob("", "a folder in the released layout to go on from")
    data: str = knob("tasks", "tasks (post/tasks.py's demonstrations) | conversations in a .jsonl")
    tasks: str = knob(",".join(tasks.TASKS), "which tasks, and how often each: sort,make:3")
    tokenizer: str = knob("bpe:320", "without --base and --hf: what learns from the demonstrations")
    steps: int = knob(300, "optimiser steps, of both stages", least=1, most=ENDLESS)
    stage2: int = knob(60, "the last so many of them are stage 2", least=0, most=ENDLESS)
    batch: int = knob(48, "conversations a step", least=1, most=1 << 24, memory=True)
    micro: int = knob(0, "rows a forward pass; 0: all", least=0, most=1 << 24, memory=True)
    length: int = knob(256, "tokens of a row", least=4, most=1 << 24, memory=True)
    lr_min: float = knob(4e-4, "learning rate at the end", least=0, most=1e30)
    eval_every: int = knob(60, "steps between evaluations", least=1, most=ENDLESS)
    questions: int = knob(100, "held-out questions of each task and mode", least=1, most=ENDLESS)
    room: int = knob(40, "tokens a reply may have in the evaluation", least=2, most=1 << 24)
    prompt: str = knob("", "not used here", least=0, most=1 << 20)


UNUSED = "model documents short merge dry_run prompt".split()  # of train.py's flags


def check(run):
    """ValueError of flags that contradict one another."""
    for name in UNUSED:
        if getattr(run, name) != getattr(Run(), name):
            raise ValueError(f"--{name.replace('_', '-')} is train.py's: conversations have none")
    if run.base and run.hf:
        raise ValueError(f"--base {run.base} and --hf {run.hf}: a run begins with one model")
    if run.stage2 > run.steps:
        raise ValueError(f"--stage2 {run.stage2} is more than all --steps {run.steps}")
    if run.cp > 1:
        raise ValueError(
            f"--cp {run.cp}: a row of several conversations does not cut into slices, take --cp 1"
        )
    return run


def weigh(learned, stage):
    """Which tokens of one conversation are learned -> their weights."""
    share = 1.0 if stage == 1 else 1 / max(1, sum(learned))
    return [share * bool(v) for v in learned]


def beginning(run, enc_for):
    """Config, weights and tokenizer to begin with. enc_for: the tokenizer of a new model."""
    if run.base:
        saved = checkpoint.read(run.base)
        config = bounds.build(Config, saved["config"], f"{saved.path}, config")
        weights = saved["model"]
        enc = chat.with_special(data.unpack(saved["tokenizer"]))
    elif run.hf:
        enc, model = data.tokenizer(run.hf), hf.load(run.hf)
        config, weights = model.config, model.state_dict()
        chat.encode(enc, [])  # a released tokenizer has the template's tokens, or is another's
        if config.vocab_size < data.vocab_size(enc):
            raise ValueError(
                f"{run.hf}: its tokenizer has {data.vocab_size(enc):,} ids and its model "
                f"{config.vocab_size:,}: they do not belong together"
            )
    else:
        enc = chat.with_special(enc_for())
        return replace(settings.configure(run, data.vocab_size(enc))), None, enc
    vocab = max(config.vocab_size, data.vocab_size(enc))
    if len(weights["lm_head.weight"]) != config.vocab_size:
        raise ValueError(
            f"{run.base or run.hf} has {len(weights['lm_head.weight'])} rows in its head where its "
            f"config has a vocabulary of {config.vocab_size}"
        )
    return replace(config, vocab_size=vocab), chat.grow(weights, vocab), enc


class Talks:
    """Packed conversations with weighted targets: a `work` of train.fit."""

    weights, columns = None, ()

    def begin(self, run, saved, say):
        self.run, self.talks, self.mixture = run, None, tasks.mixture(run.tasks)
        digest = hashlib.sha256(run.data.encode())
        if run.data != "tasks":
            raw = Path(command.ending_file(run.data)).read_bytes()  # once: a pipe has no more
            self.talks, digest = talks.read(run.data, raw), hashlib.sha256(raw)
        self.sha = digest.hexdigest()
        if saved and saved["corpus_sha256"] != self.sha:
            raise ValueError(f"{run.data} is not what this run was trained on")
        if saved:
            config = bounds.build(Config, saved["config"], f"{saved.path}, config")
            self.enc = data.unpack(saved["tokenizer"])
        else:
            config, self.weights, self.enc = beginning(run, self.learn)
        self.depths = config.depths
        if self.talks:
            self.talks = [chat.encode(self.enc, chat.parts(*talk)) for talk in self.talks]
            pack.pack([ids for ids, _ in self.talks], run.length)  # none is too long
            if not all(any(learned) for _, learned in self.talks):
                raise ValueError(f"{run.data}: a conversation leaves nothing to learn")
        else:
            some = [tasks.demonstration(self.enc, *a) for a in tasks.problems(self.mixture, 500, 7)]
            pack.pack([ids for ids, _ in some], run.length)  # none of these is too long
            self.cells = rollout.cells(self.mixture)
            kinds = ("right", "tokens", "formed")
            self.columns = tuple(f"{t}-{m}-{k}" for t, m in self.cells for k in kinds)
        say(
            f"data       {run.data}: "
            + (f"{len(self.talks)} conversations" if self.talks else run.tasks)
            + f", {data.vocab_size(self.enc):,} ids of {self.enc.name}"
        )
        return config

    def learn(self):
        """A tokenizer from the demonstrations; single digits stay single."""
        if self.talks:
            texts = [chat.render(*talk) for talk in self.talks]
        else:
            some = tasks.problems(self.mixture, 4000, 7)
            texts = [chat.render([*p.messages, p.demos[m]], **tasks.MODES[m]) for p, m in some]
        text = "\n".join(texts)
        for tag in chat.SPECIAL:
            text = text.replace(tag, "\n")
        return data.tokenizer(self.run.tokenizer, text)

    def conversations(self, step):
        """This step's, a pure function of the seed: (ids, learned) each."""
        run = self.run
        if self.talks:
            some = philox(run.seed, step, run.batch) % len(self.talks)
            return [self.talks[i] for i in some.tolist()]
        asked = tasks.problems(self.mixture, run.batch, run.seed * 10**7 + step)
        return [tasks.demonstration(self.enc, *a) for a in asked]

    def batch(self, step, world):
        run, some = self.run, self.conversations(step)
        stage = 2 if step > run.steps - run.stage2 else 1
        ids, weights = [i for i, _ in some], [weigh(learned, stage) for _, learned in some]
        rows = pack.pack(ids, run.length + 1)
        real, tokens = len(rows), sum(map(len, ids))
        rows += [[] for _ in range(-real % world.shares)]  # every rank has as many
        number, ids, weights = pack.lay(rows, run.length + 1, ids, weights)
        docs, targets = pack.Docs(number), weights[:, 1:]
        counts = mtp.counts(docs.end(targets), self.depths, docs)
        mine = (x.chunk(world.shares)[world.place] for x in (number, ids, targets))
        there = lambda x: data.send(x, world.device)
        pieces = [
            world.rows(there(i), self.depths, there(w), pack.Docs(n, world.device))
            for n, i, w in zip(*(x.split(run.micro or len(rows)) for x in mine))
        ]
        return data.Batch(pieces, counts, real, tokens)

    def evaluate(self, model, world, say):
        if world.sharded or self.talks:
            return {}
        with world.cast():
            rows = rollout.evaluate(
                model, self.enc, self.mixture, self.run.questions, room=self.run.room
            )
        say("           " + rollout.table(rows))
        return rollout.columns(rows)

    def carries(self):
        return dict(tokenizer=data.pack(self.enc), corpus_sha256=self.sha)

    def facts(self):
        return dict(corpus=dict(name=self.run.data, sha256=self.sha))

    def end(self, model, world, say):
        """The table of answers and their picture. Of a model that is cut up there is neither."""
        if world.sharded:
            return say(
                "answers    none: this model is cut up over ranks; sample.py reads a released copy"
            )
        if not self.talks:
            run = self.run
            with world.cast():
                rows = rollout.report(model, self.enc, self.mixture, run.questions, run.room, say)
            world.write(run.folder() / "answers.csv", disk.table(rows))
            picture.sft(run.folder())


def start(run):
    sample.quicken()
    train.launch(check(run), command.say, partial(train.fit, work=Talks()))


def main(argv=None):
    make = partial(settings.complete, kind=Run)
    command.run(start, Run, "sft.py", __doc__, argv, make)


if __name__ == "__main__":
    main()
