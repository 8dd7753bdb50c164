"""
Tasks whose answers can be checked: what a small model practises, in place of the release's 21
environments.

    sort   "sort 53814"            13458
    third  "third 53814"           the third smallest, 4; it may think first: 13458, little: 13
    make   "make 22 from 3 8 2"    3*8-2; any expression that uses each number once will do
    call   "set x to 37"           a call of the tool `set` with x = 37, in the template's grammar

A problem knows its question, a demonstration for every mode it can be asked in, and what a reply to
it is worth: 0 or 1, exactly, without a model that judges. Nothing that a model writes is executed:
`value` walks the syntax tree of + - * on integers. The modes differ by the prompt's text alone:

    on  full reasoning    off  none    low  little: the beginning    budget  three tokens of it

Every tenth question, by a hash of it, is held out: no training step ever asks it.

Not here  how a conversation is spelled: chat.py; replies: rollout.py
Sources   the kinds of the release's environments (ordering, arithmetic, search, tool calls) and its
          curriculum by pass rate, arXiv:2604.12374 section 3.2; sizes and texts are ours
"""

import ast
import math
import random
import zlib
from typing import Callable, NamedTuple

import chat

MODES = dict(
    on=dict(thinking=True),
    off=dict(thinking=False),
    low=dict(thinking=True, low_effort=True),
    budget=dict(thinking=True, budget=3),
)


class Problem(NamedTuple):
    task: str
    level: int  # 0 is the easiest
    question: str
    demos: dict  # mode -> the assistant's message
    check: Callable  # chat.Reply -> is it right

    @property
    def messages(self):
        return [dict(role="user", content=self.question)]

    @property
    def held(self):
        return zlib.crc32(self.question.encode()) % 10 == 0


def says(content, reasoning=""):
    return dict(role="assistant", content=content, reasoning_content=reasoning)


def digits(draw, n):
    return [draw.choice("0123456789") for _ in range(n)]


def sort(draw, level):
    d = digits(draw, 4 + level)
    answer = "".join(sorted(d))
    check = lambda reply: reply.content == answer
    return Problem("sort", level, "sort " + "".join(d), dict(off=says(answer)), check)


def third(draw, level):
    shown = digits(draw, 5 + level)
    d = sorted(shown)
    answer, whole = d[2], "".join(d)
    demos = dict(
        on=says(answer, whole),
        low=says(answer, whole[:2]),
        budget=says(answer, whole[:3]),
        off=says(answer),
    )
    check = lambda reply: reply.content == answer
    return Problem("third", level, "third " + "".join(shown), demos, check)


def value(text):
    """What an expression of integers and + - * is worth, and the numbers in it; None of any other
    text."""

    def walk(node):
        if isinstance(node, ast.Expression):
            return walk(node.body)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value, [node.value]
        if isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Sub, ast.Mult):
            (a, left), (b, right) = walk(node.left), walk(node.right)
            how = {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}
            return how[type(node.op)], left + right
        raise ValueError("another kind of expression")

    try:
        return walk(ast.parse(text, mode="eval")) if len(text) <= 40 else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def make(draw, level):
    a, b, c = (draw.randint(1, 3 + 2 * level) for _ in range(3))
    shown = f"{a}{draw.choice('+-*')}{b}{draw.choice('+-*')}{c}"
    target, numbers = value(shown)
    given = draw.sample(numbers, 3)

    def check(reply):
        got = value(reply.content)
        return got is not None and got[0] == target and sorted(got[1]) == sorted(numbers)

    question = f"make {target} from {given[0]} {given[1]} {given[2]}"
    return Problem("make", level, question, dict(off=says(shown)), check)


def call(draw, level):
    names = draw.sample("xyzuvw", 1 + level % 2)
    wanted = {name: str(draw.randrange(10 if level < 2 else 100)) for name in names}
    tool = draw.choice(("set", "add"))
    each = (f"{n} to {v}" if tool == "set" else f"{v} to {n}" for n, v in wanted.items())
    turn = dict(says(""), tool_calls=[dict(name=tool, arguments=wanted)])
    check = lambda reply: reply.calls == [(tool, wanted)] and not reply.content
    return Problem("call", level, f"{tool} {' and '.join(each)}", dict(off=turn), check)


TASKS, LEVELS = dict(sort=sort, third=third, make=make, call=call), 4


def mixture(text):
    """`sort,make:3` -> {"sort": 1.0, "make": 3.0}: which tasks, and how often each is asked."""
    out = {}
    for item in text.split(","):
        name, colon, weight = item.partition(":")
        if name not in TASKS:
            raise ValueError(f"--tasks {text}: there is no task {name!r}, only {', '.join(TASKS)}")
        try:
            out[name] = float(weight) if colon else 1.0
        except ValueError:
            raise ValueError(f"--tasks {text}: {weight!r} is no number") from None
        if not 0 < out[name] < math.inf:
            raise ValueError(f"--tasks {text}: {name} has the weight {weight}, not above 0")
    return out


def problems(weights, n, seed, held=False, level=None):
    """n problems and a mode for each, a pure function of the seed. weights: a `mixture`; level: a
    function of (draw, task), or all are as frequent; held: only questions that training never asks.
    """
    if type(n) is not int or n < 0 or not weights or not weights.keys() <= TASKS.keys():
        raise ValueError(f"{n} problems of {list(weights)}: the tasks are {', '.join(TASKS)}")
    draw, out = random.Random(seed), []
    while len(out) < n:
        name = draw.choices(list(weights), list(weights.values()))[0]
        p = TASKS[name](draw, level(draw, name) if level else draw.randrange(LEVELS))
        if p.held == held:
            out.append((p, draw.choice(list(p.demos))))
    return out


class Curriculum:
    """Levels by pass rate: a level is asked the more often the nearer its running pass rate is to a
    target that falls from easy to hard, exp(-((rate - target) / 0.3)^2 / 2)."""

    def __init__(self, first=0.8, last=0.5, rates=None):
        self.first, self.last, self.rates = first, last, dict(rates or {})

    def level(self, progress):
        """For `problems`; progress from 0 to 1."""
        target = self.first + (self.last - self.first) * progress

        def choose(draw, name):
            rates = [self.rates.get(f"{name} {i}", target) for i in range(LEVELS)]
            return draw.choices(
                range(LEVELS), [math.exp(-(((r - target) / 0.3) ** 2) / 2) for r in rates]
            )[0]

        return choose

    def note(self, task, level, rate):
        """A group's share of right replies, into the running mean of the last ten or so."""
        key = f"{task} {level}"
        self.rates[key] = 0.9 * self.rates.get(key, rate) + 0.1 * rate


def prompt(enc, problem, mode):
    return chat.encode(enc, chat.parts(problem.messages, generate=True, **MODES[mode]))[0]


def demonstration(enc, problem, mode):
    """-> ids, and which of them are learned."""
    return chat.encode(enc, chat.parts([*problem.messages, problem.demos[mode]], **MODES[mode]))


def main():
    """Prints a problem of every kind and mode, and what its demonstration is worth."""
    for name in TASKS:
        ((p, _),) = problems({name: 1}, 1, seed=1)
        for mode in p.demos:
            said = chat.parts([*p.messages, p.demos[mode]], **MODES[mode])
            text = "".join(part.text for part in said if part.learned).removesuffix(chat.END)
            right = p.check(chat.reply(text, MODES[mode]["thinking"]))
            print(f"{p.task:6}{mode:7}{p.question:22} {text!r:44} worth {int(right)}")


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
