"""
bench.py's rows on a CPU, at a small size: every kernel, its fp64 and the torch peer are handed the
same numbers.

A bench that compares the wrong things would only show on a GPU; here the very closures it times are
compared.
"""

from dataclasses import replace

import pytest

from speed import clock, rows

for name in ("conv", "norm", "ssd"):
    pytest.importorskip(f"kernels.{name}")
SMALL = replace(
    rows.SUPER,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_latent_size=16,
    moe_intermediate_size=24,
    hidden_size=32,
    vocab_size=70,
)
CASES = list(rows.cases(True, SMALL, 40, "cpu"))
NAMES = [f"{c.name}, {c.shape}" for c in CASES]


def test_every_floor_has_its_row():
    assert [(c.name, c.shape) for c in CASES] == [row[:2] for row in rows.floors(SMALL, 40)]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_ours_and_the_peer_answer_the_same_question(case):
    case.check = min(case.check, 21)
    assert clock.error(case, case.ours) < 6e-3  # bf16, a backward of four roundings in a row
    if (
        not isinstance(case.peer, str) and "experts" in case.name
    ):  # the only peer that torch alone provides
        assert clock.error(case, case.peer) < 1e-2


def test_this_file_can_fail():
    case = next(c for c in CASES if c.name == "norm forward")
    assert clock.error(case, lambda y, z, w: case.ours(z, y, w)) > 0.1
