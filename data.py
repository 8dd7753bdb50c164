r"""
Data: text becomes ids, and a batch becomes a pure function of (seed, step, rank).

    corpus(spec)         train | val: the last 5 % of the text is never trained on
    encode(enc, train)   one long row of ids
    batch(ids, seed, step, size, length)   `size` windows of it, at places that a hash of (seed, step) names

So a run that resumes at step 1000 needs no data state, and two ranks of half a batch see what one rank sees.

A byte-pair tokenizer is a regular expression that cuts text into words, a table from byte strings to ids, and

    start from the bytes of a word; while two neighbours joined are in the table, join the pair of lowest id

so the table (the "ranks") is all there is to train, save and load. Here it is always a tiktoken.Encoding:

    bytes      256 entries, nothing to join           bpe:N    N entries, trained on the training split
    nemotron   the release's, from a file you have    a path   tokenizer.json, tekken.json, or a saved `pack`

A loss per token means little across tokenizers; token_bytes turns it into bits per byte, which compares.

Letters   v vocabulary
Not here  the network, except in `python data.py --download NAME`; documents: files are joined by a blank
          line, windows cross them, and a special token spelled out in a text is plain text
Sources   arXiv:1508.07909, tiktoken (the rule); llm.c, nanoGPT (token files); Salmon et al. 2011 (Philox)
Departs   `nemotron` from a tekken.json is Mistral-Nemo's table behind 1,000 control tokens. All counts agree
          with the release; only the release's own tokenizer.json names those 1,000 and could prove it
"""
import argparse
import base64
import glob
import hashlib
import importlib.util
import json
import lzma
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch

DATA = Path(__file__).resolve().parent / "data"                              # where --download writes
TASKS = ("recall", "copy", "arithmetic")
END = "<|endoftext|>"
# A word with the sign or blank before it; a digit; signs with the white space after them, so that ":\n    "
# can be one token; a line break with its indentation; other blanks, the last one left to the next word.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\s*|\s*\n\s*|\s+(?!\S)|\s+"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# 1. Corpora

class Corpus(NamedTuple):
    """`size` in bytes; `sha256` of them all, or of 256 evenly spread MiB if token files hold more."""
    name: str
    train: Any                                                               # str, or an array of ids
    val: Any
    size: int
    sha256: str


def corpus(spec):
    """`python`, `shakespeare`, `fineweb`, a task, a text or .bin file, a folder of .txt .md .py, a glob."""
    path = Path(spec)
    if spec in TASKS:
        return text_corpus(spec, task(spec))
    if spec == "python":
        return text_corpus(*standard_library())
    if spec in ("shakespeare", "fineweb"):
        paths = sorted(DATA.glob("shakespeare.txt" if spec == "shakespeare" else "fineweb_*.bin"))
        if not paths:
            raise ValueError(f"{spec} is not in {DATA}; fetch it once with: python data.py --download {spec}")
    elif path.is_dir():
        paths = [p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py") and p.is_file()]
        paths.sort(key=lambda p: p.relative_to(path).as_posix())
    else:
        paths = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(spec, recursive=True))]
    if not paths:
        raise ValueError(f"corpus {spec!r} is no file, no folder with .txt, .md or .py files, and none of "
                         f"python, shakespeare, fineweb, {', '.join(TASKS)}")
    if all(p.suffix == ".bin" for p in paths):
        return token_corpus(spec, paths)
    return text_corpus(spec, "\n\n".join(map(read, paths)))


def text_corpus(name, text):
    cut, raw = len(text) * 95 // 100, text.encode()                          # between characters, not bytes
    if cut == 0:
        raise ValueError(f"corpus {name!r} is empty: {len(raw)} bytes leave nothing to train on")
    return Corpus(name, text[:cut], text[cut:], len(raw), hashlib.sha256(raw).hexdigest())


