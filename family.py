"""
The family: one architecture, a dozen releases, and three generations of config.json that spell it.

    Nemotron-H 4B, 8B, 47B, 56B;  Nano 9B v2, 12B v2;  Nemotron 3 Nano 4B    letters M * -
    Nemotron 3 Nano 30B-A3B                      experts at full width         letters M * E
    Nemotron 3 Super 120B-A12B                   experts in a latent, and MTP  letters M * E

A field that is read is used, or the file is refused by the field's name: a model that was computed
without it would look right and be another model. So every field is one of

    a field of Config   computed                              ALIASES   the same under another name
    FIXED               only this value is computed           IGNORED   changes no number here
    REQUIRED            needed, if its letter stands in a pattern: no default would be right

and any other is unknown, which is a refusal too. Two spellings of one thing have to agree.

    read(dict, names of the fields)    config.json -> {field: value}

Not here  the fields' meaning, the presets: config.py. Tensors: census.py
Sources   the released config.json of each; arXiv:2504.03624 (Nemotron-H), 2508.14444 (Nano v2);
          transformers' NemotronHConfig, for what it ignores and how it once called things
"""

PATTERN = "hybrid_override_pattern"
IGNORED = set(
    """architectures model_type num_hidden_layers auto_map dtype torch_dtype transformers_version
    use_cache num_logits_to_keep output_router_logits expand use_mamba_kernels mamba_ssm_cache_dtype
    output_hidden_states output_attentions return_dict id2label label2id problem_type
    chunk_size_feed_forward is_encoder_decoder _name_or_path
    moe_shared_expert_overlap rescale_prenorm_residual rope_theta partial_rotary_factor
    time_step_rank""".split()
)
FIXED = dict(
    attention_bias=False,  # transformers ignores this and the next: nothing says what they mean
    mamba_proj_bias=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    tie_word_embeddings=False,
    residual_in_fp32=False,
    sliding_window=None,
    n_shared_experts=1,
    mlp_hidden_act="relu2",
    mamba_hidden_act="silu",
)
# What config.json must say of a letter that stands in a pattern; else it may say null or nothing.
REQUIRED = {
    "M": "mamba_num_heads mamba_head_dim ssm_state_size n_groups conv_kernel".split(),
    "*": "num_attention_heads num_key_value_heads head_dim".split(),
    "E": """n_routed_experts num_experts_per_tok moe_intermediate_size
    moe_shared_expert_intermediate_size routed_scaling_factor""".split(),
    "-": ["intermediate_size"],
}
OPTIONAL = {"E": ["n_group", "topk_group", "n_shared_experts", "norm_topk_prob"]}
# Other names that released files or transformers have for a field. Two that disagree are refused.
ALIASES = dict(
    attention_head_dim="head_dim",
    rms_norm_eps="layer_norm_epsilon",
    norm_eps="layer_norm_epsilon",
    num_local_experts="n_routed_experts",
    layer_types="layers_block_type",
    mamba_n_groups="n_groups",
    mamba_d_conv="conv_kernel",
    mamba_conv_bias="use_conv_bias",
    mamba_chunk_size="chunk_size",
    mamba_expand="expand",
    mamba_dt_min="time_step_min",
    mamba_dt_max="time_step_max",
    mamba_dt_limit="time_step_limit",
    mamba_dt_init_floor="time_step_floor",
)
UNCLAMPED = "None", "[0.0, inf]", "(0.0, inf)", str([0.0, {"__float__": "Infinity"}])
HF_WORDS = dict(
    mamba="M", linear_attention="M", attention="*", full_attention="*", moe="E", mlp="-"
)


