"""
What a Nemotron 3 is made of: the fields of the released config.json, presets from a toy to the full
model.

A string spells the stack, one letter per layer: M Mamba-2, * attention, E LatentMoE, - MLP. The
rest: sizes.

    Config.preset("super")     toy | tiny-nv | small | mini | nemotron-h-8b | nano-9b-v2 | nano |
                               super; the defaults are Super's
    Config.from_hf(dict)       the config.json of any member of the family: family.py
    config.to_hf()             what transformers and other loaders read

Sources   the released config.json of each; arXiv:2504.03624 (Nemotron-H), 2508.14444 (Nano v2),
          2604.12374 table 1; NVIDIA's test model (tiny-nv)
          the recipes of NVIDIA's Megatron-Bridge: initial standard deviations 0.014 (Super, d=4096)
          and 0.0173 (Nano, d=2688)
Departs   initializer_range is pre-training's, by `initial_std`; the released config.json's 0.02 was
          never used
"""

from dataclasses import dataclass, fields

import command

import bounds
import family
from bounds import knob

LETTERS = {"M": "Mamba-2", "*": "attention", "E": "LatentMoE", "-": "MLP"}


def initial_std(width):
    """Standard deviation of the first matrices of a model so wide: 0.9 / sqrt(d), which is what
    both recipes state, 0.014 at 4096 and 0.0173 at 2688. So a product with a normalised input has
    the same size at any width.
    """
    return round(0.014 * (4096 / width) ** 0.5, 4)


@dataclass(frozen=True)
class Config:
    """The released config.json's fields under their own names, in Super's sizes. `preset` has the
    others. What belongs to a letter that no pattern has is never looked at. rotary_base is ours
    alone: for a baseline, never written to nor read from a config.json.
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
    use_bias: bool = knob(False, "of Mamba's in_proj and out_proj; no released member has one")
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
    n_group: int = knob(
        1, "of experts: a token chooses the best topk_group of them first", least=1, most=1 << 16
    )
    topk_group: int = knob(1, least=1, most=1 << 16)
    intermediate_size: int = knob(
        2688, "of `-` layers: Nemotron-H, Nano v2, Nemotron 3 Nano 4B", least=1, most=1 << 20
    )
    mlp_bias: bool = knob(
        False, "of `-` layers, shared experts, latent projections; no released member has one"
    )
    num_nextn_predict_layers: int = knob(1, "MTP blocks stored, and ...", least=0, most=16)
    mtp_num_layers: int = knob(
        2, "... depths trained with them (Megatron's name)", least=1, most=16
    )
    mtp_hybrid_override_pattern: str = knob("*E", least=1, most=64)
    layer_norm_epsilon: float = knob(1e-5, above=0, most=1)
    initializer_range: float = knob(initial_std(4096), above=0, most=10)
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
        bounds.check(self, lambda f: f.name)
        for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
            if wrong := sorted(set(getattr(self, name)) - set(LETTERS)):
                raise ValueError(
                    f"{name} {getattr(self, name)!r} may only hold the letters M, E, * and -, "
                    f"not {', '.join(wrong)}"
                )
        for letter, whole, part in (
            ("M", "mamba_num_heads", "n_groups"),
            ("*", "num_attention_heads", "num_key_value_heads"),
            ("E", "n_routed_experts", "n_group"),
        ):
            n, m = getattr(self, whole), getattr(self, part)
            if letter in self.letters and n % m:
                raise ValueError(f"{whole}={n} is not a multiple of {part}={m}")
        if self.time_step_min > self.time_step_max:
            raise ValueError(
                f"time_step_min={self.time_step_min} is above time_step_max={self.time_step_max}"
            )
        if "E" in self.letters:
            self.check_experts()

    def check_experts(self):
        """ValueError unless the kept groups hold as many experts as a token chooses."""
        k, E = self.num_experts_per_tok, self.n_routed_experts
        if k > E:
            raise ValueError(f"num_experts_per_tok={k} of n_routed_experts={E}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} of n_group={self.n_group}")
        each = E // self.n_group
        if self.n_group > 1 and each < 2:
            raise ValueError(f"n_group={self.n_group} leaves a group one expert, and needs two")
        if k > self.topk_group * each:
            raise ValueError(
                f"num_experts_per_tok={k}, but topk_group={self.topk_group} groups "
                f"of {each} experts hold {self.topk_group * each}"
            )

    @property
    def letters(self):
        """Those that stand in a pattern: what the model has layers of."""
        mtp = self.mtp_hybrid_override_pattern if self.num_nextn_predict_layers else ""
        return set(self.hybrid_override_pattern + mtp)

    @property
    def num_hidden_layers(self):
        return len(self.hybrid_override_pattern)

    @property
    def depths(self):
        """How many tokens beyond the next one are asked for in training."""
        return self.mtp_num_layers if self.num_nextn_predict_layers else 0

    @staticmethod
    def preset(name):
        """toy: a laptop. mini: as small as still learns tasks. tiny-nv: NVIDIA's test shape. small:
        one GPU. nano: 30B-A3B. super: 120B-A12B. nemotron-h-8b, nano-9b-v2: without experts.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        return Config(**PRESETS[name])

    @staticmethod
    def from_hf(given):
        """A config.json of any generation as a Config; ValueError names what cannot be honoured."""
        known = {f.name for f in fields(Config)} - {"rotary_base"}
        return Config(**family.read(given, known))

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
            **family.FIXED,
            **ours,
        )


