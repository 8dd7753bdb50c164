"""Post-training: the equations by hand and against others' numbers, tasks, replies, both
commands.
"""

import ast
import importlib.util
import json
import math
import re
import types
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import chat
import checkpoint
import data
import disk
import grpo
import heal
import hf
import sample
import sft
from config import Config
from model import Nemotron
from post import groups, release, rlhf, rollout, tasks

GOLDEN = json.loads((Path(__file__).parent / "golden/grpo.json").read_text())
THIRD = math.sqrt(1 / 3)
T = torch.tensor


def close(got, want, tolerance=1e-6):
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# grpo.py by hand


@pytest.mark.parametrize(
    "r,a",
    [
        ([1, 0, 0, 0], [1, -THIRD, -THIRD, -THIRD]),  # the odd one out sees no deviation
        ([1, 1, 0, 0], [2 * THIRD, 2 * THIRD, -2 * THIRD, -2 * THIRD]),
        ([0.3] * 5, [0] * 5),
        ([1, 0], [1, -1]),
        ([1, 0.3, 0.3, 0.3], [0.7, -THIRD, -THIRD, -THIRD]),
        ([96.6, 99.9, 99.9, 99.9], [-3.3, THIRD, THIRD, THIRD]),  # no sum of squares is exact
    ],
)
def test_advantages(r, a):
    for dtype in (torch.float32, torch.float64):
        got = groups.advantages(T([r], dtype=dtype))[0]
        close(got, a, 2e-5)  # 1e-6 beside s, as released


def test_advantages_are_clipped_and_malformed_replies_overwritten_after_that():
    a = groups.advantages(T([[100.0, 0, 1e-4, 0]]))
    assert a[0, 0] == 50
    a = groups.advantages(T([[1.0, 0, 0, 0]]), T([[True, False, False, False]]))
    close(a[0], [-5, -THIRD, -THIRD, -THIRD], 1e-5)  # it still votes in the others' baseline
    with pytest.raises(ValueError, match="a group of 1"):
        groups.advantages(T([[1.0]]))


def test_weights_are_truncated_and_replies_masked():
    old = T([[7.0, 1, 1], [3, 1, 1], [3.1, 1, 1]]).log()
    mask = T([[1.0, 1, 1], [1, 1, 0], [1, 1, 0]])
    who = torch.arange(3)[:, None].expand(3, 3)
    w, keep, error = groups.weights(old, torch.zeros(3, 3), mask, who)
    close(w[:, 0], [5, 3, 3.1])
    close(error, [3, 2, 2.05])
    assert keep.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_the_loss_is_a_mean_over_tokens_and_its_gradient_is_minus_w_a():
    logp = T([[-1.0, -9], [-2, -3]], requires_grad=True)
    mask, w = T([[1.0, 0], [1, 1]]), T([[3.0, 1], [1, 0.5]])
    a = T([[2.0], [-1.0]]).expand(2, 2)
    loss = (groups.objective(logp, logp.detach(), logp.detach(), a, w) * mask).sum() / mask.sum()
    loss.backward()
    close(loss.item(), (-6 + 1 + 0.5) / 3)
    close(logp.grad, [[-2, 0], [1 / 3, 0.5 / 3]])


def test_k3_is_weighted_by_policy_over_generator():
    logp, ref = torch.zeros(1, requires_grad=True), T([2.0]).log()
    gen, none = T([0.5]).log(), torch.zeros(1)
    each = groups.objective(logp, logp.detach(), gen, none, torch.ones(1), ref, beta=1.0)
    close(each.item(), 2 * (2 - 1 - math.log(2)))


# grpo.py against others


@pytest.mark.parametrize("case", GOLDEN["advantages"])
def test_advantages_as_nemo_rl_has_them(case):
    """Where a deviation is 0 but for rounding, the release divides by what fp32 leaves of it."""
    r, want = T(case["rewards"]), T(case["advantages"])
    got = groups.advantages(r)
    others = (r.sum(1, keepdim=True) - r) / (r.shape[1] - 1)
    square = ((r * r).sum(1, keepdim=True) - r * r) / (r.shape[1] - 1)
    clear = square - others**2 > 1e-5
    assert clear.float().mean() > 0.6
    close(got[clear], want[clear], 2e-5)  # theirs is fp32 throughout
    exact = (r == r.round()).all()
    if exact:
        close(got, want, 2e-5)


