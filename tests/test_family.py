"""
family.py and the models it lets in: every released member with its number of parameters, every
field of transformers' configuration with what becomes of it, and the logits of small models of
every generation against transformers', both ways.

The oracle runs in a process of its own (oracle_transformers.py says why), once for many models.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle_transformers import shake
from safetensors.torch import load_file
from tiny import SHARED

import family
import hf
import latent_moe
import model as model_py
from config import Config
from model import Nemotron, costs

# 1. The members

DENSE = dict(
    model_type="nemotron_h",
    conv_kernel=4,
    expand=2,
    layer_norm_epsilon=1e-5,
    rms_norm_eps=1e-5,
    mamba_head_dim=64,
    mlp_hidden_act="relu2",
    n_groups=8,
    num_attention_heads=32,
    num_key_value_heads=8,
    ssm_state_size=128,
    time_step_limit=[0.0, float("inf")],
    torch_dtype="bfloat16",
    vocab_size=131072,
)
H52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
V2_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
V2_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
NANO_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
H118 = "M-M-M-M*" + "-M-M-M-M-M*" * 9 + "-M-M-M-M-M-"


def dense(pattern, width, mamba_heads, hidden, **others):
    sizes = dict(hidden_size=width, mamba_num_heads=mamba_heads, intermediate_size=hidden)
    return DENSE | sizes | dict(hybrid_override_pattern=pattern) | others


MEMBERS = {  # config.json, and the parameters by its own sizes; * as NVIDIA publishes them
    "Nemotron-H 4B": (
        dense(H52, 3072, 112, 12288, attention_head_dim=128, time_step_rank=256),
        4_489_223_040,
    ),
    "Nemotron-H 8B *": (
        dense(H52, 4096, 128, 21504, attention_head_dim=128, time_step_rank=256),
        8_100_852_736,
    ),
    "Nemotron-H 56B": (
        dense(
            H118,
            8192,
            256,
            32768,
            attention_head_dim=128,
            time_step_rank=512,
            num_attention_heads=64,
            ssm_state_size=256,
        ),
        56_324_350_464,
    ),
    "Nano 9B v2": (
        dense(V2_9B, 4480, 128, 15680, head_dim=128, num_attention_heads=40, mamba_head_dim=80),
        8_888_227_328,
    ),
    "Nano 12B v2": (
        dense(V2_12B, 5120, 128, 20480, head_dim=128, num_attention_heads=40, mamba_head_dim=80),
        12_310_001_152,
    ),
    "Nemotron 3 Nano 4B": (
        dense(NANO_4B, 3136, 96, 12544, head_dim=128, num_attention_heads=40, mamba_head_dim=80),
        3_973_556_832,
    ),
    "Nemotron 3 Nano 30B *": (Config.preset("nano").to_hf(), 31_577_940_288),
    "Nemotron 3 Super *": (Config.preset("super").to_hf(), 120_668_707_840),
}


def parameters(config):
    return sum(row[2] for row in costs(config)[0])


def by_hand(g):
    """The same from the fields, written down independently of the modules."""
    d, heads = g["hidden_size"], g["num_attention_heads"] + g["num_key_value_heads"]
    h, k = g["mamba_num_heads"], g["conv_kernel"]
    inner = h * g["mamba_head_dim"]
    wide = inner + 2 * g["n_groups"] * g["ssm_state_size"]
    mamba = d * (inner + wide + h) + wide * k + wide + 3 * h + inner + inner * d
    attention = 2 * d * heads * g.get("head_dim", g.get("attention_head_dim"))
    each = {"M": mamba, "*": attention, "-": 2 * d * g["intermediate_size"]}
    if "n_routed_experts" in g:
        E, latent = g["n_routed_experts"], g["moe_latent_size"]
        each["E"] = E * d + E + 2 * E * (latent or d) * g["moe_intermediate_size"]
        each["E"] += 2 * d * g["moe_shared_expert_intermediate_size"] + 2 * d * (latent or 0)
    pattern = g["hybrid_override_pattern"]
    return sum(each[letter] + d for letter in pattern) + 2 * g["vocab_size"] * d + d


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_has_its_number_of_parameters(name):
    given, published = MEMBERS[name]
    assert parameters(Config.from_hf(given)) == by_hand(given) == published
    words = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
    listed = {k: v for k, v in given.items() if k != family.PATTERN}
    listed["layers_block_type"] = [words[x] for x in given[family.PATTERN]]
    assert Config.from_hf(listed) == Config.from_hf(given)


def test_the_dense_presets_are_the_releases():
    for preset, name in (("nemotron-h-8b", "Nemotron-H 8B *"), ("nano-9b-v2", "Nano 9B v2")):
        ours, theirs = Config.preset(preset), Config.from_hf(MEMBERS[name][0])
        assert replace(theirs, max_position_embeddings=ours.max_position_embeddings) == ours


def test_the_table_of_any_folder(tmp_path, capsys):
    given = MEMBERS["Nemotron-H 8B *"][0] | dict(quantization_config=dict(quant_algo="FP8"))
    (tmp_path / "config.json").write_text(json.dumps(given))
    model_py.main(["--hf", str(tmp_path)])
    of_the_folder = capsys.readouterr().out
    model_py.main(["--preset", "nemotron-h-8b"])
    assert of_the_folder.splitlines()[1:] == capsys.readouterr().out.splitlines()[1:]
    assert "8,100,852,736" in of_the_folder


# 2. The fields

TINY = Config(**SHARED, hybrid_override_pattern="M*E-", num_nextn_predict_layers=0)
GIVEN = TINY.to_hf()
# Every name that transformers' configuration takes, with a value unlike GIVEN's.
COMPUTED = dict(
    vocab_size=97,
    hidden_size=40,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=6,
    mamba_num_heads=4,
    mamba_head_dim=4,
    ssm_state_size=8,
    n_groups=4,
    conv_kernel=3,
    use_conv_bias=False,
    use_bias=True,
    chunk_size=16,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_latent_size=None,
    moe_intermediate_size=20,
    moe_shared_expert_intermediate_size=28,
    routed_scaling_factor=1.0,
    norm_topk_prob=False,
    n_group=2,
    topk_group=1,
    intermediate_size=48,
    mlp_bias=True,
    num_nextn_predict_layers=1,
    layer_norm_epsilon=1e-3,
    initializer_range=0.1,
    time_step_min=0.01,
    time_step_max=0.2,
    time_step_floor=0.01,
    max_position_embeddings=77,
    bos_token_id=5,
    eos_token_id=[6, 7],
    pad_token_id=8,
)
REFUSED = dict(
    attention_bias=True,
    attention_dropout=0.1,
    hidden_dropout=0.1,
    sliding_window=128,
    tie_word_embeddings=True,
    mlp_hidden_act="silu",
    mamba_hidden_act="gelu",
    mamba_proj_bias=True,
    n_shared_experts=2,
    residual_in_fp32=True,
    time_step_limit=[0.001, 1.0],
    layers_block_type=["moe", "mamba", "attention", "mlp"],
    mtp_layers_block_type=["moe"],
)
IRRELEVANT = dict(
    use_cache=(False, "a cache is the caller's choice"),
    num_logits_to_keep=(0, "of their generate"),
    output_router_logits=(True, "what a call returns, not what it computes"),
    output_hidden_states=(True, "the same"),
    output_attentions=(True, "the same"),
    return_dict=(False, "the same"),
    expand=(3, "d_inner is mamba_num_heads * mamba_head_dim"),
    use_mamba_kernels=(False, "which kernel, not which number"),
    mamba_ssm_cache_dtype=("float16", "of serving; the state is fp32 here"),
    moe_shared_expert_overlap=(True, "of a schedule"),
    rescale_prenorm_residual=(False, "of initial values"),
    transformers_version=("9", "who wrote it"),
    architectures=(["Other"], "a class's name; model_type decides"),
    dtype=("bfloat16", "tensors carry their own"),
    chunk_size_feed_forward=(2, "of other models"),
    is_encoder_decoder=(True, "of other models"),
    id2label=({"0": "A"}, "of classifiers"),
    label2id=({"A": 0}, "of classifiers"),
    problem_type=("regression", "of classifiers"),
)
# Names from elsewhere: of other loaders, or properties that are written as fields.
ELSEWHERE = {"hybrid_override_pattern", "mtp_hybrid_override_pattern", "mtp_num_layers"}


def fate(name, read=Config.from_hf):
    """What really becomes of a field: computed, refused or irrelevant, by trying the value
    above.
    """
    table = COMPUTED | REFUSED | {k: v for k, (v, _) in IRRELEVANT.items()}
    base = GIVEN | (dict(n_group=2, topk_group=2) if name == "topk_group" else {})
    change = {name: table[name]} | (dict(topk_group=2) if name == "n_group" else {})
    if name == "layer_norm_epsilon":
        base = {k: v for k, v in base.items() if k != "norm_eps"}
    try:
        return "irrelevant" if read(base | change) == read(base) else "computed"
    except ValueError as e:
        assert name in str(e), f"refused, but not by its name: {e}"
        return "refused"


def test_every_field_is_computed_refused_or_irrelevant():
    for table, want in ((COMPUTED, "computed"), (REFUSED, "refused"), (IRRELEVANT, "irrelevant")):
        assert {name: fate(name) for name in table} == dict.fromkeys(table, want)
    ours = {f.name for f in fields(Config)} - ELSEWHERE - {"rotary_base"}
    assert set(COMPUTED) == ours
    with pytest.raises(ValueError, match="mamba_rms_norm=True .unknown field"):
        Config.from_hf(GIVEN | dict(mamba_rms_norm=True))


@pytest.mark.parametrize("alias", family.ALIASES)
def test_another_name_is_the_same_field_and_may_not_contradict_it(alias):
    name = family.ALIASES[alias]
    table = COMPUTED | {k: v for k, (v, _) in IRRELEVANT.items()}
    other = table.get(name, REFUSED.get(name))
    without = {k: v for k, v in GIVEN.items() if k not in (name, "norm_eps")}
    if name == "time_step_limit" or name == "layers_block_type":
        with pytest.raises(ValueError, match=name):
            Config.from_hf(without | {alias: other})
        return
    assert Config.from_hf(without | {alias: other}) == Config.from_hf(without | {name: other})
    for one, two in ((other, GIVEN.get(name, 2)), (other, None), (None, other)):
        with pytest.raises(ValueError, match=f"{alias}=.*contradicts {name}="):
            Config.from_hf(without | {name: one, alias: two})


@pytest.mark.parametrize("letter", family.REQUIRED)
def test_a_field_is_required_exactly_where_its_letter_stands(letter):
    names = family.REQUIRED[letter]
    lone = next(x for x in "M-" if x != letter)
    for name in names:
        for missing in ({k: v for k, v in GIVEN.items() if k != name}, GIVEN | {name: None}):
            Config.from_hf(missing | dict(hybrid_override_pattern=lone, num_hidden_layers=1))
        lacking = {k: v for k, v in GIVEN.items() if k != name}
        with pytest.raises(ValueError, match=f"lacks .*{name}"):
            Config.from_hf(lacking | dict(hybrid_override_pattern=letter, num_hidden_layers=1))
        with pytest.raises(ValueError, match=f"lacks .*{name}"):  # of the MTP block too
            Config.from_hf(
                lacking
                | dict(hybrid_override_pattern=lone, num_hidden_layers=1)
                | dict(mtp_hybrid_override_pattern=letter, num_nextn_predict_layers=1)
            )


def test_what_a_file_says_of_a_letter_that_is_not_there_comes_back():
    for lone in "M*-":
        config = replace(TINY, hybrid_override_pattern=lone, norm_topk_prob=False)
        assert Config.from_hf(config.to_hf()) == config
        zeros = dict(n_routed_experts=0, num_experts_per_tok=None, n_shared_experts=0)
        Config.from_hf(config.to_hf() | zeros)  # as dense files may say it
    with pytest.raises(ValueError, match="n_shared_experts=0"):
        Config.from_hf(GIVEN | dict(n_shared_experts=0))


# 3. Groups of experts


@given(st.data())
@settings(max_examples=60)
def test_choosing_in_groups_is_its_definition(data):
    groups, each = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 5))
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, kept * each))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    score = torch.randn(7, groups * each, dtype=torch.float64, generator=g)
    for row, got in zip(score.tolist(), latent_moe.choose(score, k, groups, kept).tolist()):
        worth = [sum(sorted(row[i * each : (i + 1) * each])[-2:]) for i in range(groups)]
        best = sorted(range(groups), key=lambda i: -worth[i])[:kept]
        allowed = [e for e in range(len(row)) if e // each in best]
        assert got == sorted(allowed, key=lambda e: -row[e])[:k]


def test_a_group_that_cannot_be_is_refused():
    for groups, kept, k in ((3, 1, 2), (0, 1, 2), (4, 5, 2), (4, 0, 2), (4, 1, 3), (8, 8, 2)):
        with pytest.raises(ValueError, match=f"best of {groups} groups of 8 experts"):
            latent_moe.LatentMoE(4, 8, k, 4, 4, groups=groups, kept=kept)


# 4. The numbers, against transformers


def build(config, seed):
    model = Nemotron(config).eval()
    shake(model, seed, config.num_hidden_layers)
    return model


def far(got, want):
    """The largest difference, relative to the largest number; NaN is not <= anything."""
    return float((got - want).abs().max() / want.abs().max())


def ask(dir, configs):
    """What transformers says to models of these configs: [(our model, ids, answers, folder)]."""
    if not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed: nothing to compare with")
    models, jobs = [build(config, seed) for seed, config in enumerate(configs)], []
    for i, model in enumerate(models):
        g = torch.Generator().manual_seed(i)
        ids = torch.randint(model.config.vocab_size, (2, 5 + 3 * (i % 6)), generator=g)
        hf.save(model, dir / str(i) / "ours")
        config = model.config.to_hf()
        jobs.append(dict(name=str(i), ids=ids.tolist(), config=config, greedy=False))
    (dir / "jobs.json").write_text(json.dumps(jobs))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(HF_HUB_OFFLINE="1")
    oracle = Path(__file__).with_name("oracle_transformers.py")
    run = subprocess.run(
        [sys.executable, oracle, dir], cwd=dir, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = load_file(dir / "answers.safetensors")
    return [
        (model, torch.tensor(job["ids"]), answers, dir / job["name"])
        for model, job in zip(models, jobs)
    ]


@torch.no_grad()
def shaken(folder, ids):
    """How far fp64's own logits move if every weight moves by half a unit of fp32's last place."""
    model = hf.load(folder, dtype=torch.float64)
    before, g = model(ids), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.mul_(1 + 2.0**-24 * (2 * torch.rand(p.shape, generator=g, dtype=p.dtype) - 1))
    return far(model(ids), before)


@torch.no_grad()
def compare(world, undefined=0):
    """Logits there and back, and the largest relative difference of all: within 1e-5. Of a
    search's models, `undefined` may norm a group that is nearly zero, so that nobody's fp32 defines
    their logits to 1e-5: fp64 says which, and then they are within what fp64 itself moves by.
    """
    worst = 0.0
    for model, ids, answers, dir in world:
        back = hf.load(dir / "ours")
        assert back.config == model.config
        theirs = [answers[f"{dir.name}.ours"]] * 2 + [answers[f"{dir.name}.theirs"]] * 2
        ours = model, back, hf.load(dir / "theirs"), hf.load(dir / "stacked")
        found = [far(m(ids), want) for m, want in zip(ours, theirs)]
        if max(found) > 1e-5:
            undefined -= 1
            assert undefined >= 0, (model.config, found)
            assert max(found) <= shaken(dir / "theirs", ids), (model.config, found)
        else:
            worst = max(worst, *found)
    return worst


EACH = [  # one of every generation
    dict(hybrid_override_pattern="M-*-M"),
    dict(hybrid_override_pattern="M-*E", use_bias=True, mlp_bias=True, use_conv_bias=False),
    dict(hybrid_override_pattern="MEM*E", moe_latent_size=None),
    dict(n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=5),
    dict(n_routed_experts=12, n_group=6, topk_group=3, num_experts_per_tok=6, mlp_bias=True),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return ask(tmp_path_factory.mktemp("family"), [replace(TINY, **kw) for kw in EACH])


def test_one_of_every_generation_is_transformers_model(world):
    print(f"\nlargest difference {compare(world):.1e}", end=" ")


def test_the_tables_above_name_all_that_transformers_takes(world):
    names = set(json.loads((world[0][3].parent / "names.json").read_text()))
    listed = {*COMPUTED, *REFUSED, *IRRELEVANT, *ELSEWHERE, *family.ALIASES}
    assert names - listed == set(), "new fields: say what becomes of them"


@st.composite
def configs(draw):
    """A small member of any generation, at awkward sizes."""
    one = lambda *choices: draw(st.sampled_from(choices))
    groups, kv, n_group, each = one(1, 2, 4), one(1, 2, 3), one(1, 1, 2, 3, 4), one(2, 3, 5)
    topk_group = draw(st.integers(1, n_group))
    few = draw(st.booleans())
    k = draw(st.integers(2, min(topk_group * each, 3 if few else 99)))
    return replace(
        TINY,
        hybrid_override_pattern=draw(st.text(one("M*-", "M*E", "M*E-"), min_size=1, max_size=6)),
        hidden_size=one(12, 32, 40),
        num_attention_heads=kv * one(1, 3),
        num_key_value_heads=kv,
        head_dim=one(4, 6, 16),
        mamba_num_heads=groups * one(1, 2, 3),
        mamba_head_dim=one(3, 8),
        ssm_state_size=one(4, 16),
        n_groups=groups,
        conv_kernel=one(2, 3, 4),
        use_conv_bias=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        chunk_size=one(3, 8, 64),
        n_routed_experts=n_group * each,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=k,
        moe_latent_size=one(None, 8, 10),
        moe_intermediate_size=one(12, 24),
        moe_shared_expert_intermediate_size=one(14, 40),
        routed_scaling_factor=one(1.0, 2.5),
        norm_topk_prob=draw(st.booleans()),
        intermediate_size=one(20, 56),
        layer_norm_epsilon=one(1e-5, 1e-3),
    )


@pytest.mark.slow
@given(found=st.lists(configs(), min_size=40, max_size=40))
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
def test_any_small_member_is_transformers_model(tmp_path_factory, found):
    print(f"\nlargest difference {compare(ask(tmp_path_factory.mktemp('search'), found), 1):.1e}")


@torch.no_grad()
def test_this_file_can_fail(world, monkeypatch):
    model, ids, answers, dir = world[3]  # grouped experts
    plain = build(replace(model.config, n_group=1, topk_group=1), 3)
    assert far(plain(ids), answers[f"{dir.name}.ours"]) > 1e-3  # groups left out
    model, ids, answers, dir = world[1]  # biases
    silent = hf.load(dir / "ours")
    for name, p in silent.named_parameters():
        if name.endswith("_proj.bias"):
            p.zero_()
    assert far(silent(ids), answers[f"{dir.name}.ours"]) > 1e-3
    ignorant = lambda given: Config.from_hf({k: v for k, v in given.items() if k != "mlp_bias"})
    assert fate("mlp_bias", ignorant) == "irrelevant"
    assert by_hand(MEMBERS["Nano 9B v2"][0] | dict(mamba_head_dim=64)) != 8_888_227_328
