"""
Training: the story of a run, from a folder of text to a model, a log, a picture and a sample.

    python train.py                              the toy preset on this Python's own standard library, minutes on a CPU
    python train.py --preset small --data my.txt --batch 64                      any preset, any text, the same story
    python train.py --name toy --resume --steps 600                              go on, bit for bit, from the last checkpoint
    python train.py --name toy --merge 4                                         average the last four checkpoints

One step minimises, over the global batch (sums divided by the global counts, however the batch is cut up),

    loss = nll(t+1) + 0.3/K sum over depths k of nll_k(t+1+k) + 1e-4 balance       mtp.py, latent_moe.py

then clips the gradient, steps AdamW, and nudges every router's bias. The learning rate climbs, stays, and falls:

    t < T_w           lr = lr_max t / T_w
    T_w <= t < T_s    lr = lr_max
    t >= T_s          lr = lr_min + (lr_max - lr_min) (1 - sqrt((t - T_s) / (T - T_s)))

Instead of falling, it can stay, and the average of the last checkpoints, weighted by the same curve, takes its place.

Not here  ranks; the FP4 recipe; document masks: a window may begin in one file and end in another
Sources   arXiv:2604.12374 sections 2.4 (optimiser, schedule, losses) and 2.5 (merging, after arXiv:2507.17634)
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy
import torch

import data
import latent_moe
import mtp
import sample
from model import Config, Nemotron


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Run:
    """Everything a run depends on. Each field is a flag of the command line."""
    preset: str = knob("toy", "toy (a laptop) | tiny-nv | small (one GPU) | nano (30B) | super (120B)")
    model: str = knob("", "changes to the preset, as field=value,field=value with config.json's field names")
    name: str = knob("", "the run's folder under --out; empty: the preset's name")
    out: str = knob("runs", "where run folders live")
    data: str = knob("python", "python | shakespeare | a text file | a folder | token files *.bin | recall | copy | arithmetic")
    tokenizer: str = knob("bpe:2048", "bytes | bpe:N | nemotron | a tokenizer.json or tekken.json")
    steps: int = knob(400, "optimiser steps")
    batch: int = knob(16, "sequences per step")
    micro: int = knob(0, "sequences per forward pass, a divisor of --batch; 0: all at once")
    length: int = knob(128, "tokens per sequence")
    lr: float = knob(4e-3, "peak learning rate")
    lr_min: float = knob(4e-5, "learning rate at the end")
    warmup: float = knob(0.05, "share of the steps that climb")
    decay: float = knob(0.3, "share of the steps that fall")
    weight_decay: float = knob(0.1, "AdamW's, on matrices only")
    clip: float = knob(1.0, "largest norm of the whole gradient")
    mtp_loss: float = knob(0.3, "weight of the MTP losses, shared by the depths")
    balance: float = knob(1e-4, "weight of the sequence balance loss")
    bias_rate: float = knob(1e-3, "step of the router biases")
    seed: int = knob(0, "of the weights and of the order of the data")
    eval_every: int = knob(100, "steps between evaluations")
    eval_tokens: int = knob(65536, "size of the validation slice, always the same tokens")
    log_every: int = knob(10, "steps between printed lines")
    save_every: int = knob(100, "steps between checkpoints")
    keep: int = knob(0, "checkpoints to keep; 0: all of them")
    stop: int = knob(0, "stop after this step, as if interrupted; 0: do not")
    resume: bool = knob(False, "go on with the run of this name; flags given now replace its own")
    from_step: int = knob(0, "resume from this checkpoint instead of the newest")
    merge: int = knob(0, "no training: merge the last N checkpoints of the run and evaluate each and the merge")
    device: str = knob("auto", "auto | cpu | cuda | mps")
    precision: str = knob("auto", "auto | fp32 | bf16 (autocast; parameters stay fp32)")
    threads: int = knob(0, "CPU threads; 0: torch's choice")
    prompt: str = knob("def ", "what the sample at the end goes on from")

# What a preset needs that differs from the above. nano and super: the report's own recipe.
RECIPES = {
    "tiny-nv": dict(length=256, lr=1e-3, lr_min=1e-5),
    "small": dict(tokenizer="bpe:32768", length=1024, batch=128, micro=16, steps=5000, lr=1e-3, lr_min=1e-5, warmup=.02,
                  decay=.2, eval_every=250, save_every=500, eval_tokens=1 << 20),
    "nano": dict(tokenizer="nemotron", length=8192, batch=3072, micro=1, steps=993_404, lr=1e-3, lr_min=1e-5, warmup=.008,
                 decay=.2, eval_every=1000, save_every=1000, eval_tokens=1 << 24, precision="bf16"),
    "super": dict(tokenizer="nemotron", length=8192, batch=3072, micro=1, steps=993_404, lr=4.5e-4, lr_min=4.5e-6,
                  warmup=.008, decay=.2, eval_every=1000, save_every=1000, eval_tokens=1 << 24, precision="bf16"),
}


def learning_rate(t, run):
    """The schedule above; t counts the step being taken, 1 ... run.steps, so the last step has exactly lr_min."""
    warm, fall = run.warmup * run.steps, run.steps * (1 - run.decay)
    if t < warm:
        return run.lr * t / warm
    if t < fall or fall == run.steps:
        return run.lr
    return run.lr_min + (run.lr - run.lr_min) * (1 - math.sqrt((t - fall) / (run.steps - fall)))


def merge_weights(n):
    """Coefficients of n consecutive checkpoints, oldest first, that stand in for a minus-sqrt decay over them; sum 1.

    With w_i = 1 - sqrt(i/n) the decayed weight of the i-th update, checkpoint j gets w_j - w_{j+1}.
    """
    return [math.sqrt((j + 1) / n) - math.sqrt(j / n) for j in range(n)]


def losses(model, ids, mask=None):
    """ids (b, t+1) -> the summed nll of depth 0 (the next token), 1, ..., K: the main loss and the MTP losses."""
    x, y = ids[:, :-1], ids[:, 1:]
    mask = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
    h = model.hidden(x)
    deeper = mtp.loss(model.mtp, h, y, mask, model.backbone.embeddings, model.lm_head) if model.mtp else []
    return [mtp.nll(model.logits(h), y, mask), *deeper]


@torch.no_grad()
def evaluate(model, tokens, run, per_id, cast):
    """The same tokens in the same order every time -> nats per token, bits per byte of the text they stand for."""
    device, n = model.lm_head.weight.device, min(len(tokens), run.eval_tokens + 1)
    starts = range(0, n - run.length, run.length)
    nats = count = length_in_bytes = 0
    model.eval()
    for i in range(0, len(starts), max(1, run.micro or run.batch)):
        ids = torch.stack([torch.as_tensor(tokens[s:s + run.length + 1].astype("int64"))
                           for s in starts[i:i + (run.micro or run.batch)]])
        x, y = ids[:, :-1].to(device), ids[:, 1:]
        with cast():
            logits = model(x)
        nats += float(mtp.nll(logits, y.to(device), torch.ones_like(y, device=device)))
        count, length_in_bytes = count + y.numel(), length_in_bytes + int(per_id[y].sum())
    model.train()
    return nats / count, nats / math.log(2) / max(1, length_in_bytes)


def choose_device(run, say):
    """Device, autocast and threads, chosen and explained."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = found if run.device == "auto" else run.device
    if device not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device!r}: choose auto, cpu, cuda or mps")
    if device != "cpu" and device != found:
        raise ValueError(f"--device {device}: this PyTorch ({torch.__version__}) finds {found} only")
    if run.threads:
        torch.set_num_threads(run.threads)
    can = device == "cuda" and torch.cuda.is_bf16_supported()
    precision = run.precision if run.precision != "auto" else "bf16" if can else "fp32"
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision {precision!r}: choose auto, fp32 or bf16")
    why = {"cuda": "CUDA found", "mps": "no CUDA, Apple's MPS found", "cpu": "neither CUDA nor MPS found"}[found]
    say(f"device     {device} ({why if run.device == 'auto' else 'as asked'}), {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__}")
    say(f"numbers    {precision}" + (" autocast" if precision == "bf16" else "") + ", parameters and optimiser fp32 ("
        + ("as asked" if run.precision != "auto" else "tensor cores take it" if can else "the exact choice where bf16 is not faster")
        + ")")
    cast = (lambda: torch.autocast(device, torch.bfloat16)) if precision == "bf16" else nullcontext
    return torch.device(device), cast


