"""tokenizer.py promises that text survives and that ids are the file's own; here it is held to
that.
"""

import base64
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora.foreign import GPT2_WORDS
from tokenizer import (
    END,
    WORDS,
    encode,
    from_hugging_face,
    pack,
    pieces,
    token_bytes,
    tokenizer,
    unpack,
    vocab_size,
)

LIBRARY = sorted(
    Path(json.__file__).parents[1].glob("*.py")
)  # the standard library's plain modules
TEXT = "\n\n".join(p.read_text("utf-8", "replace") for p in LIBRARY)
BYTES, BPE = tokenizer("bytes"), tokenizer("bpe:600", TEXT[:300_000])
SIZES = [(enc, token_bytes(enc).tolist()) for enc in (BYTES, BPE)]
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTTERS = [
    tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=BPE._mergeable_ranks, special_tokens={})
    for pattern in (WORDS, GPT2_WORDS, TEKKEN)
]
awkward = st.one_of(st.text(max_size=60), st.text("ab_ \n\t\r'(:/.1²é日\u0301🙂", max_size=60))


def same(a, b):
    return pack(a) == pack(b)


# Text survives


@settings(max_examples=200, deadline=None)
@given(awkward)
def test_round_trip(text):
    for enc, size in SIZES:
        ids = encode(enc, text)
        assert ids.dtype == np.uint16 and enc.decode(ids.tolist()) == text
        assert sum(size[i] for i in ids.tolist()) == len(text.encode())
    assert encode(BYTES, text).tolist() == [*text.encode()]


@settings(max_examples=300, deadline=None)
@given(awkward, st.integers(1, 9))
def test_cutting_into_pieces_changes_no_id(text, size):
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    for enc in CUTTERS:
        assert sum(map(enc.encode_ordinary, parts), []) == enc.encode_ordinary(text)


def test_threads_change_no_id():
    text = TEXT[:2_000_000]
    assert len(list(pieces(text))) > 4
    assert encode(BPE, text).tolist() == BPE.encode_ordinary(text)


def test_vocabularies():
    assert (vocab_size(BYTES), BYTES.encode_single_token(END)) == (257, 256)
    assert (vocab_size(BPE), BPE.encode_single_token(END)) == (600, 599)
    size = token_bytes(BPE)
    assert size.shape == (600,) and size[599] == 0 and size[:599].min() == 1
    assert END not in (BPE.decode([i]) for i in range(599))
    assert encode(BPE, END).max() < 599  # spelled out, it is plain text
    wide = unpack(pack(BYTES) | {"special": {"<e>": 65_536}})
    assert encode(wide, "a").dtype == np.uint32 and vocab_size(wide) == 65_537


@settings(max_examples=100, deadline=None)
@given(awkward)
def test_the_trainer_and_tiktoken_agree(text):
    assert TRAINER.encode(text) == BPE.encode_ordinary(text)


def trainer():
    import rustbpe

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter([TEXT[:300_000]]), 599, pattern=WORDS)  # in one piece
    return bpe


TRAINER = trainer()


@pytest.mark.parametrize(
    "spec,text,why",
    [
        ("bpe:256", "a", "needs a number from 257"),
        ("bpe:99999999999999", "a", "needs a number from 257"),
        ("bpe:²", "a", "needs a number from 257"),
        ("bpe:many", "a", "needs a number from 257"),
        ("bpe:300", None, "text to learn from"),
        ("bpe:300", np.arange(9), "text to learn from"),
        (
            "bpe:300",
            "ab ab",
            "asks for 43 pairs to join, but the 5 characters it learns from have 2",
        ),
        ("gpt2", None, "'gpt2' is not bytes, bpe:N, nemotron or a file"),
    ],
)
def test_tokenizer_specs_that_cannot_be(spec, text, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=why):
        tokenizer(spec, text)


# The table travels


