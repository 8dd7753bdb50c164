"""Bad inputs by the thousand, made from the declarations and from good files: what the tests of
flags, of fields and of files share. `tried` says how a program took one: clean, traceback, hang,
silent, wrong exit.
"""

import contextlib
import importlib
import io
import json
import signal
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from tiny import SMALL, spelled

import bounds

# program: its module, its dataclass of flags, its entry
PROGRAMS = {
    "train": ("train", "Run", "cli"),
    "sft": ("sft", "Run", "main"),
    "grpo": ("grpo", "Run", "main"),
    **{
        name: (name, "Flags", "main")
        for name in (
            *("sample", "look", "heal", "hf", "model", "bench", "plot", "ptq", "data", "worth"),
            *("report", "scale.budget", "scale.release"),
        )
    },
}
LIMIT = 60  # seconds, after which an input hangs


def program(name):
    """The dataclass of a program's flags, and main(argv)."""
    module, kind, entry = PROGRAMS[name]
    module = importlib.import_module(module)
    return getattr(module, kind), getattr(module, entry)


class Input(NamedTuple):
    what: str
    call: object
    codes: tuple = (2,)  # those that are right


class Late(KeyError):
    """Not one of those that programs foresee."""


def tried(given):
    """One input -> how it was taken, and what was said."""

    def late(*_):
        raise Late

    out, err, code = io.StringIO(), io.StringIO(), 0
    before = signal.signal(signal.SIGALRM, late) if hasattr(signal, "SIGALRM") else None
    if before is not None:
        signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            given.call()
    except SystemExit as e:
        code = e.code
    except Late:
        return "hang", ""
    except Exception as e:
        return "traceback", f"{type(e).__name__}: {e}"
    finally:
        if before is not None:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    said = err.getvalue().strip().rsplit("\n", 1)[-1]
    if code == 0 and 0 not in given.codes:
        return "silent", out.getvalue()[-200:]
    if code not in given.codes or "Traceback" in err.getvalue() or code and not said:
        return "wrong exit", f"{code}: {said}"
    return "clean", said


# 1. From the declarations


def wrong(f):
    """Texts that a field may not hold: one below, one above, NaN, a word, nothing."""
    allowed, one = f.metadata["bounds"], bounds.kind(f)
    if one is bool:
        return ["maybe", "nan"]
    if allowed.choices or allowed.spells:
        return [x for x in ("nonsense word", "nan", "-1", "\0") if bounds.fault(f, x)]
    if one is str:
        below = [""] * (allowed.least > 0)
        return below + ["a\0b"] + ["x" * (allowed.most + 1)] * (allowed.most <= 1 << 16)
    low = allowed.least if allowed.above is None else allowed.above
    step = 1 if one is int or not low else abs(low) / 2
    below = low - step if allowed.above is None else low
    above = allowed.most + 1 if one is int else allowed.most * 2
    return [repr(x) for x in (below, above)] + "nan inf -inf word 1e400 0x10 1,5".split() + [""]


def flags(name, extra=()):
    """Every flag of a program with every text that it may not hold."""
    kind, main = program(name)
    for f in fields(kind):
        for text in wrong(f):
            given = text if f.metadata["place"] else f"{bounds.flag(f)}={text}"
            yield Input(f"{name} {given[:60]!r}", lambda given=given: main([*extra, given]))
    for given in ("--nothing", "--nothing=1", "-x", f"--{'x' * 300}"):
        yield Input(f"{name} {given[:60]!r}", lambda given=given: main([*extra, given]))


# 2. From good files

ODD = (
    None,
    True,
    "false",
    "7",
    "",
    0,
    -1,
    1.5,
    1e30,
    float("nan"),
    float("inf"),
    [],
    [0],
    {},
    10**20,
)
TINY = dict(SMALL, hybrid_override_pattern="ME*-", vocab_size=300)
CHANGES = spelled(**TINY)


def released(folder):
    """A tiny released checkpoint with its tokenizer."""
    import hf
    import tokenizer
    from model import Config, Nemotron

    hf.save(Nemotron(replace(Config.preset("toy"), **TINY)), folder)
    packed = tokenizer.pack(tokenizer.tokenizer("bytes"))
    (folder / "tokenizer.json").write_text(json.dumps(packed))
    return folder


