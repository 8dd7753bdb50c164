"""
A model quantised layer by layer: four passes, of which each has one layer in memory and no more.

    calibrate   0 ... L-1   x_{i+1} = layer_i(x_i); what its matrices read    quant/calibrate.py
    score       L-1 ... 0   dL/dx_i from dL/dx_{i+1}; each format's damage    quant/autoquant.py
    write       0 ... L-1   the layer packed, into the folder; other text through it
    cost        the top     logits with and without, of the other text

A pass needs of all layers before it nothing but what they gave: x_i going up, dL/dx_i coming down.
So the layers take turns in memory, and what stands between two of them lies on disk, in the
folder's `progress`:

    x-i      what layer i reads, of both texts      stats-i   what its matrices read
    g-i      dL/dx_i, until it is used              score-i   the damage of each format, by unit
    s-i      what layer i reads after the layers below it were quantised

A pass that finds a layer's files there leaves the layer alone, which is how an interrupted run goes
on.

    KL = mean over tokens of sum_v p_v (log p_v - log q_v)     p the model's, q the quantised one's

is what it cost; the loss differs by less, and by chance as often for the better.

Letters   L layers  n sequences  t tokens of each  d width  x, g, s (n, t, d)
Not here  the flags, the choice of formats, the table: ptq.py; how a matrix is rounded:
          quant/calibrate.py; MTP, embedding, head, router, norms and conv are copied as they are
Sources   arXiv:2604.12374 section 4
"""

import json
import time
from pathlib import Path

import command

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

import census
import disk
import hf
from quant import autoquant, calibrate, ondisk, packed


def in_pieces(f, x, rows=8):
    return torch.cat([f(part) for part in x.split(rows)])


