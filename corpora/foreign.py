"""
Tokenizers of others: what their files hold, in the terms of ours, a regular expression and a table.

    tokenizer.json   Hugging Face's: a vocabulary, merges in order, a pre-tokenizer, added tokens,
                     a post-processor. Each of them can say things that no expression and table can,
                     and is refused by name if it does
    tekken.json      Mistral's: the table in base64, counted from 0 behind the control tokens

In tokenizer.json a byte is one visible character: itself where it is visible, else the next free
one from U+0100 on (`byte_level`), so that a blank is \u0120 there.

Not here  the rule itself, and whether the merges follow from the ids: tokenizer.py
Sources   GPT-2's encoder.py (the alphabet); huggingface/tokenizers and mistral_common (the fields)
"""

import base64
from typing import NamedTuple

MOST = 1 << 24  # ids
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Read(NamedTuple):
    """What a Table is made of."""

    name: str
    pattern: str
    ranks: dict  # {bytes: id}
    special: dict  # {text: id}
    begin: list = ()  # ids that begin a text
    whole: list = ()  # texts that are one id wherever they stand


def need(ok, why):
    """What a regex and a table cannot say is refused by name."""
    if not ok:
        raise ValueError(f"tokenizer.json does not fit a tiktoken table: {why}")


def tekken(d):
    """Control tokens have the first ids; the table counts from 0 behind them, and not all of it is
    used.
    """
    first, size = d["config"]["default_num_special_tokens"], d["config"]["default_vocab_size"]
    if not 0 <= first <= size <= MOST:
        raise ValueError(f"{first} special tokens of {size} in all make no sense")
    names = {t["rank"]: t["token_str"] for t in d.get("special_tokens") or []}
    ranks = {
        base64.b64decode(t["token_bytes"]): first + t["rank"] for t in d["vocab"][: size - first]
    }
    special = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(first)}
    return Read("tekken", d["config"]["pattern"], ranks, special)


def hugging_face(d):
    """tokenizer.json -> what a table needs, and its merges as pairs of bytes; or a refusal that
    names what a regex and a table cannot say.
    """
    model, added = d["model"], d.get("added_tokens") or []
    kind = model.get("type") or ("BPE" if "merges" in model else "unnamed")
    need(kind == "BPE", f"its model is {kind}, not BPE")
    for field in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        need(not model.get(field), f"{field} is {model.get(field)!r}")
    need(not d.get("normalizer"), f"its normalizer changes the text first: {d.get('normalizer')}")
    regex = one_regex(d.get("pre_tokenizer") or {})
    whole = spelled_whole(added)
    special = {t["content"]: t["id"] for t in added}
    need(len(special) == len(added), "an added token stands there twice")
    byte = byte_level()
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    for token in vocab:
        need(byte.keys() >= set(token), f"token {token!r} is not in ByteLevel's alphabet")
    ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
    need(all(bytes([b]) in ranks for b in range(256)), "some single bytes have no id")
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges = [tuple(bytes(byte[c] for c in half) for half in m) for m in pairs]
    begin = beginning(d.get("post_processor"))
    return Read("tokenizer.json", regex, ranks, special, begin, whole), merges


def one_regex(pre):
    """The expression that cuts words. Several in a row are not one: each cuts the one's before."""
    *cuts, last = pre.get("pretokenizers") or [pre]
    need(
        last.get("type") == "ByteLevel" and not last.get("add_prefix_space"),
        "its pre-tokenizer does not end in ByteLevel without add_prefix_space",
    )
    for c in cuts:
        need(
            c["type"] == "Split"
            and "Regex" in c["pattern"]
            and (c["behavior"], c.get("invert", False)) in (("Isolated", False), ("Removed", True)),
            f"its pre-tokenizer {c['type']} is no Split that keeps what a Regex finds",
        )
    regex = [c["pattern"]["Regex"] for c in cuts] + [GPT2_WORDS] * last.get("use_regex", True)
    need(len(regex) == 1, f"its pre-tokenizer splits {len(regex)} times, not once")
    return regex[0]


def byte_level():
    """ByteLevel's character for each byte -> the byte: itself, or the next free one from U+0100."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in seen]
    return dict(zip(map(chr, [*seen, *range(256, 512)]), seen + rest))


def spelled_whole(added):
    """The added tokens that plain text may hold, cut out of it before any word is."""
    plain = [t for t in added if not t.get("special")]
    for t in plain:
        for field in ("single_word", "lstrip", "rstrip"):
            need(
                not t.get(field),
                f"added token {t['content']!r} has {field}, which depends on what is around it",
            )
    need(
        len({t.get("normalized", True) for t in plain}) < 2,
        "some added tokens are normalized and others are not: they are found one kind at a time",
    )
    return [t["content"] for t in plain]


def beginning(post):
    """The ids that a post-processor puts before a text. One that does more than that is refused."""
    kind, found = post and post.get("type"), []
    if kind == "Sequence":
        parts = [beginning(p) for p in post["processors"]]
        need(sum(map(bool, parts)) < 2, "several post-processors add tokens")
        return next(filter(None, parts), [])
    if kind in (None, "ByteLevel"):
        return []
    need(kind == "TemplateProcessing", f"its post-processor is {kind}")
    single = post["single"]
    need(
        bool(single) and "Sequence" in single[-1] and "Sequence" not in str(single[:-1]),
        "its post-processor adds tokens behind the text",
    )
    for part in single[:-1]:
        found += post["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return found