def test_pack_travels_in_json_and_in_a_checkpoint():
    for enc in (BYTES, BPE, from_hugging_face(hugging_face())):
        box = io.BytesIO()
        torch.save({"tokenizer": pack(enc)}, box)
        box.seek(0)
        for back in (
            torch.load(box, weights_only=True)["tokenizer"],
            json.loads(json.dumps(pack(enc))),
        ):
            assert same(unpack(back), enc) and unpack(back).name == enc.name
            assert unpack(back).encode_ordinary("def f(x):\n  é") == enc.encode_ordinary(
                "def f(x):\n  é"
            )


def test_the_same_path_never_serves_stale_ranks(tmp_path):
    path = tmp_path / "bpe.json"
    for size in (300, 301):
        enc = tokenizer(f"bpe:{size}", TEXT[:50_000])
        path.write_text(json.dumps(pack(enc)), "utf-8")
        assert same(tokenizer(str(path)), enc) and vocab_size(tokenizer(str(path))) == size


# tokenizer.json


def letters():
    """ByteLevel's alphabet, derived the way GPT-2's encoder.py does."""
    seen, out, extra = [*range(33, 127), *range(161, 173), *range(174, 256)], {}, 0
    for b in range(256):
        out[b] = chr(b) if b in seen else chr(256 + extra)
        extra += b not in seen
    return out


def hugging_face(**changes):
    """Ids 0 and 1 are special, 2 + b is byte b, three merges follow; `changes` like
    model__type="Unigram".
    """
    vocab = {c: 2 + b for b, c in letters().items()} | {"he": 258, "ll": 259, "hell": 260}
    d = {
        "normalizer": None,
        "pre_tokenizer": LAST | {"use_regex": True},
        "added_tokens": [
            {"id": i, "content": s, "special": True} for i, s in enumerate(("<s>", "</s>"))
        ],
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "vocab": {"<s>": 0, "</s>": 1} | vocab,
            "merges": ["h e", "l l", "he ll"],
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        where = d
        for p in path:
            where = where[p]
        where[last] = value
    return d


def load(tmp_path, d):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(d), "utf-8")
    return tokenizer(str(path))


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


LAST = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
ONCE = {"type": "Sequence", "pretokenizers": [split(TEKKEN), LAST]}
TWICE = {"type": "Sequence", "pretokenizers": [split(r"\p{N}"), split(TEKKEN), LAST]}


def test_ids_are_those_of_the_file(tmp_path):
    enc = load(tmp_path, hugging_face())
    (tmp_path / "some.json").rename(tmp_path / "tokenizer.json")
    assert same(tokenizer(str(tmp_path)), enc)  # the folder of a checkpoint will do
    assert enc.encode_ordinary("hello hell") == [
        260,
        2 + ord("o"),
        2 + ord(" "),
        260,
    ]  # he+ll o blank he+ll
    assert enc.encode_ordinary("élhe") == [2 + 0xC3, 2 + 0xA9, 2 + ord("l"), 258]
    assert enc.encode("<s>", allowed_special="all") == [0] and vocab_size(enc) == 261
    assert token_bytes(enc)[[0, 1, 2, 260]].tolist() == [0, 0, 1, 4]
    newer = [["h", "e"], ["l", "l"], ["he", "ll"]]  # files of today list pairs
    pairs = hugging_face(model__merges=newer, pre_tokenizer=ONCE)
    assert load(tmp_path, pairs)._pat_str == TEKKEN
    assert load(tmp_path, pairs).encode_ordinary("hell") == [260]


