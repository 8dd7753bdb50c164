"""data.py promises that text survives, ids are the file's own and a batch is a function; here it is held to that."""
import base64
import hashlib
import io
import json
import lzma
import sys

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings, strategies as st

import data
from data import batch, corpus, describe, encode, entropy_floor, pack, task, token_bytes, tokenizer, unpack, vocab_size

PYTHON = corpus("python")
BYTES, BPE = tokenizer("bytes"), tokenizer("bpe:600", PYTHON.train[:300_000])
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
awkward = st.one_of(st.text(max_size=60), st.text("ab_ \n\t\r'(:/.1²é日\u0301🙂", max_size=60))


def same(a, b):
    return pack(a) == pack(b)


# Text survives

@settings(max_examples=200, deadline=None)
@given(awkward)
def test_round_trip(text):
    for enc in (BYTES, BPE):
        ids = encode(enc, text)
        assert ids.dtype == np.uint16 and enc.decode(ids.tolist()) == text
        assert token_bytes(enc)[torch.from_numpy(ids.astype(np.int64))].sum() == len(text.encode())
    assert encode(BYTES, text).tolist() == [*text.encode()]


@settings(max_examples=300, deadline=None)
@given(awkward, st.integers(1, 9))
def test_cutting_into_pieces_changes_no_id(text, size):
    parts = list(data.pieces(text, size))
    assert "".join(parts) == text
    for pattern in (data.WORDS, data.GPT2_WORDS, TEKKEN):
        enc = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=BPE._mergeable_ranks, special_tokens={})
        assert sum(map(enc.encode_ordinary, parts), []) == enc.encode_ordinary(text)


def test_threads_change_no_id():
    text = PYTHON.train[:3_000_000]
    assert len(list(data.pieces(text))) > 4
    assert encode(BPE, text).tolist() == BPE.encode_ordinary(text)


def test_vocabularies():
    assert (vocab_size(BYTES), BYTES.encode_single_token(data.END)) == (257, 256)
    assert (vocab_size(BPE), BPE.encode_single_token(data.END)) == (600, 599)
    assert token_bytes(BPE).shape == (600,) and token_bytes(BPE)[599] == 0 and token_bytes(BPE)[:599].min() == 1
    assert data.END not in (BPE.decode([i]) for i in range(599))
    assert encode(BPE, data.END).max() < 599                                 # spelled out, it is plain text
    wide = unpack(pack(BYTES) | {"special": {"<e>": 65_536}})
    assert encode(wide, "a").dtype == np.uint32 and vocab_size(wide) == 65_537


@settings(max_examples=100, deadline=None)
@given(awkward)
def test_the_trainer_and_tiktoken_agree(text):
    assert TRAINER.encode(text) == BPE.encode_ordinary(text)


def trainer():
    import rustbpe
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter([PYTHON.train[:300_000]]), 599, pattern=data.WORDS)     # in one piece
    return bpe


TRAINER = trainer()


@pytest.mark.parametrize("spec,text,why", [
    ("bpe:256", "a", "from 257 up"), ("bpe:many", "a", "from 257 up"), ("bpe:300", None, "text to learn from"),
    ("bpe:300", np.arange(9), "text to learn from"),
    ("bpe:300", "ab ab", "asks for 43 pairs to join, but the 5 characters it learns from have 2"),
    ("gpt2", None, "'gpt2' is not bytes, bpe:N, nemotron or a file")])
def test_tokenizer_specs_that_cannot_be(spec, text, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=why):
        tokenizer(spec, text)


# The table travels

def test_pack_travels_in_json_and_in_a_checkpoint():
    for enc in (BYTES, BPE, hugging_face_table()):
        box = io.BytesIO()
        torch.save({"tokenizer": pack(enc)}, box)
        box.seek(0)
        for back in (torch.load(box, weights_only=True)["tokenizer"], json.loads(json.dumps(pack(enc)))):
            assert same(unpack(back), enc) and unpack(back).name == enc.name
            assert unpack(back).encode_ordinary("def f(x):\n  é") == enc.encode_ordinary("def f(x):\n  é")


