"""
Where would 2.2 times GPT-OSS's tokens a second come from, and 7.5 times Qwen's?

Claim     reading 8k tokens and writing 64k, Super writes up to 2.2 times as many tokens a second
          as GPT-OSS-120B and 7.5 times as many as Qwen3.5-122B
          arXiv:2604.12374 figure 1, on B200s

Varied    what is not stated: sequences at once, GPUs a copy, Super's precision
Equal     the card, the lengths, the model of a step: ablations/roofline.py, its flags assumptions

Here      arithmetic, which does not shrink. Nothing is measured, there are no seeds: a verdict is
          the sign of one difference, and says what the factors need, not that they were reached
"""

from dataclasses import replace

from ablations import roofline
from ablations.lab import Claim, Figure, main
from plot import COLOURS, MARKERS, sheet

OTHERS = {"gpt": ("GPT-OSS-120B", 2.2), "qwen": ("Qwen3.5-122B", 7.5)}
WHERE = "arXiv:2604.12374, figure 1"


def cell(settings, seed):
    """Factors of Super over the other two, and tokens a second a GPU against sequences a GPU."""
    a, found = roofline.Flags(**settings), {}
    for name, m in roofline.models(a).items():
        n, most = roofline.copy(m, a)
        at = sorted({most, *(2**i for i in range(13) if 2**i < most)})
        found[name] = [(B / n, roofline.rate(m, replace(a, batch=B))) for B in at]
    for short, (name, factor) in OTHERS.items():
        ratio = found["Super"][-1][1] / found[name][-1][1]
        found |= {short: ratio, "published_" + short: factor}
    return found


FULL, FEW, EIGHT, BF16 = "memory full", "16 sequences", "8 GPUs a copy", "Super in BF16"
CLAIMS = (
    Claim("With memory full of sequences, Super writes 2.2 times GPT-OSS's tokens or more",
          WHERE, "2.2 times", FULL, FULL, "gpt", than="published_gpt"),
    Claim("With memory full and the fewest GPUs each, it writes 7.5 times Qwen's or more",
          WHERE, "7.5 times", FULL, FULL, "qwen", than="published_qwen"),
    Claim("The factor over GPT-OSS needs a large batch: with 16 sequences each it is smaller",
          WHERE, "2.2 times, at a batch that is not stated", FULL, FEW, "gpt",
          reason="Of few sequences the weights are the cost, and Super reads more of them: 22 of "
          "512 experts a token. Its small cache pays where it makes room for more sequences"),
    Claim("The factor over Qwen needs few GPUs a copy: with 8 each it is smaller",
          WHERE, "7.5 times, on a number of GPUs that is not stated", FULL, EIGHT, "qwen",
          reason="Qwen's 244 GB in BF16 leave two GPUs little room, and eight plenty"),
    Claim("The factor over Qwen needs Super's four bits: in BF16, as Qwen is, it is smaller",
          WHERE, "7.5 times, Super's precision not stated", FULL, BF16, "qwen",
          reason="Most of the factor is the precision: in BF16 Super fills two GPUs as well"),
)  # fmt: skip


def picture(found):
    """Left: tokens a second against sequences, up to full memory. Right: the factors."""
    fig, (a, b) = sheet(1, 2, figsize=(11, 5))
    for i, name in enumerate(("Super", *(name for name, _ in OTHERS.values()))):
        points = sorted(found.lines(name)[FULL][0].items())
        a.plot(*zip(*points), MARKERS[i] + "-", color=COLOURS[i], lw=2, label=name)
        a.plot(*points[-1], MARKERS[i], color=COLOURS[i], ms=13, mfc="none", mew=2)
    a.loglog()
    a.set(xlabel="sequences a GPU (ring: memory is full)", ylabel="tokens a second a GPU, a bound")
    a.set(title="A small cache makes room for a batch")
    a.legend(frameon=False)
    for i, (short, (name, published)) in enumerate(OTHERS.items()):
        factors = [by_seed[0] for by_seed in found.values(short).values()]
        at = [k + 0.38 * (i - 0.5) for k in range(len(factors))]
        bars = b.barh(at, factors, 0.36, color=COLOURS[i + 1], alpha=0.6, label="times " + name)
        b.bar_label(bars, fmt=" %.1f", size=10)
        b.axvline(published, color="0.55", ls="--", lw=2, zorder=0)
    b.set_yticks(range(len(factors)), list(found.values("gpt")))
    b.invert_yaxis()
    b.set(xlabel="Super's tokens a second over the other's\n(dashed: published)")
    b.set(title="What the published factors need")
    b.legend(framealpha=1, loc="lower right")
    return fig


VARIANTS = {
    FULL: {},
    "memory of the mean": dict(reserve="mean"),
    FEW: dict(batch=16),
    "2 GPUs a copy": dict(gpus=2),
    EIGHT: dict(gpus=8),
    BF16: dict(super="bf16"),
}
FIGURE = Figure("throughput", CLAIMS, picture, VARIANTS, cell, seeds=(0,), exact=True,
                units={"": "times as many tokens a second"})  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
