"""
Nemotron 3 Super: a stack of 88 one-mixer layers, spelled out by a string.

    x = Emb[token]                                  no scaling, no position
    x = x + Mixer_l(RMSNorm_l(x))                   l-th letter of the pattern: M Mamba-2   * attention   E LatentMoE   - MLP
    logits = W_head RMSNorm_f(x)                    untied from the embedding

Attention carries no position signal at all (NoPE): the Mamba layers in front of it know the order. Few layers attend, so
the cache of a long conversation is small; few parameters are active, so a token is cheap; the string decides all of it.

    super   MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME

In this file: Config and its presets; attention and its cache; the model; its initialisation; what it costs.
`python model.py --preset super` prints the last for any preset, without allocating a single weight.

Letters   b batch  t time  d model width  h query heads  e head dim  L keys seen so far  v vocabulary
Sources   arXiv:2604.12374 section 2.1 and table 1; field and tensor names from the released config.json and checkpoint
Departs   1. the residual stream and the parameters are fp32 (bf16 under autocast), the release's are bf16
          2. initializer_range is the 0.014 of pre-training; the released config.json says 0.02, which nothing used
"""
import argparse
import math
import zlib
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn

from latent_moe import MLP, LatentMoE
from mamba import Mamba2, State
from mtp import MTP

LETTERS = {"M": "Mamba-2", "*": "attention", "E": "LatentMoE", "-": "MLP"}
# Fields of config.json that change nothing here, and fields of which only one value is implemented.
IGNORED = set("""architectures model_type num_hidden_layers auto_map dtype torch_dtype transformers_version use_cache
    num_logits_to_keep output_router_logits expand use_mamba_kernels mamba_ssm_cache_dtype moe_shared_expert_overlap
    rescale_prenorm_residual norm_eps rope_theta partial_rotary_factor""".split())
FIXED = dict(attention_bias=False, mlp_bias=False, use_bias=False, mamba_proj_bias=False, attention_dropout=0.0,
             hidden_dropout=0.0, tie_word_embeddings=False, residual_in_fp32=False, sliding_window=None, n_group=1,
             topk_group=1, n_shared_experts=1, mlp_hidden_act="relu2", mamba_hidden_act="silu")
REQUIRED = """vocab_size hidden_size num_attention_heads num_key_value_heads head_dim mamba_num_heads mamba_head_dim
    ssm_state_size n_groups conv_kernel n_routed_experts num_experts_per_tok moe_intermediate_size
    moe_shared_expert_intermediate_size routed_scaling_factor""".split()
UNCLAMPED = str([0.0, {"__float__": "Infinity"}])       # as transformers writes it
HF_WORDS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-"}


