"""
hf.py against transformers' NemotronH, both ways, and against the released names; then all it must
refuse.

The oracle runs once, in a process of its own (oracle_transformers.py says why), for all the models
of CASES.
"""

import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import rms
from oracle_transformers import shake
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SHARED

import census
import hf
from config import PRESETS
from latent_moe import layers
from model import Config, Nemotron

TINY = Config(**SHARED, hybrid_override_pattern="MEM*E")
SUPER = Config.preset("super")
OURS = {"mtp_num_layers", "rotary_base"}  # of Config; transformers knows nothing of them
CASES = {  # rows, tokens, what differs from TINY
    "2 groups, ragged chunks": (2, 19, {}),
    "4 groups": (3, 33, dict(n_groups=4, chunk_size=16)),
    "one token, a group per head": (1, 1, dict(n_groups=8)),
    "no latent": (2, 13, dict(moe_latent_size=None)),
    "with MLP layers": (2, 21, dict(hybrid_override_pattern="M-*-ME")),
    "22 of 512 experts": (
        2,
        17,
        dict(n_routed_experts=512, num_experts_per_tok=22, routed_scaling_factor=5.0),
    ),
    "a chunk longer than the text": (2, 37, dict(chunk_size=128)),
    "whole chunks": (2, 24, {}),
    "no conv bias, 3 taps, raw gates": (
        2,
        15,
        dict(use_conv_bias=False, conv_kernel=3, norm_topk_prob=False),
    ),
    "odd sizes": (
        3,
        11,
        dict(
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=14,
            moe_latent_size=10,
            moe_intermediate_size=14,
        ),
    ),
    "the pattern of Super": (
        2,
        9,
        dict(hybrid_override_pattern=SUPER.hybrid_override_pattern, n_groups=4),
    ),
    "clamped": (2, 19, dict(time_step_min=0.001)),
}
COMPARED = [name for name in CASES if name != "clamped"]


def build(seed=0, **kw):
    model = Nemotron(replace(TINY, **kw)).eval()
    shake(model, seed, model.config.num_hidden_layers)
    return model


def ids(rows, tokens, seed=0):
    return torch.randint(
        TINY.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )


def far(got, want):
    """The largest difference, relative to the largest number; NaN is not <= anything."""
    return float((got - want).abs().max() / want.abs().max())


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@torch.no_grad()
def greedy(model, x, n=6):
    cache, out = model.new_cache(len(x)), []
    for _ in range(n):
        x = model(x, cache)[:, -1:].argmax(-1)
        out.append(x)
    return torch.cat(out, 1)


def edit(dir, change, config=None):
    """Rewrites the single file of a saved model: change(tensors) in place, or what it returns;
    config: new fields.
    """
    tensors = load_file(dir / census.SINGLE)
    save_file(change(tensors) or tensors, dir / census.SINGLE)
    given = json.loads((dir / "config.json").read_text())
    (dir / "config.json").write_text(json.dumps(given | (config or {})))


@pytest.fixture
def saved(tmp_path):
    hf.save(build(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only wait for each other's threads."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


# The outside world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Everything transformers has to say: {case name: (our model, ids, their answers, the
    directory)}.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("transformers is not installed: nothing to compare with")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (5, 23):
        pytest.skip(f"transformers {version} is too old: 5.23 is the first that is compared with")
    dir, jobs, models = tmp_path_factory.mktemp("world"), [], {}
    for i, (name, (rows, tokens, kw)) in enumerate(CASES.items()):
        models[name] = build(seed=100 + i, **kw)
        if name == "clamped":
            for block in (models[name].backbone.layers[at] for at in (0, 2)):
                block.mixer.dt_bias.data.fill_(-9)  # softplus: 0.00012, a tenth of the clamp
        hf.save(models[name], dir / name / "ours", shard_bytes=5e4 if i % 2 else 5e9)
        jobs.append(
            dict(name=name, ids=ids(rows, tokens, i).tolist(), config=models[name].config.to_hf())
        )
    (dir / "jobs.json").write_text(json.dumps(jobs))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(HF_HUB_OFFLINE="1")
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("oracle_transformers.py"), dir],
        cwd=dir,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = load_file(dir / "answers.safetensors")
    return {
        job["name"]: (
            models[job["name"]],
            torch.tensor(job["ids"]),
            {
                k.removeprefix(job["name"] + "."): v
                for k, v in answers.items()
                if k.startswith(job["name"] + ".")
            },
            dir / job["name"],
        )
        for job in jobs
    }


