"""
Quantisation-aware distillation: the rounded model learns to say what the unrounded one says.

    student   w -> w + (round(w) - w), x likewise, the bracket without a gradient: straight through
    loss      KL(p || q), p the model as it was, q the student's: no word of the text's own answer

Weights are rounded by the max rule, again at each step; inputs with the scale that calibration
found.
What has learned is then quantised as any model is.

A model that is trained further on text gains from the text. So the measure is KL to the teacher,
and nothing that more training would have given is counted as repair.

Not here  choosing formats and scales: autoquant.py, calibrate.py
Sources   arXiv:2604.12374 (QAD: KL of the logits against the BF16 model); 1308.3432 (straight
          through)
"""

import copy
import time
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

import latent_moe
from quant import calibrate, packed


class Straight(nn.Module):
    """For a parametrised weight: rounded by the max rule in the forward pass, as if it were not in
    the backward pass.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, w):
        with torch.no_grad():
            stack = w if w.ndim == 3 else w[None]
            t = calibrate.encode(stack, self.kind, "max")
            each = [
                packed.values(self.kind, {k: v[e] for k, v in t.items()}) for e in range(len(stack))
            ]
            low = torch.stack(each).view_as(w)
        return w + (low - w).detach()


def rounded_input(kind, stats, x):
    scale = calibrate.input_scale(kind, stats.amax)
    return x + (packed.KINDS[kind].round(x, scale) - x).detach()


def straighten(model, plan, stats):
    """Weights and inputs of plan's units are rounded from here on, and learn all the same."""
    for unit, names in calibrate.units(model).items():
        for n in names if plan[unit] else ():
            m, kind = model.get_submodule(n), plan[unit]
            if isinstance(m, latent_moe.Experts):
                for p in ("up_proj", "down_proj"):
                    parametrize.register_parametrization(m, p, Straight(kind))
                m.mm = StraightMM(kind, stats[f"{n}.up_proj"], stats[f"{n}.down_proj"])
            else:
                parametrize.register_parametrization(m, "weight", Straight(kind))
                how = partial(rounded_input, kind, stats[n])
                m.register_forward_pre_hook(lambda m, a, how=how: (how(a[0]),))


class StraightMM:
    """For latent_moe's seam: rows rounded as their matrix's input. Experts ask for up, then for
    down.
    """

    def __init__(self, kind, *stats):
        self.kind, self.stats, self.calls = kind, stats, 0

    def __call__(self, x, w, count):
        stats = self.stats[self.calls % 2]
        self.calls += 1
        return latent_moe.grouped_mm(rounded_input(self.kind, stats, x), w, count)


def straight(model):
    """The weights that learned, in an ordinary model again."""
    state = {}
    for n, t in model.state_dict().items():
        if ".parametrizations." in n:
            n = n.replace(".parametrizations.", ".").removesuffix(".original")
        state[n] = t
    return state


def distill(model, plan, stats, ids, steps, lr, seed=0, batch=8, say=print):
    """Texts ids (n, t+1) -> a copy of the model whose weights, once rounded by plan {unit: kind or
    None}, give the model's own distribution better. The text's next tokens are never looked at: KL
    to the model as it was is all that is learned. MTP stays as it is.
    """
    student = copy.deepcopy(model)
    straighten(student, plan, stats)
    learn = [p for n, p in student.named_parameters() if not n.startswith("mtp")]
    opt = torch.optim.AdamW(learn, lr, betas=(0.9, 0.95), weight_decay=0.0)
    g, began = torch.Generator().manual_seed(seed), time.monotonic()
    for step in range(1, steps + 1):
        x = ids[torch.randint(len(ids), (batch,), generator=g), :-1]
        with torch.no_grad():
            p = model(x).log_softmax(-1)
        opt.zero_grad()
        with parametrize.cached():
            kl = (p.exp() * (p - student(x).log_softmax(-1))).sum(-1).mean()
            kl.backward()
        if not kl.isfinite():
            raise FloatingPointError(f"distillation, step {step}: KL {float(kl)}")
        opt.step()
        if step in (1, steps) or step % 10 == 0:
            spent = time.monotonic() - began
            left = spent / step * (steps - step)
            nats = 1e3 * float(kl.detach())
            pace = f"about {left:.0f} s left"
            say(f"distill    step {step:4} of {steps}   KL {nats:7.2f} mnat a token, {pace}")
    learned = copy.deepcopy(model)
    learned.load_state_dict(straight(student))
    return learned.eval()
