"""
Stages: commands of this project, one after the other, each done once and remembered.

    stages = [Stage("a", "train.py --out {out} --name a", "a"),
              Stage("b", "sft.py --out {out} --name b --base {out}/a", "b", needs=("a",))]
    Chain(stages, "runs/x").run()

A stage is what a person would type; here the same function is called with the same words. What it
printed and the small files that it left are copied to out/stages/NAME, then its record is written,
whole or not at all. So a chain that is stopped, however it is stopped, goes on with the first
stage that has no record, and that stage goes on from its own last checkpoint if it has one.

A record carries a digest of the stage's words and of the digests that it needs: with another
setting the digest is another, and the stage is done again, and all that stand on it. The folder
that it had filled before is kept, as left-N-NAME.

Not here  what the stages are: report.py; what is made of them: chapters.py
"""

import contextlib
import csv
import hashlib
import importlib
import json
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import command

import bounds
import checkpoint
import disk
from training.safety import left

# What a stage leaves that a page is made of. Checkpoints stay where they are.
SMALL = (
    *("log.csv", "config.json", "load.json", "loss.png"),
    *("worth.csv", "answers.csv", "answers.png"),
)
RESUMES = ("train.py", "sft.py", "grpo.py")  # these go on from a checkpoint with --resume


@dataclass(frozen=True)
class Stage:
    """words: the command, with {out} for the report's folder. into: the folder of {out} that it
    fills. needs: the stages it stands on. seconds: about how long it takes on one thread."""

    name: str
    words: str
    into: str = ""
    needs: tuple = ()
    seconds: float = 5

    def argv(self, out, more=()):
        """The words as a list, with those of `more` that this program has: (flag, value) pairs."""
        script, *words = [w.replace("{out}", str(out)) for w in shlex.split(self.words)]
        _, kind = program(script)
        known = {bounds.flag(f) for f in fields(kind)} if kind else set()
        words += [str(word) for pair in more if pair[0] in known for word in pair]
        return [script, *once(words)]


def once(words):
    """Of a flag that is given twice the last one counts, and stands alone."""
    given, flag = {}, ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        if word.startswith("--"):
            given[flag] = []
        given[flag].append(word)
    return [word for group in given.values() for word in group]


def program(script):
    """main(argv) of a file at the top or of a wing, and the dataclass of its flags, if it has
    any."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    main = getattr(module, "cli" if script == "train.py" else "main")
    return main, getattr(module, "Run", getattr(module, "Flags", None))


class Chain:
    """Stages in a folder. more: flags for every program that has them, as (flag, value) pairs;
    those in `silent` change how fast a stage is and not what it is."""

    def __init__(self, stages, out, more=(), silent=("--threads",), say=command.say):
        self.stages, self.out, self.say = {s.name: s for s in stages}, Path(out), say
        self.more, self.silent = more, silent
        self.began, self.spent, self.expected = time.monotonic(), 0.0, 0.0

    # 1. What is done

    def folder(self, name):
        return self.out / "stages" / name

    def argv(self, name):
        return self.stages[name].argv(self.out, self.more)

    def digest(self, name):
        """Of the words of a stage, of the stages that fill the same folder, and of its needs."""
        stage = self.stages[name]
        same = [s for s in self.stages.values() if s is stage or s.into and s.into == stage.into]
        told = [flag for flag in self.more if flag[0] not in self.silent]
        words = [s.argv("", told) for s in same]
        needs = [self.digest(need) for need in stage.needs]
        return hashlib.sha256(json.dumps([words, needs]).encode()).hexdigest()

    def record(self, name):
        """What is known of a stage: an empty dict where nothing is, or another setting's."""
        path = self.folder(name) / "record.json"
        found = command.document(path) if path.is_file() else {}
        return found if found.get("digest") == self.digest(name) else {}

    def done(self, name):
        return "seconds" in self.record(name)

    def note(self, name, **more):
        about = dict(digest=self.digest(name), command=self.line(name), **more)
        text = json.dumps(about, indent=1).encode()
        disk.write(self.folder(name) / "record.json", lambda f: f.write(text))

    def line(self, name):
        """What a person types for this stage."""
        script, *words = self.argv(name)
        wing = ["-m", script.removesuffix(".py").replace("/", ".")]
        return disk.quoted(["python", *(wing if "/" in script else [script]), *words])

    # 2. Doing it

    def run(self):
        """Every stage that is not done, in order."""
        todo = [name for name in self.stages if not self.done(name)]
        if len(todo) < len(self.stages):
            self.say(
                f"{len(self.stages) - len(todo)} of {len(self.stages)} stages are done already"
            )
        for name in todo:
            self.do(name)

    def do(self, name):
        """One stage, from its beginning or from where it was stopped."""
        stage, folder = self.stages[name], self.folder(name)
        again = self.record(name)
        folder.mkdir(parents=True, exist_ok=True)
        argv, goes_on = self.prepare(stage, bool(again))
        self.note(name, tries=again.get("tries", 0) + 1)
        began, worked = time.monotonic(), time.process_time()
        with Watch(self, name, folder / "said.txt", goes_on) as watch:
            self.call(argv, watch)
        if stage.into:
            copy(self.out / stage.into, folder)
        seconds = time.monotonic() - began
        times = dict(seconds=seconds, cpu=time.process_time() - worked)
        self.note(name, tries=again.get("tries", 0) + 1, **times)
        self.spent, self.expected = self.spent + seconds, self.expected + stage.seconds
        watch.last(f"done in {seconds:.0f} s")

    def call(self, argv, watch):
        script, *words = argv
        main, kind = program(script)
        try:
            with contextlib.redirect_stdout(watch), typed(argv):
                main(words) if kind else main()
        except SystemExit as e:
            watch.last("not finished; the same command goes on here")
            raise SystemExit(e.code) from e

    def prepare(self, stage, again):
        """The words to call, with --resume where a checkpoint waits, and whether the stage goes on.
        A folder that holds something else, or another setting's, makes room."""
        argv, place = self.argv(stage.name), self.out / stage.into
        first = next(s for s in self.stages.values() if s.into == stage.into) is stage
        if not stage.into or not first or not place.exists():
            return argv, again and "--resume" in argv
        if again and argv[0] in RESUMES and checkpoint.steps(place):
            return [*argv, "--resume"], True
        if again and (place / "progress").is_dir():  # ptq.py goes on by itself
            return argv, True
        place.rename(self.out / (left(self.out) + stage.into))
        return argv, False

    def remaining(self, name, elapsed, told=None):
        """Seconds until the end, by the pace of the stages done so far; the first minute is taken
        to be as expected, for a short stage says little. elapsed: of stage `name`; told: what it
        says is left of it."""
        spent, expected, here = self.spent + 60, self.expected + 60, 0
        if told is not None:
            spent, expected = spent + elapsed + told, expected + self.stages[name].seconds
        pace = spent / expected
        if not self.done(name):
            here = max(1, pace * self.stages[name].seconds - elapsed) if told is None else told
        ahead = [s.seconds for n, s in self.stages.items() if n != name and not self.done(n)]
        return pace * sum(ahead) + here

    # 3. Reading it

    def said(self, name):
        """What a stage printed."""
        return (self.folder(name) / "said.txt").read_text(encoding="utf-8")

    def rows(self, name, file="log.csv"):
        """A table that a stage left: dicts of numbers, and of words where there are no numbers."""
        with open(self.folder(name) / file, newline="", encoding="utf-8") as f:
            return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(f)]

    def facts(self, name):
        return command.document(self.folder(name) / "config.json")

    def picture(self, name, file):
        return (self.folder(name) / file).read_bytes()