def configs(folder):
    """hf.py and sample.py on a config.json with each field lacking, or holding an odd value."""
    import hf
    import sample

    path = folder / "config.json"
    good = json.loads(path.read_text())

    def inspect(content, main, argv):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        try:
            main(argv)
        finally:
            path.write_text(json.dumps(good))

    short = [str(folder)]
    say = ["--hf", str(folder), "--max-new-tokens", "1", "--temperature", "0", "--device", "cpu"]
    for key in good:
        for x in ODD:
            given = good | {key: x}
            where = (hf.main, short) if key != "eos_token_id" else (sample.main, say)
            yield Input(f"config.json {key}={x!r}", lambda g=given, w=where: inspect(g, *w), (0, 2))
        less = {k: v for k, v in good.items() if k != key}
        yield Input(f"config.json without {key}", lambda g=less: inspect(g, hf.main, short), (0, 2))
    for text in ("", "{", "[]", "null", "7", '"x"', "\ufeff{}", "[" * 9999, '{"a":' * 9999, "\0"):
        yield Input(f"config.json {text[:9]!r}", lambda g=text: inspect(g, hf.main, short))
        yield Input(f"config.json {text[:9]!r}", lambda g=text: inspect(g, sample.main, say))


def damaged(path, main, argv, places=40):
    """A binary file cut short at places, and with a byte changed there."""
    raw = path.read_bytes()

    def use(content):
        path.write_bytes(content)
        try:
            main(argv)
        finally:
            path.write_bytes(raw)

    for i in range(places):
        at = len(raw) * i // places
        yield Input(f"{path.name} cut at {at}", lambda at=at: use(raw[:at]))
    for at in range(0, 400, 400 // places):
        flipped = bytearray(raw)
        flipped[at] ^= 0x55
        yield Input(f"{path.name} byte {at}", lambda b=bytes(flipped): use(b), (0, 1, 2))


def indices(folder):
    """Indices whose files are elsewhere, nowhere, or no names."""
    import hf

    path = folder / "model.safetensors.index.json"

    def inspect(content):
        path.write_text(json.dumps(content))
        try:
            hf.main([str(folder)])
        finally:
            path.unlink()

    names = (
        "../x.safetensors",
        "/etc/passwd",
        "a/../../x",
        "",
        ".",
        "..",
        "nope.safetensors",
        7,
        None,
    )
    for x in (*names, [], {}, "C:\\x", "a\\..\\x", "x\0y.safetensors", "tokenizer.json"):
        yield Input(f"index to {x!r}", lambda x=x: inspect(dict(weight_map={"a": x})))
    for x in (
        None,
        7,
        [],
        {},
        "x",
        dict(weight_map=None),
        dict(weight_map=[]),
        dict(weight_map={}),
    ):
        yield Input(f"index {x!r}", lambda x=x: inspect(x))


def tokenizers(folder):
    """sample.py on every malformed tokenizer file."""
    import sample

    path = folder / "tokenizer.json"
    good = json.loads(path.read_text())

    def use(content):
        path.write_text(json.dumps(content))
        try:
            sample.main(["--hf", str(folder), "--max-new-tokens", "0", "--device", "cpu"])
        finally:
            path.write_text(json.dumps(good))

    hugging = dict(
        model=dict(type="BPE", vocab={"a": 0}, merges=[]), pre_tokenizer=dict(type="ByteLevel")
    )
    tekken = dict(
        config=dict(pattern="x", default_num_special_tokens=1, default_vocab_size=9), vocab=[]
    )
    for base in (good, hugging, tekken):
        for key in base:
            for x in ODD:
                yield Input(f"tokenizer {key}={x!r}", lambda d=base | {key: x}: use(d), (0, 2))
    for key, inner in (("model", "vocab"), ("model", "merges"), ("model", "type")):
        for x in ODD:
            d = hugging | {key: hugging[key] | {inner: x}}
            yield Input(f"tokenizer {key}.{inner}={x!r}", lambda d=d: use(d))


def overrides(folder):
    """--model with every field of Config, and every text that it may not hold."""
    import train
    from config import Config

    base = f"--out {folder} --data copy --tokenizer bytes --steps 1 --threads 1 --prompt= --model"
    base = base.split()
    for f in fields(Config):
        for text in wrong(f):
            if bounds.fault(f, text) and "," not in text and "\0" not in text and text != "nan":
                yield Input(
                    f"--model {f.name}={text[:40]}",
                    lambda g=f"{CHANGES},{f.name}={text}": train.cli([*base, g]),
                )


# 3. The library: numbers in, numbers out


def awkward(g):
    """A tensor (m, k) of some shape, dtype and kind of numbers; whether all of it is finite."""
    pick = lambda *xs: xs[int(torch.randint(len(xs), (), generator=g))]
    m, k = pick(1, 2, 16, 32), pick(16, 32, 64)
    kind = pick("normal", "zeros", "tiny", "huge", "one", "inf", "nan", "denormal")
    x = torch.randn(m, k, generator=g)
    x = x * dict(tiny=1e-30, huge=1e30, denormal=1e-42, zeros=0.0).get(kind, 1.0)
    if kind in ("inf", "nan"):
        x[m // 2, k // 3] = float(kind)
    x = torch.ones_like(x) if kind == "one" else x
    x = x.to(pick(torch.float32, torch.bfloat16, torch.float64, torch.float16))
    return x, bool(x.isfinite().all())
