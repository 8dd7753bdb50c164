"""
model.py: the sizes are the published ones, attention is a softmax without positions, the cache
changes nothing, and every weight is written, named, typed and taught as it should be.

Where a router decides, fp32 rounding may flip a near-tie: random search is in fp64 (1e-10), fixed
seeds in fp32 (1e-5).
"""

import json
import math
import time
from dataclasses import replace as changed

import pytest
import torch
from conftest import rms
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import AWKWARD
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mtp
from attention import KV, Attention
from config import Config
from latent_moe import LatentMoE
from model import Block, Nemotron, costs, init_weights, main

SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def tiny(pattern="ME*-MEM*E", dtype=torch.float64, seed=0, std=0.2, **kw):
    """Awkward sizes, and weights large enough that every mixer matters."""
    model = (
        Nemotron(
            Config(
                **{
                    **AWKWARD,
                    "hybrid_override_pattern": pattern,
                    "initializer_range": std,
                    "num_nextn_predict_layers": 0,
                    **kw,
                }
            ),
            seed,
        )
        .to(dtype)
        .eval()
    )
    for name, p in model.named_parameters():
        if name.endswith("dt_bias"):
            p.data += 3
    return model


def text(b, t, v=31, seed=0):
    return torch.randint(v, (b, t), generator=torch.Generator().manual_seed(seed))


# ---- sizes


def totals(preset):
    rows, mtp_row, _ = costs(Config.preset(preset))
    total, active = (sum(r[i] for r in rows) for i in (2, 3))
    embedding = next(r[2] for r in rows if r[0] == "embedding")
    return total, active, active - embedding, mtp_row and mtp_row[2], mtp_row and mtp_row[3]


def test_super_and_nano_to_the_last_parameter():
    assert totals("super") == (
        120_668_707_840,
        12_770_237_440,
        12_233_366_528,
        2_942_325_248,
        244_863_488,
    )
    assert totals("nano") == (31_577_940_288, 3_580_076_352, 3_227_754_816, None, None)


def test_super_layer_by_layer():
    with torch.device("meta"):
        model = Nemotron(Config.preset("super"))
    size = lambda module: sum(v.numel() for v in module.state_dict().values())
    one = {letter: model.backbone.layers[SUPER.index(letter)] for letter in "M*E"}
    assert {k: size(b) for k, b in one.items()} == {
        "M": 109_640_064,
        "*": 35_655_680,
        "E": 2_873_102_848,
    }
    assert size(one["E"].mixer.experts) == 512 * 5_505_024
    assert size(one["E"]) - size(one["E"].mixer.experts) == 54_530_560
    assert (
        size(model) == 123_611_033_088
        and size(model.mtp) == 2_942_325_248
        and size(model.backbone.norm_f) == 4096
    )
    rows = {r[0][0]: r for r in costs(model.config)[0]}
    assert rows["M"][1:4] == (40, 4_385_602_560, 4_385_602_560) and rows["*"][1:4] == (
        8,
        285_245_440,
        285_245_440,
    )
    assert rows["E"][1:4] == (40, 114_924_113_920, 40 * 175_641_088)


def test_patterns():
    c = Config.preset("super")
    assert c.hybrid_override_pattern == SUPER and c.num_hidden_layers == 88
    assert [i for i, x in enumerate(SUPER) if x == "*"] == [7, 16, 25, 36, 47, 58, 69, 78]
    assert SUPER.count("E") == SUPER.count("M") == 40
    assert (
        SUPER == "MEMEMEM*E" * 3 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME"
    )  # as the report draws it
    c = Config.preset("nano")
    assert c.hybrid_override_pattern == NANO and c.num_hidden_layers == 52
    assert [i for i, x in enumerate(NANO) if x == "*"] == [5, 12, 19, 26, 33, 42]
    assert Config.preset("tiny-nv").hybrid_override_pattern == "MEM*EME"
    assert (
        Config.preset("super").mtp_hybrid_override_pattern == "*E"
        and SUPER in __import__("model").__doc__
    )


def test_tiny_nv_and_the_smaller_presets():
    total, active, _, block, _ = totals("tiny-nv")
    both = 2 * 131_072 * 256
    assert (
        total - both == 8_510_072 and active - both == 4_381_304 and block == 2_364_688
    )  # 8.51 M, 4.38 M, 2.36 M
    assert 0.45e9 < totals("small")[0] < 0.6e9  # "half a billion"
    assert (
        set(Config.preset("toy").hybrid_override_pattern) == set("M*E") and totals("toy")[0] < 5e6
    )


@pytest.mark.parametrize("preset", ["toy", "tiny-nv"])
def test_costs_are_those_of_the_built_model(preset):
    model = Nemotron(Config.preset(preset))
    total, active, _, block, _ = totals(preset)
    assert total + block == sum(v.numel() for v in model.state_dict().values())
    c, experts = (
        model.config,
        sum(v.numel() for n, v in model.backbone.state_dict().items() if ".experts." in n),
    )
    assert (
        active
        == total - experts * (c.n_routed_experts - c.num_experts_per_tok) // c.n_routed_experts
    )