@pytest.mark.parametrize("name", COMPARED)
@torch.no_grad()
def test_what_we_save_is_the_same_model_to_transformers(world, name):
    model, x, theirs, dir = world[name]
    print(f"\n{name}: {far(model(x), theirs['ours']):.1e}", end=" ")
    assert far(model(x), theirs["ours"]) <= 1e-5
    assert torch.equal(greedy(model, x), theirs["ours.greedy"])
    assert same(hf.load(dir / "ours"), model)


@pytest.mark.parametrize("name", COMPARED)
@torch.no_grad()
def test_what_transformers_saves_is_the_same_model_to_us(world, name):
    _, x, theirs, dir = world[name]
    model = hf.load(dir / "theirs")
    assert model.mtp is None and not model.training  # transformers knows no MTP
    print(f"\n{name}: {far(model(x), theirs['theirs']):.1e}", end=" ")
    assert far(model(x), theirs["theirs"]) <= 1e-5
    assert torch.equal(greedy(model, x), theirs["theirs.greedy"])
    assert same(hf.load(dir / "stacked"), model)  # model. and stacked experts


@torch.no_grad()
def test_the_clamp(world):
    """The reason for time_step_min=1e-9 above: at the released 0.001 transformers computes
    something else.
    """
    model, x, theirs, _ = world["clamped"]
    assert far(model(x), theirs["ours"]) > 1e-3
    free = Nemotron(replace(model.config, time_step_min=1e-9)).eval()
    free.load_state_dict(model.state_dict())
    assert torch.equal(free(x), model(x))  # to us it is about initial values only


@pytest.mark.parametrize("name", COMPARED)
def test_their_autoconfig_reads_our_config(world, name):
    model, _, _, dir = world[name]
    read = json.loads((dir.parent / "configs.json").read_text())[name]
    ours = {f.name: getattr(model.config, f.name) for f in fields(Config) if f.name not in OURS}
    assert {k: read[k] for k in ours} == ours
    assert read["architectures"] == ["NemotronHForCausalLM"] and read["dtype"] == "float32"


@torch.no_grad()
def test_this_file_can_fail(world):
    for name in ("2 groups, ragged chunks", "22 of 512 experts", "the pattern of Super"):
        model, x, theirs, dir = world[name]

        def error(change):
            broken = hf.load(dir / "ours")
            change(broken.backbone.layers[0].mixer, broken.backbone.layers[1].mixer)
            return far(broken(x), theirs["ours"])

        u = torch.randn(1, 99, 32, generator=torch.Generator().manual_seed(0))
        busy = model.backbone.layers[1].mixer.route(u)[0].flatten().bincount().argsort()[-2:]

        def swap(m, e):
            e.experts.up_proj[busy] = e.experts.up_proj[busy.flip(0)]

        def unbias(m, e):
            e.gate.e_score_correction_bias.zero_()

        def drop(m, e):
            m.conv1d.bias.zero_()

        def turn(m, e):
            m.in_proj.weight.copy_(m.in_proj.weight.roll(1, 0))

        errors = {
            change.__name__: error(change)
            for change in (lambda m, e: None, swap, unbias, drop, turn)
        }
        print(f"\n{name}: {errors}", end=" ")
        assert errors.pop("<lambda>") <= 1e-5
        assert min(errors.values()) > 1e-3


# The released names

M = """norm.weight [4096]  mixer.in_proj.weight [18560,4096]  mixer.conv1d.weight [10240,1,4]
    mixer.conv1d.bias [10240]  mixer.A_log [128]  mixer.D [128]  mixer.dt_bias [128]
    mixer.norm.weight [8192]
    mixer.out_proj.weight [4096,8192]"""
