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

    python heal.py --run runs/toy --out runs/healed         prints acceptance before and after

Not here  how the backbone came to move; router biases stay as they are
Sources   arXiv:2604.12374 section 3.2: frozen backbone, NLL, the final model's responses; no more
          is published.
          The mean instead of one draw, the schedule and the sizes are ours
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import command
import data
import sample
from command import ENDLESS, knob
from speculate import Tally, rounds


def prompts(tokens, n, length, seed):
    """n windows of `length` tokens, evenly spread, the first chosen by seed.   -> (n, length)"""
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


def heal(model, ids, steps, lr=1e-3, batch=16, seed=0):
    """Trains the MTP block, and nothing else, on texts ids (n, t); yields the loss per position of
    each depth.
    """
    model.eval().requires_grad_(False)
    model.mtp.requires_grad_(True)
    opt = torch.optim.AdamW(model.mtp.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    g = torch.Generator().manual_seed(seed)
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, (steps - step) / (0.5 * steps))
        x = ids[torch.randint(len(ids), (batch,), generator=g)]
        with torch.no_grad():  # no gradient reaches the backbone
            h, embedded = model.hidden(x), model.backbone.embeddings(x)
            p = model.lm_head(h).softmax(-1)
        each = []
        for k in range(1, model.mtp.depths + 1):
            h = model.mtp(h[:, :-1], embedded[:, k:], k)  # place t has read x_{t+k}, as p's t+k has
            each.append(-(p[:, k:] * model.lm_head(h).log_softmax(-1)).sum(-1).mean())
        opt.zero_grad()
        sum(each).backward()
        torch.nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        opt.step()
        yield [float(e.detach()) for e in each]
    model.requires_grad_(True)


@dataclass(frozen=True)
class Flags:
    run: str = knob("runs/toy", "a run folder, or one checkpoint file in it")
    out: str = knob("runs/healed", "the folder to write the healed model to")
    steps: int = knob(128, "optimiser steps", least=1, most=ENDLESS)
    texts: int = knob(1024, "texts the model writes for itself", least=1, most=1 << 24, memory=True)
    length: int = knob(
        128, "tokens of a text, of which 32 are the prompt", least=40, most=1 << 24, memory=True
    )
    lr: float = knob(
        1e-3, "learning rate, falling to zero over the second half", above=0, most=1e30
    )
    seed: int = knob(0, "of the prompts and of the text", least=0, most=2**32 - 1)


def work(a):
    sample.quicken()
    if Path(a.out).exists():
        raise ValueError(f"{a.out} is there already: --out names a new folder")
    with checkpoint.lock(a.out):
        mend(a)


def mend(a):
    """The work itself: acceptance before, the block's training, acceptance after, one
    checkpoint.
    """
    saved = checkpoint.read(a.run)
    model, enc, step = sample.load_run(a.run)
    if model.mtp is None:
        raise ValueError(f"{a.run} has no MTP block to heal")
    corpus = data.corpus(saved["run"]["data"])
    data.same_text(corpus, saved)
    train, val = (data.encode(enc, part) for part in (corpus.train, corpus.val))

    def show(when):
        t = acceptance(model, val, seed=a.seed)
        print(
            f"{when:7} mean accepted length {t.tokens / t.rounds:.3f} of 8; by draft index "
            + " ".join(f"{t.stood[k] / max(1, t.reached[k]):.3f}" for k in range(1, 8)),
            flush=True,
        )

    show("before")
    rows = prompts(train, a.texts, 32, a.seed)
    own = lambda i: [a.seed + j for j in range(i, min(i + 64, a.texts))]
    ids = torch.cat(
        [
            sample.generate(model, rows[i : i + 64], a.length - 31, 1.0, seed=own(i))
            for i in range(0, a.texts, 64)
        ]
    )
    for i, each in enumerate(heal(model, ids, a.steps, a.lr, seed=a.seed), 1):
        if i % 25 == 0 or i in (1, a.steps):
            print(
                f"step {i:4}  " + "  ".join(f"depth {k}: {e:.3f}" for k, e in enumerate(each, 1)),
                flush=True,
            )
    show("after")
    checkpoint.save(Path(a.out), step, dict(saved, model=model.state_dict(), optimizer=None))
    print(f"wrote {a.out}; sample.py --run takes it")


def main(argv=None):
    command.run(work, Flags, "heal.py", __doc__, argv)


if __name__ == "__main__":
    main()
