"""Files that are whole and hold what does not belong there: checkpoints of other programs and
versions, with their checksums; quantisation configs, logs and conversations of other shapes.
"""

import copy
import json

import torch
from inputs import ODD, Input

import checkpoint
import disk


def flat(x, path=()):
    """The paths to every value in nested dicts."""
    for key, value in x.items() if isinstance(x, dict) else ():
        yield (*path, key)
        yield from flat(value, (*path, key))


def put(x, path, value):
    """A copy of nested dicts with another value at a path; without a value (...), without it."""
    new = copy.deepcopy(x)
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return new


def misfits(saved):
    """(what, checkpoint, whether no program can use it) of one that is good."""
    for name in checkpoint.KINDS:
        if name in saved:
            yield f"without {name}", put(saved, (name,), ...), False
            yield f"{name} is a list", put(saved, (name,), [1]), True
    yield "a list", [1], True
    yield "a tensor", torch.zeros(3), True
    yield "step -4", put(saved, ("step",), -4), True
    weight = "lm_head.weight"
    for what, path, x in (
        ("another version's field", ("config", "turbo"), 1),
        ("no groups", ("config", "n_groups"), 0),
        ("another width", ("config", "hidden_size"), 32),
        ("no table", ("tokenizer", "ranks"), ...),
        ("a broken pattern", ("tokenizer", "pattern"), "(("),
        ("a tensor more", ("model", "x"), torch.zeros(1)),
        ("a tensor less", ("model", weight), ...),
        ("a smaller head", ("model", weight), saved["model"][weight][:3]),
    ):
        yield what, put(saved, path, x), True
    short = torch.zeros(3, dtype=torch.uint8)
    for what, path, x in (
        ("a short state of the generator", ("rng",), short),
        ("the state of the generator as floats", ("rng",), torch.zeros(5056)),
        ("no groups of moments", ("optimizer", "param_groups"), []),
        ("a run without its batch", ("run", "batch"), ...),
        ("a run without its text", ("run", "data"), ...),
        ("a run without its decay", ("run", "decay"), ...),
    ):
        yield what, put(saved, path, x), False


def checkpoints(folder, programs):
    """Every program on a run whose newest checkpoint does not fit. programs: (main, argv)."""
    path = checkpoint.steps(folder)[-1]
    raw, saved = path.read_bytes(), dict(checkpoint.read(path))

    def use(state, main, argv):
        def whole(f):
            torch.save(state, f)
            f.write(checkpoint.digest(f, f.tell()))

        disk.write(path, whole)
        try:
            main(argv)
        finally:
            path.write_bytes(raw)

    for what, state, useless in misfits(saved):
        for main, argv in programs:
            name = f"{main.__module__} {what}"
            codes = (2,) if useless else (0, 2)
            yield Input(name, lambda s=state, m=main, a=argv: use(s, m, a), codes)


def quantisations(good):
    """A quantization_config with every value odd, or lacking."""
    for path in flat(good):
        for x in (..., *ODD, [None], {"a": 1}):
            yield ".".join(path), put(good, path, x)


ASKED = [dict(role="user", content="a"), dict(role="assistant", content="b")]


def conversations():
    """Lines of a .jsonl, every part of which is odd in turn."""
    tool = dict(
        name="f",
        description="d",
        parameters=dict(
            properties=dict(a=dict(type="t", description="d", enum=["x"])), required=["a"]
        ),
    )
    call = dict(name="f", arguments=dict(a="x"))
    talk = dict(messages=[dict(role="system", content="s"), *ASKED], tools=[tool])
    talk["messages"][2]["tool_calls"] = [call]
    for x in ODD:
        for key in ("messages", "tools"):
            yield talk | {key: x}
        for i, message in enumerate(talk["messages"]):
            for key in (*message, "reasoning_content"):
                turns = list(talk["messages"])
                turns[i] = message | {key: x}
                yield talk | dict(messages=turns)
            turns[i] = x
            yield talk | dict(messages=turns)
        for path in flat(tool):
            yield talk | dict(tools=[put(tool, path, x)])
        yield talk | dict(tools=[x])
        yield talk | dict(tools=[dict(function=x)])
        for key in call:
            said = dict(ASKED[1], tool_calls=[call | {key: x}])
            yield talk | dict(messages=[ASKED[0], said])
        yield talk | dict(messages=[ASKED[0], dict(ASKED[1], tool_calls=[x])])


def facts():
    """load.json and config.json of a run as other shapes."""
    rows = ([[1, 2]], [[-1, -2]], [[0, 0]], [[]], [], [1, 2], [["x"]], [[None]], {"a": 1}, "x", 7)
    for tokens in (*rows, [[float("nan"), 1]], [[1, 2], [3]], None):
        for layers in (["a"], ["a", "b"], [], 3, None, [3]):
            yield "load.json", json.dumps(dict(tokens=tokens, layers=layers))
    for text in ("", "{", "[]", "null", "7", "[" * 9999):
        yield "load.json", text
        yield "config.json", text
    for x in ODD:
        yield "config.json", json.dumps(dict(corpus=x))
        yield "config.json", json.dumps(dict(corpus=dict(floor=x)))
        yield "config.json", json.dumps(dict(config=x))
        yield "config.json", json.dumps(dict(config=dict(hybrid_override_pattern=x)))
