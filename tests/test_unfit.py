"""What fits a program's or a function's words, and nothing else of it: settings of another kind in
a checkpoint, weights and moments of another dtype or shape, pipes where files belong, operands that
would give a wrong number and no error. Each kind is a table, and all of it is refused.
"""

import json
import math
import os
import threading

import command

import numpy as np
import pytest
import torch
from inputs import ODD, TINY, Input, released, tried
from misfits import put
from test_breaker import a_run

import chat
import checkpoint
import data
import disk
import heal
import nvfp4
import plot
import ptq
import sample
import train
import worth
from config import Config
from corpora.philox import philox
from model import Nemotron
from post import pack, talks, tasks
from quant import autoquant, calibrate, ondisk, packed, statecache
from scale import budget
from speculate import accept
from training import settings

PIPES = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "run", lambda folder: None)
        patch.setattr(sample, "quicken", lambda: None)
        return a_run(tmp_path_factory.mktemp("unfit") / "runs")


def programs(run, out):
    """Those that read a run's folder: name -> (main, argv)."""
    resume = ["--out", str(run.parent), "--name", run.name, "--resume", "--steps", "1"]
    short = ["--tokens", "64", "--eval-tokens", "64", "--length", "16", "--map", "fp8"]
    return dict(
        resume=(train.cli, resume),
        sample=(sample.main, ["--run", str(run), "--max-new-tokens", "1", "--device", "cpu"]),
        heal=(heal.main, ["--run", str(run), "--out", str(out / "h"), "--device", "cpu"]),
        worth=(worth.main, ["--run", str(run), "--eval-tokens", "16"]),
        ptq=(ptq.main, ["--run", str(run), "--out", str(out / "q"), *short]),
        merge=(train.cli, [*resume[:4], "--merge", "1"]),
    )


def refusals(run, out, path, value, names):
    """What each program says of a run whose newest checkpoint has another value at a path."""
    file, given = checkpoint.steps(run)[-1], programs(run, out)
    raw, saved = file.read_bytes(), dict(checkpoint.read(run))
    with file.open("w+b") as f:
        torch.save(put(saved, path, value), f)
        f.write(checkpoint.digest(f, f.tell()))
    try:
        for name in names:
            how, said = tried(Input(name, lambda name=name: given[name][0](given[name][1])))
            assert how == "clean", (name, path, value, how, said)
            yield said
    finally:
        file.write_bytes(raw)


READ = dict(data=("heal", "worth", "ptq"), length=("worth", "resume"), batch=("resume",))


@pytest.mark.parametrize("setting", READ)
def test_a_setting_of_another_kind_is_refused_by_whoever_reads_it(run, tmp_path, setting):
    whole = (int,) if setting != "data" else (str,)
    for x in (None, True, 7.5, math.nan, [], {}, 10**20, *(["7"] if whole == (int,) else [7])):
        for said in refusals(run, tmp_path, ("run", setting), x, READ[setting]):
            assert f"of a run with the {setting}" in said, said


def test_every_kind_of_setting_is_its_own():
    for kind, good in ((str, ("", "7", "false")), (int, (7, 0, -1)), ((int, float), (0, 1.5))):
        for x in (*ODD, *good, True):
            fits = type(x) in (kind if isinstance(kind, tuple) else (kind,))
            fits = fits and (isinstance(x, str) or abs(x) <= 10**9)
            saved = checkpoint.Saved(dict(run=dict(x=x)), "there")
            if fits:
                assert saved.setting("x", kind) is x
            else:
                with pytest.raises(ValueError, match="there is of a run with the x"):
                    saved.setting("x", kind)
    assert checkpoint.Saved(dict(run={}), "there").setting("x", str, "") == ""


def altered(t):
    """A tensor of numbers as others, that a copy would turn into numbers without a word."""
    some = torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64
    return [t.to(dtype) for dtype in some] + [t.tolist(), None]


