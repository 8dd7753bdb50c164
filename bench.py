"""
How fast it is: tokens a second of a model, and every kernel against its floor and against somebody else's.

    python bench.py                            training, prefill and decoding of the toy, on whatever is there
    python bench.py --preset small --fast      any preset; --fast takes the kernels
    python bench.py --kernels                  every kernel at Super's sizes; needs a CUDA GPU
    python bench.py --floors                   only the floors, from --copy and --product: needs nothing

A kernel cannot be faster than its least traffic over the bandwidth, nor than its sums over the tensor cores:

    floor = max(bytes that must move / copy,  operations that must happen / matrix product)

Both ceilings are measured in the same run. Each row first shows that it is right, on fresh random numbers against
fp64 and beside the peer's error, then is timed: ours and the peer's alternately, medians; short ones as CUDA
graphs, and on buffers rotated so that none is still in the cache. A peer that is not installed says so.

Not here  choosing block sizes: the kernels explain theirs. Speeds on a machine busy with other things
Sources   peers: mamba_ssm's and fla's Triton, F.grouped_mm with torch around it, Liger's linear cross-entropy
"""
import argparse
import importlib
import importlib.util
import math
import statistics
import sys
import time
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import latent_moe
import mamba
import mtp
import sample
import train
from model import PRESETS, Config, Nemotron

COPY, PRODUCT = 3.0e12, 798e12                          # bytes, operations a second: one H100, measured by others
SUPER = Config.preset("super")


@dataclass
class Case:
    """One row. make(tokens, seed) -> inputs; ours, peer and exact take them and return a tuple of tensors."""
    name: str
    shape: str
    bytes: float
    flops: float
    make: object = None
    ours: object = None
    peer: object = None                                      # a function, or the word why not
    exact: object = None
    tokens: int = 8192
    check: int = 300                                     # tokens of the comparison with fp64: ragged, affordable
    back: bool = False                                       # time the backward alone


def floors(c=SUPER, t=8192):
    """(name, shape, bytes, operations) of every kernel at a config's sizes, bf16, batch 1."""
    h, p, g, n, q = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.chunk_size
    E, k, l, f = c.n_routed_experts, c.num_experts_per_tok, c.moe_latent_size or c.hidden_size, c.moe_intermediate_size
    d, v, width = c.hidden_size, c.vocab_size, c.mamba_num_heads * c.mamba_head_dim + 2 * c.n_groups * c.ssm_state_size
    x, bc, dt, e = 2 * t * h * p, 2 * t * g * n, 4 * t * h, 2 * t * h * p
    scan = 2 * t * q * g * n + 2 * t * q * h * p + 4 * t * h * n * p
    rows = [("ssd forward", f"t {t}", 2 * x + 2 * bc + dt, scan),
            ("ssd backward", f"t {t}", 3 * x + 4 * bc + 2 * dt, 2 * scan)]
    rows += [("ssd step", f"batch {b}", b * (8 * h * p * n + 4 * h * p + 4 * g * n + 4 * h), 5 * b * h * p * n)
             for b in (1, 32, 64)]
    rows += [("conv forward", f"t {t}", 4 * t * width, 8 * t * width),
             ("conv backward", f"t {t}", 6 * t * width, 24 * t * width),
             ("norm forward", f"t {t}", 3 * e, 0), ("norm backward", f"t {t}", 5 * e, 0)]
    for m in (t, 256, 1):
        used, slots = E * (1 - (1 - k / E) ** m), m * k      # experts that are read at all, on average
        rows.append(("experts forward", f"t {m}", used * 4 * l * f + 4 * m * l, 4 * slots * l * f))
    rows.append(("experts backward", f"t {t}", E * 8 * l * f + 2 * t * k * f + 6 * t * l, 8 * t * k * l * f))
    rows.append(("loss fwd + bwd", f"t {t}", 4 * t * d + 2 * v * d + 4 * v * d, 6 * t * d * v))
    return rows


def floor(nbytes, flops, copy, product):
    return max(nbytes / copy, flops / product)


