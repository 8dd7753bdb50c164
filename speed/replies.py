"""
How fast post/rollout.py writes replies, and which part of the model takes the time.

Every row writes the same number of tokens, none ends early, so tokens a second are of a full batch.
The time of a kind of layer is what its mixers take between entry and exit, measured in the same
runs; what is left is drawing, copying and Python.

    python bench.py --replies --preset mini

Not here  rows that leave the batch when they end: a run of grpo.py says what generation costs there
"""

import statistics
import time
from collections import defaultdict

import torch

from config import LETTERS, Config
from model import Nemotron
from post import rollout

GROUP, PROMPT, ROOM = 8, 32, 64  # replies to a prompt, tokens of a prompt and of a reply
ROWS = 64, 256


class Watch:
    """Seconds spent inside the modules that it was told of, by their names."""

    def __init__(self, device):
        self.device, self.seconds, self.hooks = device, defaultdict(float), []

    def now(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def add(self, name, module):
        began = []
        enter = module.register_forward_pre_hook(lambda *_: began.append(self.now()))

        def leave(*_):
            self.seconds[name] += self.now() - began.pop()

        self.hooks += [enter, module.register_forward_hook(leave)]

    def stop(self):
        for hook in self.hooks:
            hook.remove()


def parts(model):
    """(name, module) of everything that is timed: the mixers by their kind, and the head."""
    pattern = model.config.hybrid_override_pattern
    for letter, block in zip(pattern, model.backbone.layers):
        yield LETTERS[letter], block.mixer
    yield "head", model.lm_head


def once(model, rows, seed):
    """One batch of replies -> its tokens, seconds in all, seconds by part."""
    device = model.lm_head.weight.device
    g = torch.Generator().manual_seed(seed)
    asked = torch.randint(model.config.vocab_size, (-(-rows // GROUP), PROMPT), generator=g)
    draw = torch.Generator(device).manual_seed(seed)
    watch = Watch(device)
    for part in parts(model):
        watch.add(*part)
    began = watch.now()
    made = rollout.roll(model, asked.tolist(), min(GROUP, rows), ROOM, end=-1, generator=draw)
    seconds = watch.now() - began
    watch.stop()
    return sum(len(r.reply) for r in made), seconds, watch.seconds


def table(model, rounds, sizes=ROWS, say=print):
    """Tokens a second and the share of each part at each number of rows; medians of `rounds`."""
    model.eval()
    names = list(dict.fromkeys(name for name, _ in parts(model)))
    say(f"{'rows':>6}{'tokens/s':>10}" + "".join(f"{n:>11}" for n in [*names, "the rest"]))
    for rows in sizes:
        once(model, rows, 0)  # warms up
        runs = [once(model, rows, 1 + i) for i in range(rounds)]
        speed = statistics.median(tokens / seconds for tokens, seconds, _ in runs)
        shares = [statistics.median(by[n] / s for _, s, by in runs) for n in names]
        shares.append(1 - sum(shares))
        say(f"{rows:6}{speed:10,.0f}" + "".join(f"{x:11.0%}" for x in shares))


def measure(preset, device, rounds, say=print):
    model = Nemotron(Config.preset(preset)).to(device)
    say(f"{preset}: replies of {ROOM} tokens to prompts of {PROMPT}, {GROUP} to each")
    table(model, rounds, say=say)