def ours(beta, masked, trl=False):
    given = GOLDEN["inputs"]
    old, gen, ref, mask, a = (T(given[k]) for k in ("logp", "gen", "ref", "mask", "advantages"))
    who = torch.arange(len(old))[:, None].expand_as(old)
    w, keep, _ = groups.weights(old, gen, mask, who, 5.0, 2.0)
    keep = keep if masked else mask
    logp = old.clone().requires_grad_()
    far = old if trl else gen  # TRL weighs k3 by policy over old
    each = groups.objective(logp, old, far, a[:, None].expand_as(old), w, ref, beta)
    loss = (each * keep).sum() / keep.sum()
    loss.backward()
    return loss.item(), logp.grad


@pytest.mark.parametrize("case", GOLDEN["losses"])
def test_loss_and_gradient_as_nemo_rl_has_them(case):
    loss, grad = ours(case["beta"], case["masked"])
    close(loss, case["loss"])
    close(grad, case["grad"])


@pytest.mark.parametrize("case", GOLDEN["trl"])
def test_loss_and_gradient_as_trl_has_them(case):
    loss, grad = ours(case["beta"], masked=False, trl=True)
    close(loss, case["loss"])
    close(grad, case["grad"])


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_and_gradient_of_the_trl_that_is_installed(beta):
    """Its own function, on a trainer of which only what that function asks for is there."""
    found = importlib.util.find_spec("trl")
    if not found:
        pytest.skip("trl is not installed: pip install --no-deps trl")
    path = Path(found.origin).parent / "trainer/grpo_trainer.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kind = next(n for n in tree.body if getattr(n, "name", "") == "GRPOTrainer")
    body = next(n for n in kind.body if getattr(n, "name", "") == "_compute_loss")
    names = dict(torch=torch, nanmin=torch.min, nanmax=torch.max)
    exec(compile(ast.Module([body], []), str(path), "exec"), names)
    given = {k: T(v) for k, v in GOLDEN["inputs"].items() if k != "threshold"}
    logp, mask = given["logp"].clone().requires_grad_(), given["mask"]
    alone = types.SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
    )
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
        args=types.SimpleNamespace(use_bias_correction_kl=True, delta=None),
        model=types.SimpleNamespace(training=True),
        accelerator=alone,
        _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        use_liger_kernel=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    inputs = dict(
        prompt_ids=torch.zeros(len(mask), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(mask), 1),
        completion_ids=torch.zeros_like(mask, dtype=torch.long),
        completion_mask=mask,
        advantages=given["advantages"],
        ref_per_token_logps=given["ref"],
        importance_sampling_ratio=(given["logp"] - given["gen"]).exp().clamp(max=5.0),
    )
    loss = names["_compute_loss"](trainer, None, inputs)
    loss.backward()
    got, grad = ours(beta, masked=False, trl=True)
    close(got, loss.item())
    close(grad, logp.grad)


# sft.py and post/rlhf.py by hand


def test_stages_weigh_tokens_or_conversations():
    learned, nll = [[False, True], [False, True, True, True]], [[9.0, 4.0], [9.0, 1.0, 1.0, 1.0]]
    for stage, want in ((1, 7 / 4), (2, 2.5)):
        w = [sft.weigh(one, stage) for one in learned]
        total = sum(a * b for x, y in zip(w, nll) for a, b in zip(x, y))
        close(total / sum(map(sum, w)), want)