def stranger(module, name):
    """A peer's function, or the sentence that it is not installed. mamba_ssm's Triton files need no CUDA extension."""
    top = module.split(".")[0]
    found = sys.modules.get(top) or importlib.util.find_spec(top)
    if found is None:
        return "not installed"
    if top == "mamba_ssm" and top not in sys.modules:        # its __init__ wants the extension; its Triton files do not
        for inner in ("", ".ops", ".utils", ".ops.triton"):
            package = types.ModuleType(top + inner)
            package.__path__ = [found.submodule_search_locations[0] + inner.replace(".", "/")]
            sys.modules[top + inner] = package
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as why:
        return f"installed, but {type(why).__name__}: {why}"


def cases(fast, c=SUPER, t=8192, device="cuda"):
    """Every row of --kernels."""
    if fast:
        from kernels.conv import conv
        from kernels.experts import experts
        from kernels.loss import linear_nll
        from kernels.norm import gated_norm
        from kernels.ssd import ssd, ssd_steps
    made = {(name, shape): (b, f) for name, shape, b, f in floors(c, t)}
    h, p, g, n = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
    E, k, l, f = c.n_routed_experts, c.num_experts_per_tok, c.moe_latent_size, c.moe_intermediate_size
    width, inner = h * p + 2 * g * n, h * p

    def rand(seed, *shape, dtype=torch.bfloat16, scale=1.0):
        r = torch.Generator(device).manual_seed(seed)
        return (torch.randn(*shape, generator=r, device=device) * scale).to(dtype)

    def scan(t, seed, b=1, state=False):
        wide = rand(seed, b, t, width)
        x, B, C = wide.split([inner, g * n, g * n], -1)
        dt = (rand(seed + 1, b, t, h, dtype=torch.float32).clamp(-3, 3) - 3).exp()
        A, D = -1 - 15 * rand(seed + 2, h, dtype=torch.float32).sigmoid(), rand(seed + 3, h, dtype=torch.float32)
        args = [x.unflatten(-1, (h, p)), dt, A, B.unflatten(-1, (g, n)) / n ** .5, C.unflatten(-1, (g, n)), D]
        return args + [rand(seed + 4, b, h, p, n, dtype=torch.float32)] * state

    def routed(t, seed):
        score = rand(seed, t, E, dtype=torch.float32).sigmoid()
        gate, pick = score.topk(k)
        return [rand(seed + 1, t, l), pick, 5 * gate / gate.sum(1, keepdim=True),
                rand(seed + 2, E, f, l, scale=l ** -.5),
                rand(seed + 3, E, l, f, scale=f ** -.5)]

    def eager(c, pick, gate, up, down):
        """The readable experts, with counts that need no host: torch's grouped products and torch around them."""
        by, order = pick.flatten().sort(stable=True)
        ends = torch.searchsorted(by, torch.arange(E, device=by.device), right=True).int()
        hid = F.grouped_mm(c.index_select(0, order // k), up.mT, offs=ends).relu().square()
        out = F.grouped_mm(hid, down.mT, offs=ends)
        slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=by.device))
        return ((gate.to(c.dtype)[:, None] @ out.index_select(0, slot).view(len(c), k, -1)).squeeze(1),)

    def loop(c, pick, gate, up, down):
        """fp64, an expert at a time."""
        out = torch.zeros_like(c)
        for e in pick.unique().tolist():
            at, j = (pick == e).nonzero(as_tuple=True)
            out = out.index_add(0, at, gate[at, j, None] * (c[at] @ up[e].T).relu().square() @ down[e].T)
        return (out,)

    def norm(y, z, weight):
        v = (y * F.silu(z)).unflatten(-1, (g, -1))
        return ((v * (v.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * weight,)

    def head(t, seed):
        r = torch.Generator(device).manual_seed(seed)
        target = torch.randint(c.vocab_size, (1, t), generator=r, device=device)
        return [rand(seed, 1, t, c.hidden_size),
                rand(seed + 1, c.vocab_size, c.hidden_size, scale=c.hidden_size ** -.5),
                target, torch.ones_like(target, dtype=torch.bool)]

    def with_gradients(form):
        def run(h, weight, target, mask):
            h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
            loss = form(h, weight, target, mask)
            return loss, *torch.autograd.grad(loss, (h, weight))
        return run

    def adapt(found, form):
        return found if isinstance(found, str) else lambda *args: form(found, *args)

    def row(name, shape, *rest, **more):
        return Case(name, shape, *made[name, shape], *rest, **{"tokens": t, **more})

    peer = adapt(stranger("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
                 lambda form, x, dt, A, B, C, D: (form(x, dt, A, B, C, 128, D=D),))
    for name, back in (("ssd forward", False), ("ssd backward", True)):
        yield row(name, f"t {t}", scan, lambda *a: ssd(*a)[:1], peer, lambda *a: mamba.ssd_chunked(*a)[:1], back=back)

    def one(form, x, dt, A, B, C, D, S):
        S = S.clone() if S.shape[0] == 2 else S              # the comparison keeps its state, the timing writes it
        wide = dt[:, 0, :, None].expand(-1, -1, p), A[:, None, None].expand(-1, p, n)
        y = form(S, x[:, 0], *wide, B[:, 0], C[:, 0], D[:, None].expand(-1, p))
        return y[:, None], S
    peer = adapt(stranger("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"), one)
    for b in (1, 32, 64):
        yield row("ssd step", f"batch {b}", lambda t, seed, b=b: scan(1, seed, 2 if t == 2 else b, True),
                  lambda *a: ssd_steps(*a), peer,
                  lambda *a: mamba.ssd_recurrent(*a), tokens=1, check=2)

    def taps(t, seed):
        return [rand(seed, 1, t, width), rand(seed + 1, width, 1, 4, dtype=torch.float32, scale=.5),
                rand(seed + 2, width, dtype=torch.float32)]
    peer = adapt(stranger("fla.modules.convolution", "causal_conv1d"),
                 lambda form, x, w, bias: (form(x, w[:, 0].to(x.dtype), bias.to(x.dtype), activation="silu")[0],))
    for name, back in (("conv forward", False), ("conv backward", True)):
        yield row(name, f"t {t}", taps, lambda *a: conv(*a)[:1], peer, lambda *a: mamba.causal_conv(*a)[:1], back=back)

    peer = adapt(stranger("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn"),
                 lambda form, y, z, w: (form(y, w, None, z=z, eps=1e-5, group_size=inner // g,
                                             norm_before_gate=False),))
    for name, back in (("norm forward", False), ("norm backward", True)):
        yield row(name, f"t {t}", lambda t, seed: [rand(seed, 1, t, inner), rand(seed + 1, 1, t, inner),
                                                   rand(seed + 2, inner, dtype=torch.float32)],
                  lambda *a: (gated_norm(*a, g),), peer, norm, back=back)

    for m in (t, 256, 1):
        yield row("experts forward", f"t {m}", routed, lambda *a: (experts(*a),), eager, loop, tokens=m,
                  check=min(m, 300))
    yield row("experts backward", f"t {t}", routed, lambda *a: (experts(*a),), eager, loop, back=True)

    liger = stranger("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    peer = adapt(liger, lambda form, h, w, target, mask: with_gradients(
        lambda h, w, target, mask: form(h[0], w, target[0], reduction="sum"))(h, w, target, mask))
    yield row("loss fwd + bwd", f"t {t}", head, with_gradients(linear_nll), peer,
              with_gradients(exact_nll))


def exact_nll(h, weight, targets, mask):
    """In fp64, where mtp.nll would go down to fp32."""
    z = h @ weight.T
    return ((z.logsumexp(-1) - z.gather(-1, targets[..., None])[..., 0]) * mask).sum()


def gradients(form, args):
    """The call with a graph behind it, and a function that runs only the backward of it."""
    args = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    y = form(*args)[0]
    r = torch.Generator(y.device).manual_seed(7)
    dy = torch.randn(y.shape, generator=r, device=y.device).to(torch.bfloat16).to(y.dtype)
    return lambda: torch.autograd.grad(y, [a for a in args if a.is_floating_point()], dy, retain_graph=True)


def error(case, form, seed=100):
    """The worst relative RMS error of any output against fp64, on numbers made for this call."""
    args = case.make(case.check, seed)
    wide = [a.double() if a.is_floating_point() else a for a in args]
    got, want = (gradients(f, a)() if case.back else f(*a) for f, a in ((form, args), (case.exact, wide)))
    return max(float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(got, want))


def timer(call_of, copies, graph):
    """-> a function that returns microseconds of one call, over `copies` sets of buffers in turn."""
    calls = [call_of(i) for i in range(copies)]
    def everything():
        for call in calls:
            call()
    side = torch.cuda.Stream()                               # compile, autotune, warm up, off the main stream
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            everything()
    torch.cuda.current_stream().wait_stream(side)
    if graph:
        held = torch.cuda.CUDAGraph()
        with torch.cuda.graph(held):
            everything()
        everything = held.replay
    def measure():
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        everything()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) * 1e3 / copies
    return measure


def ceilings():
    """Bytes and operations a second that this GPU reaches: a copy of 1 GiB, a bf16 product of 8192 cubed."""
    a, b = (torch.empty(2 ** 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = (timer(lambda i: call, 4, False) for call in (lambda: b.copy_(a), lambda: x @ y))
    works = (2 * 2 ** 30, copy), (2 * 8192 ** 3, product)
    return (work / statistics.median(run() for _ in range(20)) * 1e6 for work, run in works)


HEADER = (f"{'kernel':17}{'shape':>10}{'ours us':>11}{'peer us':>11}{'ratio':>7}{'floor us':>10}{'% of floor':>11}"
          "   error ours / peer")


def kernel_table(only, rounds):
    """Correct first, then fast. Returns whether every kernel was correct."""
    torch.manual_seed(time.time_ns() % 2 ** 31)
    copy, product = ceilings()
    cache, right = torch.cuda.get_device_properties(0).L2_cache_size, True
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy / 1e12:.2f} TB/s, "
          f"bf16 product {product / 1e12:.0f} T/s\n\n{HEADER}")
    for case in cases(fast=True):
        if only not in case.name:
            continue
        seed = int(torch.randint(10 ** 6, ()))
        peer = None if isinstance(case.peer, str) else case.peer
        forms = [case.ours] + [peer] * (peer is not None)
        errors = [error(case, form, seed) for form in forms]
        right &= errors[0] <= max(4e-3, 1.5 * (errors[1] if peer else 0))    # bf16: see the tests of each kernel
        first = case.make(case.tokens, seed)
        own = sum(a.nbytes for a in first)
        copies = max(1, min(50, math.ceil(4 * cache / own)))
        inputs = [first] + [case.make(case.tokens, seed + 10 * i) for i in range(1, copies)]
        short = case.tokens <= 256
        runs = [timer(lambda i: gradients(form, inputs[i]) if case.back else lambda: form(*inputs[i]), copies, short)
                for form in forms]
        times = list(zip(*[[run() for run in runs] for _ in range(rounds)]))            # ours, peer, ours, peer, ...
        us, least = [statistics.median(t) for t in times], floor(case.bytes, case.flops, copy, product) * 1e6
        beside = f"{us[1]:11.1f}{us[1] / us[0]:7.2f}" if peer else f"{'-':>11}{'-':>7}"
        print(f"{case.name:17}{case.shape:>10}{us[0]:11.1f}{beside}{least:10.1f}{100 * least / us[0]:10.0f}%   "
              f"{errors[0]:.1e} / {f'{errors[1]:.1e}' if peer else case.peer}", flush=True)
        if "loss" in case.name:
            memory(case, first)
        del inputs, runs, first
    return right


def memory(case, args):
    """Peak bytes above the inputs: ours, and the loss on materialised logits."""
    def plain(h, weight, target, mask):
        h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
        mtp.nll(F.linear(h, weight), target, mask).backward()
    peaks = []
    for form in (case.ours, plain):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form(*args)
        peaks.append((torch.cuda.max_memory_allocated() - before) / 1e9)
    print(f"{'':17}peak memory {peaks[0]:.2f} GB, with materialised logits {peaks[1]:.2f} GB: "
          f"{peaks[1] / peaks[0]:.1f} times less")


def model_speed(a, say=print):
    """Tokens a second of training, prefill and decoding; medians."""
    device, cast, _ = train.choose_device(train.Run(preset=a.preset, device=a.device), say)
    model = Nemotron(Config.preset(a.preset)).to(device)
    for m in model.modules():
        if hasattr(m, "fast"):
            m.fast = a.fast
    size, g = (a.batch, a.length + 1), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, size, generator=g).to(device)
    params = list(model.parameters())

    def step():
        with cast():
            loss = sum(train.losses(model, ids)) + latent_moe.take_balance(model)
        torch.autograd.grad(loss, params, allow_unused=True)

    def prefill():
        with torch.no_grad(), cast():
            prefill.cache = model.new_cache(a.batch)
            sample.read(model, prefill.cache, ids[:, :-1].tolist(), a.length)

    def decode():
        with torch.no_grad(), cast():
            for _ in range(8):
                model(ids[:, -1:], prefill.cache)

    print(f"\n{a.preset}, {sum(p.numel() for p in params) / 1e6:.1f} M parameters, batch {a.batch}, length {a.length}, "
          f"{'kernels' if a.fast else 'readable forms'}")
    print(f"{'':26}{'tokens/s':>12}{'ms':>10}")
    for what, call, tokens in (("training, no optimiser", step, a.batch * a.length),
                               ("prefill", prefill, a.batch * a.length),
                               ("decoding, 8 steps", decode, 8 * a.batch)):
        seconds = []
        for i in range(a.rounds + 1):
            start = time.perf_counter()
            call()
            if device.type != "cpu":
                getattr(torch, device.type).synchronize()
            seconds.append(time.perf_counter() - start)
        each = statistics.median(seconds[1:])                # the first warms up
        print(f"  {what:24}{tokens / each:12,.0f}{1e3 * each:10.1f}")


