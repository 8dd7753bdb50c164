"""
What a Nemotron 3 is made of: the fields of the released config.json, presets from a toy to the full
model.

A string spells the stack, one letter per layer: M Mamba-2, * attention, E LatentMoE, - MLP. The
rest: sizes.

    Config.preset("super")     toy | tiny-nv | small | nano | super; the defaults are Super's
    Config.from_hf(dict)       either generation of config.json; names what it cannot honour, drops
                               nothing
    config.to_hf()             what transformers and other loaders read

Sources   the released config.json of Super and Nano; arXiv:2604.12374 table 1; NVIDIA's test model
          (tiny-nv)
Departs   initializer_range is the 0.014 of pre-training; the released config.json's 0.02 was never
          used
"""

from dataclasses import dataclass, fields

import command
from command import knob

LETTERS = {"M": "Mamba-2", "*": "attention", "E": "LatentMoE", "-": "MLP"}
# Fields of config.json that change nothing here, and fields of which only one value is implemented.
IGNORED = set(
    """architectures model_type num_hidden_layers auto_map dtype torch_dtype transformers_version
    use_cache num_logits_to_keep output_router_logits expand use_mamba_kernels mamba_ssm_cache_dtype
    moe_shared_expert_overlap rescale_prenorm_residual norm_eps rope_theta partial_rotary_factor""".split()
)
FIXED = dict(
    attention_bias=False,
    mlp_bias=False,
    use_bias=False,
    mamba_proj_bias=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    tie_word_embeddings=False,
    residual_in_fp32=False,
    sliding_window=None,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    mlp_hidden_act="relu2",
    mamba_hidden_act="silu",
)
REQUIRED = """vocab_size hidden_size num_attention_heads num_key_value_heads head_dim mamba_num_heads
    mamba_head_dim ssm_state_size n_groups conv_kernel n_routed_experts num_experts_per_tok
    moe_intermediate_size moe_shared_expert_intermediate_size routed_scaling_factor""".split()
UNCLAMPED = str([0.0, {"__float__": "Infinity"}])  # as transformers writes it
HF_WORDS = dict(
    mamba="M", linear_attention="M", attention="*", full_attention="*", moe="E", mlp="-"
)