A = """norm.weight [4096]  mixer.q_proj.weight [4096,4096]  mixer.k_proj.weight [256,4096]
    mixer.v_proj.weight [256,4096]  mixer.o_proj.weight [4096,4096]"""
E = """norm.weight [4096]  mixer.gate.weight [512,4096]  mixer.gate.e_score_correction_bias [512]
    mixer.fc1_latent_proj.weight [1024,4096]  mixer.fc2_latent_proj.weight [4096,1024]
    mixer.shared_experts.up_proj.weight [5376,4096]
    mixer.shared_experts.down_proj.weight [4096,5376]"""
E += "".join(
    f"  mixer.experts.{e}.up_proj.weight [2688,1024]  mixer.experts.{e}.down_proj.weight "
    f"[1024,2688]"
    for e in range(512)
)
ATTENTION = 7, 16, 25, 36, 47, 58, 69, 78
MOE = (
    1,
    3,
    5,
    8,
    10,
    12,
    14,
    17,
    19,
    21,
    23,
    26,
    28,
    30,
    32,
    34,
    37,
    39,
    41,
    43,
    45,
    48,
    50,
    52,
    54,
    56,
    59,
    61,
    63,
    65,
    67,
    70,
    72,
    74,
    76,
    79,
    81,
    83,
    85,
    87,
)


def test_the_census_of_super():
    """Every name and shape of the released checkpoint, written out here from the fact sheet, not
    from our modules.
    """
    table = lambda prefix, text: {
        prefix + n: tuple(json.loads(s)) for n, s in re.findall(r"(\S+) (\[\S+\])", text)
    }
    want = table("", "backbone.embeddings.weight [131072,4096]  backbone.norm_f.weight [4096]")
    want |= table("", "lm_head.weight [131072,4096]")
    for at in range(88):
        want |= table(f"backbone.layers.{at}.", A if at in ATTENTION else E if at in MOE else M)
    want |= table(
        "mtp.layers.0.",
        A + "  enorm.weight [4096]  hnorm.weight [4096]  eh_proj.weight [4096,8192]",
    )
    want |= table("mtp.layers.1.", E + "  final_layernorm.weight [4096]")
    got = census.census(SUPER)
    assert len(got) == len(want) == 42_683
    assert got == want
    assert sum(map(math.prod, got.values())) == 123_611_033_088


def test_other_layouts():
    small = census.census(
        replace(TINY, hybrid_override_pattern="M-*E", moe_latent_size=None, use_conv_bias=False)
    )
    assert small["backbone.layers.1.mixer.up_proj.weight"] == (56, 32)
    assert small["backbone.layers.3.mixer.experts.7.down_proj.weight"] == (32, 24)
    assert not [name for name in small if "latent" in name or "conv1d.bias" in name]
    nano = census.census(Config.preset("nano"))
    assert (
        not [name for name in nano if name.startswith("mtp.")]
        and len(nano) == 23 * 9 + 23 * (5 + 256) + 6 * 5 + 3
    )
    two = census.census(replace(TINY, num_nextn_predict_layers=2))
    assert {n.split(".")[2] for n in two if n.startswith("mtp.")} == set("0123")


# There and back


@pytest.mark.parametrize(
    "kw",
    [
        {},
        dict(moe_latent_size=None),
        dict(hybrid_override_pattern="-E*M", n_groups=4),
        dict(num_nextn_predict_layers=0),
        dict(num_nextn_predict_layers=2),
    ],
)
def test_save_and_load_bit_for_bit(kw, tmp_path):
    model = build(**kw)
    hf.save(model, tmp_path / "one")
    hf.save(model, str(tmp_path / "many"), shard_bytes=20_000)
    for dir in (tmp_path / "one", str(tmp_path / "many")):
        again = hf.load(dir)
        assert same(again, model) and again.config == model.config and not again.training
        assert all(not moe.load.any() for moe in layers(again))
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["config.json", census.SINGLE]
    with safe_open(tmp_path / "one" / census.SINGLE, "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()} == census.census(
            model.config
        )


