"""
Does sharing one MTP block between two depths make deep drafts stand longer?

Claim     a block that is trained at several depths, its weights shared, drafts deeper than it was
          trained: 3.45 tokens a round of 8, most of its lead over other models at drafts 4 to 7
          arXiv:2604.12374 section 2.1.2, table 2 and figure 4

Varied    the MTP block: one trained at two depths (the release), one at one depth, or two blocks,
          one a depth, of which the second drafts on from index 3
Equal     the backbone's first weights, the batches, the tokens; 7 drafts behind the same 32 prompts
          of 64 tokens, at temperature 1 (at 0 a toy repeats itself, which anything predicts). Two
          blocks have twice the parameters

Here      a toy of an earlier preset, 450 steps, 5 CPU minutes a cell: 45 in all. Rate k: of the
          drafts k whose forerunners stood, the share that stood. It should survive: a shared block
          has seen its own output as input. What a toy accepts is easy, spaces and begun words, so
          that rates hardly fall. The receipts are of before the lab: no seconds
"""

import checkpoint
import data
import heal
import sample
from ablations import draw, small, toy
from ablations.lab import Claim, Figure, main
from plot import sheet

SHARED, ONE, TWO = "one block, 2 depths", "one block, 1 depth", "two blocks"
LENGTH, PLAIN = "tokens a round", "tokens a round, no cache"


def cell(settings, seed):
    """Tokens a round and acceptance by draft, with the drafts' own cache and without."""
    own = dict(settings)
    asked = own.pop("prompts"), own.pop("new")
    with small.trained(own, seed) as run:
        folder = run.settings.folder()
        model, enc, _ = sample.load_run(folder)
        val = data.encode(enc, data.corpus(checkpoint.read(folder)["run"]["data"]).val)
    found = {}
    for after in ("", ", no cache"):
        t = heal.acceptance(model, val, 7, *asked, 1.0, seed=0, remember=not after)
        rates = [t.stood[k] / max(1, t.reached[k]) for k in range(1, 8)]
        curves = dict(reached=t.reached[1:8], stood=t.stood[1:8], rate=rates)
        found |= {name + after: list(enumerate(ys, 1)) for name, ys in curves.items()}
        found |= {LENGTH + after: t.tokens / t.rounds}
    return found | {f"rate {k}": found["rate"][k - 1][1] for k in (1, 7)}


WHERE, FOUR = "arXiv:2604.12374 section 2.1.2", "arXiv:2604.12374 figure 4"
CLAIMS = (
    Claim("A block trained at two depths drafts more tokens a round than one trained at one",
          WHERE, "sharing lets a block draft deeper than it was trained", SHARED, ONE, LENGTH),
    Claim("One block shared by two depths drafts more tokens a round than two blocks",
          WHERE, "the same; 3.45 tokens of 8 in table 2", SHARED, TWO, LENGTH),
    Claim("At draft 7 the shared block is accepted more often than two blocks",
          FOUR, "its lead over other models is largest at drafts 4 to 7", SHARED, TWO, "rate 7"),
    Claim("At draft 7 the shared block is accepted less often than at draft 1",
          FOUR, "acceptance falls from draft to draft", SHARED, SHARED, "rate 1", than="rate 7",
          reason="What the toy accepts is easy text: spaces, and words already begun."),
)  # fmt: skip


def picture(found):
    """Above: tokens a round. Below: acceptance by draft."""
    fig, (a, b) = sheet(2, 1, figsize=(10, 7.6), height_ratios=(4, 5))
    draw.levels(a, found, LENGTH, "tokens a round, of 8")
    for i, by_seed in enumerate(found.values(PLAIN).values()):
        a.plot(list(by_seed.values()), [i] * len(by_seed), "|", color="k", ms=22, mew=2)
    a.annotate("without a draft cache", (2.55, -0.5), color="k", size=10, ha="center")
    a.set_title(draw.title(found, CLAIMS[0], 62))
    draw.curves(b, found, "rate")
    b.set(xlabel="draft", ylabel="accepted / tried, mean and seeds")
    b.set_title(draw.title(found, CLAIMS[2], 62))
    return fig


FIGURE = Figure(
    name="mtp",
    claims=CLAIMS,
    draw=picture,
    variants={
        SHARED: {},
        ONE: dict(mtp_num_layers=1),
        TWO: dict(num_nextn_predict_layers=2),
    },
    units={LENGTH: "tokens a round", "": "of the share accepted"},
    cell=cell,
    base=toy.EARLIER | dict(prompts=32, new=128),
    quick=dict(steps=24, eval_tokens=2048, prompts=4, new=16),
)

if __name__ == "__main__":
    main(FIGURE, __doc__)
