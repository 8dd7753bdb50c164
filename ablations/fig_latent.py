"""
Do experts in a narrow latent lose anything, if the width saved buys more of them, and a token takes
as many as before (eff) or as many times more (acc)?

Claim     with experts in a latent of width d/a and a times as many of them, a model with as many a
          token ("eff") equals standard experts, one with a times as many a token ("acc") beats
          them, and one with no more experts is clearly worse
          arXiv:2601.18089 figures 3 to 6 (a = 4); the Nemotron 3 white paper, table 1

Varied    where experts work, their number, how many a token takes; a = 2, 4 and 8
Equal     the routed experts' parameters, 131,072, but for "no more"; weights and batches that have
          the same shape; acc has the standard layer's expert FLOPs, eff 1/a. Projections (4,096
          parameters at a = 2) and a larger router come on top. Also the size at which the routed
          path starts, by its scale: initialised as Super is, a latent's two more matrices would
          start it at a twentieth of standard's, which a long training lifts and 450 steps do not.
          Pilots tried acc at a = 4, of scale 2.5 and with equal starts: standard was far ahead

Here      one Mamba-2 layer, one LatentMoE, and 8,192 random facts of 16 bits: what experts are for.
          Width 64 leaves a latent little to spare: the paper's 4 holds at width 2,048, hence 2 in
          most claims; beyond, it should cost more here than there
"""

from ablations import draw, small
from ablations.lab import Claim, Figure, main
from plot import sheet


def of(latent, experts, taken, scale):
    fields = "moe_latent_size", "n_routed_experts", "num_experts_per_tok", "routed_scaling_factor"
    return dict(zip(fields, (latent, experts, taken, scale)))


STANDARD, ACC, EFF, NONE = "standard", "acc", "eff", "no more experts"
VARIANTS = {
    STANDARD: dict(moe_latent_size=None),
    ACC: of(32, 32, 8, 52.0),
    EFF: of(32, 32, 4, 37.0),
    NONE: of(32, 16, 4, 37.0),
    "eff, a = 4": of(16, 64, 4, 102.0),
    "eff, a = 8": of(8, 128, 4, 262.0),
    "acc, a = 4": of(16, 64, 16, 204.0),
    "acc, a = 8": of(8, 128, 32, 741.0),
    f"{NONE}, a = 4": of(16, 16, 4, 102.0),
    f"{NONE}, a = 8": of(8, 16, 4, 262.0),
}
PAPER = "arXiv:2601.18089 "
FIVE = PAPER + "figures 5, 6"
FOUR, WORSE = PAPER + "figure 4", "clearly worse"
THREE, FLAT = PAPER + "figure 3", "equal up to a quarter (eff), then worse"
CLAIMS = (
    Claim("Standard experts end at a higher loss than twice as many in half the width (acc)",
          FIVE, "acc below standard at 16 G and 95 G parameters", STANDARD, ACC,
          "loss", reason="Probably for want of time, not of room: a path of four matrices learns "
          "later than one of two; in a shorter training projections that narrow nothing cost about "
          "as much (latent_price). What a latent can hold in the end is not measured."),
    Claim("Standard experts end at a higher loss than eff", PAPER + "figure 5, table 4",
          "equal losses; MMLU-Pro 48.30 against 51.29, math 78.32 against 77.01",
          STANDARD, EFF, "loss", reason="As above."),
    Claim("eff, with half the expert FLOPs, ends at a higher loss than acc",
          FIVE, "eff equals standard, acc is lower", EFF, ACC, "loss"),
    Claim("A latent without more experts ends at a higher loss than with more (eff)",
          FOUR, WORSE, NONE, EFF, "loss"),
    Claim("At a quarter of the width no more experts end at a higher loss than eff",
          FOUR, WORSE, f"{NONE}, a = 4", "eff, a = 4", "loss"),
    Claim("At an eighth of the width no more experts end at a higher loss than eff",
          FOUR, WORSE, f"{NONE}, a = 8", "eff, a = 8", "loss"),
    Claim("eff at an eighth of the width ends at a higher loss than at a quarter",
          THREE, FLAT, "eff, a = 8", "eff, a = 4", "loss",
          reason="Here every halving costs as much: the flat part up to a quarter is not seen."),
    Claim("acc at half the width ends at a higher loss than at a quarter",
          THREE, FLAT, ACC, "acc, a = 4", "loss", reason="Here the first halvings cost too."),
    Claim("acc at an eighth of the width ends at a higher loss than at a quarter",
          THREE, FLAT, "acc, a = 8", "acc, a = 4", "loss"),
)  # fmt: skip


def picture(found):
    """Left: the loss against a. Right: differences to standard at a = 2."""
    fig, (a, b) = sheet(1, 2, figsize=(12, 4.6), width_ratios=(1, 1.1))
    two, names = (STANDARD, ACC, EFF, NONE), {2: "", 4: ", a = 4", 8: ", a = 8"}
    sweep = {k: {1: STANDARD} | {x: k + tail for x, tail in names.items()} for k in two[1:]}
    draw.sweep(a, found, "loss", {STANDARD: {}} | sweep)
    a.set(xscale="log", xlabel="a: the width over the latent's", ylabel="validation nats a value")
    a.set_xticks((1, 2, 4, 8), "1248")
    a.minorticks_off()
    draw.differences(b, found.only(*two), "loss", STANDARD, "nats a value, at a = 2")
    b.set_yticks(range(4), two)
    fig.suptitle(draw.title(found, CLAIMS[0], 100), x=0.01, ha="left", weight="bold")
    return fig


TASK = dict(hybrid_override_pattern="ME", data="facts:8192", steps=450, eval_tokens=8192)
FIGURE = Figure("latent", CLAIMS, picture, VARIANTS, small.loss, small.FACTS | TASK,
                dict(steps=60), units=dict(loss="nats a value"))  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