@dataclass(frozen=True)
class Config:
    """The released config.json's fields under their own names, in Super's sizes. See `preset` for the others."""
    hybrid_override_pattern: str = ("MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*"
                                    "EMEMEMEME")
    vocab_size: int = 131072
    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    use_conv_bias: bool = True
    chunk_size: int = 128
    n_routed_experts: int = 512
    num_experts_per_tok: int = 22
    moe_latent_size: int | None = 1024                # None: experts at full width, as in Nano
    moe_intermediate_size: int = 2688
    moe_shared_expert_intermediate_size: int = 5376
    routed_scaling_factor: float = 5.0
    norm_topk_prob: bool = True
    intermediate_size: int = 2688                     # of `-` layers
    num_nextn_predict_layers: int = 1                 # MTP blocks stored, and ...
    mtp_num_layers: int = 2                           # ... depths trained with them (not in config.json; Megatron's name)
    mtp_hybrid_override_pattern: str = "*E"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.014
    time_step_min: float = 0.001                      # of the initial dt; nothing is ever clamped to it
    time_step_max: float = 0.1
    time_step_floor: float = 0.0001
    max_position_embeddings: int = 262144             # what serving reserves; the model was trained to 1,048,576
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self):
        for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern"):
            wrong = sorted(set(getattr(self, name)) - set(LETTERS))
            if wrong or not getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)!r} may only hold the letters M, E, * and -"
                                 + (f", not {', '.join(wrong)}" if wrong else ", and at least one of them"))
        for whole, part in (("mamba_num_heads", "n_groups"), ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole}={getattr(self, whole)} is not a multiple of {part}={getattr(self, part)}")
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} of n_routed_experts={self.n_routed_experts}")

    @property
    def num_hidden_layers(self):
        return len(self.hybrid_override_pattern)

    @staticmethod
    def preset(name):
        """toy: minutes on a laptop. tiny-nv: NVIDIA's own test shape. small: one GPU. nano: 30B-A3B. super: 120B-A12B."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
        return Config(**PRESETS[name])

    @staticmethod
    def from_hf(given):
        """A config.json, either generation of it, as a Config; ValueError names the fields that cannot be honoured."""
        model_type, layers = given.get("model_type", "nemotron_h"), given.get("num_hidden_layers")
        given = {k: v for k, v in given.items() if k not in IGNORED}
        if str(given.pop("time_step_limit", None)) not in ("None", "[0.0, inf]", "(0.0, inf)", UNCLAMPED):
            raise ValueError("time_step_limit asks to clamp dt: the model was trained without, and is run without")
        for prefix in ("", "mtp_"):                                          # lists of words became strings of letters
            words = given.pop(prefix + "layers_block_type", None)
            if words and prefix + "hybrid_override_pattern" not in given:
                if unknown := sorted(set(words) - set(HF_WORDS)):
                    raise ValueError(f"{prefix}layers_block_type holds {', '.join(unknown)}; known: {', '.join(HF_WORDS)}")
                given[prefix + "hybrid_override_pattern"] = "".join(HF_WORDS[w] for w in words)
        if model_type != "nemotron_h" or "hybrid_override_pattern" not in given:
            raise ValueError(f"config.json describes a {model_type!r} without a layer pattern, not a nemotron_h model"
                             if "hybrid_override_pattern" not in given else f"model_type {model_type!r} is not nemotron_h")
        if layers not in (None, len(given["hybrid_override_pattern"])):
            raise ValueError(f"num_hidden_layers={layers}, but the pattern has {len(given['hybrid_override_pattern'])} letters")
        if lacking := [k for k in REQUIRED if k not in given]:
            raise ValueError(f"config.json lacks {', '.join(lacking)}: no default would be right")
        given.setdefault("moe_latent_size", None)                            # absent in Nano's, and then not used
        given.setdefault("num_nextn_predict_layers", 0)
        refused = [f"{k}={given[k]!r} (only {v!r} is implemented)" for k, v in FIXED.items() if given.get(k, v) != v]
        known = {f.name for f in fields(Config)}
        refused += [f"{k}={v!r} (unknown field)" for k, v in given.items() if k not in known and k not in FIXED]
        if refused:
            raise ValueError("this config.json asks for what is not implemented here: " + ", ".join(refused))
        return Config(**{k: v for k, v in given.items() if k in known})

    def to_hf(self):
        """The dict to write as config.json: what transformers' NemotronHConfig and other loaders read."""
        ours = {f.name: getattr(self, f.name) for f in fields(self)}
        return dict(architectures=["NemotronHForCausalLM"], model_type="nemotron_h", num_hidden_layers=self.num_hidden_layers,
                    expand=2, use_mamba_kernels=True, use_cache=True, num_logits_to_keep=1, norm_eps=self.layer_norm_epsilon,
                    mamba_ssm_cache_dtype="float32", rescale_prenorm_residual=True, dtype="float32", **FIXED, **ours)


PRESETS = dict(
    # minutes on two CPU cores: all three mixers, a latent at half the width, eight experts and a shared one
    toy=dict(hybrid_override_pattern="MEMEM*EME", vocab_size=2048, hidden_size=128, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=32, n_groups=2,
             chunk_size=32, n_routed_experts=16, num_experts_per_tok=4, moe_latent_size=64, moe_intermediate_size=128,
             moe_shared_expert_intermediate_size=256, routed_scaling_factor=2.5, intermediate_size=512),
    # NVIDIA's own test model (recipes/super3/tiny_model.py), at the full vocabulary
    **{"tiny-nv": dict(hybrid_override_pattern="MEM*EME", hidden_size=256, num_attention_heads=4, head_dim=64,
                       mamba_num_heads=8, mamba_head_dim=32, n_routed_experts=16, num_experts_per_tok=2,
                       moe_latent_size=128, moe_intermediate_size=384, moe_shared_expert_intermediate_size=768,
                       routed_scaling_factor=2.5)},
    # one GPU of 24 to 80 GB, training in fp32 master weights: half a billion parameters
    small=dict(hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEME", vocab_size=32768, hidden_size=768,
               num_attention_heads=12, num_key_value_heads=2, head_dim=64, mamba_num_heads=24, n_routed_experts=64,
               num_experts_per_tok=8, moe_latent_size=384, moe_intermediate_size=672,
               moe_shared_expert_intermediate_size=1344, routed_scaling_factor=2.5),
    nano=dict(hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", hidden_size=2688,
              mamba_num_heads=64, n_routed_experts=128, num_experts_per_tok=6, moe_latent_size=None,
              moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, intermediate_size=1856,
              routed_scaling_factor=2.5, num_nextn_predict_layers=0),
    super=dict(),
)


