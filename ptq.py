"""
Quantising a trained model: a run in, a released folder of four- and eight-bit weights out.

    python ptq.py --run runs/toy --bits 4.75 --out runs/toy-nvfp4     formats searched for
    python ptq.py --run runs/toy --map released --out runs/toy-as     a fixed map
    python ptq.py --hf DIR --out DIR2                                 a model larger than the memory
    python sample.py --hf runs/toy-nvfp4                              and it runs

Its text goes through the model layer by layer, so that one layer is in memory and no more:
layerwise.py has the passes. Between them stands the choice:

    calibrate, score   what each format of each unit would cost        layerwise.py
    assign             the cheapest formats under --bits, or --map     quant/autoquant.py
    distill            --distill: the whole model in memory, with rounded weights
    write, report      the folder, and the table by unit

Who was interrupted gives the same command again, and goes on with the layer that was not finished.

Letters   n sequences  t tokens of each
Not here  the passes: layerwise.py; formats and scales: quant/
Sources   arXiv:2604.12374 section 4; QAD: KL of the logits against the BF16 model
"""

import copy
import json
import shutil
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import command

import torch

import census
import checkpoint
import data
import disk
import hf
import sample
from bounds import ENDLESS, knob
from layerwise import Work
from quant import autoquant, calibrate, distill, packed

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
        return Held(model), enc, a.data or saved.setting("data", str)
    source = hf.Parts(a.hf)
    return source, sample.ids_of(a.hf, source.config.vocab_size), a.data or "stdlib"


def windows(tokens, count, length, what):
    """Windows (n, t+1) spread evenly over tokens, `count` tokens in all."""
    if min(count, length) < 1:
        raise ValueError(f"{what}: {count} tokens in sequences of {length}")
    n = max(1, count // length)
    if len(tokens) < n + length + 1:
        raise ValueError(
            f"{what}: {len(tokens):,} tokens are too few for {n} sequences of {length} and a target"
        )
    starts = [i * (len(tokens) - length - 1) // max(1, n - 1) for i in range(n)]
    rows = [torch.as_tensor(tokens[s : s + length + 1].astype("int64")) for s in starts]
    return torch.stack(rows)


# 2. From the flags to the folder.


def mark(a):
    """What tells one source from another: sizes, and 64 stretches of each file."""
    place, sha = Path(a.hf or a.run), sha256()
    runs = checkpoint.steps(place)[-1:] if place.is_dir() else [place]
    for path in sorted(place.glob("*.safetensors")) if a.hf else runs:
        size = path.stat().st_size
        sha.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for at in range(0, size, max(1 << 16, size // 64)):
                f.seek(at)
                sha.update(f.read(1 << 16))
    return sha.hexdigest()


def begin(a, source, text):
    """The folder, new or left unfinished by the same settings, of the same model and text."""
    out, path = Path(a.out), Path(a.out) / "progress" / "settings.json"
    same = ("out", "threads")
    mine = {k: v for k, v in asdict(a).items() if k not in same}
    mine |= dict(config=asdict(source.config), weights=mark(a), text=text)
    if path.exists():
        old = command.document(path)
        wrong = [k for k in mine if old.get(k) != json.loads(json.dumps(mine[k]))]
        if wrong:
            raise ValueError(
                f"{out} holds an unfinished quantisation with another {', '.join(wrong)}: give its "
                "own flags to go on, or name another --out"
            )
        return True
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a checkpoint already: --out names another folder")
    if out.exists() and any(p.name != ".lock" for p in out.iterdir()):
        raise ValueError(f"{out} is there and not empty: --out names a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, lambda f: f.write(json.dumps(mine).encode()))
    return False


def sizes(source):
    """{unit: numel}, {unit: formats}; no weight is made."""
    model, numel, kinds = census.blank(source.config), {}, {}
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
    """What the flags say, from the beginning or from where it stopped, alone in its folder."""
    try:
        with disk.lock(a.out):
            convert(a, say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from there") from None


def convert(a, say):
    """The story of `quantise`."""
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
    if begin(a, source, corpus.sha256):
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
    if a.hf:
        for file in TOKENIZER:
            if (Path(a.hf) / file).is_file():
                shutil.copy(Path(a.hf) / file, work.out / file)
    else:
        text = json.dumps(data.pack(enc)).encode()
        disk.write(work.out / "tokenizer.json", lambda f: f.write(text))
    work.write(plan)
    if a.distill:
        # the table compares with the model as it was
        work.source = source if a.hf else opened(a)[0]
    report(work, plan, score, numel, say)
    shutil.rmtree(work.folder)
    say(f"wrote {a.out}; sample.py --hf takes it")


def main(argv=None):
    command.run(quantise, Flags, "ptq.py", __doc__, argv)


if __name__ == "__main__":
    main()