def test_the_same_path_never_serves_stale_ranks(tmp_path):
    path = tmp_path / "bpe.json"
    for size in (300, 301):
        enc = tokenizer(f"bpe:{size}", PYTHON.train[:50_000])
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
    """Ids 0 and 1 are special, 2 + b is byte b, and three merges follow; `changes` like model__type="Unigram"."""
    vocab = {c: 2 + b for b, c in letters().items()} | {"he": 258, "ll": 259, "hell": 260}
    d = {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
         "added_tokens": [{"id": 0, "content": "<s>", "special": True}, {"id": 1, "content": "</s>", "special": True}],
         "model": {"type": "BPE", "byte_fallback": False, "vocab": {"<s>": 0, "</s>": 1} | vocab,
                   "merges": ["h e", "l l", "he ll"]}}
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


def hugging_face_table():
    return data.from_hugging_face(hugging_face())


def split(regex, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


LAST = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
ONCE = {"type": "Sequence", "pretokenizers": [split(TEKKEN), LAST]}
TWICE = {"type": "Sequence", "pretokenizers": [split(r"\p{N}"), split(TEKKEN), LAST]}


def test_ids_are_those_of_the_file(tmp_path):
    enc = load(tmp_path, hugging_face())
    (tmp_path / "some.json").rename(tmp_path / "tokenizer.json")
    assert same(tokenizer(str(tmp_path)), enc)                               # the folder of a checkpoint will do
    assert enc.encode_ordinary("hello hell") == [260, 2 + ord("o"), 2 + ord(" "), 260]      # he+ll, o | blank, he+ll
    assert enc.encode_ordinary("élhe") == [2 + 0xC3, 2 + 0xA9, 2 + ord("l"), 258]
    assert enc.encode("<s>", allowed_special="all") == [0] and vocab_size(enc) == 261
    assert token_bytes(enc)[[0, 1, 2, 260]].tolist() == [0, 0, 1, 4]
    pairs = hugging_face(model__merges=[["h", "e"], ["l", "l"], ["he", "ll"]], pre_tokenizer=ONCE)    # newer files
    assert load(tmp_path, pairs)._pat_str == TEKKEN
    assert load(tmp_path, pairs).encode_ordinary("hell") == [260]


@pytest.mark.parametrize("why,changes", [
    ("its model is Unigram, not BPE", dict(model__type="Unigram")),
    ("byte_fallback", dict(model__byte_fallback=True)),
    ("dropout is 0.1", dict(model__dropout=0.1)),
    ("end_of_word_suffix is '</w>'", dict(model__end_of_word_suffix="</w>")),
    ("its normalizer changes the text first: {'type': 'NFC'}", dict(normalizer={"type": "NFC"})),
    ("its pre-tokenizer splits 2 times, not once", dict(pre_tokenizer=TWICE)),
    ("splits 0 times", dict(pre_tokenizer=LAST)),
    ("does not end in ByteLevel", dict(pre_tokenizer={"type": "Metaspace"})),
    ("does not end in ByteLevel", dict(pre_tokenizer=None)),
    ("without add_prefix_space", dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})),
    ("no Split that keeps", dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [split("x", "Removed"), LAST]})),
    ("pre-tokenizer Digits is no Split", dict(pre_tokenizer={"pretokenizers": [{"type": "Digits"}, LAST]})),
    ("leaves characters out", dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [split(r"\p{L}+"), LAST]})),
    ("added token '  ' cuts plain text", dict(added_tokens=[{"id": 300, "content": "  ", "special": False}])),
    ("token '▁a' is not in ByteLevel's alphabet", dict(model__vocab={"▁a": 0})),
    ("some single bytes have no id", dict(model__vocab={"a": 0})),
    ("merge 1 makes id 258 after id 259: merge order is not id order", dict(model__merges=["l l", "h e", "he ll"])),
    ("merge 3 makes id -1 after id 260", dict(model__merges=["h e", "l l", "he ll", "o o"])),
    ("its merges do not make id 260, b'hell'", dict(model__merges=["h e", "l l"])),
    ("its merges do not make id 260, b'hell'", dict(model__merges=["h e", "l l", "hel l"])),
])
def test_what_a_table_cannot_say_is_refused(why, changes, tmp_path):
    with pytest.raises(ValueError, match="does not fit") as e:
        load(tmp_path, hugging_face(**changes))
    assert why in str(e.value)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Both readings of one file that Hugging Face's own trainer wrote."""
    hf = pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers, the outside oracle, is not installed")
    pre, path = hf.pre_tokenizers, tmp_path_factory.mktemp("hf") / "tokenizer.json"
    cut = pre.Split(hf.Regex(TEKKEN), "isolated")
    theirs = hf.Tokenizer(hf.models.BPE())
    theirs.pre_tokenizer = pre.Sequence([cut, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator([PYTHON.train[:300_000]], hf.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre.ByteLevel.alphabet(), special_tokens=["<s>"], show_progress=False))
    theirs.save(str(path))
    return theirs, tokenizer(str(path))


def test_ids_are_those_of_the_oracle(oracle):
    theirs, ours = oracle

    @settings(max_examples=300, deadline=None)
    @given(awkward)
    def check(text):
        assert theirs.encode(text).ids == ours.encode_ordinary(text)

    check()
    assert theirs.encode(PYTHON.val[:200_000]).ids == ours.encode_ordinary(PYTHON.val[:200_000])


# tekken.json

def tekken(tmp_path, special, tokens, size, name="tekken.json", **more):
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)]
    config = {"pattern": TEKKEN, "default_vocab_size": size, "default_num_special_tokens": special}
    (tmp_path / name).write_text(json.dumps({"config": config, "vocab": vocab, **more}), "utf-8")
    return str(tmp_path / name)