def test_flops_are_those_the_counter_sees():
    """PyTorch counts what runs: whole squares of attention (so `context` is 2t here) and whole
    chunks of the scan.

    1 %: costs leaves out the weighted sum over k experts; the counter sees matmuls and convolutions
    only, and the short convolution (0.5 % here) only if it runs as one. Attention and experts are
    put on paths that the counter knows.
    """
    c = Config.preset("toy")
    model, t = Nemotron(c).eval(), 4 * c.chunk_size
    for m in model.modules():
        if isinstance(m, LatentMoE):
            m.experts.mm = lambda x, w, count: torch.cat(
                [r @ we.T for r, we in zip(x.split(count.tolist()), w)]
            )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(text(2, t, c.vocab_size))
    assert sum(r[4] for r in costs(c, 2 * t)[0]) == pytest.approx(
        counter.get_total_flops() / (2 * t), rel=1e-2
    )
    at = lambda context: sum(r[4] for r in costs(c, context)[0])
    assert (
        at(2048) - at(1024) == 4 * 4 * 32 * 512
    )  # q k^T and p v: 2 FLOPs each, a mean of context/2 keys


def test_cache_bytes_are_those_of_the_tensors():
    c = Config.preset("tiny-nv")
    model, (_, _, cost) = Nemotron(changed(c, vocab_size=64)).eval(), costs(c)
    cache = model.new_cache(2)
    model(text(2, 70, 64), cache)
    kv = [x for x in cache.layers if isinstance(x, KV)]
    states = [x for x, letter in zip(cache.layers, c.hybrid_override_pattern) if letter == "M"]
    assert (
        sum(2 * x.used * n.shape[1] * n.shape[3] for x in kv for n in (x.k, x.v)) == 70 * cost["kv"]
    )  # bf16
    assert sum(4 * x.S[0].numel() + 2 * x.conv[0].numel() for x in states) == cost["state"]
    assert all(x.S.dtype == torch.float32 for x in states)
    assert [x is None for x in cache.layers] == [x == "E" for x in "MEM*EME"]
    rows, _, cost = costs(Config.preset("super"))
    assert cost == dict(kv=8 * 2 * 2 * 2 * 128, state=40 * (4_194_304 + 2 * 3 * 10_240))


def test_the_command_prints_the_totals(capsys):
    before = time.process_time()  # of the processor: other jobs may hold the clock
    main(["--preset", "super"])
    said, took = capsys.readouterr().out, time.process_time() - before
    for number in (
        "120,668,707,840",
        "12,770,237,440",
        "12,233,366,528",
        "2,942,325,248",
        "123,611,033,088",
        "8,192",
        SUPER,
    ):
        assert number in said, number
    assert took < 20


@pytest.mark.parametrize(
    "argv,words",
    [(["--preset", "huge"], ["huge", "toy", "super"]), (["--pre", "toy"], ["--pre"])],
    ids=["no such preset", "no abbreviations"],
)
def test_the_command_refuses(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in said for word in words), said


# ---- Config


@pytest.mark.parametrize(
    "kw,words",
    [
        (dict(hybrid_override_pattern="MEXM"), ["hybrid_override_pattern", "MEXM", "X"]),
        (dict(hybrid_override_pattern=""), ["hybrid_override_pattern"]),
        (dict(mtp_hybrid_override_pattern="*e"), ["mtp_hybrid_override_pattern", "e"]),
        (dict(n_groups=7), ["mamba_num_heads=128", "n_groups=7"]),
        (dict(num_key_value_heads=5), ["num_attention_heads=32", "num_key_value_heads=5"]),
        (dict(num_experts_per_tok=513), ["513", "512"]),
        (dict(num_experts_per_tok=0), ["num_experts_per_tok: 0 is not an integer from 1"]),
    ],
)
def test_config_refuses(kw, words):
    with pytest.raises(ValueError) as e:
        Config(**kw)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_config_is_frozen_and_presets_are_known():
    with pytest.raises(AttributeError):
        Config.preset("toy").hidden_size = 3
    with pytest.raises(ValueError, match="'mega'.*super"):
        Config.preset("mega")


RELEASED = json.loads("""{"architectures": ["NemotronHForCausalLM"], "attention_bias": false,
"attention_dropout": 0.0,
    "bos_token_id": 1, "chunk_size": 128, "conv_kernel": 4, "dtype": "bfloat16",
    "eos_token_id": 2, "expand": 2,
    "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 2688,
    "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu",
    "mamba_num_heads": 128,
    "mamba_proj_bias": false, "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144,
    "mlp_bias": false, "mlp_hidden_act": "relu2", "model_type": "nemotron_h",
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024, "moe_shared_expert_intermediate_size": 5376,
    "moe_shared_expert_overlap": false,
    "mtp_hybrid_override_pattern": "*E", "n_group": 1, "n_groups": 8, "n_routed_experts": 512,
    "n_shared_experts": 1,
    "norm_eps": 1e-05, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts_per_tok": 22,
    "num_hidden_layers": 88, "num_key_value_heads": 2, "num_logits_to_keep": 1,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0, "partial_rotary_factor": 1.0, "rescale_prenorm_residual": true,
    "residual_in_fp32": false,
    "rope_theta": 10000, "routed_scaling_factor": 5.0, "sliding_window": null,
    "ssm_state_size": 128,
    "tie_word_embeddings": false, "time_step_floor": 0.0001, "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1, "transformers_version": "4.57.6", "use_bias": false, "use_cache": true,
    "use_conv_bias": true,
    "use_mamba_kernels": true, "vocab_size": 131072}""") | {"hybrid_override_pattern": SUPER}


