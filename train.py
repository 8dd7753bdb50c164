"""
Training: the story of a run, from a folder of text to a model, a log, a picture and a sample.

    python train.py                                           toy: Python's own library, in minutes on a CPU
    python train.py --preset small --data my.txt --batch 64   any preset, any text, the same story
    python train.py --name toy --resume --steps 600           go on, bit for bit, from the last checkpoint
    python train.py --name toy --merge 4                      average the last four checkpoints
    torchrun --nproc-per-node 4 train.py --ep 2 --cp 2        the same run on many devices: parallel.py
    python train.py --preset super --dry-run --world 64 --ep 8     what a rank would hold and send: dryrun.py

One step minimises, over the global batch (sums divided by the global counts, however the batch is cut up),

    loss = nll(t+1) + 0.3/K sum over depths k of nll_k(t+1+k) + 1e-4 balance       mtp.py, latent_moe.py

then clips the gradient, steps AdamW and nudges every router's bias. The learning rate climbs, stays, falls:

    t < T_w           lr = lr_max t / T_w
    T_w <= t < T_s    lr = lr_max
    t >= T_s          lr = lr_min + (lr_max - lr_min) (1 - sqrt((t - T_s) / (T - T_s)))

Instead of falling it can stay: then the last checkpoints' average, weighted by the same curve, stands in.

Not here  how ranks share the work; the FP4 recipe; document masks: a window may span two files
Sources   arXiv:2604.12374 sections 2.4 (optimiser, schedule, losses), 2.5 (merging, after arXiv:2507.17634)
"""
import argparse
import json
import math
import os
import platform
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# Waiting threads spin for about 0.1 ms, then sleep: spinning beside a busy process costs ten times the step.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")
import torch

import checkpoint
import data
import latent_moe
import mtp
import nvfp4
import plot
import sample
from model import Config, Nemotron, paths


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Run:
    """Everything a run depends on. Each field is a flag of the command line."""
    preset: str = knob("toy", "toy (a laptop) | tiny-nv | small (one GPU) | nano (30B) | super (120B)")
    model: str = knob("", "changes to the preset, as field=value,field=value with config.json's field names")
    name: str = knob("", "the run's folder under --out; empty: the preset's name")
    out: str = knob("runs", "where run folders live")
    data: str = knob("python", "python | shakespeare | a text file | a folder | token files *.bin | "
                     "recall | copy | arithmetic")
    tokenizer: str = knob("bpe:2048", "bytes | bpe:N | nemotron | a tokenizer.json or tekken.json")
    steps: int = knob(450, "optimiser steps")
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
    eval_every: int = knob(150, "steps between evaluations")
    eval_tokens: int = knob(32768, "size of the validation slice, always the same tokens")
    log_every: int = knob(10, "steps between printed lines")
    save_every: int = knob(50, "steps between checkpoints")
    keep: int = knob(0, "checkpoints to keep; 0: all of them")
    stop: int = knob(0, "stop after this step, as if interrupted; 0: do not")
    resume: bool = knob(False, "go on with the run of this name; flags given now replace its own")
    from_step: int = knob(0, "resume from this checkpoint instead of the newest")
    merge: int = knob(0, "no training: merge the last N checkpoints of the run, evaluate each and the merge")
    device: str = knob("auto", "auto | cpu | cuda | mps")
    precision: str = knob("auto", "auto | fp32 | bf16 (autocast; parameters stay fp32) | nvfp4 (nvfp4-sr: "
                          "without stochastic rounding; -2d -rht -last likewise) | mxfp4 | mxfp8")
    fast: bool = knob(False, "Triton kernels (kernels/); needs a CUDA GPU")
    diagnose: bool = knob(False, "log the shares of zero gradients, dead channels and what four bits flush to zero")
    threads: int = knob(0, "CPU threads; 0: torch's choice")
    ep: int = knob(1, "under torchrun: ranks that share the experts")
    cp: int = knob(1, "under torchrun: ranks that share a sequence's length")
    recompute: bool = knob(False, "under torchrun: a layer's forward pass, and the logits, again for the gradient")
    short: int = knob(0, "under torchrun: every second batch has sequences of this length instead; 0: none has")
    dry_run: bool = knob(False, "no training: one rank's memory, traffic and time, worked out on this machine")
    world: int = knob(64, "of the dry run: how many ranks")
    gpu: str = knob("h100", "of the dry run: h100 | b200")
    layers: int = knob(0, "of the dry run: go through this many layers only and extrapolate; 0: all")
    quick: bool = knob(False, "of the dry run: by arithmetic, without going through a step")
    prompt: str = knob("def ", "what the sample at the end goes on from; empty: no sample")

    def folder(self):
        return Path(self.out) / (self.name or self.preset)

    def length_at(self, step):
        """Tokens of each of this step's sequences. The long-context stage alternates: every even step is short."""
        return self.short if self.short and step % 2 == 0 else self.length

