"""
Does a last stage of fine-tuning that counts every conversation alike mend short answers?

Claim     a mean over all tokens follows the long answers; a second stage, whose loss is the mean
          over conversations of each one's mean, mends long questions with short answers
          arXiv:2604.12374, section 3.1

Varied    the loss of the last quarter of the steps: as before, or every conversation alike
Equal     the first three quarters, bit for bit; then conversations, order, learning rate

Here      a short answer (`third`, at once) has 2 tokens, a long one (`call`) 62 or more: the tasks
          decide that, not the model. Measured are nats a token of answers, questions held out
"""

import tempfile
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

import sft
import train
from ablations import draw, small
from ablations.lab import Claim, Figure, main
from plot import sheet
from post import tasks

ONE, TWO = "one stage", "two stages"
KINDS = dict(short=("third", "off"), long=("call", "off"))


class Talks(sft.Talks):  # `answers` measures: without the replies that sft.py samples
    evaluate = lambda self, model, world, say: {}
    end = lambda self, model, world, say: None


@torch.no_grad()
def answers(model, enc, task, mode, n=200):
    """Nats a learned token, conversations alike; the share whose every token is the likeliest."""
    asked = [a for a in tasks.problems({task: 1.0}, 5 * n, 9, held=True) if a[1] == mode][:n]
    pairs = zip(*(tasks.demonstration(enc, *a) for a in asked))
    ids, learned = (pad_sequence(list(map(torch.tensor, x)), batch_first=True) for x in pairs)
    logs, said, mine = model(ids[:, :-1]).log_softmax(-1), ids[:, 1:], learned[:, 1:].bool()
    each = (-logs.gather(2, said[..., None])[..., 0] * mine).sum(1) / mine.sum(1)
    right = ((logs.argmax(2) == said) | ~mine).all(1)
    return float(each.mean()), float(right.float().mean())


def cell(settings, seed):
    """Short and long answers, after one stage and after two."""
    own, found, work = dict(settings), {}, Talks()
    last, asked = own.pop("last"), own.pop("tasks")
    begun = own["steps"] - last
    with tempfile.TemporaryDirectory() as out:
        made = small.run(own | dict(save_every=begun), seed, out)
        run = sft.Run(**vars(made) | dict(name="sft", tasks=asked, stage2=0))
        again = replace(run, resume=True, from_step=begun, stage2=last)
        for stage, how in ((ONE, run), (TWO, again)):
            model = train.fit(how, say=lambda line: None, work=work)[0].eval()
            for length, kind in KINDS.items():
                names = f"{length}, {stage}", f"{length} right, {stage}"
                found |= zip(names, answers(model, work.enc, *kind))
    return found


MODEL, REPORT = "one beginning", "arXiv:2604.12374, section 3.1"


def claim(says, published, more, less, reason=""):
    return Claim(says, REPORT, published, MODEL, MODEL, more, than=less, reason=reason)


CLAIMS = (
    claim("Without a stage that counts conversations alike, short answers cost more",
          "it mends long inputs with short outputs", f"short, {ONE}", f"short, {TWO}"),
    claim("With such a stage long answers cost more than without",
          "the mean over tokens follows the long ones", f"long, {TWO}", f"long, {ONE}"),
    claim("With such a stage more short answers are right",
          "it mends long inputs with short outputs", f"short right, {TWO}", f"short right, {ONE}"),
)  # fmt: skip


def picture(found):
    """Nats of short answers, and of long ones, after one stage and after two."""
    fig, axes = sheet(1, 2, figsize=(11, 3.2))
    for ax, length in zip(axes, KINDS):
        seen = found.beside({stage: f"{length}, {stage}" for stage in (ONE, TWO)})
        draw.levels(ax, seen, "loss", f"nats a token, {length} answers")
    fig.suptitle(draw.title(found, CLAIMS[0], 92), x=0.01, ha="left", weight="bold")
    return fig


TALKS = dict(preset="toy", data="tasks", tasks="third,call", steps=120, last=30, length=160)
TALKS |= dict(batch=8, hybrid_override_pattern="ME*E")
UNITS = {"": "nats a token"} | {f"short right, {n}": "of the answers" for n in (ONE, TWO)}
FIGURE = Figure("sft", CLAIMS, picture, {MODEL: {}}, cell,
                small.BYTES | TALKS, quick=dict(steps=24, last=6), units=UNITS)  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