def test_the_released_config_is_the_preset():
    assert Config.from_hf(RELEASED) == changed(
        Config.preset("super"), initializer_range=0.02
    )  # the one known departure
    words = {"M": "mamba", "*": "attention", "E": "moe"}
    newer = {k: v for k, v in RELEASED.items() if "pattern" not in k}
    newer |= dict(
        layers_block_type=[words[x] for x in SUPER], mtp_layers_block_type=["attention", "moe"]
    )
    assert Config.from_hf(newer) == Config.from_hf(RELEASED)
    for name in ("super", "nano", "toy"):
        c = Config.preset(name)
        back = Config.from_hf(json.loads(json.dumps(c.to_hf())))
        assert back == c
        assert set(RELEASED) - set(c.to_hf()) <= {
            "moe_shared_expert_overlap",
            "transformers_version",
            "rope_theta",
            "partial_rotary_factor",
        }


@pytest.mark.parametrize(
    "kw,words",
    [
        (dict(attention_bias=True), ["attention_bias=True"]),
        (dict(n_group=3), ["n_routed_experts=512", "n_group=3"]),
        (dict(n_group=4, topk_group=5), ["topk_group=5", "n_group=4"]),
        (dict(n_group=64, topk_group=2), ["num_experts_per_tok=22", "topk_group=2", "16"]),
        (dict(n_group=512, topk_group=512), ["n_group=512", "one expert"]),
        (dict(mamba_proj_bias=True), ["mamba_proj_bias=True"]),
        (dict(rms_norm_eps=1e-6), ["rms_norm_eps=1e-06", "layer_norm_epsilon=1e-05"]),
        (dict(attention_head_dim=64), ["attention_head_dim=64", "head_dim=128"]),
        (dict(layers_block_type=["moe"] * 88), ["E" * 88, "layers_block_type", SUPER]),
        (dict(mtp_layers_block_type=["moe"]), ["mtp_layers_block_type", "*E"]),
        (dict(layers_block_type="mamba"), ["layers_block_type='mamba'", "list of words"]),
        (dict(hybrid_override_pattern=7), ["hybrid_override_pattern=7", "letters"]),
        (dict(tie_word_embeddings=True), ["tie_word_embeddings"]),
        (dict(time_step_limit=[0.001, 1e9]), ["time_step_limit"]),
        (dict(rope_scaling={"type": "yarn"}), ["rope_scaling"]),
        (dict(mlp_hidden_act="silu"), ["mlp_hidden_act", "relu2"]),
        (dict(hybrid_override_pattern=None, layers_block_type=["mamba", "rwkv"]), ["rwkv"]),
        (dict(num_hidden_layers=52), ["num_hidden_layers=52", "88"]),
        (dict(model_type="mamba2"), ["mamba2"]),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused_by_name(kw, words):
    given_ = {k: v for k, v in {**RELEASED, **kw}.items() if k != "hybrid_override_pattern" or v}
    with pytest.raises(ValueError) as e:
        Config.from_hf(given_)
    assert all(w in str(e.value) for w in words), str(e.value)


def test_the_mild_forms_are_accepted():
    assert Config.from_hf({**RELEASED, "time_step_limit": [0.0, math.inf]}) == Config.from_hf(
        RELEASED
    )


def test_attention_alone_is_blind_to_order_and_mamba_is_not():
    """NoPE: the last token's output cannot tell in which order one attention layer's earlier tokens
    came.
    """
    ids = text(1, 12)
    other = torch.cat(
        [ids[:, torch.randperm(11, generator=torch.Generator().manual_seed(1))], ids[:, 11:]], 1
    )
    assert not torch.equal(ids, other)
    blind, knows, two = tiny("*"), tiny("M*"), tiny("**")
    assert rms(blind(other)[:, -1], blind(ids)[:, -1]) <= 1e-12
    assert (
        rms(knows(other)[:, -1], knows(ids)[:, -1]) > 1e-2
        and rms(two(other)[:, -1], two(ids)[:, -1]) > 1e-4
    )


# ---- the whole


def rmsnorm(x, weight, eps=1e-5):
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("pattern", ["ME*-", "*", "E", "-", "MEM*EME"])
def test_the_stack_is_its_equation(pattern):
    """Embedding unscaled, one pre-norm and one residual a layer, one last norm, an untied head."""
    model, ids = tiny(pattern), text(2, 9)
    w = dict(model.named_parameters())
    x = w["backbone.embeddings.weight"][ids]
    for i, layer in enumerate(model.backbone.layers):
        u = rmsnorm(x, w[f"backbone.layers.{i}.norm.weight"])
        if pattern[i] == "-":
            a = u @ w[f"backbone.layers.{i}.mixer.up_proj.weight"].T
            x = x + (a * a * (a > 0)) @ w[f"backbone.layers.{i}.mixer.down_proj.weight"].T
        else:
            x = x + layer.mixer(u)
    h = rmsnorm(x, w["backbone.norm_f.weight"])
    assert (
        rms(model.hidden(ids), h) <= 1e-12 and rms(model(ids), h @ w["lm_head.weight"].T) <= 1e-12
    )
    assert (
        type(layer) is Block
        and w["lm_head.weight"].data_ptr() != w["backbone.embeddings.weight"].data_ptr()
    )


def pieces_through(model, ids, pieces):
    cache = model.new_cache(len(ids))
    return torch.cat([model(piece, cache) for piece in ids.split(pieces, 1)], 1), cache


def same_cache(a, b, rows=slice(None), tolerance=1e-10):
    """Every tensor: states whole, keys and values up to what each row has read."""
    for x, y in zip(a.layers, b.layers):
        if isinstance(x, KV):
            assert x.length[rows].tolist() == y.length.tolist()
            for i, n in zip(range(len(x.length))[rows], y.length.tolist()):
                j = i - range(len(x.length))[rows][0]
                assert (
                    rms(x.k[i, :, :n], y.k[j, :, :n]) <= tolerance
                    and rms(x.v[i, :, :n], y.v[j, :, :n]) <= tolerance
                )
        elif x is not None:
            assert rms(x.S[rows], y.S) <= tolerance and rms(x.conv[rows], y.conv) <= tolerance


patterns = st.text("ME*-", min_size=1, max_size=5)
shapes = st.fixed_dictionaries(
    dict(
        hidden_size=st.integers(1, 9),
        head_dim=st.integers(1, 5),
        mamba_head_dim=st.integers(1, 5),
        ssm_state_size=st.integers(1, 5),
        chunk_size=st.integers(1, 9),
        conv_kernel=st.integers(2, 4),
        use_conv_bias=st.booleans(),
        moe_latent_size=st.sampled_from([None, 3, 4]),
        num_experts_per_tok=st.integers(2, 8),
    )
)
heads = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


def random_model(pattern, kw, n, seed):
    return tiny(
        pattern,
        seed=seed,
        n_groups=n[0],
        mamba_num_heads=n[0] * n[1],
        num_key_value_heads=n[2],
        num_attention_heads=n[2] * n[3],
        **kw,
    )


@settings(max_examples=40)
@given(
    patterns, shapes, heads, st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99)
)
def test_any_partition_of_any_model_gives_the_whole(pattern, kw, n, pieces, seed):
    model, ids = random_model(pattern, kw, n, seed), text(2, sum(pieces), seed=seed)
    got, cache = pieces_through(model, ids, pieces)
    assert rms(got, model(ids)) <= 1e-9
    same_cache(cache, pieces_through(model, ids, ids.shape[1])[1], tolerance=1e-9)


@settings(max_examples=30)
@given(
    patterns,
    shapes,
    heads,
    st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(0, 2),
    st.integers(0, 99),
)
def test_unequal_rows_are_what_each_row_is_alone(pattern, kw, n, rounds, even, seed):
    """Perhaps some rounds in step first, then right-padded ones, then decoding in step again: as
    each row alone.
    """
    model, r = random_model(pattern, kw, n, seed), torch.Generator().manual_seed(seed)
    cache, alone = model.new_cache(3), [model.new_cache(1) for _ in range(3)]
    rounds = [[2, 2, 2]] * even + rounds + [[1, 1, 1]] * 2
    for i, counts in enumerate(rounds):
        ids = torch.randint(31, (3, max(*counts, 1)), generator=r)
        in_step = i < even or i >= len(rounds) - 2
        y = model(ids, cache, None if in_step else torch.tensor(counts))
        for row, c in enumerate(counts):
            if c:
                assert (
                    rms(y[row : row + 1, :c], model(ids[row : row + 1, :c], alone[row])) <= 1e-9
                ), (i, row)
    for row in range(3):
        same_cache(cache, alone[row], slice(row, row + 1), 1e-9)


@pytest.mark.parametrize("pieces", [[40, 40, 1, 1, 200, 18], [63, 1, 1, 64, 1, 170], [1, 299]])
@pytest.mark.parametrize("ragged", [False, True])
def test_keys_survive_a_growing_buffer(pieces, ragged):
    model, ids, out = tiny("**"), text(2, 300), []
    cache = model.new_cache(2)
    for piece in ids.split(pieces, 1):
        out.append(model(piece, cache, torch.tensor([piece.shape[1]] * 2) if ragged else None))
    assert rms(torch.cat(out, 1), model(ids)) <= 1e-10


@pytest.mark.parametrize(
    "pieces", [[1] * 60, [60], [31, 29], [1, 58, 1], [32] + [1] * 28, [7, 3, 40, 10], [59, 1]]
)
def test_fp32_partitions(pieces):
    model, ids = Nemotron(Config.preset("toy")).eval(), text(3, 60, 2048)
    with torch.no_grad():
        assert rms(pieces_through(model, ids, pieces)[0], model(ids)) <= 1e-5


def test_fp32_unequal_prompts_then_decoding():
    model, ids, lengths = Nemotron(Config.preset("toy")).eval(), text(3, 60, 2048), [40, 1, 17]
    cache, count = model.new_cache(3), torch.tensor(lengths)
    with torch.no_grad():
        prompt = ids[:, :40] * (
            torch.arange(40) < count[:, None]
        )  # padded with zeros, which are tokens too
        y = model(prompt, cache, count)
        want = [model(row[None, : n + 12])[0] for row, n in zip(ids, lengths)]
        for row, n in enumerate(lengths):
            assert rms(y[row, :n], want[row][:n]) <= 1e-5
        for step in range(12):
            y = model(
                torch.stack([ids[row, n + step] for row, n in enumerate(lengths)])[:, None], cache
            )
            for row, n in enumerate(lengths):
                assert rms(y[row, 0], want[row][n + step]) <= 1e-5, (step, row)


@pytest.mark.parametrize("even", [True, False])
def test_dropping_keys_and_values_moves_no_data(even):
    """What lies beyond a row's length is never looked at, so dropped tokens may stay where they
    are.
    """
    model, ids = tiny("*"), text(2, 9)
    cache = model.new_cache(2)
    model(ids[:, :6], cache, None if even else torch.tensor([6, 6]))
    cache.layers[0].drop(2 if even else torch.tensor([2, 2]))
    assert rms(model(ids[:, 4:], cache), model(ids)[:, 4:]) <= 1e-10


@pytest.mark.parametrize("count", [None, [6, 4]])
@pytest.mark.parametrize("drop", [0, 2, [2, 0], [1, 3]])
def test_after_dropping_each_row_is_its_own_prefix(count, drop):
    """Even rows or not, equal drops or not: then read on, in step and padded, past the buffer's
    end.
    """
    model, ids, rows = tiny("**"), text(2, 6), None
    cache = model.new_cache(2)
    model(ids, cache, count and torch.tensor(count))
    for layer in cache.layers:
        layer.drop(torch.tensor(drop) if isinstance(drop, list) else drop)
    kept = [
        (count or [6, 6])[row] - (drop[row] if isinstance(drop, list) else drop) for row in range(2)
    ]
    for seed, real in ((1, [2, 2]), (2, [3, 1]), (3, [70, 70])):
        new = text(2, max(real), seed=seed)
        y = model(new, cache, torch.tensor(real) if real[0] != real[1] else None)
        rows = [
            torch.cat([ids[row, : kept[row]], new[row, : real[row]]])
            if seed == 1
            else torch.cat([rows[row], new[row, : real[row]]])
            for row in range(2)
        ]
        for row in range(2):
            assert rms(y[row, : real[row]], model(rows[row][None])[0, -real[row] :]) <= 1e-10, (
                seed,
                row,
            )


def test_a_finished_row_may_rest_while_others_go_on():
    model, ids = tiny(), text(2, 20)
    cache = model.new_cache(2)
    model(ids[:, :5], cache)
    for i in range(5, 20):
        model(ids[:, i : i + 1], cache, torch.tensor([1, 0]))
    assert rms(model(ids[1:, 5:6].expand(2, 1), cache)[1], model(ids[1:, :6])[0, -1:]) <= 1e-10


def storage(cache, letters, pattern):
    tensors = [
        t
        for x, letter in zip(cache.layers, pattern)
        if letter in letters
        for t in vars(x).values()
        if torch.is_tensor(t)
    ]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_memory_beside_keys_and_values_does_not_grow():
    model = tiny("ME*-M*")
    cache, states, kv = model.new_cache(2), [], []
    for t in (3, 1, 200, 1, 1, 90, 1):
        model(text(2, t), cache)
        states.append(storage(cache, "M", "ME*-M*")), kv.append(storage(cache, "*", "ME*-M*"))
    assert len(set(states)) == 1 and cache.layers[1] is cache.layers[3] is None
    assert kv[-1] <= 3 * (
        2 * 2 * 2 * 297 * 2 * 5 * 8
    )  # two layers, k and v, 297 tokens: a doubling, no more


def test_a_cached_call_keeps_no_graph_and_another_batch_is_refused():
    model = tiny()
    cache = model.new_cache(2)
    assert not model.hidden(text(2, 4), cache).requires_grad and torch.is_grad_enabled()
    assert not any(
        t.requires_grad for x in cache.layers if x for t in vars(x).values() if torch.is_tensor(t)
    )
    with pytest.raises(ValueError, match="3.*2"):
        model(text(3, 4), cache)


def row_by_row(x, w, count):
    """grouped_mm one row at a time: a matrix product of many rows may round each of them by how
    many there are.
    """
    return (w.repeat_interleave(count, 0) @ x[..., None]).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_the_future_does_not_leak(dtype, seed):
    """Bit for bit, once experts work row by row; as they are, the future moves slab sizes and so
    last bits, no more.
    """
    c = Config.preset("toy")
    model, ids = Nemotron(c, seed).to(dtype).eval(), text(2, 75, c.vocab_size, seed)
    other = torch.cat([ids[:, :40], text(2, 35, c.vocab_size, 99)], 1)
    with torch.no_grad():
        assert (
            rms(model(other)[:, :40], model(ids)[:, :40])
            <= {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
        )
        for m in model.modules():
            if isinstance(m, LatentMoE):
                m.experts.mm = row_by_row
        y, z = model(ids), model(other)
    assert torch.equal(y[:, :40], z[:, :40]) and not torch.equal(y, z)


def test_rows_of_a_batch_do_not_meet():
    model, ids = tiny(), text(3, 9)
    other = torch.cat([ids[:1], text(2, 9, seed=5)])
    assert rms(model(other)[:1], model(ids)[:1]) <= 1e-12


def test_logits_are_fp32():
    ids = text(1, 4)
    assert (
        tiny()(ids).dtype == torch.float64
        and tiny(dtype=torch.bfloat16)(ids).dtype == torch.float32
    )
    model = tiny(dtype=torch.float32)
    assert model(ids).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).dtype == torch.float32 and model.hidden(ids).dtype == torch.float32
        assert rms(model(ids), tiny(dtype=torch.float32)(ids).detach()) <= 0.1


def test_decoding_under_autocast_keeps_the_states_in_fp32():
    model, ids = tiny(dtype=torch.float32, std=0.05), text(2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        got, cache = pieces_through(model, ids, [10, *[1] * 20])
    assert all(
        x.S.dtype == torch.float32 for x, letter in zip(cache.layers, "ME*-MEM*E") if letter == "M"
    )
    assert rms(got, model(ids)) <= 0.1


# ---- initialisation, names, types, gradients


def built(**kw):
    return Nemotron(Config(**{**AWKWARD, "hybrid_override_pattern": "ME*-", **kw}))


def test_every_number_is_written():
    model = built()
    want = {n: v.clone() for n, v in model.state_dict().items()}
    for v in model.state_dict().values():
        v.fill_(math.nan)
    for m in model.modules():
        if isinstance(m, LatentMoE):
            m.load.fill_(77)
    init_weights(model)
    for name, v in model.state_dict().items():
        assert v.isfinite().all() and torch.equal(v, want[name]), name
    assert all(not m.load.any() for m in model.modules() if isinstance(m, LatentMoE))


def test_the_seed_is_all_that_matters():
    a, b, c = (
        Nemotron(Config(**AWKWARD), 3),
        Nemotron(Config(**AWKWARD), 3),
        Nemotron(Config(**AWKWARD), 4),
    )
    torch.manual_seed(5)
    with torch.device("meta"):
        d = Nemotron(Config(**AWKWARD), 9)
    assert all(p.is_meta for p in d.parameters())
    d.to_empty(device="cpu")
    init_weights(d, 3)
    for name, v in a.state_dict().items():
        assert torch.equal(v, b.state_dict()[name]) and torch.equal(v, d.state_dict()[name]), name
        constant = v.ndim == 1 and not any(x in name for x in ("A_log", "dt_bias", "conv1d"))
        assert torch.equal(v, c.state_dict()[name]) == constant, name
    flat = [v.flatten()[:5] for v in a.state_dict().values() if v.ndim > 1]
    assert not any(
        torch.equal(x, y) for i, x in enumerate(flat) for y in flat[:i]
    )  # no two tensors alike


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    model = built()
    torch.manual_seed(0)
    init_weights(model)
    assert torch.equal(torch.rand(1), want)


def test_an_mtp_block_does_not_change_the_backbone():
    a, b = built(num_nextn_predict_layers=0), built(num_nextn_predict_layers=1)
    assert a.mtp is None and b.mtp is not None
    assert all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())
    assert torch.equal(a.eval()(text(1, 5)), b.eval()(text(1, 5)))


def test_statistics_of_every_kind():
    """N(0, .014), less by sqrt(layers) into the residual stream; dt in [1e-3, 1e-1], A in [1, 16],
    spread as told.
    """
    c = Config(
        **{
            **AWKWARD,
            "hybrid_override_pattern": "ME*-" * 4,
            "hidden_size": 96,
            "mamba_num_heads": 2001,
            "n_groups": 3,
            "mamba_head_dim": 1,
            "moe_latent_size": 64,
            "moe_intermediate_size": 48,
            "head_dim": 24,
            "vocab_size": 300,
            "moe_shared_expert_intermediate_size": 100,
            "intermediate_size": 100,
            "n_routed_experts": 80,
        }
    )
    seen = set()
    for name, v in Nemotron(c).state_dict().items():
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        seen.add(kind)
        if kind in ("o_proj", "out_proj", "down_proj", "fc2_latent_proj"):
            std = 0.014 / math.sqrt(16)
        elif kind in (
            "q_proj",
            "k_proj",
            "v_proj",
            "in_proj",
            "up_proj",
            "fc1_latent_proj",
            "gate",
            "embeddings",
            "lm_head",
            "eh_proj",
        ):
            std = 0.014
        elif kind == "A_log":
            A = v.double().exp()
            assert 1 <= A.min() < 1.1 and 15.9 < A.max() <= 16.001
            assert abs(A.mean() - 8.5) < 0.4 and abs((A < 4.75).double().mean() - 0.25) < 0.05
            continue
        elif kind == "dt_bias":
            dt = torch.nn.functional.softplus(v.double())
            assert 0.000999 < dt.min() < 0.0011 and 0.097 < dt.max() < 0.1001, name
            assert abs((dt < 0.01).double().mean() - 0.5) < 0.05, name
            continue
        elif "conv1d" in name:
            assert v.abs().max() <= 0.5 and abs(v.std() - 0.5 / 3**0.5) < 0.02, (
                name
            )  # U(-1/sqrt(4), 1/sqrt(4))
            continue
        elif kind == "e_score_correction_bias":
            assert not v.any()
            continue
        else:
            assert (
                kind in ("norm", "D", "norm_f", "enorm", "hnorm", "final_layernorm")
                and (v == 1).all()
            ), name
            continue
        assert abs(v.std() / std - 1) < 5 / math.sqrt(2 * v.numel()) + 1e-3, name
        assert abs(v.mean()) < 5 * std / math.sqrt(v.numel()), name
        assert v.abs().max() > 2.5 * std  # a normal, not a uniform
    assert {"gate", "eh_proj", "fc2_latent_proj", "embeddings", "lm_head", "A_log"} <= seen


def expected_names(c):
    """Section 11 of the fact sheet, with the experts stacked."""
    d, e = c.hidden_size, c.mamba_num_heads * c.mamba_head_dim
    w = e + 2 * c.n_groups * c.ssm_state_size
    h, l = c.mamba_num_heads, c.moe_latent_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    E, f, s = c.n_routed_experts, c.moe_intermediate_size, c.moe_shared_expert_intermediate_size
    mixers = {
        "M": {
            "in_proj.weight": (e + w + h, d),
            "conv1d.weight": (w, 1, c.conv_kernel),
            "conv1d.bias": (w,),
            "A_log": (h,),
            "D": (h,),
            "dt_bias": (h,),
            "norm.weight": (e,),
            "out_proj.weight": (d, e),
        },
        "*": {
            "q_proj.weight": (q, d),
            "k_proj.weight": (kv, d),
            "v_proj.weight": (kv, d),
            "o_proj.weight": (d, q),
        },
        "E": {
            "gate.weight": (E, d),
            "gate.e_score_correction_bias": (E,),
            "fc1_latent_proj.weight": (l, d),
            "fc2_latent_proj.weight": (d, l),
            "experts.up_proj": (E, f, l),
            "experts.down_proj": (E, l, f),
            "shared_experts.up_proj.weight": (s, d),
            "shared_experts.down_proj.weight": (d, s),
        },
        "-": {
            "up_proj.weight": (c.intermediate_size, d),
            "down_proj.weight": (d, c.intermediate_size),
        },
    }
    names = {
        "backbone.embeddings.weight": (c.vocab_size, d),
        "backbone.norm_f.weight": (d,),
        "lm_head.weight": (c.vocab_size, d),
    }
    for prefix, pattern in (
        ("backbone", c.hybrid_override_pattern),
        ("mtp", c.mtp_hybrid_override_pattern),
    ):
        for i, letter in enumerate(pattern):
            names[f"{prefix}.layers.{i}.norm.weight"] = (d,)
            names |= {
                f"{prefix}.layers.{i}.mixer.{n}": shape for n, shape in mixers[letter].items()
            }
    names |= {
        "mtp.layers.0.enorm.weight": (d,),
        "mtp.layers.0.hnorm.weight": (d,),
        "mtp.layers.0.eh_proj.weight": (d, 2 * d),
        "mtp.layers.1.final_layernorm.weight": (d,),
    }
    return names


@pytest.mark.parametrize("preset", ["toy", "super"])
def test_names_and_shapes_are_the_released_ones(preset):
    with torch.device("meta"):
        model = Nemotron(Config.preset(preset))
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()} == expected_names(
        model.config
    )
    if preset == "super":  # 42,683 tensors once the experts are split up
        assert sum(512 if ".experts." in n else 1 for n in model.state_dict()) == 42_683


