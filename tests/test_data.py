"""data.py promises that text survives and that a batch is a function; here it is held to that."""

import hashlib
import lzma
import os
import sys

import numpy as np
import pytest
import torch

import data
from corpora import download
from corpora.synthetic import FACTS, TASKS, entropy_floor, task
from data import batch, corpus, describe, encode, tokenizer

PYTHON, TEXTS, BYTES = (
    corpus("python"),
    {name: task(name) for name in TASKS},
    tokenizer("bytes"),
)


# Token files


def llm_c(path, ids, magic=20240520, count=None):
    head = np.zeros(256, "<i4")
    head[:3] = magic, 1, len(ids) if count is None else count
    path.write_bytes(head.tobytes() + np.array(ids, {20240801: "<u4"}.get(magic, "<u2")).tobytes())
    return str(path)


def test_token_files_both_ways(tmp_path):
    ids = np.arange(1000, 2000)
    ids.astype("<u2").tofile(tmp_path / "bare.bin")
    llm_c(tmp_path / "short.bin", ids), llm_c(tmp_path / "long.bin", ids, 20240801)
    for name in ("bare.bin", "short.bin", "long.bin"):
        path = str(tmp_path / name)
        c = corpus(path)
        assert (c.train == ids[:950]).all() and (c.val == ids[950:]).all()
        assert not c.train.flags.owndata and not c.val.flags.owndata  # the map itself, not a copy
        raw = open(path, "rb").read()
        assert c.size == len(raw) and c.sha256 == hashlib.sha256(raw).hexdigest()
    assert corpus(str(tmp_path / "long.bin")).train.dtype == np.uint32


def test_a_glob_reads_as_one_file(tmp_path):
    ids = np.arange(3000)
    for i, (a, b) in enumerate([(0, 700), (700, 701), (701, 701), (701, 3000)]):
        llm_c(tmp_path / f"part{i}.bin", ids[a:b])
    c = corpus(str(tmp_path / "part*.bin"))
    assert (len(c.train), len(c.val)) == (2850, 150) and (c.train[0:2850] == ids[:2850]).all()
    assert (
        all((c.train[a : a + 9] == ids[a : a + 9]).all() for a in range(0, 2841, 7))
        and len(c.train[5:5]) == 0
    )
    assert torch.equal(batch(c.train, 0, 0, 8, 500), batch(ids[:2850], 0, 0, 8, 500))
    (tmp_path / "part3.bin").rename(tmp_path / "part_val.bin")  # published split: no 5 %
    c = corpus(str(tmp_path / "part*.bin"))
    assert len(c.train) == 701 and (c.val == ids[701:]).all()


@pytest.mark.parametrize(
    "why,make",
    [
        ("has 3,024 bytes where 1,001 ids need 3,026", lambda p: llm_c(p, range(1000), count=1001)),
        ("has magic 20240522, neither 20240520", lambda p: llm_c(p, range(1000), magic=20240522)),
        ("has 7 bytes where 3 ids need 6", lambda p: p.write_bytes(b"1234567")),
        ("is empty: 0 tokens in 0 bytes", lambda p: p.write_bytes(b"")),
        ("is empty: 0 tokens in 1,024 bytes", lambda p: llm_c(p, [])),
    ],
)
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


@pytest.mark.parametrize("name", ["python", *TASKS])
def test_val_is_the_last_five_percent(name):
    c = PYTHON if name == "python" else corpus(name)
    n = len(c.train) + len(c.val)
    assert len(c.train) == n * 95 // 100 and len((c.train + c.val).encode()) == c.size
    assert name == "python" or c.train + c.val == TEXTS[name]
    assert c.val[:200] not in c.train


def test_files_and_folders(tmp_path):
    (tmp_path / "b").mkdir()
    files = {"z.md": "zé", "b/y.py": "y\r\ny", "a.txt": "\ufeff" + "a" * 20, "skip.bin": "no"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    c, whole = corpus(str(tmp_path)), "a" * 20 + "\n\ny\ny\n\nzé"
    assert c.train + c.val == whole and c.size == len(whole.encode())
    assert c.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert (
        corpus(str(tmp_path / "a.txt")).train == "a" * 19
        and corpus(str(tmp_path / "a.*")).val == "a"
    )
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    why = {
        "latin.txt": "is not UTF-8: byte 0xe9 at 3",
        "empty.txt": "is empty: 0 bytes",
        "none.txt": "is no file",
    }
    for name in why:
        with pytest.raises(ValueError, match=why[name]):
            corpus(str(tmp_path / name))


def test_nothing_downloads_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "DATA", tmp_path / "data")
    monkeypatch.setattr(
        download.urllib.request, "urlopen", lambda *a, **k: pytest.fail("the network was asked")
    )
    for name in ("shakespeare", "fineweb"):
        with pytest.raises(ValueError, match=f"python data.py --download {name}$"):
            corpus(name)


