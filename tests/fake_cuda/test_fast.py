"""--fast on a card that is not there: the kernels, interpreted, in the places that were named."""

import card
import pytest
import torch

import train

pytest.importorskip("triton")
card.interpret()

SIZES = "hidden_size=32,mamba_num_heads=2,mamba_head_dim=16,ssm_state_size=16,n_groups=1,"
SIZES += "n_routed_experts=4,num_experts_per_tok=2,moe_intermediate_size=32,moe_latent_size=16,"
SIZES += "moe_shared_expert_intermediate_size=32,intermediate_size=32,num_attention_heads=2,"
SIZES += "num_key_value_heads=1,head_dim=16"
KERNELS = {
    "_scan": "recurrence   kernels/ssd.py",
    "_forward": "convolution  kernels/conv.py",
    "_grouped": "experts      kernels/experts.py",
    "_nll": "losses       kernels/loss.py",
}


def fitted(tmp_path, text, pattern, **more):
    said = []
    how = dict(steps=2, batch=1, length=17, log_every=1, eval_every=100, eval_tokens=17)
    how |= dict(tokenizer="bytes", prompt="", worth=False, data=str(text), out=str(tmp_path))
    how |= dict(model=f"hybrid_override_pattern={pattern},{SIZES}", **more)
    _, rows = train.fit(train.Run(**how), say=said.append)
    return [r["train_nats"] for r in rows], "\n".join(said)


def test_a_training_step(counted, tmp_path, text):
    nats, said = fitted(tmp_path, text, "ME", fast=True, name="fast")
    launched = {what for _, what in counted.launches}
    for kernel, line in KERNELS.items():
        assert kernel in launched and line in said, said
    readable, _ = fitted(tmp_path, text, "ME", name="readable")
    assert torch.tensor(nats).sub(torch.tensor(readable)).abs().max() < 2e-2


def test_a_training_step_in_four_bits(counted, tmp_path, text):
    _, said = fitted(tmp_path, text, "E-", fast=True, precision="nvfp4-last", steps=1)
    launched = {what for _, what in counted.launches}
    assert {"_quantize", "_gemm"} <= launched and "NVFP4 by kernels/fp4mm.py" in said
