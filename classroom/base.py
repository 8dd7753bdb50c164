"""
The report's chapters on the base model: what it is made of, and how it is pre-trained.

Each is a function of a chain of stages that are done (classroom/stages.py).

Not here  the assistant that is made of it: classroom/assistant.py
Sources   arXiv:2604.12374 section 2, in its order
"""

import re

from classroom import pictures
from classroom.chapters import HERE, Chapter, alike, found, published


def architecture(at):
    sizes, config = at.said("sizes"), at.facts("toy")["config"]
    total, active = found(r"^total +\d+ +([\d,]+) +([\d,]+)", sizes)
    toy = found(r"([\d.]+) M parameters", at.said("toy"))
    experts = f"{config['n_routed_experts']}, {config['num_experts_per_tok']}"
    return Chapter(
        "Architecture",
        "2.1",
        (
            "A stack of layers with one mixer each: Mamba-2, whose memory has a fixed size; "
            "LatentMoE, whose experts work in a narrower space, so that there can be more of them; "
            "and a few layers of attention, without positions.",
            "The full model is counted here, tensor by tensor, and not made. What is trained "
            "is a toy of the same parts.",
        ),
        (HERE.parent / "docs" / "stack.png").read_bytes(),
        "Super's layers, what one layer does, and what the MTP block adds",
        (
            ("Super: parameters", "parameters", total),
            ("active for a token", "active parameters", active),
            (
                "active without the input embedding",
                "active without embeddings",
                found(r"input embedding.* ([\d,]+)$", sizes),
            ),
            ("the toy: parameters", "", f"{toy} M"),
            ("layers of Super, of the toy", "layers", len(config["hybrid_override_pattern"])),
            ("experts, chosen", "experts of a layer and how many a token takes", experts),
        ),
        "everything but the design. The published counts leave the router out; these do not.",
        ("sizes",),
    )


def ahead(at):
    rows = at.rows("toy")
    (drafts,) = [r for r in at.rows("toy", "worth.csv") if r["part"] == "MTP drafts"]
    return Chapter(
        "Multi-token prediction",
        "2.1.2",
        (
            "One block guesses the token after the next, and applied again the one after that. It "
            "is a loss that makes the model look ahead, and a drafter: the model checks several "
            "drafts in one pass and keeps those that it would have said itself.",
        ),
        pictures.ahead(rows),
        "what a guess further ahead costs above the next token's, while the toy learns",
        (
            (
                "tokens a round, with 7 drafts",
                "tokens a round of 7 drafts",
                f"{drafts['worth']:.2f}",
            ),
            ("the same of DeepSeek-R1", "DeepSeek-R1's tokens a round", "-"),
            ("the same of Qwen3-Next", "Qwen3-Next's tokens a round", "-"),
            ("loss of later tokens above the next one's, nats", "", pictures.costs(rows)),
        ),
        "the model, and the text: drafts are easier where a text is more predictable, so "
        "rounds of different models on different texts do not compare.",
        ("toy",),
    )


def four_bits(at):
    exact, four = at.rows("mini"), at.rows("four")
    a, b = exact[-1]["val_nats"], four[-1]["val_nats"]
    zeros = [100 * rows[-1]["zero_gradients"] for rows in (exact, four)]
    most = [max(100 * r["zero_gradients"] for r in rows) for rows in (exact, four)]
    return Chapter(
        "Pre-training in NVFP4",
        "2.2",
        (
            "Super is pre-trained in NVFP4: both operands of every product are rounded to sixteen "
            "codes, sixteen neighbours sharing a scale. Weights in squares, gradients at random, "
            "both sides of the weight gradient rotated first, the last layers left alone.",
            "Here the same small model learns twice from the same batches, once with every product "
            "rounded as a chip would round it.",
        ),
        pictures.four_bits(exact, four),
        "the loss in four bits beside fp32, and the share of gradients that are zero",
        (
            (
                "validation loss above the exact run's",
                "loss gap of NVFP4",
                f"{100 * (b / a - 1):+.2f} %",
            ),
            ("gradients that are zero at the end, in NVFP4", "zero gradients", f"{zeros[1]:.2f} %"),
            ("the same in fp32", "", f"{zeros[0]:.2f} %"),
            ("at their most, NVFP4 and fp32", "", f"{most[1]:.2f} %, {most[0]:.2f} %"),
            (
                "NVFP4's, as a multiple of the exact run's",
                "zero gradients against BF16",
                f"{zeros[1] / zeros[0]:.1f}" if zeros[0] else "-",
            ),
        ),
        "the model, and the run; one seed. Seeds of so small a run differ by as much as the gap, "
        "so its sign says nothing (docs/four_bits.md has three seeds).",
        ("mini", "four"),
    )


def text(at):
    parts = {k[7:]: float(v) for k, (v, _) in published().items() if k.startswith("blend: ")}
    size, train, val, name = found(
        r"^data +.*: ([\d,]+) bytes, ([\d,]+) \+ ([\d,]+) tokens of ([^,]+)", at.said("toy")
    )
    read = int(at.rows("toy")[-1]["tokens"])
    return Chapter(
        "Data",
        "2.3",
        (
            "Super reads a blend of filtered web pages, synthetic text, code, mathematics and "
            "many languages, in two phases of which the second has more of the best.",
            "The toy reads one thing that every Python has: the source of its standard library.",
        ),
        pictures.shares(
            list(parts), list(parts.values()), "percent of phase 1", "Super's blend, as published"
        ),
        "the published blend of the first phase",
        (
            ("tokens read", "tokens of pre-training", f"{read:,}"),
            ("the text, in bytes", "", size),
            ("tokens to learn from, held out", "", f"{train}, {val}"),
            ("tokenizer", "", name),
        ),
        "sixteen sources became one, and no filter is needed.",
        ("toy",),
    )


