"""
A conversation in the terminal: questions from a person or a pipe, replies as they are made.

    python sample.py --run runs/sft --chat                             asks until the input ends
    python sample.py --run runs/sft --chat --think 64 < questions.txt  a question a line

    /reset    forgets what was said        /think on|off|low|N    how much the next replies reason
    Ctrl-C    stops a reply, which stays in the conversation as far as it went

Reasoning is dimmed on a terminal; elsewhere it stands between its tags. A number after --think is a
budget: after so many tokens of reasoning `</think>` is put in, and the model goes on to its answer.
Every question has the whole conversation read again, because the reasoning of earlier answers drops
out of it (chat.py): no cache holds the text that is left.

    Printer    tokens -> characters, as soon as they are whole
    Talk       what was said, and the next reply          converse    from the input to the screen

Not here  the template: chat.py; how a token is chosen: decode.py; the flags: sample.py
Sources   budgets enforced by the caller: the released models' cards
"""

import codecs
import contextlib
import os
import re
import sys

import chat
from post import tasks
from tokenizer import raw

THINK = "on|off|low|[0-9]{1,9}"  # what --think and /think take
DIM, PLAIN = "\033[2m", "\033[22m"
COMMANDS = "/reset, /think on|off|low|N"


class Printer:
    """Prints tokens as they come, holding back bytes that do not yet make a whole character."""

    def __init__(self, enc):
        self.enc, self.utf8 = enc, codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token=None):
        """The next token; without one, the end: what is still held back is shown as a replacement
        character.
        """
        piece = b"" if token is None else raw(self.enc, token)
        print(self.utf8.decode(piece, final=token is None), end="", flush=True)


def allowance(think, room):
    """--think -> the template's mode and the budget of reasoning, None if there is none."""
    if not re.fullmatch(THINK, think):
        raise ValueError(f"/think {think}: there are on, off, low and a number of tokens")
    if not think.isdigit():
        return tasks.MODES[think], None
    if int(think) >= room:
        raise ValueError(
            f"--think {think} of --max-new-tokens {room}: no token would be left for the answer"
        )
    return tasks.MODES["on"], int(think)


class Talk:
    """A conversation and who replies in it.

    follow(ids, room) yields up to `room` ids that follow those, and nothing after one of `end`.
    """

    def __init__(self, enc, end, follow, think="on", room=200):
        self.enc, self.end, self.follow, self.room = enc, end, follow, room
        self.messages = []
        self.think(think)
        chat.encode(enc, chat.parts([], generate=True))  # a tokenizer without the template's tokens

    def think(self, how):
        self.mode, self.budget = allowance(how, self.room)

    def ids(self, question):
        """The next reply to a question, id by id. Closed early, it stays as far as it went."""
        self.messages.append(dict(role="user", content=question))
        prompt = chat.encode(self.enc, chat.parts(self.messages, generate=True, **self.mode))[0]
        said = []
        try:
            for token in self.within_budget(prompt):
                said.append(token)
                yield token
        finally:
            text = b"".join(raw(self.enc, t) for t in said if t not in self.end)
            text = text.decode("utf-8", "replace")
            self.messages.append(chat.message(text, self.mode["thinking"]))

    def within_budget(self, prompt):
        """What follows the prompt; after `budget` tokens without </think>, that, and what follows
        it then.
        """
        enough, said = self.enc.encode_single_token(chat.ENOUGH), []
        for token in self.follow(prompt, self.room if self.budget != 0 else 0):
            said.append(token)
            yield token
            if len(said) == self.budget and not {enough, *self.end} & set(said):
                break
        else:
            if self.budget != 0:
                return
        closing = chat.enough(self.enc, said)
        yield from closing
        yield from self.follow(prompt + said + closing, self.room - len(said))


def show(talk, question):
    """Prints the reply to a question as it comes."""
    enough, dim = talk.enc.encode_single_token(chat.ENOUGH), on_terminal(sys.stdout)
    printer, n, last = Printer(talk.enc), 0, None
    if talk.mode["thinking"]:
        print(DIM if dim else chat.THINK + "\n", end="", flush=True)
    with contextlib.closing(talk.ids(question)) as reply:
        try:
            for last in reply:
                n += 1
                if last == enough and dim:
                    printer()
                    print(PLAIN, end="")
                elif last not in talk.end:
                    printer(last)
        finally:
            printer()
            print(PLAIN * dim)
    if last not in talk.end:
        print(f"[cut after {n} tokens: --max-new-tokens {talk.room}]", file=sys.stderr)


def on_terminal(stream):
    return bool(stream) and stream.isatty() and os.environ.get("TERM") != "dumb"


def ask(mark=""):
    """A line of the input; None at its end."""
    if sys.stdin is None:
        return None
    try:
        line = input(mark)
        line.encode()  # what was no UTF-8 may stand in it as surrogates, which have no code
        return line
    except EOFError:
        return None
    except UnicodeError:
        raise ValueError("a line of the input is not UTF-8") from None


def turn(talk, line):
    """A line: a question, a command, or nothing."""
    word, _, rest = line.strip().partition(" ")
    if word == "/think":
        talk.think(rest.strip())
    elif word == "/reset":
        talk.messages.clear()
    elif re.fullmatch("/[a-z]*", word):
        raise ValueError(f"{word}: the commands are {COMMANDS}")
    elif word:
        show(talk, line)


def converse(talk, questions=()):
    """Replies to the questions, or, if there are none, to every line of the input. A person can
    stop a reply and mend a mistake; elsewhere both end the program.
    """
    person = not questions and on_terminal(sys.stdin)
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401   lines can be edited, and earlier ones come back
        print(f"[{COMMANDS}; Ctrl-C stops a reply, Ctrl-D ends]", file=sys.stderr)
    rest = iter(questions)
    while True:
        try:
            line = next(rest, None) if questions else ask("> " * person)
            if line is None:
                return
            turn(talk, line)
        except (KeyboardInterrupt, ValueError) as e:
            if not person:
                raise
            print(e)


if __name__ == "__main__":
    import command

    command.part("python sample.py --run runs/sft --chat")