def optimiser(model, run):
    """AdamW(0.9, 0.95); weight decay on matrices only, so not on norms, biases, A_log, D and dt_bias."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([dict(params=[p for p in params if p.ndim > 1], weight_decay=run.weight_decay),
                              dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)],
                             lr=run.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


# ---- the run's folder

def write(path, save):
    """Calls save(temporary file), then renames it to path: path is always whole, whenever the process is killed."""
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sources():
    """sha256 of this project's own files, and the git commit if there is one: what exactly was run."""
    here, digest = Path(__file__).resolve().parent, hashlib.sha256()
    for f in sorted(here.glob("*.py")):
        digest.update(f.read_bytes())
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True) if (here / ".git").exists() else None
    return dict(sources_sha256=digest.hexdigest(), git=git.stdout.strip() if git and git.returncode == 0 else None)


def plot(rows, share, path):
    """loss.png: the losses, the balance of the experts over time, and where the tokens of the last interval went."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (a, b, c) = plt.subplots(1, 3, figsize=(15, 4.2), gridspec_kw=dict(width_ratios=(5, 4, 4)), layout="constrained")
    step = [r["step"] for r in rows]
    depths = sorted(k for k in rows[0] if k.startswith("mtp"))
    a.plot(step, [r["train_nats"] for r in rows], label="next token", color="C0", lw=1.6)
    for i, k in enumerate(depths):
        a.plot(step, [r[k] for r in rows], label=f"MTP depth {i + 1}: token t+{i + 2}", color=f"C{i + 1}", lw=1)
    seen = [r for r in rows if r["val_nats"] != ""]
    a.plot([r["step"] for r in seen], [r["val_nats"] for r in seen], "ko", ms=4, label="next token, validation")
    for r in seen[-1:]:
        a.annotate(f"{r['val_bpb']:.2f} bits/byte", (r["step"], r["val_nats"]), (-8, -14), textcoords="offset points", ha="right")
    a.set(xlabel="step", ylabel="nats per token", title="loss")
    a.legend(frameon=False)
    b.plot(step, [r["max_vio"] for r in rows], label="MaxVio, mean over layers")
    b.plot(step, [r["max_vio_worst"] for r in rows], lw=1, alpha=.6, label="MaxVio, worst layer")
    b.plot(step, [r["idle"] for r in rows], lw=1, color="C3", label="experts without a token, all layers")
    b.set(xlabel="step", title="expert balance: busiest / mean - 1", ylim=(0, None))
    b.legend(frameon=False)
    if share:
        image = c.imshow([[n / (sum(row) / len(row)) for n in row] for row in share], aspect="auto", cmap="viridis", vmin=0)
        c.set(xlabel="expert", ylabel="MoE layer (last row: the MTP block's)" if depths else "MoE layer",
              yticks=range(len(share)), title="load of each expert / mean, at the end")
        fig.colorbar(image, ax=c)
    else:
        c.set_axis_off()
    write(path, lambda f: fig.savefig(f, format="png", dpi=120))
    plt.close(fig)


def write_log(path, rows):
    """log.csv, whole or not at all."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    write(path, lambda f: f.write(text.getvalue().encode()))


