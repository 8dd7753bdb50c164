"""
Reinforcement learning as Super was trained: a group of replies to each prompt, each judged against
the others of its group (GRPO).

One update, again and again:

    problems that can be checked -> g replies to each -> rewards    post/tasks.py, post/rollout.py
    rewards -> how much better than its group each reply is         post/groups.py
    more of what was better, one optimiser step                     post/practice.py

    python grpo.py --base runs/sft               practises post/tasks.py from a run of sft.py
    python grpo.py --name grpo --resume --steps 400     goes on, bit for bit

Letters   g replies to a prompt
Not here  the equations: post/groups.py; what rests, and who is an update behind: post/practice.py;
          a judge's rewards: post/rlhf.py; many ranks: one process so far
Sources   arXiv:2604.12374 section 3.2 and its released configuration; arXiv:2402.03300 (groups)
Departs   the learning rate and the sizes are a small model's
"""

import json
import os
import time
from dataclasses import asdict, dataclass

import command

import torch

import bounds
import checkpoint
import disk
import sample
from bounds import ENDLESS, knob
from post import picture, rollout, tasks
from post.practice import Practice
from training import safety
from training.journal import earlier
from training.live import teller

MODES = ("", *tasks.MODES)


@dataclass(frozen=True)
class Run:
    """Everything a run depends on. Each field is a flag of the command line."""

    base: str = knob("runs/sft", "the fine-tuned run to go on from")
    name: str = knob("grpo", "the run's folder under --out")
    out: str = knob("runs", "where run folders live")
    tasks: str = knob(
        ",".join(tasks.TASKS),
        "what is practised, how often each: sort,make:3; held-out questions are of all tasks",
    )
    mode: str = knob("", "ask in this mode only, where a task has it", choices=MODES)
    curriculum: bool = knob(False, "levels by pass rate, from easy to hard")
    reward: str = knob("right", "right | judge (post/rlhf.py)", choices=("right", "judge"))
    steps: int = knob(80, "updates, one for each batch of replies", least=1, most=ENDLESS)
    prompts: int = knob(24, "prompts a step", least=1, most=1 << 20, memory=True)
    group: int = knob(8, "replies to each", least=2, most=1 << 16, memory=True)
    room: int = knob(40, "tokens a reply may have", least=2, most=1 << 24, memory=True)
    length: int = knob(256, "tokens of a packed row", least=4, most=1 << 24)
    micro: int = knob(0, "rows a forward pass; 0: all", least=0, most=1 << 20, memory=True)
    lr: float = knob(2e-4, "learning rate after ten updates; Super's is 3e-6", above=0, most=10)
    clip: float = knob(50.0, "largest advantage", above=0, most=1e9)
    penalty: float = knob(-5.0, "advantage of a malformed reply", least=-1e9, most=0)
    truncate: float = knob(5.0, "largest weight; 0: no weights, no masks", least=0, most=1e9)
    threshold: float = knob(2.0, "largest mean error of a reply that counts", above=0, most=1e9)
    overlong: bool = knob(False, "leave replies without an end out of the loss")
    shorten: float = knob(0.0, "a right reply in mode low: 1 - this x tokens/room", least=0, most=1)
    beta: float = knob(0.0, "weight of k3, towards the base; RLHF: 1e-4", least=0, most=1e6)
    lag: int = knob(0, "updates that the generator is behind", least=0, most=1)
    in_flight: int = knob(
        0, "with --lag 1: its weights change at this token", least=0, most=1 << 24
    )
    bias_rate: float = knob(1e-3, "step of the router biases", least=0, most=1)
    router: bool = knob(False, "train the router too")
    questions: int = knob(100, "held-out questions of each task and mode", least=1, most=ENDLESS)
    eval_every: int = knob(40, "updates between evaluations", least=1, most=ENDLESS)
    log_every: int = knob(10, "updates between printed lines", least=1, most=ENDLESS)
    save_every: int = knob(40, "updates between checkpoints", least=1, most=ENDLESS)
    keep: int = knob(0, "checkpoints to keep; 0: all of them", least=0, most=ENDLESS)
    stop: int = knob(
        0, "stop after this update, as if interrupted; 0: do not", least=0, most=ENDLESS
    )
    resume: bool = knob(False, "go on with the run of this name; flags given now replace its own")
    from_step: int = knob(0, "resume from this checkpoint, not the newest", least=0, most=ENDLESS)
    device: str = knob("auto", "auto | cpu | cuda | mps", choices=command.DEVICES)
    seed: int = knob(0, "of the problems and of the replies", least=0, most=2**32 - 1)
    threads: int = knob(0, "CPU threads; 0: torch's choice", least=0, most=1024)

    def folder(self):
        return disk.below(self.out, self.name)

    def end(self):
        return min(self.steps, self.stop or self.steps)


def keep(now, step, rows):
    """All that it takes to go on bit for bit; the log first."""
    folder = now.run.folder()
    disk.write_log(folder / "log.csv", rows)
    state = dict(now.state(), machine=safety.machine(now.draw.device), step=step)
    checkpoint.save(folder, step, state, now.run.keep)