def read(given, known):
    """config.json as {field: value}, of the fields `known`; ValueError names what cannot be
    honoured.
    """
    given = spelled(dict(given))
    model_type, layers = given.get("model_type", "nemotron_h"), given.get("num_hidden_layers")
    if PATTERN not in given:
        raise ValueError(
            f"config.json describes a {model_type!r} without a layer pattern, not a "
            f"nemotron_h model"
        )
    if model_type != "nemotron_h":
        raise ValueError(f"model_type {model_type!r} is not nemotron_h")
    letters = len(given[PATTERN])
    if layers not in (None, letters):
        raise ValueError(f"num_hidden_layers={layers}, but the pattern has {letters} letters")
    given = needed({k: v for k, v in given.items() if k not in IGNORED})
    if str(given.pop("time_step_limit", None)) not in UNCLAMPED:
        raise ValueError(
            "time_step_limit asks to clamp dt: the model was trained without, and is run without"
        )
    refused = [
        f"{k}={given[k]!r} (only {v!r} is implemented)"
        for k, v in FIXED.items()
        if given.get(k, v) != v
    ]
    refused += [
        f"{k}={v!r} (unknown field)" for k, v in given.items() if k not in known | set(FIXED)
    ]
    if refused:
        raise ValueError(
            "this config.json asks for what is not implemented here: " + ", ".join(refused)
        )
    return {k: v for k, v in given.items() if k in known}


def spelled(given):
    """config.json with one name for each field, and its patterns in letters. Of a pattern null is
    as good as absent; beside a number it contradicts it.
    """
    for alias in ALIASES.keys() & given.keys():
        value, name = given.pop(alias), ALIASES[alias]
        if name == "layers_block_type" and None in (value, given.get(name)):
            given[name] = value or given.get(name)
        elif given.setdefault(name, value) != value:
            raise ValueError(f"{alias}={value!r} contradicts {name}={given[name]!r}")
    for prefix in ("", "mtp_"):
        words, pattern = given.pop(prefix + "layers_block_type", None), prefix + PATTERN
        if given.get(pattern) is None:
            given.pop(pattern, None)
        elif not isinstance(given[pattern], str):
            raise ValueError(f"{pattern}={given[pattern]!r} is not a string of letters")
        if words is None:
            continue
        letters = in_letters(words, prefix)
        if given.setdefault(pattern, letters) != letters:
            raise ValueError(
                f"{prefix}layers_block_type spells {letters}, {pattern} says {given[pattern]}: "
                "one of the two is wrong"
            )
    return given


def in_letters(words, prefix=""):
    """["mamba", "moe"] -> "ME"; prefix is the field's, for the error."""
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise ValueError(f"{prefix}layers_block_type={words!r} is not a list of words")
    if unknown := sorted(set(words) - set(HF_WORDS)):
        raise ValueError(
            f"{prefix}layers_block_type holds {', '.join(unknown)}; known: {', '.join(HF_WORDS)}"
        )
    return "".join(HF_WORDS[w] for w in words)


def needed(given):
    """config.json without the nulls and zeros of letters that no pattern has; ValueError for what
    the others lack.
    """
    given = dict(moe_latent_size=None, num_nextn_predict_layers=0) | given  # absent: not used
    if given.get("num_key_value_heads", 0) is None:
        given["num_key_value_heads"] = given.get("num_attention_heads")  # as transformers reads it
    mtp = given.get("mtp_" + PATTERN, "*E") if given["num_nextn_predict_layers"] else ""
    letters, must = given[PATTERN] + mtp, ["vocab_size", "hidden_size"]
    for letter, names in REQUIRED.items():
        if letter in letters:
            must += names
            continue
        for name in [*names, *OPTIONAL.get(letter, [])]:
            value = given.get(name, True)
            if not value and value is not False:
                del given[name]
    if lacking := [k for k in must if k not in given]:
        raise ValueError(f"config.json lacks {', '.join(lacking)}: no default would be right")
    return given


def main():
    """Prints how one attention layer of each generation is spelled, and that they are read
    alike.
    """
    common = dict(vocab_size=8, hidden_size=4, num_attention_heads=2, num_key_value_heads=1)
    for who, spelling in (
        ("Nemotron-H", dict(hybrid_override_pattern="*", attention_head_dim=2, rms_norm_eps=1e-5)),
        ("Nemotron 3", dict(hybrid_override_pattern="*", head_dim=2, norm_eps=1e-5)),
        ("transformers 5", dict(layers_block_type=["full_attention"], head_dim=2)),
    ):
        names = {PATTERN, "head_dim", "layer_norm_epsilon", "moe_latent_size", *common}
        fields = read(common | spelling, names | {"num_nextn_predict_layers"})
        print(f"{who:16}{spelling}")
        print(f"{'':16}-> { {k: fields[k] for k in fields if k not in common} }")


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
