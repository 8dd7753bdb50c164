"""
The report in miniature: one command goes through all that Super's technical report tells, at a size
that a laptop can do, and writes it down.

    python report.py            pre-train, merge, fine-tune, practise, heal, quantise
    python report.py --quick    the same with fewer steps

It ends with runs/report/index.html, one file for any browser: the report's sections in their order,
each with a picture of what was just made, our numbers beside the published ones, what shrank, and
the command that makes it.

Every stage below is a command that can be given by itself; here its own function is called. A stage
that is done is not done again: after an interruption the same command goes on where it was, and
with other flags it does again what they change.

Not here  how stages are remembered: classroom/stages.py; what the sections say: classroom/base.py
          and assistant.py; published numbers, with their places: classroom/published.csv
Sources   arXiv:2604.12374, whose sections are followed in their order
"""

from dataclasses import dataclass, replace
from pathlib import Path

import command

import disk
import sample
from bounds import knob
from classroom import assistant, base, chapters
from classroom.page import Page
from classroom.stages import Chain, Stage

TITLE = "Nemotron 3 Super, from scratch: the report in miniature"
LEAD = (
    "All that [the technical report](https://arxiv.org/abs/2604.12374) tells, done again at a size "
    "that a laptop can do. What is small is small: no number of ours is meant to reach a published "
    "one, and the reason stands beside it. Everything here was made by the commands shown."
)
MINI = "--out {out} --preset mini --steps 300 --eval-every 60 --no-worth --prompt="

# 1. The stages, in the order in which they stand on one another.

STAGES = (
    # what the full model is made of
    Stage("sizes", "model.py --preset super", seconds=3),
    # pre-training: the toy, and a smaller model that the stages after it can afford
    Stage("toy", "train.py --out {out} --name toy --keep 2", "toy", seconds=330),
    Stage("mini", f"train.py {MINI} --name mini --diagnose", "mini", seconds=36),
    # the same in four bits
    Stage("four", f"train.py {MINI} --name four --diagnose --precision nvfp4", "four", seconds=50),
    # a learning rate that stays, and an average instead of its fall
    Stage(
        "flat", f"train.py {MINI} --name flat --decay 0 --save-every 5 --keep 8", "flat", seconds=36
    ),
    Stage("merge", "train.py --out {out} --name flat --merge 8", needs=("flat",), seconds=20),
    # longer windows, at the lowest rate
    Stage(
        "long",
        "train.py --out {out} --name mini --resume --steps 330 --length 512 --batch 2 --lr 4e-5 "
        "--warmup 0 --decay 0 --eval-every 15",
        "mini",
        needs=("mini",),
        seconds=15,
    ),
    # from a base model to an assistant: examples, practice, and the drafter learns the new model
    Stage("sft", "sft.py --out {out} --base {out}/mini", "sft", needs=("long",), seconds=84),
    Stage("rl", "grpo.py --out {out} --base {out}/sft", "grpo", needs=("sft",), seconds=68),
    Stage(
        "heal",
        "heal.py --run {out}/grpo --out {out}/healed",
        "healed",
        needs=("rl",),
        seconds=19,
    ),
    Stage(
        "talk",
        "sample.py --run {out}/healed --chat --prompt 'third 53814' --max-new-tokens 30 --seed 0",
        needs=("heal",),
        seconds=2,
    ),
    # four and eight bits where sixteen were, and what a state in sixteen bits forgets
    Stage(
        "quantise",
        "ptq.py --run {out}/toy --bits 4.75 --out {out}/toy-nvfp4",
        "toy-nvfp4",
        needs=("toy",),
        seconds=50,
    ),
    Stage("state", "quant/statecache.py", seconds=15),
)

# What --quick adds to a stage's words, and the seconds that are left of it.
QUICK = dict(
    toy=("--steps 150 --eval-every 50 --eval-tokens 8192", 65),
    mini=("--steps 150 --eval-every 30 --eval-tokens 8192", 18),
    four=("--steps 150 --eval-every 30 --eval-tokens 8192", 25),
    flat=("--steps 150 --eval-every 30 --eval-tokens 8192", 18),
    long=("--steps 165 --eval-every 5", 6),
    sft=("--steps 150 --stage2 30 --eval-every 50 --questions 40", 40),
    rl=("--steps 20 --eval-every 20 --questions 40", 22),
    heal=("--steps 40 --texts 256", 8),
    quantise=("--tokens 2048 --eval-tokens 2048", 20),
)

# 2. The sections, in the report's order.

CHAPTERS = (
    base.architecture,  # 2.1   one mixer a layer
    base.ahead,  # 2.1.2  several tokens at once
    base.four_bits,  # 2.2   training in NVFP4
    base.text,  # 2.3   what is read
    base.schedule,  # 2.4   how it is learned
    base.merging,  # 2.5   an average for a decay
    base.longer,  # 2.6   windows that grow
    base.worth,  # 2.7   what the base model can do
    assistant.examples,  # 3.1   supervised fine-tuning
    assistant.practice,  # 3.2   reinforcement learning
    assistant.healing,  # 3.2   the drafter learns the new model
    assistant.answers,  # 3.3   what the assistant can do
    assistant.quantised,  # 4.1, 4.2  four and eight bits
    assistant.state,  # 4.3   the Mamba state in sixteen bits
)


def stages(form):
    """form: {stage: (words more, seconds)}. The words given last are those that count."""
    for stage in STAGES:
        more, seconds = form.get(stage.name, ("", stage.seconds))
        yield replace(stage, words=f"{stage.words} {more}".rstrip(), seconds=seconds)


def write(chain):
    """The page, from what the stages left on disk."""
    page, told = Page(TITLE, LEAD), set()
    for chapter in CHAPTERS:
        chapters.show(page, chain, chapter(chain), told)
    chapters.bill(page, chain)
    path = chain.out / "index.html"
    page.write(path)
    return path


@dataclass(frozen=True)
class Flags:
    out: str = knob("runs/report", "the folder of the page and of every run")
    quick: bool = knob(False, "fewer steps everywhere")
    seed: int = knob(0, "of every stage that draws", least=0, most=2**32 - 1)
    threads: int = knob(0, "CPU threads; 0: torch's choice", least=0, most=1024)


def make(flags, form=None, say=command.say):
    """Every stage that is not done yet, then the page. form: as `stages` takes it."""
    form = form or (QUICK if flags.quick else {})
    more = [("--seed", flags.seed)] if flags.seed else []
    more += [("--threads", flags.threads)] if flags.threads else []
    chain = Chain(list(stages(form)), Path(flags.out), more, say=say)
    with disk.lock(flags.out):
        chain.run()
        say(f"wrote {write(chain)}")


def work(flags):
    sample.quicken()
    make(flags)


def main(argv=None):
    command.run(work, Flags, "report.py", __doc__, argv)


if __name__ == "__main__":
    main()