def test_shards(tmp_path):
    model = build()
    hf.save(model, tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / census.INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(index["weight_map"]) == set(census.census(model.config))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in census.places(model).values())
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {shard}


@torch.no_grad()
def test_bf16(tmp_path):
    model, x = build(), ids(2, 40)
    hf.save(model, tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    half = hf.load(tmp_path / "half", dtype=torch.bfloat16)
    for name, t in half.state_dict().items():
        small = re.search(r"A_log$|\.D$|dt_bias$|gate\.", name)
        assert t.dtype == (torch.float32 if small else torch.bfloat16), name
        assert torch.equal(t, model.state_dict()[name].to(t.dtype)), name
    hf.save(half, tmp_path / "again")
    assert same(hf.load(tmp_path / "again", dtype=torch.bfloat16), half)
    wide = hf.load(tmp_path / "half")  # bf16 numbers, fp32 arithmetic
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32}
    assert (
        half(x).dtype == torch.float32 and rms(half(x), wide(x)) < 0.2
    )  # a near-tie of experts can cost that
    assert {t.dtype for t in hf.load(tmp_path / "half", torch.float64).state_dict().values()} == {
        torch.float64
    }


def test_both_spellings(saved, tmp_path):
    """model. for backbone., stacked for single experts, and any mixture; MTP's names are the same
    in both.
    """
    model = hf.load(saved)

    def stack(t):
        for name in [n for n in t if ".experts.0." in n]:
            rows = (
                [t.pop(name.replace(".0.", f".{e}.")) for e in range(8)]
                if "layers.0." not in name
                else None
            )
            t[name.replace(".experts.0.", ".experts.").removesuffix(".weight")] = torch.stack(rows)

    rename = lambda t: {n.replace("backbone.", "model.", 1): v for n, v in t.items()}
    for _i, change in enumerate((stack, rename)):
        edit(saved, change)
        assert same(hf.load(saved), model)
    assert [n for n in load_file(saved / census.SINGLE) if n.startswith("model.")]
    assert load_file(saved / census.SINGLE)["mtp.layers.1.mixer.experts.up_proj"].shape == (
        8,
        24,
        16,
    )
    edit(
        saved,
        lambda t: {n.replace("model.layers.0.", "backbone.layers.0."): v for n, v in t.items()},
    )
    assert same(hf.load(saved), model)


def test_a_save_replaces_only_when_told(saved, monkeypatch):
    old, new = hf.load(saved), build(seed=1)
    with pytest.raises(ValueError, match="already holds model.safetensors.*overwrite=True"):
        hf.save(new, saved)
    calls = []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("No space left on device")
        store(*args)

    store = hf.ondisk.store
    monkeypatch.setattr(hf.ondisk, "store", full_disk)
    with pytest.raises(OSError, match="No space"):
        hf.save(new, saved, shard_bytes=20_000, overwrite=True)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", census.SINGLE] and same(
        hf.load(saved), old
    )
    hf.save(new, saved, shard_bytes=20_000, overwrite=True)
    assert not (saved / census.SINGLE).exists() and same(hf.load(saved), new)
    hf.save(old, saved, overwrite=True)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", census.SINGLE] and same(
        hf.load(saved), old
    )


def test_a_converted_model_is_not_saved(tmp_path):
    model = build()
    model.lm_head = torch.nn.Linear(32, 97, bias=False)
    with pytest.raises(ValueError, match="not saved"):
        hf.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# What it refuses, by name


def drop(*names):
    return lambda t: {n: v for n, v in t.items() if n not in names}


def add(**named):
    return lambda t: t | {n.replace("__", "."): v for n, v in named.items()}