@pytest.mark.parametrize(
    "why,changes",
    [
        ("its model is Unigram, not BPE", dict(model__type="Unigram")),
        ("byte_fallback", dict(model__byte_fallback=True)),
        ("dropout is 0.1", dict(model__dropout=0.1)),
        ("end_of_word_suffix is '</w>'", dict(model__end_of_word_suffix="</w>")),
        (
            "its normalizer changes the text first: {'type': 'NFC'}",
            dict(normalizer={"type": "NFC"}),
        ),
        ("its pre-tokenizer splits 2 times, not once", dict(pre_tokenizer=TWICE)),
        ("splits 0 times", dict(pre_tokenizer=LAST)),
        ("does not end in ByteLevel", dict(pre_tokenizer={"type": "Metaspace"})),
        ("does not end in ByteLevel", dict(pre_tokenizer=None)),
        (
            "without add_prefix_space",
            dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
        ),
        (
            "no Split that keeps",
            dict(pre_tokenizer={"pretokenizers": [split("x", "Removed"), LAST]}),
        ),
        (
            "pre-tokenizer Digits is no Split",
            dict(pre_tokenizer={"pretokenizers": [{"type": "Digits"}, LAST]}),
        ),
        ("leaves characters out", dict(pre_tokenizer={"pretokenizers": [split(r"\p{L}+"), LAST]})),
        (
            "added token '<x>' has lstrip",
            dict(added_tokens=[{"id": 300, "content": "<x>", "special": False, "lstrip": True}]),
        ),
        ("its post-processor is BertProcessing", dict(post_processor={"type": "BertProcessing"})),
        (
            "adds tokens behind the text",
            dict(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
                }
            ),
        ),
        ("token '▁a' is not in ByteLevel's alphabet", dict(model__vocab={"▁a": 0})),
        ("some single bytes have no id", dict(model__vocab={"a": 0})),
        (
            "an added token stands there twice",
            dict(added_tokens=[dict(id=i, content="<x>", special=True) for i in (300, 301)]),
        ),
        (
            "id 258 after id 259: merge order is not id order",
            dict(model__merges=["l l", "h e", "he ll"]),
        ),
        ("merge 3 makes id -1 after id 260", dict(model__merges=["h e", "l l", "he ll", "o o"])),
        ("its merges do not make id 260, b'hell'", dict(model__merges=["h e", "l l"])),
        ("its merges do not make id 260, b'hell'", dict(model__merges=["h e", "l l", "hel l"])),
    ],
)
def test_what_a_table_cannot_say_is_refused(why, changes, tmp_path):
    with pytest.raises(ValueError, match="does not fit|leaves characters out") as e:
        load(tmp_path, hugging_face(**changes))
    assert why in str(e.value)


@pytest.mark.parametrize("text", ["\ud800", "caf\udce9", "ab " * 50_000 + "\udfff"])
def test_what_is_no_character_is_refused(text):
    """What a shell or a JSON gave that is no UTF-8: tiktoken would learn or read U+FFFD."""
    enc = tokenizer("bytes")
    for spelled in (encode, type(enc).encode_ordinary):
        with pytest.raises(ValueError, match="is not UTF-8"):
            spelled(enc, text)


def test_an_argument_is_utf8_in_every_console():
    """Under an ASCII or Latin locale Python hands a program surrogates in place of the bytes."""
    for text in ("café → 中", "\U0001f642", "plain"):
        given = text.encode().decode("ascii", "surrogateescape")
        assert BYTES.encode_ordinary(given) == list(text.encode())


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Both readings of one file that Hugging Face's own trainer wrote."""
    hf = pytest.importorskip(
        "tokenizers", reason="tokenizers, the outside oracle, is not installed"
    )
    pre, path = hf.pre_tokenizers, tmp_path_factory.mktemp("hf") / "tokenizer.json"
    cut = pre.Split(hf.Regex(TEKKEN), "isolated")
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = pre.Sequence(
        [cut, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    theirs.train_from_iterator(
        [TEXT[:300_000]],
        hf.trainers.BpeTrainer(
            vocab_size=1500,
            initial_alphabet=pre.ByteLevel.alphabet(),
            special_tokens=["<s>"],
            show_progress=False,
        ),
    )
    theirs.save(str(path))
    return theirs, tokenizer(str(path))


def test_ids_are_those_of_the_oracle(oracle):
    theirs, ours = oracle

    @settings(max_examples=300, deadline=None)
    @given(awkward)
    def check(text):
        assert theirs.encode(text).ids == ours.encode_ordinary(text)

    check()
    assert theirs.encode(TEXT[-200_000:]).ids == ours.encode_ordinary(TEXT[-200_000:])


# tekken.json


def tekken(tmp_path, special, tokens, size, name="tekken.json", **more):
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)]
    config = {"pattern": TEKKEN, "default_vocab_size": size, "default_num_special_tokens": special}
    (tmp_path / name).write_text(json.dumps({"config": config, "vocab": vocab, **more}), "utf-8")
    return str(tmp_path / name)