def main(argv=None):
    p = argparse.ArgumentParser(description="Tokens a second; every kernel against its floor and its peer.",
                                allow_abbrev=False)
    p.add_argument("--kernels", action="store_true", help="time every kernel at Super's sizes: needs a CUDA GPU")
    p.add_argument("--floors", action="store_true", help="print what no kernel can beat, for --copy and --product")
    p.add_argument("--only", default="", help="kernels whose name contains this")
    p.add_argument("--copy", type=float, default=COPY, help="bytes a second, for --floors")
    p.add_argument("--product", type=float, default=PRODUCT, help="operations a second, for --floors")
    p.add_argument("--preset", default="toy", help=", ".join(PRESETS))
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--batch", type=int, default=4, help="sequences")
    p.add_argument("--length", type=int, default=256, help="tokens of each")
    p.add_argument("--rounds", type=int, default=5, help="how often everything is timed; medians are shown")
    p.add_argument("--fast", action="store_true", help="the model on its Triton kernels")
    a = p.parse_args(argv)
    if min(a.batch, a.length, a.rounds) < 1 or min(a.copy, a.product) <= 0:
        p.error("--batch, --length, --rounds, --copy and --product begin at 1")
    if a.floors:
        print(f"floors at {a.copy / 1e12:.2f} TB/s and {a.product / 1e12:.0f} T operations/s, Super's sizes, bf16, "
              "batch 1\n")
        print(f"{'kernel':17}{'shape':>10}{'MB':>11}{'GFLOP':>10}{'floor us':>10}   bound by")
        for name, shape, b, f in floors():
            if a.only in name:
                bound = "bytes" if b / a.copy > f / a.product else "matrix products"
                us = floor(b, f, a.copy, a.product) * 1e6
                print(f"{name:17}{shape:>10}{b / 1e6:11,.1f}{f / 1e9:10,.1f}{us:10,.1f}   {bound}")
    elif a.kernels:
        if not torch.cuda.is_available():
            p.error("--kernels needs a CUDA GPU, and torch sees none here; --floors shows what no kernel can beat")
        sys.exit(not kernel_table(a.only, max(a.rounds, 5)))
    else:
        if a.fast and not torch.cuda.is_available():
            p.error("--fast needs a CUDA GPU, and torch sees none here")
        try:
            model_speed(a)
        except (ValueError, RuntimeError) as e:
            p.error(str(e))


if __name__ == "__main__":
    main()
