"""
Watching: what a model did at every token of a text, as plain numbers.

The text, once it is there, is read again in one readable pass into an empty cache, as a prompt is
(so keys and values are rounded where the checkpoint says so), and what passes through the layers is
noted on the way:

    probability   of each token, softmax of the logits at the one before; its rank among all
    experts       the k that each MoE layer ran it through, and each one's share of the gates
    habit         how often an expert was chosen before by tokens of the same kind: of those earlier
                  in the text, the share that chose it too
    half-life     of each Mamba head, ln 2 / (dt_t |A|) tokens: if all were like this one, so many
                  later half of its memory would be left
    weights       of each attention head, softmax_j(q_i . k_j / sqrt(e)) over the tokens j <= i
    fate          of a token that was drafted or stands where a draft fell; with the experts that
                  the MTP block ran the draft through, and the probability that it gave it

The half-lives of a stretch give what is left of a memory at its end: 2^-(sum of 1 / half-life).

Letters   t tokens of the text  v vocabulary  h heads  k experts a token
Not here  the text itself: sample.py; the MTP block's attention; how it is drawn: microscope.py
Sources   the numbers are taken where they are used: Mamba2.scan, Attention.attend and the input of
          Experts; the formulas: mamba.py, attention.py, latent_moe.py
"""

import contextlib
import math
from typing import NamedTuple

import torch

ALTERNATIVES = 5  # the likeliest tokens at each place that are noted


class Draft(NamedTuple):
    """How the MTP block came to a draft."""

    sure: float = math.nan  # the probability that it gave it, before any temperature
    experts: tuple = ()  # of each of its E layers: experts (k,), shares (k,)


class Fate(NamedTuple):
    """Of a drafted token that stood: place, from 1. Of one the model chose itself: place 0, and the
    drafts that fell there, of which only the first was judged, and its probability.
    """

    place: int
    of: int  # drafts of its round
    fell: tuple = ()
    probability: float = 0.0
    draft: Draft = Draft()  # the one that was judged here, if any


class Record(NamedTuple):
    """A text of t tokens; layers are named by their place in the stack."""

    ids: list
    start: int  # how many of them are the prompt
    probability: torch.Tensor  # (t,)   NaN at the first token
    rank: torch.Tensor  # (t,)   1 is the likeliest; 0 at the first token
    best: torch.Tensor  # (t, 5)   ids, likeliest first
    best_probability: torch.Tensor  # (t, 5)
    picks: dict  # {layer: (t, k)}   experts, the largest share first
    shares: dict  # {layer: (t, k)}   of the gates, sum 1
    half_lives: dict  # {layer: (t, h)}   tokens
    weights: dict  # {layer: (h, t, t)}   rows sum to 1
    fates: dict  # {place in the text: Fate}


# 1. Noting