@dataclass(frozen=True)
class Config:
    """The released config.json's fields under their own names, in Super's sizes. `preset` has the
    others. rotary_base is ours alone: for a baseline, never written to nor read from a config.json.
    """

    hybrid_override_pattern: str = knob(
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        least=1,
        most=1024,
    )
    vocab_size: int = knob(131072, least=1, most=1 << 24)
    hidden_size: int = knob(4096, least=1, most=1 << 18)
    num_attention_heads: int = knob(32, least=1, most=1 << 12)
    num_key_value_heads: int = knob(2, least=1, most=1 << 12)
    head_dim: int = knob(128, least=1, most=1 << 12)
    rotary_base: float | None = knob(
        None, "None: no positions, as in every release", above=1, most=1e12
    )
    mamba_num_heads: int = knob(128, least=1, most=1 << 12)
    mamba_head_dim: int = knob(64, least=1, most=1 << 12)
    ssm_state_size: int = knob(128, least=1, most=1 << 12)
    n_groups: int = knob(8, least=1, most=1 << 12)
    conv_kernel: int = knob(4, least=1, most=64)
    use_conv_bias: bool = knob(True)
    chunk_size: int = knob(128, least=1, most=1 << 16)
    n_routed_experts: int = knob(512, least=1, most=1 << 16)
    num_experts_per_tok: int = knob(22, least=1, most=1 << 16)
    moe_latent_size: int | None = knob(
        1024, "None: experts at full width, as in Nano", least=1, most=1 << 18
    )
    moe_intermediate_size: int = knob(2688, least=1, most=1 << 20)
    moe_shared_expert_intermediate_size: int = knob(5376, least=1, most=1 << 20)
    routed_scaling_factor: float = knob(5.0, above=0, most=1e4)
    norm_topk_prob: bool = knob(True)
    intermediate_size: int = knob(2688, "of `-` layers", least=1, most=1 << 20)
    num_nextn_predict_layers: int = knob(1, "MTP blocks stored, and ...", least=0, most=16)
    mtp_num_layers: int = knob(
        2, "... depths trained with them (Megatron's name)", least=1, most=16
    )
    mtp_hybrid_override_pattern: str = knob("*E", least=1, most=64)
    layer_norm_epsilon: float = knob(1e-5, above=0, most=1)
    initializer_range: float = knob(0.014, above=0, most=10)
    time_step_min: float = knob(
        0.001, "of the initial dt; nothing is ever clamped to it", above=0, most=1e4
    )
    time_step_max: float = knob(0.1, above=0, most=1e4)
    time_step_floor: float = knob(0.0001, above=0, most=1e4)
    max_position_embeddings: int = knob(
        262144, "what serving reserves; trained to 1,048,576", least=1, most=10**9
    )
    bos_token_id: int | None = knob(1, least=0, most=1 << 24)
    eos_token_id: int | list | None = knob(2, least=0, most=1 << 24)
    pad_token_id: int | None = knob(0, least=0, most=1 << 24)

    def __post_init__(self):
        command.check(self, lambda f: f.name)
        for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
            if wrong := sorted(set(getattr(self, name)) - set(LETTERS)):
                raise ValueError(
                    f"{name} {getattr(self, name)!r} may only hold the letters M, E, * and -, "
                    f"not {', '.join(wrong)}"
                )
        for whole, part in (
            ("mamba_num_heads", "n_groups"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            n, m = getattr(self, whole), getattr(self, part)
            if n % m:
                raise ValueError(f"{whole}={n} is not a multiple of {part}={m}")
        if self.time_step_min > self.time_step_max:
            raise ValueError(
                f"time_step_min={self.time_step_min} is above time_step_max={self.time_step_max}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} of "
                f"n_routed_experts={self.n_routed_experts}"
            )

    @property
    def num_hidden_layers(self):
        return len(self.hybrid_override_pattern)

    @property
    def depths(self):
        """How many tokens beyond the next one are asked for in training."""
        return self.mtp_num_layers if self.num_nextn_predict_layers else 0

    @staticmethod
    def preset(name):
        """toy: a laptop. tiny-nv: NVIDIA's test shape. small: one GPU. nano: 30B-A3B. super:
        120B-A12B.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        return Config(**PRESETS[name])

    @staticmethod
    def from_hf(given):
        """A config.json of either generation as a Config; ValueError names what cannot be honoured."""
        model_type, layers = given.get("model_type", "nemotron_h"), given.get("num_hidden_layers")
        given = {k: v for k, v in given.items() if k not in IGNORED}
        if str(given.pop("time_step_limit", None)) not in (
            "None",
            "[0.0, inf]",
            "(0.0, inf)",
            UNCLAMPED,
        ):
            raise ValueError(
                "time_step_limit asks to clamp dt: "
                "the model was trained without, and is run without"
            )
        for prefix in ("", "mtp_"):  # older: words; here: letters
            words = given.pop(prefix + "layers_block_type", None)
            if words and prefix + "hybrid_override_pattern" not in given:
                if unknown := sorted(set(words) - set(HF_WORDS)):
                    raise ValueError(
                        f"{prefix}layers_block_type holds {', '.join(unknown)}; "
                        f"known: {', '.join(HF_WORDS)}"
                    )
                given[prefix + "hybrid_override_pattern"] = "".join(HF_WORDS[w] for w in words)
        if "hybrid_override_pattern" not in given:
            raise ValueError(
                f"config.json describes a {model_type!r} without a layer pattern, "
                "not a nemotron_h model"
            )
        if model_type != "nemotron_h":
            raise ValueError(f"model_type {model_type!r} is not nemotron_h")
        letters = len(given["hybrid_override_pattern"])
        if layers not in (None, letters):
            raise ValueError(f"num_hidden_layers={layers}, but the pattern has {letters} letters")
        if lacking := [k for k in REQUIRED if k not in given]:
            raise ValueError(f"config.json lacks {', '.join(lacking)}: no default would be right")
        given = (
            dict(moe_latent_size=None, num_nextn_predict_layers=0) | given
        )  # absent in Nano's: not used
        refused = [
            f"{k}={given[k]!r} (only {v!r} is implemented)"
            for k, v in FIXED.items()
            if given.get(k, v) != v
        ]
        known = {f.name for f in fields(Config)} - {"rotary_base"}
        refused += [
            f"{k}={v!r} (unknown field)" for k, v in given.items() if k not in known | set(FIXED)
        ]
        if refused:
            raise ValueError(
                "this config.json asks for what is not implemented here: " + ", ".join(refused)
            )
        return Config(**{k: v for k, v in given.items() if k in known})

    def to_hf(self):
        """The dict to write as config.json: what transformers' NemotronHConfig and other loaders
        read.
        """
        if self.rotary_base:
            raise ValueError(
                f"rotary_base={self.rotary_base}: nemotron_h has attention without positions, so "
                "other loaders would read another model"
            )
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rotary_base"}
        return dict(
            architectures=["NemotronHForCausalLM"],
            model_type="nemotron_h",
            dtype="float32",
            num_hidden_layers=self.num_hidden_layers,
            norm_eps=self.layer_norm_epsilon,
            expand=2,
            use_mamba_kernels=True,
            use_cache=True,
            num_logits_to_keep=1,
            mamba_ssm_cache_dtype="float32",
            rescale_prenorm_residual=True,
            **FIXED,
            **ours,
        )


PRESETS = dict(
    # minutes on two CPU cores: all three mixers, a latent at half the width, eight experts and a
    # shared one
    toy=dict(
        hybrid_override_pattern="MEMEM*EME",
        vocab_size=2048,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=2,
        chunk_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_latent_size=64,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=256,
        routed_scaling_factor=2.5,
        intermediate_size=512,
        initializer_range=0.04,
    ),  # 0.014 suits d=4096; narrow starts faster so
    # NVIDIA's own test model (recipes/super3/tiny_model.py), at the full vocabulary
    **{
        "tiny-nv": dict(
            hybrid_override_pattern="MEM*EME",
            hidden_size=256,
            num_attention_heads=4,
            head_dim=64,
            mamba_num_heads=8,
            mamba_head_dim=32,
            n_routed_experts=16,
            num_experts_per_tok=2,
            moe_latent_size=128,
            moe_intermediate_size=384,
            moe_shared_expert_intermediate_size=768,
            routed_scaling_factor=2.5,
        )
    },
    # one GPU of 24 to 80 GB, training in fp32 master weights: half a billion parameters
    small=dict(
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEME",
        vocab_size=32768,
        hidden_size=768,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=64,
        mamba_num_heads=24,
        n_routed_experts=64,
        num_experts_per_tok=8,
        moe_latent_size=384,
        moe_intermediate_size=672,
        moe_shared_expert_intermediate_size=1344,
        routed_scaling_factor=2.5,
    ),
    nano=dict(
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=2688,
        mamba_num_heads=64,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_latent_size=None,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        intermediate_size=1856,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
    ),
    super=dict(),
)


def main():
    """Prints the presets side by side, field by field where they differ."""
    print(f"{'':38}" + "".join(f"{name:>12}" for name in PRESETS))
    configs = [Config.preset(name) for name in PRESETS]
    rows = [("layers", [c.num_hidden_layers for c in configs])]
    rows += [(f.name, [getattr(c, f.name) for c in configs]) for f in fields(Config)[1:]]
    for what, values in rows:
        if len(set(values)) > 1:
            print(f"{what:38}" + "".join(f"{v!s:>12}" for v in values))
    for name, c in zip(PRESETS, configs):
        print(f"{name:8} {c.hybrid_override_pattern}")


if __name__ == "__main__":
    main()
