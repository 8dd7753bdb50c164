"""
Nemotron 3 Super: a stack of 88 one-mixer layers, spelled out by a string.

    x = Emb[token]                                  no scaling, no position
    x = x + Mixer_l(RMSNorm_l(x))                   M Mamba-2, * attention, E LatentMoE, - MLP
    logits = W_head RMSNorm_f(x)                    untied from the embedding

Attention carries no position signal at all (NoPE): the Mamba layers in front of it know the order.
Few layers attend, so the cache of a long conversation is small; few parameters are active, so a
token is cheap; the string decides all of it.

    super   MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME

In this file: the model and its cache; its initialisation; its costs. The mixers: a file each.
Sizes: config.py. `python model.py --preset super` prints the costs of any preset, and `--hf DIR`
those of any config.json of the family, without allocating a single weight.

Seams: what a wing replaces in a finished model, so that no mixer knows of it.

    Attention.attend, Mamba2.conv, Mamba2.scan    scale/parallel.py   slices of a sequence
    LatentMoE.whole_sequence                      scale/parallel.py   the same, in the balance loss
    Experts.exchange, lm_head.nll                 scale/parallel.py   experts, a vocabulary on ranks
    Experts.mm                                    quant/lowbit.py     products of fewer bits
    fast, of every module that has it             set_paths, below    kernels/

Letters   b batch  t time  d model width  v vocabulary  c a Config
Sources   arXiv:2604.12374 section 2.1 and table 1
          names: the released config.json and checkpoint
Departs   residual stream and parameters are fp32 (matrix products in bf16 under autocast), the
          release's bf16
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import command

import torch
from torch import nn

from attention import KV, Attention
from bounds import LONGEST, knob
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
    """What a model remembers of the tokens it has read: a KV per `*` layer, a State per `M` layer.

    The model appends to it: `model(ids, cache)` reads any number of tokens, so prefill, chunked
    prefill, one-token decoding and verification are one call. With count (b,), rows are padded on
    the right, and only count of their tokens are real.
    """

    def __init__(self, pattern, batch, store=None):
        kinds = {"M": lambda i: State(store and store(i)), "*": lambda i: KV()}
        if batch < 0:
            raise ValueError(f"a cache of {batch} rows")
        self.batch = batch
        self.layers = [kinds.get(x, lambda i: None)(i) for i, x in enumerate(pattern)]
        self.last = {}  # of an MTP cache with several blocks, see mtp.follow

    def fix(self, room):
        """Room for so many tokens a row and no more, see KV.fix. Only after a first read."""
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
        """Of the t tokens just read on trial, the first count (b,) of each row stay.

        The cache is then, tensor by tensor, as if it had never seen the others.
        """
        kept = None  # looked at once, and not where tensors say where rows write
        for layer in self.layers:
            if isinstance(layer, State):
                layer.keep(count)
            elif layer is not None:
                if kept is None and not layer.fixed:
                    kept = count.tolist()
                    if not 0 <= min(kept) <= max(kept) <= t:
                        raise ValueError(f"{kept} of {t} tokens cannot be kept")
                layer.drop(t - kept[0] if kept and len(set(kept)) == 1 else t - count)


class Nemotron(nn.Module):
    """The whole model: model(ids) -> logits (b, t, v) in fp32; model.mtp the MTP block, or None."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = c = config
        self.fast = False  # whether train.losses may take kernels/loss.py
        self.noise = None  # seam: quant/lowbit.py's, whence it rounds at random
        self.store = None  # seam: quant/statecache.py's, how a layer keeps its Mamba state
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.backbone.layers = nn.ModuleList(
            Block(c, letter) for letter in c.hybrid_override_pattern
        )
        self.backbone.norm_f = nn.RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.mtp = None
        if c.num_nextn_predict_layers:
            self.mtp = MTP(
                lambda letter: Block(c, letter),
                c.hidden_size,
                c.mtp_hybrid_override_pattern,
                c.num_nextn_predict_layers,
                c.mtp_num_layers,
                c.layer_norm_epsilon,
            )
        if self.lm_head.weight.device.type != "meta":
            init_weights(self, seed)

    def hidden(self, ids, cache=None, count=None, docs=None):
        """ids (b, t) -> the normalised states (b, t, d), for head and MTP.

        With a cache there is no gradient. Of rows padded on the right, count (b,) tokens are real.
        docs: a pack.Docs, if rows hold several documents, none of which sees another.
        """
        if cache is not None and docs is not None:
            raise ValueError("several documents a row (docs) have no cache: read them without one")
        if cache is not None and len(ids) != cache.batch:
            raise ValueError(f"{len(ids)} rows of tokens for a cache of {cache.batch} rows")
        known = count is None or count.shape == ids.shape[:1] and not count.is_floating_point()
        if not known or count is not None and (count.min() < 0 or count.max() > ids.shape[1]):
            raise ValueError(f"count {count.tolist()} of rows of {ids.shape[1]} tokens")
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
        return Cache(self.config.hybrid_override_pattern, batch, self.store)

    def new_draft_cache(self, batch):
        """The MTP block's own, one part for each stored block."""
        c = self.config
        return Cache(c.mtp_hybrid_override_pattern * c.num_nextn_predict_layers, batch)


