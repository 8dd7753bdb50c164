"""
A small model with a vocabulary, trained, and what a quantised copy of it differs by.

    TOY                                   settings: toy.TOY's, 6 CPU minutes of training
    with subject(settings, seed) as s:    the trained model, its texts, its calibration
        s.cost(copy)                      {kl, error, nats}: KL(model || copy) in nats a token on
                                          text that neither has seen, the standard error of that
                                          mean, and the copy's own loss
        s.quantised(plan, method)         a copy, its weights rounded; s.uniform("FP8"): a plan
    maps(s)                               formats of matrices: searched, at random, all alike
    named("max", cost)                    {"max": kl, "max, error": .., "max, nats": ..}: a row's

KL, because the loss moves by less than its own error, and half the time downwards.

Not here  how scales, formats and distillation work: quant/
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

import checkpoint
import data
import ptq
import sample
from ablations import small, toy
from quant import autoquant, calibrate

TOY = toy.TOY | dict(tokens=8192)  # of each text: for calibration, for KL
BITS, DRAWN = (4.5, 4.75, 5.0, 5.5, 7.0, 8.0), (5.0, 5.5, 7.0)  # of searched and random maps
QUICK = dict(steps=24, eval_tokens=2048, tokens=1024)


class Subject:
    """A run's model, its texts, and what a quantised copy differs by."""

    def __init__(self, run, tokens):
        saved = checkpoint.read(run)
        self.model = sample.load_run(run)[0]
        enc, corpus = data.unpack(saved["tokenizer"]), data.corpus(saved["run"]["data"])
        text, other = (data.encode(enc, part) for part in (corpus.train, corpus.val))
        self.text, self.other = (ptq.windows(x, tokens, 128, "text") for x in (text, other))
        self.more = ptq.windows(text, 8 * tokens, 128, "text")  # of distillation
        self.stats = calibrate.calibrate(self.model, self.text[:, :-1].split(8))
        self.sizes, _ = ptq.sizes(ptq.Held(self.model))
        with torch.no_grad():
            self.p = [self.model(x[:, :-1]).log_softmax(-1) for x in self.other.split(8)]

    @torch.no_grad()
    def cost(self, low):
        kl, nats = [], []
        for p, x in zip(self.p, self.other.split(8)):
            q = low(x[:, :-1]).log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).flatten())
            nats.append(-q.gather(-1, x[:, 1:, None]).flatten())
        kl, nats = torch.cat(kl).double(), torch.cat(nats)
        return dict(
            kl=float(kl.mean()), error=float(kl.std() / len(kl) ** 0.5), nats=float(nats.mean())
        )

    def quantised(self, plan, method="mse", model=None, cache=False):
        return calibrate.quantize(model or self.model, plan, self.stats, method, cache)

    def uniform(self, kind):
        return dict.fromkeys(self.sizes, kind)

    def sensitivity(self):
        """What each unit would cost in each format, guessed from one backward pass."""
        return autoquant.sensitivity(self.model, self.text.split(8), self.stats, nll)


def nll(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@contextmanager
def subject(settings, seed):
    """Trains a model of these settings; what else they hold is the cell's own."""
    known = {name: settings[name] for name in toy.TOY}
    with small.trained(known, seed) as run:
        yield Subject(run.settings.folder(), settings["tokens"])


def named(name, cost):
    """A cost as columns of a row."""
    return {name if part == "kl" else f"{name}, {part}": x for part, x in cost.items()}


def at_random(sizes, bits, seed):
    """A plan that spends the budget without looking: units in random order get a better format
    while it lasts.
    """
    g = torch.Generator().manual_seed(seed)
    plan = dict.fromkeys(sizes, "NVFP4")
    for i in torch.randperm(len(plan), generator=g).tolist():
        unit = list(plan)[i]
        for kind in ("FP8", None) if torch.rand((), generator=g) < 0.5 else (None, "FP8"):
            better = plan | {unit: kind}
            if autoquant.mean_bits(better, sizes) <= bits:
                plan = better
                break
    return plan


def maps(s):
    """(name, mean bits, plan, FP8 cache?, inputs rounded?) of every map that is tried."""
    yield "NVFP4", 4.5, s.uniform("NVFP4"), False, True
    yield "FP8", 8.0, s.uniform("FP8"), False, True
    yield "FP8, inputs as they were", 8.0, s.uniform("FP8"), False, False
    plan = autoquant.named("released", {u: ("NVFP4", "FP8") for u in s.sizes})
    yield "released map", autoquant.mean_bits(plan, s.sizes), plan, True, True
    yield "cache in FP8 alone", 16.0, {}, True, True
    score = s.sensitivity()
    for bits in BITS:
        yield "searched", bits, autoquant.assign(score, s.sizes, bits), False, True
    for bits in DRAWN:
        for i in range(3):
            yield f"random {i}", bits, at_random(s.sizes, bits, i), False, True
