"""
What one rank of many holds, sends and computes in a training step: by arithmetic that fits on a blackboard.

With P parameters on a rank, t tokens, v words and width d, memory is shortest where the backward pass begins:
nothing has been let go of yet; or where it ends: all gradients are there.

    peak = max(12 P + kept + loss,  12 P + kept + words + work,  16 P + words + work)   bytes
                                                            (without MTP the larger of words and work is enough)
           with several pieces to a step (--micro) always 16 P: the gradients of the first are there

    12 P     the parameters and AdamW's two moments in fp32; the gradients make it 16 P
    kept     what the gradients of all layers need (`keeps`); with recompute only their inputs, 4 d t each
    loss     log-softmax at every depth and two gradients of it, 4 v t each; with recompute of 1024 tokens only
    words    the embedding gathered, and its gradient: 8 v d
    work     the layer at work: what it keeps, if it had not, and its widest gradients; with W parameters
             gathered at once 2 W of them and 2 W of gradient; and the one gradient that is being summed over
             the ranks in fp32, 4 W or that of the head, 4 v d

This is for bf16 products, fp32 weights and residual stream, the readable code (fused kernels keep less), and
balanced routing. dryrun.py follows a real step instead, tensor by tensor; tests/test_budget.py compares.

    python budget.py                         which numbers of ranks fit which cards; --preset, --length
    python train.py --preset super --dry-run --quick --world 64 --ep 8 --recompute --batch 64

Letters   d width  v words  e inner width of Mamba, or of all heads  w convolved channels  h heads  n state
          q chunk  E experts  k chosen  l latent  f expert hidden
Not here  fragmentation and NCCL's buffers, some GB; of tensors and messages, what is small beside these
Sources   our own code, read with a pencil
"""
import argparse
from dataclasses import dataclass

from config import PRESETS, Config

MACHINE = 8                                                  # ranks that NVLink joins; beyond them is the network


def sizes(c, letter):
    """Of a layer: parameters of its experts, of its other matrices, and the rest."""
    d, e, gn = c.hidden_size, c.mamba_num_heads * c.mamba_head_dim, c.n_groups * c.ssm_state_size
    w, h, l = e + 2 * gn, c.mamba_num_heads, c.moe_latent_size or c.hidden_size
    if letter == "M":
        return 0, d * (e + w + h) + e * d, w * (c.conv_kernel + c.use_conv_bias) + 3 * h + e + d
    if letter == "*":
        return 0, 2 * d * c.head_dim * (c.num_attention_heads + c.num_key_value_heads), d
    if letter == "E":
        shared, latent = 2 * d * c.moe_shared_expert_intermediate_size, 2 * d * l if c.moe_latent_size else 0
        return c.n_routed_experts * 2 * l * c.moe_intermediate_size, shared + latent, c.n_routed_experts * d + d
    return 0, 2 * d * c.intermediate_size, d


def keeps(c, letter):
    """Bytes a token that a layer keeps for its gradient, and those of the widest gradients it makes at once.

    Each begins with the layer's input and the normalised one in fp32, and what the matrices read in bf16.
    """
    d, e, q, n = c.hidden_size, c.mamba_num_heads * c.mamba_head_dim, c.chunk_size, c.ssm_state_size
    w, h, k = e + 2 * c.n_groups * n, c.mamba_num_heads, c.num_experts_per_tok
    if letter == "M":
        scan = 6 * h * q + 4 * h * n + 6 * e * n // q + 2 * e                # the mask, B and C faded, S, dt x
        return 10 * d + 6 * w + scan + 22 * e, 8 * h * q + 4 * d             # convolution, scan, gated norm
    if letter == "*":
        e, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        return 14 * d + 4 * e + 4 * kv, 4 * d + 4 * e                        # q, k, v each cast their input
    if letter == "E":
        l, f = c.moe_latent_size or d, c.moe_intermediate_size
        rows = 4 * k * (f + l) + 48 * k                                      # relu, its square; in and out; indices
        shared = 4 * c.moe_shared_expert_intermediate_size
        return 16 * d + rows + shared + 4 * c.n_routed_experts + 2 * l, 2 * k * f
    return 10 * d + 4 * c.intermediate_size, 4 * d + 6 * c.intermediate_size