class Op(NamedTuple):
    """An operation that set_paths tells of: whose, its file in kernels/, its readable form."""

    owner: str
    name: str
    kernel: str
    readable: str


def set_paths(model, fast=False, experts="latent_moe.grouped_mm"):
    """Sends every op that has a kernel through it, or none -> lines of a table: op, path, reason.

    experts names their readable form where another seam than grouped_mm has been put in.
    """
    if fast:
        from kernels import on_gpu

        on_gpu("the model", model.lm_head.weight)
    switched = [m for m in model.modules() if hasattr(m, "fast")]
    for m in switched:
        m.fast = fast
    there = {type(m).__name__ for m in model.modules()}
    four_bits = any(getattr(getattr(m, "mm", None), "fast", False) for m in switched)
    lines = [f"{'paths':10} {'op':12} {'path':32} reason"]
    for op in (
        Op("Mamba2", "recurrence", "ssd", "mamba.ssd_chunked"),
        Op("Mamba2", "convolution", "conv", "mamba.causal_conv"),
        Op("GatedNorm", "gated norm", "norm", "mamba.GatedNorm"),
        Op("Experts", "experts", "experts", experts),
        Op("Nemotron", "losses", "loss", "mtp.nll"),
        Op("Attention", "attention", "", "F.scaled_dot_product_attention"),
    ):
        if op.owner in there:
            path = f"kernels/{op.kernel}.py" if fast and op.kernel else op.readable
            lines.append(f"{'':10} {op.name:12} {path:32} {reason(op, fast, four_bits)}")
    return lines


def reason(op, fast, four_bits):
    """Why an op takes the path it takes."""
    if not op.kernel:
        return "torch's own kernel"
    if not fast:
        return "readable; --fast takes the kernel"
    if four_bits and op.name == "experts":
        return "as asked: --fast; four bits: kernels/fp4mm.py"
    return "as asked: --fast"


@torch.no_grad()
def init_weights(model, seed=0, put=torch.Tensor.copy_):
    """Writes every parameter as pre-training began, see `initial`; zeroes the experts' loads.

    Each tensor has its own generator, seeded by its name, so the numbers depend neither on the
    device nor on which other tensors exist. Works on a model moved from the meta device; put(p, w)
    writes w into p, or only the part of it that p holds.
    """
    for name, p in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        put(p, initial(model.config, name, p.shape, generator))
    for m in model.modules():
        if isinstance(m, LatentMoE):
            m.load.zero_()


def initial(c, name, shape, generator):
    """A parameter's first numbers, by its name; biases 0 (but the convolution's), norms and D 1.

    N(0, initializer_range) for matrices, divided by sqrt(layers) where they write into the residual
    stream; dt log-uniform in [time_step_min, time_step_max]; A uniform in (1, 16); the convolution
    as PyTorch does for k taps.
    """

    def uniform(low, high):
        return torch.empty(shape).uniform_(low, high, generator=generator)

    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind == "e_score_correction_bias" or name.endswith("_proj.bias"):
        return torch.zeros(shape)
    if "conv1d" in name:
        return uniform(-1, 1) * c.conv_kernel**-0.5
    if kind == "A_log":
        return uniform(1, 16).log()
    if kind == "dt_bias":
        dt = uniform(math.log(c.time_step_min), math.log(c.time_step_max)).exp()
        return dt.clamp(min=c.time_step_floor).expm1().log()
    if len(shape) == 1:
        return torch.ones(shape)
    into_residual = kind in ("o_proj", "out_proj", "down_proj", "fc2_latent_proj")
    std = c.initializer_range / (math.sqrt(c.num_hidden_layers) if into_residual else 1)
    return torch.randn(shape, generator=generator) * std


class Row(NamedTuple):
    """What a part of the model costs. FLOPs: of a token's forward pass."""

    what: str
    layers: int
    parameters: int
    active: int
    flops: float


def beside(c, context):
    """A token's FLOPs in a layer, by letter, that no weight counts: the scan, and attention over a
    mean of context/2 keys."""
    scores = 2 * c.chunk_size * c.n_groups * c.ssm_state_size
    inner = c.mamba_num_heads * c.mamba_head_dim
    scan = 2 * inner * (c.chunk_size + 2 * c.ssm_state_size) + scores
    return {"M": scan, "*": 4 * c.num_attention_heads * c.head_dim * context / 2}


