"""
Nemotron 3 Super: a stack of 88 one-mixer layers, spelled out by a string.

    x = Emb[token]                                  no scaling, no position
    x = x + Mixer_l(RMSNorm_l(x))                   by letter l: M Mamba-2   * attention   E LatentMoE   - MLP
    logits = W_head RMSNorm_f(x)                    untied from the embedding

Attention carries no position signal at all (NoPE): the Mamba layers in front of it know the order.
Few layers attend, so the cache of a long conversation is small; few parameters are active, so a
token is cheap; the string decides all of it.

    super   MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME

In this file: the model and its cache; its initialisation; its costs. The mixers: a file each.
Sizes: config.py. `python model.py --preset super` prints the costs of any preset, without
allocating a single weight.

Letters   b batch  t time  d model width  v vocabulary
Sources   arXiv:2604.12374 section 2.1 and table 1; names from the released config.json and
          checkpoint
Departs   residual stream and parameters are fp32 (matrix products in bf16 under autocast), the
          release's bf16
"""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import nn

import command
from attention import KV, Attention
from command import knob
from config import LETTERS, PRESETS, Config
from latent_moe import MLP, LatentMoE
from mamba import Mamba2, State
from mtp import MTP


class Block(nn.Module):
    """x + mixer(norm(x)): one letter of the pattern."""

    def __init__(self, c, letter):
        super().__init__()
        self.norm = nn.RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.remembers = letter in "M*"  # others look at one token only
        if letter == "M":
            self.mixer = Mamba2(
                c.hidden_size,
                c.mamba_num_heads,
                c.mamba_head_dim,
                c.n_groups,
                c.ssm_state_size,
                c.conv_kernel,
                c.chunk_size,
                c.layer_norm_epsilon,
                c.use_conv_bias,
                c.use_bias,
            )
        elif letter == "*":
            self.mixer = Attention(
                c.hidden_size,
                c.num_attention_heads,
                c.num_key_value_heads,
                c.head_dim,
                c.rotary_base,
            )
        elif letter == "E":
            self.mixer = LatentMoE(
                c.hidden_size,
                c.n_routed_experts,
                c.num_experts_per_tok,
                c.moe_intermediate_size,
                c.moe_shared_expert_intermediate_size,
                c.moe_latent_size,
                c.routed_scaling_factor,
                c.norm_topk_prob,
                c.n_group,
                c.topk_group,
                c.mlp_bias,
            )
        else:
            self.mixer = MLP(c.hidden_size, c.intermediate_size, c.mlp_bias)

    def forward(self, x, cache=None, count=None, docs=None):
        u = self.norm(x)
        return x + (self.mixer(u, cache, count, docs) if self.remembers else self.mixer(u))


class Cache:
    """All a model remembers of the tokens it has read: KV per attention layer, State per Mamba
    layer.

    The model appends to it: `model(ids, cache)` reads any number of tokens, so prefill, chunked
    prefill, one-token decoding and verification are one call. With count (b,), rows are padded on
    the right, and only count of their tokens are real.
    """

    def __init__(self, pattern, batch):
        kinds = {"M": State, "*": KV}
        self.batch, self.layers = batch, [kinds.get(letter, lambda: None)() for letter in pattern]
        self.last = {}  # of an MTP cache with several blocks, see mtp.follow

    def fix(self, room):
        """Room for so many tokens a row and no more: see KV.fix. Only after something has been
        read.
        """
        for layer in self.layers:
            if isinstance(layer, KV):
                layer.fix(room)

    def tensors(self):
        """All that it holds, in one list; `put` puts such a list in its place."""
        return [getattr(x, name) for x in self.layers for name in getattr(x, "holds", ())]

    def take(self, index):
        """The same memory for other rows: index (n,) names the old row that each new one goes on
        from. It may repeat rows, and leave some out.
        """
        self.batch = len(index)
        self.put([x if x is None else x[index] for x in self.tensors()])

    def put(self, tensors):
        tensors = iter(tensors)
        for x in self.layers:
            for name in getattr(x, "holds", ()):
                setattr(x, name, next(tensors))

    def trial(self):
        """The next call reads on trial: what it reads counts only as far as `keep` then says."""
        for layer in self.layers:
            if isinstance(layer, State):
                layer.trial = True

    def keep(self, count, t):
        """Of the t tokens just read on trial, the first count (b,) of each row stay. Now the cache
        is, tensor by tensor, as if it had never seen the others."""
        same = bool((count == count[0]).all())
        for layer in self.layers:
            if isinstance(layer, State):
                layer.keep(count)
            elif layer is not None:
                layer.drop(t - int(count[0]) if same else t - count)


