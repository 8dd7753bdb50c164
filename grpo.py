"""
Reinforcement learning as Super was trained: a group of replies to each prompt, each judged against
the others of its group (GRPO).

For a prompt with g replies of rewards r_i, everything about reply i comes from the other g-1:

    b_i = mean of the others     s_i = their standard deviation (over g-2)
    A_i = clip((r_i - b_i) / s_i, -50, 50)     s_i = 0: not divided     malformed: A_i = -5

    loss = sum over kept tokens of  (-w A rho + beta k3)  /  their number
      rho  = pi / pi_old            1 in value: one update a batch. Its gradient is that of log pi
      w    = min(pi_old / pi_gen, 5)      the trainer's opinion of a token over the generator's
      kept : replies whose mean of exp|log pi_old - log pi_gen| is at most 2 (--overlong: that end)
      k3   = pi / pi_gen (e^x - 1 - x)    x = log pi_ref - log pi

Generator and trainer run side by side, so the generator is one update behind (--lag 1), and new
weights may reach it in the middle of a reply, whose keys and states are not computed again
(--in-flight). One process takes turns instead, and keeps the old weights. The MTP block rests, and
drafts worse for it: heal.py is for that. The router rests too; only its bias goes on moving.

    python grpo.py --base runs/sft               practises post/tasks.py from a run of sft.py
    python grpo.py --name grpo --resume --steps 400     goes on, bit for bit

Letters   p prompts  g replies to each  b = p g  t time
Not here  tasks and rewards: post/tasks.py; a judge's rewards: post/rlhf.py; many ranks: one process
          so far
Sources   arXiv:2604.12374 section 3.2 and its released configuration; arXiv:2402.03300 (groups)
Departs   1. deviations below 1e-6 count as 0, which in the release fp32's rounding decides
          2. the learning rate and the sizes are a small model's
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import chat
import checkpoint
import command
import data
import latent_moe
import sample
from command import ENDLESS, knob
from config import Config
from model import Nemotron
from post import pack, picture, rlhf, rollout, tasks

MODES = ("", *tasks.MODES)


@dataclass(frozen=True)
class Run:
    """Everything a run depends on. Each field is a flag of the command line."""

    base: str = knob("runs/sft", "the fine-tuned run to go on from")
    name: str = knob("grpo", "the run's folder under --out")
    out: str = knob("runs", "where run folders live")
    tasks: str = knob(",".join(tasks.TASKS), "what is practised, how often each: sort,make:3")
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
        return Path(self.out) / self.name

    def end(self):
        return min(self.steps, self.stop or self.steps)


# 1. The equations


def advantages(r, malformed=None, clip=50.0, penalty=-5.0):
    """r (p, g) rewards, malformed (p, g) bool -> A (p, g). A malformed reply still votes in the
    others' baseline; its own advantage is `penalty`, after the clip.
    """
    g, r = r.shape[1], r.double()
    if g < 2:
        raise ValueError(
            f"a group of {g}: a reply is judged against the others, so take at least 2"
        )

    def others(x):
        return (x.sum(1, keepdim=True) - x) / (g - 1)

    b = others(r)
    s = ((others(r * r) - b**2).clamp(min=0) * ((g - 1) / max(1, g - 2))).sqrt()
    a = torch.where(s > 1e-6, (r - b) / (s + 1e-6), r - b).clamp(-clip, clip)
    return (a if malformed is None else a.masked_fill(malformed, penalty)).float()


def weights(old, gen, mask, who, most=5.0, threshold=2.0):
    """w of each token, which tokens are kept, and each reply's mean of exp|difference|.

    old, gen, mask: one number a token, of any shape; who: the reply it belongs to, 0 ... b-1.
    """
    apart, b = (old - gen) * mask, int(who.max()) + 1

    def by_reply(x):
        return mask.new_zeros(b).index_add(0, who.flatten(), (x * mask).flatten())

    error = by_reply(apart.abs().exp()) / by_reply(torch.ones_like(mask)).clamp(min=1)
    return apart.exp().clamp(max=most), mask * (error <= threshold)[who], error


def objective(logp, old, gen, a, w, ref=None, beta=0.0):
    """The loss of each token. a: the advantage of its reply, a number a token as all the others."""
    each = -w * a * (logp - old).exp()
    if beta:
        x = ref - logp
        each = each + beta * (logp - gen).exp() * (x.exp() - 1 - x)
    return each


class Laid(NamedTuple):
    """Replies in packed rows. Each (b, t) but docs: numbers of the target at each place."""

    number: torch.Tensor  # (b, t+1), for pack.Docs
    ids: torch.Tensor  # (b, t+1)
    mask: torch.Tensor  # 1 where the target is a reply's token
    gen: torch.Tensor  # the generator's log-probability of it
    who: torch.Tensor  # which reply

    def pieces(self, micro):
        return [Laid(*p) for p in zip(*(x.split(micro or len(x)) for x in self))]


def lay(rollouts, length, device="cpu"):
    """Prompts with their replies in packed rows of length + 1 tokens."""
    documents = [r.prompt + r.reply for r in rollouts]
    columns = (
        documents,
        [[0.0] * len(r.prompt) + [1.0] * len(r.reply) for r in rollouts],
        [[0.0] * len(r.prompt) + r.logp for r in rollouts],
        [[i] * len(d) for i, d in enumerate(documents)],
    )
    rows = pack.pack(documents, length + 1)
    number, ids, mask, gen, who = (x.to(device) for x in pack.lay(rows, length + 1, *columns))
    docs = pack.Docs(number)
    return Laid(number, ids, docs.end(mask[:, 1:]), docs.end(gen[:, 1:]), who[:, 1:])


def logprobs(model, piece):
    """log pi of every target, (b, t)."""
    docs = pack.Docs(piece.number)
    logits = model.logits(model.hidden(piece.ids[:, :-1], docs=docs))
    y = docs.end(piece.ids[:, 1:])
    return logits.log_softmax(-1).gather(2, y[..., None])[..., 0]


def freeze(model, router=False):
    """What rests: the MTP block and, though its bias moves, the router -> the other parameters."""
    if model.mtp:
        model.mtp.requires_grad_(False)
    for moe in latent_moe.layers(model):
        moe.gate.weight.requires_grad_(router)
    return [p for p in model.parameters() if p.requires_grad]


# 2. A run


class Practice:
    """The policy, its generator (itself, or itself an update ago), and where the run stands."""

    def __init__(self, run, saved, say):
        begun = checkpoint.read(run.base)
        here, self.run, self.mixture = saved or begun, run, tasks.mixture(run.tasks)
        self.config, self.enc = Config(**here["config"]), data.unpack(here["tokenizer"])
        if missing := [s for s in chat.SPECIAL if s not in self.enc.special_tokens_set]:
            raise ValueError(f"{run.base} knows no {missing[0]}: fine-tune it first, with sft.py")
        self.end, self.saved = self.enc.encode_single_token(chat.END), here
        device = torch.device(command.device(run.device))

        def model(weights):
            made = Nemotron(self.config)
            made.load_state_dict(weights)
            return made.to(device)

        self.model = model(here["model"])
        self.first = model(begun["model"]).eval().requires_grad_(False)
        self.generator = self.model
        if run.lag:
            self.generator = model(saved["generator"] if saved else here["model"])
        self.params = freeze(self.model, run.router)
        self.opt = torch.optim.AdamW(self.params, run.lr, betas=(0.9, 0.999), weight_decay=0.0)
        self.draw = torch.Generator(device).manual_seed(run.seed)
        self.curriculum = tasks.Curriculum(rates=saved and saved["rates"])
        if saved:
            self.opt.load_state_dict(saved["optimizer"])
            self.draw.set_state(saved["draw"])
        total = sum(p.numel() for p in self.model.parameters())
        rest = total - sum(p.numel() for p in self.params)
        say(
            f"model      {self.config.hybrid_override_pattern}, {total / 1e6:.2f} M parameters, "
            f"of which {rest / 1e6:.2f} M rest: MTP" + ", routers" * (not run.router)
        )

    def catch_up(self, t):
        """The generator gets the weights of now, at token t of every reply if it is time."""
        if t == self.run.in_flight:
            self.generator.load_state_dict(self.model.state_dict())

    def practise(self, step):
        """A batch of replies -> Rollouts, their advantages (b,), and numbers about them."""
        run = self.run
        level = self.curriculum.level(step / run.steps) if run.curriculum else None
        seed = run.seed * 10**6 + step
        asked = [
            (p, run.mode if run.mode in p.demos else mode)
            for p, mode in tasks.problems(self.mixture, run.prompts, seed, level=level)
        ]
        replies = rollout.roll(
            self.generator.eval(),
            [tasks.prompt(self.enc, *a) for a in asked],
            run.group,
            run.room,
            self.end,
            self.draw,
            swap=self.catch_up if run.lag and run.in_flight else None,
        )
        each = [a for a in asked for _ in range(run.group)]
        worth, said = rollout.judge(self.enc, replies, each)
        worth = torch.tensor(worth).view(-1, run.group)
        malformed = torch.tensor([not y.formed for y in said]).view(-1, run.group)
        tokens = torch.tensor([float(len(r.reply)) for r in replies]).view(-1, run.group)
        low = torch.tensor([[float(mode == "low")] for _, mode in asked])
        reward = worth * (1 - run.shorten * low * tokens / run.room)
        if run.reward == "judge":
            reward = self.compared(asked, said)
        for (p, _), rate in zip(asked, worth.mean(1).tolist()):
            self.curriculum.note(p.task, p.level, rate)
        about = dict(
            reward=float(worth.mean()),
            tokens=float(tokens.mean()),
            malformed=float(malformed.float().mean()),
            cut=rollout.mean(float(not r.ended) for r in replies),
            alike=float((reward.std(1) == 0).float().mean()),
            level=rollout.mean(p.level for p, _ in asked),
        )
        for name in self.mixture:
            some = [w for (p, _), w in zip(asked, worth.mean(1).tolist()) if p.task == name]
            about[f"practice-{name}"] = rollout.mean(some) if some else ""
        return replies, advantages(reward, malformed, run.clip, run.penalty).flatten(), about

    def compared(self, asked, said):
        """Rewards from comparisons round and round, by a judge that is a function."""
        g, out = self.run.group, []
        for i, (problem, _) in enumerate(asked):
            group = said[g * i : g * (i + 1)]
            long = [
                [len(self.enc.encode_ordinary(x)) for x in (y.reasoning, y.content)] for y in group
            ]
            think, answer = torch.tensor(long, dtype=torch.float64).T
            matches = rlhf.circle(prefer, problem, group)
            out.append(rlhf.rewards(matches, think, answer))
        return torch.stack(out)

    def update(self, replies, a, measure):
        """One optimiser step on these replies, and one of the router biases -> numbers about it."""
        run = self.run
        laid = lay(replies, run.length, self.model.lm_head.weight.device)
        pieces, a = laid.pieces(run.micro), a.to(laid.ids.device)
        self.model.train()
        alone = len(pieces) == 1
        logps = [logprobs(self.model, pieces[0])] if alone else None
        with torch.no_grad():
            old = (
                logps[0].detach() if alone else torch.cat([logprobs(self.model, p) for p in pieces])
            )
            ref = torch.cat([logprobs(self.first, p) for p in pieces]) if measure else None
        ended = torch.tensor([float(r.ended or not run.overlong) for r in replies]).to(old.device)
        mask = laid.mask * ended[laid.who]
        bounds = (run.truncate, run.threshold) if run.truncate else (math.inf, math.inf)
        w, keep, error = weights(old, laid.gen, mask, laid.who, *bounds)
        raw = ((old - laid.gen) * mask).exp()
        w = w if run.truncate else torch.ones_like(w)
        whole = old, laid.gen, a[laid.who], w, keep, ref if measure else old
        cut = zip(pieces, *(x.split(run.micro or len(x)) for x in whole))
        loss, kept = 0.0, keep.sum().clamp(min=1)
        for i, (piece, *now, counts, far) in enumerate(cut):
            logp = logps[i] if alone else logprobs(self.model, piece)
            part = (objective(logp, *now, far, run.beta) * counts).sum() / kept
            part.backward()
            loss += part.item()
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, 1.0))
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}; this update was not made")
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        latent_moe.take_balance(self.model)  # noted while training, and no part of this loss
        latent_moe.update_bias(self.model, run.bias_rate)
        n, x = mask.sum().clamp(min=1), (ref - old) if measure else None
        return dict(
            loss=loss,
            norm=norm,
            kept=float((error <= bounds[1]).float().mean()),
            error=float(error.mean()),
            w_max=float(raw.max()),
            entropy=float(-(old * mask).sum() / n),
            kl=float(((x.exp() - 1 - x) * mask).sum() / n) if measure else "",
        )

    def evaluate(self, say):
        rows = rollout.evaluate(
            self.model, self.enc, tasks.TASKS, self.run.questions, room=self.run.room
        )
        say("           " + rollout.table(rows))
        return {
            f"{r['task']}-{r['mode']}-{k}": r[k]
            for r in rows
            for k in ("right", "tokens", "formed")
        }

    def keep(self, step, rows):
        """All that it takes to go on bit for bit; the log first."""
        folder, lag = self.run.folder(), self.run.lag
        checkpoint.write_log(folder / "log.csv", rows)
        state = dict(
            model=self.model.state_dict(),
            optimizer=self.opt.state_dict(),
            generator=self.generator.state_dict() if lag else None,
            draw=self.draw.get_state(),
            rates=self.curriculum.rates,
            tokenizer=data.pack(self.enc),
            config=asdict(self.config),
            run=asdict(self.run),
            step=step,
        )
        checkpoint.save(folder, step, state, self.run.keep)


def prefer(problem, one, other):
    """A judge that is a function: right scores 5, well formed 2, else 1 -> scores and a ranking."""
    scores = [5 if problem.check(y) and y.formed else 1 + y.formed for y in (one, other)]
    return *scores, 3.5 - (scores[0] - scores[1]) * 2.5 / 4


def check(run):
    """ValueError of flags that contradict one another, before anything is written."""
    command.check(run)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("grpo.py is one process so far: start it with python, not with torchrun")
    if run.in_flight and not run.lag:
        raise ValueError(f"--in-flight {run.in_flight} wants --lag 1: there are no other weights")
    if run.in_flight >= run.room:
        raise ValueError(f"--in-flight {run.in_flight} is not within --room {run.room}")
    if not run.resume and run.folder().exists() and any(run.folder().iterdir()):
        raise ValueError(
            f"{run.folder()} already holds a run: --resume goes on with it, --name starts another"
        )


def fit(run, say=print):
    """Practises (or goes on) as `run` says -> the Practice and the log, a list of dicts."""
    check(run)
    with checkpoint.lock(run.folder()):
        return learn(run, say)


def learn(run, say):
    """`fit` itself, in a folder that is this process's own."""
    if run.threads:
        torch.set_num_threads(run.threads)
    began, folder = time.process_time(), run.folder()
    saved = checkpoint.read(folder, run.from_step) if run.resume else None
    start = saved["step"] if saved else 0
    now, rows = Practice(run, saved, say), []
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(run=asdict(run), config=asdict(now.config), **checkpoint.sources())
    checkpoint.write(
        folder / "config.json", lambda f: f.write(json.dumps(about, indent=1).encode())
    )
    if saved:
        rows = [r for r in checkpoint.read_log(folder / "log.csv") if r["step"] <= start]
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
            say(line(rows[-1], run))
        if ends or step % run.eval_every == 0:
            rows[-1].update(now.evaluate(say))
        if ends or step % run.save_every == 0:
            now.keep(step, rows)
    if run.end() == run.steps:
        table = rollout.report(now.model, now.enc, tasks.TASKS, run.questions, run.room, say)
        checkpoint.write_log(folder / "answers.csv", table)
    picture.grpo(folder)
    say(
        f"           {folder / 'answers.png'}, {folder / 'log.csv'}; {rows[-1].get('cpu', 0):.0f} s"
    )
    return now, rows


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
    run = command.check(Run(**given))
    if not run.resume:
        return run
    path = run.folder() / "config.json"
    if not path.is_file():
        raise ValueError(f"{run.folder()} holds no run (no config.json)")
    old, again = command.document(path).get("run"), dict(resume=False, stop=0, from_step=0)
    return command.build(Run, old, f"{path}, run", {**again, **given})


def start(run):
    sample.quicken()
    try:
        fit(run, command.say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; what was saved is whole: --resume goes on from the last checkpoint"
        ) from None


def main(argv=None):
    command.run(start, Run, "grpo.py", __doc__, argv, complete)


if __name__ == "__main__":
    main()
