"""
--fast on a card that is not there: the kernels, interpreted, in the places that were named, and
nowhere beside them the readable forms for which they stand.

Fails if  one part of the model (the recurrence, the convolution, the norm, experts, losses) takes
          its readable form, which test_this_file_can_fail does to each of them in turn; a wrapper
          in kernels/ reads a number; --fast of sample.py is dropped on the way
"""

import inspect
from collections import Counter

import card
import pytest
import torch

import latent_moe
import mamba
import mtp
import sample
import train

pytest.importorskip("triton")
card.interpret()

SIZES = "hidden_size=32,mamba_num_heads=2,mamba_head_dim=16,ssm_state_size=16,n_groups=1,"
SIZES += "n_routed_experts=4,num_experts_per_tok=2,moe_intermediate_size=32,moe_latent_size=16,"
SIZES += "moe_shared_expert_intermediate_size=32,intermediate_size=32,num_attention_heads=2,"
SIZES += "num_key_value_heads=1,head_dim=16"
# What each line of `describe` stands for: a file, its kernels in a training step and in decoding.
KERNELS = {
    "recurrence   kernels/ssd.py": ("ssd", "_scan _states _dx _dbc", "_step"),
    "convolution  kernels/conv.py": ("conv", "_forward _backward", "_forward"),
    "gated norm   kernels/norm.py": ("norm", "_forward _backward", "_forward"),
    "experts      kernels/experts.py": ("experts", "_grouped _combine _weights", "_grouped"),
    "losses       kernels/loss.py": ("loss", "_nll", ""),
}
READABLE = (
    mamba.ssd_chunked,
    mamba.ssd_recurrent,
    mamba.causal_conv,
    mamba.GatedNorm.forward,
    latent_moe.grouped_mm,
    latent_moe.Experts.meet_all,
    mtp.nll,
)


def lines(f):
    """file:line of everything in a function."""
    some, first = inspect.getsourcelines(f)
    return {f"{f.__module__}.py:{first + i}" for i in range(len(some))}


INSTEAD = set().union(*map(lines, READABLE))


class Steps:
    """What training steps started between their first and last product; waits before each."""

    def __init__(self, monkeypatch):
        self.launches, self.waits, stock = Counter(), [], train.gradient

        def gradient(*args):
            self.waits.append(sum(card.CARD.waits.values()))
            before = Counter(card.CARD.launches)
            out = stock(*args)
            self.launches += card.CARD.launches - before
            return out

        monkeypatch.setattr(train, "gradient", gradient)


def taken(launches):
    """(a file of kernels/, its kernel) of all that were started."""
    pairs = ((at.partition(".py:")[0], what) for at, what in launches)
    return {(at[8:], what) for at, what in pairs if at.startswith("kernels/") and what[0] == "_"}


def only_kernels(launches, which):
    """Every kernel that was named, no other, and none of the forms that they stand for."""
    named = {(k[0], name) for k in KERNELS.values() for name in k[which].split()}
    assert named <= taken(launches), named - taken(launches)
    assert {file for file, _ in taken(launches)} == {file for file, _ in named}
    assert not {at for at, _ in launches} & INSTEAD, {at for at, _ in launches} & INSTEAD


def fitted(tmp_path, text, pattern, **more):
    said = []
    how = dict(steps=2, batch=1, length=17, log_every=1, eval_every=100, eval_tokens=17)
    how |= dict(tokenizer="bytes", prompt="", worth=False, data=str(text), out=str(tmp_path))
    how |= dict(model=f"hybrid_override_pattern={pattern},{SIZES}", name="fast", **more)
    _, rows = train.fit(train.Run(**how), say=said.append)
    return [r["train_nats"] for r in rows], "\n".join(said)


def test_a_training_step(counted, tmp_path, text, monkeypatch):
    """Four of them, between whose lines nobody waits; two are the readable ones."""
    steps = Steps(monkeypatch)
    _, said = fitted(tmp_path / "4", text, "ME", fast=True, steps=4, log_every=4)
    assert all(line in said for line in KERNELS), said
    only_kernels(steps.launches, 1)
    assert steps.waits[1] == steps.waits[2] == steps.waits[3], counted.story()
    nats, readable = (fitted(tmp_path / str(f), text, "ME", fast=f)[0] for f in (True, False))
    assert torch.tensor(nats).sub(torch.tensor(readable)).abs().max() < 2e-2


def test_a_training_step_in_four_bits(counted, tmp_path, text, monkeypatch):
    """Experts by codes; the MTP block stays in high precision, so its experts' kernels are there
    too.
    """
    steps, how = Steps(monkeypatch), dict(fast=True, precision="nvfp4-last", steps=4, log_every=4)
    _, said = fitted(tmp_path, text, "E-", **how)
    four = {("fp4", "_amax"), ("fp4", "_quantize"), ("fp4mm", "_gemm")}
    assert four <= taken(steps.launches) and "NVFP4 by kernels/fp4mm.py" in said
    assert not {at for at, _ in steps.launches} & INSTEAD
    assert steps.waits[1] == steps.waits[2] == steps.waits[3], counted.story()


def test_a_run_is_sampled(counted, tmp_path, text, capsys):
    """The text of the readable forms, by kernels, with one wait a token."""
    fitted(tmp_path, text, "ME*", steps=1)
    texts, waits = [], []
    for tokens, *more in ("6",), ("6", "--fast"), ("8", "--fast"):
        asked = ["--run", str(tmp_path / "fast"), "--prompt", "def ", "--temperature", "0"]
        counted.reset()
        sample.main([*asked, "--max-new-tokens", tokens, *more])
        texts.append(capsys.readouterr().out)
        waits.append(sum(counted.waits.values()))
        if more:
            only_kernels(counted.launches, 2)
    assert texts[1].endswith(texts[0]) and waits[2] - waits[1] == 2, counted.story()


def dropped(name):
    """A seam of Mamba2 that has forgotten its kernel."""
    stock = getattr(mamba, name)

    def readable(*args, fast=False, **more):
        return stock(*args, **more)

    return readable


@pytest.mark.parametrize("part", ["scan", "conv", "GatedNorm", "Experts", "Nemotron", "wait"])
def test_this_file_can_fail(tmp_path, text, monkeypatch, part):
    stock = train.describe

    def describe(model, *args):
        stock(model, *args)
        for m in model.modules():
            if type(m).__name__ == part:
                m.fast = False
            elif type(m).__name__ == "Mamba2" and part in ("scan", "conv"):
                name = dict(scan="ssd_chunked", conv="causal_conv")[part]
                setattr(m, part, dropped(name))
            elif part == "wait" and isinstance(m, latent_moe.Experts):
                m.register_forward_pre_hook(lambda m, args: print(float(args[0].detach().sum())))

    monkeypatch.setattr(train, "describe", describe)
    steps = Steps(monkeypatch)
    _, said = fitted(tmp_path, text, "ME", fast=True, steps=3, log_every=3)
    assert all(line in said for line in KERNELS)  # it goes on claiming them
    if part == "wait":
        assert steps.waits[1] < steps.waits[2]
    else:
        with pytest.raises(AssertionError):
            only_kernels(steps.launches, 1)