def test_what_is_downloaded_is_checked_before_it_has_a_name(tmp_path, monkeypatch):
    web, here, play = tmp_path / "web", tmp_path / "data", b"To be, or not to be\n"
    web.mkdir()
    (web / "input.txt").write_bytes(play)
    monkeypatch.setattr(download, "DATA", here)
    monkeypatch.setattr(download, "URLS", dict.fromkeys(download.URLS, web.as_uri() + "/"))
    with pytest.raises(ValueError, match="has sha256 .*, not 86c4e6aa9db7"):
        download.fetch("shakespeare")
    assert not (here / "shakespeare.txt").exists()
    monkeypatch.setattr(download, "SHAKESPEARE", hashlib.sha256(play).hexdigest())
    download.fetch("shakespeare")
    assert corpus("shakespeare").train == "To be, or not to be"
    assert [p.name for p in here.iterdir()] == ["shakespeare.txt"]  # no .part left

    llm_c(web / "fineweb_val_000000.bin", range(90))
    (web / "fineweb_train_000001.bin").write_bytes(b"<html>Please sign in </html>")
    with pytest.raises(ValueError, match="000001.bin does not start like a token file"):
        download.fetch("fineweb")
    llm_c(web / "fineweb_train_000001.bin", range(900))
    download.fetch("fineweb")
    assert (len(corpus("fineweb").train), len(corpus("fineweb").val)) == (900, 90)


@pytest.mark.parametrize(
    "name,sha256",
    [
        ("recall", "75ba66ad0c57bb5f8e1c17009524b4e382cca9d0ae515f132904b101453caad9"),
        ("copy", "8c1c5099d7925b7812c1698ccf545a1526ab9cb8bc8bf7fb7a1e9f32f6884ade"),
        ("arithmetic", "90d80a98b8a6cc0c75e0006c55087cbbffa8acc61136546cab127bf389465e34"),
    ],
)
def test_tasks_are_the_same_everywhere_and_determined(name, sha256):
    assert corpus(name).sha256 == sha256
    for line in TEXTS[name].splitlines()[:2000]:
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
    """Empirical entropy of one free choice, made once in each row."""
    p = np.unique(symbols, return_counts=True)[1] / len(symbols)
    return -(p * np.log2(p)).sum()