def test_a_circle_of_comparisons_ties_and_length():
    m = T([[4.0, 4, 2], [3, 5, 5], [2, 1, 1]])
    close(rlhf.base(m), [3.25, 2.75, 3.5])
    close(rlhf.shorter(T([10.0, 20, 40])), [4 / 9, 1 / 9, -5 / 9])
    close(rlhf.shorter(T([7.0, 7])), [0, 0])
    think, answer = T([40.0, 20, 10]), T([5.0, 5, 5])
    want = [3.25 - 0.3 * 5 / 9, 2.75 + 0.3 / 9, 3.5 + 0.3 * 4 / 9 + 0.5]
    close(rlhf.rewards(m, think, answer), want)
    assert rlhf.judge_reward([4, 2, 3], [5, 2, 1]) == -3
    assert rlhf.judge_reward([0, 0, 0], [5, 2, 1], readable=False) == -10


def test_a_judge_is_a_function_of_two_replies():
    shown = []

    def judge(prompt, a, b):
        shown.append((a, b))
        return len(a), len(b), 3.5

    m = rlhf.circle(judge, "?", ["a", "bbb", "cc"])
    assert shown == [("a", "bbb"), ("bbb", "cc"), ("cc", "a")]
    close(rlhf.base(m), [1, 3, 2])


# post/tasks.py


@pytest.mark.parametrize(
    "text,value",
    [
        ("3*8-2", (22, [3, 8, 2])),
        ("(1+2)*3", (9, [1, 2, 3])),
        *(
            (bad, None)
            for bad in ("2**9", "__import__('os')", "1//2", "-3", "1+", "", "a", "True+1")
        ),
        ("9" * 99, None),
        ("(" * 39, None),
    ],
)
def test_expressions_are_read_and_never_run(text, value):
    assert tasks.value(text) == value


def test_every_demonstration_is_right_and_held_out_questions_are_never_practised():
    mixture = tasks.mixture("sort,third:2,make,call")
    practised = tasks.problems(mixture, 300, 1)
    for p, _ in practised:
        assert not p.held
        for mode, turn in p.demos.items():
            said = chat.parts([*p.messages, turn], **tasks.MODES[mode])
            text = "".join(x.text for x in said if x.learned).removesuffix(chat.END)
            reply = chat.reply(text, tasks.MODES[mode]["thinking"])
            assert reply.formed and p.check(reply), (p, mode)
    assert all(p.held for p, _ in tasks.problems(mixture, 50, 1, held=True))
    share = sum(p.task == "third" for p, _ in practised) / 300
    assert 0.3 < share < 0.5
    assert [p.question for p, _ in practised] == [
        p.question for p, _ in tasks.problems(mixture, 300, 1)
    ]


@pytest.mark.parametrize(
    "text", ["sort,jump", "sort:x", "sort:", "sort:0", "sort:-1", "sort:inf", ""]
)
def test_a_bad_mixture_is_refused(text):
    with pytest.raises(ValueError, match="--tasks"):
        tasks.mixture(text)


def test_a_curriculum_asks_what_is_neither_too_easy_nor_too_hard():
    import random

    course, draw = tasks.Curriculum(first=0.8, last=0.2), random.Random(0)
    for level, rate in enumerate((1.0, 0.8, 0.2, 0.0)):
        course.note("sort", level, rate)
    for progress, favourite in ((0, 1), (1, 2)):
        level = course.level(progress)
        drawn = [level(draw, "sort") for _ in range(2000)]
        assert max(range(4), key=drawn.count) in (favourite, favourite - 1 + 2 * progress)
    assert tasks.Curriculum(rates=course.rates).rates == course.rates


# post/rollout.py

ENC = chat.with_special(data.tokenizer("bytes"))
SMALL = replace(Config.preset("mini"), vocab_size=data.vocab_size(ENC))