# What a preset needs that differs from the above. nano and super: the report's own recipe.
REPORT = dict(tokenizer="nemotron", length=8192, batch=3072, micro=1, steps=993_404, warmup=.008, decay=.2,
              eval_every=1000, save_every=1000, eval_tokens=1 << 24, precision="bf16")
RECIPES = {
    "tiny-nv": dict(length=256, lr=1e-3, lr_min=1e-5),
    "small": dict(tokenizer="bpe:32768", length=1024, batch=128, micro=16, steps=5000, lr=1e-3, lr_min=1e-5,
                  warmup=.02, decay=.2, eval_every=250, save_every=500, eval_tokens=1 << 20),
    "nano": dict(REPORT, lr=1e-3, lr_min=1e-5), "super": dict(REPORT, lr=4.5e-4, lr_min=4.5e-6)}


def learning_rate(t, run):
    """The schedule above; t is the step being taken, 1 ... run.steps, so the last step has exactly lr_min."""
    warm, fall = run.warmup * run.steps, run.steps * (1 - run.decay)
    if t < warm:
        return run.lr * t / warm
    if t < fall or fall == run.steps:
        return run.lr
    return run.lr_min + (run.lr - run.lr_min) * (1 - math.sqrt((t - fall) / (run.steps - fall)))


def losses(model, ids, mask=None, t=None):
    """ids (b, t+1) -> the summed nll of depth 0 (the next token), 1, ..., K: the main and the MTP losses.
    Of a slice of t tokens of a sequence, ids and mask bring the K tokens that follow its targets."""
    x, y = ids[:, :-1], ids[:, 1:]
    mask = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
    h = model.hidden(x[:, :t])
    embed, head, fast = model.backbone.embeddings, model.lm_head, model.fast
    deeper = mtp.loss(model.mtp, h, y, mask, embed, head, fast) if model.mtp else []
    return [mtp.linear_nll(h, head, y[:, :t], mask[:, :t], fast), *deeper]


