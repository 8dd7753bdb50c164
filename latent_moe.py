"""
LatentMoE: a mixture of experts in a narrow copy of the residual stream, so that more cost no more.

A mixture of experts answers each token with k of its E small networks. In a small batch the
bottleneck is reading those experts' weights from memory, in a large one it is sending tokens to the
machines that hold them; both costs are proportional to the width of what an expert reads. So shrink
it, d -> l, and spend the factor d/l on d/l times as many experts, d/l times as many a token:

    s = sigmoid(W_r u)                      E scores, fp32, from the full-width token
    T = the k largest of s + bias           bias balances the load: it chooses ...
    p = scale * s_T / sum(s_T)              ... but it never weighs
    c = W_1 u                               d -> l, once
    r = sum over e in T of  p_e W_down,e relu(W_up,e c)^2
    y = W_2 r + V_down relu(V_up u)^2       l -> d, once, after the sum; V: the shared expert, wide

Two forces keep the experts equally busy. After every optimiser step the bias of an overloaded
expert sinks by a fixed rate and that of an idle one rises (update_bias; no gradient, so the loss
does not notice). A faint loss per sequence keeps single sequences from collapsing onto a few
experts (`balance`, weight 1e-4).

The experts may stand in groups (of neighbours, one group a machine): a token then chooses its
groups first, and its experts only in them (`choose`). The released models have one group.

Letters   b batch  t time  d model width  m = b*t tokens  E experts  k experts a token
          l latent width  f an expert's hidden width
          u (m, d) what the layer reads, normalised by its block; y (m, d) what it adds
          MaxVio: how far the busiest expert's load is above the mean, in means; 0 is balanced
Super     E=512 k=22 d=4096 l=1024 f=2688, shared hidden 5376, scale 5
          40 such layers: 95 % of all parameters
Not here  ranks: `exchange` is where tokens may leave for other machines
          quantised experts: they replace `mm`
Sources   arXiv:2601.18089 (latent), 2604.12374 sections 2.1 and 2.4
          arXiv:2412.19437 section 2.1.2 (bias)
Departs   from the release only in storage: experts are stacked (E, out, in); hf.py splits and
          joins them
"""

import torch
import torch.nn.functional as F
from torch import nn

FEW = 32  # tokens, up to which Experts.meet_all may pay


def grouped_mm(x, w, count):
    """Row block e of x times w[e].T.

    x (m, in), sorted by expert   w (E, out, in)   count (E,) rows of each   -> (m, out)
    """
    w = w.to(x.dtype)
    if count.shape != w.shape[:1]:
        raise ValueError(f"count {tuple(count.shape)} of {len(w)} experts")
    if x.device.type == "cpu":  # a GPU would have to be waited for
        torch._assert_async(count.sum() == len(x), f"count does not add up to {len(x)} rows")
    if torch_can(x, w):  # one call instead of E
        return F.grouped_mm(x, w.mT, offs=count.cumsum(0).int())
    if x.is_cuda and len(x) <= len(w):  # few rows, each beside a copy of its matrix: nobody waits
        mine = torch.arange(len(w), device=x.device)
        mine = mine.repeat_interleave(count, output_size=len(x))
        return (w[mine] @ x[..., None]).squeeze(-1)
    return torch.cat([F.linear(rows, we) for rows, we in zip(x.split(count.tolist()), w)])


def torch_can(x, w):
    """Whether F.grouped_mm takes these: rows of a multiple of 16 bytes; bf16, or fp32 on a CPU."""
    aligned = all(n * x.element_size() % 16 == 0 for n in w.shape[1:])
    fp32 = x.dtype == torch.float32 and x.device.type == "cpu"
    return aligned and (fp32 or x.dtype == torch.bfloat16)


def relu2(x):
    """relu(x)^2. A product, not a power: autocast on CUDA makes powers fp32, and what follows."""
    x = x.relu()
    return x * x


def tokens_each(pick, experts):
    """How many slots of pick each expert got -> (experts,). Not bincount, for which the host waits
    on a GPU: it asks how large its answer is.
    """
    pick = pick.flatten()
    return pick.new_zeros(experts).scatter_add_(0, pick, torch.ones_like(pick))


class MLP(nn.Module):
    """down(relu(up(x))^2): the network of shared experts and `-` layers.   (..., d) -> (..., d)"""

    def __init__(self, d, hidden, bias=False):
        super().__init__()
        self.up_proj = nn.Linear(d, hidden, bias)
        self.down_proj = nn.Linear(hidden, d, bias)

    def forward(self, x):
        return self.down_proj(relu2(self.up_proj(x)))