def test_replies_are_the_policys_own_and_their_log_probabilities_the_trainers():
    """Cached generation of a group from one reading, rows leaving the batch, against packed
    rows.
    """
    model = Nemotron(SMALL, seed=1).eval()
    prompts = [tasks.prompt(ENC, *a) for a in tasks.problems(tasks.mixture("sort,third"), 5, 0)]
    end = ENC.encode_single_token(chat.END)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight[end] += 0.8 * model.lm_head.weight.std()  # some end early
    made = rollout.roll(model, prompts, 3, 30, end, draw)
    assert len(made) == 15 and [r.prompt for r in made[::3]] == prompts
    assert all(len(r.reply) == len(r.logp) == 30 or r.ended for r in made)
    laid = groups.lay(made, 200)
    with torch.no_grad():
        logp = groups.logprobs(model, laid)
    assert (laid.mask > 0).sum() == sum(len(r.reply) for r in made)
    assert ((logp - laid.gen) * laid.mask).abs().max() < 1e-4
    pieces = laid.pieces(1)
    with torch.no_grad():
        again = torch.cat([groups.logprobs(model, p) for p in pieces])
    assert len(pieces) > 1 and ((again - logp) * laid.mask).abs().max() < 1e-4


def test_an_id_that_the_tokenizer_lacks_is_a_strange_letter_and_no_fault():
    """A model may have more ids than its tokenizer: train.py --model vocab_size=4096, say."""
    some = ENC.encode_ordinary("a\u00e9")
    made = rollout.Rollout([], [some[0], SMALL.vocab_size + 5, *some[1:]], [], False)
    assert rollout.spelled(ENC, made) == "a\ufffd\u00e9"
    (asked,) = tasks.problems(tasks.mixture("sort"), 1, 0)
    assert rollout.judge(ENC, [made], [asked])[0] == [0.0]
    assert rollout.spelled(ENC, made._replace(ended=True)) == "a\ufffd\ufffd"


def test_a_group_is_what_its_replies_would_be_alone():
    model = Nemotron(SMALL, seed=1).eval()
    prompts = [[5, 6, 7], [9] * 11]
    both = rollout.roll(model, prompts, 2, 6, end=-1, greedy=True)
    for i, prompt in enumerate(prompts):
        (one,) = rollout.roll(model, [prompt], 1, 6, end=-1, greedy=True)
        assert both[2 * i].reply == both[2 * i + 1].reply == one.reply


def test_taking_rows_of_a_cache_leaves_the_others_as_they_were():
    model = Nemotron(SMALL, seed=1).eval()
    ids = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model.new_cache(3)
        model(ids, cache)
        cache.take(T([2, 0, 0]))
        got = model(ids[[2, 0, 0], :1], cache)
        want = model(torch.cat([ids, ids[:, :1]], 1))[:, -1:]
    close(got, want[[2, 0, 0]], 1e-5)


# post/release.py


@pytest.mark.parametrize("index", range(20))
def test_other_engines_render_the_same(index):
    jinja2 = pytest.importorskip("jinja2")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    case = json.loads((Path(__file__).parent / "golden/chat.json").read_text("utf-8"))[index]
    where = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert jinja2.__version__
    where.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    text = where.from_string(release.template("\n\nHOW TO CALL")).render(
        messages=case["messages"],
        tools=case["tools"],
        add_generation_prompt=case["generate"],
        enable_thinking=case["thinking"],
        low_effort=case["low_effort"],
        truncate_history_thinking=case["truncate"],
    )
    assert text == case["text"]


def test_other_engines_cut_the_same(tmp_path):
    said = [
        chat.render([*p.messages, p.demos[m]])
        for p, m in tasks.problems(tasks.mixture("sort,make"), 400, 0)
    ]
    enc = chat.with_special(data.tokenizer("bpe:300", "\n".join(said)))
    hf.save(Nemotron(replace(SMALL, vocab_size=data.vocab_size(enc))), tmp_path, enc=enc)
    again = data.tokenizer(str(tmp_path))
    assert again._mergeable_ranks == enc._mergeable_ranks
    assert again._special_tokens == enc._special_tokens
    assert hf.load(tmp_path).config.vocab_size == data.vocab_size(enc)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [enc.encode_single_token(chat.END)]
    assert (tmp_path / "chat_template.jinja").read_text("utf-8") == release.template()
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*said[:20], "sort 12\n\n  üñ ✓ make 3*8-2"]:
        ids, _ = chat.encode(enc, [chat.Part(t, t in chat.SPECIAL) for t in cut(text)])
        assert theirs.encode(text).ids == ids


