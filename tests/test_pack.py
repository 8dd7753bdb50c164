"""Documents in one row: packed is one by one, and every boundary left out is seen."""

import random

import pytest
import torch
from tiny import SMALL

import data
import mamba
import mtp
import train
from config import Config
from model import Nemotron
from post import pack
from scale.parallel import World
from training.settings import Run, check
from training.world import Alone

CONFIG = Config(hybrid_override_pattern="MEM*EM-*E", vocab_size=64, initializer_range=0.3, **SMALL)
LENGTHS = (1, 2, 3, 1, 5, 8, 13, 34, 21, 9, 4, 30, 1, 40)
WEIGHTS = (1.0, 0.15, 0.15)


def built(slow=False, blocks=1, dtype=torch.float64):
    config = Config(**{**vars(CONFIG), "num_nextn_predict_layers": blocks})
    model = Nemotron(config).to(dtype)
    for m in model.modules():
        if slow and isinstance(m, mamba.Mamba2):  # a token fades the state by a per cent or so
            torch.nn.init.constant_(m.A_log, -4.0)
            torch.nn.init.zeros_(m.dt_bias)
    return model


def written(lengths=LENGTHS):
    draw = random.Random(0)
    documents = [[draw.randrange(64) for _ in range(n)] for n in lengths]
    weights = [[draw.randrange(65) / 64 for _ in range(n)] for n in lengths]
    return documents, weights


