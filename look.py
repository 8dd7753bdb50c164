"""
A microscope for a text: one page that shows, token by token, what the model did.

    python look.py --run runs/toy --prompt "def "            writes look.html; open it in a browser
    python look.py --run runs/toy --speculate 4              and which drafts stood
    python look.py --hf DIR --prompt "2+2?" --chat           a released checkpoint, asked a question
    python look.py --run runs/toy --prompt-file my.py --max-new-tokens 0     a text of your own

Point at a token: how likely it was, what else might have come, which experts every layer chose, how
far each Mamba head remembers, where attention looked. Everything is in the file; it can be sent.

Not here  what is noted, and its formulas: classroom/watch.py; the page: classroom/microscope.py
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import command

import chat
import sample
from bounds import knob
from classroom import microscope, watch
from post import tasks
from speculate import Tally
from tokenizer import raw


def same(name):
    """A flag of sample.py: its help, its default, its bounds."""
    f = next(f for f in fields(sample.Flags) if f.name == name)
    return field(default=f.default, metadata=f.metadata)


@dataclass(frozen=True)
class Flags:
    run: str = same("run")
    hf: str = same("hf")
    prompt: str = knob("def ", "what to go on from", least=0, most=1 << 16)
    prompt_file: str = same("prompt_file")
    chat: bool = knob(False, "ask the prompt as a question")
    think: str = knob("on", "with --chat, reasoning", choices=("on", "off", "low"))
    out: str = knob("look.html", "the page to write")
    max_new_tokens: int = knob(
        150, "tokens to produce; 0 looks at the prompt", least=0, most=microscope.MOST
    )
    temperature: float = same("temperature")
    top_p: float = same("top_p")
    top_k: int = same("top_k")
    seed: int | None = same("seed")
    stop: tuple = same("stop")
    speculate: str = same("speculate")
    device: str = same("device")
    precision: str = same("precision")
    lazy: bool = same("lazy")
    activations: bool = same("activations")

    def of_sample(self):
        """The same wishes as sample.py takes them."""
        own = {f.name for f in fields(sample.Flags)} - {"prompt", "chat", "think"}
        return sample.Flags(**{name: x for name, x in vars(self).items() if name in own})


def place(out):
    """Where the page goes, if it can go there: asked before any work is done."""
    path = Path(out)
    if path.suffix != ".html":
        raise ValueError(f"--out {out}: a page's name ends with .html")
    if not path.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"--out {out}: a folder has this name")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {out}: nothing may be written into {path.parent}")
    return path


def begin(a, enc, end):
    """The ids of the prompt."""
    text = command.text(a.prompt_file) if a.prompt_file else a.prompt
    if not a.chat:
        ids = enc.encode_ordinary(text) or end[:1]
    else:
        asked = [dict(role="user", content=text)]
        ids, _ = chat.encode(enc, chat.parts(asked, generate=True, **tasks.MODES[a.think]))
    microscope.fits(len(ids) + a.max_new_tokens)
    if len(ids) + a.max_new_tokens < 2:
        raise ValueError("a text of one token has nothing to look at: give a longer prompt")
    return ids


def seen(a):
    """Writes the text, reads it again under watch -> model, tokenizer, Record."""
    asked = a.of_sample()
    model, enc, end = sample.found(asked)
    ids = begin(a, enc, end)
    tally = None
    if a.speculate != "0":
        tally = Tally(7 if a.speculate == "auto" else int(a.speculate))
    start = len(ids)
    with watch.drafting(model) as passes:
        for (some,) in sample.pieces(asked, model, [ids], end, tally):
            ids = ids + some
    drafted = (tally.drafted, passes) if tally else ()
    return model, enc, watch.watch(model, ids, start, *drafted)


def about(a, record):
    """The sentence under the title."""
    whose, new = a.hf or a.run, len(record.ids) - record.start
    given = f"{record.start:,} tokens given, {new:,} written by `{whose}`"
    how = "the likeliest each time" if a.temperature == 0 else f"at temperature {a.temperature:g}"
    said = f"{given}, {how}" if new else given
    return (
        f"{said}. Point at a token (tap it on a phone): beside it stands everything the model did "
        "there. A click holds it, the arrow keys move, Escape lets go."
    )


def work(a):
    if a.think != "on" and not a.chat:
        raise ValueError(f"--think {a.think} is for --chat")
    path = place(a.out)
    sample.quicken()
    model, enc, record = seen(a)
    special = set(enc._special_tokens.values())
    name = lambda token: raw(enc, token)
    microscope.page(record, name, special, model.config, about(a, record)).write(path)
    drafted = sum(fate.place > 0 for fate in record.fates.values())
    print(
        f"{path}: {len(record.ids):,} tokens, {drafted:,} of them drafted, "
        f"{microscope.bits(record):.2f} bits of surprise a token, "
        f"{path.stat().st_size / 1e6:.2f} MB"
    )


def main(argv=None):
    command.run(work, Flags, "look.py", __doc__, argv)


if __name__ == "__main__":
    main()