def test_types():
    model = built()
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}
    assert {n.rsplit(".", 1)[-1] for n, b in model.named_buffers()} == {
        "e_score_correction_bias",
        "load",
    }
    assert {b.dtype for n, b in model.named_buffers() if n.endswith("load")} == {torch.int64}
    bias = [n for n, b in model.named_buffers() if n.endswith("bias")]
    assert bias == [
        "backbone.layers.1.mixer.gate.e_score_correction_bias",
        "mtp.layers.1.mixer.gate.e_score_correction_bias",
    ]


def test_everything_learns():
    """Main and MTP loss together reach every parameter, expert by expert where a token went. There
    is no exception.
    """
    model, ids = built().train(), text(4, 24)
    for _name, p in model.named_parameters():
        p.data *= 10 if p.ndim > 1 else 1
    x, targets = ids[:, :-1], ids[:, 1:]
    mask, h = torch.ones_like(targets).bool(), model.hidden(x)
    parts = mtp.loss(model.mtp, h, targets, mask, model.backbone.embeddings, model.logits)
    assert len(parts) == 2
    deeper = sum(s / n for s, n in zip(parts, mtp.counts(mask, 2)[1:]))
    (mtp.nll(model.logits(h), targets, mask) / 92 + 0.15 * deeper).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    for m in model.modules():
        if isinstance(m, LatentMoE):
            learns = m.experts.up_proj.grad.flatten(1).any(1) & m.experts.down_proj.grad.flatten(
                1
            ).any(1)
            assert torch.equal(learns, m.load > 0) and m.load.sum() > 0
            assert m.balance.requires_grad
    assert model.backbone.layers[1].mixer.load.sum() == 4 * 23 * 3
    assert model.mtp.layers[1].mixer.load.sum() == 2 * 4 * 23 * 3
    without = [n for n, p in built().named_parameters() if not n.startswith("mtp")]
    model.zero_grad()
    mtp.nll(model.logits(model.hidden(x)), targets, mask).backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == without


