"""
Data: a batch is a pure function of (seed, step, rank).

    corpus(spec)         train | val: the last 5 % of the text is never trained on
    encode(enc, train)   one long row of ids, by tokenizer.py
    batch(ids, seed, step, size, length)   `size` windows of it, where a hash of (seed, step) says

So a run that resumes at step 1000 needs no data state, and two ranks of half a batch see what one
rank sees.

Three kinds of corpus need no download: `python`, the source of the running Python's standard
library; three synthetic tasks, lines so regular that the bits per byte a perfect model would pay
are known; and `facts`, which nothing but memory can answer.

Not here  the rules of the synthetic corpora, ids that are on disk already, the network: corpora/;
          who sees whom: a blank line joins files, windows cross it, and `documents` says where
Sources   llm.c, nanoGPT (a batch is windows of one long row)
"""

import glob
import sys
import sysconfig
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import command

import numpy as np
import torch

from bounds import knob
from corpora import download, synthetic, tokenfiles
from corpora.philox import philox

# data is the door to the tokenizer too: train.py and sample.py say data.encode, data.pack and so
# on.
from tokenizer import (  # noqa: F401 (callers say data.pack)
    END,
    encode,
    pack,
    token_bytes,
    tokenizer,
    unpack,
    vocab_size,
)

# 1. Corpora


class Corpus(NamedTuple):
    """`size` in bytes; `sha256` of them all, or of 256 evenly spread MiB if token files hold more.

    Windows begin at a multiple of `unit` tokens, and of each unit the tokens at the places `asked`
    are targets: in a text every token is.
    """

    name: str
    train: object  # str, or an array of ids
    val: object
    size: int
    sha256: str
    starts: tuple = ()  # of a text: where each file begins, in characters of train + val
    unit: int = 1
    asked: tuple = (0,)


def corpus(spec):
    """`python`, `shakespeare`, `fineweb`, a task, `facts`, a text or .bin file, a folder of .txt
    .md .py, a glob.
    """
    if not spec:
        raise ValueError("corpus '' is no place")
    if spec in synthetic.TASKS:
        return text_corpus(spec, synthetic.task(spec))
    if spec == "facts" or spec.startswith("facts:"):
        return facts(spec)
    if spec == "python":
        return text_corpus(*standard_library())
    paths = sorted(on_disk(spec), key=Path.as_posix)
    if not paths and spec in download.URLS:
        raise ValueError(
            f"{spec} is not in {download.DATA}; fetch it once with: python data.py "
            f"--download {spec}"
        )
    if not paths:
        raise ValueError(
            f"corpus {spec!r} is no file, no folder with .txt, .md or .py files, and none of "
            f"python, shakespeare, fineweb, {', '.join(synthetic.TASKS)}, facts"
        )
    if all(p.suffix == ".bin" for p in paths):
        return Corpus(spec, *tokenfiles.split(paths, spec))
    return text_corpus(spec, list(map(command.text, paths)))