def read_log(path):
    """log.csv as a list of dicts of numbers; an empty cell stays empty."""
    with open(path, newline="") as f:
        rows = [{k: v if v == "" else float(v) for k, v in r.items()} for r in csv.DictReader(f)]
    return [dict(r, step=int(r["step"]), tokens=int(r["tokens"]), idle=int(r["idle"])) for r in rows]


def configure(run, vocab):
    """The preset with the tokenizer's vocabulary and with --model's changes."""
    config, changes = Config.preset(run.preset), {}
    for item in filter(None, run.model.split(",")):
        key, _, value = item.partition("=")
        if key not in {f.name for f in fields(Config)}:
            raise ValueError(f"--model: there is no field {key!r}; the fields are " + ", ".join(f.name for f in fields(Config)))
        old = getattr(config, key)
        try:
            changes[key] = value if isinstance(old, str) else None if value == "None" else type(old if old is not None else 0)(float(value))
        except ValueError:
            raise ValueError(f"--model: {key}={value!r} is not a number") from None
    if changes.get("vocab_size", vocab) < vocab:
        raise ValueError(f"vocab_size={changes['vocab_size']} is smaller than the tokenizer's {vocab}")
    return replace(config, **{"vocab_size": vocab, **changes})


def experts_path(model, device, cast):
    """Which of its two ways latent_moe.grouped_mm will take, and why."""
    if not (moes := latent_moe.layers(model)):
        return "none"
    w = moes[0].experts.up_proj
    with cast():
        kind = torch.bfloat16 if torch.is_autocast_enabled(device.type) else w.dtype
    fits = all(latent_moe.torch_can(x.to(kind), x.to(kind)) for x in (w[:1], moes[0].experts.down_proj[:1]))
    return "F.grouped_mm" if fits else f"a loop over experts (F.grouped_mm does not take {kind} of {tuple(w.shape)} on {device.type})"


