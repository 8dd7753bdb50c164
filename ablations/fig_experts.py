"""
How many experts should a token take, and of how many?

Claim     experts cut in halves, twice as many of them and twice as many a token, are better than
          whole ones at the same parameters and FLOPs; sigmoid scores are better than softmax
          arXiv:2401.06066 section 4.5, figure 3 (DeepSeekMoE); Super: 22 of 512, sigmoid

Varied    of 16 experts: 2, 4, 8 or all 16 a token. At equal active and equal total parameters: 2
          of 8 twice as large, 4 of 16, 8 of 32 halves, 16 of 64 quarters. Softmax scores
Equal     the routed experts' parameters, 131,072; weights of the same shape, batches, 100 steps;
          the size at which the routed path starts, by its scale: gates sum to the scale, so that
          more experts a token would start it smaller. Routers of more experts are larger

Here      one Mamba-2 layer, one MoE without a latent, and 1,024 random facts of 16 bits: what
          experts are for; ablations/fig_routing.py asks a text. The order should survive: more
          experts a token are more combinations, at any size
"""

from unittest import mock

from ablations import draw, small
from ablations.fig_latent import FIGURE as LATENT
from ablations.fig_routing import softmax
from ablations.lab import Claim, Figure, main
from latent_moe import Router

FIELDS = "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size"


def of(k, experts, hidden, scale):
    return dict(zip(FIELDS, (k, experts, hidden)), routed_scaling_factor=scale)


VARIANTS = {
    "2 of 16": of(2, 16, 64, 1.77),
    "4 of 16": of(4, 16, 64, 2.5),
    "8 of 16": of(8, 16, 64, 3.54),
    "16 of 16": of(16, 16, 64, 5.0),
    "2 of 8, twice as large": of(2, 8, 128, 1.25),
    "8 of 32, half as large": of(8, 32, 32, 5.0),
    "16 of 64, a quarter as large": of(16, 64, 16, 10.0),
    "4 of 16, softmax": of(4, 16, 64, 2.5) | dict(scores="softmax"),
}
TWO, FOUR, EIGHT, ALL, LARGE, HALVES, QUARTERS, SOFTMAX = VARIANTS


def cell(settings, seed):
    scores = settings.pop("scores")
    with mock.patch.object(Router, "forward", softmax if scores == "softmax" else Router.forward):
        return small.loss(settings, seed)


FINER = "arXiv:2401.06066 figure 3", "finer experts are better throughout"
MORE = "our comparison", "not stated: more a token cost more FLOPs"
CLAIMS = (
    Claim("2 of 8 large experts end at a higher loss than 4 of 16", *FINER, LARGE, FOUR, "loss"),
    Claim("4 of 16 experts end at a higher loss than 8 of 32 halves", *FINER, FOUR, HALVES, "loss"),
    Claim("8 of 32 halves end at a higher loss than 16 of 64 quarters",
          *FINER, HALVES, QUARTERS, "loss"),
    Claim("Of 16 experts, 2 a token end at a higher loss than 4", *MORE, TWO, FOUR, "loss"),
    Claim("Of 16 experts, 4 a token end at a higher loss than 8", *MORE, FOUR, EIGHT, "loss"),
    Claim("Of 16 experts, 8 a token end at a higher loss than all 16", *MORE, EIGHT, ALL, "loss"),
    Claim("On facts softmax scores end at a higher loss than sigmoid scores",
          "arXiv:2604.12374 section 2.1", "sigmoid is what Super has; no comparison is printed",
          SOFTMAX, FOUR, "loss"),
)  # fmt: skip


FIGURE = Figure(
    name="experts",
    claims=CLAIMS,
    draw=lambda found: draw.paired(found, "loss", FOUR, "validation nats a value"),
    variants=VARIANTS,
    cell=cell,
    base=LATENT.base
    | dict(data="facts:1024", batch=16, steps=100, moe_latent_size=None, scores="sigmoid"),
    quick=dict(steps=60),
    units=dict(loss="nats a value"),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