class KV:
    """What an attention layer remembers: keys and values (b, kv heads, L, e), and how many tokens each row has read.

    Rows may have read different amounts. The buffer doubles when it is full; what lies beyond a row's own length is
    never looked at, so dropping tokens from the end is a change of `length` alone.
    """
    def __init__(self):
        self.k = self.v = self.length = None
        self.used, self.even = 0, True                   # the longest row; whether all rows are as long

    def append(self, k, v, count=None):
        """Adds t tokens a row, of which count (b,) are real. Returns all keys, all values, and where the t tokens begin."""
        b, heads, t, e = k.shape
        if self.k is None:
            self.k, self.v = k.new_zeros(b, heads, 0, e), v.new_zeros(b, heads, 0, e)
            self.length = torch.zeros(b, dtype=torch.long, device=k.device)
        if self.used + t > self.k.shape[2]:
            self.k, self.v = (F.pad(old, (0, 0, 0, max(self.used, t, 64))) for old in (self.k, self.v))
        self.even = self.even and count is None
        first = self.used if self.even else self.length
        if self.even:
            self.k[:, :, first:first + t], self.v[:, :, first:first + t] = k, v
        else:
            at = (first[:, None] + torch.arange(t, device=k.device))[:, None, :, None]
            self.k.scatter_(2, at.expand_as(k), k)
            self.v.scatter_(2, at.expand_as(v), v)
        self.used += t
        self.length = self.length + (t if count is None else count)
        return self.k[:, :, :self.used], self.v[:, :, :self.used], first