ONES = [bytes([b]) for b in range(256)]


def test_tekken_ids_count_from_behind_the_control_tokens(tmp_path):
    names = [{"rank": 0, "token_str": "<unk>", "is_control": True}, {"rank": 2, "token_str": "[INST]"}]
    path = tekken(tmp_path, 5, ONES + [b"he", b"ll", b"hell", b"hello"], size=264, special_tokens=names)
    enc = tokenizer(path)                                                    # 264 = 5 + 259: "hello" is cut off
    assert enc.encode_ordinary("hello") == [5 + 258, 5 + ord("o")] and vocab_size(enc) == 264
    assert enc._special_tokens == {"<unk>": 0, "<SPECIAL_1>": 1, "[INST]": 2, "<SPECIAL_3>": 3, "<SPECIAL_4>": 4}


def test_nemotron_is_found_or_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="nemotron needs the release's tokenizer.json or a tekken.json in this folder"):
        tokenizer("nemotron")
    tekken(tmp_path, 5, ONES, size=261)
    with pytest.raises(ValueError, match="has 261 ids, Nemotron 3 has 131,072"):
        tokenizer("nemotron")
    pairs = (bytes(p) for p in np.ndindex(256, 256))
    triples = (b"ab" + bytes(p) for p in np.ndindex(256, 256))
    tekken(tmp_path, 1000, [*ONES, *pairs, *triples], size=131_072)
    assert tokenizer("nemotron").encode_ordinary("a") == [1000 + ord("a")]


def test_other_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json, tekken.json or pack: it starts with \['model', 'a'\]"):
        load(tmp_path, {"model": 7, "a": 1})                                 # a GPT-2 vocab.json has such words


# Token files

def llm_c(path, ids, magic=20240520, count=None):
    head = np.zeros(256, "<i4")
    head[:3] = magic, 1, len(ids) if count is None else count
    path.write_bytes(head.tobytes() + np.array(ids, {20240801: "<u4"}.get(magic, "<u2")).tobytes())
    return str(path)