def merge(run, say=print):
    """Averages the last run.merge checkpoints with merge_weights, evaluates each and the average, writes the average."""
    folder = Path(run.out) / (run.name or run.preset)
    files = sample.checkpoints(folder)[-run.merge:]
    if len(files) < run.merge:
        raise ValueError(f"--merge {run.merge}: {folder} has {len(files)} checkpoints")
    device, cast = choose_device(run, say)
    total, results = None, []
    for path, c in zip(files, merge_weights(len(files))):
        saved = sample.read_run(path)
        if total is None:
            model = Nemotron(Config(**saved["config"])).to(device)
            corpus, enc = data.corpus(saved["run"]["data"]), data.unpack(saved["tokenizer"])
            val, per_id = data.encode(enc, corpus.val), data.token_bytes(enc)
            total = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in saved["model"].items()}
        trained = replace(run, **{k: saved["run"][k] for k in ("length", "batch", "micro", "eval_tokens")})
        for k, v in saved["model"].items():
            total[k] += c * v.double()
        model.load_state_dict(saved["model"])
        results.append((f"step {saved['step']}", c, evaluate(model, val, trained, per_id, cast)))
    state = {k: v.to(saved["model"][k].dtype) for k, v in total.items()}
    model.load_state_dict(state)
    results.append(("merged", 1.0, evaluate(model, val, trained, per_id, cast)))
    for name, c, (nats, bpb) in results:
        say(f"{name:>12}   weight {c:.3f}   validation {nats:.4f} nats/token, {bpb:.4f} bits/byte")
    first = int(files[0].stem[5:])
    out = folder / "ckpt" / f"merged-{first:08d}-{saved['step']:08d}.pt"
    write(out, lambda f: torch.save(dict(saved, model=state, optimizer=None), f))
    say(f"wrote {out}; sample.py --run takes it")
    return model, results


# ---- the story