def reckon(run, c):
    """What a dry run of Run `run` and Config c returns, and the parts of the peak, from sizes alone."""
    d, v, k, heads = c.hidden_size, c.vocab_size, c.num_experts_per_tok, c.num_attention_heads * c.head_dim
    e, gn, n = c.mamba_num_heads * c.mamba_head_dim, c.n_groups * c.ssm_state_size, c.ssm_state_size
    blocks, cp, shifts = c.num_nextn_predict_layers, run.cp, (run.cp - 1).bit_length() + (run.cp > 1)
    depths = c.mtp_num_layers if blocks else 0
    rows = min(run.micro or run.batch, run.batch * cp // run.world)          # sequences at once, and how often
    t, times = rows * run.length // cp, run.batch * cp // (run.world * rows)
    stack, more = c.hybrid_override_pattern, c.mtp_hybrid_override_pattern
    stored, used = stack + more * blocks, stack + more * depths              # the MTP block is used at each depth

    # 1. Parameters: every rank has the same share of everything.
    extra = 2 * d * d                                                        # eh_proj
    P = (sum(sum(sizes(c, x)) for x in stored) + 2 * v * d + d + (extra + 3 * d) * blocks) / run.world

    # 2. The peak. When the first of the MTP's depths is done, its states are let go of: 30 d a token.
    kept = t * sum(4 * d if run.recompute else keeps(c, x)[0] + 8 * e * (cp > 1 and x == "M") for x in used)
    loss = t * 30 * d * depths + (12 * v * min(t, 1024) if run.recompute else 4 * v * t * (depths + 3))
    def work(x):
        experts, matrices, _ = sizes(c, x)
        keep, widest = keeps(c, x)
        late = 16 * e * (cp > 1 and x == "M")                                # what slices add for those before them
        W = max(experts / run.ep, matrices / 2)                              # experts at once, else a matrix
        return t * (widest + late + keep * run.recompute) + 4 * W + max(4 * W, 4 * v * d)
    words, busy = 8 * v * d, max(map(work, set(used)))
    begin = max(loss, t * 30 * d * max(0, depths - 1) + (words if depths else 0) + busy)
    peak = max((12 if times == 1 else 16) * P + kept + begin, 16 * P + (words + busy if depths else max(words, busy)))

    # 3. What is sent: matrices gathered forwards and backwards, in bf16, their gradients summed in fp32; tokens
    #    to their experts and back, queries to a mirror rank and back, S to the right.
    whole = lambda layers: sum(sizes(c, x)[0] / run.ep * (run.world > run.ep) + sizes(c, x)[1] for x in layers)
    kv = used.count("*") * 4 * c.num_key_value_heads * c.head_dim * t * cp * (cp > 1)
    gather = 4 * (whole(used) + v * d * (depths + 1) + extra * depths) + 4 * v * d * (depths + 2)
    gather += kv * (1 + run.recompute)
    reduce = 4 * (whole(stored) + 2 * v * d + extra * blocks) + kv
    there = {"E": 4 * k * (c.moe_latent_size or d) * t, "*": 2 * heads * t * (cp > 1),
             "M": 4 * e * n * rows * shifts}
    swaps = [(there.get(x, 0) * (3 if run.recompute else 2), run.ep if x == "E" else cp) for x in used]
    far = sum(n for n, ranks in swaps if ranks > MACHINE)                    # what no machine has all the ranks for

    # 4. Two FLOPs a parameter and token forwards, twice that backwards; attention makes its scores once more.
    again = 4 if run.recompute else 3
    mixes = {"*": (2 + 1 / again) * heads * run.length, "M": 2 * e * (c.chunk_size + 2 * n) + 2 * c.chunk_size * gn,
             "E": 2 * c.n_routed_experts * d}
    flops = 2 * (v * d * (depths + 1) + extra * depths) + sum(
        2 * (sizes(c, x)[0] * k / c.n_routed_experts + sizes(c, x)[1]) + mixes.get(x, 0) for x in used)
    return dict(parameters=round(P), states=12 * P, peak=peak, flops=t * flops * again * times,
                gather=gather * times, reduce=reduce * times, far=far * times,
                **{"all-to-all": sum(n for n, _ in swaps) * times},
                parts=dict(parameters=4 * P, moments=8 * P, gradients=4 * P, kept=kept, loss=loss, words=words,
                           work=busy))


@dataclass
class Plan:
    """The part of train.Run that counts here."""
    world: int
    ep: int
    length: int
    recompute: bool
    cp: int = 1
    micro: int = 1

    @property
    def batch(self):
        return self.world // self.cp


def main(argv=None):
    """Prints the table: the peak of a rank by the number of ranks, with and without recompute, and where it fits."""
    p = argparse.ArgumentParser(description="Which numbers of ranks fit which cards.", allow_abbrev=False)
    p.add_argument("--preset", default="super", help=", ".join(PRESETS))
    p.add_argument("--length", type=int, default=8192, help="tokens of the one sequence that a rank has at a time")
    a = p.parse_args(argv)
    try:
        c = Config.preset(a.preset)
    except ValueError as e:
        p.error(str(e))
    print(f"{a.preset}, {a.length:,} tokens on each rank: GB at the peak, and the cards that hold it with 5 % left\n")
    print(f"{'ranks':>6}{'ep':>5}{'parameters a rank':>20}{'everything kept':>24}{'recompute':>20}")
    for world in (8, 16, 32, 64, 128, 256, 512):
        for ep in sorted({8, min(64, world)}):
            seen = [reckon(Plan(world, ep, a.length, again), c) for again in (False, True)]
            fits = lambda peak: ", ".join(f"{g}" for g in (80, 180) if peak < .95e9 * g) or "-"
            cells = [f"{x['peak'] / 1e9:.1f}{fits(x['peak']):>9}" for x in seen]
            print(f"{world:6}{ep:5}{seen[0]['parameters']:20,}{cells[0]:>24}{cells[1]:>20}")


if __name__ == "__main__":
    main()