def test_weights_of_another_dtype_are_refused(run, tmp_path):
    weight = checkpoint.read(run)["model"]["lm_head.weight"]
    for other in altered(weight):
        for said in refusals(run, tmp_path, ("model", "lm_head.weight"), other, programs(run, run)):
            assert "which weights are not" in said or "not finite" in said, said


def test_moments_of_another_shape_are_refused(run, tmp_path):
    """Fused AdamW would read beyond them."""
    state = checkpoint.read(run)["optimizer"]["state"]
    for cut in (lambda t: t[:1], lambda t: t.flatten(), lambda t: t[None], lambda t: t[..., :0]):
        for name in ("exp_avg", "exp_avg_sq"):
            first = min(i for i, s in state.items() if s[name].ndim == 2)
            path = ("optimizer", "state", first, name)
            for said in refusals(run, tmp_path, path, cut(state[first][name]), ["resume"]):
                assert "optimiser does not fit" in said, said
    for empty in ({}, {0: {}}, {0: dict(step=torch.tensor(1.0))}):
        for said in refusals(run, tmp_path, ("optimizer", "state"), empty, ["resume"]):
            assert "optimiser does not fit" in said, said


def test_every_merged_checkpoint_is_of_the_same_text(run, tmp_path):
    """Not the first alone."""
    newest = checkpoint.steps(run)[-1]
    later = newest.with_name("step-00000002.pt")
    later.write_bytes(newest.read_bytes())
    merge = ["--out", str(run.parent), "--name", run.name, "--merge", "2"]
    given = Input("merge", lambda: train.cli(merge))
    assert tried(given._replace(codes=(0,)))[0] == "clean"
    checkpoint.store(later, dict(checkpoint.read(run), corpus_sha256="x"))
    how, said = tried(given)
    later.unlink()
    assert how == "clean" and "not the text" in said
    for said in refusals(run, tmp_path, ("corpus_sha256",), "x", ["heal", "worth", "resume"]):
        assert "not the text" in said


@PIPES
def test_nobody_waits_for_a_pipe_that_nobody_writes(run, tmp_path, monkeypatch):
    """Neither where a file is read by name, nor of the files in a folder."""
    monkeypatch.setattr(sample, "quicken", lambda: None)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (command.text, command.document, disk.read_log, ondisk.header, talks.read):
        how, _ = tried(Input(read.__name__, lambda read=read: read(pipe)))
        assert how == "traceback", read  # of a function: a ValueError
        with pytest.raises(ValueError, match="is a pipe or a device, where a file belongs"):
            read(pipe)
    say = ["--max-new-tokens", "1", "--device", "cpu"]
    calls = {"prompt": lambda: sample.main(["--run", str(run), *say, "--prompt-file", str(pipe)])}
    calls["text"] = lambda: train.cli(["--out", str(tmp_path), "--data", str(pipe)])
    folder = released(tmp_path / "hf")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        path = folder / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        how, said = tried(Input(name, lambda: sample.main(["--hf", str(folder), *say])))
        assert how == "clean" and "is a pipe or a device" in said, (name, how, said)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    for name, call in calls.items():
        how, said = tried(Input(name, call))
        assert how == "clean" and str(pipe) in said, (name, how, said)


@PIPES
def test_what_a_shell_hands_over_is_read(tmp_path):
    """/dev/fd/N is what <(...) becomes, and what /dev/stdin is; /dev/null is an empty text."""
    talk = [dict(role="user", content="a"), dict(role="assistant", content="b")]
    for read, text, expected in (
        (command.text, "a\r\nb\rc", "a\nb\nc"),
        (command.document, '{"a": 1}', dict(a=1)),
        (lambda path: talks.read(path)[0][0], json.dumps(dict(messages=talk)), talk),
    ):
        there, here = os.pipe()
        writer = threading.Thread(target=lambda: (os.write(here, text.encode()), os.close(here)))
        writer.start()
        assert read(f"/dev/fd/{there}") == expected
        writer.join()
        os.close(there)
    assert command.text(os.devnull) == ""