def fit(run, say=print):
    """Trains (or resumes, or merges) and returns the model and the log, a list of dicts, as in log.csv."""
    folder = Path(run.out) / (run.name or run.preset)
    micro = run.micro or run.batch
    if run.batch % micro:
        raise ValueError(f"--batch {run.batch} is not a multiple of --micro {micro}")
    if run.steps < 1 or run.length < 1 or not 0 <= run.warmup <= 1 or not 0 <= run.decay <= 1:
        raise ValueError(f"need steps >= 1, length >= 1 and shares between 0 and 1, not steps {run.steps}, length {run.length}, "
                         f"warmup {run.warmup}, decay {run.decay}")
    if not run.resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds a run: --resume goes on with it, --name starts another")
    saved = sample.read_run(folder, run.from_step) if run.resume else None
    began = time.perf_counter()
    device, cast = choose_device(run, say)

    # 1. Text to ids. The tokenizer is trained on the training split, and travels in the checkpoint.
    corpus = data.corpus(run.data)
    enc = data.unpack(saved["tokenizer"]) if saved else data.tokenizer(run.tokenizer, corpus.train)
    train, val = (data.encode(enc, part) for part in (corpus.train, corpus.val))
    if saved and saved["corpus_sha256"] != corpus.sha256:
        raise ValueError(f"this is not the text the run was trained on: sha256 {corpus.sha256[:12]}, not {saved['corpus_sha256'][:12]}")
    if len(val) <= run.length:
        raise ValueError(f"the validation split has {len(val)} tokens, fewer than one sequence of {run.length} and its target")
    say("data       " + data.describe(corpus, enc, len(train), len(val)))

    # 2. The model and its optimiser.
    if saved:
        config = Config(**saved["config"])
    else:
        config = configure(run, data.vocab_size(enc))
    model = Nemotron(config, run.seed).to(device)
    opt = optimiser(model, run)
    start, rows = 0, []
    if saved:
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        start, rows = saved["step"], [r for r in read_log(folder / "log.csv") if r["step"] <= saved["step"]]
    total = sum(p.numel() for p in model.parameters())
    say(f"model      {run.preset}: {config.hybrid_override_pattern}, {total / 1e6:.2f} M parameters"
        + (f", MTP {config.mtp_hybrid_override_pattern} at {config.mtp_num_layers} depths" if model.mtp else ""))
    say("paths      scan, conv, norm, loss: PyTorch; attention: scaled_dot_product_attention; experts: "
        + experts_path(model, device, cast))
    (folder / "ckpt").mkdir(parents=True, exist_ok=True)
    about = dict(run=asdict(run), config=asdict(config), corpus=dict(name=corpus.name, bytes=corpus.size, sha256=corpus.sha256),
                 parameters=total, **sources(), versions=dict(python=platform.python_version(), torch=torch.__version__,
                 numpy=numpy.__version__), hardware=dict(machine=platform.machine(), system=platform.system(), device=str(device),
                 gpu=torch.cuda.get_device_name() if device.type == "cuda" else None, threads=torch.get_num_threads()))
    write(folder / "config.json", lambda f: f.write(json.dumps(about, indent=1).encode()))
    say(f"run        {folder}: {run.steps} steps of {run.batch} x {run.length} tokens" + (f", from step {start}" if start else ""))

    def save(step):
        state = dict(model=model.state_dict(), optimizer=opt.state_dict(), step=step, rng=torch.get_rng_state(),
                     config=asdict(config), run=asdict(run), tokenizer=data.pack(enc), corpus_sha256=corpus.sha256)
        write(folder / "ckpt" / f"step-{step:08d}.pt", lambda f: torch.save(state, f))
        for old in sample.checkpoints(folder)[:-run.keep] if run.keep else []:
            old.unlink()

    # 3. The steps.
    per_id = data.token_bytes(enc)
    counts = mtp.counts(torch.ones(1, run.length, dtype=torch.bool), model.mtp.depths if model.mtp else 0)
    counts = [n * run.batch for n in counts]                                 # targets in the global batch, by depth
    weights = [1.0] + [run.mtp_loss / (len(counts) - 1)] * (len(counts) - 1)
    model.train()
    share = tally = None
    clock, last = time.perf_counter(), start
    end = min(run.steps, run.stop) if run.stop else run.steps
    for step in range(start, end):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step + 1, run)
        ids = data.batch(train, run.seed, step, run.batch, run.length + 1).to(device)
        parts, balance = torch.zeros(len(counts), device=device), torch.zeros((), device=device)
        for piece in ids.split(micro):
            with cast():
                sums = losses(model, piece)
            even = latent_moe.take_balance(model)
            loss = sum(w * s / n for w, s, n in zip(weights, sums, counts)) + run.balance * even / run.batch
            loss.backward()
            parts += torch.stack([s.detach() for s in sums])
            balance += even.detach() if torch.is_tensor(even) else even
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip))
        nats = [float(s) / n for s, n in zip(parts, counts)]
        if not math.isfinite(norm) or not all(map(math.isfinite, nats)):
            kept = sample.checkpoints(folder)
            raise FloatingPointError(f"step {step + 1}: loss {nats[0]}, gradient norm {norm}. The weights are still those of step "
                                     f"{step}, unsaved; the last checkpoint is {kept[-1] if kept else 'not yet written'}")
        opt.step()
        opt.zero_grad(set_to_none=True)
        load = [m.load.clone() for m in latent_moe.layers(model)]
        tally = load if tally is None else [a + b for a, b in zip(tally, load)]
        vio = latent_moe.update_bias(model, run.bias_rate)

        done = step + 1
        if done % run.log_every == 0 or done in (1, end) or done == start + 1:
            now = time.perf_counter()
            speed, clock, steps, last = now - clock, now, done - last, done
            rows.append(dict(step=done, tokens=done * run.batch * run.length, seconds=round(now - began, 3),
                             lr=opt.param_groups[0]["lr"], train_nats=nats[0], val_nats="", val_bpb="",
                             **{f"mtp{k}_nats": n for k, n in enumerate(nats) if k}, balance=float(balance) / run.batch,
                             max_vio=sum(v for v, _ in vio) / max(1, len(vio)), max_vio_worst=max((v for v, _ in vio), default=0.0),
                             idle=sum(n for _, n in vio), grad_norm=norm,
                             tokens_per_second=steps * run.batch * run.length / speed))
            share, tally = [t.tolist() for t in tally], None
            left = (end - done) * speed / steps
            say(f"step {done:5}/{run.steps}  loss {nats[0]:6.3f}" + "".join(f"  mtp{k} {n:6.3f}" for k, n in enumerate(nats) if k)
                + f"  lr {rows[-1]['lr']:.1e}  MaxVio {rows[-1]['max_vio']:4.2f}  idle {rows[-1]['idle']}  |g| {norm:5.2f}"
                + f"  {rows[-1]['tokens_per_second']:7,.0f} tok/s" + (f"  {left:4.0f} s left" if done > 1 else f"  after {now - began:.1f} s"))
        if done % run.eval_every == 0 or done == end:
            nats_val, bpb = evaluate(model, val, run, per_id, cast)
            if rows[-1]["step"] != done:                                     # an evaluation between two logged steps
                rows.append(dict(rows[-1], step=done, tokens=done * run.batch * run.length, train_nats=nats[0]))
            rows[-1].update(val_nats=nats_val, val_bpb=bpb)
            say(f"           validation {nats_val:.4f} nats/token, {bpb:.4f} bits/byte")
            clock = time.perf_counter()
        if done % run.save_every == 0 or done == end:
            save(done)
            write_log(folder / "log.csv", rows)
            clock = time.perf_counter()

    # 4. The picture and the sample.
    if rows:
        plot(rows, share, folder / "loss.png")
        say(f"           {folder / 'loss.png'}, {folder / 'log.csv'}, {sample.checkpoints(folder)[-1]}; {time.perf_counter() - began:.0f} s in all")
    if end == run.steps and run.prompt:
        model.eval()
        ids = sample.generate(model, [enc.encode_ordinary(run.prompt)], 120, temperature=0.8, top_p=0.95, seed=run.seed)
        say("sample     (temperature 0.8, top-p 0.95)\n" + b"".join(sample.spell(enc, i) for i in ids[0]).decode("utf-8", "replace"))
    return model, rows


