"""
Rollouts: many replies at once, with the log-probability of every token, and what they are worth.

    prompts (any lengths) -> read once each -> the memory copied for every reply of its group ->
    one token a row and step, drawn at temperature 1 -> rows that have ended leave the batch

Two calls of Cache.take do it: repeat rows behind the prompt, drop rows that are done. So a prompt
is read once however many replies it gets, and the batch shrinks to the replies still being written.

Letters   b replies  t time  v vocabulary
Not here  the update: grpo.py; another temperature or top-p: the policy that is trained is the one
          that is sampled
"""

from typing import NamedTuple

import torch

import chat
from decode import read, sound
from post import tasks
from speculate import rounds
from tokenizer import raw


class Rollout(NamedTuple):
    prompt: list
    reply: list  # ids, <|im_end|> among them unless there was no room
    logp: list  # of each, under the policy that drew it
    ended: bool


@torch.no_grad()
def roll(model, prompts, group, room, end, generator=None, greedy=False, swap=None):
    """`group` replies to each prompt, of at most `room` tokens -> Rollouts, those of one prompt
    side by side. swap: called with the number of each step; it may change the model's weights in
    the middle of all replies, whose memory stays as it is.
    """
    if group < 1 or room < 1:
        raise ValueError(f"{group} replies of {room} tokens: at least one of one")
    device, cache = model.lm_head.weight.device, model.new_cache(len(prompts))
    logits = read(model, cache, prompts)  # (prompts, v)
    each = torch.arange(len(prompts), device=device).repeat_interleave(group)
    cache.take(each)
    logits = logits[each]
    row = torch.arange(len(each), device=device)  # whose tokens these are
    ids, logps = torch.full((len(each), room), -1), torch.zeros(len(each), room)
    for t in range(room):
        logp = sound(logits).log_softmax(-1)
        new = logp.argmax(-1)
        if not greedy:
            new = torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
        ids[row.cpu(), t] = new.cpu()
        logps[row.cpu(), t] = logp.gather(1, new[:, None])[:, 0].float().cpu()
        going = (new != end).nonzero()[:, 0]
        if len(going) == 0 or t == room - 1:
            break
        if len(going) < len(row):
            cache.take(going)
            row, new = row[going], new[going]
        if swap:
            swap(t)
        logits = model(new[:, None], cache)[:, -1]
    length = (ids >= 0).sum(1).tolist()
    made = zip(ids.tolist(), logps.tolist(), length)
    return [
        Rollout(prompts[i // group], r[:n], p[:n], r[n - 1] == end)
        for i, (r, p, n) in enumerate(made)
    ]


def spelled(enc, r):
    """A reply's text without its end. A model may have ids that its tokenizer has not: U+FFFD."""
    ids = r.reply[:-1] if r.ended else r.reply
    return b"".join(raw(enc, i) for i in ids).decode("utf-8", "replace")


def judge(enc, rollouts, asked):
    """What each reply is worth, 0 or 1, and its chat.Reply. asked: (problem, mode) of each."""
    replies, worth = [], []
    for r, (problem, mode) in zip(rollouts, asked):
        replies.append(chat.reply(spelled(enc, r), tasks.MODES[mode]["thinking"]))
        right = r.ended and replies[-1].formed and problem.check(replies[-1])
        worth.append(float(right))
    return worth, replies


def cells(weights):
    """(task, mode) of everything that can be asked."""
    return [(t, m) for t in weights for m in tasks.problems({t: 1}, 1, 0)[0][0].demos]


def mean(x):
    x = list(x)
    return sum(x) / len(x) if x else 0.0


def evaluate(model, enc, weights, n=100, seed=0, room=40):
    """n held-out problems of each task in each of its modes -> rows of task, mode, right, tokens (a
    reply), formed: means over them."""
    rows, end, training = [], enc.encode_single_token(chat.END), model.training
    model.eval()
    for task, mode in cells(weights):
        asked = [(p, mode) for p, _ in tasks.problems({task: 1}, n, seed, held=True)]
        prompts = [tasks.prompt(enc, *a) for a in asked]
        generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
        made = roll(model, prompts, 1, room, end, generator)
        worth, replies = judge(enc, made, asked)
        formed = mean(float(r.ended and y.formed) for r, y in zip(made, replies))
        tokens = mean(len(r.reply) for r in made)
        rows.append(dict(task=task, mode=mode, right=mean(worth), tokens=tokens, formed=formed))
    model.train(training)
    return rows


def drafted(model, enc, weights, drafts=5, n=60, seed=0, room=40):
    """Tokens of a reply that a round of drafting and verifying yields, by task and mode, on
    held-out problems: 1 to drafts + 1. Drafts beyond <|im_end|>, which nobody reads, do not count,
    so short replies have little to win. Empty without an MTP block.
    """
    out, end = {}, enc.encode_single_token(chat.END)
    if model.mtp is None:
        return out
    training = model.training
    model.eval()
    for task, mode in cells(weights):
        asked = tasks.problems({task: 1}, n, seed, held=True)
        prompts = [tasks.prompt(enc, p, mode) for p, _ in asked]
        own = [seed + i for i in range(n)]
        _, *made = rounds(model, prompts, room, drafts, 1.0, seed=own, stop=[end])  # not the first
        out[task, mode] = mean(len(row) for some in made for row in some if row)
    model.train(training)
    return out


def budgeted(model, enc, asked, budget, seed=0, room=40):
    """Replies whose reasoning is closed after `budget` tokens, whether it is done or not -> share
    that is right. asked: (problem, mode), with reasoning."""
    end, enough = enc.encode_single_token(chat.END), enc.encode_single_token(chat.ENOUGH)
    prompts, right = [tasks.prompt(enc, *a) for a in asked], []
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    thought = [[]] * len(asked)
    if budget:
        made = roll(model, prompts, 1, budget, end, generator)
        thought = [r.reply[: (r.reply + [enough]).index(enough)] for r in made]
    told = [p + t + chat.enough(enc, t) for p, t in zip(prompts, thought)]
    for r, (problem, _) in zip(roll(model, told, 1, room, end, generator), asked):
        said = chat.reply(spelled(enc, r), thinking=False)
        right.append(float(r.ended and said.formed and problem.check(said)))
    return mean(right)


def report(model, enc, weights, questions, room, say):
    """`evaluate` and `drafted` in one table, on other draws -> its rows, and says it."""
    rows = evaluate(model, enc, weights, questions, seed=1, room=room)
    accepted = drafted(model, enc, weights, n=min(60, questions), room=room)
    say("answers    task   mode     right  tokens  malformed  accepted a round")
    for r in rows:
        r["accepted"] = accepted.get((r["task"], r["mode"]), "")
        say(
            f"           {r['task']:6} {r['mode']:7} {r['right']:6.2f} {r['tokens']:7.1f} "
            f"{1 - r['formed']:10.2f}  " + (f"{r['accepted']:.2f}" if r["accepted"] else "")
        )
    return rows


def columns(rows):
    """Rows of `evaluate` as columns of a log: sort-off-right and so on."""
    kinds = "right", "tokens", "formed"
    return {f"{r['task']}-{r['mode']}-{k}": r[k] for r in rows for k in kinds}


def table(rows):
    return "  ".join(f"{r['task']} {r['mode']} {r['right']:.2f} ({r['tokens']:.1f})" for r in rows)