def check(run):
    """ValueError of flags that contradict one another, before anything is written."""
    bounds.check(run)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("grpo.py is one process so far: start it with python, not with torchrun")
    if run.in_flight and not run.lag:
        raise ValueError(f"--in-flight {run.in_flight} wants --lag 1: there are no other weights")
    if run.in_flight >= run.room:
        raise ValueError(f"--in-flight {run.in_flight} is not within --room {run.room}")
    if run.from_step and not run.resume:
        raise ValueError(f"--from-step {run.from_step} needs --resume: it says from where to go on")


def fit(run, say=None):
    """Practises (or goes on) as `run` says -> the Practice and the log, a list of dicts. say: what
    takes a line; without one it is printed, or in a notebook drawn (training/live.py).
    """
    check(run)
    folder, say = run.folder(), safety.Steady(say or teller(picture.practice))
    with disk.lock(folder), safety.offering(folder, say):
        if not run.resume:
            safety.vacant(folder)
        made = learn(run, say)
    say.close()
    return made


def learn(run, say):
    """`fit` itself, in a folder that is this process's own."""
    if run.threads:
        torch.set_num_threads(run.threads)
    began, folder = time.process_time(), run.folder()
    begun = run.resume and (checkpoint.steps(folder) or run.from_step)
    saved = checkpoint.read(folder, run.from_step) if begun else None
    start = saved["step"] if saved else 0
    now, rows = Practice(run, saved, say), []
    safety.branch(folder, start)
    about = dict(program="grpo.py", run=asdict(run), config=asdict(now.config), **disk.sources())
    disk.write(folder / "config.json", lambda f: f.write(json.dumps(about, indent=1).encode()))
    if saved:
        rows = earlier(folder / "log.csv", start, say)
        if elsewhere := safety.moved(saved, safety.machine(now.draw.device)):
            say(elsewhere)
    say(
        f"run        {folder}: {run.steps} updates of {run.prompts} x {run.group} replies"
        + (f", from update {start}" if start else "")
    )
    if not saved:
        rows.append(dict(step=0, **now.evaluate(say)))
    for step in range(start + 1, run.end() + 1):
        for group in now.opt.param_groups:
            group["lr"] = run.lr * min(1, 0.1 + 0.9 * (step - 1) / 10)
        clock = time.process_time()
        replies, a, about = now.practise(step)
        generating = time.process_time() - clock
        if run.lag and not run.in_flight:
            now.catch_up(0)
        ends, due = step == run.end(), step % run.log_every == 0 or step in (start + 1, run.end())
        row = dict(step=step, **about, **now.update(replies, a, bool(run.beta) or due))
        row.update(generating=generating, updating=time.process_time() - clock - generating)
        rows.append(dict(row, cpu=time.process_time() - began))
        if due:
            say.step(line(rows[-1], run), rows, step, run.end())
        if ends or step % run.eval_every == 0:
            rows[-1].update(now.evaluate(say))
        if ends or step % run.save_every == 0:
            keep(now, step, rows)
    if run.end() == run.steps:
        safety.ornament("table of answers", lambda: answers(now, folder, say), say)
    drawn = safety.ornament("picture", lambda: picture.grpo(folder), say)
    where = f"{folder / 'answers.png'}, " * drawn + str(folder / "log.csv")
    say(f"           {where}; {time.process_time() - began:.0f} s")
    return now, rows


def answers(now, folder, say):
    """The table of answers, said and written."""
    run = now.run
    table = rollout.report(now.model, now.enc, tasks.TASKS, run.questions, run.room, say)
    disk.write_log(folder / "answers.csv", table)


def line(row, run):
    share = row["generating"] / (row["generating"] + row["updating"])
    kl = f"  kl {row['kl']:.3f}" if row["kl"] != "" else ""
    return (
        f"step {row['step']:4}/{run.steps}  reward {row['reward']:.3f}  "
        f"tokens {row['tokens']:4.1f}  "
        f"malformed {row['malformed']:.3f}  w <= {row['w_max']:.2f}  kept {row['kept']:.2f}{kl}  "
        f"|g| {row['norm']:.2f}  generating {share:.0%} of {row['cpu']:.0f} CPU s"
    )


def complete(given):
    """With --resume the run's own settings are the defaults."""
    run = bounds.check(Run(**given))
    if not run.resume:
        return run
    path = run.folder() / "config.json"
    if not path.is_file():
        raise ValueError(f"{run.folder()} holds no run (no config.json)")
    old, again = command.document(path).get("run"), dict(resume=False, stop=0, from_step=0)
    here = dict(out=run.out, name=run.name)  # where it may have been moved or copied
    return bounds.build(Run, old, f"{path}, run", {**again, **given, **here})


def start(run):
    sample.quicken()
    fit(run, command.say)


def main(argv=None):
    command.run(start, Run, "grpo.py", __doc__, argv, complete)


if __name__ == "__main__":
    main()