def cli(argv=None):
    """Every field of Run is a flag, its help is the documentation, a typo is an error. With --resume (or --merge) the run's
    own settings are the defaults, otherwise the preset's recipe is."""
    p = argparse.ArgumentParser(usage="train.py [--flag value ...]; -h lists the flags", description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    for f in fields(Run):
        default = getattr(Run, f.name)
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else dict(type=type(default))
        p.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                       help=f.metadata["help"] + ("" if isinstance(default, bool) or default == "" else f" (default: {default})"))
    given = vars(p.parse_args(argv))
    run = Run(**given)
    try:
        if run.resume or run.merge:
            folder = Path(run.out) / (run.name or run.preset)
            if not (folder / "config.json").is_file():
                raise ValueError(f"{folder} holds no run (no config.json)")
            old = json.loads((folder / "config.json").read_text())["run"]
            run = Run(**{**old, "resume": False, "merge": 0, "stop": 0, "from_step": 0, **given})
        else:
            run = Run(**{**RECIPES.get(run.preset, {}), **given})
        (merge if run.merge else fit)(run, say=lambda line: print(line, flush=True))
    except FloatingPointError as e:
        p.exit(1, f"{p.prog}: stopped: {e}\n")
    except (ValueError, OSError) as e:
        p.error(str(e))
    except KeyboardInterrupt:
        p.exit(130, f"\n{p.prog}: interrupted; what was saved is whole: --resume goes on from the last checkpoint\n")


if __name__ == "__main__":
    cli()
