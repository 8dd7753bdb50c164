"""
Healing: after the backbone has moved with the MTP block switched off, teach the block the new
backbone.

Reinforcement learning trains the backbone alone. The block then drafts from states it no longer
knows, and its drafts fall more often; the text stays right (verification sees to that), it only
comes slower. So freeze all but the block, and let it read what the model itself now says:

    prompts -> the model's own continuations x, drawn at temperature 1
    loss  =  sum over depths k and words w of
                 p(w | x_0 .. x_{t+k}) (-log p_k(w | x_0 .. x_t; x_{t+1} .. x_{t+k}))

A continuation is drawn from p, the backbone's own distribution. The likelihood of the next token,
p_k's as in training, therefore has this loss for its mean, and every draw adds noise; as p is at
hand, take the mean itself. It ends where p_k = p, and a draft stands with probability 1 - |p_k - p|
/ 2.

    python heal.py --run runs/grpo --out runs/healed        from the replies of a run of grpo.py
    python heal.py --run runs/toy --out runs/healed         prints acceptance before and after

Not here  how the backbone came to move; router biases stay as they are
Sources   arXiv:2604.12374 section 3.2: frozen backbone, NLL, the final model's responses; no more
          is published.
          The mean instead of one draw, the schedule and the sizes are ours
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import command
from command import DEVICES

import torch

import chat
import checkpoint
import data
import disk
import hf
import mtp
import sample
from bounds import ENDLESS, knob
from post import rollout, tasks
from post.pack import Docs, lay, pack
from speculate import Tally, rounds


def prompts(tokens, n, length, seed):
    """n windows of `length` tokens, evenly spread, the first chosen by seed.   -> (n, length)"""
    if n < 1 or length < 1 or len(tokens) < length + n:
        raise ValueError(
            f"{n} windows of {length} tokens need {length + n:,} tokens, "
            f"and there are {len(tokens):,}"
        )
    step = (len(tokens) - length) // n
    at = [i * step + seed * 7919 % step for i in range(n)]
    return torch.stack([torch.as_tensor(tokens[i : i + length].astype("int64")) for i in at])


def acceptance(model, tokens, d=7, rows=48, new=96, temperature=1.0, seed=0, remember=True):
    """What drafting achieves on continuations of held-out text: a Tally."""
    tally = Tally(d)
    for _ in rounds(
        model.eval(),
        prompts(tokens, rows, 64, seed).tolist(),
        new,
        d,
        temperature,
        seed=[seed + i for i in range(rows)],
        tally=tally,
        remember=remember,
    ):
        pass
    return tally


class Healed(NamedTuple):
    """Of each depth, a token: the loss, and its excess over the least there is, p's own entropy."""

    nats: list
    excess: list


def heal(model, ids, steps, lr=1e-3, batch=16, seed=0, number=None, mask=None):
    """Trains the MTP block, and nothing else, on texts ids (n, t); yields what each step lost.

    Of rows that hold several documents, number (n, t) says which (post/pack.py), and mask (n, t)
    which tokens are the model's own words.
    """
    if ids.ndim != 2 or not len(ids) or min(batch, steps) < 1 or not 0 < lr < math.inf:
        raise ValueError(
            f"texts {tuple(ids.shape)}, {steps} steps of {batch} at a rate of {lr}: (n, t), and "
            "each above 0"
        )
    length = ids.shape[1] - (number is not None)
    if length <= model.mtp.depths:
        raise ValueError(f"texts of {length} tokens leave nothing to learn {model.mtp.depths} deep")
    model.eval().requires_grad_(False)
    model.mtp.requires_grad_(True)
    opt = torch.optim.AdamW(model.mtp.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    g, device = torch.Generator().manual_seed(seed), model.lm_head.weight.device
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, (steps - step) / (0.5 * steps))
        some = torch.randint(len(ids), (batch,), generator=g)
        x, docs = data.send(ids[some], device), None
        own = torch.ones_like(x, dtype=torch.float32)
        if number is not None:
            docs, told = Docs(number[some], device), data.send(mask[some][:, 1:], device)
            x, own = x[:, :-1], docs.end(told)  # own_t: of what p_t predicts
        with torch.no_grad():  # no gradient reaches the backbone
            h = model.hidden(x, docs=docs)
            p = model.lm_head(h).softmax(-1)
        each, least = [], []
        for k in range(1, model.mtp.depths + 1):
            # now place t has read x_{t+k}, as has p's place t + k
            x, p, own = (mtp.roll(v, docs) for v in (x, p, own))
            h = model.mtp(h, model.backbone.embeddings(x), k, docs=docs)
            loss = -(p * model.lm_head(h).log_softmax(-1)).sum(-1)
            each.append((loss * own).sum() / own.sum())
            least.append((torch.special.entr(p).sum(-1) * own).sum() / own.sum())
        opt.zero_grad()
        sum(each).backward()
        torch.nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        opt.step()
        nats = [e.item() for e in each]
        yield Healed(nats, [n - m.item() for n, m in zip(nats, least)])
    model.requires_grad_(True)