def test_token_files_both_ways(tmp_path):
    ids = np.arange(1000, 2000)
    ids.astype("<u2").tofile(tmp_path / "bare.bin")
    for path in (str(tmp_path / "bare.bin"), llm_c(tmp_path / "a.bin", ids), llm_c(tmp_path / "b.bin", ids, 20240801)):
        c = corpus(path)
        assert (c.train == ids[:950]).all() and (c.val == ids[950:]).all()
        assert not c.train.flags.owndata and not c.val.flags.owndata         # the map itself, not a copy
        raw = open(path, "rb").read()
        assert c.size == len(raw) and c.sha256 == hashlib.sha256(raw).hexdigest()
    assert corpus(str(tmp_path / "b.bin")).train.dtype == np.uint32


def test_a_glob_reads_as_one_file(tmp_path):
    ids = np.arange(3000)
    for i, (a, b) in enumerate([(0, 700), (700, 701), (701, 701), (701, 3000)]):
        llm_c(tmp_path / f"part{i}.bin", ids[a:b])
    c = corpus(str(tmp_path / "part*.bin"))
    assert (len(c.train), len(c.val)) == (2850, 150) and (c.train[0:2850] == ids[:2850]).all()
    assert all((c.train[a:a + 9] == ids[a:a + 9]).all() for a in range(0, 2841, 7)) and len(c.train[5:5]) == 0
    assert torch.equal(batch(c.train, 0, 0, 8, 500), batch(ids[:2850], 0, 0, 8, 500))
    (tmp_path / "part3.bin").rename(tmp_path / "part_val.bin")               # published split: no 5 %
    c = corpus(str(tmp_path / "part*.bin"))
    assert len(c.train) == 701 and (c.val == ids[701:]).all()


@pytest.mark.parametrize("why,make", [
    ("has 3,024 bytes where 1,001 ids need 3,026", lambda p: llm_c(p, range(1000), count=1001)),
    ("has magic 20240522, neither 20240520", lambda p: llm_c(p, range(1000), magic=20240522)),
    ("has 7 bytes where 3 ids need 6", lambda p: p.write_bytes(b"1234567")),
    ("is empty: 0 tokens in 0 bytes", lambda p: p.write_bytes(b"")),
    ("is empty: 0 tokens in 1,024 bytes", lambda p: llm_c(p, []))])
def test_broken_token_files(why, make, tmp_path):
    make(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=why):
        corpus(str(tmp_path / "x.bin"))


# Corpora

def test_python_is_here_and_stays_the_same():
    again = corpus("python")
    assert again == PYTHON and PYTHON.size > 5_000_000 and PYTHON.name.startswith("python 3.")
    assert PYTHON.sha256 == hashlib.sha256((PYTHON.train + PYTHON.val).encode()).hexdigest()
    assert "\r" not in PYTHON.train and "def " in PYTHON.val


@pytest.mark.parametrize("name", ["python", *data.TASKS])
def test_val_is_the_last_five_percent(name):
    c = PYTHON if name == "python" else corpus(name)
    n = len(c.train) + len(c.val)
    assert len(c.train) == n * 95 // 100 and len((c.train + c.val).encode()) == c.size
    assert name == "python" or c.train + c.val == task(name)
    assert c.val[:200] not in c.train


def test_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {"z.md": "zé", "b/y.py": "y\r\ny", "a.txt": "\ufeff" + "a" * 20, "skip.bin": "no"}.items():
        (tmp_path / name).write_bytes(text.encode())
    c, whole = corpus(str(tmp_path)), "a" * 20 + "\n\ny\ny\n\nzé"
    assert c.train + c.val == whole and c.size == len(whole.encode())
    assert c.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert corpus(str(tmp_path / "a.txt")).train == "a" * 19 and corpus(str(tmp_path / "a.*")).val == "a"
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    why = {"latin.txt": "is not UTF-8: byte 0xe9 at 3", "empty.txt": "is empty: 0 bytes", "none.txt": "is no file"}
    for name in why:
        with pytest.raises(ValueError, match=why[name]):
            corpus(str(tmp_path / name))