def on_disk(spec):
    """The paths of what is on disk by that name."""
    path = Path(spec)
    if spec in download.URLS:
        return download.DATA.glob("shakespeare.txt" if spec == "shakespeare" else "fineweb_*.bin")
    if path.is_dir():
        return (p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py") and p.is_file())
    found = [path] if path.is_file() else map(Path, glob.glob(spec, recursive=True))
    return (p for p in found if p.is_file())  # a pipe or a device has no end, or no second time


def facts(spec):
    """Ids of a byte each; of every five the last two are asked for."""
    n, rows = synthetic.facts(spec)
    cut = len(rows) * 95 // 100
    train, val = rows[:cut].ravel(), rows[cut:].ravel()
    made = Corpus(f"facts:{n}", train, val, rows.size, sha256(rows).hexdigest())
    return made._replace(unit=5, asked=(3, 4))


def same_text(corpus, saved):
    """ValueError unless a checkpoint was trained on this very text."""
    if saved.get("corpus_sha256", corpus.sha256) != corpus.sha256:
        raise ValueError(
            f"{corpus.name}: this is not the text the run was trained on: sha256 "
            f"{corpus.sha256[:12]}, not {saved['corpus_sha256'][:12]}"
        )


def text_corpus(name, files):
    """The files' texts (or one text), joined by a blank line."""
    files = [files] if isinstance(files, str) else files
    text, starts = "\n\n".join(files), list(accumulate((len(f) + 2 for f in files), initial=0))
    cut, raw = len(text) * 95 // 100, text.encode()  # between characters, not bytes
    if cut == 0:
        raise ValueError(f"corpus {name!r} is empty: {len(raw)} bytes leave nothing to train on")
    held = Corpus(name, text[:cut], text[cut:], len(raw), sha256(raw).hexdigest())
    return held._replace(starts=tuple(starts[:-1]))


def standard_library():
    """The running Python's own source: on every machine, without a download -> name, texts.

    Files come in the order of their path's hash: the last 5 % is a fair sample, not the alphabet's
    end."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        p.relative_to(root)
        for name in sys.stdlib_module_names  # not what pip or the build added
        for p in (root / f"{name}.py", *(root / name).rglob("*.py"))
        if p.is_file()
    ]
    files = [p for p in files if not {"test", "tests", "idlelib"} & set(p.parts)]
    files.sort(key=lambda p: sha256(p.as_posix().encode()).digest())
    texts = [(root / p).read_text("utf-8", "replace") for p in files]
    return f"python {sys.version.split()[0]} ({len(files)} files)", texts


def documents(corpus, enc):
    """The training split file by file, each ended by the end-of-text id -> ids, and of every one
    the number of its file.
    """
    if not isinstance(corpus.train, str):
        raise ValueError(f"{corpus.name} holds ids, which do not say where a document ends")
    if END not in enc.special_tokens_set:
        raise ValueError(f"{enc.name} has no {END} to end a document with")
    edges = [s for s in corpus.starts if s < len(corpus.train)] + [len(corpus.train)]
    files = [encode(enc, corpus.train[a:b]) for a, b in zip(edges, edges[1:])]
    end = np.array([enc.encode_single_token(END)], files[0].dtype)
    files = [np.append(ids, end) for ids in files]
    return np.concatenate(files), np.repeat(np.arange(len(files)), list(map(len, files)))


# 2. Batches, and the command line


class Batch(NamedTuple):
    """What a step learns from. Sums over all ranks' pieces are divided by `counts` and `rows`, the
    global batch's.
    """

    pieces: list  # of (ids (b, t+1), mask or None, ...)
    counts: list  # targets at depth 0, 1, ..., K, or weights
    rows: int
    tokens: int


def batch(tokens, seed, step, size, length, rank=0, world=1, unit=1):
    """The rows of `rank`: it takes its stretch of one global batch, which knows only (seed, step).
    Rows begin at multiples of `unit`.   -> (size / world, length) int64
    """
    if min(size, length, unit, world, 1 + rank, world - rank) < 1:
        raise ValueError(f"{size} rows of {length} tokens, unit {unit}, rank {rank} of {world}")
    if len(tokens) < length:
        raise ValueError(f"the corpus has {len(tokens):,} tokens, one sequence needs {length:,}")
    if size % world:
        raise ValueError(f"a batch of {size} sequences does not divide among {world} ranks")
    places = (len(tokens) - length) // unit + 1
    starts = philox(seed, step, size) % places * unit  # (size,)
    rows = [tokens[i : i + length] for i in starts.reshape(world, -1)[rank].tolist()]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def windows(tokens, most, length, unit=1):
    """The validation slice: windows of `length` tokens and the one that follows, spread evenly,
    always the same; `most` tokens in all, if there are as many.   -> (n, length + 1) int64
    """
    if min(length, unit) < 1 or len(tokens) <= length:
        raise ValueError(f"windows of {length} tokens and one more, of {len(tokens):,} tokens")
    n = max(1, min(most, len(tokens) - 1) // length)
    last = (len(tokens) - length - 1) // unit
    starts = [i * last // max(1, n - 1) * unit for i in range(n)]
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def send(x, device):
    """x on the device. A GPU copies it by itself while the host goes on, out of pinned memory."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def widest(x):
    """x in the widest numbers that its device has: fp64, on Apple's MPS fp32."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def targets(corpus, t):
    """Which of the t tokens after a row's first one are asked for.   -> (t,) bool"""
    return torch.tensor([j % corpus.unit in corpus.asked for j in range(1, t + 1)])


def describe(corpus, enc, train_tokens, val_tokens):
    """One line on what is trained on; the last two are counts. Refuses a tokenizer too small for
    the ids: all of both splits are looked at, 16 bits at a time, which takes about a second a GB.
    """
    ratio = corpus.size / (train_tokens + val_tokens)
    if not isinstance(corpus.val, str):
        for split, ids in (("training", corpus.train), ("validation", corpus.val)):
            if (most := tokenfiles.largest(ids)) >= vocab_size(enc):
                raise ValueError(
                    f"{corpus.name} has id {most} in its {split} split, but {enc.name} has "
                    f"{vocab_size(enc):,} ids"
                )
        some = torch.from_numpy(corpus.val[: 1 << 20].astype(np.int64))
        ratio = token_bytes(enc)[some].double().mean()
    return (
        f"{corpus.name}: {corpus.size:,} bytes, {train_tokens:,} + {val_tokens:,} tokens of "
        f"{enc.name}, {ratio:.2f} bytes/token, sha256 {corpus.sha256[:12]}"
    )


@dataclass(frozen=True)
class Flags:
    download: str = knob(
        "", "fetch this corpus into data/, and nothing else", choices=("", *download.URLS)
    )
    shards: int = knob(1, "training files of fineweb, 100 M tokens each", least=1, most=103)


def show(a):
    """Prints what the file claims: a batch is a function, and what a task costs."""
    if a.download:
        return download.fetch(a.download, a.shards)

    text = corpus("python")
    enc = tokenizer("bpe:2048", text.train)
    train, val = encode(enc, text.train), encode(enc, text.val)
    whole = batch(train, seed=0, step=7, size=4, length=20)
    ranks = [batch(train, seed=0, step=7, size=4, length=20, rank=r, world=2) for r in range(2)]
    print(
        describe(text, enc, len(train), len(val)),
        "\nbatch(seed 0, step 7), 4 sequences of 20:",
        *(f"    {enc.decode(row)!r}" for row in whole.tolist()),
        sep="\n",
    )
    print(
        f"rank 0 of 2 above rank 1 is the same: {torch.equal(whole, torch.cat(ranks))}\n"
        f"step 8 is the same:                   {torch.equal(whole, batch(train, 0, 8, 4, 20))}\n\n"
        "task         floor   in bits per byte: what a perfect model pays"
    )
    for name in synthetic.TASKS:
        first = synthetic.task(name).splitlines()[0]
        print(f"{name:11}{synthetic.entropy_floor(name):7.3f}   {first}")
    few = corpus("facts").train[:15].reshape(-1, 5).tolist()
    shown = "   ".join(f"{bytes(f[:3]).hex()} -> {bytes(f[3:]).hex()}" for f in few)
    print(f"{'facts':11}{0:7.3f}   {shown}, once all {16 * synthetic.FACTS:,} bits are known")


def main(argv=None):
    command.run(show, Flags, "data.py", __doc__, argv)


if __name__ == "__main__":
    main()