@dataclass(frozen=True)
class Flags:
    run: str = knob("runs/toy", "a run folder, or one checkpoint file in it")
    out: str = knob("runs/healed", "the folder to write the healed model to")
    steps: int = knob(128, "optimiser steps", least=1, most=ENDLESS)
    texts: int = knob(1024, "texts the model writes for itself", least=1, most=1 << 24, memory=True)
    length: int = knob(
        128,
        "tokens of a text, of which 32 are the prompt; of conversations: of a row of several",
        least=40,
        most=1 << 24,
        memory=True,
    )
    tasks: str = knob("", "heal from replies to these questions; empty: what the run practised")
    release: str = knob("", "also write the healed model here, in the released layout")
    batch: int = knob(16, "texts, or rows of conversations, a step", least=1, most=1 << 20)
    lr: float = knob(
        1e-3, "learning rate, falling to zero over the second half", above=0, most=1e30
    )
    seed: int = knob(0, "of the prompts and of the text", least=0, most=2**32 - 1)
    device: str = knob("auto", "where; auto: cuda if it is there, else cpu", choices=DEVICES)


def work(a):
    sample.quicken()
    if a.release and Path(a.release).exists():
        raise ValueError(f"{a.release} is there already: --release names a new folder")
    if Path(a.out).exists():
        raise ValueError(f"{a.out} is there already: --out names a new folder")
    with disk.lock(a.out):
        mend(a)


def mend(a):
    """Acceptance before, the block's training, acceptance after, one checkpoint."""
    saved = checkpoint.read(a.run)
    model, enc, step = sample.load_run(a.run, command.device(a.device, mps=False))
    if model.mtp is None:
        raise ValueError(f"{a.run} has no MTP block to heal")
    questions = a.tasks or saved.setting("tasks", str, "")
    show, texts = (talking if questions else writing)(a, saved, model, enc, questions)
    show("before")
    for i, each in enumerate(heal(model, texts[0], a.steps, a.lr, a.batch, a.seed, *texts[1:]), 1):
        if i % 25 == 0 or i in (1, a.steps):
            depths = enumerate(zip(each.nats, each.excess), 1)
            command.say(
                f"step {i:4}  "
                + "  ".join(f"depth {k}: {n:.3f}, {e:.3f} above the least" for k, (n, e) in depths)
            )
    show("after")
    checkpoint.save(Path(a.out), step, dict(saved, model=model.state_dict(), optimizer=None))
    command.say(f"wrote {a.out}; sample.py --run takes it")
    if a.release:
        hf.save(model, a.release, enc=enc if questions else None)
        command.say(f"wrote {a.release}; sample.py --hf takes it")


def writing(a, saved, model, enc, _):
    """Of a run on text -> how to show acceptance, and the texts to learn from."""
    corpus = data.corpus(saved.setting("data", str))
    data.same_text(corpus, saved)
    train, val = (data.encode(enc, part) for part in (corpus.train, corpus.val))

    def show(when):
        t = acceptance(model, val, seed=a.seed)
        command.say(
            f"{when:7} mean accepted length {t.tokens / t.rounds:.3f} of 8; by draft index "
            + " ".join(f"{t.stood[k] / max(1, t.reached[k]):.3f}" for k in range(1, 8))
        )

    rows = prompts(train, a.texts, 32, a.seed)
    own = lambda i: [a.seed + j for j in range(i, min(i + 64, a.texts))]
    texts = [
        sample.generate(model, rows[i : i + 64], a.length - 31, 1.0, seed=own(i))
        for i in range(0, a.texts, 64)
    ]
    return show, (torch.cat(texts),)


def talking(a, saved, model, enc, questions):
    """Of a run of sft.py or grpo.py: the replies it gives, which alone are learned from."""
    if chat.END not in enc.special_tokens_set:
        raise ValueError(f"{a.run} knows no {chat.END}: only what sft.py made answers questions")
    mixture, end = tasks.mixture(questions), enc.encode_single_token(chat.END)
    room, device = saved.setting("room", int, 40), model.lm_head.weight.device
    draw = torch.Generator(device).manual_seed(a.seed)

    def show(when):
        got = rollout.drafted(model, enc, mixture, seed=a.seed, room=room)
        command.say(
            f"{when:7} tokens a round of 5 drafts {rollout.mean(got.values()):.3f} of 6; "
            + "  ".join(f"{task} {mode} {n:.2f}" for (task, mode), n in got.items())
        )

    asked = tasks.problems(mixture, a.texts, a.seed)
    said = []
    for i in range(0, a.texts, 256):
        some = [tasks.prompt(enc, *one) for one in asked[i : i + 256]]
        said += rollout.roll(model, some, 1, room, end, draw)
    texts = [r.prompt + r.reply for r in said]
    own = [[0.0] * len(r.prompt) + [1.0] * len(r.reply) for r in said]
    number, ids, mask = lay(pack(texts, a.length), a.length, texts, own)
    return show, (ids, number, mask)


def main(argv=None):
    command.run(work, Flags, "heal.py", __doc__, argv)


if __name__ == "__main__":
    main()