class Nemotron(nn.Module):
    """The whole model. model(ids) -> logits (b, t, v) in fp32; model.mtp is the MTP block, or None."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = c = config
        self.fast = False  # the loss's share of it: train.py
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.backbone.layers = nn.ModuleList(
            Block(c, letter) for letter in c.hybrid_override_pattern
        )
        self.backbone.norm_f = nn.RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.mtp = (
            MTP(
                lambda letter: Block(c, letter),
                c.hidden_size,
                c.mtp_hybrid_override_pattern,
                c.num_nextn_predict_layers,
                c.mtp_num_layers,
                c.layer_norm_epsilon,
            )
            if c.num_nextn_predict_layers
            else None
        )
        if self.lm_head.weight.device.type != "meta":
            init_weights(self, seed)

    def hidden(self, ids, cache=None, count=None, docs=None):
        """ids (b, t) -> the normalised states (b, t, d) for head and MTP. Cached calls have no
        gradient. docs: a pack.Docs, if rows hold several documents, none of which sees another.
        """
        if cache is not None and docs is not None:
            raise ValueError("several documents a row (docs) have no cache: read them without one")
        if cache is not None and len(ids) != cache.batch:
            raise ValueError(f"{len(ids)} rows of tokens for a cache of {cache.batch} rows")
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.hidden(ids, cache, count)
        x = self.backbone.embeddings(ids)
        for i, block in enumerate(self.backbone.layers):
            x = block(x, cache and cache.layers[i], count, docs)
        return self.backbone.norm_f(x)

    def forward(self, ids, cache=None, count=None):
        return self.logits(self.hidden(ids, cache, count))

    def logits(self, h):
        """(b, t, d) -> (b, t, v), fp32."""
        y = self.lm_head(h)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def new_cache(self, batch):
        return Cache(self.config.hybrid_override_pattern, batch)

    def new_draft_cache(self, batch):
        """The MTP block's own, one part for each stored block."""
        c = self.config
        return Cache(c.mtp_hybrid_override_pattern * c.num_nextn_predict_layers, batch)


def paths(model, fast=False, experts="latent_moe.grouped_mm"):
    """Sends every op that has a kernel through it, or none; returns the table that says so: op,
    path, reason.
    """
    if fast:
        from kernels import on_gpu

        on_gpu("the model", model.lm_head.weight)
    switched = [m for m in model.modules() if hasattr(m, "fast")]
    for m in switched:
        m.fast = fast
    there = {type(m).__name__ for m in model.modules()}
    four = any(getattr(getattr(m, "mm", None), "fast", False) for m in switched)
    rows = [("op", "path", "reason")]
    for owner, op, kernel, readable in (
        ("Mamba2", "recurrence", "ssd", "mamba.ssd_chunked"),
        ("Mamba2", "convolution", "conv", "mamba.causal_conv"),
        ("GatedNorm", "gated norm", "norm", "mamba.GatedNorm"),
        ("Experts", "experts", "experts", experts),
        ("Nemotron", "losses", "loss", "mtp.nll"),
        ("Attention", "attention", "", "F.scaled_dot_product_attention"),
    ):
        if owner in there:
            can = any(type(m).__name__ == owner for m in switched)
            asked = "as asked: --fast" + "; four bits: kernels/fp4.py" * (four and op == "experts")
            why = (
                "torch's own kernel"
                if not kernel
                else asked
                if fast and can
                else "no kernel"
                if fast
                else "readable; --fast takes the kernel"
                if can
                else "readable"
            )
            rows.append((op, f"kernels/{kernel}.py" if fast and can else readable, why))
    return [
        f"{'' if i else 'paths':10} {op:12} {path:32} {why}"
        for i, (op, path, why) in enumerate(rows)
    ]


@torch.no_grad()
def init_weights(model, seed=0, put=torch.Tensor.copy_):
    """Writes every parameter as pre-training did (section 1.6 of the report's code), zeroes router
    biases.

    N(0, std) for matrices, divided by sqrt(layers) where they write into the residual stream; dt
    log-uniform in [time_step_min, time_step_max]; A uniform in (1, 16). Each tensor has its own
    generator, seeded by its name, so the numbers depend neither on the device nor on which other
    tensors exist. Works on a model moved from the meta device; put(p, w) writes w into p, or only
    the part of it that p holds.
    """
    c = model.config
    for name, p in model.state_dict().items():
        g = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind == "e_score_correction_bias" or name.endswith("_proj.bias"):
            w = torch.zeros(p.shape)
        elif "conv1d" in name:  # PyTorch's default for k taps
            w = torch.empty(p.shape).uniform_(-1, 1, generator=g) * c.conv_kernel**-0.5
        elif kind == "A_log":
            w = torch.empty(p.shape).uniform_(1, 16, generator=g).log()
        elif kind == "dt_bias":
            low, high = math.log(c.time_step_min), math.log(c.time_step_max)
            dt = (
                torch.empty(p.shape)
                .uniform_(low, high, generator=g)
                .exp()
                .clamp(min=c.time_step_floor)
            )
            w = dt.expm1().log()
        elif p.ndim == 1:  # norms and D
            w = torch.ones(p.shape)
        else:
            into_residual = kind in ("o_proj", "out_proj", "down_proj", "fc2_latent_proj")
            w = torch.randn(p.shape, generator=g)
            w *= c.initializer_range / (math.sqrt(c.num_hidden_layers) if into_residual else 1)
        put(p, w)
    for m in model.modules():
        if isinstance(m, LatentMoE):
            m.load.zero_()


