"""
Does a model without positions read on, where one with rotary positions stumbles?

Claim     a hybrid whose attention has no positions has no cliff past its trained length, a
          transformer with rotary positions has one; and the hybrid's loss falls with the position
          the Nemotron 3 white paper (arXiv:2512.20856), table 3 and figure 6

Varied    where order comes from: Mamba alone, rotary positions in the same hybrid's attention, or
          rotary positions alone (attention and MLPs)
Equal     steps, batches, rows of 64 bytes in training; the two hybrids' parameters. The transformer
          has as many active ones within 0.1 %

Here      trained at T = 64, read at 16 T. Attention past T meets distances that training never had,
          at any size; that is what should survive. Every number is of the same bytes, the last 32
          of 96 rows of validation text, read with more or fewer bytes before them
"""

import torch

import data
from ablations import draw, small
from ablations.draw import GREY
from ablations.figure import ROOT, read
from ablations.lab import Claim, Figure, main
from plot import sheet

TIMES = 16  # of the trained length
PUBLISHED = ROOT / "receipts" / "published" / "nano_nll_by_position.csv"


@torch.no_grad()
def losses(model, length, rows=96, skip=0):
    """Nats of each byte, the mean of `rows` windows of validation text of `length`, of which the
    first `skip` are not read."""
    val = data.encode(data.tokenizer("bytes", ""), data.corpus("python").val)
    total = 0
    for ids in data.windows(val, rows * length, length)[:, skip:].split(8):
        logs = model.eval()(ids[:, :-1]).log_softmax(-1)
        total = total - logs.gather(2, ids[:, 1:, None])[..., 0].sum(0)
    return total / rows


def cell(settings, seed):
    """Nats of the last 32 of 1,024 bytes, of which the last 32, 64 (T), ... 1,024 are read."""
    t = settings["length"]
    whole, block = TIMES * t, t // 2
    with small.trained(settings, seed) as run:
        sizes = [block * 2**k for k in range(6)]
        nats = [float(losses(run.model, whole, skip=whole - n)[-block:].mean()) for n in sizes]
    curve = list(zip(sizes, nats))
    return dict(within=nats[1], far=nats[-1], rise=nats[-1] - nats[1], loss=curve)


NONE, ROTARY, ALONE = "hybrid, no positions", "hybrid, rotary", "attention alone, rotary"
TABLE = "arXiv:2512.20856, table 3"
CLAIMS = (
    Claim("Read past its length, attention with rotary positions rises more than a hybrid",
          TABLE, "RULER to 1 M tokens: no cliff", ALONE, NONE, "rise"),
    Claim("In the same hybrid, rotary positions make the loss rise more past the length",
          TABLE, "no cliff without positions", ROTARY, NONE, "rise"),
    Claim("A hybrid without positions knows a byte better at 16 T than at T",
          "arXiv:2512.20856, figure 6", "falls up to 1 M tokens", NONE, NONE, "within", "far",
          reason="Trained on 64 bytes at a time, it was never asked for what lies further back"),
    Claim("Attention with rotary positions knows a byte less well at 16 T than at T",
          TABLE, "a cliff past the trained length", ALONE, ALONE, "far", "within"),
)  # fmt: skip


def picture(found):
    """Left: nats by position. Right: a published curve that falls to the end."""
    fig, (a, b) = sheet(1, 2, figsize=(11, 4.8), width_ratios=(1.5, 1))
    draw.curves(a, found, "loss")
    a.axvline(64, color="0.3", ls="--", lw=1.2)
    a.set(xscale="log", xlabel="bytes read (dashed: the trained length)")
    a.set_ylabel("nats a byte, the last 32 of them")
    a.set_title(draw.title(found, CLAIMS[0], 58))
    line = ([float(r[k]) for r in read(PUBLISHED)] for k in ("position", "cumulative_nll"))
    b.plot(*line, "D--", color=GREY)
    b.set(xscale="log", xlabel="tokens of code", ylabel="nats a token, mean up to there")
    b.set_title("Published: Nemotron 3 Nano")
    return fig


FIGURE = Figure(
    name="positions",
    base=small.BYTES,
    variants={
        NONE: {},
        ROTARY: dict(rotary_base=10000.0),
        ALONE: dict(hybrid_override_pattern="*-*-*-", intermediate_size=320, rotary_base=10000.0),
    },
    quick=dict(steps=60),
    units={"": "nats a byte"},
    cell=cell,
    claims=CLAIMS,
    draw=picture,
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
