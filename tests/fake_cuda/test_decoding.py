"""Decoding on a card that is not there: the same text, and what a token costs in waits."""

import copy

import pytest
import torch

import graph
import heal
import hf
import sample
import speculate
from config import Config
from model import Nemotron

MODEL = "MEM*E"
PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.fixture(scope="module")
def both():
    """One model, here and on the card."""
    config = Config(
        hybrid_override_pattern=MODEL,
        vocab_size=64,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
        intermediate_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        moe_latent_size=32,
    )
    return Nemotron(config, 0).eval(), Nemotron(config, 0).to("cuda").eval()


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(prefill=2),
        dict(stop=(7,)),
        dict(speculate=3),
        dict(speculate="auto"),
        dict(temperature=1.0, top_p=0.9, seed=0),
    ],
    ids=str,
)
def test_the_text_is_the_cpus(both, how):
    here, there = (sample.generate(model, PROMPTS, 8, **how) for model in both)
    assert here == there


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_is_one_launch_and_one_wait(both, counted, precision):
    """The wait is for the token, to see it."""
    config = both[1].config
    model = Nemotron(config, 0)
    for name, p in model.named_parameters():
        p.data = p.data.to(hf.precision(name, p, precision))
    model = model.to("cuda").eval()
    step, texts = graph.captured(model), []
    for how in (dict(step=step), dict(step=step), {}):
        texts.append(sample.generate(model, [[1, 2, 3]], 8, **how))
    assert texts[0] == texts[1] == texts[2]
    short, long = (cost(counted, model, step, n) for n in (8, 12))
    replays, launches, waits = (b - a for a, b in zip(short, long))
    assert replays == waits == 4 and launches <= 4 * 16


def cost(counted, model, step, tokens):
    counted.reset()
    sample.generate(model, [[1, 2, 3]], tokens, step=step)
    return counted.replays, sum(counted.launches.values()), sum(counted.waits.values())


@pytest.mark.parametrize("rows", [[[1, 2, 3]], PROMPTS], ids=str)
def test_a_captured_round_is_one_launch_and_one_wait(both, counted, rows):
    """Of drafting, verifying and keeping; the wait is for its tokens, and both texts are the plain
    one. Beside the graph: what is copied into its tensors, of which there are few.
    """
    model = both[1]
    turn, plain = graph.drafted(model, speculate.one_round), sample.generate(model, rows, 24)
    for _ in range(2):
        assert plain == sample.generate(model, rows, 24, speculate=3, turn=turn)
    before, costs = (0, 0, 0), []
    counted.reset()
    for _ in speculate.rounds(model, rows, 24, 3, turn=turn):
        now = counted.replays, sum(counted.launches.values()), sum(counted.waits.values())
        costs.append([b - a for a, b in zip(before, now)])
        before = now
    later = costs[3:]  # the first token; a round without a graph; one whose caches move into it
    assert len(later) > 2 and {(r, w) for r, _, w in later} == {(1, 1)}, costs
    assert max(launches for _, launches, _ in later) <= 2, costs


@pytest.mark.parametrize("how", [{}, dict(temperature=1.0, top_k=5, top_p=0.9, seed=0)], ids=str)
def test_a_readable_token_waits_once(both, counted, how):
    waits = []
    for n in (4, 8):
        counted.reset()
        sample.generate(both[1], [[1, 2, 3]], n, **how)
        waits.append(sum(counted.waits.values()))
    assert waits[1] - waits[0] == 4, counted.story()


def test_healing_is_the_cpus(both):
    ids = torch.randint(64, (8, 20), generator=torch.Generator().manual_seed(0))
    here, there = (list(heal.heal(copy.deepcopy(model), ids, 2, batch=4)) for model in both)
    for a, b in zip(here, there):
        assert a.nats == pytest.approx(b.nats, abs=1e-4)
        assert a.excess == pytest.approx(b.excess, abs=1e-4)


def test_a_captured_step_is_for_cuda(both):
    with pytest.raises(ValueError, match="for CUDA, and the model is on cpu"):
        graph.captured(both[0])
    with pytest.raises(ValueError, match="round is for CUDA, and the model is on cpu"):
        graph.drafted(both[0], speculate.one_round)


def test_what_cannot_be_captured_is_refused_at_once(both):
    """More than 32 tokens at once, in fp32: a round of 33 drafts, a step of 33 rows. In bf16 the
    same are captured.
    """
    model, narrow = both[1], Nemotron(both[1].config, 0).to(torch.bfloat16).to("cuda").eval()
    why = "tokens at once in float32 cannot be captured: .* waits for the GPU"
    rows = [[1, 2]] * 33
    with pytest.raises(ValueError, match=f"33 {why}"):
        sample.generate(model, rows, 4, step=graph.captured(model))
    with pytest.raises(ValueError, match=f"34 {why}"):
        turn = graph.drafted(model, speculate.one_round)
        sample.generate(model, [[1, 2]], 200, speculate=33, turn=turn)
    sample.generate(narrow, rows, 4, step=graph.captured(narrow))


@pytest.mark.parametrize("rows", [[[1, 2, 3]], PROMPTS], ids=str)
def test_one_token_s_attention_copies_no_keys(both, counted, rows):
    """Neither from a growing cache nor from a captured step's, whose mask and shared heads together
    only MATH would take."""
    for more in ({}, dict(step=graph.captured(both[1]))):
        sample.generate(both[1], rows, 8, **more)
    assert set(counted.attention) == {"efficient"}, counted.attention


def test_a_cast_keeps_the_state_exact(both):
    model = both[1]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        cache = model.new_cache(1)
        model(torch.tensor([[1, 2, 3]]).to("cuda"), cache)
    kinds = {cache.layers[i].S.dtype for i, x in enumerate(MODEL) if x == "M"}
    assert kinds == {torch.float32}
