"""
What four bits cost a trained model, how scales and formats should be chosen, and what distillation
repairs: the toy, three seeds.

    python ablations/fig_ptq.py RUN RUN RUN     measures what is lacking, writes table and pictures
    python ablations/fig_ptq.py                 only the latter, from what is there

The measure is KL(model || quantised) on 8,192 tokens of validation text; calibration is on 8,192
tokens of training text. The loss moves by less than its own error, and half the time downwards. A
verdict is computed from three seeds, a claim at a time: it reproduces, or the other way, in all
three, or it lies inside their spread.

Sources   claims: arXiv:2604.12374 section 4, table 10, and QAD; there 120 G parameters, here 2.9 M
"""

import csv
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import checkpoint
import data
import ptq
import sample
from quant import autoquant, calibrate, distill, packed

TABLE = ROOT / "receipts" / "ptq" / "cost.csv"
COLUMNS = "seed", "what", "how", "inputs", "bits", "kl", "kl_error", "nats"
BITS = (4.5, 4.75, 5.0, 5.5, 7.0, 8.0)
COLOUR = dict(
    zip(
        ("black", "orange", "sky", "green", "blue", "red"),
        ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"),
    )
)  # Okabe and Ito


# 1. Measuring.


class Subject:
    """One seed's model, its texts, and what a quantised copy differs by."""

    def __init__(self, run):
        saved = checkpoint.read(run)
        self.seed, self.model = saved["run"]["seed"], sample.load_run(run)[0]
        enc, corpus = data.unpack(saved["tokenizer"]), data.corpus(saved["run"]["data"])
        text, other = (data.encode(enc, part) for part in (corpus.train, corpus.val))
        self.text, self.other = (ptq.windows(x, 8192, 128, "text") for x in (text, other))
        self.more = ptq.windows(text, 65536, 128, "text")  # of distillation
        self.stats = calibrate.calibrate(self.model, self.text[:, :-1].split(8))
        self.sizes, _ = ptq.sizes(ptq.Held(self.model))
        with torch.no_grad():
            self.p = [self.model(x[:, :-1]).log_softmax(-1) for x in self.other.split(8)]

    @torch.no_grad()
    def cost(self, low):
        kl, nats = [], []
        for p, x in zip(self.p, self.other.split(8)):
            q = low(x[:, :-1]).log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1).flatten())
            nats.append(-q.gather(-1, x[:, 1:, None]).flatten())
        kl = torch.cat(kl).double()
        return float(kl.mean()), float(kl.std() / len(kl) ** 0.5), float(torch.cat(nats).mean())

    def quantised(self, plan, method="mse", model=None, cache=False):
        return calibrate.quantize(model or self.model, plan, self.stats, method, cache)

    def uniform(self, kind):
        return dict.fromkeys(self.sizes, kind)