D, UP = "backbone.layers.0.mixer.D", "backbone.layers.1.mixer.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    "change,words",
    [
        (drop(D, UP), ["2 tensors", f"missing      {D} [8]", f"missing      {UP} [24, 16]"]),
        (
            add(backbone__layers__0__mixer__E=torch.ones(3)),
            ["unexpected   backbone.layers.0.mixer.E"],
        ),
        (add(rotary__inv_freq=torch.ones(3)), ["unexpected   rotary.inv_freq"]),
        (
            add(backbone__layers__1__mixer__experts__8__up_proj__weight=torch.ones(24, 16)),
            ["unexpected", "experts.8.up"],
        ),
        (
            add(mtp__layers__2__norm__weight=torch.ones(32)),
            ["unexpected   mtp.layers.2.norm.weight"],
        ),
        (
            lambda t: t | {D: torch.ones(9), UP: torch.ones(16, 24)},
            [
                "2 tensors",
                f"wrong shape  {D} [9], the config makes it [8]",
                f"{UP} [16, 24], the config makes it [24, 16]",
            ],
        ),
        (add(model__layers__0__mixer__D=torch.ones(8)), [f"twice        {D}"]),
        (
            add(backbone__layers__1__mixer__experts__up_proj=torch.ones(8, 24, 16)),
            ["8 tensors", f"twice        {UP}"],
        ),
        (lambda t: {"transformer." + n: v for n, v in t.items()}, ["missing", "... and "]),
        (
            drop("mtp.layers.1.mixer.experts.7.down_proj.weight"),
            ["missing      mtp.layers.1.mixer.experts.7.down_proj"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_all_named(saved, change, words):
    edit(saved, change)
    with pytest.raises(ValueError) as e:
        hf.load(saved)
    assert all(word in str(e.value) for word in words), e.value
    assert len(str(e.value).splitlines()) <= 22


@pytest.mark.parametrize(
    "change,config,word",
    [
        (
            lambda t: None,
            dict(num_nextn_predict_layers=0),
            "but its config.json has num_nextn_predict_layers 0",
        ),
        (
            add(
                x__weight=torch.zeros(4, 4, dtype=torch.uint8),
                x__weight_scale=torch.zeros(4).to(torch.float8_e4m3fn),
            ),
            {},
            "x.weight is U8, that is codes, and x.weight_scale_2 is missing",
        ),
        (lambda t: None, dict(time_step_limit=[0.01, 1.0]), "time_step_limit"),
        (
            lambda t: None,
            dict(attention_bias=True),
            "attention_bias=True (only False is implemented)",
        ),
        (lambda t: None, dict(mamba_rms_norm=True), "mamba_rms_norm=True (unknown field)"),
        (lambda t: None, dict(hybrid_override_pattern="MEX*E"), "not X"),
        (lambda t: None, dict(n_groups=3), "not a multiple of n_groups=3"),
    ],
)
def test_configs_that_cannot_be_honoured(saved, change, config, word):
    edit(saved, change, config)
    with pytest.raises(ValueError, match=re.escape(word)):
        hf.load(saved)


def test_mtp_that_is_announced_but_absent(saved, capsys):
    """What transformers makes of Super when it saves: num_nextn_predict_layers stays 1, the block
    is gone.
    """
    whole = hf.load(saved)
    edit(saved, lambda t: {n: v for n, v in t.items() if not n.startswith("mtp.")})
    model = hf.load(saved)
    assert "announces an MTP block, but no file holds one" in capsys.readouterr().out
    assert model.mtp is None and model.config == replace(whole.config, num_nextn_predict_layers=0)
    assert torch.equal(model(ids(2, 9)), whole(ids(2, 9)))


def test_damaged_files_are_named(saved, tmp_path):
    def says(*words):
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            hf.load(saved)
        assert (
            all(word in str(e.value) for word in words) and len(str(e.value).splitlines()) == 1
        ), e.value

    data = (saved / census.SINGLE).read_bytes()
    pointer = (
        b"version https://git-lfs.github.com/spec/v1\n"  # what a clone without LFS leaves there
    )
    for part in (data[:-1], data[: len(data) // 2], data[:100], data[:5], b"", pointer):
        (saved / census.SINGLE).write_bytes(part)
        says(str(saved / census.SINGLE), "truncated")
    (saved / census.SINGLE).unlink()
    says(str(saved / census.SINGLE), "missing")
    shutil.rmtree(saved)
    hf.save(build(), saved, shard_bytes=20_000)
    next(p for p in sorted(saved.iterdir()) if "00003-of" in p.name).unlink()
    says("00003-of", "missing")
    (saved / census.INDEX).write_text("{")
    says(str(saved / census.INDEX), "no JSON")
    (saved / "config.json").write_text("[1]")
    says(str(saved / "config.json"))
    (saved / "config.json").unlink()
    says(str(saved / "config.json"), "No such file")


def test_two_models_in_one_directory(saved):
    hf.save(build(), saved.with_name("n"), shard_bytes=20_000)
    for p in saved.with_name("n").glob("model*"):
        shutil.copy(p, saved)
    with pytest.raises(ValueError, match="twice"):
        hf.load(saved)


# config.json, of both generations

RELEASED = json.loads("""{"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
    "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
    "vocab_size": 131072, "hidden_size": 4096, "num_hidden_layers": 88, "hybrid_override_pattern":
    "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    "hidden_dropout": 0.0,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 262144,
    "partial_rotary_factor": 1.0, "rope_theta": 10000, "sliding_window": null,
    "tie_word_embeddings": false,
    "mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128, "expand": 2, "mamba_hidden_act": "silu", "mamba_proj_bias": false,
    "use_conv_bias": true,
    "use_bias": false, "mlp_bias": false, "time_step_min": 0.001, "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "mamba_ssm_cache_dtype": "float32", "intermediate_size": 2688, "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 2688, "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "moe_shared_expert_overlap": false, "n_routed_experts": 512, "n_shared_experts": 1,
    "num_experts_per_tok": 22,
    "norm_topk_prob": true, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 5.0,
    "initializer_range": 0.02,
    "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E",
    "layer_norm_epsilon": 1e-05, "norm_eps": 1e-05,
    "rescale_prenorm_residual": true, "residual_in_fp32": false, "num_logits_to_keep": 1,
    "use_cache": true,
    "use_mamba_kernels": true, "dtype": "bfloat16", "transformers_version": "4.57.6"}""")


def test_the_released_config_is_the_preset():
    assert Config.from_hf(RELEASED) == replace(SUPER, initializer_range=0.02)
    newer = {k: v for k, v in RELEASED.items() if "pattern" not in k and k != "norm_eps"}
    words = {"M": "linear_attention", "*": "full_attention", "E": "moe"}
    newer["layers_block_type"] = [words[letter] for letter in SUPER.hybrid_override_pattern]
    newer["mtp_layers_block_type"] = ["full_attention", "moe"]
    assert Config.from_hf(newer) == Config.from_hf(RELEASED)
    older = newer | {
        k: [
            {"linear_attention": "mamba", "full_attention": "attention"}.get(w, w) for w in newer[k]
        ]
        for k in ("layers_block_type", "mtp_layers_block_type")
    }
    assert Config.from_hf(older) == Config.from_hf(RELEASED)


@pytest.mark.parametrize("name", PRESETS)
def test_config_there_and_back(name):
    config = Config.preset(name)
    assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert Config.from_hf(config.to_hf() | dict(transformers_version="6", auto_map={})) == config
    rotary = replace(config, rotary_base=1e4)  # a baseline of ours, which no other loader knows
    with pytest.raises(ValueError, match="rotary_base=10000.0: nemotron_h has attention without"):
        rotary.to_hf()
    with pytest.raises(ValueError, match="rotary_base=10000.0 .unknown field"):
        Config.from_hf(config.to_hf() | dict(rotary_base=1e4))


# Memory

HOG = """
import json, re, sys, torch
import census
import hf
from safetensors.torch import load_file
status = lambda: open("/proc/self/status").read()
peak = lambda what: int(re.search(what + r":\\s+(\\d+)", status())[1]) * 1024
old, new = sys.argv[1:]
census.census(hf.Config.preset("toy")), torch.ones(1000).to(torch.bfloat16)
out = [peak("VmHWM")]
model = hf.load(old)
out.append(peak("VmHWM"))
hf.save(model, new, shard_bytes=5e7)
out.append(peak("VmHWM"))
tensors = load_file(old + "/model.safetensors")                              # the way not to do it
mine, copies = model.state_dict(), {n: t + 0 for n, t in tensors.items()}
model.load_state_dict(mine | {n: t for n, t in copies.items() if n in mine})
out.append(peak("VmHWM"))
print(json.dumps(out))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)
def test_there_are_never_two_copies(tmp_path):
    config = replace(
        TINY,
        hybrid_override_pattern="MEEE",
        vocab_size=8_000,
        hidden_size=512,
        n_routed_experts=96,
        moe_latent_size=128,
        moe_intermediate_size=768,
        num_nextn_predict_layers=0,
    )
    model = Nemotron(config)
    size = sum(t.nbytes for t in model.state_dict().values())
    hf.save(model, tmp_path / "a")
    run = subprocess.run(
        [sys.executable, "-c", HOG, tmp_path / "a", tmp_path / "b"],
        capture_output=True,
        text=True,
        cwd=Path(hf.__file__).parent,
    )
    assert run.returncode == 0, run.stderr
    before, loaded, saved, careless = json.loads(run.stdout)
    print(
        f"\nmodel {size / 1e6:.0f} MB; peak grew by {(loaded - before) / 1e6:.0f} MB in load, by "
        f"{(saved - loaded) / 1e6:.0f} MB more in save, by {(careless - saved) / 1e6:.0f} MB "
        f"more the careless way"
    )
    assert size > 2e8 and loaded - before < 1.35 * size  # one copy, and about 32 MB of the file
    assert saved - loaded < 0.1 * size
    assert careless - before > 1.6 * size  # this test can fail


# The command line


def test_main(saved, capsys):
    hf.main([])
    out = capsys.readouterr().out
    for line in (
        r"360  backbone.layers.M",
        r"40  backbone.layers.\*",
        r"41,240  backbone.layers.E",
        "1,040  mtp",
        r"20,480  backbone.layers.E.mixer.experts.e.up_proj.weight +\[2688, 1024\]",
        "3  others",
        "42,683  in all",
    ):
        assert re.search(rf"^ *{line}$", out, re.M), line
    assert re.search(r"loaded again: (\d+) of \1 tensors equal bit for bit", out)
    hf.main([str(saved)])
    assert "every tensor has its place" in capsys.readouterr().out


def test_a_stale_quantization_config_is_said_and_ignored(saved, capsys):
    """Plain numbers under a config.json that still calls them quantised."""
    path = saved / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | dict(quantization_config=dict(quant_method="bitsandbytes"))))
    model = hf.load(saved)
    assert capsys.readouterr().out.count("has a quantization_config, but every tensor is F32") == 1
    path.write_text(json.dumps(given))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), hf.load(saved).state_dict().values())
    )


def test_main_says_what_is_wrong(saved, capsys):
    edit(saved, drop(D))
    for argv, word in (
        ([str(saved)], f"missing      {D} [8]"),
        ([str(saved / "x")], "No such file or directory"),
        (["--di", "x"], "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit) as e:
            hf.main(argv)
        assert e.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.slow
def test_the_comparison_of_speeds_runs(world):
    """ablations/peers.py, one turn: every side trains and writes, and the ratios are those of its
    own numbers.
    """
    peers = Path(hf.__file__).parent / "ablations/peers.py"
    run = subprocess.run(
        [sys.executable, peers, "--rounds", "1", "--no-compile", "--threads", "1"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(HF_HUB_OFFLINE="1"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = {
        name: [float(x.replace(",", "")) for x in numbers]
        for name, *numbers in re.findall(
            r"^(\w.*?)  +([\d,]+) +([\d.]+)x \(.*?\) +([\d,]+) +([\d.]+)x \(.*?\) *$",
            run.stdout,
            re.M,
        )
    }
    assert len(rows) == 4 and "ours" in rows, run.stdout
    for i in (0, 2):
        # Both speeds are printed to the whole token, so their ratio is known to within an interval.
        best = max(numbers[i] for name, numbers in rows.items() if "transformers" in name)
        for numbers in rows.values():
            least, most = (numbers[i] - 0.5) / (best + 0.5), (numbers[i] + 0.5) / (best - 0.5)
            assert least - 0.0051 < numbers[i + 1] < most + 0.0051, run.stdout
    assert "products of a step: 41." in run.stdout
