r"""
Byte-pair tokenizer: one rule spells any text with a table of byte strings.

A regular expression cuts the text into words, and each word is spelled by itself:

    start from its bytes; while two neighbours joined are in the table, join the pair of lowest id

So the expression and the table (byte string -> id, the "ranks") are all there is to learn, save and
load. To learn them: join the commonest pair of neighbours in a text, everywhere, and give it the
next id; then again. Here the two always travel as a tiktoken.Encoding, which runs the rule:

    bytes      256 entries, nothing to join
    bpe:N      N ids, learned from the training split
    nemotron   the release's, from a file you have
    a path     tokenizer.json, tekken.json, or a saved `pack`

A loss per token means little across tokenizers; token_bytes turns it into bits per byte, which
compares.

Letters   v vocabulary
Not here  other people's files: corpora/foreign.py
          the inner loops: rustbpe learns, tiktoken spells (`halves` is the rule in slow motion);
          special tokens in a text: spelled out, they are plain text (added tokens that are not
          special are one id; what the post-processor begins a text with stands before a prompt,
          not in a corpus)
Sources   arXiv:1508.07909 (learning); tiktoken (the rule)
Departs   `nemotron` from a tekken.json is Mistral-Nemo's table behind 1,000 control tokens. All
          counts agree with the release; only the release's own tokenizer.json names those 1,000 and
          could prove it.
          A run of blanks is cut after every 65,536: no token is joined across that place
"""

import base64
import contextlib
import importlib.util
import math
import os
import re
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command

import numpy as np
import tiktoken
import torch

import bounds
from corpora import foreign
from corpora.foreign import GPT2_WORDS, MOST, need  # noqa: F401 (callers say tokenizer.GPT2_WORDS)

END = "<|endoftext|>"
BLANKS = 1 << 16  # in a row
# A word with the sign or blank before it; a digit; signs with the white space after them, so that
# ":\n    "
# can be one token; a line break with its indentation; other blanks, the last one left to the next
# word.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\s*|\s*\n\s*|\s+(?!\S)|\s+"


MALFORMED = (LookupError, TypeError, AttributeError, OverflowError)  # a field's, in a JSON file


def malformed(e):
    why = f"{type(e).__name__}: {str(e)[:100]}"
    return f"malformed: a field is missing or of another kind ({why})"


class Panics:
    """tiktoken's Rust half panics at an expression that it cannot run: an exception that is no
    Exception, and here a ValueError.
    """

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        return self

    def __exit__(self, kind, e, trace):
        if kind is not None and kind.__name__ == "PanicException":
            raise ValueError(
                f"{self.what}: its regular expression fails ({str(e)[:120]})"
            ) from None


