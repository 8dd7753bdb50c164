"""
Practice: a batch of problems, replies to them, what they are worth, and the update that follows.

    practise   problems -> replies, advantages        rollout.py, tasks.py, groups.py
    update     replies -> one optimiser step          groups.py's loss
    evaluate   held-out questions

Generator and trainer run side by side at scale, so the generator is one update behind (--lag 1),
and new weights may reach it in the middle of a reply, whose keys and states are not computed again
(--in-flight). One process takes turns instead, and keeps the old weights. The MTP block rests, and
drafts worse for it: heal.py is for that. The router rests too; only its bias goes on moving.

Not here  the flags, the folder, the log: grpo.py
Sources   arXiv:2604.12374 section 3.2
"""

import math
from dataclasses import asdict

import command

import torch

import bounds
import chat
import checkpoint
import data
import latent_moe
from config import Config
from model import Nemotron
from post import rlhf, rollout, tasks
from post.groups import advantages, lay, logprobs, objective, weights


def read(**numbers):
    """Numbers on the device -> the same on the host, which waits for them once."""
    each = torch.stack([data.widest(x) for x in numbers.values()])
    return dict(zip(numbers, each.tolist()))


def freeze(model, router=False):
    """What rests: the MTP block and, though its bias moves, the router -> the other parameters."""
    if model.mtp:
        model.mtp.requires_grad_(False)
    for moe in latent_moe.layers(model):
        moe.gate.weight.requires_grad_(router)
    return [p for p in model.parameters() if p.requires_grad]


def prefer(problem, one, other):
    """A judge that is a function: right scores 5, well formed 2, else 1 -> scores and a ranking."""
    scores = [5 if problem.check(y) and y.formed else 1 + y.formed for y in (one, other)]
    return *scores, 3.5 - (scores[0] - scores[1]) * 2.5 / 4


class Practice:
    """The policy, its generator (itself, or itself an update ago), and where the run stands."""

    def __init__(self, run, saved, say):
        begun = checkpoint.read(run.base)
        here, self.run, self.mixture = saved or begun, run, tasks.mixture(run.tasks)
        self.config = bounds.build(Config, here["config"], f"{here.path}, config")
        self.enc = data.unpack(here["tokenizer"])
        if missing := [s for s in chat.SPECIAL if s not in self.enc.special_tokens_set]:
            raise ValueError(f"{run.base} knows no {missing[0]}: fine-tune it first, with sft.py")
        self.end, self.saved = self.enc.encode_single_token(chat.END), here
        device = torch.device(command.device(run.device))

        def model(weights):
            made = Nemotron(self.config)
            with checkpoint.fitting(f"{here.path}: its model"):
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
            checkpoint.moments(self.opt, saved["optimizer"], f"{here.path}: its optimiser")
            with checkpoint.fitting(f"{here.path}: its generator"):
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
        pieces, a = laid.pieces(run.micro), data.send(a, laid.ids.device)
        self.model.train()
        alone = len(pieces) == 1
        logps = [logprobs(self.model, pieces[0])] if alone else None
        with torch.no_grad():
            old = (
                logps[0].detach() if alone else torch.cat([logprobs(self.model, p) for p in pieces])
            )
            ref = torch.cat([logprobs(self.first, p) for p in pieces]) if measure else None
        ended = torch.tensor([float(r.ended or not run.overlong) for r in replies])
        mask = laid.mask * data.send(ended, old.device)[laid.who]
        bounds = (run.truncate, run.threshold) if run.truncate else (math.inf, math.inf)
        w, keep, error = weights(old, laid.gen, mask, laid.who, *bounds, len(replies))
        raw = ((old - laid.gen) * mask).exp()
        w = w if run.truncate else torch.ones_like(w)
        whole = old, laid.gen, a[laid.who], w, keep, ref if measure else old
        cut = zip(pieces, *(x.split(run.micro or len(x)) for x in whole))
        loss, kept = 0.0, keep.sum().clamp(min=1)
        for i, (piece, *now, counts, far) in enumerate(cut):
            logp = logps[i] if alone else logprobs(self.model, piece)
            part = (objective(logp, *now, far, run.beta) * counts).sum() / kept
            part.backward()
            loss = loss + data.widest(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        n, x = mask.sum().clamp(min=1), (ref - old) if measure else None
        seen = read(
            loss=loss,
            norm=norm,
            kept=(error <= bounds[1]).float().mean(),
            error=error.mean(),
            w_max=raw.max(),
            entropy=-(old * mask).sum() / n,
            kl=((x.exp() - 1 - x) * mask).sum() / n if measure else norm,
        )
        if not math.isfinite(seen["loss"] + seen["norm"]):
            raise FloatingPointError(
                f"loss {seen['loss']}, gradient norm {seen['norm']}; this update was not made"
            )
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        latent_moe.take_balance(self.model)  # noted while training, and no part of this loss
        latent_moe.update_bias(self.model, run.bias_rate)
        return dict(seen, kl=seen["kl"] if measure else "")

    def evaluate(self, say):
        """Held-out questions of every task, practised or not: what was not may be forgotten."""
        rows = rollout.evaluate(
            self.model, self.enc, tasks.TASKS, self.run.questions, room=self.run.room
        )
        say("           " + rollout.table(rows))
        return rollout.columns(rows)

    def state(self):
        """What it takes to go on as if there had been no stop."""
        return dict(
            model=self.model.state_dict(),
            optimizer=self.opt.state_dict(),
            generator=self.generator.state_dict() if self.run.lag else None,
            draw=self.draw.get_state(),
            rates=self.curriculum.rates,
            tokenizer=data.pack(self.enc),
            config=asdict(self.config),
            run=asdict(self.run),
        )
