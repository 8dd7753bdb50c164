"""
What keeps experts equally busy, and what does it cost?

Claim     a bias that only chooses balances the experts, and harms the loss less than a balance loss
          strong enough to do the same
          arXiv:2412.19437 section 2.1.2, after 2408.15664

Varied    the bias's step a training step; the weight of the balance loss; sigmoid or softmax scores
Equal     everything else: weights, batches, parameters, FLOPs

Here      300 steps of 0.2 M parameters, 8 experts, top-2. 300 steps of 0.001 shift a score by 0.3
          at most, of the sigmoid's 1, so that the slower bias may still be on its way. What
          imbalance costs the loss should be small: text of this size hardly asks for experts
"""

from unittest import mock

import torch.nn.functional as F

from ablations import draw, small
from ablations.lab import Claim, Figure, main
from latent_moe import Router

VARIANTS = {
    "neither": dict(bias_rate=0.0, balance=0.0),
    "bias 0.001": dict(balance=0.0),
    "bias 0.01": dict(bias_rate=1e-2, balance=0.0),
    "loss 0.1": dict(bias_rate=0.0, balance=1e-1),
    "bias 0.001, softmax": dict(balance=0.0, scores="softmax"),
}


def softmax(router, u):
    """Router.forward with a softmax for its sigmoids."""
    return F.linear(u, router.weight).softmax(-1)


def cell(settings, seed):
    scores = settings.pop("scores")
    with mock.patch.object(Router, "forward", softmax if scores == "softmax" else Router.forward):
        return small.loss(settings, seed)


WHERE = "arXiv:2412.19437 section 2.1.2"
CLAIMS = (
    Claim(
        "Without either force the experts are busy less equally than with the bias",
        WHERE,
        "the bias alone keeps the load balanced",
        more="neither",
        less="bias 0.001",
        measure="max_vio",
    ),
    Claim(
        "A bias that moves ten times as fast balances worse",
        "arXiv:2408.15664",
        "0.01 fluctuates late in training; 0.001 is best",
        more="bias 0.01",
        less="bias 0.001",
        measure="max_vio",
        reason="300 steps are the early part of training, where the faster bias is ahead.",
    ),
    Claim(
        "A balance loss strong enough to balance ends at a higher loss than the bias",
        WHERE,
        "the model with the bias alone is better",
        more="loss 0.1",
        less="bias 0.001",
        measure="loss",
        reason="Text of this size hardly asks for experts, so that no way to route them shows.",
    ),
    Claim(
        "Softmax scores end at a higher loss than sigmoid scores",
        "arXiv:2604.12374 section 2.1",
        "sigmoid is what Super has; no comparison is printed",
        more="bias 0.001, softmax",
        less="bias 0.001",
        measure="loss",
        reason="As above; and both are normalised over the chosen two: little is left between.",
    ),
)


def picture(found):
    return draw.paired(found, "max_vio", "neither", "MaxVio: busiest expert over the mean, minus 1")


FIGURE = Figure(
    name="routing",
    claims=CLAIMS,
    draw=picture,
    variants=VARIANTS,
    cell=cell,
    base=small.BYTES | dict(scores="sigmoid"),
    quick=dict(steps=60),
    units=dict(loss="nats a byte"),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