@contextlib.contextmanager
def hushed():
    """While it lasts, what the Rust half prints of a panic by itself goes nowhere: its error says
    the same in a sentence.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Table(tiktoken.Encoding):
    """An Encoding with what a tokenizer.json may add to the rule: ids that begin a text, and texts
    that are one id wherever they stand (special=false among its added tokens).
    """

    begin, whole = (), ()

    def encode_ordinary(self, text):
        return [*self.begin, *spell(self, text)]


def table(name, pattern, ranks, special, begin=(), whole=()):
    """A Table, if it can spell every text and no two entries share an id; else ValueError."""
    ids = [*ranks.values(), *special.values()]

    def need(ok, why):
        if not ok:
            raise ValueError(f"tokenizer {name!r}: {why}")

    need(isinstance(pattern, str), "its pattern is no text")
    need(all(type(i) is int and 0 <= i < MOST for i in ids), f"an id is not in 0 to {MOST - 1:,}")
    need(len(set(ids)) == len(ids), "two of its entries have the same id")
    need(all(bytes([b]) in ranks for b in range(256)), "some single bytes have no id")
    need(all(isinstance(s, str) and s for s in special), "a special token is no text")
    need(set(begin) <= set(ids), "it begins texts with an id that it has not")
    need(set(whole) <= set(special), "an added token has no id")
    enc = Table(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    probe = "".join(map(chr, range(0x3000)))
    with Panics(f"tokenizer {name!r}"), hushed():
        kept = enc.decode(spell(enc, probe)) == probe
    need(kept, f"its regular expression leaves characters out: {pattern}")
    enc.begin, enc.whole = tuple(begin), tuple(whole)
    return enc


def tokenizer(spec, text=None):
    """`bytes`, `bpe:N` (N ids in all, learned from `text`), `nemotron`, or a path -> Table."""
    if spec == "bytes":
        return table(spec, "(?s:.)", {bytes([i]): i for i in range(256)}, {END: 256})
    if spec.startswith("bpe:"):
        return train_bpe(spec, text)
    path = nemotron_file() if spec == "nemotron" else Path(spec)
    if path.is_dir():  # a downloaded checkpoint
        path = path / ("tokenizer.json" if (path / "tokenizer.json").is_file() else "tekken.json")
    if not path.is_file():
        raise ValueError(f"tokenizer {str(path)!r} is not bytes, bpe:N, nemotron or a file")
    enc = from_file(path)
    if spec == "nemotron" and vocab_size(enc) != 131_072:
        raise ValueError(f"{path} has {vocab_size(enc):,} ids, Nemotron 3 has 131,072")
    return enc


def from_file(path):
    """tokenizer.json, tekken.json or a saved `pack`; of any other file a sentence that names it."""
    d = command.document(path)
    kinds = {"ranks": unpack, "model": from_hugging_face, "vocab": from_tekken}
    kind = next((key for key in kinds if isinstance(d.get(key), (dict, list))), None)
    if kind is None:
        raise ValueError(
            f"{path} is no tokenizer.json, tekken.json or pack: it starts with {list(d)[:3]}"
        )
    try:
        return kinds[kind](d)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    except MALFORMED as e:
        raise ValueError(f"{path} is {malformed(e)}") from e


def train_bpe(spec, text):
    """From 256 bytes, N - 257 times: join the commonest pair of neighbours. The last id is
    <|endoftext|>.
    """
    import rustbpe

    size = int(spec[4:]) if re.fullmatch("[0-9]{1,9}", spec[4:]) else 0
    if not 257 <= size <= MOST:
        raise ValueError(f"{spec!r} needs a number from 257 (bytes and {END}) to {MOST:,}")
    if not isinstance(text, str):
        raise ValueError(
            f"{spec!r} has no text to learn from: token files (*.bin) hold ids, so name the "
            "tokenizer that made them, --tokenizer nemotron or a file"
        )
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(pieces(text), size - 1, pattern=WORDS)
    ranks = {bytes(token): i for token, i in bpe.get_mergeable_ranks()}
    if len(ranks) < size - 1:
        raise ValueError(
            f"{spec} asks for {size - 257:,} pairs to join, but the {len(text):,} characters it "
            f"learns from have {len(ranks) - 256:,}: try --tokenizer bpe:{len(ranks) + 1} or bytes"
        )
    return table(spec, WORDS, ranks, {END: size - 1})


def nemotron_file():
    package = importlib.util.find_spec("mistral_common")
    folders = package.submodule_search_locations if package else []
    theirs = (Path(p, "data/tekken_240718.json") for p in folders)
    for p in (Path("tokenizer.json"), Path("tekken.json"), *theirs):
        if p.is_file():
            return p
    raise ValueError(
        "nemotron needs the release's tokenizer.json or a tekken.json in this folder, or one "
        "from mistral_common (pip install --no-deps mistral-common)"
    )


def from_tekken(d):
    return table(*foreign.tekken(d))


def from_hugging_face(d):
    """tokenizer.json -> the same ids, or a refusal that says why not.

    The file lists which pairs may join and in which order; our rule knows only ids. They agree on
    every word if the list is in the order of the ids it makes, and has the last join of each entry:
    two neighbours that could make an entry grew from their bytes just as they do when that entry is
    the whole word.
    """
    read, merges = foreign.hugging_face(d)
    check_merges(merges, read.ranks)
    return table(*read)


def check_merges(merges, ranks):
    """Whether the ids alone give the listed merges back."""
    made = [ranks.get(b"".join(m), -1) for m in merges]
    for i, (before, here) in enumerate(zip([0] + made, made)):
        need(
            before <= here,
            f"merge {i} makes id {here} after id {before}: merge order is not id order",
        )
    merges = set(merges)
    for token, i in ranks.items():
        need(
            len(token) == 1 or halves(token, ranks) in merges,
            f"its merges do not make id {i}, {token!r}",
        )


def halves(token, ranks):
    """The pair whose join is `token`: the rule of this file in slow motion, stopped before its last
    join.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        join = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = join.index(min(join))
        if join[i] >= ranks[token]:
            return None  # stuck: nothing leads to `token`
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def pack(enc):
    """Everything an Encoding is, in str, int and dict: fit for JSON and for
    torch.load(weights_only=True).
    """
    return {
        "name": enc.name,
        "pattern": enc._pat_str,
        "special": dict(enc._special_tokens),
        "ranks": {base64.b64encode(token).decode(): i for token, i in enc._mergeable_ranks.items()},
        "begin": list(getattr(enc, "begin", ())),
        "whole": list(getattr(enc, "whole", ())),
    }


