"""
Does predicting two tokens more make the next one better known?

Claim     with the MTP losses the model's own next-token ability is better: +2.4 % on the mean of
          seven benchmarks
          the Nemotron 3 white paper (arXiv:2512.20856), table 2

Varied    the MTP block, trained at two depths with 0.3 of the loss, or none
Equal     the backbone, its first weights, the batches, the tokens. The block costs FLOPs on top

Here      the loss on the next token, not benchmarks. It is doubtful that the effect survives: a
          small model has no capacity to spare for tokens further ahead, and DeepSeek-V3's report
          sees it at billions of parameters
"""

from ablations import draw, small
from ablations.lab import Claim, Figure, main

WITH, WITHOUT = "MTP at two depths", "no MTP"
FIGURE = Figure(
    name="mtp_loss",
    base=small.BYTES | dict(mtp_hybrid_override_pattern="*E", mtp_num_layers=2),
    variants={WITHOUT: {}, WITH: dict(num_nextn_predict_layers=1)},
    quick=dict(steps=60),
    units=dict(loss="nats a byte"),
    cell=small.loss,
    claims=(
        Claim(
            says="Without MTP the next token costs more",
            where="arXiv:2512.20856, table 2",
            published="+2.4 % on seven benchmarks with MTP",
            more=WITHOUT,
            less=WITH,
            measure="loss",
            reason="Doubted before it was run: the losses further ahead pull at a backbone of 0.2 "
            "M parameters that has not yet learned the next token",
        ),
    ),
    draw=lambda found: draw.paired(found, "loss", WITHOUT, "nats a byte, validation"),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
