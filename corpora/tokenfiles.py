"""
Token files: text that was cut into ids before, read without reading it. They are memory-mapped: 10
GB cost nothing until a window of them is asked for.

    llm.c      int32[256] = magic, version, count, 0 ...   then the ids, uint16 or uint32
    nanoGPT    bare uint16 from the first byte to the last

The two are told apart by the magic number: as two ids of GPT-2's it would be one it has not got.

    split(paths)   train | val: by the word `val` in the files' names, else the last 5 %

Not here  whose ids they are: the tokenizer that --tokenizer names; windows of them: data.py
Sources   llm.c and nanoGPT (the layouts)
"""

import re
from hashlib import sha256
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Ids to train on and to validate with; `size` in bytes; `sha256` of all bytes, or of 256
    evenly spread MiB if there are more.
    """

    train: object
    val: object
    size: int
    sha256: str


def layout(path):
    """llm.c: int32[256] = magic, version, count, then ids. nanoGPT: bare uint16. -> dtype, count,
    offset
    """
    size, head = path.stat().st_size, np.fromfile(path, "<i4", 256)
    kind, count, offset = "<u2", size // 2, 0
    if len(head) == 256 and head[0] // 10000 == 2024:  # GPT-2 ids cannot spell that
        kind = {20240520: "<u2", 20240801: "<u4"}.get(int(head[0]))
        count = int(head[2])
        offset = 1024
        if kind is None:
            raise ValueError(
                f"{path} has magic {head[0]}, neither 20240520 (uint16) nor 20240801 (uint32)"
            )
    need = offset + count * np.dtype(kind).itemsize
    if size != need:
        raise ValueError(f"{path} has {size:,} bytes where {count:,} ids need {need:,}")
    return kind, count, offset


def split(paths, name):
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
    return Split(train, val, size, seen.hexdigest())


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


def largest(ids, block=1 << 24):
    """The largest id of a split, a block at a time."""
    return max(int(ids[i : i + block].max()) for i in range(0, len(ids), block))