def price(c, what, module, layers=1, extra=0):
    """The Row of `layers` such modules: two FLOPs per active weight of a matrix, and the extra."""
    tensors = module.state_dict().items()
    total = sum(p.numel() for _, p in tensors)
    idle = sum(p.numel() for n, p in tensors if ".experts." in "." + n)
    idle *= 1 - c.num_experts_per_tok / c.n_routed_experts
    flops = 2 * (sum(p.numel() for _, p in tensors if p.ndim > 1) - idle) + extra
    return Row(what, layers, layers * total, layers * round(total - idle), layers * flops)


def costs(config, context=8192):
    """Rows of the model's parts, MTP's Row or None, the cache's bytes. No weight is made."""
    c = config
    with torch.device("meta"):
        model = Nemotron(c)
    more, rows = beside(c, context), []
    for letter, what in LETTERS.items():
        layers = zip(model.backbone.layers, c.hybrid_override_pattern)
        blocks = [block for block, x in layers if x == letter]
        if blocks:
            extra = more.get(letter, 0)
            rows.append(price(c, f"{letter} {what}", blocks[0], len(blocks), extra))
    embeddings = model.backbone.embeddings.weight.numel()
    rows += [
        Row("embedding", 1, embeddings, embeddings, 0),
        price(c, "final norm", model.backbone.norm_f),
        price(c, "head", model.lm_head),
    ]
    extra = sum(more.get(x, 0) for x in c.mtp_hybrid_override_pattern)
    mtp = price(c, "MTP block", model.mtp, 1, extra) if model.mtp else None
    return rows, mtp, cache_bytes(c)


def cache_bytes(c):
    """kv: of a token (bf16); state: of a sequence (S in fp32, the convolution's window in bf16)."""
    inner = c.mamba_num_heads * c.mamba_head_dim
    channels = inner + 2 * c.n_groups * c.ssm_state_size
    state = 4 * inner * c.ssm_state_size + 2 * (c.conv_kernel - 1) * channels
    return dict(
        kv=c.hybrid_override_pattern.count("*") * 4 * c.num_key_value_heads * c.head_dim,
        state=c.hybrid_override_pattern.count("M") * state,
    )


@dataclass(frozen=True)
class Flags:
    preset: str = knob("super", ", ".join(PRESETS), choices=PRESETS)
    hf: str | None = knob(
        None, "a folder with any member's config.json, instead", least=1, most=LONGEST
    )
    context: int = knob(8192, "tokens of context, for FLOPs and cache", least=1, most=1 << 40)


def described(folder):
    """The Config that a folder's config.json describes; how its weights are stored plays no
    part.
    """
    given = command.document(Path(folder) / "config.json")
    return Config.from_hf({k: v for k, v in given.items() if k != "quantization_config"})


def table(a):
    """Prints the parameters, operations and memory of a preset, or of a folder's config.json."""
    c = described(a.hf) if a.hf else Config.preset(a.preset)
    print(f"{a.hf or a.preset}: {c.num_hidden_layers} layers, one mixer each\n")
    print(f"  {c.hybrid_override_pattern}\n")
    show(c, a.context)


def show(c, context):
    """Prints the table of costs, and what they come to in memory and in work."""
    rows, mtp, cache = costs(c, context)
    head = f"{'layers':>7}{'parameters':>18}{'active':>17}{'GFLOP/token':>13}"
    print(f"{'':14}{head}   forward, context {context:,}")
    total = Row("total", c.num_hidden_layers, *(sum(r[i] for r in rows) for i in (2, 3, 4)))
    for r in [*rows, total]:
        print(line(r))
    lookup = next(r.active for r in rows if r.what == "embedding")
    print(f"{'  without the input embedding, which is a lookup':39}{total.active - lookup:17,}")
    everything = total.parameters
    if mtp:
        everything += mtp.parameters
        print(line(mtp._replace(what="+ MTP block")))
        print(f"{'total with MTP':21}{everything:18,}")

    def gigabytes(tokens):
        return (cache["kv"] * tokens + cache["state"]) / 1e9

    print(f"\ncache      {cache['kv']:,} bytes a token (keys and values, bf16)", end=" and ")
    print(f"{cache['state']:,} bytes a sequence (S in fp32, conv window in bf16):")
    print(f"           {gigabytes(context):.3f} GB for {context:,} tokens", end=", ")
    print(f"{gigabytes(2**20):.3f} GB for 1,048,576")
    print(f"inference  {2 * everything / 1e9:,.2f} GB of weights in bf16")
    print(f"training   {16 * everything / 1e9:,.2f} GB for weights, gradients", end=" and ")
    print("AdamW's two moments in fp32, before activations;")
    print(f"           {3 * total.flops / 1e9:,.3f} GFLOP a token,", end=" ")
    print("forward and backward, without MTP")


def line(row):
    counts = f"{row.layers:7}{row.parameters:18,}{row.active:17,}"
    return f"{row.what:14}{counts}{row.flops / 1e9:13.3f}"


def main(argv=None):
    command.run(table, Flags, "model.py", __doc__, argv)


if __name__ == "__main__":
    main()