def costs(config, context=8192):
    """Rows (what, layers, parameters, active ones, forward FLOPs per token), MTP's row, the cache's
    bytes.

    FLOPs: two per active weight, and what the mixers do besides: attention over a mean of context/2
    keys, and the scan. No weight is made.
    """
    c = config
    with torch.device("meta"):
        model = Nemotron(c)
    scores = 2 * c.chunk_size * c.n_groups * c.ssm_state_size
    scan = 2 * c.mamba_num_heads * c.mamba_head_dim * (c.chunk_size + 2 * c.ssm_state_size) + scores
    beside = {"M": scan, "*": 4 * c.num_attention_heads * c.head_dim * context / 2}

    def row(what, module, layers=1, extra=0):
        tensors = module.state_dict().items()
        total = sum(p.numel() for _, p in tensors)
        idle = sum(p.numel() for n, p in tensors if ".experts." in "." + n)
        idle *= 1 - c.num_experts_per_tok / c.n_routed_experts
        matrices = sum(p.numel() for _, p in tensors if p.ndim > 1) - idle
        return (
            what,
            layers,
            layers * total,
            layers * round(total - idle),
            layers * (2 * matrices + extra),
        )

    rows = []
    for letter, what in LETTERS.items():
        blocks = [
            b for b, x in zip(model.backbone.layers, c.hybrid_override_pattern) if x == letter
        ]
        if blocks:
            rows.append(row(f"{letter} {what}", blocks[0], len(blocks), beside.get(letter, 0)))
    rows += [
        ("embedding", 1, *[model.backbone.embeddings.weight.numel()] * 2, 0),
        row("final norm", model.backbone.norm_f),
        row("head", model.lm_head),
    ]
    extra = sum(beside.get(x, 0) for x in c.mtp_hybrid_override_pattern)
    mtp = row("MTP block", model.mtp, 1, extra) if model.mtp else None
    channels = c.mamba_num_heads * c.mamba_head_dim + 2 * c.n_groups * c.ssm_state_size
    state = (
        4 * c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size
        + 2 * (c.conv_kernel - 1) * channels
    )
    cache = dict(
        kv=c.hybrid_override_pattern.count("*") * 4 * c.num_key_value_heads * c.head_dim,
        state=c.hybrid_override_pattern.count("M") * state,
    )
    return rows, mtp, cache


@dataclass(frozen=True)
class Flags:
    preset: str = knob("super", ", ".join(PRESETS), choices=PRESETS)
    context: int = knob(8192, "tokens of context, for FLOPs and cache", least=1, most=1 << 40)


def table(a):
    """Prints a preset's parameters, operations and memory."""
    c = Config.preset(a.preset)
    rows, mtp, cache = costs(c, a.context)
    print(
        f"{a.preset}: {c.num_hidden_layers} layers, one mixer each\n\n  {c.hybrid_override_pattern}\n"
    )
    print(
        f"{'':14}{'layers':>7}{'parameters':>18}{'active':>17}{'GFLOP/token':>13}   "
        f"forward, context {a.context:,}"
    )

    def show(what, n, total, active, flops):
        print(f"{what:14}{n:7}{total:18,}{active:17,}{flops / 1e9:13.3f}")

    for r in rows:
        show(*r)
    total, active, flops = (sum(r[i] for r in rows) for i in (2, 3, 4))
    show("total", c.num_hidden_layers, total, active, flops)
    print(f"{'  without the input embedding, which is a lookup':39}{active - rows[-3][2]:17,}")
    if mtp:
        show("+ MTP block", *mtp[1:])
        print(f"{'total with MTP':21}{total + mtp[2]:18,}")
    everything = total + (mtp[2] if mtp else 0)
    size = lambda tokens: (cache["kv"] * tokens + cache["state"]) / 1e9
    print(
        f"\ncache      {cache['kv']:,} bytes a token (keys and values, bf16) and {cache['state']:,} bytes "
        "a sequence (S in fp32, conv window in bf16):\n           "
        f"{size(a.context):.3f} GB for {a.context:,} tokens, {size(2**20):.3f} GB for 1,048,576"
    )
    print(f"inference  {2 * everything / 1e9:,.2f} GB of weights in bf16")
    print(
        f"training   {16 * everything / 1e9:,.2f} GB for weights, gradients and AdamW's two moments "
        f"in fp32, before activations;\n           "
        f"{3 * flops / 1e9:,.3f} GFLOP a token, forward and backward, without MTP"
    )


def main(argv=None):
    command.run(table, Flags, "model.py", __doc__, argv)


if __name__ == "__main__":
    main()