class Router(nn.Module):
    """The matrix of the scores, and the bias that only chooses (a buffer: it gets no gradient)."""

    def __init__(self, d, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, d) * d**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))

    def forward(self, u):  # (m, d) -> (m, E)
        with torch.autocast(u.device.type, enabled=False):  # bf16 would round near-ties
            wide = torch.promote_types(u.dtype, torch.float32)
            return F.linear(u.to(wide), self.weight.to(wide)).sigmoid()


def choose(score, k, groups=1, kept=1):
    """The k best experts of each token, if there are groups only out of the `kept` best of them.

    A group is worth what its two best experts are worth together.   score (..., E) -> (..., k)
    Source: transformers' DeepSeek-V3 router. The paper (2412.19437 section 2.1.2) and Megatron sum
    the k / kept best instead: the same at two experts a kept group.
    """
    most = kept * (score.shape[-1] // groups)
    if not 1 <= k <= most:
        raise ValueError(f"k={k} of {most} experts")
    if groups > 1:
        parts = score.unflatten(-1, (groups, -1))  # (..., g, E/g)
        best = parts.topk(2).values.sum(-1).topk(kept).indices  # (..., kept)
        closed = torch.ones_like(parts[..., 0], dtype=torch.bool).scatter(-1, best, False)
        score = parts.masked_fill(closed[..., None], -torch.inf).flatten(-2)
    return score.topk(k).indices


class Experts(nn.Module):
    """All experts of a layer in two stacked matrices; each token goes through its k.

    c (m, l)   pick (m, k), the experts of each token   gate (m, k), their weights   -> (m, l)
    """

    def __init__(self, experts, width, hidden):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(experts, hidden, width) * width**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.mm = grouped_mm  # seam: quant/lowbit.py
        self.exchange = None  # seam: scale/parallel.py, `meet` on the ranks that have the experts
        self.fast = False

    def forward(self, c, pick, gate):
        if pick.shape != gate.shape or len(pick) != len(c):
            raise ValueError(
                f"{len(c)} tokens, pick {tuple(pick.shape)}, gate {tuple(gate.shape)}: "
                "a row a token, (m, k) both"
            )
        if self.fast and not getattr(self.mm, "fast", self.mm is grouped_mm):
            raise ValueError("experts with fast=True have no place for an mm without a kernel")
        fast = self.fast and self.mm is grouped_mm and not self.exchange
        if fast:
            from kernels.experts import experts

            return experts(c, pick, gate, self.up_proj, self.down_proj)
        if torch.is_autocast_enabled(c.device.type):  # as a Linear does of itself
            c = c.to(torch.get_autocast_dtype(c.device.type))
        plain = self.mm is grouped_mm and not self.exchange and not torch.is_grad_enabled()
        if plain and self.want_all(pick):
            return self.meet_all(c, pick, gate)
        (m, k), E = pick.shape, len(self.up_proj)
        order = pick.flatten().argsort(stable=True)  # (m*k,)   slots, by expert
        count = tokens_each(pick, E)  # (E,)
        w = self.up_proj, self.down_proj
        meet = self.exchange or (lambda c, token, n: self.meet(c.index_select(0, token), n, *w))
        out = meet(c, order // k, count)  # (m*k, l)   each slot's token
        at = torch.arange(m * k, device=c.device)
        slot = torch.empty_like(order).scatter_(0, order, at)  # order, inverted
        out = out.index_select(0, slot).view(m, k, -1)  # (m, k, l)   by token again
        weighed = out * gate.to(c.dtype)[..., None]  # no batch of matmuls: on a CPU twice as slow
        return weighed.sum(1, dtype=c.dtype)  # (m, l)

    def meet(self, rows, count, up, down):
        """Rows (n, l) by expert, count (E,) of each, through their experts' matrices -> (n, l)."""
        fast = self.fast and self.mm is grouped_mm and len(rows)
        if fast:  # a row is a token of one expert
            from kernels.experts import experts

            expert = torch.arange(len(up), device=rows.device)
            expert = expert.repeat_interleave(count, output_size=len(rows))[:, None]
            return experts(rows, expert, torch.ones_like(expert, dtype=torch.float32), up, down)
        hid = relu2(self.mm(rows, up, count))  # (n, f)
        return self.mm(hid, down, count)

    def want_all(self, pick):
        """Whether the tokens are few, but together want about as many experts as there are. While
        a step is exported too: how many rows an expert gets is not known then."""
        m, k = pick.shape
        return torch.compiler.is_exporting() or m <= FEW and m * k >= len(self.up_proj)

    def waits(self, m, k):
        """Whether m tokens of k experts each, without a gradient, go through grouped_mm's loop, for
        which a GPU is waited for.
        """
        E, few = len(self.up_proj), m <= FEW and m * k >= len(self.up_proj)
        plain = self.mm is grouped_mm and not (self.fast or few)
        return plain and m * k > E and not torch_can(self.up_proj, self.up_proj)

    def meet_all(self, c, pick, gate):
        """The same for few tokens, which together want most experts anyway.

        Then the price is reading the weights, and all tokens may as well meet all experts: a gate
        of 0 switches off those that a token did not choose. 0 times infinity is NaN: an expert that
        overflows spoils all of these tokens, not only those that chose it.
        """
        E, up, down = len(self.up_proj), self.up_proj.to(c.dtype), self.down_proj.to(c.dtype)
        switch = gate.new_zeros(len(c), E).scatter(1, pick, gate)  # (m, E)
        hid = relu2(F.linear(c, up.flatten(0, 1)))  # (m, E*f)
        hid = hid.unflatten(1, (E, -1)).transpose(0, 1)  # (E, m, f)
        return torch.einsum("eml,me->ml", hid @ down.mT, switch.to(c.dtype))


class LatentMoE(nn.Module):
    """Router, latent projections, routed experts, shared expert.

    latent=None: the experts work at full width. bias: of every matrix but the router's and the
    routed experts'. ValueError for sizes that leave a token without its top_k experts.

    While training it keeps two notes for the optimiser step: `load` (E,), tokens each expert got
    since the last update_bias, and `balance`, the sequence balance loss summed over sequences
    (None in evaluation).
    """

    def __init__(
        self,
        d,
        experts,
        top_k,
        hidden,
        shared_hidden,
        latent=None,
        scale=1.0,
        norm_topk_prob=True,
        groups=1,
        kept=1,
        bias=False,
    ):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top-{top_k} of {experts} experts: choose between 1 and {experts}")
        if latent is not None and latent < 1:
            raise ValueError(f"latent={latent}: at least 1, or None for experts at full width")
        each = experts // groups if groups > 0 else 0
        equal = each * groups == experts and 1 <= kept <= groups and (groups == 1 or each > 1)
        if not equal or top_k > kept * each:
            raise ValueError(
                f"top-{top_k} out of the {kept} best of {groups} groups of {experts} experts: "
                "the groups must be equal, of two experts at least, and the kept ones hold top_k"
            )
        if norm_topk_prob and top_k == 1:
            raise ValueError(
                "top-1 with normalised weights is always 1, and its router gets no gradient: "
                "use top_k >= 2"
            )
        self.top_k, self.scale, self.norm_topk_prob = top_k, scale, norm_topk_prob
        self.groups = groups, kept
        self.gate = Router(d, experts)
        self.fc1_latent_proj = nn.Linear(d, latent, bias) if latent else nn.Identity()
        self.experts = Experts(experts, latent or d, hidden)
        self.fc2_latent_proj = nn.Linear(latent, d, bias) if latent else nn.Identity()
        self.shared_experts = MLP(d, shared_hidden, bias)
        self.register_buffer("load", torch.zeros(experts, dtype=torch.long), persistent=False)
        self.balance = None
        self.whole_sequence = None  # seam: scale/parallel.py

    def forward(self, u):  # (b, t, d) -> (b, t, d)
        return self.mix(u, *self.route(u))

    def route(self, u):
        """Each token's k experts and their weights: pick, gate (m, k). Training, it notes them."""
        score = self.gate(u.flatten(0, 1))  # (m, E)
        biased = score.detach() + self.gate.e_score_correction_bias
        pick = choose(biased, self.top_k, *self.groups)
        gate = score.gather(1, pick)
        if self.norm_topk_prob:
            gate = gate / (gate.sum(1, keepdim=True) + 1e-20)
        if self.training and torch.is_grad_enabled():
            self.load += tokens_each(pick, len(self.load))
            score = score.view(*u.shape[:2], -1)  # (b, t, E)
            balance = sequence_balance(score, self.top_k, self.whole_sequence, *self.groups)
            self.balance = balance if self.balance is None else self.balance + balance
        return pick, self.scale * gate

    def mix(self, u, pick, gate):
        """Squeeze d -> l, run the chosen experts, sum, expand l -> d; add the shared expert's."""
        c = self.fc1_latent_proj(u.flatten(0, 1))  # (m, l)
        r = self.experts(c, pick, gate)  # (m, l)
        return self.fc2_latent_proj(r).view_as(u) + self.shared_experts(u)


def sequence_balance(score, k, whole_sequence=None, groups=1, kept=1):
    """E/(k t^2) sum_e (sum_t share_te) count_e, summed over sequences.   score (b, t, E) -> scalar

    Each sequence gives 1 when balanced, E/k at worst. share is the score over the sum of all E
    scores; count is the top-k of the scores without the bias, so that the two balancing forces do
    not answer each other. Of slices it gives their part: whole_sequence(count, t) then makes of a
    slice's count and length those of the whole sequences.
    """
    b, t, E = score.shape
    share = (score / score.sum(-1, keepdim=True).clamp(min=1e-20)).sum(1)  # (b, E)
    pick = choose(score.detach(), k, groups, kept).flatten(1)  # (b, t*k)
    count = torch.zeros_like(share).scatter_add_(1, pick, torch.ones_like(pick, dtype=share.dtype))
    if whole_sequence:
        count, t = whole_sequence(count, t)
    return E / (k * t * t) * (share * count).sum()


def layers(model):
    """Every LatentMoE in the model, the MTP block's among them."""
    return [m for m in model.modules() if isinstance(m, LatentMoE)]


def take_balance(model):
    """The balance loss noted since the last call, summed over layers and sequences, or 0."""
    notes = [m.balance for m in layers(model) if m.balance is not None]
    for m in layers(model):
        m.balance = None
    return sum(notes) if notes else 0


@torch.no_grad()
def update_bias(model, rate=1e-3):
    """Once per optimiser step: b_e += rate * sign(mean load - load_e), of all since the last call.

    Returns a row (MaxVio, idle experts) per layer, (layers, 2): how far the busiest expert is above
    the mean (0 is perfect, E/k - 1 the worst), and how many experts got nothing. Then it forgets
    the load. The rows stay on the device: who wants the numbers waits for them, not every step.
    """
    if not 0 <= rate < float("inf"):
        raise ValueError(f"rate={rate}: from 0 on, and finite")
    rows = [torch.zeros(0, 2)]
    for moe in layers(model):
        load, total, bias = moe.load, moe.load.sum(), moe.gate.e_score_correction_bias
        bias += rate * (total - len(load) * load).sign().to(bias.dtype)  # in integers: exact
        most = load.max() * len(load) / total.clamp(min=1) - 1
        rows.append(torch.stack([most, (load == 0).sum().to(most.dtype)])[None])
        moe.load.zero_()
    return torch.cat(rows[1:] or rows)


def layer_cost(E, k, l, d=4096, f=2688):
    """Parameters, multiply-adds a token, numbers sent a token; the shared expert is left out."""
    expert = 2 * l * f
    always = E * d + (2 * d * l if l < d else 0)  # the router; the projections into the latent
    return E * expert + always, k * expert + always, k * l


def main():
    """Prints what the file claims: the latent pays for experts; the bias evens out a bad router."""
    torch.set_num_threads(1)  # these sizes gain nothing from more, and a busy machine loses much
    print("one layer of experts, their router and their latent projections, d=4096, f=2688")
    print(f"{'':37}{'parameters':>13}{'multiply-adds/token':>22}{'numbers sent/token':>21}")
    for name, E, k, l in (
        ("standard        128 experts, top-6 ", 128, 6, 4096),
        ("latent l=1024   128 experts, top-6 ", 128, 6, 1024),
        ("latent l=1024   512 experts, top-22", 512, 22, 1024),
    ):
        parameters, work, sent = layer_cost(E, k, l)
        print(f"  {name}{parameters / 1e9:11.2f} G{work / 1e6:20.1f} M{sent / 1e3:19.1f} k")

    print("\n32 experts, top-4, 64 sequences of 64 tokens a step, frozen random weights with four")
    print("loud experts. MaxVio: how far the busiest expert is above the mean, in means")
    loads = {}
    for rate in (0, 1e-2):
        torch.manual_seed(0)
        moe = LatentMoE(d=32, experts=32, top_k=4, hidden=16, shared_hidden=32, latent=8, scale=2.5)
        with torch.no_grad():
            moe.gate.weight[:4, 0] += 1.5  # a constant pushes four up
        for step in range(60):
            u = torch.randn(64, 64, 32)
            u[..., 0] = 1
            moe(u)
            loads[rate] = moe.load.clone()
            vio, idle = update_bias(moe, rate)[0].tolist()
            if step in (0, 19, 59):
                note = f"MaxVio {vio:5.2f}   idle experts {idle:.0f}"
                print(f"  bias rate {rate:<5g} step {step + 1:2}   {note}")
    for rate, load in loads.items():
        bars = "".join(" .:-=+*#%@"[min(9, int(5 * n / load.double().mean()))] for n in load)
        print(f"  load at the end, bias rate {rate:<5g} {bars}")
    print("  (one character an expert; '+' is the mean, '@' twice the mean or more)")


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