def test_the_mtp_block_reads_the_normalised_state_and_shares_embedding_and_head():
    model = built()
    ids = text(2, 9)
    h = model.hidden(ids[:, :-1])
    assert abs(h.square().mean() - 1) < 0.05  # after norm_f, whose weight is one here
    parts = mtp.loss(
        model.mtp,
        h.detach(),
        ids[:, 1:],
        torch.ones(2, 8).bool(),
        model.backbone.embeddings,
        model.logits,
    )
    sum(parts).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n in reached if not n.startswith("mtp")} == {
        "backbone.embeddings.weight",
        "lm_head.weight",
    }
    assert isinstance(model.mtp.layers[1].mixer, LatentMoE) and isinstance(
        model.mtp.layers[0].mixer, Attention
    )


@pytest.mark.parametrize(
    "kw",
    [
        dict(layer_norm_epsilon=0.5),
        dict(routed_scaling_factor=7.0),
        dict(norm_topk_prob=False),
        dict(num_experts_per_tok=2),
        dict(use_conv_bias=False),
        dict(conv_kernel=3),
    ],
)
def test_every_knob_is_connected(kw):
    ids, at = text(2, 9), Config(**AWKWARD)
    assert rms(tiny(**kw)(ids), tiny(**{k: getattr(at, k) for k in kw})(ids)) > 1e-3
    model = built(layer_norm_epsilon=0.25, mtp_num_layers=3, chunk_size=6)
    assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {0.25}
    assert model.mtp.depths == 3 and model.backbone.layers[0].mixer.chunk == 6