ONES = [bytes([b]) for b in range(256)]


def test_tekken_ids_count_from_behind_the_control_tokens(tmp_path):
    names = [
        {"rank": 0, "token_str": "<unk>", "is_control": True},
        {"rank": 2, "token_str": "[INST]"},
    ]
    path = tekken(
        tmp_path, 5, ONES + [b"he", b"ll", b"hell", b"hello"], size=264, special_tokens=names
    )
    enc = tokenizer(path)  # 264 = 5 + 259: "hello" is cut off
    assert enc.encode_ordinary("hello") == [5 + 258, 5 + ord("o")] and vocab_size(enc) == 264
    control = ["<unk>", "<SPECIAL_1>", "[INST]", "<SPECIAL_3>", "<SPECIAL_4>"]
    assert enc._special_tokens == {name: i for i, name in enumerate(control)}


def test_nemotron_is_found_or_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="nemotron needs the release's tokenizer.json or a tekken.json in"
    ):
        tokenizer("nemotron")
    tekken(tmp_path, 5, ONES, size=261)
    with pytest.raises(ValueError, match="has 261 ids, Nemotron 3 has 131,072"):
        tokenizer("nemotron")
    triples = [i.to_bytes(3, "big") for i in range(131_072)]
    tekken(tmp_path, 1000, [*ONES, *triples], size=131_072)
    assert tokenizer("nemotron").encode_ordinary("a") == [1000 + ord("a")]


def test_other_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tekken.json or pack: it starts with \['model', 'a'\]"):
        load(tmp_path, {"model": 7, "a": 1})  # a GPT-2 vocab.json has such words


# ---- what surrounds the table: a beginning, added tokens, long runs, malformed files


def written(tmp_path, added=(), begin=()):
    """A tokenizer.json by Hugging Face's own trainer, and their reading of it."""
    hf = pytest.importorskip("tokenizers", reason="tokenizers, the outside oracle")
    their = hf.Tokenizer(hf.models.BPE())
    their.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    their.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    their.train_from_iterator(["think about it, then answer " * 30], trainer)
    their.add_tokens([hf.AddedToken(s, special=False, normalized=False) for s in added])
    template = hf.processors.TemplateProcessing(
        single=" ".join([*begin, "$A"]), special_tokens=[(s, their.token_to_id(s)) for s in begin]
    )
    if begin:
        their.post_processor = hf.processors.Sequence([hf.processors.ByteLevel(), template])
    their.save(str(tmp_path / "tokenizer.json"))
    return hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), tokenizer(str(tmp_path))


@pytest.mark.parametrize("begin", [(), ("<s>",), ("</s>", "<s>")], ids=str)
@pytest.mark.parametrize("added", [(), ("<think>", "</think>"), ("  ", "<a>", "<a><b>")], ids=str)
def test_a_beginning_and_added_tokens_are_theirs(tmp_path, begin, added):
    their, enc = written(tmp_path, added, begin)
    for text in ("think", "<think>about  it</think> then", "<a><a><b> <b>   x", "", "  <think>"):
        assert enc.encode_ordinary(text) == their.encode(text).ids, text
        assert encode(enc, text).tolist() == their.encode(text, add_special_tokens=False).ids
    again = unpack(pack(enc))
    assert (again.begin, again.whole) == (enc.begin, enc.whole) and pack(again) == pack(enc)
    assert again.encode_ordinary("<think>a") == enc.encode_ordinary("<think>a")
    assert int(token_bytes(enc).sum()) == sum(map(len, enc._mergeable_ranks)) + sum(map(len, added))