def test_every_item_of_model_is_a_field():
    for text in (",", "hidden_size=16,", ",hidden_size=16", " ", "="):
        with pytest.raises(ValueError, match="there is no field"):
            settings.configure(train.Run(model=text))


MODEL = Nemotron(Config(**TINY)).eval()
X = torch.randn(16, 32)
Q = nvfp4.quantize(X)
LAID = pack.Docs(torch.tensor([[0, 0, 1, 1, 1]]))
PLAN = dict(world=8, ep=2, length=64, recompute="")
DRAFTS = torch.zeros(2, 3, dtype=torch.long)
P = torch.rand(2, 4, 5)
USER, SAID = dict(role="user", content="a"), dict(role="assistant", content="b")


def called(tool):
    return [USER, dict(SAID, tool_calls=tool)]


def each(f, **named):
    """{name: a call} for every list of arguments."""
    return {name: lambda args=args: f(*args) for name, args in named.items()}


def by_word(f, *settings, **base):
    """The same of keyword arguments."""
    return {str(s): lambda s=s: f(**{**base, **s}) for s in settings}


BYTE = torch.uint8
REFUSED = {
    "nvfp4.mx": each(
        lambda x, noise=None: nvfp4.mx(x, (1, 32), "mxfp8", noise),
        integers=[X.int()],
        truths=[X > 0],
        complex=[torch.complex(X, X)],
        codes=[X.to(torch.float8_e5m2)],
        flat_noise=[X, torch.zeros(512, dtype=BYTE)],
        noise_in_fp32=[X, torch.zeros(16, 32)],
        noise_with_a_sign=[X, torch.zeros(16, 32, dtype=torch.int8)],
    ),
    "nvfp4.hadamard": each(
        nvfp4.hadamard, cube=[torch.randn(16, 2, 16), 0], row=[X[0], 0], point=[torch.ones(())]
    ),
    "nvfp4.pack": each(
        nvfp4.pack,
        nan=[X * math.nan, X < 0],
        beyond=[torch.full_like(X, 7.0), X < 0],
        row=[torch.ones(4), torch.ones(4) > 0],
        signs=[torch.ones(2, 2), torch.ones(2, 2)],
    ),
    "nvfp4.unpack": each(
        nvfp4.unpack,
        integers=[Q.codes.long()],
        signed=[Q.codes.to(torch.int8)],
        row=[Q.codes[0]],
        cube=[Q.codes[None]],
    ),
    "nvfp4.dequantize": {
        f"{k} {i}": lambda k=k, v=v: nvfp4.dequantize(Q._replace(**{k: v}))
        for k, values in dict(
            scales=[Q.scales.float(), Q.scales.view(BYTE)],
            amax=[Q.amax * math.nan, Q.amax * math.inf, -Q.amax],
            codes=[Q.codes.long(), Q.codes[0]],
        ).items()
        for i, v in enumerate(values)
    },
    "nvfp4.swizzle": each(
        nvfp4.swizzle, row=[Q.scales[0]], cube=[Q.scales[None]], empty=[Q.scales[:0]]
    ),
    "beyond fp32": {
        f.__name__: lambda f=f: f(X.double() * 1e300)
        for f in (nvfp4.quantize, nvfp4.export_weight, nvfp4.export_fp8)
    },
    "mtp": {str(k): lambda k=k: MODEL.mtp(*torch.randn(2, 1, 2, 16), k) for k in (0, 1.5, "1")},
    "sample.generate": by_word(
        lambda **how: sample.generate(MODEL, [[1], [2]], 2, **how),
        *(dict(stop=[x]) for x in (1.5, "a", None, True)),
        *(dict(seed=[x, 2]) for x in (1.5, None, "a")),
        dict(speculate=100),
        dict(nonsense=1),
        dict(remember=False),
        temperature=1.0,
    ),
    "speculate.accept": each(
        accept,
        more_drafts_of_q=[DRAFTS, P, P],
        fewer_drafts=[DRAFTS[:, :2], P[:, :3], P],
        no_draw=[DRAFTS, P[:, :3], P[:, :3]],
        one_row=[DRAFTS[:1], P[:, :3], P],
    ),
    "data": each(lambda *key: data.batch(np.arange(50), *key, 2, 4), seed=[-1, 0], step=[0, -1])
    | each(philox, seed=[-1, 0, 2]),
    "scale.budget": by_word(
        lambda **how: budget.reckon(budget.Plan(**how), MODEL.config),
        *(dict(length=x) for x in (math.nan, math.inf, 1.5)),
        *(dict(micro=x) for x in (-1, 0.5)),
        *(dict(recompute=x) for x in ("x", "mamba,", ",", "ALL")),
        *(dict(precision=x) for x in ("fp8", "", "NVFP4", "nvfp4-x", "bf16-sr")),
        **PLAN,
    ),
    "heal.heal": by_word(
        lambda **how: next(heal.heal(MODEL, **how)),
        *(dict(lr=x) for x in (0, -1, math.nan, math.inf)),
        *(dict(batch=x) for x in (0, -1)),
        *(dict(steps=x) for x in (0, -1)),
        dict(ids=DRAFTS[:0]),
        dict(ids=DRAFTS[0]),
        ids=torch.zeros(2, 8, dtype=torch.long),
        steps=1,
    ),
    "ptq.windows": each(
        ptq.windows,
        nothing=[np.arange(50), 0, 4, "x"],
        none=[np.arange(50), 10, 0, "x"],
        below=[np.arange(50), 10, -4, "x"],
    ),
    "calibrate.encode": each(
        calibrate.encode,
        integers=[X[None].int(), "NVFP4"],
        whole=[X[None].int(), "FP8"],
        no_expert=[X[None][:0], "FP8"],
        no_row=[X[None][:, :0], "NVFP4"],
        no_correlations=[X[None], "NVFP4", "output"],
        nan=[X[None], "NVFP4", "gptq", torch.full((1, 32, 32), math.nan)],
    ),
    "autoquant.assign": each(
        autoquant.assign,
        no_format=[{"a": {}}, {"a": 16}, 16],
        unknown=[{"a": {"NVFP5": 0.0}}, {"a": 16}, 16],
        no_size=[{"a": {None: 0.0}}, {}, 16],
        nothing=[{"a": {None: 0.0}}, {"a": 0}, 16],
        below=[{"a": {None: 0.0}}, {"a": -16}, 16],
        half=[{"a": {None: 0.0}}, {"a": 1.5}, 16],
    ),
    "packed": each(
        packed.nvfp4_values,
        codes=[Q.codes.float(), Q.scales, torch.ones(())],
        scales=[Q.codes, Q.scales.float(), torch.ones(())],
        two=[Q.codes, Q.scales, torch.ones(3)],
        rows=[Q.codes, Q.scales[:1], torch.ones(())],
    )
    | each(
        packed.fp8_values,
        whole=[Q.codes, torch.ones(())],
        wide=[X, torch.ones(())],
        other=[X.to(torch.float8_e5m2), torch.ones(())],
    )
    | each(packed.Packed("NVFP4", 16, 32), short=[X[:, :31]], long=[torch.randn(2, 33)]),
    "statecache": each(
        statecache.philox, none=[torch.zeros(1).long(), 0, 0], many=[torch.zeros(1).long(), 0, 33]
    )
    | each(
        lambda S, **how: statecache.to_fp16(S, torch.ones(2, dtype=torch.long)),
        fp64=[torch.ones(2).double()],
        bf16=[torch.ones(2).bfloat16()],
    )
    | by_word(statecache.to_blocks, dict(block=0), dict(block=-128), S=X, kind="int8")
    | each(
        statecache.drifts,
        **{str(m): ["fp16", None, [m], 2] for m in (0, -1, math.nan, math.inf)},
        no_token=["fp16", None, [9], 0],
    ),
    "pack.Docs": each(
        lambda x: LAID.end(x), row=[torch.ones(4)], short=[X[:1, :3]], more=[X[:2, :4]]
    )
    | each(LAID.apart, no_tap=[torch.ones(1, 4, 2), 0], short=[torch.ones(1, 3, 2), 4])
    | each(pack.pack, nan=[[[1]], math.nan]),
    "tasks.problems": each(
        tasks.problems, half=[{"sort": 1}, 1.5, 0], none=[{}, 1, 0], unknown=[{"x": 1}, 1, 0]
    ),
    "chat.render": {
        str(m)[:60]: lambda m=m: chat.render(m)
        for m in (
            *([x] for x in (None, 7, "a", [], {}, dict(content="x"))),
            *([dict(role=x, content="a")] for x in (None, 7, [])),
            *(called([x]) for x in ({}, 7, None, dict(name=None), dict(name=["f"]))),
            *(called([dict(name="f", arguments=x)]) for x in ("{", "[1]", [1], 7, True)),
            called(7),
        )
    }
    | by_word(chat.render, *(dict(budget=x) for x in (-1, 1.5, math.nan, "x")), messages=[USER]),
    "chat.grow": {
        "no row": lambda: chat.grow(
            {"backbone.embeddings.weight": X[:0], "lm_head.weight": X[:0]}, 4
        )
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_operands_that_would_give_a_wrong_number_are_refused(name):
    for what, call in REFUSED[name].items():
        with pytest.raises((ValueError, FloatingPointError)):
            print(what, call())


@pytest.mark.parametrize("kind", ["fp16", "fp16:5", "bf16", "int8", "int16:5", "fp8", "fp8:5"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_stays_so(kind, bad):
    """fp16 made 65,504 of an infinity, and nothing told of it."""
    S = torch.randn(2, 128)
    S[1, 5] = bad
    assert not bool(statecache.read(kind)(0)(S)[1, 5].isfinite())


@pytest.mark.parametrize("kind", ["NVFP4", "FP8"])
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_inputs_are_rounded_by_a_scale_above_0_alone(kind, scale):
    """And a packed layer reads any number of rows, none of them and a single one."""
    low, x = packed.Packed(kind, 16, 32), torch.randn(3, 32)
    for name, t in calibrate.encode(torch.randn(1, 16, 32), kind).items():
        low.get_buffer(name).copy_(t[0])
    low.input_scale.fill_(0.01)
    packed.rounded(low)
    assert low(x[:0]).shape == (0, 16) and low(x[0]).shape == (16,)
    low.input_scale.fill_(scale)
    packed.rounded(low, False)
    assert low(x).isfinite().all()
    with pytest.raises(ValueError, match="its input_scale is not above 0"):
        packed.rounded(low)


def test_this_file_can_fail(run, tmp_path, monkeypatch):
    """Each of the checks, taken away, is missed."""
    monkeypatch.setattr(checkpoint, "ENDLESS", math.inf)
    with pytest.raises(AssertionError):
        test_a_setting_of_another_kind_is_refused_by_whoever_reads_it(run, tmp_path, "length")
    monkeypatch.setattr(packed, "scales", lambda m: [])
    with pytest.raises(pytest.fail.Exception):
        test_inputs_are_rounded_by_a_scale_above_0_alone("FP8", 0.0)
    monkeypatch.setattr(nvfp4, "loud", lambda noise, x: None)
    with pytest.raises(pytest.fail.Exception):
        test_operands_that_would_give_a_wrong_number_are_refused("nvfp4.mx")
