"""
Quantising a trained model: a run in, a released folder of four- and eight-bit weights out.

    python ptq.py --run runs/toy --bits 4.75 --out runs/toy-nvfp4     formats searched for
    python ptq.py --run runs/toy --map released --out runs/toy-as     a fixed map
    python ptq.py --hf DIR --out DIR2                                 a model larger than the memory
    python sample.py --hf runs/toy-nvfp4                              and it runs

Four passes, each layer by layer, so that one layer is in memory and no more:

    calibrate   0 ... L-1   x_{i+1} = layer_i(x_i); what its matrices read    quant/calibrate.py
    score       L-1 ... 0   dL/dx_i from dL/dx_{i+1}; each format's damage    quant/autoquant.py
    distill     --distill   the whole model in memory, with rounded weights    quant/distill.py
    write       0 ... L-1   the layer packed, into the folder; other text through it, for the table

Between them x_i, dL/dx_i and the scores lie in the folder's `progress`. Who was interrupted gives
the same command again, and goes on with the layer that was not finished.

    KL = mean over tokens of sum_v p_v (log p_v - log q_v)     p the model's, q the quantised one's

is what it cost; the loss differs by less, and by chance as often for the better.

Letters   L layers  n sequences  t tokens of each  d width
Not here  MTP, embedding, head, router, norms and conv: copied as they are
Sources   arXiv:2604.12374 section 4; QAD: KL of the logits against the BF16 model
"""

import copy
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors

import checkpoint
import command
import data
import hf
import sample
from command import ENDLESS, knob
from quant import autoquant, calibrate, distill, ondisk, packed