@pytest.mark.parametrize("run", [" ", "\t\n", "a"], ids=repr)
@pytest.mark.parametrize("pattern", [WORDS, GPT2_WORDS, TEKKEN], ids=["ours", "gpt2", "tekken"])
def test_a_long_run_is_spelled_in_seconds(pattern, run):
    enc = tiktoken.Encoding(
        "x", pat_str=pattern, mergeable_ranks=BPE._mergeable_ranks, special_tokens={}
    )
    text = "x" + run * (1_100_000 // len(run)) + "end\n"
    assert enc.decode(encode(enc, text).tolist()) == text


def test_an_expression_that_panics_is_a_value_error(tmp_path):
    """Lookahead without end: fancy-regex gives up, and tiktoken panics."""
    pack_ = pack(BYTES) | dict(pattern=r"(?:a|a)+(?=b)|(?s:.)")
    with pytest.raises(ValueError, match="its regular expression fails"):
        unpack(pack_).encode_ordinary("a" * 4000)


def test_an_expression_that_fits_nothing_is_one_sentence(capfd):
    """tiktoken panics, and Rust would print that by itself."""
    with pytest.raises(ValueError, match="its regular expression fails .range end index"):
        unpack(pack(BYTES) | dict(pattern="x*"))
    assert capfd.readouterr() == ("", "")


def broken_files():
    """Malformed in every way that a field can be: missing, null, of another kind, out of range."""
    one = base64.b64encode(b"a").decode()
    packed, theirs = pack(BYTES), hugging_face()
    mistral = dict(
        config=dict(pattern="(?s:.)", default_num_special_tokens=1, default_vocab_size=257),
        vocab=[dict(rank=i, token_bytes=base64.b64encode(bytes([i])).decode()) for i in range(256)],
    )
    odd = (None, 7, -1, 1.5, "x", [], {}, [None], [7], {"a": None}, {"a": "b"}, {"": 3}, True)
    for name, good in (("pack", packed), ("hf", theirs), ("tekken", mistral)):
        for key in good:
            yield f"{name} without {key}", {k: v for k, v in good.items() if k != key}
            for x in odd:
                yield f"{name} {key}={x!r}", good | {key: x}
    for where, inner in (("model", "vocab"), ("model", "merges"), ("model", "type")):
        for x in odd:
            yield f"hf {where}.{inner}={x!r}", theirs | {where: theirs[where] | {inner: x}}
    for inner in mistral["config"]:
        for x in odd:
            yield f"tekken {inner}={x!r}", mistral | dict(config=mistral["config"] | {inner: x})
    yield "two entries, one id", packed | dict(ranks=packed["ranks"] | {"YWE=": 3})
    yield "bytes lacking", packed | dict(ranks={one: 0})
    yield "a huge id", packed | dict(special={"<x>": 10**30})
    yield "no regex", packed | dict(pattern="(")


def test_every_malformed_file_is_refused_by_name_or_read(tmp_path):
    """A sentence that names the file, or (where the field does not matter) the ids of the whole
    one.
    """
    path, refused = tmp_path / "odd.json", 0
    for what, content in broken_files():
        path.write_text(json.dumps(content), "utf-8")
        try:
            enc = tokenizer(str(path))
        except ValueError as e:
            refused += 1
            assert "odd.json" in str(e) and "\n" not in str(e).strip()[:200], what
        else:
            assert enc.decode(encode(enc, "hello 1").tolist()) == "hello 1", what
    assert refused > 100
    for raw in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model":{"type":"BPE","vo', b"[" * 9999):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="odd.json"):
            tokenizer(str(path))


def test_this_file_can_fail():
    swapped = {**BPE._mergeable_ranks}
    a, b = BPE.decode_single_token_bytes(300), BPE.decode_single_token_bytes(301)
    swapped[a], swapped[b] = 301, 300
    broken = tiktoken.Encoding("x", pat_str=WORDS, mergeable_ranks=swapped, special_tokens={})
    text = TEXT[-20_000:]
    assert not same(broken, BPE) and broken.encode_ordinary(text) != TRAINER.encode(
        text
    )  # two ids swapped
    cuts = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    assert sum(map(BPE.encode_ordinary, cuts), []) != BPE.encode_ordinary(text)  # cut anywhere
