"""
The report's chapters on the assistant: examples, practice, healing, and fewer bits.

Each is a function of a chain of stages that are done (classroom/stages.py).

Not here  the base model that it is made of: classroom/base.py
Sources   arXiv:2604.12374 sections 3 and 4, in their order
"""

import re

from classroom import pictures
from classroom.chapters import Chapter, found
from post import picture

# 1. Post-training


def share(rows):
    return sum(r["right"] for r in rows) / len(rows)


def examples(at):
    run, rows = at.facts("sft")["run"], at.rows("sft", "answers.csv")
    size = found(r"([\d.]+) M parameters", at.said("sft"))
    return Chapter(
        "Supervised fine-tuning",
        "3.1",
        (
            "A model that goes on with a text learns to answer, from conversations of which only "
            "the assistant's words are learned. First every token counts alike, then every "
            "conversation does, so that short answers are not lost among long ones.",
            "The conversations are questions that a program can ask and check: to sort digits, to "
            "name the third smallest, to make a number of others, to call a tool; reasoning first, "
            "or not.",
        ),
        at.picture("sft", "answers.png"),
        "the loss, and the share of right answers by task and mode",
        (
            (
                "conversations",
                "conversations",
                f"{run['steps'] * run['batch']:,}, each of them new",
            ),
            ("conversations a step", "conversations a step", run["batch"]),
            ("tokens of a row", "tokens of a row", run["length"]),
            ("learning rate", "rate of fine-tuning", f"{run['lr']:g} to {run['lr_min']:g}"),
            ("steps, of which stage 2", "", f"{run['steps']}, {run['stage2']}"),
            ("right, mean of all tasks and modes", "", f"{share(rows):.2f}"),
        ),
        f"the model has {size} M parameters and a vocabulary of its own; the toy has more, "
        "but practice is a matter of many replies, and it cannot afford them.",
        ("sft",),
    )


def practice(at):
    run, rows = at.facts("rl")["run"], at.rows("rl")
    n, first, last = picture.ends([r["reward"] for r in rows if r["step"]])
    before, after = (share(at.rows(name, "answers.csv")) for name in ("sft", "rl"))
    return Chapter(
        "Reinforcement learning",
        "3.2",
        (
            "A group of replies to each prompt, each judged against the others of its group: what "
            "was better than its group is made more likely. Nothing is shown; what never "
            "succeeds is never learned this way.",
        ),
        at.picture("rl", "answers.png"),
        "the reward in practice, and the share of right answers to questions held out",
        (
            ("environments", "environments", len(run["tasks"].split(","))),
            ("prompts x replies", "prompts and replies", f"{run['prompts']} x {run['group']}"),
            ("learning rate", "rate of practice", f"{run['lr']:g}"),
            ("updates", "", run["steps"]),
            (f"reward, first and last {n} updates", "", f"{first:.2f}, {last:.2f}"),
            ("right, before and after, other questions", "", f"{before:.2f}, {after:.2f}"),
        ),
        "environments, groups and replies; one process takes turns instead of many machines.",
        ("rl",),
    )


def drafts(when, said):
    """{task and mode: tokens a round} of a line that heal.py prints, and their mean."""
    mean, rest = found(rf"^{when} +tokens a round of \d drafts ([\d.]+) of \d;(.*)$", said)
    return float(mean), {f"{t} {m}": float(n) for t, m, n in re.findall(r"(\w+) (\w+) (\S+)", rest)}


def healing(at):
    said = at.said("heal")
    (a, before), (b, after) = (drafts(when, said) for when in ("before", "after"))
    return Chapter(
        "Healing the drafter",
        "3.2",
        (
            "Practice moves the model and leaves the MTP block behind. Its drafts fall more "
            "often, the text stays right and comes slower. So the block alone learns, from the "
            "model's own replies.",
        ),
        pictures.pairs(
            list(before),
            list(before.values()),
            list(after.values()),
            ("before", "after"),
            "tokens a round",
            f"Tokens a round: {a:.2f} before, {b:.2f} after",
        ),
        "tokens a round of drafting and verifying, before and after, by task and mode",
        (
            ("tokens a round before", "healing", f"{a:.2f}"),
            ("tokens a round after", "healing", f"{b:.2f}"),
        ),
        "replies are so short that drafts have little to win.",
        ("heal",),
    )