def attention_weights(q, k):
    """q (1, h, t, e)   k (1, kv heads, t, e) -> (h, t, t), the softmax that `attend` has inside."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = (q[0].to(wide) @ k[0].to(wide).mT) * q.shape[-1] ** -0.5
    later = torch.ones_like(score[0], dtype=torch.bool).triu(1)
    return score.masked_fill(later, -math.inf).softmax(-1)


def half_life(dt, A):
    """Tokens in which exp(dt A) halves a memory, if every one has this dt.   dt (t, h)   A (h,)"""
    return math.log(2) / (dt * -A)


def largest_first(pick, gate):
    """(t, k) twice -> the experts and their shares of the gates."""
    share, order = (gate / gate.sum(1, keepdim=True)).sort(1, descending=True)
    return pick.gather(1, order), share


@contextlib.contextmanager
def noted(model):
    """While it lasts, a pass of the model fills the notes: {layer: what was used} of each sort."""
    notes, undo = dict(experts={}, half_lives={}, weights={}), contextlib.ExitStack()

    def watch(i, mixer, name, note):
        """Puts a function before the one that a mixer calls by this name."""
        inner = getattr(mixer, name)

        def outer(*args, **how):
            note(i, *args)
            return inner(*args, **how)

        setattr(mixer, name, outer)
        undo.callback(setattr, mixer, name, inner)

    def scanned(i, x, dt, A, *rest):
        notes["half_lives"][i] = half_life(dt[0], A)

    def attended(i, q, k, v, first):
        notes["weights"][i] = attention_weights(q, k)

    def ran(i, pick, gate):
        notes["experts"][i] = largest_first(pick, gate)

    with undo:
        letters = zip(model.config.hybrid_override_pattern, model.backbone.layers)
        for i, (letter, block) in enumerate(letters):
            if letter == "M":
                watch(i, block.mixer, "scan", scanned)
            elif letter == "*":
                watch(i, block.mixer, "attend", attended)
            elif letter == "E":
                hook = lambda module, args, i=i: ran(i, *args[1:])
                undo.callback(block.mixer.experts.register_forward_pre_hook(hook).remove)
        yield notes


@contextlib.contextmanager
def drafting(model):
    """While it lasts, every pass of the MTP block appends what it made at its last token: the state
    (d,), and [experts, shares] of each of its E layers.
    """
    passes, undo, seen = [], contextlib.ExitStack(), []
    layers = model.mtp.layers if model.mtp else ()

    def ran(module, args):
        seen.append([x[0] for x in largest_first(*(x[-1:] for x in args[1:]))])

    def done(module, args, out):
        passes.append((out[0, -1], tuple(seen)))
        seen.clear()

    with undo:
        for block in layers:
            if hasattr(block.mixer, "experts"):
                undo.callback(block.mixer.experts.register_forward_pre_hook(ran).remove)
        if layers:
            undo.callback(model.mtp.register_forward_hook(done).remove)
        yield passes


@torch.no_grad()
def drafts(model, passes, rounds):
    """The Drafts of every round -> a list for each. In a round of d every stored copy of the block
    reads what stood, and the first of them makes draft 1; then d - 1 passes make the others. Before
    the first round it reads the prompt.
    """
    made, at = [], len(passes)
    for (row,), _ in reversed(rounds):
        at -= len(row) - 1
        rest = passes[at : at + len(row) - 1]
        at -= model.config.num_nextn_predict_layers
        states, experts = zip(passes[at], *rest)
        p = model.logits(torch.stack(states)).softmax(-1)
        sure = p[range(len(row)), row].tolist()
        host = [tuple(tuple(x.cpu() for x in pair) for pair in each) for each in experts]
        made.append([Draft(*both) for both in zip(sure, host)])
    return made[::-1]


def ranks(logits, ids):
    """How many of the vocabulary are likelier, and one.   logits (t, v)   ids (t,) -> (t,)"""
    return (logits > logits.gather(1, ids[:, None])).sum(1) + 1


@torch.no_grad()
def watch(model, ids, start, rounds=(), passes=()):
    """Reads a text of at least two tokens, of which the first `start` are the prompt -> Record.
    rounds: `speculate.Tally.drafted`, of this text alone; passes: of `drafting`, while it was made.
    """
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} token(s): nothing follows, so nothing can be seen")
    device = model.lm_head.weight.device
    row = torch.tensor(ids, device=device)
    with noted(model) as notes:
        logits = model(row[None], model.new_cache(1))[0, :-1]  # (t-1, v)   each of the next token
    p = logits.softmax(-1)
    most, best = p.topk(min(ALTERNATIVES, p.shape[1]))
    first = lambda x, value: torch.cat([x.new_full((1, *x.shape[1:]), value), x]).cpu()
    host = lambda found: {i: x.cpu() for i, x in found.items()}
    return Record(
        list(ids),
        start,
        first(p.gather(1, row[1:, None])[:, 0], math.nan),
        first(ranks(logits, row[1:]), 0),
        first(best, 0),
        first(most, 0.0),
        host({i: pick for i, (pick, _) in notes["experts"].items()}),
        host({i: share for i, (_, share) in notes["experts"].items()}),
        host(notes["half_lives"]),
        host(notes["weights"]),
        fates(start, len(ids), rounds, p, drafts(model, passes, rounds) if passes else ()),
    )


def fates(start, t, rounds, p, made=()):
    """What became of the drafts -> {place in the text: Fate}. rounds: (drafts (1, d), how many
    stood (1,)) each, the first after one token that nobody drafted; the last may have gone beyond
    the text's end. p (t-1, v): the model's probabilities; made: the Drafts of each round.
    """
    found, at = {}, start + 1
    for i, ((row,), (stood,)) in enumerate(rounds):
        d, fell = len(row), tuple(row[stood:])
        how = made[i] if made else [Draft()] * d
        found |= {at + k: Fate(k + 1, d, draft=how[k]) for k in range(stood)}
        at += stood
        if at < t:
            chance = float(p[at - 1, fell[0]]) if fell else 0.0
            found[at] = Fate(0, d, fell, chance, how[stood] if fell else Draft())
        at += 1
    return {i: fate for i, fate in found.items() if i < t}


# 2. Kinds of tokens, and their habits

KINDS = ("special", "line end", "blank", "word", "number", "sign", "part of a character")


def kind(raw, special=False):
    """The bytes of a token -> a place in KINDS. What it begins with decides, blanks aside."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = None
    if special or text is None:
        return 0 if special else 6
    word = text.strip()
    if not word:
        return 1 if "\n" in text else 2
    if word[0].isalpha() or word[0] == "_":
        return 3
    return 4 if word[0].isdigit() else 5


def habit(picks, kinds):
    """Of the earlier tokens of the same kind, the share that chose each expert too; NaN where there
    was none.   picks (t, k)   kinds (t,) -> (t, k)
    """
    chosen, seen = {}, {}
    out = torch.full(picks.shape, math.nan)
    for i, (row, c) in enumerate(zip(picks.tolist(), kinds)):
        before = chosen.setdefault(c, {})
        for j, e in enumerate(row):
            if seen.get(c):
                out[i, j] = before.get(e, 0) / seen[c]
        for e in row:
            before[e] = before.get(e, 0) + 1
        seen[c] = seen.get(c, 0) + 1
    return out
