"""
Which tensors must stay out of four bits?

Claim     Mamba's output matrices, the attention's first three and its output matrix cost loss if
          they are taken to NVFP4 as well; up to 40 % of what the first multiply becomes zero there
          the Nemotron 3 white paper (arXiv:2512.20856), figure 4; arXiv:2604.12374, table 3

Varied    which matrices multiply in four bits besides those of the recipe
Equal     one model, trained in fp32 (200 steps), and the validation text. There, branches of a run
          were trained on; here nothing is, so that no seed's luck lies between two groups

Here      the forward products alone, rounded to the nearest. A group's error does not shrink with
          the model, but its part does: one of six layers is attention, two are Mamba. The last
          layer stays in fp32, as in the recipe
"""

from copy import deepcopy

from ablations import draw, small
from ablations.lab import Claim, Figure, main
from nvfp4 import Recipe
from quant import lowbit

KEPT, MAMBA, QKV, OUT = (
    "the recipe",
    "Mamba's output",
    "queries, keys, values",
    "attention's output",
)
GROUPS = {KEPT: (), MAMBA: ("out_proj",), QKV: ("q_proj", "k_proj", "v_proj"), OUT: ("o_proj",)}
NONE = "none in four bits"


def taken(model, more):
    """A copy whose products are in four bits: the recipe's, and those of matrices named so."""
    made = deepcopy(model).eval()
    lowbit.convert(made, Recipe())
    for name, m in list(made.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in more and int(name.split(".")[2]) < len(made.backbone.layers) - 1:
            setattr(made.get_submodule(parent), last, lowbit.Linear(m.weight, Recipe()))
    return made


def flushed(model, name):
    """The share of what matrices of this name multiply that four bits make 0."""
    hows = [m.how for n, m in model.named_modules() if n.endswith(name) and hasattr(m, "how")]
    zeros, numbers = sum(how.flushed["fprop x"] for how in hows if how.flushed).tolist()
    return zeros / numbers


def cell(settings, seed):
    """Validation nats of each group; what two matrices of Mamba flush to zero."""
    with small.trained(settings, seed) as run:
        found = {NONE: small.nats(run.model, run.settings)}
        for group, names in GROUPS.items():
            model = taken(run.model, names)
            lowbit.watch(model)
            found[group] = small.nats(model, run.settings)
            if group == MAMBA:
                found |= {f"0 in {x}": flushed(model, x) for x in ("in_proj", "out_proj")}
    return found


MODEL, WHITE = "one model", "arXiv:2512.20856, figure 4"
RAISES = "the loss is higher if these are quantised as well"


def claim(says, published, more, less, reason=""):
    return Claim(says, WHITE, published, MODEL, MODEL, more, than=less, reason=reason)


CLAIMS = (
    claim("Mamba's output matrices in four bits cost more than the recipe", RAISES, MAMBA, KEPT),
    claim("The attention's first three matrices in four bits cost more", RAISES, QKV, KEPT,
          "One layer of six is attention, and these are 8 thousand of its weights"),
    claim("The attention's output matrix in four bits costs more", RAISES, OUT, KEPT,
          "As above, with 4 thousand weights"),
    claim("The recipe costs more than none in four bits", "below 1 %, 1 T tokens", KEPT, NONE),
    claim("More becomes zero before Mamba's output matrix than before its input matrix",
          "up to 40 % of the former", "0 in out_proj", "0 in in_proj"),
)  # fmt: skip


def picture(found):
    """Nats of the groups beside one another, and as differences to the recipe's."""
    seen = found.beside({group: group for group in (NONE, *GROUPS)})
    shown = CLAIMS[0]._replace(more=MAMBA, less=KEPT, measure="loss", than="")
    return draw.paired(seen, "loss", KEPT, "nats a byte", shown)


FIGURE = Figure("groups", CLAIMS, picture, {MODEL: {}}, cell,
                small.BYTES | dict(steps=200, eval_tokens=8192), quick=dict(steps=40),
                units={"": "nats a byte", "0 in out_proj": "of what they multiply"})  # fmt: skip

if __name__ == "__main__":
    main(FIGURE, __doc__)