def unpack(d):
    """The Table that was packed; packs of before have neither `begin` nor `whole`."""
    try:
        ranks = {base64.b64decode(token): i for token, i in d["ranks"].items()}
        more = d.get("begin", ()), d.get("whole", ())
        return table(str(d["name"]), d["pattern"], ranks, d["special"], *more)
    except MALFORMED as e:
        raise ValueError(f"a packed tokenizer is {malformed(e)}") from e


def vocab_size(enc):
    """The smallest vocabulary a model needs: ids may have gaps, so this is the largest plus one."""
    return enc.max_token_value + 1


def token_bytes(enc):
    """How many bytes of text each id stands for, (v,); special tokens stand for none."""
    size = torch.zeros(vocab_size(enc), dtype=torch.int64)
    for token, i in enc._mergeable_ranks.items():
        size[i] = len(token)
    for text in getattr(enc, "whole", ()):
        size[enc.encode_single_token(text)] = len(text.encode())
    return size


def raw(enc, token):
    """The bytes of one id; one the model has and the tokenizer has not becomes the replacement
    character.
    """
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def pieces(text, size=1 << 18):
    """Cuts before a line that starts with a word, where word patterns cut anyway: the ids stay the
    same. Also inside a run of blanks that is longer than any expression can look ahead.
    """
    start = 0
    while start < len(text):
        line = re.compile(r"\S\n(?=\w)").search(text, start + size)
        end = line.end() if line else len(text)
        for run in re.compile(rf"\s{{{BLANKS},}}").finditer(text, start, end):
            for at in range(run.start() + BLANKS, run.end(), BLANKS):
                yield text[start:at]
                start = at
        yield text[start:end]
        start = end


def characters(text):
    """text; where Python could read an argument's bytes in its console's encoding only as
    surrogates, in UTF-8. ValueError for what is neither: tiktoken would put U+FFFD there.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            return text.encode(errors="surrogateescape").decode()
    raise ValueError(f"{bounds.brief(text)} is not UTF-8")


def spell(enc, text):
    """The ids of a text alone, without what the tokenizer begins a text with."""
    text = characters(text)
    whole, ids = getattr(enc, "whole", ()), []
    longest = sorted(whole, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest)) + ")", text) if whole else [text]
    with Panics(f"tokenizer {enc.name!r}"):
        for part in parts:
            if part in whole:
                ids.append(enc.encode_single_token(part))
                continue
            for piece in pieces(part):
                ids += tiktoken.Encoding.encode_ordinary(enc, piece)
    return ids


def encode(enc, text):
    """str -> (tokens,) uint16, or uint32 beyond 65,536 ids. Threads help, since tiktoken releases
    the GIL.
    """
    if not isinstance(text, str):
        return text  # token files hold ids already
    kind = np.uint16 if vocab_size(enc) <= 1 << 16 else np.uint32
    cut = [text] if getattr(enc, "whole", ()) else pieces(text)
    with ThreadPoolExecutor() as pool:
        ids = pool.map(lambda piece: np.array(spell(enc, piece), kind), cut)
        return np.concatenate([np.empty(0, kind), *ids])


def main():
    """What a table buys: more bytes in a token, and words of code in one piece."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n\n".join(p.read_text("utf-8", "replace") for p in files)
    line = "    def get(self, key, default=None):\n        return"
    print(f"{len(files)} files of the standard library, {len(text):,} characters\n")
    print("tokenizer   seconds to learn   bytes/token   a line of code, cut by it")
    for spec in ("bytes", "bpe:512", "bpe:2048", "bpe:8192"):
        start = time.perf_counter()
        enc = tokenizer(spec, text)
        took, ids = time.perf_counter() - start, encode(enc, text)
        cut = "|".join(repr(enc.decode([i]))[1:-1] for i in encode(enc, line))
        print(f"{spec:10}{took:18.1f}{len(text.encode()) / len(ids):14.2f}   {cut[:62]}")


if __name__ == "__main__":
    command.demo(main, __doc__)
