"""An update of grpo.py on a card that is not there: the CPU's numbers, and one wait."""

import card
import pytest
import torch

import grpo
from config import Config
from model import Nemotron
from post import practice
from post.rollout import Rollout

CONFIG = Config(
    hybrid_override_pattern="ME*",
    vocab_size=64,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    mamba_num_heads=2,
    mamba_head_dim=16,
    ssm_state_size=16,
    n_groups=1,
    chunk_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    moe_latent_size=32,
    num_nextn_predict_layers=0,
)
REPLIES = [
    Rollout([1, 2, 3], [4, 5], [-4.1, -4.2], True),
    Rollout([1, 2, 3], [6, 7, 8], [-4.0, -4.3, -4.1], False),
    Rollout([9, 10], [11], [-4.2], True),
]


def updated(device, micro, measure):
    """Numbers of an update on a device."""
    now = grpo.Practice.__new__(grpo.Practice)
    now.run = grpo.Run(length=8, micro=micro)
    now.model, now.first = (Nemotron(CONFIG).to(device) for _ in range(2))
    now.params = practice.freeze(now.model)
    now.opt = torch.optim.AdamW(now.params, 1e-3)
    a = torch.tensor([1.0, -1.0, 0.5])
    card.CARD.reset()
    return now.update(REPLIES, a, measure)


@pytest.mark.parametrize("micro, measure", [(0, False), (1, True)])
def test_an_update_waits_once(counted, micro, measure):
    """Beside the loop over experts, which fp32 takes on a card: it reads how many rows each has."""
    here, there = (updated(device, micro, measure) for device in ("cpu", "cuda"))
    waits = [n for (at, _), n in counted.waits.items() if not at.startswith("latent_moe")]
    assert sum(waits) == 1, counted.story()
    assert list(here) == list(there) and (here["kl"] == "") is not measure
    for name, x in here.items():
        assert there[name] == (x if x == "" else pytest.approx(x, abs=1e-5))