def read(path):
    try:
        return path.read_text("utf-8-sig")                                   # \r\n becomes \n
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8: byte {e.object[e.start]:#04x} at {e.start:,}") from None


def standard_library():
    """The running Python's own source: on every machine, without a download -> name, text.

    Files come in the order of their path's hash: the last 5 % is a fair sample, not the alphabet's end."""
    root, found, texts = Path(sysconfig.get_path("stdlib")), [], []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        ours = lambda name: here.parts or name in sys.stdlib_module_names    # not what pip or the build added
        folders[:] = [f for f in folders if ours(f) and f not in ("test", "tests", "idlelib")]
        found += [(here / f).as_posix() for f in files if f.endswith(".py") and ours(f[:-3])]
    for f in sorted(found, key=lambda f: hashlib.sha256(f.encode()).digest()):
        try:
            texts.append(read(root / f))
        except ValueError:
            pass                                                             # not UTF-8: counted in the name
    skipped = f", {len(found) - len(texts)} not UTF-8" if len(texts) < len(found) else ""
    return f"python {platform.python_version()} ({len(texts)} files{skipped})", "\n\n".join(texts)


# 2. Token files, memory-mapped: 10 GB cost nothing until a window of them is read

def layout(path):
    """llm.c: int32[256] = magic, version, count, then ids. nanoGPT: bare uint16. -> dtype, count, offset"""
    size, head = path.stat().st_size, np.fromfile(path, "<i4", 256)
    kind, count, offset = "<u2", size // 2, 0
    if len(head) == 256 and head[0] // 10000 == 2024:                        # GPT-2 ids cannot spell that
        kind, count, offset = {20240520: "<u2", 20240801: "<u4"}.get(int(head[0])), int(head[2]), 1024
        if kind is None:
            raise ValueError(f"{path} has magic {head[0]}, neither 20240520 (uint16) nor 20240801 (uint32)")
    need = offset + count * np.dtype(kind).itemsize
    if size != need:
        raise ValueError(f"{path} has {size:,} bytes where {count:,} ids need {need:,}")
    return kind, count, offset


def token_corpus(name, paths):
    """If some files have the word `val` in their names, those are validation; else the last 5 % is."""
    ids, size, seen = {}, sum(p.stat().st_size for p in paths), hashlib.sha256()
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
    views = []
    for p in parts:
        views.append(p[max(a, 0):max(b, 0)])
        a, b = a - len(p), b - len(p)
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
    """n uint64: a hash of (seed, step), not a place in a sequence. numpy promises to keep these bits."""
    return np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(n)


def task(name):
    """recall  k3a7...?a7a7...  8 different letters each with a digit; then 8 times one of them and its digit
    copy  hbac...|hbac...    16 letters from a to p, and again             arithmetic  347+058=0405"""
    def dice(draw, sides, *shape):
        return (philox(TASKS.index(name), draw, math.prod(shape)) % sides).astype(np.int64).reshape(shape)

    rows = 76_923 if name == "arithmetic" else 29_411
    sign = lambda c: np.full((rows, 1), ord(c))
    if name == "arithmetic":
        return "".join(f"{a:03}+{b:03}={a + b:04}\n" for a, b in dice(0, 1000, rows, 2).tolist())
    if name == "copy":
        letters = ord("a") + dice(0, 16, rows, 16)                           # (rows, 16)
        line = [letters, sign("|"), letters, sign("\n")]
    else:
        key = ord("a") + dice(0, 2**62, rows, 26).argsort(1)[:, :8]          # (rows, 8)     none twice
        pair = np.stack([key, ord("0") + dice(1, 10, rows, 8)], -1)          # (rows, 8, 2)
        asked = np.take_along_axis(pair, dice(2, 8, rows, 8)[..., None], 1)  # (rows, 8, 2)
        line = [pair.reshape(rows, 16), sign("?"), asked.reshape(rows, 16), sign("\n")]
    return np.hstack(line).astype(np.uint8).tobytes().decode()


def entropy_floor(name):
    """Bits per byte of a task's lines: what a perfect model pays, and on average none pays less."""
    lines = {"recall": (sum(math.log2(26 - i) for i in range(8)) + 8 * math.log2(10) + 8 * math.log2(8), 34),
             "copy": (16 * math.log2(16), 34),
             "arithmetic": (2 * math.log2(1000), 13)}                        # bits, bytes
    if name not in lines:
        raise ValueError(f"{name!r} has no known entropy; {', '.join(TASKS)} have")
    return lines[name][0] / lines[name][1]


# 4. Tokenizers

def tokenizer(spec, text=None):
    """`bytes`, `bpe:N` (N ids in all, learned from `text`), `nemotron`, or a path -> tiktoken.Encoding."""
    if spec == "bytes":
        return tiktoken.Encoding(spec, pat_str="(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={END: 256})
    if spec.startswith("bpe:"):
        return train_bpe(spec, text)
    path = nemotron_file() if spec == "nemotron" else Path(spec)
    if path.is_dir():                                                        # a downloaded checkpoint
        path = path / ("tokenizer.json" if (path / "tokenizer.json").is_file() else "tekken.json")
    if not path.is_file():
        raise ValueError(f"tokenizer {str(path)!r} is not bytes, bpe:N, nemotron or a file")
    d = json.loads(read(path))
    kinds = {"ranks": unpack, "model": from_hugging_face, "vocab": from_tekken}
    kind = next((key for key in kinds if isinstance(d.get(key), (dict, list))), None)
    if kind is None:
        raise ValueError(f"{path} is no tokenizer.json, tekken.json or pack: it starts with {list(d)[:3]}")
    enc = kinds[kind](d)
    if spec == "nemotron" and vocab_size(enc) != 131_072:
        raise ValueError(f"{path} has {vocab_size(enc):,} ids, Nemotron 3 has 131,072")
    return enc


def train_bpe(spec, text):
    """From 256 bytes, N - 257 times: join the commonest pair of neighbours. The last id is <|endoftext|>."""
    import rustbpe
    size = int(spec[4:]) if spec[4:].isdigit() else 0
    if size < 257 or not isinstance(text, str):
        raise ValueError(f"{spec!r} needs a number from 257 up (bytes and {END}) and a text to learn from")
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(pieces(text), size - 1, pattern=WORDS)
    ranks = {bytes(token): i for token, i in bpe.get_mergeable_ranks()}
    if len(ranks) < size - 1:
        raise ValueError(f"{spec} asks for {size - 257:,} pairs to join, but the {len(text):,} characters "
                         f"it learns from have {len(ranks) - 256:,}")
    return tiktoken.Encoding(spec, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={END: size - 1})


def nemotron_file():
    package = importlib.util.find_spec("mistral_common")
    folders = [Path(p, "data") for p in package.submodule_search_locations] if package else []
    for p in (Path("tokenizer.json"), Path("tekken.json"), *(f / "tekken_240718.json" for f in folders)):
        if p.is_file():
            return p
    raise ValueError("nemotron needs the release's tokenizer.json or a tekken.json in this folder, or one "
                     "from mistral_common (pip install --no-deps mistral-common)")


def from_tekken(d):
    """Control tokens have the first ids; the table counts from 0 behind them, and not all of it is used."""
    first, size = d["config"]["default_num_special_tokens"], d["config"]["default_vocab_size"]
    names = {t["rank"]: t["token_str"] for t in d.get("special_tokens") or []}
    ranks = {base64.b64decode(t["token_bytes"]): first + t["rank"] for t in d["vocab"][:size - first]}
    return tiktoken.Encoding("tekken", pat_str=d["config"]["pattern"], mergeable_ranks=ranks,
                             special_tokens={names.get(i, f"<SPECIAL_{i}>"): i for i in range(first)})


def from_hugging_face(d):
    """tokenizer.json -> the same ids, or a refusal that names what a regex and a table cannot say.

    The file lists which pairs may join and in which order; our rule knows only ids. They agree on every word
    if the list is in the order of the ids it makes, and has the last join of each entry: two neighbours that
    could make an entry grew from their bytes just as they do when that entry is the whole word."""
    def need(ok, why):
        if not ok:
            raise ValueError(f"tokenizer.json does not fit a tiktoken table: {why}")

    model, pre, added = d["model"], d.get("pre_tokenizer") or {}, d.get("added_tokens") or []
    kind = model.get("type") or ("BPE" if "merges" in model else "unnamed")
    need(kind == "BPE", f"its model is {kind}, not BPE")
    need(not model.get("byte_fallback"), "byte_fallback spells rare characters outside the merges")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        need(not model.get(field), f"{field} is {model.get(field)!r}")
    norm = d.get("normalizer")
    need(not norm, f"its normalizer changes the text first: {norm}")

    # 1. One regular expression. Several in a row are not one: each cuts what the one before has left.
    *cuts, last = pre.get("pretokenizers") or [pre]
    need(last.get("type") == "ByteLevel" and not last.get("add_prefix_space"),
         "its pre-tokenizer does not end in ByteLevel without add_prefix_space")
    for c in cuts:
        need(c["type"] == "Split" and "Regex" in c["pattern"]
             and (c["behavior"], c.get("invert", False)) in (("Isolated", False), ("Removed", True)),
             f"its pre-tokenizer {c['type']} is no Split that keeps what a Regex finds")
    regex = [c["pattern"]["Regex"] for c in cuts] + [GPT2_WORDS] * last.get("use_regex", True)
    need(len(regex) == 1, f"its pre-tokenizer splits {len(regex)} times, not once")

    # 2. One table. ByteLevel writes a byte as a visible character: itself, or the next free one from U+0100.
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen]
    byte = dict(zip(map(chr, [*seen, *range(256, 256 + len(rest))]), seen + rest))
    special = {t["content"]: t["id"] for t in added}
    for t in added:
        need(t.get("special") or not t["content"].isspace(), f"added token {t['content']!r} cuts plain text")
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    for token in vocab:
        need(byte.keys() >= set(token), f"token {token!r} is not in ByteLevel's alphabet")
    ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
    need(all(bytes([b]) in ranks for b in range(256)), "some single bytes have no id")

    # 3. Merges that the ids alone give back.
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges = [tuple(bytes(byte[c] for c in half) for half in m) for m in merges]
    made, listed = [ranks.get(b"".join(m), -1) for m in merges], set(merges)
    for i, (before, here) in enumerate(zip([0] + made, made)):
        need(before <= here, f"merge {i} makes id {here} after id {before}: merge order is not id order")
    for token, i in ranks.items():
        need(len(token) == 1 or halves(token, ranks) in listed, f"its merges do not make id {i}, {token!r}")
    enc = tiktoken.Encoding("tokenizer.json", pat_str=regex[0], mergeable_ranks=ranks, special_tokens=special)
    probe = "".join(map(chr, range(0x3000)))
    need(enc.decode(enc.encode_ordinary(probe)) == probe, f"its Regex leaves characters out: {regex[0]}")
    return enc


def halves(token, ranks):
    """The pair whose join is `token`: the rule of this file in slow motion, stopped before its last join."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        join = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = join.index(min(join))
        if join[i] >= ranks[token]:
            return None                                                      # stuck: nothing leads to `token`
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def pack(enc):
    """Everything an Encoding is, in str, int and dict: fit for JSON and for torch.load(weights_only=True)."""
    return {"name": enc.name, "pattern": enc._pat_str, "special": dict(enc._special_tokens),
            "ranks": {base64.b64encode(token).decode(): i for token, i in enc._mergeable_ranks.items()}}


def unpack(d):
    return tiktoken.Encoding(d["name"], pat_str=d["pattern"], special_tokens=d["special"],
                             mergeable_ranks={base64.b64decode(token): i for token, i in d["ranks"].items()})


def vocab_size(enc):
    """The smallest vocabulary a model needs: ids may have gaps, so this is the largest plus one."""
    return enc.max_token_value + 1


def token_bytes(enc):
    """How many bytes of text each id stands for, (v,); special tokens stand for none."""
    size = torch.zeros(vocab_size(enc), dtype=torch.int64)
    for token, i in enc._mergeable_ranks.items():
        size[i] = len(token)
    return size


# 5. Ids and batches

def pieces(text, size=1 << 18):
    """Cuts before a line that starts with a word, where word patterns cut anyway: the ids stay the same."""
    start = 0
    while start < len(text):
        line = re.compile(r"\S\n(?=\w)").search(text, start + size)
        end = line.end() if line else len(text)
        yield text[start:end]
        start = end


def encode(enc, text):
    """str -> (tokens,) uint16, or uint32 beyond 65,536 ids. Threads help, since tiktoken releases the GIL."""
    if not isinstance(text, str):
        return text                                                          # token files hold ids already
    kind = np.uint16 if vocab_size(enc) <= 1 << 16 else np.uint32
    with ThreadPoolExecutor() as pool:
        ids = pool.map(lambda piece: np.array(enc.encode_ordinary(piece), kind), pieces(text))
        return np.concatenate([np.empty(0, kind), *ids])


def batch(tokens, seed, step, size, length, rank=0, world=1):                # -> (size / world, length) int64
    """The rows of `rank`: it takes its stretch of one global batch, which knows only (seed, step)."""
    if len(tokens) < length:
        raise ValueError(f"the corpus has {len(tokens):,} tokens, one sequence needs {length:,}")
    if size % world:
        raise ValueError(f"a batch of {size} sequences does not divide among {world} ranks")
    starts = philox(seed, step, size) % (len(tokens) - length + 1)           # (size,)
    mine = starts.reshape(world, -1)[rank].tolist()
    return torch.from_numpy(np.stack([tokens[i:i + length] for i in mine]).astype(np.int64))


def describe(corpus, enc, train_tokens, val_tokens):
    """One line on what is trained on; the last two are counts. Refuses a tokenizer too small for the ids."""
    ratio = corpus.size / (train_tokens + val_tokens)
    if not isinstance(corpus.val, str):
        some = torch.from_numpy(corpus.val[:1 << 20].astype(np.int64))
        if some.max() >= vocab_size(enc):
            raise ValueError(f"{corpus.name} has id {some.max()}, but {enc.name} has {vocab_size(enc):,} ids")
        ratio = token_bytes(enc)[some].double().mean()
    return (f"{corpus.name}: {corpus.size:,} bytes, {train_tokens:,} + {val_tokens:,} tokens of {enc.name}, "
            f"{ratio:.2f} bytes/token, sha256 {corpus.sha256[:12]}")


# 6. The command line

URLS = {"shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/",
        "fineweb": "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"}
SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download(name, shards=1):
    """To a temporary name, checked, then renamed: what stands in data/ is whole."""
    files = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i + 1:06}.bin" for i in range(shards)]
    files = {"input.txt": "shakespeare.txt"} if name == "shakespeare" else dict(zip(files, files))
    DATA.mkdir(exist_ok=True)
    for there, here in files.items():
        path, part = DATA / here, DATA / (here + ".part")
        if not path.exists():
            with urllib.request.urlopen(URLS[name] + there, timeout=60) as source, open(part, "wb") as sink:
                shutil.copyfileobj(source, sink)
            if name == "shakespeare":
                got = hashlib.sha256(part.read_bytes()).hexdigest()
                if got != SHAKESPEARE:
                    raise ValueError(f"{URLS[name]}{there} has sha256 {got}, not {SHAKESPEARE}")
            elif layout(part)[2] == 0:                     # no checksum is published, so header and count
                raise ValueError(f"{URLS[name]}{there} does not start like a token file")
            os.replace(part, path)
        print(f"{path}: {path.stat().st_size:,} bytes")


def main():
    """Prints what the file claims: what a tokenizer buys, a batch that is a function, what a task costs."""
    parser = argparse.ArgumentParser(description="Bare: this file's ideas in numbers.", allow_abbrev=False)
    parser.add_argument("--download", choices=list(URLS), help="fetch a corpus into data/, and nothing else")
    parser.add_argument("--shards", type=int, default=1, help="training files of fineweb, 100 M tokens each")
    args = parser.parse_args()
    if args.download:
        return download(args.download, args.shards)

    text, line = corpus("python"), "    def get(self, key, default=None):\n        return"
    print("tokenizer   train s  encode s      tokens  bytes/token   a line of code, cut by it")
    for spec in ("bytes", "bpe:512", "bpe:2048", "bpe:8192"):
        start = time.perf_counter()
        enc = tokenizer(spec, text.train)
        trained = time.perf_counter()
        train, val = encode(enc, text.train), encode(enc, text.val)
        took, n = time.perf_counter() - trained, len(train) + len(val)
        cut = "|".join(repr(enc.decode([i]))[1:-1] for i in encode(enc, line))
        print(f"{spec:10}{trained - start:9.1f}{took:10.1f}{n:12,}{text.size / n:13.2f}   {cut[:56]}")
    print("\n" + describe(text, enc, len(train), len(val)))

    whole = batch(train, seed=0, step=7, size=4, length=6)
    right, left = (batch(train, 0, 7, 4, 6, rank=r, world=2) for r in (1, 0))
    print(f"\nbatch(seed 0, step 7) of 4 sequences of 6\n{whole}\n"
          f"  drawn again it is the same: {torch.equal(whole, batch(train, 0, 7, 4, 6))}\n"
          f"  rank 0 of 2 above rank 1:   {torch.equal(whole, torch.cat([left, right]))}\n"
          f"  step 8 is the same:         {torch.equal(whole, batch(train, 0, 8, 4, 6))}")

    print("\ntask          floor      xz   bits/byte: what a perfect model pays, what a compressor pays")
    for name in TASKS:
        raw = task(name)
        xz = 8 * len(lzma.compress(raw.encode())) / len(raw)
        print(f"{name:11}{entropy_floor(name):8.3f}{xz:8.3f}   {raw.splitlines()[0]}")


if __name__ == "__main__":
    main()
