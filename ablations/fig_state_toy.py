"""
Does a trained model notice that its Mamba state is kept in few bits, and more so late in a text?

Claim     long answers grow longer with FP16 states rounded to the nearest, by 37 to 40 %; with FP8
          to the nearest by 26 %, with INT8 at random by 2 %
          arXiv:2604.12374 section 4.3, table 8, and the Nemotron 3 Ultra report, table 16

Varied    the format of the state and how it is rounded (nearest, or at random with 5 Philox rounds)
Equal     the model, the text: 8 rows of 256 tokens read one at a time

Here      a toy of 2.9 M parameters, trained for 880 steps in 6 CPU minutes a seed; a row is one
          model that reads with nine states. KL to its reading with fp32 states, in the first and in
          the second half of the rows. It should not survive the shrinking: a drift needs heads that
          remember thousands of tokens. The receipts are of before the lab: no seconds
"""

import torch

import checkpoint
import data
import ptq
import sample
from ablations import draw, small, toy
from ablations.fig_state import VARIANTS as FORMATS
from ablations.lab import Claim, Figure, main
from quant import statecache

ONE = "one model"


@torch.no_grad()
def read(model, ids, store):
    """Log-probabilities of a reading token by token."""
    model.store = statecache.read(store)
    cache = model.new_cache(len(ids))
    logits = [model(ids[:, i : i + 1], cache) for i in range(ids.shape[1])]
    return torch.cat(logits, 1).log_softmax(-1)


def cell(settings, seed):
    """KL of every format to fp32, early and late."""
    own = dict(settings)
    length, formats, found = own.pop("read"), own.pop("formats"), {}
    with small.trained(own, seed) as run:
        saved = checkpoint.read(run.settings.folder())
        model, enc, _ = sample.load_run(run.settings.folder())
        val = data.encode(enc, data.corpus(saved["run"]["data"]).val)
    ids = ptq.windows(val, 8 * length, length, "text")[:, :-1]
    p = read(model, ids, "fp32")
    for text in ("fp32", *formats):
        q = read(model, ids, text)
        kl = (p.exp() * (p - q)).sum(-1)
        halves = kl[:, : length // 2].mean(), kl[:, length // 2 :].mean()
        found |= {f"{when}, {text}": float(x) for when, x in zip(("early", "late"), halves)}
    return found


CLAIMS = (
    Claim("A trained toy notices FP8 to the nearest more than INT8 at random",
          "the Ultra report, table 16", "verbosity +26 % against +2 %",
          ONE, ONE, "late, fp8", than="late, int8:5"),
    Claim("A trained toy notices FP16 to the nearest more late in a text than early",
          "arXiv:2604.12374 table 8", "long answers grow longer",
          ONE, ONE, "late, fp16", than="early, fp16",
          reason="Its heads remember 70 tokens at most, and FP16's error is 1e-8 nats there."),
)  # fmt: skip


def picture(found):
    """All formats but fp32, late in the text."""
    beside = found.beside({name: f"late, {text}" for name, text in FORMATS.items()})
    base = "INT8, at random"
    first = CLAIMS[0]._replace(more="FP8, nearest", less=base, measure="loss", than="")
    return draw.paired(beside, "loss", base, "KL, nats a token", first)


FIGURE = Figure(
    name="state_toy",
    claims=CLAIMS,
    draw=picture,
    variants={ONE: {}},
    units={"": "nats a token (KL)"},
    cell=cell,
    base=toy.TOY | dict(read=256, formats=list(FORMATS.values())),
    quick=dict(steps=24, eval_tokens=2048, read=32),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