def test_two_stored_mtp_blocks():
    model, ids = built(num_nextn_predict_layers=2), text(1, 9)
    assert len(model.mtp.layers) == 4
    assert {"mtp.layers.2.eh_proj.weight", "mtp.layers.3.final_layernorm.weight"} <= set(
        model.state_dict()
    )
    h = model.hidden(ids[:, :-1])
    sum(
        mtp.loss(
            model.mtp,
            h,
            ids[:, 1:],
            torch.ones(1, 8).bool(),
            model.backbone.embeddings,
            model.logits,
        )
    ).backward()
    assert all(p.grad is not None for n, p in model.mtp.named_parameters())


def test_nano_has_no_latent_and_no_mtp():
    with torch.device("meta"):
        names = Nemotron(Config.preset("nano")).state_dict()
    assert not [n for n in names if "latent" in n or n.startswith("mtp")]
    assert names["backbone.layers.1.mixer.experts.up_proj"].shape == (128, 1856, 2688)


def test_first_numbers_follow_the_width():
    """0.9 / sqrt(d): what both recipes state at their widths, and what --model's own width gets."""
    from config import initial_std
    from training.settings import Run, configure

    assert (initial_std(4096), initial_std(2688)) == (0.014, 0.0173)
    assert Config.preset("super").initializer_range == 0.014
    assert Config.preset("nano").initializer_range == 0.0173
    for width in (64, 128, 768):
        assert initial_std(width) == pytest.approx(0.9 / width**0.5, rel=0.01)
    changed = configure(Run(model="hidden_size=64"), 300)
    assert changed.initializer_range == initial_std(64) != Config.preset("toy").initializer_range
    said = configure(Run(model="hidden_size=64,initializer_range=0.04"), 300)
    assert said.initializer_range == 0.04


def test_this_file_can_fail():
    model, ids = tiny(), text(2, 12)
    want = model(ids)
    cache = model.new_cache(2)
    model(ids[:, :6], cache)
    cache.layers[0].S = torch.zeros_like(cache.layers[0].S)  # a lost state
    assert rms(model(ids[:, 6:], cache), want[:, 6:]) > 1e-3
    cache = model.new_cache(2)
    model(ids[:, :6], cache)
    cache.layers[2].v = cache.layers[2].v.roll(1, 2)  # values one token late
    assert rms(model(ids[:, 6:], cache), want[:, 6:]) > 1e-3
    cache = model.new_cache(2)
    model(ids[:, :6], cache)  # padding taken for text
    assert (
        rms(model(ids[:, 3:4], cache)[:, 0], model(torch.cat([ids[:, :3], ids[:, 3:4]], 1))[:, -1])
        > 1e-3
    )