def cut(text):
    """A text at its special tokens."""
    return [t for t in re.split("(" + "|".join(map(re.escape, chat.SPECIAL)) + ")", text) if t]


# the two commands

TINY = "--threads 1 --questions 2 --room 12 --log-every 1".split()
SFT = [*TINY, *"--batch 4 --length 128 --micro 2 --tokenizer bpe:300".split()]


def run(command, where, *flags):
    command.main([*flags, "--out", str(where)])


def same(a, b):
    a, b = checkpoint.read(a), checkpoint.read(b)
    for part in ("model", "optimizer"):
        one, other = (torch.utils._pytree.tree_leaves(x[part]) for x in (a, b))
        assert len(one) == len(other) > 10
        for x, y in zip(one, other):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of sft.py in four steps, straight and in two halves, and grpo.py's on top of it."""
    where = tmp_path_factory.mktemp("runs")
    four = [*SFT, *"--steps 4 --stage2 2 --eval-every 4 --save-every 2".split()]
    run(sft, where, "--name", "a", *four)
    run(sft, where, "--name", "b", *four, "--stop", "2")
    run(sft, where, "--name", "b", "--resume")
    hard = "--steps 4 --prompts 2 --group 3 --eval-every 4 --save-every 2 --length 96".split()
    more = "--lag 1 --in-flight 2 --curriculum".split()
    flags = ["--base", str(where / "a"), *TINY, *hard, *more]
    run(grpo, where, "--name", "late", *flags)
    run(grpo, where, "--name", "again", *flags, "--stop", "2")
    run(grpo, where, "--name", "again", "--resume")
    return where


def test_sft_goes_on_bit_for_bit(runs, capsys):
    same(runs / "a", runs / "b")
    assert checkpoint.read(runs / "a")["step"] == 4
    rows = disk.read_log(runs / "a/log.csv")
    assert rows[-1]["sort-off-right"] != "" and (runs / "a/answers.png").stat().st_size > 1000
    assert len((runs / "a/answers.csv").read_text().splitlines()) == 8


def test_grpo_goes_on_bit_for_bit(runs):
    same(runs / "late", runs / "again")
    rates = checkpoint.read(runs / "late")["rates"]
    assert rates == checkpoint.read(runs / "again")["rates"]
    assert rates and all(0 <= r <= 1 for r in rates.values())


def test_grpo_is_begun_again_and_not_lost_to_its_ornaments(runs, tmp_path, monkeypatch, capsys):
    """Stopped before its first checkpoint; a picture that fails; a log that cannot be read."""
    few = "--steps 1 --prompts 1 --group 2 --length 96 --room 4 --questions 1 --threads 1".split()
    flags = ["--base", str(runs / "a"), "--name", "g", *few]

    def stop(*args):
        raise KeyboardInterrupt

    def fails(folder):
        raise ZeroDivisionError("no picture today")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(grpo.Practice, "update", stop)
        run(grpo, tmp_path, *flags)
    said = capsys.readouterr().err
    assert e.value.code == 130 and "grpo.py" in said and "--resume begins again" in said
    monkeypatch.setattr(grpo.picture, "grpo", fails)
    run(grpo, tmp_path, "--name", "g", "--resume")
    assert "no picture (ZeroDivisionError" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "g")["step"] == 1
    (tmp_path / "g/log.csv").write_text("a\0b")
    run(grpo, tmp_path, "--name", "g", "--resume", "--steps", "2")
    assert "the log begins anew" in capsys.readouterr().out
    assert (tmp_path / "g/left-1-log.csv").exists()
    with pytest.raises(SystemExit) as e:
        run(grpo, tmp_path, *flags)
    assert e.value.code == 2 and "already holds a run" in capsys.readouterr().err


def test_grpo_leaves_mtp_and_router_alone_but_moves_its_bias(runs):
    before, after = (checkpoint.read(runs / n)["model"] for n in ("a", "late"))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert any("e_score_correction_bias" in n for n in moved)
    assert "backbone.embeddings.weight" in moved
    assert not [n for n in moved if n.startswith("mtp.") and "correction_bias" not in n]
    assert not [n for n in moved if n.endswith("gate.weight")]