@torch.no_grad()
def evaluate(model, tokens, run, per_id, cast, world=None):
    """Always the same windows, spread evenly over the split -> nats per token, bits per byte of text."""
    device, size, t = model.lm_head.weight.device, run.micro or run.batch, run.length
    windows = max(1, min(run.eval_tokens, len(tokens) - 1) // t)
    starts = [i * (len(tokens) - 1 - t) // max(1, windows - 1) for i in range(windows)]
    nats = count = length_in_bytes = 0
    model.eval()
    for i in range(0, windows, size):
        ids = torch.stack([torch.as_tensor(tokens[s:s + t + 1].astype("int64")) for s in starts[i:i + size]])
        y, mine = ids[:, 1:], world.rows(ids, 0)[0] if world else ids       # every rank all windows, its slice
        with cast():
            logits = model(mine[:, :-1].to(device))
        nats += float(mtp.nll(logits, mine[:, 1:].to(device), torch.ones_like(mine[:, 1:], device=device)))
        count, length_in_bytes = count + y.numel(), length_in_bytes + int(per_id[y].sum())
    model.train()
    nats = world.total([nats])[0] / world.dp if world else nats
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
    precision = run.precision if run.precision in ("fp32", "bf16") else "bf16" if can else "fp32"
    recipe = None if run.precision in ("auto", "fp32", "bf16") else nvfp4.Recipe.read(run.precision, run.fast)
    why = dict(cuda="CUDA found", mps="no CUDA, Apple's MPS found", cpu="neither CUDA nor MPS found")[found]
    say(f"device     {device} ({why if run.device == 'auto' else 'as asked'}), "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    why = "tensor cores take it" if can else "the exact choice where bf16 is not faster"
    say(f"numbers    {precision}" + (" autocast" if precision == "bf16" else "")
        + f", parameters and optimiser fp32 ({why if run.precision == 'auto' else 'as asked'})")
    cast = (lambda: torch.autocast(device, torch.bfloat16)) if precision == "bf16" else nullcontext
    return torch.device(device), cast, recipe


def quantise(model, recipe, run, say):
    """Swaps in the four-bit products that --precision asks for, and says which."""
    if recipe:
        torch.manual_seed(run.seed)                                          # stochastic rounding draws from here
        kinds = list(nvfp4.convert(model, recipe).values())
        nvfp4.watch(model, run.diagnose)
        say("           " + ", ".join(f"{kinds.count(k)} products in {k.upper()}" for k in sorted(set(kinds))) +
            f" of {sum(hasattr(m, 'mm') or m.__class__.__name__ == 'Linear' for m in model.modules())}, "
            f"{'NVFP4 by kernels/fp4.py, MXFP8 ' if recipe.fast else ''}emulated; {recipe}")


def optimiser(model, run):
    """AdamW(0.9, 0.95); weight decay on matrices only, so not on norms, biases, A_log, D and dt_bias."""
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([dict(params=[p for p in params if p.ndim > 1], weight_decay=run.weight_decay),
                              dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)],
                             lr=run.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def backward(model, pieces, counts, run, cast):
    """Gradient of the global batch, piece by piece -> nats per target of each depth, balance per sequence."""
    weights = [1.0] + [run.mtp_loss / max(1, len(counts) - 1)] * (len(counts) - 1)
    sums, balance = [0.0] * len(counts), 0.0
    for ids in pieces:
        with cast():
            parts = losses(model, *ids) if isinstance(ids, tuple) else losses(model, ids)
        even = latent_moe.take_balance(model) / run.batch
        (sum(w * s / n for w, s, n in zip(weights, parts, counts)) + run.balance * even).backward()
        sums, balance = [a + b.item() for a, b in zip(sums, parts)], balance + torch.as_tensor(even).item()
    return [s / n for s, n in zip(sums, counts)], balance


def configure(run, vocab):
    """The preset with the tokenizer's vocabulary and with --model's changes."""
    config, changes, known = Config.preset(run.preset), {}, [f.name for f in fields(Config)]
    for item in filter(None, run.model.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise ValueError(f"--model: there is no field {key!r}; the fields are {', '.join(known)}")
        old = getattr(config, key)
        kind = int if old is None else type(old)
        try:
            changes[key] = value if kind is str else None if value == "None" else kind(float(value))
        except ValueError:
            raise ValueError(f"--model: {key}={value!r} is not a number") from None
    if changes.get("vocab_size", vocab) < vocab:
        raise ValueError(f"vocab_size={changes['vocab_size']} is smaller than the tokenizer's {vocab}")
    return replace(config, **{"vocab_size": vocab, **changes})


def describe(model, run, device, cast, say):
    """Says what was built, and which of its ways each idea will take."""
    c, total = model.config, sum(p.numel() for p in model.parameters())
    say(f"model      {run.preset}: {c.hybrid_override_pattern}, {total / 1e6:.2f} M parameters"
        + (f", MTP {c.mtp_hybrid_override_pattern} at {c.mtp_num_layers} depths" if model.mtp else ""))
    experts = "none"
    for moe in latent_moe.layers(model)[:1]:
        with cast():
            kind = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        w = [torch.empty(1, *p.shape[1:], dtype=kind, device=device) for p in moe.experts.parameters()]
        experts = ("F.grouped_mm" if all(latent_moe.torch_can(x, x) for x in w) else
                   f"a loop (F.grouped_mm does not take {kind} of {tuple(w[0].shape[1:])} on {device.type})")
    say("\n".join(paths(model, run.fast, experts)))


def about(run, config, corpus, device):
    """What config.json records: enough to know what was run, on what, and where."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return dict(run=asdict(run), config=asdict(config), **checkpoint.sources(),
                corpus=dict(name=corpus.name, bytes=corpus.size, sha256=corpus.sha256),
                versions=dict(python=platform.python_version(), torch=torch.__version__),
                hardware=dict(machine=platform.machine(), system=platform.system(), device=str(device),
                              gpu=gpu, threads=torch.get_num_threads()))


def merge(run, say=print):
    """Averages the last run.merge checkpoints, evaluates each and the average, and writes the average."""
    folder = run.folder()
    files = checkpoint.steps(folder)[-run.merge:]
    if len(files) < run.merge:
        raise ValueError(f"--merge {run.merge}: {folder} has {len(files)} checkpoints")
    device, cast, recipe = choose_device(run, say)
    first = checkpoint.read(files[0])
    model = Nemotron(Config(**first["config"])).to(device)
    quantise(model, recipe, run, say)
    corpus, enc = data.corpus(first["run"]["data"]), data.unpack(first["tokenizer"])
    val, per_id = data.encode(enc, corpus.val), data.token_bytes(enc)
    results, total = [], {k: torch.zeros_like(v, dtype=torch.float64) for k, v in first["model"].items()}
    def report(name, weight, state):
        model.load_state_dict(state)
        nats, bpb = evaluate(model, val, run, per_id, cast)
        results.append((name, weight, nats, bpb))
        say(f"{name:>13}   weight {weight:.3f}   validation {nats:.4f} nats/token, {bpb:.4f} bits/byte")
    for path, c in zip(files, checkpoint.merge_weights(len(files))):
        saved = checkpoint.read(path)
        for k, v in saved["model"].items():
            total[k] += c * v.double()
        report(f"step {saved['step']}", c, saved["model"])
    state = {k: v.to(saved["model"][k].dtype) for k, v in total.items()}
    report("merged", 1.0, state)
    out = folder / "ckpt" / f"merged-{first['step']:08d}-{saved['step']:08d}.pt"
    checkpoint.store(out, dict(saved, model=state, optimizer=None))
    say(f"wrote {out}; sample.py --run takes it")
    return model, results


def fit(run, say=print, world=None):
    """Trains (or goes on) as `run` says. Returns the model and the log: log.csv's rows, a list of dicts.
    world: the ranks this process is one of (parallel.World), or None."""
    folder, began, ranks = run.folder(), time.perf_counter(), world.dp if world else 1
    micro, first = run.micro or max(1, run.batch // ranks), not world or world.rank == 0
    write = checkpoint.write if first else lambda *what: None                # rank 0 writes for all
    for name, least in dict(steps=1, batch=1, length=4, eval_every=1, eval_tokens=1, log_every=1, save_every=1, micro=0,
                            seed=0, threads=0, keep=0, stop=0, warmup=0, decay=0).items():
        if getattr(run, name) < least or name in ("warmup", "decay") and getattr(run, name) > 1:
            raise ValueError(f"{name} {getattr(run, name)} makes no sense: " + ("shares between 0 and 1" if name in
                             ("warmup", "decay") else f"at least {least}"))
    if run.batch % (micro * ranks):
        raise ValueError(f"--batch {run.batch} is not a multiple of --micro {micro}"
                         + f" x {ranks} ranks" * (ranks > 1))
    if not world and (run.ep, run.cp, run.recompute, run.short) != (1, 1, False, 0):
        raise ValueError("--ep, --cp, --recompute and --short want many ranks: torchrun ... train.py ...")
    if world:                                                                # a length that does not cut is refused
        for t in {run.length_at(1), run.length_at(2)}:
            world.rows(torch.zeros(1, t + 1, dtype=torch.long), 0)
    if not run.resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds a run: --resume goes on with it, --name starts another")
    writer = parts = None
    if world:                                                                # shards.py: every rank its part
        import shards
        writer, parts = shards.Writer(world), run.resume and shards.newest(folder, run.from_step)
    at = folder if not world else parts and parts / "run.pt"                 # none after a restart: from the start
    saved = checkpoint.read(at, run.from_step) if run.resume and at else None
    for k in ("preset", "model", "tokenizer") if saved else ():
        if getattr(run, k) != saved["run"][k]:
            raise ValueError(f"--{k} {getattr(run, k)!r}: this run goes on with {saved['run'][k]!r}, "
                             "--name starts another")
    device, cast, recipe = choose_device(run, say)
    if world and (recipe or run.fast):
        raise ValueError(f"--precision {run.precision} --fast {run.fast}: four bits and the Triton experts are for one "
                         "process so far; under torchrun take fp32 or bf16, without --fast")
    if saved and run.precision != saved["run"]["precision"]:
        say(f"precision  {saved['run']['precision']} up to step {saved['step']}, {run.precision} from here")

    # 1. Text to ids. The tokenizer learns from the training split, and travels in the checkpoint.
    corpus = data.corpus(run.data)
    if saved and saved["corpus_sha256"] != corpus.sha256:
        raise ValueError(f"this is not the text the run was trained on: sha256 {corpus.sha256[:12]}, "
                         f"not {saved['corpus_sha256'][:12]}")
    enc = data.unpack(saved["tokenizer"]) if saved else data.tokenizer(run.tokenizer, corpus.train)
    train, val = (data.encode(enc, part) for part in (corpus.train, corpus.val))
    if len(val) <= run.length:
        raise ValueError(f"the validation split has {len(val)} tokens, "
                         f"fewer than one sequence of {run.length} and its target")
    say("data       " + data.describe(corpus, enc, len(train), len(val)))

    # 2. The model, its optimiser, and where the run stands.
    config = Config(**saved["config"]) if saved else configure(run, data.vocab_size(enc))
    bf16 = cast is not nullcontext
    model = world.model(config, run.seed, bf16, run.recompute) if world else Nemotron(config, run.seed).to(device)
    quantise(model, recipe, run, say)
    opt = optimiser(model, run)
    start, rows, tokens_of_experts = saved["step"] if saved else 0, [], []
    old = saved["run"] if saved else asdict(run)
    seen = saved.get("tokens", start * old["batch"] * old["length"]) if saved else 0     # tokens so far
    if saved and world:
        shards.load(parts, model, opt)
    elif saved:
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
    if saved:
        opt.param_groups[0]["weight_decay"] = run.weight_decay
        torch.set_rng_state(saved["rng"])
        rows = [r for r in checkpoint.read_log(folder / "log.csv") if r["step"] <= start]
    describe(model, run, device, cast, say)
    (folder / "ckpt").mkdir(parents=True, exist_ok=True)
    facts = json.dumps(about(run, config, corpus, device), indent=1).encode()
    write(folder / "config.json", lambda f: f.write(facts))
    for later in checkpoint.steps(folder) if saved and not world else ():    # another future: kept, but set aside
        if checkpoint.number(later) > start:
            later.replace(later.with_name("left-" + later.name))
    say(f"run        {folder}: {run.steps} steps of {run.batch} x {run.length} tokens"
        + (f", from step {start}" if start else ""))

    # 3. The steps. `counts` are the targets of the global batch at depth 0, 1, ..., K.
    counts = mtp.counts(torch.ones(1, run.length, dtype=torch.bool), model.mtp.depths if model.mtp else 0)
    counts, per_id = [n * run.batch for n in counts], data.token_bytes(enc)
    names = [n.removesuffix(".mixer").replace("backbone.layers.", "layer ").replace("mtp.layers.", "MTP ")
             for n, m in model.named_modules() if isinstance(m, latent_moe.LatentMoE)]
    clock, last, end = time.perf_counter(), (start, seen), min(run.steps, run.stop or run.steps)
    model.train()
    for step in range(start + 1, end + 1):
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, run)
        if world:
            nats, balance, norm = world.step(model, train, step, run, cast, micro, backward)
        else:
            ids = data.batch(train, run.seed, step, run.batch, run.length + 1).to(device)
            nats, balance = backward(model, ids.split(micro), counts, run, cast)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip))
        if not math.isfinite(norm + sum(nats)):
            kept = checkpoint.steps(folder)
            raise FloatingPointError(
                f"step {step}: loss {nats[0]}, gradient norm {norm}; this step was not taken. "
                + (f"The last checkpoint is {kept[-1]}" if kept else "No checkpoint had been written yet"))
        log = step % run.log_every == 0 or step in (start + 1, end)
        look, save = (step % every == 0 or step == end for every in (run.eval_every, run.save_every))
        noted = nvfp4.diagnose(model) if run.diagnose and (log or look) else {}
        opt.step()
        opt.zero_grad(set_to_none=True)
        loads = [m.load for m in latent_moe.layers(model)]
        tokens_of_experts.append(torch.stack(loads) if loads else torch.zeros(0))
        vio = latent_moe.update_bias(model, run.bias_rate) or [(0.0, 0)]
        seen += run.batch * run.length_at(step)

        # 4. The log: a line now and then, an evaluation and a checkpoint less often.
        if log or look:
            now = time.perf_counter()
            pace, rate = (now - clock) / (step - last[0]), (seen - last[1]) / (now - clock)    # seconds a step
            left, clock, last = (end - step) * pace, now, (step, seen)
            row = dict(step=step, tokens=seen, seconds=now - began, lr=group["lr"],
                       train_nats=nats[0], val_nats="", val_bpb="",
                       **{f"mtp{k}_nats": n for k, n in enumerate(nats) if k}, balance=balance,
                       max_vio=sum(v for v, _ in vio) / len(vio), max_vio_worst=max(v for v, _ in vio),
                       idle=sum(n for _, n in vio), grad_norm=norm, tokens_per_second=rate,
                       **noted)
            rows.append(row)
            deeper = "".join(f"  mtp{k} {n:6.3f}" for k, n in enumerate(nats) if k)
            say(f"step {step:5}/{run.steps}  loss {nats[0]:6.3f}{deeper}  lr {row['lr']:.1e}  "
                f"MaxVio {row['max_vio']:4.2f}  idle {row['idle']:2}  |g| {norm:4.2f}  {rate:6,.0f} tok/s  "
                + (f"after {now - began:.1f} s" if step == start + 1 else f"{left:4.0f} s left"))
            if noted:
                say("           shares  " + "  ".join(f"{k} {v:.2%}" for k, v in noted.items()))
            shares, tokens_of_experts = sum(tokens_of_experts).tolist(), []
        if look:
            row["val_nats"], row["val_bpb"] = evaluate(model, val, run, per_id, cast, world)
            say(f"           validation {row['val_nats']:.4f} nats/token, {row['val_bpb']:.4f} bits/byte")
        if save:
            load = json.dumps(dict(layers=names, tokens=shares)).encode()
            write(folder / "load.json", lambda f: f.write(load))
            if first:
                checkpoint.write_log(folder / "log.csv", rows)               # before the checkpoint: it may run ahead
            state = dict(rng=torch.get_rng_state(), config=asdict(config), run=asdict(run), step=step, tokens=seen,
                         tokenizer=data.pack(enc), corpus_sha256=corpus.sha256)
            if world:
                writer.save(folder, step, model, opt, state, run.keep)
            else:
                checkpoint.save(folder, step, keep=run.keep, state=dict(
                    state, model=model.state_dict(), optimizer=opt.state_dict()))
        clock = time.perf_counter() if look or save else clock

    # 5. The picture and the sample.
    if world:
        writer.finish()
    if start < end and first:
        plot.run(folder)
        say(f"           {folder / 'loss.png'}, {folder / 'log.csv'}, "
            f"{folder / 'ckpt' / f'step-{end:08d}'}{'' if world else '.pt'}")
    if end == run.steps and run.prompt and not world:
        ids, = sample.generate(model.eval(), [enc.encode_ordinary(run.prompt)], 120, 0.8, 0.95, seed=run.seed)
        text = b"".join(sample.spell(enc, i) for i in ids)
        say("sample     (temperature 0.8, top-p 0.95)\n" + text.decode("utf-8", "replace"))
    say(f"           {time.perf_counter() - began:.0f} s in all")
    return model, rows


def cli(argv=None):
    """Every field of Run is a flag, its help is the documentation, a typo is an error. With --resume (or
    --merge) the run's own settings are the defaults, otherwise the preset's recipe is."""
    p = argparse.ArgumentParser(usage="train.py [--flag value ...]; -h lists the flags",
                                description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    for f in fields(Run):
        flag, switch = "--" + f.name.replace("_", "-"), isinstance(f.default, bool)
        kind = dict(action=argparse.BooleanOptionalAction) if switch else dict(type=type(f.default))
        note = "" if switch or f.default == "" else f" (default: {f.default})"
        p.add_argument(flag, default=argparse.SUPPRESS, help=f.metadata["help"] + note, **kind)
    given = vars(p.parse_args(argv))
    sample.quicken()
    run = Run(**given)
    try:
        if run.resume or run.merge:
            folder = run.folder()
            if not (folder / "config.json").is_file():
                raise ValueError(f"{folder} holds no run (no config.json)")
            old = json.loads((folder / "config.json").read_text())["run"]
            run = Run(**{**old, "resume": False, "merge": 0, "stop": 0, "from_step": 0, **given})
        else:
            run = Run(**{**RECIPES.get(run.preset, {}), **given})
        say = lambda line: print(line, flush=True)
        if run.dry_run:
            import dryrun
            config = configure(run, Config.preset(run.preset).vocab_size)
            for t in sorted({run.length_at(1), run.length_at(2)}):
                dryrun.predict(replace(run, length=t, short=0), say, config, optimiser, losses)
        elif "TORCHELASTIC_RUN_ID" in os.environ:                            # torchrun started this process
            import parallel
            parallel.run(run, fit, say)
        else:
            (merge if run.merge else fit)(run, say=say)
    except FloatingPointError as e:
        p.exit(1, f"{p.prog}: stopped: {e}\n")
    except (ValueError, OSError, ImportError) as e:
        p.error(str(e))
    except KeyboardInterrupt:
        p.exit(130, f"\n{p.prog}: interrupted; what was saved is whole: "
                    "--resume goes on from the last checkpoint\n")


if __name__ == "__main__":
    cli()