TOKENIZER = ("tokenizer.json", "tekken.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Flags:
    run: str = knob("runs/toy", "a run folder, or one checkpoint file in it")
    hf: str = knob("", "instead of a run: a released folder that is not quantised")
    out: str = knob("runs/quantised", "the folder to write")
    bits: float = knob(4.75, "mean bits of the weights that are searched", least=4.5, most=16)
    map: str = knob(
        "search",
        "search: the best formats under --bits; or a fixed map",
        choices=("search", *autoquant.MAPS),
    )
    method: str = knob(
        "auto",
        "of NVFP4's scales; auto: mse, and max after --distill",
        choices=("auto", *calibrate.METHODS),
    )
    cache: bool = knob(True, "keys and values in FP8")
    activations: bool = knob(True, "the table's numbers with inputs rounded as serving does")
    data: str = knob("", "text, as train.py has it; empty: the run's own, or Python's library")
    length: int = knob(128, "tokens of a sequence", least=8, most=1 << 20, memory=True)
    tokens: int = knob(8192, "of text for calibration", least=64, most=ENDLESS, memory=True)
    eval_tokens: int = knob(
        8192, "of other text, for the table", least=64, most=ENDLESS, memory=True
    )
    distill: int = knob(0, "steps of quantisation-aware distillation", least=0, most=ENDLESS)
    lr: float = knob(1e-4, "of the distillation", above=0, most=1)
    shard_bytes: int = knob(
        5_000_000_000, "size of a file", least=100_000, most=1 << 40, memory=True
    )
    seed: int = knob(0, "of the distillation's batches", least=0, most=2**32 - 1)
    threads: int = knob(0, "CPU threads; 0: torch's choice", least=0, most=1024)


# 1. What is quantised, and the text.


class Held:
    """A model in memory, as hf.Parts has one on disk. What is not quantised leaves in BF16."""

    def __init__(self, model):
        self.model, self.config = model.eval(), model.config

    def module(self, name):
        return copy.deepcopy(self.model.get_submodule(name))

    def dtype(self, name, t):
        return hf.precision(name, t, torch.bfloat16)


def opened(a):
    """The source, its tokenizer, and the text's name."""
    if not a.hf:
        saved = checkpoint.read(a.run)
        model, enc, _ = sample.load_run(a.run)
        return Held(model), enc, a.data or saved["run"]["data"]
    source = hf.Parts(a.hf)
    return source, sample.ids_of(a.hf, source.config.vocab_size), a.data or "stdlib"


def windows(tokens, count, length, what):
    """Windows (n, t+1) spread evenly over tokens, `count` tokens in all."""
    n = max(1, count // length)
    if len(tokens) < n + length + 1:
        raise ValueError(
            f"{what}: {len(tokens):,} tokens are too few for {n} sequences of {length} and a target"
        )
    starts = [i * (len(tokens) - length - 1) // max(1, n - 1) for i in range(n)]
    rows = [torch.as_tensor(tokens[s : s + length + 1].astype("int64")) for s in starts]
    return torch.stack(rows)


def in_pieces(f, x, rows=8):
    return torch.cat([f(part) for part in x.split(rows)])


# 2. The passes.


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
        checkpoint.write(self.path(*name), lambda f: ondisk.store(f, tensors))

    def kept(self, *name):
        return load_tensors(self.path(*name).read_bytes())

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
                checkpoint.write(self.path("score", i), lambda f: f.write(text.encode()))
            self.path("g", i + 1).unlink(missing_ok=True)
            self.note("score", i, old)
        found = {}
        for i in range(L):
            found |= {u: dict(s) for u, s in json.loads(self.path("score", i).read_text()).items()}
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
        groups = self.groups(flat_plan, kv)
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
        for k, parts in enumerate(groups, 1):
            file = (
                hf.SINGLE if len(groups) == 1 else f"model-{k:05}-of-{len(groups):05}.safetensors"
            )
            path, tensors = self.out / file, {}
            for part in parts:
                tensors |= self.part(part, plan, path.exists())
            if not path.exists():
                checkpoint.write(path, lambda f: ondisk.store(f, tensors))
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
        return hf.blank(self.source.config)

    def cast(self, module, name):
        """What is not quantised, rounded to what will be stored of it."""
        for n, p in module.named_parameters():
            kept = self.source.dtype(next(iter(hf.pieces(f"{name}.{n}", p))), p)
            p.data = p.data.to(kept).to(p.dtype)
        return module

    def released(self, module, name):
        """A module's tensors by their released names, in the dtypes of the folder."""
        found = {}
        for n, t in module.state_dict().items():
            for released, view in hf.pieces(f"{name}.{n}", t).items():
                codes = hf.scales(released) or view.dtype in (torch.uint8, torch.float8_e4m3fn)
                found[released] = view if codes else view.to(self.source.dtype(released, view))
        return found

    def groups(self, plan, kv):
        """The model's parts, in files of at most about shard_bytes each."""
        place = hf.places(hf.blank(self.source.config, plan, kv))
        parts = ["backbone.embeddings", *range(self.layers), "backbone.norm_f", "lm_head"]
        parts += ["mtp"] if self.source.config.num_nextn_predict_layers else []
        found, room = [], 0
        for part in parts:
            name = f"backbone.layers.{part}." if isinstance(part, int) else f"{part}."
            mine = {n: t for n, t in place.items() if n.startswith(name)}
            size = sum(
                t.numel() * hf.precision(n, t, torch.float32).itemsize for n, t in mine.items()
            )
            if size > room:
                found, room = [*found, []], self.a.shard_bytes
            found[-1].append(part)
            room -= size
        return found

    def index(self, where, plan, kv):
        """The JSON files, config.json last: a folder without one is not finished."""
        size = sum((self.out / f).stat().st_size for f in set(where.values()))
        given = command.document(Path(self.a.hf) / "config.json") if self.a.hf else None
        texts = {}
        if len(set(where.values())) > 1:
            texts[hf.INDEX] = dict(metadata=dict(total_size=size), weight_map=where)
        config = given or self.source.config.to_hf() | dict(dtype="bfloat16")
        if plan or kv:
            inside, beside = ondisk.quantization_config(
                plan, kv, self.source.config.n_routed_experts
            )
            texts["hf_quant_config.json"] = beside
            config = config | dict(quantization_config=inside)
        for name, content in (texts | {"config.json": config}).items():
            text = json.dumps(content, indent=2).encode()
            checkpoint.write(self.out / name, lambda f: f.write(text))

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


# 3. The command.


def begin(a, source):
    """The folder, new or left unfinished by the same settings."""
    out, path = Path(a.out), Path(a.out) / "progress" / "settings.json"
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a checkpoint already: --out names another folder")
    same = ("out", "threads")
    mine = {k: v for k, v in asdict(a).items() if k not in same}
    mine["config"] = asdict(source.config)
    if path.exists():
        old = command.document(path)
        wrong = [k for k in mine if old.get(k) != json.loads(json.dumps(mine[k]))]
        if wrong:
            raise ValueError(
                f"{out} holds an unfinished quantisation with another {', '.join(wrong)}: give its "
                "own flags to go on, or name another --out"
            )
        return True
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is there and not empty: --out names a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(path, lambda f: f.write(json.dumps(mine).encode()))
    return False


def sizes(source):
    """{unit: numel}, {unit: formats}; no weight is made."""
    model, numel, kinds = hf.blank(source.config), {}, {}
    for i, block in enumerate(model.backbone.layers):
        name = f"backbone.layers.{i}"
        for unit, modules in calibrate.of_block(block, name).items():
            found = calibrate.matrices(block, name, modules)
            numel[unit] = sum(w.numel() for w in found.values())
            kinds[unit] = autoquant.formats(found)
    return numel, kinds


def report(work, plan, score, numel, say):
    """The table by unit, and what all of it cost."""
    m, bits = work.text[:, 1:].numel(), autoquant.BITS
    say(
        f"{'unit':42} {'format':>7} {'bytes in BF16':>14} {'now':>12} {'KL, mnat':>10}  (predicted)"
    )
    for u, kind in plan.items():
        before, now = 2 * numel[u], int(bits[kind] * numel[u] / 8)
        kl = 1e3 * score[u][kind] / 2 / m
        name = u.removeprefix("backbone.")
        say(f"{name:42} {kind or 'BF16':>7} {before:14,} {now:12,} {kl:10.4f}")
    before, total = 2 * sum(numel.values()), sum(bits[k] * numel[u] / 8 for u, k in plan.items())
    kl = 1e3 * sum(score[u][k] for u, k in plan.items()) / 2 / m
    mean = autoquant.mean_bits(plan, numel)
    say(f"{'searched weights':42} {mean:7.3f} {before:14,} {int(total):12,} {kl:10.4f}")
    was, now, kl, error = work.cost()
    size = sum(f.stat().st_size for f in work.out.glob("*.safetensors"))
    how = "inputs rounded too" if work.a.activations else "weights alone rounded"
    say(f"files      {size:,} bytes")
    say(f"loss       {was:.4f} nats a token before, {now:.4f} after ({how})")
    tokens = f"{work.other[:, 1:].numel():,} tokens of other text"
    say(f"KL         {1e3 * kl:.2f} +- {1e3 * error:.2f} mnat a token, {tokens}")


def learn(work, a, plan, say):
    """--distill: the model as a whole, which must fit."""
    source = work.source
    model = source.model if isinstance(source, Held) else hf.load(a.hf)
    if work.path("distilled").exists():
        model.load_state_dict(work.kept("distilled"))
    else:
        stats = {n: s for i in range(work.layers) for n, s in work.stats(i).items()}
        model = distill.distill(model, plan, stats, work.text, a.distill, a.lr, a.seed, say=say)
        work.keep(model.state_dict(), "distilled")
    work.source = Held(model)


def quantise(a, say=command.say):
    """What the flags say, from the beginning or from where it stopped."""
    if a.distill and a.method not in ("auto", "max"):
        raise ValueError(f"--method {a.method} with --distill: what is learned are max's scales")
    if a.threads:
        torch.set_num_threads(a.threads)
    source, enc, name = opened(a)
    packed.refuse(getattr(source, "model", None) or source.blank, "ptq.py")
    numel, kinds = sizes(source)
    if a.map != "search":
        autoquant.named(a.map, kinds)
    corpus = data.corpus(name)
    texts = [
        windows(data.encode(enc, part), count, a.length, what)
        for part, count, what in (
            (corpus.train, a.tokens, "--tokens"),
            (corpus.val, a.eval_tokens, "--eval-tokens"),
        )
    ]
    if begin(a, source):
        say(f"{a.out}: going on with a quantisation that was not finished")
    work = Work(a, source, texts, say)
    work.calibrate()
    score = work.score()
    plan = (
        autoquant.assign(score, numel, a.bits)
        if a.map == "search"
        else autoquant.named(a.map, kinds)
    )
    if a.distill:
        learn(work, a, plan, say)
    work.write(plan)
    if a.hf:
        for file in TOKENIZER:
            if (Path(a.hf) / file).is_file():
                shutil.copy(Path(a.hf) / file, work.out / file)
    else:
        text = json.dumps(data.pack(enc)).encode()
        checkpoint.write(work.out / "tokenizer.json", lambda f: f.write(text))
    if a.distill:
        work.source = (
            source if a.hf else opened(a)[0]
        )  # the table compares with the model as it was
    report(work, plan, score, numel, say)
    shutil.rmtree(work.folder)
    say(f"wrote {a.out}; sample.py --hf takes it")


def main(argv=None):
    command.run(quantise, Flags, "ptq.py", __doc__, argv)


if __name__ == "__main__":
    main()