def test_floors_are_the_bits_of_the_free_choices():
    rows = {
        n: np.frombuffer(t.encode(), np.uint8).reshape(-1, t.index("\n") + 1)
        for n, t in TEXTS.items()
    }
    r, key = rows["recall"], rows["recall"][:, :16:2]  # (rows, 34) (rows, 8)
    place = [
        (key == r[:, i : i + 1]).argmax(1) for i in range(17, 33, 2)
    ]  # which of the 8 is asked
    number = [rows["arithmetic"][:, i : i + 3] @ [100, 10, 1] for i in (0, 4)]
    free = {
        "copy": sum(bits(rows["copy"][:, i]) for i in range(16)),
        "arithmetic": sum(map(bits, number)),
        "recall": sum(bits(r[:, i]) - np.log2(26 / (26 - i // 2)) for i in range(0, 16, 2))
        + sum(bits(r[:, i]) for i in range(1, 16, 2))
        + sum(map(bits, place)),
    }
    for name, text in TEXTS.items():
        assert abs(free[name] / rows[name].shape[1] - entropy_floor(name)) < 3e-3
        assert 8 * len(lzma.compress(text.encode(), preset=1)) / len(text) > entropy_floor(name)


def test_facts_are_determined_and_all_told_before_they_are_asked():
    c = corpus("facts")
    assert c.sha256 == "defa2adb474966715871c85ec6a2e4a5d93b4a1ac89a939bb1bf110c66e22258"
    assert c.sha256 == corpus(f"facts:{FACTS}").sha256
    assert c.size == len(c.train) + len(c.val) == 1_024_000 and len(c.val) == c.size // 20
    told, asked = ({bytes(f[:3]): bytes(f[3:]) for f in x.reshape(-1, 5)} for x in (c.train, c.val))
    assert len(told) == 8192 and asked.items() <= told.items()
    values = np.array([list(v) for v in told.values()])
    assert bits(values[:, 0]) > 7.9 and bits(values[:, 1]) > 7.9  # 256 values, nothing to guess by
    assert len(lzma.compress(c.train.tobytes())) > 8192 * 5  # and what is to be known is much


@pytest.mark.parametrize("n", [1, 7, 30_000])
def test_any_number_of_facts(n):
    c = corpus(f"facts:{n}")
    whole = np.concatenate([c.train, c.val]).reshape(-1, 5)
    facts, times = np.unique(whole, axis=0, return_counts=True)
    assert len(facts) == len(np.unique(facts[:, :3], axis=0)) == n  # no key has two values
    assert times.min() == times.max() >= 20 and len(whole) >= 200_000
    assert len(np.unique(c.train.reshape(-1, 5)[:, :3], axis=0)) == n
    assert n < 7 or (whole[:n] != whole[n : 2 * n]).any()


@pytest.mark.parametrize("spec", ["facts:0", "facts:-3", "facts:1048577", "facts:a", "facts:"])
def test_impossible_numbers_of_facts(spec):
    with pytest.raises(ValueError, match="facts:N has N facts, from 1 to 1,048,576"):
        corpus(spec)


def test_the_values_alone_are_asked_for():
    c = corpus("facts:50")
    rows = batch(c.train, 0, 1, 6, 65, unit=c.unit)
    known = {bytes(f[:3]): bytes(f[3:]) for f in c.train.reshape(-1, 5)}
    asked = data.targets(c, 64)
    assert asked.tolist() == [j % 5 > 2 for j in range(1, 65)] and asked.sum() == 26
    for row in rows.tolist():
        assert all(
            known[bytes(row[i : i + 3])] == bytes(row[i + 3 : i + 5]) for i in range(0, 65, 5)
        )
    assert data.targets(corpus("copy"), 9).all()


def test_windows_are_spread_evenly_and_on_units():
    rows = data.windows(IDS, 599, 99)
    assert rows[:, 0].tolist() == [0, 980, 1960, 2940, 3920, 4900] and rows[-1, -1] == 4999
    assert torch.equal(rows - rows[:, :1], torch.arange(100).expand(6, -1))
    starts = data.windows(IDS, 7 * 32, 32, unit=5)[:, 0]
    assert (starts % 5 == 0).all() and starts[-1] == 4965 and starts.unique().numel() == 7
    assert data.windows(IDS, 1, 20)[0, 0] == 0 and len(data.windows(IDS, 10**6, 99)) == 50


# Batches

IDS = np.arange(5000, dtype=np.uint16)


@pytest.mark.parametrize("seed, step", [(0.5, 0), (0, 1.0), ("0", 0)])
def test_a_seed_and_a_step_are_integers(seed, step):
    """numpy would take half a seed for none."""
    with pytest.raises(TypeError, match="integer"):
        batch(IDS, seed, step, 8, 33)


def test_a_batch_is_a_function_of_seed_and_step():
    first = batch(IDS, seed=3, step=5, size=8, length=33)
    np.random.seed(0), torch.manual_seed(0), batch(IDS, 3, 6, 8, 33)  # nothing else moves it
    assert first.shape == (8, 33) and first.dtype == torch.int64
    assert torch.equal(first, batch(IDS, 3, 5, 8, 33))
    assert torch.equal(
        first - first[:, :1], torch.arange(33).expand(8, -1)
    )  # each row is one stretch
    assert not torch.equal(first, batch(IDS, 3, 6, 8, 33)) and not torch.equal(
        first, batch(IDS, 4, 5, 8, 33)
    )
    assert batch(IDS[:1000], 1, 2, 4, 1).flatten().tolist() == [
        377,
        50,
        683,
        234,
    ]  # on every machine


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_one_batch(world):
    ranks = [batch(IDS, 0, 1, 8, 16, r, world) for r in range(world)]
    assert torch.equal(torch.cat(ranks), batch(IDS, 0, 1, 8, 16))


def test_every_window_can_be_drawn():
    starts = torch.cat([batch(IDS[:12], 0, step, 64, 9)[:, 0] for step in range(10)])
    assert starts.unique().tolist() == [0, 1, 2, 3]  # the last one ends with the corpus
    assert starts.bincount().min() > 120  # of 160 expected


def test_batch_refusals():
    with pytest.raises(ValueError, match="the corpus has 8 tokens, one sequence needs 9"):
        batch(IDS[:8], 0, 0, 4, 9)
    with pytest.raises(ValueError, match="a batch of 6 sequences does not divide among 4 ranks"):
        batch(IDS, 0, 0, 6, 9, world=4)


def test_impossible_batches_and_windows_are_refused():
    tokens = np.arange(100, dtype=np.uint16)
    for odd in ((-1, 10), (2, 0), (2, -5), (2, 10, 2, 2), (2, 10, -1, 2), (2, 10, 0, 1, 0)):
        with pytest.raises(ValueError):
            data.batch(tokens, 0, 1, *odd)
    for odd in ((10, 0), (10, -1), (10, 100), (10, 5, 0)):
        with pytest.raises(ValueError):
            data.windows(tokens, *odd)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
def test_a_pipe_is_no_corpus(tmp_path):
    """It has no second time, and a device like /dev/zero no end."""
    os.mkfifo(tmp_path / "pipe.txt")
    for spec in (tmp_path / "pipe.txt", tmp_path, tmp_path / "*.txt", "/dev/zero", ""):
        with pytest.raises(ValueError, match="is no"):
            data.corpus(str(spec))


def test_describe_is_one_line_and_catches_the_wrong_tokenizer(tmp_path):
    c = corpus("copy")
    line = describe(c, BYTES, len(encode(BYTES, c.train)), len(encode(BYTES, c.val)))
    assert line == (
        "copy: 999,974 bytes, 949,975 + 49,999 tokens of bytes, 1.00 bytes/token, "
        f"sha256 {c.sha256[:12]}"
    )
    c = corpus(llm_c(tmp_path / "gpt2.bin", range(50_000)))
    assert encode(BYTES, c.train) is c.train  # ids already
    with pytest.raises(
        ValueError, match="has id 47499 in its training split, but bytes has 257 ids"
    ):
        describe(c, BYTES, len(c.train), len(c.val))
    c = corpus(llm_c(tmp_path / "words.bin", [97] * 60 + [256] * 40))
    assert " 0.00 bytes/token" in describe(
        c, BYTES, len(c.train), len(c.val)
    )  # special tokens are no text


def test_flags_are_spelled_out(monkeypatch):
    for flags in (["--downl", "shakespeare"], ["--download", "everything"], ["--chunk", "1"]):
        monkeypatch.setattr(sys, "argv", ["data.py", *flags])
        with pytest.raises(SystemExit):
            data.main()


def test_data_is_the_door_to_the_tokenizer():
    text = "a door"
    enc = data.unpack(data.pack(data.tokenizer("bytes")))
    assert data.vocab_size(enc) == len(data.token_bytes(enc)) == 257
    assert data.encode(enc, text).tolist() == [*text.encode()]


def test_this_file_can_fail():
    late = np.random.default_rng(0).integers(0, 4968, 8)
    assert late.tolist() != batch(IDS, 0, 0, 8, 33)[:, 0].tolist()  # another generator
    swapped = batch(IDS, 0, 1, 8, 16).roll(4, 0)
    assert not torch.equal(swapped, batch(IDS, 0, 1, 8, 16))  # the ranks in another order
    c = corpus("facts:50")
    rows = batch(c.train, 0, 1, 6, 65)  # units forgotten
    known = {bytes(f[:3]) for f in c.train.reshape(-1, 5)}
    assert not all(bytes(row[:3]) in known for row in rows.tolist())
    text = TEXTS["copy"].replace("a", "b")  # one letter fewer to choose from
    rows = np.frombuffer(text.encode(), np.uint8).reshape(-1, 34)
    assert abs(sum(bits(rows[:, i]) for i in range(16)) / 34 - entropy_floor("copy")) > 3e-2
