"""
The default run of train.py, as it was when figures were made of it: settings for small.trained.

    TOY        2.9 M parameters, 880 steps of 8 x 128 tokens, six CPU minutes
    EARLIER    the one before it: fewer experts, a wider shared one, 450 steps of 16 x 128, five

Not here  what it is now: config.py's preset and train.py's flags
"""

from ablations import small

TOY = small.BYTES | dict(
    tokenizer="bpe:2048",
    steps=880,
    length=128,
    hybrid_override_pattern="MEMEM*EME",
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    mamba_num_heads=8,
    ssm_state_size=32,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_latent_size=64,
    moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=64,
    routed_scaling_factor=24.0,
    intermediate_size=512,
    initializer_range=0.0792,
    num_nextn_predict_layers=1,
    mtp_num_layers=2,
    mtp_hybrid_override_pattern="*E",
)
EARLIER = TOY | dict(
    steps=450,
    batch=16,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_shared_expert_intermediate_size=256,
    routed_scaling_factor=2.5,
    initializer_range=0.04,
)