def test_nothing_downloads_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *a, **k: pytest.fail("the network was asked"))
    for name in ("shakespeare", "fineweb"):
        with pytest.raises(ValueError, match=f"python data.py --download {name}$"):
            corpus(name)


def test_what_is_downloaded_is_checked_before_it_has_a_name(tmp_path, monkeypatch):
    web, here, play = tmp_path / "web", tmp_path / "data", b"To be, or not to be\n"
    web.mkdir()
    (web / "input.txt").write_bytes(play)
    monkeypatch.setattr(data, "DATA", here)
    monkeypatch.setattr(data, "URLS", dict.fromkeys(data.URLS, web.as_uri() + "/"))
    with pytest.raises(ValueError, match="has sha256 .*, not 86c4e6aa9db7"):
        data.download("shakespeare")
    assert not (here / "shakespeare.txt").exists()
    monkeypatch.setattr(data, "SHAKESPEARE", hashlib.sha256(play).hexdigest())
    data.download("shakespeare")
    assert corpus("shakespeare").train == "To be, or not to be" and len(list(here.iterdir())) == 1   # no .part left

    llm_c(web / "fineweb_val_000000.bin", range(90))
    (web / "fineweb_train_000001.bin").write_bytes(b"<html>Please sign in </html>")
    with pytest.raises(ValueError, match="000001.bin does not start like a token file"):
        data.download("fineweb")
    llm_c(web / "fineweb_train_000001.bin", range(900))
    data.download("fineweb")
    assert (len(corpus("fineweb").train), len(corpus("fineweb").val)) == (900, 90)


@pytest.mark.parametrize("name,sha256", [
    ("recall", "75ba66ad0c57bb5f8e1c17009524b4e382cca9d0ae515f132904b101453caad9"),
    ("copy", "8c1c5099d7925b7812c1698ccf545a1526ab9cb8bc8bf7fb7a1e9f32f6884ade"),
    ("arithmetic", "90d80a98b8a6cc0c75e0006c55087cbbffa8acc61136546cab127bf389465e34")])
def test_tasks_are_the_same_everywhere_and_determined(name, sha256):
    assert corpus(name).sha256 == sha256
    for line in task(name).splitlines()[:2000]:
        if name == "arithmetic":
            a, b, c = int(line[:3]), int(line[4:7]), int(line[8:])
            assert a + b == c and len(line) == 12
        elif name == "copy":
            assert line[:16] == line[17:] and line[16] == "|" and len(line) == 33
        else:
            said, asked = dict(zip(line[:16:2], line[1:16:2])), line[17:]
            assert len(said) == 8 and len(line) == 33
            assert all(said[k] == v for k, v in zip(asked[::2], asked[1::2]))


def bits(symbols):
    """Empirical entropy of one free choice."""
    p = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return -(p * np.log2(p)).sum()


