"""
What does a token read and send, if experts work in a latent of a quarter of the width, four times
as many of them, of which it takes as many as before (eff) or four times as many (acc)? By
arithmetic, at Super's sizes.

Claim     with l = d/4, four times the experts and as many a token (eff), a token reads and sends a
          quarter; with four times as many a token too (acc), what standard experts read and send.
          The two projections are the price
          arXiv:2601.18089 sections 2 and 3, table 5

Varied    the latent, the number of experts, how many a token takes: 128 experts of which 6, 512 of
          which 6, 512 of which 24, and Super, 512 of which 22
Equal     the routed experts' parameters, 2.8 G a layer; d = 4096, hidden 2688, experts of 4.5 bits

Here      nothing is shrunk and nothing timed: bytes, numbers, multiply-adds of one layer. What is
          read depends on how many tokens share the reading: 64 that choose independently touch
          1 - (1 - k/E)^64 of the experts
"""

import latent_moe
import plot
from ablations import draw
from ablations.lab import Claim, Figure, main

D, HIDDEN, BITS = 4096, 2688, 4.5
VARIANTS = {
    "standard, 6 of 128": dict(E=128, k=6, l=4096),
    "eff, 6 of 512": dict(E=512, k=6, l=1024),
    "acc, 24 of 512": dict(E=512, k=24, l=1024),
    "Super, 22 of 512": dict(E=512, k=22, l=1024),
}


def cell(settings, seed):
    E, k, l = (settings[name] for name in ("E", "k", "l"))
    _, multiply_adds, sent = latent_moe.layer_cost(E, k, l, D, HIDDEN)
    expert = 2 * l * HIDDEN * BITS / 8
    touched = lambda tokens: E * (1 - (1 - k / E) ** tokens)
    return dict(
        parameters=E * 2 * l * HIDDEN,
        multiply_adds=multiply_adds,
        sent=sent,
        read_1=touched(1) * expert / 1e6,
        read_64=touched(64) * expert / 1e6,
        curve=[(2**i, touched(2**i) * expert / 1e6) for i in range(11)],
    )


STANDARD, EFF, ACC, SUPER = VARIANTS
SOURCE = "arXiv:2601.18089 section 3", "4 times"
TIME = "12 % fewer tokens a second at concurrency 1, at most 6 % at high; at most 9 % of the time"
CLAIMS = (
    Claim("Standard experts send more a token than eff", *SOURCE, STANDARD, EFF, "sent"),
    Claim(
        "A lone token reads more of standard experts than of eff", *SOURCE, STANDARD, EFF, "read_1"
    ),
    Claim(
        "acc multiplies more a token than standard experts, by its projections",
        "arXiv:2601.18089 table 5 and figure 7",
        TIME,
        ACC,
        STANDARD,
        "multiply_adds",
    ),
)


def picture(found):
    fig, (a, b) = plot.sheet(1, 2, figsize=(11, 4.6), width_ratios=(1.2, 1))
    draw.curves(a, found, "curve", names=False)
    a.legend(frameon=False)
    a.set(xscale="log", yscale="log", xlabel="tokens together", ylabel="MB of experts read a layer")
    draw.levels(b, found, "sent", "numbers sent a token and layer, each way")
    sent = {variant: by_seed[0] for variant, by_seed in found.values("sent").items()}
    eff, acc = sent[EFF] / sent[STANDARD], sent[ACC] / sent[STANDARD]
    b.set_title(f"eff sends {eff:.2g} of standard's, acc {acc:.2g}")
    read = {variant: by_seed[0] for variant, by_seed in found.values("read_64").items()}
    part = read[EFF] / read[STANDARD]
    a.set_title(f"For 64 tokens eff reads {part:.2g} of standard's")
    return fig


FIGURE = Figure(
    name="bytes",
    claims=CLAIMS,
    draw=picture,
    variants=VARIANTS,
    units=dict(
        sent="numbers a token and layer",
        read_1="MB a layer",
        multiply_adds="multiply-adds a token and layer",
    ),
    cell=cell,
    seeds=(0,),
    exact=True,
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
