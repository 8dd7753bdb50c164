"""Sizes of the models that tests build, each set in one place: a test says only what it changes.

SMALL     quick, for what goes on around a model: runs, checkpoints, commands, ranks
AWKWARD   nothing divides anything that it need not, for what goes on within it
SHARED    what transformers' model takes too
"""

SMALL = dict(
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=4,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_latent_size=8,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=16,
    intermediate_size=16,
)
AWKWARD = dict(
    vocab_size=31,
    hidden_size=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=5,
    mamba_num_heads=6,
    mamba_head_dim=4,
    ssm_state_size=5,
    n_groups=3,
    chunk_size=4,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_latent_size=5,
    moe_intermediate_size=7,
    moe_shared_expert_intermediate_size=9,
    intermediate_size=11,
)
# transformers clamps dt from below at time_step_min when it reads several tokens (and not when it
# reads one); neither training nor we do. So low it cannot act, and what is compared is the model.
SHARED = dict(
    vocab_size=96,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=8,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_latent_size=16,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=40,
    routed_scaling_factor=2.5,
    intermediate_size=56,
    time_step_min=1e-9,
    eos_token_id=None,
)


def spelled(**changes):
    """As --model takes them."""
    return ",".join(f"{name}={value}" for name, value in changes.items())