def test_floors_are_the_bits_of_the_free_choices():
    rows = {n: np.array(task(n).splitlines()) for n in data.TASKS}
    at = lambda n, i, j: [line[i:j] for line in rows[n]]
    free = {"copy": sum(bits(at("copy", i, i + 1)) for i in range(16)),
            "arithmetic": sum(bits(at("arithmetic", i, i + 3)) for i in (0, 4)),
            "recall": sum(bits(at("recall", i, i + 1)) - np.log2(26 / (26 - i // 2)) for i in range(0, 16, 2))
            + sum(bits(at("recall", i, i + 1)) for i in range(1, 16, 2))
            + sum(bits([line.index(line[i]) for line in rows["recall"]]) for i in range(17, 33, 2))}
    for name in data.TASKS:
        assert abs(free[name] / (len(rows[name][0]) + 1) - entropy_floor(name)) < 3e-3
        assert 8 * len(lzma.compress(task(name).encode())) / len(task(name)) > entropy_floor(name)
    with pytest.raises(ValueError, match="'python' has no known entropy"):
        entropy_floor("python")


# Batches

IDS = np.arange(5000, dtype=np.uint16)


def test_a_batch_is_a_function_of_seed_and_step():
    first = batch(IDS, seed=3, step=5, size=8, length=33)
    np.random.seed(0), torch.manual_seed(0), batch(IDS, 3, 6, 8, 33)         # nothing else moves it
    assert first.shape == (8, 33) and first.dtype == torch.int64
    assert torch.equal(first, batch(IDS, 3, 5, 8, 33))
    assert torch.equal(first - first[:, :1], torch.arange(33).expand(8, -1))     # each row is one stretch of the corpus
    assert not torch.equal(first, batch(IDS, 3, 6, 8, 33)) and not torch.equal(first, batch(IDS, 4, 5, 8, 33))
    assert batch(IDS[:1000], 1, 2, 4, 1).flatten().tolist() == [377, 50, 683, 234]        # on every machine


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_one_batch(world):
    assert torch.equal(torch.cat([batch(IDS, 0, 1, 8, 16, r, world) for r in range(world)]), batch(IDS, 0, 1, 8, 16))


def test_every_window_can_be_drawn():
    starts = torch.cat([batch(IDS[:12], 0, step, 64, 9)[:, 0] for step in range(10)])
    assert starts.unique().tolist() == [0, 1, 2, 3]                          # the last one ends with the corpus
    assert starts.bincount().min() > 120                                     # of 160 expected


def test_batch_refusals():
    with pytest.raises(ValueError, match="the corpus has 8 tokens, one sequence needs 9"):
        batch(IDS[:8], 0, 0, 4, 9)
    with pytest.raises(ValueError, match="a batch of 6 sequences does not divide among 4 ranks"):
        batch(IDS, 0, 0, 6, 9, world=4)


def test_describe_is_one_line_and_catches_the_wrong_tokenizer(tmp_path):
    c = corpus("copy")
    line = describe(c, BYTES, len(encode(BYTES, c.train)), len(encode(BYTES, c.val)))
    assert line == f"copy: 999,974 bytes, 949,975 + 49,999 tokens of bytes, 1.00 bytes/token, sha256 {c.sha256[:12]}"
    c = corpus(llm_c(tmp_path / "gpt2.bin", range(50_000)))
    assert encode(BYTES, c.train) is c.train                                 # ids already
    with pytest.raises(ValueError, match="has id 49999, but bytes has 257 ids"):
        describe(c, BYTES, len(c.train), len(c.val))
    c = corpus(llm_c(tmp_path / "words.bin", [300] * 60 + [data.vocab_size(BPE) - 1] * 40))
    assert " 0.00 bytes/token" in describe(c, BPE, len(c.train), len(c.val))  # special tokens are no text


def test_flags_are_spelled_out(monkeypatch):
    for flags in (["--downl", "shakespeare"], ["--download", "everything"], ["--chunk", "1"]):
        monkeypatch.setattr(sys, "argv", ["data.py", *flags])
        with pytest.raises(SystemExit):
            data.main()


def test_this_file_can_fail():
    swapped = {**BPE._mergeable_ranks}
    a, b = BPE.decode_single_token_bytes(300), BPE.decode_single_token_bytes(301)
    swapped[a], swapped[b] = 301, 300
    broken = tiktoken.Encoding("x", pat_str=data.WORDS, mergeable_ranks=swapped, special_tokens={})
    text = PYTHON.val[:20_000]
    assert not same(broken, BPE) and broken.encode_ordinary(text) != TRAINER.encode(text)      # two ids swapped
    cuts = [text[i:i + 1000] for i in range(0, len(text), 1000)]
    assert sum(map(BPE.encode_ordinary, cuts), []) != BPE.encode_ordinary(text)                  # cut anywhere
    late = np.random.default_rng(0).integers(0, 4968, 8)
    assert late.tolist() != batch(IDS, 0, 0, 8, 33)[:, 0].tolist()                               # another generator