@contextlib.contextmanager
def typed(argv):
    """Inside, a program finds its own words as if it had been started by itself: it writes them
    down, and says them when it is stopped."""
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


def number(text):
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def copy(source, folder):
    """The small files of a run, each whole or not at all; what was there of an earlier run goes."""
    for name in SMALL:
        if (source / name).is_file():
            whole = (source / name).read_bytes()
            disk.write(folder / name, lambda f, whole=whole: f.write(whole))
        else:
            (folder / name).unlink(missing_ok=True)


class Watch:
    """Standard output of a stage: into its file, and the newest line, with the place in the whole
    and the time left, to whoever waits. On a terminal that is one line that changes."""

    encoding, errors = "utf-8", "replace"
    every = 15.0  # seconds between lines where there is no terminal

    def __init__(self, chain, name, path, goes_on):
        self.chain, self.name, self.path, self.mode = chain, name, path, "a" if goes_on else "w"
        self.console, self.partial, self.shown = sys.stdout, "", 0.0
        self.began = time.monotonic()

    def __enter__(self):
        self.file = open(self.path, self.mode, encoding="utf-8")
        self.show("begins")
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, text):
        self.file.write(text)
        *lines, self.partial = (self.partial + text).split("\n")
        told = [line for line in lines if re.search(r"\d", line)]
        if told and time.monotonic() - self.shown > (0.2 if self.live() else self.every):
            self.show(told[-1])
        return len(text)

    def flush(self):
        self.file.flush()

    def isatty(self):
        return False

    def live(self):
        return self.console is not None and self.console.isatty()

    def show(self, line, end=False):
        """[3/13] sft, 4 min left: step 120/300  loss 0.51"""
        names = list(self.chain.stages)
        told = re.search(r"(\d+) s left$", line)
        elapsed = time.monotonic() - self.began
        seconds = self.chain.remaining(self.name, elapsed, told and int(told[1]))
        head = f"[{names.index(self.name) + 1}/{len(names)}] {self.name}, {minutes(seconds)} left: "
        line = head + " ".join(line.split())
        self.shown = time.monotonic()
        if not self.live():
            with contextlib.redirect_stdout(self.console):
                return self.chain.say(line[:150])
        wide = shutil.get_terminal_size().columns - 1
        self.console.write("\r" + line[:wide].ljust(wide) + "\n" * end)
        self.console.flush()

    def last(self, line):
        self.show(line, end=True)


def minutes(seconds):
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