def answers(at):
    before, after = (at.rows(name, "answers.csv") for name in ("sft", "rl"))
    names = [f"{r['task']} {r['mode']}" for r in after]
    words = at.argv("talk")
    asked = words[words.index("--prompt") + 1]
    reply = " ".join(at.said("talk").split())
    up = sum(b["right"] > a["right"] for a, b in zip(before, after))
    n = at.facts("rl")["run"]["questions"]
    return Chapter(
        "Evaluation after post-training",
        "3.3",
        (
            "The same questions, none of which was learned from, to the model after examples and "
            "after practice.",
            f"The healed model, asked `{asked}`, says: `{reply}`",
        ),
        pictures.pairs(
            names,
            [r["right"] for r in before],
            [r["right"] for r in after],
            ("fine-tuned", "after practice"),
            "share right",
            f"Right: {share(before):.2f} fine-tuned, {share(after):.2f} after practice",
        ),
        "share of right answers by task and mode, fine-tuned and after practice",
        (
            *((key, key, "-") for key in ("AIME25", "GPQA", "SWE-Bench")),
            ("kinds of answer that gain", "", f"{up} of {len(names)}"),
            *(
                (name, "", f"{a['right']:.2f}, then {b['right']:.2f}")
                for name, a, b in zip(names, before, after)
            ),
        ),
        f"the questions: four small tasks. A cell is {n} of them, and two cells that are equally "
        f"good differ by {(0.5 / n) ** 0.5:.2f} or less two times in three.",
        ("talk",),
    )


# 2. Fewer bits


def quantised(at):
    said = at.said("quantise")
    unit = r"^layers\.(\d+)\.mixer\.(\S+) +(NVFP4|FP8|BF16) "
    units = [(int(layer), *rest) for layer, *rest in re.findall(unit, said, re.M)]
    bits, was, now = found(r"^searched weights +([\d.]+) +([\d,]+) +([\d,]+)", said)
    loss, rounded = found(r"^loss +([\d.]+) .* before, ([\d.]+) after", said)
    eight = sum(form == "FP8" for *_, form in units)
    colours = dict(NVFP4=pictures.BLUE, FP8=pictures.ORANGE, BF16=pictures.PURPLE)
    return Chapter(
        "Quantisation to NVFP4 and FP8",
        "4.1 and 4.2",
        (
            "A trained model is rounded: which matrices bear four bits and which need eight is "
            "searched for, under a budget. What a choice costs is guessed from one backward pass.",
        ),
        pictures.formats(
            units, colours, f"{bits} bits a weight: {eight} of {len(units)} keep eight"
        ),
        "the format that was chosen for each group of matrices of the toy",
        (
            ("bits of the weights searched", "bits of the searched weights", bits),
            ("their bytes in BF16, and now", "", f"{was}, {now}"),
            ("accuracy kept", "accuracy kept in four bits", "-"),
            ("MMLU-Pro, BF16 and NVFP4", "MMLU-Pro in BF16 and in NVFP4", "-"),
            ("loss before and after, nats", "", f"{loss}, {rounded}"),
            ("KL, thousandths of a nat a token", "", found(r"^KL +(\S+)", said)),
        ),
        "the model, and the measure: KL to the model as it was, instead of benchmarks.",
        ("quantise",),
    )


def state(at):
    said = at.said("state")
    memories = [
        int(n.replace(",", "")) for n in found(r"memory in tokens\n([ \d,]+)$", said).split()
    ]
    lines = {}
    for name, rest in re.findall(r"^((?:fp|bf|int)\d+(?::\d)?) +(.*\))$", said, re.M):
        lines[name] = [float(n) for n in re.findall(r"([\d.]+) \(", rest)]
    nearest, random = (lines[name][-1] for name in ("fp16", "fp16:5"))
    return Chapter(
        "Quantisation of the Mamba state",
        "4.3",
        (
            "A Mamba state is read and written at every token. Rounded to the nearest, a head "
            "that remembers long loses what it adds, again and again; rounded at random, it keeps "
            "the mean. Super's state is FP16 with five rounds of Philox, `fp16:5` here.",
        ),
        pictures.drift(
            memories,
            lines,
            f"{memories[-1]:,} tokens in FP16: {nearest:.2f} % off, at random {random:.2f} %",
        ),
        "error of the state against how long a head remembers, by format",
        (
            (
                "FP16 to the nearest: longer answers; error of the state",
                "longer answers: FP16 to the nearest",
                f"{nearest:.3f} %",
            ),
            (
                "FP16 at random: longer answers; error of the state",
                "longer answers: FP16 at random",
                f"{random:.3f} %",
            ),
        ),
        "the effect. The published numbers are how much longer answers became; ours is the "
        "error itself, of a head that remembers longest, because a toy's answers have no length "
        "to lose.",
        ("state",),
    )