def attend(q, k, v, first):
    """Causal attention of new queries over all keys: query i of a row stands at position first + i, and sees up to there.

    q (b, h, t, e)   k, v (b, kv heads, L, e)   first: a number, or (b,) when rows differ   -> (b, h, t, e)
    """
    (b, _, t, _), L = q.shape, k.shape[2]
    even = isinstance(first, int)
    if even and (t == 1 or first == 0):                                      # one query sees all; the first t see a triangle
        return F.scaled_dot_product_attention(q, k, v, is_causal=t > 1, enable_gqa=True)
    out, rows = [], max(1, 2 ** 22 // (b * L))                               # some queries at a time: the mask stays small
    for i in range(0, t, rows):
        n = min(rows, t - i)
        end = first + i + n if even else L
        at = torch.arange(i, i + n, device=q.device) + (first if even else first[:, None, None])     # (n,) or (b, 1, n)
        mask = torch.arange(end, device=q.device) <= at[..., None]           # (n, end) or (b, 1, n, end)
        out.append(F.scaled_dot_product_attention(q[:, :, i:i + n], k[:, :, :end], v[:, :, :end], mask, enable_gqa=True))
    return torch.cat(out, 2)


class Attention(nn.Module):
    """Grouped-query causal attention without positions: many query heads share few key and value heads."""
    def __init__(self, d, heads, kv_heads, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(d, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, d, bias=False)

    def forward(self, u, cache=None, count=None):                            # (b, t, d) -> (b, t, d)
        q, k, v = (proj(u).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)    # (b, h, t, e)  (b, kv heads, t, e) twice
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = attend(q, *((k, v, 0) if cache is None else cache.append(k, v, count)))
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + mixer(norm(x)): one letter of the pattern."""
    def __init__(self, c, letter):
        super().__init__()
        self.norm = nn.RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.remembers = letter in "M*"                                      # the other letters look at one token only
        if letter == "M":
            self.mixer = Mamba2(c.hidden_size, c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size,
                                c.conv_kernel, c.chunk_size, c.layer_norm_epsilon, c.use_conv_bias)
        elif letter == "*":
            self.mixer = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        elif letter == "E":
            self.mixer = LatentMoE(c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size,
                                   c.moe_shared_expert_intermediate_size, c.moe_latent_size, c.routed_scaling_factor,
                                   c.norm_topk_prob)
        else:
            self.mixer = MLP(c.hidden_size, c.intermediate_size)

    def forward(self, x, cache=None, count=None):
        u = self.norm(x)
        return x + (self.mixer(u, cache, count) if self.remembers else self.mixer(u))


class Cache:
    """All a model remembers of the tokens it has read: KV per attention layer, State per Mamba layer, nothing else.

    The model appends to it: `model(ids, cache)` reads any number of tokens, so prefill, chunked prefill, one-token
    decoding and verification are one call. With count (b,), rows are padded on the right and only count of them are real.
    """
    def __init__(self, pattern, batch):
        self.batch, self.layers = batch, [{"M": State, "*": KV}.get(letter, lambda: None)() for letter in pattern]


class Nemotron(nn.Module):
    """The whole model. model(ids) -> logits (b, t, v) in fp32; model.mtp is the multi-token-prediction block, or None."""
    def __init__(self, config, seed=0):
        super().__init__()
        self.config = c = config
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.backbone.layers = nn.ModuleList(Block(c, letter) for letter in c.hybrid_override_pattern)
        self.backbone.norm_f = nn.RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.mtp = MTP(lambda letter: Block(c, letter), c.hidden_size, c.mtp_hybrid_override_pattern, c.num_nextn_predict_layers,
                       c.mtp_num_layers, c.layer_norm_epsilon) if c.num_nextn_predict_layers else None
        if self.lm_head.weight.device.type != "meta":
            init_weights(self, seed)

    def hidden(self, ids, cache=None, count=None):
        """ids (b, t) -> the normalised states (b, t, d) that the head and the MTP block read. Cached calls have no gradient."""
        if cache is not None and len(ids) != cache.batch:
            raise ValueError(f"{len(ids)} rows of tokens for a cache of {cache.batch} rows")
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self.backbone.embeddings(ids)
            for i, block in enumerate(self.backbone.layers):
                x = block(x, cache and cache.layers[i], count)
            return self.backbone.norm_f(x)

    def forward(self, ids, cache=None, count=None):
        return self.logits(self.hidden(ids, cache, count))

    def logits(self, h):
        """(b, t, d) -> (b, t, v), fp32."""
        y = self.lm_head(h)
        return y.to(torch.promote_types(y.dtype, torch.float32))

    def new_cache(self, batch):
        return Cache(self.config.hybrid_override_pattern, batch)


@torch.no_grad()
def init_weights(model, seed=0):
    """Writes every parameter as pre-training did (section 1.6 of the report's code), and zeroes the router's biases.

    N(0, std) for matrices, divided by sqrt(layers) where they write into the residual stream; dt log-uniform in
    [time_step_min, time_step_max]; A uniform in (1, 16). Each tensor has its own generator, seeded by its name, so the
    numbers depend neither on the device nor on which other tensors exist. Works on a model moved from the meta device.
    """
    c = model.config
    for name, p in model.state_dict().items():
        g = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind == "e_score_correction_bias":
            w = torch.zeros(p.shape)
        elif "conv1d" in name:                                               # PyTorch's own default for k taps
            w = torch.empty(p.shape).uniform_(-1, 1, generator=g) * c.conv_kernel ** -.5
        elif kind == "A_log":
            w = torch.empty(p.shape).uniform_(1, 16, generator=g).log()
        elif kind == "dt_bias":
            low, high = math.log(c.time_step_min), math.log(c.time_step_max)
            w = torch.empty(p.shape).uniform_(low, high, generator=g).exp().clamp(min=c.time_step_floor).expm1().log()
        elif p.ndim == 1:                                                    # norms and D
            w = torch.ones(p.shape)
        else:
            into_residual = kind in ("o_proj", "out_proj", "down_proj", "fc2_latent_proj")
            w = torch.randn(p.shape, generator=g)
            w *= c.initializer_range / (math.sqrt(c.num_hidden_layers) if into_residual else 1)
        p.copy_(w)
    for m in model.modules():
        if isinstance(m, LatentMoE):
            m.load.zero_()


def costs(config, context=8192):
    """Rows (what, layers, parameters, active parameters, forward FLOPs per token) and the cache's bytes; no weight is made.

    FLOPs: two per active weight, and what the mixers do besides: attention over a mean of context/2 keys, and the scan.
    """
    c = config
    with torch.device("meta"):
        model = Nemotron(c)
    scan = 2 * c.mamba_num_heads * c.mamba_head_dim * (c.chunk_size + 2 * c.ssm_state_size) + 2 * c.chunk_size * c.n_groups * c.ssm_state_size
    beside = {"M": scan, "*": 4 * c.num_attention_heads * c.head_dim * context / 2}
    def row(what, module, layers=1, extra=0):
        tensors = module.state_dict().items()
        total = sum(p.numel() for _, p in tensors)
        idle = sum(p.numel() for n, p in tensors if ".experts." in "." + n) * (1 - c.num_experts_per_tok / c.n_routed_experts)
        matrices = sum(p.numel() for _, p in tensors if p.ndim > 1) - idle
        return what, layers, layers * total, layers * round(total - idle), layers * (2 * matrices + extra)
    kinds = [(letter, [b for b, x in zip(model.backbone.layers, c.hybrid_override_pattern) if x == letter]) for letter in LETTERS]
    rows = [row(f"{letter} {LETTERS[letter]}", blocks[0], len(blocks), beside.get(letter, 0)) for letter, blocks in kinds if blocks]
    rows += [("embedding", 1, *[model.backbone.embeddings.weight.numel()] * 2, 0), row("final norm", model.backbone.norm_f),
             row("head", model.lm_head)]
    mtp = row("MTP block", model.mtp, 1, sum(beside.get(x, 0) for x in c.mtp_hybrid_override_pattern)) if model.mtp else None
    channels = c.mamba_num_heads * c.mamba_head_dim + 2 * c.n_groups * c.ssm_state_size
    state = 4 * c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size + 2 * (c.conv_kernel - 1) * channels
    cache = dict(kv=c.hybrid_override_pattern.count("*") * 4 * c.num_key_value_heads * c.head_dim,
                 state=c.hybrid_override_pattern.count("M") * state)
    return rows, mtp, cache


def main(argv=None):
    p = argparse.ArgumentParser(description="What a preset is made of and what it costs.", allow_abbrev=False)
    p.add_argument("--preset", default="super", help=", ".join(PRESETS))
    p.add_argument("--context", type=int, default=8192, help="tokens of context, for attention's FLOPs and the cache")
    a = p.parse_args(argv)
    try:
        c = Config.preset(a.preset)
    except ValueError as e:
        p.error(str(e))
    rows, mtp, cache = costs(c, a.context)
    print(f"{a.preset}: {c.num_hidden_layers} layers, one mixer each\n\n  {c.hybrid_override_pattern}\n")
    print(f"{'':14}{'layers':>7}{'parameters':>18}{'active':>17}{'GFLOP/token':>13}   forward, context {a.context:,}")
    show = lambda what, n, total, active, flops: print(f"{what:14}{n:7}{total:18,}{active:17,}{flops / 1e9:13.3f}")
    for r in rows:
        show(*r)
    total, active, flops = (sum(r[i] for r in rows) for i in (2, 3, 4))
    show("total", c.num_hidden_layers, total, active, flops)
    print(f"{'  without the input embedding, which is a lookup':39}{active - rows[-3][2]:17,}")
    if mtp:
        show("+ MTP block", *mtp[1:])
        print(f"{'total with MTP':21}{total + mtp[2]:18,}")
    everything = total + (mtp[2] if mtp else 0)
    print(f"\ncache      {cache['kv']:,} bytes a token (keys and values, bf16) and {cache['state']:,} bytes a sequence "
          f"(S in fp32, conv window in bf16):\n           {(cache['kv'] * a.context + cache['state']) / 1e9:.3f} GB for "
          f"{a.context:,} tokens, {(cache['kv'] * 2**20 + cache['state']) / 1e9:.3f} GB for 1,048,576")
    print(f"inference  {2 * everything / 1e9:,.2f} GB of weights in bf16")
    print(f"training   {16 * everything / 1e9:,.2f} GB for weights, gradients and AdamW's two moments in fp32, before activations;\n"
          f"           {3 * flops / 1e9:,.3f} GFLOP a token, forward and backward, without MTP")


if __name__ == "__main__":
    main()