def test_micro_batches_are_one_batch(runs):
    """The same replies, whole and row by row: one gradient."""
    say, grads = lambda line: None, []
    for micro in (0, 1):
        flags = grpo.Run(base=str(runs / "a"), prompts=3, group=3, room=12, length=64, micro=micro)
        now = grpo.Practice(flags, None, say)
        replies, a, _ = now.practise(1)
        a = torch.linspace(-1, 1, len(a))
        now.opt.step = lambda: grads.append([p.grad.clone() for p in now.params])
        now.update(replies, a, measure=False)
    worst = max(float((x - y).norm() / x.norm().clamp(min=1e-9)) for x, y in zip(*grads))
    assert len(grads[0]) > 10 and worst < 1e-4


def test_one_update_behind_the_generator_has_other_weights(runs):
    flags = grpo.Run(base=str(runs / "a"), prompts=2, group=3, room=12, lag=1, in_flight=2)
    now = grpo.Practice(flags, None, lambda line: None)
    replies, a, _ = now.practise(1)
    now.update(replies, torch.linspace(-1, 1, len(a)), measure=False)
    name = "backbone.embeddings.weight"
    model, generator = now.model.state_dict()[name], now.generator.state_dict()[name]
    assert not torch.equal(model, generator)
    now.catch_up(5)
    assert not torch.equal(model, now.generator.state_dict()[name])
    now.catch_up(2)
    assert torch.equal(model, now.generator.state_dict()[name])


def test_a_judge_that_is_a_function_gives_rewards(runs):
    flags = grpo.Run(base=str(runs / "a"), prompts=2, group=3, room=12, reward="judge")
    _, a, about = grpo.Practice(flags, None, lambda line: None).practise(1)
    assert a.shape == (6,) and torch.isfinite(a).all()


TALK = {"messages": [dict(role="user", content="hi"), dict(role="assistant", content="ho")]}


def talks(where, *lines):
    path = where / "talks.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text), encoding="utf-8")
    return ["--data", str(path)]


def refused(command, where, flags, capsys):
    """Exit code 2, one sentence, nothing written -> the sentence."""
    before = sorted(where.rglob("*"))
    with pytest.raises(SystemExit) as e:
        command.main([*flags, "--out", str(where / "out"), "--name", "x"])
    assert e.value.code == 2 and sorted(where.rglob("*")) == before
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_healing_and_sampling_from_conversations(runs, tmp_path, capsys):
    flags = "--steps 3 --texts 8 --length 100 --batch 2".split()
    out = ["--out", str(tmp_path / "healed"), "--release", str(tmp_path / "released")]
    heal.main(["--run", str(runs / "late"), *out, *flags])
    said = capsys.readouterr().out
    assert "above the least" in said and "tokens a round of 5 drafts" in said
    before, after = (checkpoint.read(p)["model"] for p in (runs / "late", tmp_path / "healed"))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(n.startswith("mtp.") for n in moved)
    ask = ["--prompt", "sort 312", "--max-new-tokens", "5", "--seed", "1"]
    for where in (["--run", str(tmp_path / "healed")], ["--hf", str(tmp_path / "released")]):
        sample.main([*where, "--chat", "--think", "low", *ask])
        assert capsys.readouterr().out.startswith(chat.THINK)


def test_your_own_conversations_are_learned(runs, tmp_path):
    tool = dict(name="add", parameters=dict(properties=dict(a=dict(type="number"))))
    call = dict(type="function", function=dict(name="add", arguments='{"a": 1}'))
    turn = dict(role="assistant", content=None, reasoning_content="so", tool_calls=[call])
    ends = [dict(role="tool", content="2"), dict(role="assistant", content="2")]
    with_tool = dict(messages=[TALK["messages"][0], turn, *ends], tools=[tool])
    flags = [*SFT, *talks(tmp_path, TALK, with_tool), "--base", str(runs / "a")]
    run(sft, tmp_path, "--name", "own", *flags, *"--steps 2 --stage2 1 --length 512".split())
    assert checkpoint.read(tmp_path / "own")["step"] == 2