def nll(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def at_random(sizes, bits, seed):
    """A plan that spends the budget without looking: units in random order get a better format
    while it lasts.
    """
    g = torch.Generator().manual_seed(seed)
    plan = dict.fromkeys(sizes, "NVFP4")
    for i in torch.randperm(len(plan), generator=g).tolist():
        unit = list(plan)[i]
        for kind in ("FP8", None) if torch.rand((), generator=g) < 0.5 else (None, "FP8"):
            better = plan | {unit: kind}
            if autoquant.mean_bits(better, sizes) <= bits:
                plan = better
                break
    return plan


def measured(s):
    """Every row of one seed: (what, how, inputs, bits, model)."""
    for method in calibrate.METHODS:
        low = s.quantised(s.uniform("NVFP4"), method)
        for inputs in (False, True):
            yield "method", method, inputs, 4.5, packed.rounded(low, inputs)
    low = s.quantised(s.uniform("FP8"))
    for inputs in (False, True):
        yield "fp8", "max", inputs, 8, packed.rounded(low, inputs)
    released = autoquant.named("released", {u: ("NVFP4", "FP8") for u in s.sizes})
    bits = autoquant.mean_bits(released, s.sizes)
    yield "released", "mse", True, bits, packed.rounded(s.quantised(released, cache=True))
    yield "cache", "max", True, 16, packed.rounded(s.quantised({}, cache=True))
    score = autoquant.sensitivity(s.model, s.text.split(8), s.stats, nll)
    for bits in BITS:
        plan = autoquant.assign(score, s.sizes, bits)
        yield "search", "mse", True, bits, packed.rounded(s.quantised(plan))
    for bits in BITS[2:5]:
        for draw in range(3):
            plan = at_random(s.sizes, bits, draw)
            yield f"random-{draw}", "mse", True, bits, packed.rounded(s.quantised(plan))
    plan = s.uniform("NVFP4")
    for steps in (20, 60):
        learned = distill.distill(
            s.model, plan, s.stats, s.more, steps, 1e-4, say=lambda line: None
        )
        low = s.quantised(plan, "max", learned)
        yield f"qad-{steps}", "max", True, 4.5, packed.rounded(low)


def measure(runs):
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    done = {int(r["seed"]) for r in rows()}
    for run in runs:
        seed = checkpoint.read(run)["run"]["seed"]
        if seed in done:
            continue
        s, found = Subject(run), []
        for what, how, inputs, bits, low in measured(s):
            kl, error, nats = s.cost(low)
            line = (
                seed,
                what,
                how,
                int(inputs),
                f"{bits:.4f}",
                f"{kl:.6f}",
                f"{error:.6f}",
                f"{nats:.6f}",
            )
            print(*line, flush=True)
            found.append(line)
        first = not TABLE.is_file()
        with open(TABLE, "a", newline="") as f:
            out = csv.writer(f, lineterminator="\n")
            out.writerows([COLUMNS] * first + found)


def rows():
    if not TABLE.is_file():
        return []
    with open(TABLE, newline="") as f:
        return list(csv.DictReader(f))


# 2. Verdicts.


def kl(what, how=None, inputs=1, bits=None):
    """{seed: KL in mnat}."""
    return {
        int(r["seed"]): 1e3 * float(r["kl"])
        for r in rows()
        if r["what"] == what
        and how in (None, r["how"])
        and int(r["inputs"]) == inputs
        and (bits is None or abs(float(r["bits"]) - bits) < 1e-3)
    }


def verdict(worse, better):
    """Of {seed: KL} twice: whether the first is the larger one, in every seed."""
    signs = {worse[s] > better[s] for s in worse}
    if len(signs) == 2:
        return "inside the spread"
    return "reproduces" if signs == {True} else "the other way"


def claims():
    """(claim, what is called worse, what is called better)."""
    m = lambda how, inputs=1: kl("method", how, inputs)
    mean = lambda bits: {
        s: sum(kl(f"random-{i}", bits=bits)[s] for i in range(3)) / 3 for s in m("max")
    }
    return [
        ("max is worse than weight-MSE, W4A4", m("max"), m("mse")),
        ("max is worse than weight-MSE, W4A16", m("max", 0), m("mse", 0)),
        ("output-MSE is no better than weight-MSE", m("output"), m("mse")),
        ("GPTQ is no better than weight-MSE", m("gptq"), m("mse")),
        ("mixed at 4.75 bits costs less than 4.5 uniform", m("mse"), kl("search", bits=4.75)),
        ("the released map costs no more than FP8 everywhere", kl("fp8"), kl("released")),
        ("search beats random formats at 5 bits", mean(5.0), kl("search", bits=5.0)),
        ("search beats random formats at 5.5 bits", mean(5.5), kl("search", bits=5.5)),
        ("search beats random formats at 7 bits", mean(7.0), kl("search", bits=7.0)),
        ("distillation repairs, 60 steps", m("max"), kl("qad-60")),
    ]


def say():
    text = ["claim,verdict,worse_mnat,better_mnat"]
    numbers = lambda x: " ".join(f"{v:.2f}" for v in x.values())
    for claim, worse, better in claims():
        word = verdict(worse, better)
        print(f"{claim:52} {word:20} {numbers(worse)}  against  {numbers(better)}")
        text.append(f'"{claim}",{word},{numbers(worse)},{numbers(better)}')
    TABLE.with_name("verdicts.csv").write_text("\n".join(text) + "\n")


# 3. Pictures.


def bars(ax, names, groups):
    """groups {label: (colour, [{seed: value} of each name])}: means, and a dot a seed."""
    wide = 0.8 / len(groups)
    for j, (label, (colour, values)) in enumerate(groups.items()):
        for i, v in enumerate(values):
            at = i + (j - (len(groups) - 1) / 2) * wide
            mean = sum(v.values()) / len(v)
            ax.bar(at, mean, 0.9 * wide, color=colour, alpha=0.75, label=label if i == 0 else None)
            ax.plot([at] * len(v), list(v.values()), "k.", ms=6)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("KL to the unquantised model,\nmnat a token (dots: seeds)")
    ax.legend(frameon=False)


def pictures():
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    m = lambda inputs: [kl("method", how, inputs) for how in calibrate.METHODS]
    best = min(calibrate.METHODS, key=lambda how: sum(kl("method", how).values()))
    words = dict(max="max", mse="weight-MSE", output="output-MSE", gptq="GPTQ")
    fig, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    share = 1 - sum(kl("method", best).values()) / sum(kl("method", "max").values())
    bars(
        ax,
        words.values(),
        {
            "weights in NVFP4": (COLOUR["sky"], m(0)),
            "weights and inputs": (COLOUR["blue"], m(1)),
        },
    )
    ax.set_title(
        f"{words[best]} costs least: {100 * share:.0f} % less than max, with inputs rounded"
    )
    fig.savefig(ROOT / "docs" / "ptq-methods.png", dpi=120)

    fig, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    seeds = sorted(kl("fp8"))
    for i, seed in enumerate(seeds):
        ax.plot(
            BITS,
            [kl("search", bits=b)[seed] for b in BITS],
            "o-",
            color=COLOUR["blue"],
            label="searched" if i == 0 else None,
            alpha=0.8,
        )
        for b in BITS[2:5]:
            ax.plot(
                [b] * 3,
                [kl(f"random-{k}", bits=b)[seed] for k in range(3)],
                "x",
                color=COLOUR["orange"],
                ms=8,
                mew=2,
                label="formats at random" if i == 0 and b == BITS[2] else None,
            )
        for b, v in ((4.5, kl("method", "mse")), (8.0, kl("fp8"))):
            ax.plot(
                b,
                v[seed],
                "s",
                color=COLOUR["red"],
                ms=8,
                mfc="none",
                mew=2,
                label="one format for all" if i == 0 and b == 8 else None,
            )
    left = sum(kl("search", bits=4.75).values()) / sum(kl("method", "mse").values())
    ax.set(
        xlabel="mean bits a weight",
        yscale="log",
        ylabel="KL to the unquantised model, mnat a token",
        title=f"A quarter bit for the right matrices leaves {100 * left:.0f} % of the damage",
    )
    ax.legend(frameon=False, loc="lower left")
    fig.savefig(ROOT / "docs" / "ptq-pareto.png", dpi=120)

    fig, ax = plt.subplots(figsize=(9, 5), layout="constrained")
    steps = 0, 20, 60
    for i, seed in enumerate(seeds):
        y = [kl("method", "max")[seed], *(kl(f"qad-{n}")[seed] for n in steps[1:])]
        ax.plot(steps, y, "o-", color=list(COLOUR.values())[i + 2], label=f"seed {seed}", lw=2)
    gone = 1 - sum(kl("qad-60").values()) / sum(kl("method", "max").values())
    ax.set(
        xlabel="steps of 1,024 tokens",
        ylim=(0, None),
        ylabel="KL to the unquantised model, mnat a token",
        title=f"Distillation takes away {100 * gone:.0f} % of NVFP4's damage in 60 steps",
    )
    ax.legend(frameon=False)
    fig.savefig(ROOT / "docs" / "ptq-distillation.png", dpi=120)


def main(argv):
    torch.set_num_threads(1)
    measure(argv)
    if not rows() or not math.isfinite(float(rows()[0]["kl"])):
        sys.exit(
            "fig_ptq.py: nothing measured yet: name three runs, as runs/toy-0 runs/toy-1 runs/toy-2"
        )
    say()
    pictures()


if __name__ == "__main__":
    main(sys.argv[1:])