def graded(model, pieces):
    """(ids, mask, t, docs) each -> summed losses of every depth and every gradient."""
    model.zero_grad()
    parts = [train.losses(model, *piece) for piece in pieces]
    sums = [sum(p) for p in zip(*parts)]
    sum(w * s for w, s in zip(WEIGHTS, sums)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [s.item() for s in sums], grads


def alone(model, documents, weights):
    two = [(d, w) for d, w in zip(documents, weights) if len(d) > 1]
    kind = model.lm_head.weight.dtype
    return graded(
        model,
        [(torch.tensor([d]), torch.tensor([w[1:]], dtype=kind), None, None) for d, w in two],
    )


def laid(documents, weights, length=48, dtype=torch.float64):
    rows = pack.pack(documents, length)
    number, ids, weight = pack.lay(rows, length, documents, weights)
    return rows, ids, weight[:, 1:].to(dtype), number


def difference(got, want):
    """The worst loss and the worst gradient, each relative to its size."""
    (sums, grads), (right, expected) = got, want
    assert grads.keys() == expected.keys()
    return (
        max(abs(a - b) / abs(b) for a, b in zip(sums, right)),
        max(float((grads[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in expected.items()),
    )


@pytest.mark.parametrize("slow,blocks", [(False, 1), (True, 1), (True, 2)])
def test_packed_is_one_by_one(slow, blocks):
    model, (documents, weights) = built(slow, blocks), written()
    rows, ids, weight, number = laid(documents, weights)
    docs = pack.Docs(number)
    assert len(rows) < len(documents) / 2 and min(map(len, documents)) == 1
    with torch.no_grad():
        logits = model.logits(model.hidden(ids[:, :-1], docs=docs))
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                one = model(torch.tensor([documents[i]]))[0]
                n = min(len(one), ids.shape[1] - 1 - at)  # a full row's last token is a target only
                assert torch.allclose(one[:n], logits[r, at : at + n], rtol=0, atol=1e-12)
                at += n
    losses, grads = difference(
        graded(model, [(ids, weight, None, docs)]), alone(model, documents, weights)
    )
    assert losses < 1e-13 and grads < 1e-11


def test_rows_may_be_cut_up_into_pieces():
    model, (documents, weights) = built(), written()
    _, ids, weight, number = laid(documents, weights)
    pieces = [
        (a, b, None, pack.Docs(n))
        for a, b, n in zip(ids.split(2), weight.split(2), number.split(2))
    ]
    assert len(pieces) > 1
    assert max(difference(graded(model, pieces), alone(model, documents, weights))) < 1e-11


def test_fp32_rounds_a_few_times_more_than_alone():
    """A sum that runs over 64 bits of fading keeps fewer digits: some 1e-5, against 1e-6 alone."""
    exact, (documents, weights) = built(slow=True), written()
    want = alone(exact, documents, weights)
    model = built(slow=True, dtype=torch.float32)
    _, ids, weight, number = laid(documents, weights, dtype=torch.float32)
    packed = difference(graded(model, [(ids, weight, None, pack.Docs(number))]), want)
    single = difference(alone(model, documents, weights), want)
    assert max(single) < 1e-4 and max(packed) < 2e-4 and packed[0] < 1e-5


def leaky(where, monkeypatch):
    """A Docs without one of its boundaries."""

    class Docs(pack.Docs):
        def apart(self, x, k):
            return (x, lambda y: y) if where == "conv" else super().apart(x, k)

        def restart(self, x, dt, A):
            return (x, dt) if where == "recurrence" else super().restart(x, dt, A)

    if where == "mtp":
        roll = mtp.roll
        monkeypatch.setattr(mtp, "roll", lambda x, docs=None: roll(x))

    def made(number):
        docs = Docs(number)
        if where == "attention":
            docs.lengths = [number.shape[1] - 1] * len(number)
        return docs

    return made


@pytest.mark.parametrize("where", ["conv", "recurrence", "attention", "mtp"])
def test_each_boundary_left_out_is_seen(where, monkeypatch):
    model, (documents, weights) = built(slow=True), written()
    want = alone(model, documents, weights)
    _, ids, weight, number = laid(documents, weights)
    docs = leaky(where, monkeypatch)(number)
    losses, grads = difference(graded(model, [(ids, weight, None, docs)]), want)
    assert losses > 1e-3 and grads > 1e-2, where


def test_targets_never_cross_an_edge():
    number = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    docs = pack.Docs(number)
    ones = torch.ones(2, 5, dtype=torch.long)
    assert docs.end(ones).tolist() == [[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]
    assert docs.lengths == [3, 2, 1, 4]
    assert mtp.counts(docs.end(ones), 2, docs) == [7, 4, 2]


def test_no_document_is_cut_and_none_is_too_long():
    documents, _ = written()
    rows = pack.pack(documents, 48)
    assert sorted(i for row in rows for i in row) == list(range(len(documents)))
    assert max(sum(len(documents[i]) for i in row) for row in rows) <= 48
    with pytest.raises(ValueError, match="conversation 13 has 40 tokens, more than a row of 39"):
        pack.pack(documents, 39)


def test_packed_rows_have_no_cache_and_are_not_cut_up():
    model, number = built(), torch.zeros(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="have no cache"):
        model.hidden(number[:, :-1], model.new_cache(1), docs=pack.Docs(number))
    world = World.__new__(World)
    world.slice = type("Slice", (), dict(size=2, rank=0))
    with pytest.raises(ValueError, match="--cp 2 cuts"):
        world.rows(number, 2, docs=pack.Docs(number))
    with pytest.raises(ValueError, match="--documents with --cp 2"):
        check(Run(documents=True, cp=2, name="nothing there"))


# pre-training


def files(tmp_path):
    for i, n in enumerate((40, 7, 30, 9, 5, 33) * 6):
        (tmp_path / f"{i:02}.txt").write_text(f"{i} is a file. " * n)
    return data.corpus(str(tmp_path))


def test_pretraining_cuts_its_windows_where_a_file_ends(tmp_path):
    from training.pretrain import Text

    corpus = files(tmp_path)
    enc = data.tokenizer("bytes")
    ids, number = data.documents(corpus, enc)
    ends = [i for i, x in enumerate(ids.tolist()) if x == enc.encode_single_token("<|endoftext|>")]
    assert len(ends) == number.max() + 1 == 35
    assert [int(number[e]) for e in ends] == list(range(35))
    assert bytes(ids[ids < 256].astype("uint8")).decode() == corpus.train
    run = Run(data=str(tmp_path), tokenizer="bytes", documents=True, batch=6, micro=2, length=200)
    work, world = Text(), Alone()
    world.device = torch.device("cpu")
    work.begin(run, None, lambda line: None)
    batch = work.batch(3, world)
    edges = [docs.last for _, _, _, docs in batch.pieces]
    assert len(edges) == 3 and sum(int(e.sum()) for e in edges) > 0
    assert batch.counts[0] == 6 * 200 - sum(int(e.sum()) for e in edges)


def test_pretraining_refuses_what_has_no_file_ends(tmp_path):
    import numpy as np

    np.arange(2000, dtype="<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="do not say where a document ends"):
        data.documents(data.corpus(str(tmp_path / "a.bin")), data.tokenizer("bytes"))


def test_this_file_can_fail(monkeypatch):
    """The comparison itself sees a single target too many."""
    model, (documents, weights) = built(), written()
    want = alone(model, documents, weights)
    _, ids, weight, number = laid(documents, weights)
    docs = pack.Docs(number)
    docs.last[0, int(docs.last[0].nonzero()[0])] = False
    assert max(difference(graded(model, [(ids, weight, None, docs)]), want)) > 1e-4