@pytest.mark.parametrize(
    "lines,match",
    [
        (['{"messages": '], "line 1: "),
        (["7"], "line 1: it is no"),
        ([TALK, {"messages": [dict(role="robot", content="x")]}], "line 2: turn 0 has the role"),
        ([{"messages": [TALK["messages"][0], dict(role="assistant", content="")]}], "empty reply"),
        (
            [
                {
                    "messages": [
                        TALK["messages"][0],
                        dict(role="assistant", content="", tool_calls=[dict(name="fly")]),
                    ]
                }
            ],
            "calls 'fly', which is none of its tools",
        ),
        (
            [{"messages": [dict(role="user", content="x" * 400), TALK["messages"][1]]}],
            "more than a row",
        ),
        ([""], "holds no conversation"),
    ],
)
def test_bad_conversations_end_in_a_sentence(lines, match, runs, tmp_path, capsys):
    flags = [*SFT, *talks(tmp_path, *lines), "--base", str(runs / "a")]
    assert match in refused(sft, tmp_path, flags, capsys)


def test_bad_beginnings_end_in_a_sentence(runs, tmp_path, capsys):
    saved = checkpoint.read(runs / "a")
    saved["config"]["vocab_size"] = 77
    checkpoint.save(tmp_path / "other", 1, saved)
    assert "a vocabulary of 77" in refused(
        sft, tmp_path, ["--base", str(tmp_path / "other")], capsys
    )
    saved["config"]["vocab_size"] = len(saved["model"]["lm_head.weight"])
    saved["tokenizer"] = data.pack(data.tokenizer("bytes"))
    checkpoint.save(tmp_path / "plain", 1, saved)
    assert "fine-tune it first" in refused(
        grpo, tmp_path, ["--base", str(tmp_path / "plain")], capsys
    )
    for flags, match in (
        (["--base", str(tmp_path / "none")], "holds no checkpoint"),
        (["--base", "a", "--hf", "b"], "begins with one model"),
        (["--stage2", "9", "--steps", "3"], "more than all --steps"),
        (["--cp", "2"], "does not cut into slices"),
        (["--documents"], "is train.py's"),
        (["--tasks", "jump"], "no task 'jump'"),
        (["--lr", "nan"], "lr"),
    ):
        assert match in refused(sft, tmp_path, flags, capsys)
    for flags, match in (
        (["--base", str(tmp_path / "none")], "holds no checkpoint"),
        (["--base", str(runs / "a"), "--in-flight", "3"], "wants --lag 1"),
        (["--base", str(runs / "a"), "--group", "1"], "--group"),
        (["--base", str(runs / "a"), "--lag", "2"], "--lag"),
    ):
        assert match in refused(grpo, tmp_path, flags, capsys)


def quoted():
    page = (Path(__file__).parent.parent / "docs/post_training.md").read_text("utf-8")
    return re.findall(r"\| ([\w/]+\.py) `(.+)` \|", page)


def test_the_page_quotes_the_lines_that_compute():
    assert len(quoted()) > 10
    for name, line in quoted():
        assert line in (Path(__file__).parent.parent / name).read_text("utf-8"), (name, line)


def test_this_file_can_fail():
    r = T([[1.0, 1, 0, 0]])
    group = (r[0] - r.mean()) / r.std()  # the group's own mean and deviation
    with pytest.raises(AssertionError):
        close(groups.advantages(r)[0], group, 1e-2)
    loss, grad = ours(0.1, masked=True)
    case = next(c for c in GOLDEN["losses"] if c["beta"] == 0.1 and not c["masked"])
    with pytest.raises(AssertionError):
        close(grad, case["grad"])
    with pytest.raises(AssertionError):
        close(ours(0.1, masked=False, trl=True)[0], case["loss"])  # k3 by old instead of generator
