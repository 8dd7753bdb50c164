"""
Packing: many documents in one row, none of which sees another.

Conversations differ in length, and padding them to the longest wastes half of the work. So put them
end to end, and make everything that looks back stop at a document's first token, and everything
that looks ahead at its last:

    attention   document by document          L_1^2 + L_2^2 + ... scores, not (L_1 + L_2 + ...)^2
    conv        zeros before every document: documents move k-1 places apart, and back afterwards
    recurrence  a document's first token fades the state by 2^-64 and writes what it always writes:
                    dt' = dt + 64 / (|A| log2 e)     x' = x dt / dt'     so that x' dt' = x dt
    losses, MTP the target that lies behind a document's last token does not count, at any depth

Experts, norms and the head look at one token. No kernel changes, and no cached call.

    tokens  A A A A B B B C C C C C . .      "." padding: a document of its own, in no loss
    number  0 0 0 0 1 1 1 2 2 2 2 2 3 3
    first   1 . . . 1 . . 1 . . . . 1        of the t tokens that are read; the last one of a row
    last    . . . 1 . . 1 . . . . 1 .        is only ever a target

Letters   b rows  t time  h heads  p head dim  w convolved channels  k taps
Not here  what a document is (chat.py, data.py) and how its loss is weighed (sft.py)
Sources   packing as in Megatron-LM's THD layout, whose kernels take the documents' edges; the reset
          by a large dt is ours
Departs   2^-64 of a state is left over, which neither fp32 nor fp64 notices beside a new one
"""

import torch

import data

BITS = 64  # by how many powers of two a state fades at an edge
LN2 = 0.6931471805599453


class Docs:
    """Where documents begin and end in rows of tokens.

    number (b, t+1): which document each token belongs to, 0 0 0 1 1 2 ... in every row, as many as
    train.losses takes: what is read are the first t, and the last one tells whether they go on.
    device: where they are wanted, if number is on the CPU: no GPU is waited for to count them.
    """

    def __init__(self, number, device=None):
        edge = number[:, 1:] != number[:, :-1]
        if not torch.equal(number[:, 1:] - number[:, :-1], edge.to(number.dtype)):
            raise ValueError("documents of a row are numbered 0 0 0 1 1 2 ..., without a gap")
        start = torch.ones_like(edge[:, :1])
        self.number, self.last = number[:, :-1] - number[:, :1], edge  # (b, t)
        self.first = torch.cat([start, edge[:, :-1]], 1)
        at = self.first.flatten().nonzero().flatten().tolist() + [edge.numel()]
        self.lengths = [b - a for a, b in zip(at, at[1:])]  # of all rows, one behind another
        self.edges = int(self.number.max())  # of the row that has the most
        if device:
            there = (data.send(x, device) for x in (self.number, self.last, self.first))
            self.number, self.last, self.first = there

    def fits(self, x):
        """ValueError unless x (b, t, ...) has these rows of tokens."""
        if x.shape[:2] != self.last.shape:
            raise ValueError(f"{tuple(x.shape)} for documents in {tuple(self.last.shape)} tokens")

    def end(self, x):
        """x (b, t, ...) with 0 at every document's last token, whose next is another document's."""
        self.fits(x)
        return x.masked_fill(self.last.view(*x.shape[:2], *[1] * (x.ndim - 2)), 0)

    def restart(self, x, dt, A):
        """x (b, t, h, p), dt (b, t, h) and A (h,) of the recurrence -> x', dt', with which it
        forgets before every document, and writes the same.
        """
        self.fits(x)
        self.fits(dt)
        far = dt + self.first[..., None] * (-BITS * LN2 / A)
        return x * (dt / far)[..., None].to(x.dtype), far

    def apart(self, x, k):
        """x (b, t, w) with k-1 zeros between documents -> (b, longer, w), and the way back."""
        self.fits(x)
        if k < 1:
            raise ValueError(f"{k} taps: at least 1")
        at = torch.arange(x.shape[1], device=x.device) + (k - 1) * self.number  # (b, t)
        at = at[..., None].expand_as(x)
        length = x.shape[1] + (k - 1) * self.edges
        wide = x.new_zeros(x.shape[0], length, x.shape[2]).scatter(1, at, x)
        return wide, lambda y: y.gather(1, at)


def pack(documents, length):
    """Which documents share a row of `length` tokens: [[i, ...], ...]. First fit, the longest
    first; none is cut, and one that is too long is refused (ValueError).
    """
    rows, room = [], []
    for i in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
        n = len(documents[i])
        if not n <= length:
            raise ValueError(f"conversation {i} has {n} tokens, more than a row of {length}")
        row = next((r for r, left in enumerate(room) if left >= n), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(i)
        room[row] -= n
    return rows


def lay(rows, length, *columns):
    """Columns, each a list of per-token numbers for every document, laid out as `rows` says and
    padded with zeros -> number (b, length), then each column (b, length)."""

    for n, row in enumerate(rows):
        tokens = [sum(len(column[i]) for i in row) for column in columns]
        if tokens != tokens[:1] * len(columns) or tokens[0] > length:
            raise ValueError(f"row {n} of {length} tokens: its columns have {tokens}")

    def laid(flat, padding):
        return torch.tensor([f + [pad] * (length - len(f)) for f, pad in zip(flat, padding)])

    number = laid(
        [[n for n, i in enumerate(row) for _ in columns[0][i]] for row in rows], map(len, rows)
    )
    return number, *(
        laid([[v for i in row for v in column[i]] for row in rows], [0] * len(rows))
        for column in columns
    )


def main():
    """Prints the point: packed or alone, the same logits; what packing saves."""
    import random

    import mtp
    from config import Config
    from model import Nemotron

    c = Config(
        hybrid_override_pattern="MEM*EM*E",
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=4,
        ssm_state_size=4,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_latent_size=16,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=32,
        initializer_range=0.3,
    )
    model, draw = Nemotron(c).double(), random.Random(0)
    documents = [[draw.randrange(64) for _ in range(draw.randint(2, 40))] for _ in range(40)]
    rows = pack(documents, 48)
    number, ids = lay(rows, 48, documents)
    docs = Docs(number)
    with torch.no_grad():
        together, leaking = (model.logits(model.hidden(ids[:, :-1], docs=d)) for d in (docs, None))
        worst = 0.0
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                n = len(documents[i]) - 1  # the last token is read only where the row goes on
                alone = model(torch.tensor([documents[i][:n]]))[0]
                worst = max(worst, float((alone - together[r, at : at + n]).abs().max()))
                at += n + 1
    longest, total = max(map(len, documents)), sum(map(len, documents))
    print(f"{len(documents)} documents of 2 to {longest} tokens in {len(rows)} rows of 48")
    print(f"  real tokens among those read   {total / (48 * len(rows)):.0%} packed")
    print(f"                                 {total / (longest * len(documents)):.0%} padded alike")
    print(f"  logits, packed against alone   {worst:.1e} in fp64")
    print(f"  the same without boundaries    {float((leaking - together).abs().max()):.1f}")
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    print(f"  targets that cross an edge     {int((mask & ~docs.end(mask)).sum())}, masked")
    print(f"  and at depth 1                 {int((~mtp.roll(docs.end(mask), docs)).sum())}")


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
