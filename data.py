"""
Data: a batch is a pure function of (seed, step, rank).

    corpus(spec)         train | val: the last 5 % of the text is never trained on
    encode(enc, train)   one long row of ids, by tokenizer.py
    batch(ids, seed, step, size, length)   `size` windows of it, where a hash of (seed, step) says

So a run that resumes at step 1000 needs no data state, and two ranks of half a batch see what one
rank sees.

Three kinds of corpus need no download: `python`, the source of the running Python's standard
library; three synthetic tasks, lines so regular that entropy_floor knows the bits per byte a
perfect model would pay; and `facts`, which nothing but memory can answer: n random facts, three key
bytes and two value bytes each, the loss on the values alone. 8,192 of them are 131 kbit, and a
model that has them pays nothing.

Not here  the network, except with --download; who sees whom: a blank line joins files, windows
          cross it, and `documents` says where
Sources   llm.c, nanoGPT (token files); Salmon et al. 2011 (Philox)
"""

import glob
import math
import re
import shutil
import sys
import sysconfig
import urllib.request
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import command
from command import knob

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

DATA = Path(__file__).resolve().parent / "data"  # where --download writes
URLS = {
    "shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
    "fineweb": "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/",
}
SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # its sha256
TASKS = ("recall", "copy", "arithmetic")
FACTS = 8192  # in `facts`; facts:N has N


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
    path = Path(spec)
    if spec in TASKS:
        return text_corpus(spec, task(spec))
    if spec == "facts" or spec.startswith("facts:"):
        return facts(spec)
    if spec == "python":
        return text_corpus(*standard_library())
    if spec in URLS:
        paths = DATA.glob("shakespeare.txt" if spec == "shakespeare" else "fineweb_*.bin")
    elif path.is_dir():
        paths = (p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py") and p.is_file())
    else:
        paths = [path] if path.is_file() else map(Path, glob.glob(spec, recursive=True))
    paths = sorted(paths, key=Path.as_posix)
    if not paths and spec in URLS:
        raise ValueError(
            f"{spec} is not in {DATA}; fetch it once with: python data.py --download {spec}"
        )
    if not paths:
        raise ValueError(
            f"corpus {spec!r} is no file, no folder with .txt, .md or .py files, and none of "
            f"python, shakespeare, fineweb, {', '.join(TASKS)}, facts"
        )
    if all(p.suffix == ".bin" for p in paths):
        return token_corpus(spec, paths)
    return text_corpus(spec, list(map(read, paths)))


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


def read(path):
    try:
        return path.read_text("utf-8-sig")  # \r\n becomes \n
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path} is not UTF-8: byte {e.object[e.start]:#04x} at {e.start:,}"
        ) from None


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


# 2. Token files, memory-mapped: 10 GB cost nothing until a window of them is read


def layout(path):
    """llm.c: int32[256] = magic, version, count, then ids. nanoGPT: bare uint16. -> dtype, count,
    offset
    """
    size, head = path.stat().st_size, np.fromfile(path, "<i4", 256)
    kind, count, offset = "<u2", size // 2, 0
    if len(head) == 256 and head[0] // 10000 == 2024:  # GPT-2 ids cannot spell that
        kind, count, offset = (
            {20240520: "<u2", 20240801: "<u4"}.get(int(head[0])),
            int(head[2]),
            1024,
        )
        if kind is None:
            raise ValueError(
                f"{path} has magic {head[0]}, neither 20240520 (uint16) nor 20240801 (uint32)"
            )
    need = offset + count * np.dtype(kind).itemsize
    if size != need:
        raise ValueError(f"{path} has {size:,} bytes where {count:,} ids need {need:,}")
    return kind, count, offset