PRESETS = dict(
    # Minutes on two CPU cores: all three mixers, a latent at half the width. The routed path is
    # four matrices and a square in a row and starts far below the shared expert. Super has a
    # million steps to lift it, the toy 880; so it gets a small shared expert and a scale of 24
    # where Super has 5.
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
        n_routed_experts=32,
        num_experts_per_tok=6,
        moe_latent_size=64,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=64,
        routed_scaling_factor=24.0,
        intermediate_size=512,
        initializer_range=initial_std(128),
    ),
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
        initializer_range=initial_std(768),
    ),
    # as small as still learns to sort and to answer: 0.3 M parameters, for sft.py and grpo.py
    mini=dict(
        hybrid_override_pattern="M*EM*E",
        vocab_size=328,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_latent_size=32,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=128,
        routed_scaling_factor=2.5,
        intermediate_size=128,
        initializer_range=0.056,
    ),
    # without experts: every other layer an MLP, and all parameters active
    **{
        "nemotron-h-8b": dict(
            hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            num_key_value_heads=8,
            moe_latent_size=None,
            intermediate_size=21504,
            num_nextn_predict_layers=0,
            max_position_embeddings=8192,
        ),
        "nano-9b-v2": dict(
            hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            hidden_size=4480,
            num_attention_heads=40,
            num_key_value_heads=8,
            mamba_head_dim=80,
            moe_latent_size=None,
            intermediate_size=15680,
            num_nextn_predict_layers=0,
            max_position_embeddings=131072,
        ),
    },
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
        initializer_range=initial_std(2688),
    ),
    super=dict(),
)


def main():
    """Prints the presets side by side, field by field where they differ; a dot where a field is not
    used.
    """
    configs = [Config.preset(name) for name in PRESETS]
    owner = {name: letter for letter, names in family.REQUIRED.items() for name in names}
    owner |= dict(moe_latent_size="E")

    def shown(c, name):
        return getattr(c, name) if owner.get(name, "") in {"", *c.letters} else "."

    print(f"{'':36}" + "".join(f"{name:>14}" for name in PRESETS))
    rows = [("layers", [c.num_hidden_layers for c in configs])]
    rows += [(f.name, [shown(c, f.name) for c in configs]) for f in fields(Config)[1:]]
    for what, values in rows:
        if len(set(values)) > 1:
            print(f"{what:36}" + "".join(f"{v!s:>14}" for v in values))
    for name, c in zip(PRESETS, configs):
        print(f"{name:14} {c.hybrid_override_pattern}")


if __name__ == "__main__":
    command.demo(main, __doc__)