def schedule(at):
    run, last = at.facts("toy")["run"], at.rows("toy")[-1]
    percent = lambda x: f"{100 * x:g} %"
    recipe = (
        ("tokens of a sequence", "sequence", run["length"]),
        ("sequences a step", "batch", run["batch"]),
        ("peak learning rate", "peak learning rate", f"{run['lr']:g}"),
        ("last learning rate", "last learning rate", f"{run['lr_min']:g}"),
        ("share of the steps that climb", "share that climbs", percent(run["warmup"])),
        ("share that falls", "share that falls", percent(run["decay"])),
        ("weight decay", "weight decay", f"{run['weight_decay']:g}"),
        ("weight of the MTP losses", "MTP loss", f"{run['mtp_loss']:g}"),
        ("step of the router's bias", "router bias step", f"{run['bias_rate']:g}"),
        ("weight of the balance loss", "balance loss", f"{run['balance']:g}"),
    )
    return Chapter(
        "Hyperparameters and schedule",
        "2.4",
        (
            "AdamW; the learning rate climbs, stays, and falls by a square root. Two forces keep "
            "the experts busy: a bias that no gradient touches, and a small loss.",
            f"The toy ends at {last['val_bpb']:.3f} bits a byte of text that it has not seen.",
        ),
        at.picture("toy", "loss.png"),
        "losses, the cost of looking ahead, and the balance of the experts of the toy's run",
        (*recipe, ("validation, bits a byte", "", f"{last['val_bpb']:.3f}")),
        "batch and length; a smaller model takes a larger learning rate, and of so few steps a "
        f"larger share climbs and falls. As published: {', '.join(alike(recipe))}.",
        ("toy",),
    )


def merging(at):
    line = r"^ *(?:step )?(\d+|merged) +weight ([\d.]+) +validation ([\d.]+) nats"
    steps = re.findall(line, at.said("merge"), re.M)
    steps = [(name, float(weight), float(nats)) for name, weight, nats in steps]
    gain = steps[-2][2] - steps[-1][2]
    verdict = f"The average is {abs(gain):.3f} nats " + ("better" if gain > 0 else "worse")
    fallen = at.rows("mini")[-1]["val_nats"]
    return Chapter(
        "Checkpoint merging",
        "2.5",
        (
            "A learning rate that falls averages out the noise of the last steps. So does an "
            "average of checkpoints whose rate stayed, with weights that imitate the fall; it "
            "costs no training, and shows how good a run is while it goes on.",
        ),
        pictures.merged(steps, f"{verdict} than the last checkpoint"),
        "validation loss of the checkpoints whose rate stays, and of their average",
        (
            ("checkpoints merged", "checkpoints merged", len(steps) - 1),
            ("what the average gains", "gain of merging", f"{gain:+.3f} nats a token"),
            ("validation of the average, nats", "", f"{steps[-1][2]:.3f}"),
            ("of the run whose rate falls, nats", "", f"{fallen:.3f}"),
        ),
        "the model, and what is measured: nats instead of benchmarks.",
        ("flat", "merge"),
    )


def longer(at):
    rows, before, after = at.rows("long"), at.facts("mini")["run"], at.facts("long")["run"]
    start = before["steps"]
    seen = [r for r in rows if r["val_bpb"] != ""]
    short = [r for r in seen if r["step"] <= start][-1]["val_bpb"]
    return Chapter(
        "Long context",
        "2.6",
        (
            "Attention without positions has nothing to stretch: a longer window is the same "
            "model, and training goes on for a little while at the lowest rate.",
        ),
        pictures.longer(rows, start, before["length"], after["length"]),
        "validation loss before and after the windows become longer",
        (
            ("tokens of a window", "long sequence", after["length"]),
            ("of the windows before", "sequence", before["length"]),
            (
                "tokens of this stage",
                "tokens of the long stage",
                f"{int(rows[-1]['tokens'] - rows_at(rows, start)['tokens']):,}",
            ),
            ("learning rate", "rate of the long stage", f"{after['lr']:g}"),
            ("bits a byte, short windows", "", f"{short:.3f}"),
            ("bits a byte, long windows", "", f"{seen[-1]['val_bpb']:.3f}"),
            ("RULER at 64k", "RULER at 64k", "-"),
            ("RULER at 1M", "RULER at 1M", "-"),
        ),
        "the windows, and the test: both numbers are of the same validation text, cut into windows "
        "of either length. RULER asks questions that this model cannot read.",
        ("long",),
    )


def rows_at(rows, step):
    return next(r for r in rows if r["step"] == step)


def worth(at):
    whole, *rest = at.rows("toy", "worth.csv")
    parts = [r for r in rest if r["unit"] == "nats more"]
    most = max(parts, key=lambda r: r["worth"])
    return Chapter(
        "Evaluation of the base model",
        "2.7",
        (
            "Benchmarks ask for knowledge, and a toy has none. What can be asked instead: how "
            "much worse it predicts with one of its parts switched off.",
        ),
        pictures.shares(
            [r["part"] for r in parts],
            [r["worth"] for r in parts],
            "nats a token lost without it",
            f"The loss is {whole['worth']:.2f} nats; {most['part']}, {most['worth']:.2f} more",
        ),
        "what each part of the toy is worth",
        (
            *((key, key, "-") for key in ("MMLU", "MATH", "GSM8K")),
            *((r["part"], "", f"{r['worth']:+.3f} nats") for r in parts),
        ),
        "the question. Nothing of ours can be compared with a benchmark.",
        ("toy",),
    )