def token_corpus(name, paths):
    """If some files have the word `val` in their names, those are validation; else the last 5 %
    is.
    """
    ids, size, seen = {}, sum(p.stat().st_size for p in paths), sha256()
    for p in paths:
        kind, count, offset = layout(p)
        ids[p] = np.asarray(np.memmap(p, kind, "r", offset, count) if count else np.empty(0, kind))
        with open(p, "rb") as f:
            for at in range(0, p.stat().st_size, max(1 << 20, size // 256)):
                f.seek(at)
                seen.update(f.read(1 << 20))
    total = sum(map(len, ids.values()))
    if total < 2:
        raise ValueError(f"corpus {name!r} is empty: {total} tokens in {size:,} bytes")
    held = {p: "val" in re.split(r"[\W_]+", p.stem) for p in paths}
    train, val = ([ids[p] for p in paths if len(ids[p]) and held[p] == v] for v in (False, True))
    if not (train and val):
        cut = total * 95 // 100
        train, val = span(ids.values(), 0, cut), span(ids.values(), cut, total)
    train, val = (parts[0] if len(parts) == 1 else Shards(parts) for parts in (train, val))
    return Corpus(name, train, val, size, seen.hexdigest())


def span(parts, a, b):
    """Views of positions a to b of the joined `parts`."""
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    views = [p[max(a - start, 0) : max(b - start, 0)] for p, start in zip(parts, starts)]
    return [v for v in views if len(v)]


class Shards:
    """Several arrays read as one: a slice copies what it spans and leaves the rest alone."""

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, s):
        a, b, _ = s.indices(len(self))
        return np.concatenate(span(self.parts, a, b) or [self.parts[0][:0]])


# 3. Synthetic tasks: a megabyte of lines whose entropy is known, the same on every machine


def philox(seed, step, n):
    """n uint64: a hash of (seed, step), not a place in a sequence. numpy promises to keep these
    bits.
    """
    return np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(n)


def task(name):
    """recall      k3a7...?a7a7...    8 letters, each with a digit; then 8 times one of them
    copy        hbac...|hbac...    16 letters from a to p, and again
    arithmetic  347+058=0405       two numbers and their sum
    """

    def dice(draw, sides, *shape):
        return (
            (philox(TASKS.index(name), draw, math.prod(shape)) % sides)
            .astype(np.int64)
            .reshape(shape)
        )

    if name == "arithmetic":
        return "".join(f"{a:03}+{b:03}={a + b:04}\n" for a, b in dice(0, 1000, 76_923, 2).tolist())
    rows = 29_411
    if name == "copy":
        said = asked = ord("a") + dice(0, 16, rows, 16)  # (rows, 16)
    else:
        key = ord("a") + dice(0, 2**62, rows, 26).argsort(1)[:, :8]  # (rows, 8)     none twice
        said = np.stack([key, ord("0") + dice(1, 10, rows, 8)], -1)  # (rows, 8, 2)
        asked = np.take_along_axis(said, dice(2, 8, rows, 8)[..., None], 1)  # (rows, 8, 2)
    sign = lambda c: np.full((rows, 1), ord(c))
    line = [
        said.reshape(rows, 16),
        sign("|" if name == "copy" else "?"),
        asked.reshape(rows, 16),
        sign("\n"),
    ]
    return np.hstack(line).astype(np.uint8).tobytes().decode()


def entropy_floor(name):
    """Bits per byte of a task's lines: what a perfect model pays, and on average none pays less."""
    choices = {"recall": math.perm(26, 8) * 10**8 * 8**8, "copy": 16**16, "arithmetic": 1000**2}
    return math.log2(choices[name]) / (13 if name == "arithmetic" else 34)


def facts(spec):
    """facts:N  k k k v v  k k k v v ...  N different keys of three bytes, each with two bytes that
    follow from nothing: 16 N bits. All N in some order, then all in another, at least 20 times and
    a megabyte: the last 5 % asks for nothing that was not told before.
    """
    n = spec.removeprefix("facts:")
    n = FACTS if n == "facts" else int(n) if n.isascii() and n.isdigit() else 0
    if not 1 <= n <= 1 << 20:
        raise ValueError(f"corpus {spec!r}: facts:N has N facts, from 1 to {1 << 20:,}")
    seed = len(TASKS)
    key, first = np.unique(philox(seed, 0, 2 * n + 64) % 2**24, return_index=True)
    key = key[first.argsort()][:n]  # as drawn, none twice
    value = philox(seed, 1, n) % 2**16
    fact = np.stack([key >> 16, key >> 8, key, value >> 8, value], 1).astype(np.uint8)  # (n, 5)
    passes = max(20, -(-200_000 // n))
    order = philox(seed, 2, passes * n).reshape(passes, n).argsort(1, kind="stable")
    ids = fact[order.ravel()]
    cut = len(ids) * 95 // 100
    train, val = ids[:cut].ravel(), ids[cut:].ravel()
    return Corpus(f"facts:{n}", train, val, ids.size, sha256(ids).hexdigest(), unit=5, asked=(3, 4))


# 4. Batches, and the command line


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
    n = max(1, min(most, len(tokens) - 1) // length)
    last = (len(tokens) - length - 1) // unit
    starts = [i * last // max(1, n - 1) * unit for i in range(n)]
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def targets(corpus, t):
    """Which of the t tokens after a row's first one are asked for.   -> (t,) bool"""
    return torch.tensor([j % corpus.unit in corpus.asked for j in range(1, t + 1)])


def largest(ids, block=1 << 24):
    """The largest id of a split, a block at a time."""
    return max(int(ids[i : i + block].max()) for i in range(0, len(ids), block))


def describe(corpus, enc, train_tokens, val_tokens):
    """One line on what is trained on; the last two are counts. Refuses a tokenizer too small for
    the ids: all of both splits are looked at, 16 bits at a time, which takes about a second a GB.
    """
    ratio = corpus.size / (train_tokens + val_tokens)
    if not isinstance(corpus.val, str):
        for split, ids in (("training", corpus.train), ("validation", corpus.val)):
            if (most := largest(ids)) >= vocab_size(enc):
                raise ValueError(
                    f"{corpus.name} has id {most} in its {split} split, but {enc.name} has "
                    f"{vocab_size(enc):,} ids"
                )
        some = torch.from_numpy(corpus.val[: 1 << 20].astype(np.int64))
        ratio = token_bytes(enc)[some].double().mean()
    return (
        f"{corpus.name}: {corpus.size:,} bytes, {train_tokens:,} + {val_tokens:,} tokens of "
        f"{enc.name}, "
        f"{ratio:.2f} bytes/token, sha256 {corpus.sha256[:12]}"
    )


def download(name, shards=1):
    """To a temporary name, checked, then renamed: what stands in data/ is whole."""
    files = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i + 1:06}.bin" for i in range(shards)]
    files = {"input.txt": "shakespeare.txt"} if name == "shakespeare" else dict(zip(files, files))
    DATA.mkdir(exist_ok=True)
    for there, here in files.items():
        path, part = DATA / here, DATA / (here + ".part")
        if not path.exists():
            with (
                urllib.request.urlopen(URLS[name] + there, timeout=60) as source,
                open(part, "wb") as sink,
            ):
                shutil.copyfileobj(source, sink)
            if (
                name == "shakespeare"
                and (got := sha256(part.read_bytes()).hexdigest()) != SHAKESPEARE
            ):
                raise ValueError(f"{URLS[name]}{there} has sha256 {got}, not {SHAKESPEARE}")
            if name == "fineweb" and layout(part)[2] == 0:  # no checksum is published
                raise ValueError(f"{URLS[name]}{there} does not start like a token file")
            part.replace(path)
        print(f"{path}: {path.stat().st_size:,} bytes")


@dataclass(frozen=True)
class Flags:
    download: str = knob("", "fetch this corpus into data/, and nothing else", choices=("", *URLS))
    shards: int = knob(1, "training files of fineweb, 100 M tokens each", least=1, most=103)


def show(a):
    """Prints what the file claims: a batch is a function, and what a task costs."""
    if a.download:
        return download(a.download, a.shards)

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
    for name in TASKS:
        print(f"{name:11}{entropy_floor(name):7.3f}   {task(name).splitlines()[0]}")
    few = corpus("facts").train[:15].reshape(-1, 5).tolist()
    shown = "   ".join(f"{bytes(f[:3]).hex()} -> {bytes(f[3:]).hex()}" for f in few)
    print(f"{'facts':11}{0:7.3f}   {shown}, once all {16 * FACTS:,} bits are known")


def main(argv=None):
    command.run(show, Flags, "data.py", __doc__, argv)


if __name__ == "__main__":
    main()
