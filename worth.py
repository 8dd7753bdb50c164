"""
What each part is worth: how much worse a trained model predicts the validation slice without it.

    worth of a part  =  nll per token, its output replaced by zeros  -  nll per token as it is

The model is not trained again: what is measured is how much the others lean on the part. So the
numbers do not add up to anything, and a part of no worth here is dead weight in this very model.
Zeros come from hooks on the modules, the model's own code is not touched. One replacement is no
zero: every token goes to k experts drawn at random, with the gates of those that were chosen. If
that costs nothing, the router or the experts have learned nothing.

    python worth.py --run runs/small        the table of any run; also written to its worth.csv
    worth.measure(model, rows)              the same in Python: a list of dicts, shown by `table`

Of the MTP block, which no next token needs, the worth is speed: how many tokens a round of
drafting and verifying gives (speculate.py), 1 without it.

Not here  what a model would be that had been trained without the part: that is an ablation, and
          takes a run of its own
Sources   zeroing a trained part is the oldest of ablations; the random router after 2101.03961's
          question whether experts differ
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import command

import torch

import checkpoint
import data
import disk
import heal
import mtp
import sample
from attention import Attention
from bounds import ENDLESS, knob
from latent_moe import MLP, LatentMoE
from mamba import Mamba2

MOST = 32768  # tokens of the slice, at most: seconds for a toy on a CPU
DRAFTS = 7


def silent(module, args, out):
    """A hook: the module says nothing."""
    return torch.zeros_like(out)


def random_experts(seed=0):
    """A hook on Experts: other experts than those chosen, k different ones a token, same gates."""
    g = torch.Generator().manual_seed(seed)

    def hook(experts, args):
        c, pick, gate = args
        lot = torch.rand(len(pick), len(experts.up_proj), generator=g)
        return c, lot.topk(pick.shape[1]).indices.to(pick.device), gate

    return hook


def parts(model):
    """{name: (the modules of it, whether random experts and not silence)}, of those the model
    has.
    """
    mixers = [block.mixer for block in model.backbone.layers]
    kind = lambda cls: [m for m in mixers if isinstance(m, cls)]
    moe = kind(LatentMoE)
    found = {
        "routed experts off": ([m.experts for m in moe], False),
        "random experts, same gates": ([m.experts for m in moe], True),
        "shared expert off": ([m.shared_experts for m in moe], False),
        "attention off": (kind(Attention), False),
        "Mamba-2 off": (kind(Mamba2), False),
        "MLP off": (kind(MLP), False),
    }
    return {name: part for name, part in found.items() if part[0]}


@contextmanager
def without(model, name):
    """Inside, the model lacks this part; afterwards it is as it was."""
    modules, random = parts(model)[name]
    if random:
        hooks = [m.register_forward_pre_hook(random_experts()) for m in modules]
    else:
        hooks = [m.register_forward_hook(silent) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def nats(model, rows, asked=None, size=16, cast=nullcontext):
    """Mean nll of the targets.   rows (n, t+1) ids, asked (t,) bool: which places are targets"""
    device, total = model.lm_head.weight.device, 0.0
    asked = torch.ones(rows.shape[1] - 1, dtype=torch.bool) if asked is None else asked
    for ids in rows.split(size):
        ids = ids.to(device)
        with cast():
            logits = model(ids[:, :-1])
        mask = asked.to(device).repeat(len(ids), 1)
        total += float(mtp.nll(logits, ids[:, 1:], mask))
    return total / (len(rows) * int(asked.sum()))


def measure(model, rows, asked=None, tokens=None, size=16, cast=nullcontext):
    """Rows of the table. rows (n, t+1), asked (t,) as in `nats`; tokens: a held-out text that the
    MTP block drafts behind, without it its line is left out.
    """
    training = model.training
    model.eval()
    base = nats(model, rows, asked, size, cast)
    found = [dict(part="everything", layers=len(model.backbone.layers), worth=base, unit="nats")]
    for name, (modules, _) in parts(model).items():
        with without(model, name):
            more = nats(model, rows, asked, size, cast) - base
        found.append(dict(part=name, layers=len(modules), worth=more, unit="nats more"))
    if model.mtp is not None and tokens is not None and len(tokens) > 128:
        with cast():
            tally = heal.acceptance(model, tokens, DRAFTS, rows=16, new=48)
        length = tally.tokens / tally.rounds
        unit = f"tokens a round (at most {DRAFTS + 1})"
        found.append(dict(part="MTP drafts", layers=1, worth=length, unit=unit))
    model.train(training)
    return found


def table(rows):
    """The rows as lines to print."""
    base, *rest = rows
    lines = [f"what each part is worth: validation {base['worth']:.4f} nats/token with everything"]
    for r in rest:
        sign, places = ("+", 4) if r["unit"] == "nats more" else ("", 2)
        worth = f"{r['worth']:{sign}.{places}f}"
        lines.append(f"           {r['part']:28}{worth:>8} {r['unit']}")
    return lines


@dataclass(frozen=True)
class Flags:
    run: str = knob("runs/toy", "a run folder, or one checkpoint file in it")
    eval_tokens: int = knob(
        MOST, "size of the validation slice, always the same tokens", least=1, most=ENDLESS
    )
    threads: int = knob(0, "CPU threads; 0: torch's choice", least=0, most=4096)


def work(flags):
    sample.quicken()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    saved = checkpoint.read(flags.run)
    if "questions" in saved["run"]:
        raise ValueError(f"{flags.run} learned to answer questions: no text is held out for it")
    model, enc, step = sample.load_run(flags.run)
    corpus, length = data.corpus(saved.setting("data", str)), saved.setting("length", int)
    data.same_text(corpus, saved)
    val = data.encode(enc, corpus.val)
    rows = data.windows(val, flags.eval_tokens, length, corpus.unit)
    found = measure(model, rows, data.targets(corpus, length), val)
    print(f"{flags.run}, step {step}", *table(found), sep="\n")
    if Path(flags.run).is_dir():
        write(flags.run, found)


def write(folder, rows):
    disk.write(Path(folder) / "worth.csv", lambda f: f.write(disk.table(rows).encode()))


def main(argv=None):
    command.run(work, Flags, "worth.py", __doc__, argv)


if __name__ == "__main__":
    main()