class Work:
    """A quantisation under way: its source, its files, and how far it is."""

    def __init__(self, a, source, texts, say=print):
        self.a, self.source, self.say = a, source, say
        self.text, self.other = texts  # for calibration, for the table: ids (n, t+1)
        self.out, self.folder = Path(a.out), Path(a.out) / "progress"
        self.layers = len(source.config.hybrid_override_pattern)
        self.began, self.done, self.steps = time.monotonic(), 0, 3 * self.layers
        self.method = "max" if a.method == "auto" and a.distill else a.method
        self.method = "mse" if self.method == "auto" else self.method

    def path(self, name, i=""):
        return self.folder / f"{name}{'-' if i != '' else ''}{i}"

    def keep(self, tensors, *name):
        disk.write(self.path(*name), lambda f: ondisk.store(f, tensors))

    def kept(self, *name):
        try:
            return load_tensors(self.path(*name).read_bytes())
        except SafetensorError as e:
            again = f"without {self.folder} it begins anew"
            raise ValueError(f"{self.path(*name)} is damaged ({e}): {again}") from None

    def note(self, what, i, old=False):
        """A line for a layer that is done, with the time that is left at this pace."""
        self.done += not old
        self.steps -= old
        if not old:
            spent = time.monotonic() - self.began
            left = spent / self.done * (self.steps - self.done)
            self.say(
                f"{what:10} layer {i + 1:3} of {self.layers}   {spent:6.0f} s, "
                f"about {left:.0f} s left"
            )

    def block(self, i):
        return self.source.module(f"backbone.layers.{i}").requires_grad_(False)

    @torch.no_grad()
    def calibrate(self):
        """x-i: what layer i reads, of both texts; stats-i: what its matrices read."""
        correlate = self.method in ("output", "gptq")
        if not self.path("x", 0).exists():
            embed = self.source.module("backbone.embeddings")
            self.keep(dict(x=embed(self.text[:, :-1]), other=embed(self.other[:, :-1])), "x", 0)
        for i in range(self.layers):
            old = self.path("x", i + 1).exists()
            if not old:
                both, block, stats = self.kept("x", i), self.block(i), {}
                with calibrate.listening(block, f"backbone.layers.{i}", stats, correlate):
                    x = in_pieces(block, both["x"])
                self.keep(flat(stats), "stats", i)
                self.keep(dict(x=x, other=in_pieces(block, both["other"])), "x", i + 1)
            self.note("calibrate", i, old)

    def stats(self, i):
        return thick(self.kept("stats", i))

    def score(self):
        """score-i: of layer i's units; g-i: the loss's gradient at what it reads. From last to
        first.
        """
        L, how = self.layers, "max" if self.method == "max" else "mse"
        if not any(self.path("g", i).exists() for i in range(L + 1)):
            self.keep(dict(g=self.top_gradient(self.kept("x", L)["x"])), "g", L)
        for i in reversed(range(L)):
            old = self.path("score", i).exists()
            if not old:
                block, score, g = self.block(i), {}, self.kept("g", i + 1)["g"]
                below, name = [], f"backbone.layers.{i}"
                with autoquant.judging(block, name, self.stats(i), score, how):
                    for x, d in zip(self.kept("x", i)["x"].split(8), g.split(8)):
                        x.requires_grad_(True)
                        block(x).backward(d)
                        below.append(x.grad)
                self.keep(dict(g=torch.cat(below)), "g", i)
                text = json.dumps({u: list(s.items()) for u, s in score.items()})
                disk.write(self.path("score", i), lambda f: f.write(text.encode()))
            self.path("g", i + 1).unlink(missing_ok=True)
            self.note("score", i, old)
        found = {}
        for i in range(L):
            found |= {u: dict(s) for u, s in command.document(self.path("score", i)).items()}
        return autoquant.settled(found)

    def top_gradient(self, x):
        """d(summed nll)/dx of what the last layer gives."""
        norm, head = self.top()
        found = []
        for part, ids in zip(x.split(8), self.text.split(8)):
            part.requires_grad_(True)
            logits = head(norm(part)).flatten(0, 1)
            F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
            found.append(part.grad)
        return torch.cat(found)

    def top(self):
        names = "backbone.norm_f", "lm_head"
        return [self.source.module(n).requires_grad_(False) for n in names]

    @torch.no_grad()
    def write(self, plan):
        """The folder's files, layer by layer; the other text goes through what is in them."""
        kv = [f"backbone.layers.{i}.mixer" for i in self.attention()] if self.a.cache else []
        table = calibrate.units(self.source_blank())
        flat_plan = {n: kind for u, kind in plan.items() if kind for n in table[u]}
        sizes = self.sizes(flat_plan, kv)
        if not self.path("s", 0).exists():
            self.keep(
                dict(
                    s=self.cast(self.source.module("backbone.embeddings"), "backbone.embeddings")(
                        self.other[:, :-1]
                    )
                ),
                "s",
                0,
            )
        where = {}
        for file, parts in census.shards(sizes, self.a.shard_bytes).items():
            path, tensors = self.out / file, {}
            for part in parts:
                tensors |= self.part(part, plan, path.exists())
            if not path.exists():
                disk.write(path, lambda f: ondisk.store(f, tensors))
            where |= dict.fromkeys(ondisk.header(path)[0], file)
        self.index(where, flat_plan, kv)

    def part(self, part, plan, there):
        """The tensors of one part, as they are written; of a layer, its other text goes on."""
        if not isinstance(part, int):
            if there:
                return {}
            return self.released(self.cast(self.source.module(part), part), part)
        after, name = self.path("s", part + 1), f"backbone.layers.{part}"
        if there and after.exists():
            self.note("write", part, True)
            return {}
        block = self.block(part)
        calibrate.pack_block(block, name, plan, self.stats(part), self.method, self.a.cache)
        packed.rounded(self.cast(block, name), self.a.activations)
        self.keep(dict(s=in_pieces(block, self.kept("s", part)["s"])), "s", part + 1)
        self.note("write", part)
        return self.released(block, name)

    def attention(self):
        return [i for i, x in enumerate(self.source.config.hybrid_override_pattern) if x == "*"]

    def source_blank(self):
        return census.blank(self.source.config)

    def cast(self, module, name):
        """What is not quantised, rounded to what will be stored of it."""
        for n, p in module.named_parameters():
            kept = self.source.dtype(next(iter(census.pieces(f"{name}.{n}", p))), p)
            p.data = p.data.to(kept).to(p.dtype)
        return module

    def released(self, module, name):
        """A module's tensors by their released names, in the dtypes of the folder."""
        found = {}
        for n, t in module.state_dict().items():
            for released, view in census.pieces(f"{name}.{n}", t).items():
                codes = census.scales(released) or view.dtype in (torch.uint8, torch.float8_e4m3fn)
                found[released] = view if codes else view.to(self.source.dtype(released, view))
        return found

    def sizes(self, plan, kv):
        """{part of the model: its bytes, about}."""
        place = census.places(census.blank(self.source.config, plan, kv))
        parts = ["backbone.embeddings", *range(self.layers), "backbone.norm_f", "lm_head"]
        parts += ["mtp"] if self.source.config.num_nextn_predict_layers else []
        found = {}
        for part in parts:
            name = f"backbone.layers.{part}." if isinstance(part, int) else f"{part}."
            mine = {n: t for n, t in place.items() if n.startswith(name)}
            found[part] = sum(
                t.numel() * hf.precision(n, t, torch.float32).itemsize for n, t in mine.items()
            )
        return found

    def index(self, where, plan, kv):
        """The JSON files, config.json last: a folder without one is not finished."""
        size = sum((self.out / f).stat().st_size for f in set(where.values()))
        given = command.document(Path(self.a.hf) / "config.json") if self.a.hf else None
        texts = {}
        if len(set(where.values())) > 1:
            texts[census.INDEX] = dict(metadata=dict(total_size=size), weight_map=where)
        config = given or self.source.config.to_hf() | dict(dtype="bfloat16")
        if plan or kv:
            inside, beside = ondisk.quantization_config(
                plan, kv, self.source.config.n_routed_experts
            )
            texts["hf_quant_config.json"] = beside
            config = config | dict(quantization_config=inside)
        for name, content in (texts | {"config.json": config}).items():
            text = json.dumps(content, indent=2).encode()
            disk.write(self.out / name, lambda f: f.write(text))

    @torch.no_grad()
    def cost(self):
        """Loss before and after, KL and its standard error, nats a token of the other text."""
        norm, head = self.top()
        low_norm, low_head = (
            self.cast(m, n) for m, n in zip(self.top(), ("backbone.norm_f", "lm_head"))
        )
        before, after, kl = [], [], []
        last = self.kept("x", self.layers)["other"], self.kept("s", self.layers)["s"]
        for x, s, ids in zip(*(v.split(4) for v in last), self.other.split(4)):
            p, q = head(norm(x)).log_softmax(-1), low_head(low_norm(s)).log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).flatten())
            y = ids[:, 1:, None]
            before, after = [*before, -p.gather(-1, y)], [*after, -q.gather(-1, y)]
        kl = torch.cat(kl).double()
        mean = lambda xs: float(torch.cat(xs).double().mean())
        return mean(before), mean(after), float(kl.mean()), float(kl.std() / len(kl) ** 0.5)


def flat(stats):
    """{matrix: Stats} -> tensors by name."""
    found = {}
    for n, s in stats.items():
        found |= {f"{n}|amax": s.amax, f"{n}|count": s.count}
        found |= {} if s.H is None else {f"{n}|H": s.H}
    return found


def thick(tensors):
    """The way back."""
    found = {}
    for key, t in tensors.items():
        name, _, what = key.rpartition("|")
        found.setdefault(name, calibrate.Stats(1, 1, False))
        setattr(found[name], what, t)
    return found


if __name__ == "__main__":
    command.part("python ptq.py --run runs/toy --bits 4.75 --out runs/toy-nvfp4")
