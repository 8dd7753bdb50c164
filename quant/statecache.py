"""
The Mamba state in 16 or 8 bits: why rounding to the nearest adds up, and why rounding at random
does not.

A state is read, faded, written to and stored again at every token, so what rounding does to it is
carried on:

    S'_t = a_t S'_{t-1} + u_t + r_t      S'_t - S_t = r_t + a_t r_{t-1} + a_t a_{t-1} r_{t-2} + ...

r is the rounding error. To the nearest it has a bias: an update smaller than half a step is lost,
and lost again next time. At random, up as often as the number is near its upper neighbour, its mean
is 0 and the sum averages out.

    fp16         E5M10, to the nearest or at random: 13 random bits below the last, then cut
    int8, int16  a scale for 128 neighbours, their largest magnitude / 127 or 32,767
    fp8          E4M3 with such a scale, / 448        bf16  to the nearest only

The random bits are Philox': a counter, the element's place; a key, new for each token and layer;
and n rounds of multiplying and mixing. 10 are standard, 5 are deployed, and with 3 neighbours get
the same noise, which the 128 terms of y = S C add up. Arithmetic stays fp32, and a token's own
output is read from the state before it is rounded.

Letters   b batch  h heads  p head dim  n state
Not here  8-bit storage: fp16 and bf16 states are held in 16 bits, the other formats' in fp32
Sources   arXiv:2604.12374 section 4.3; FlashInfer's selective_state_update (13 bits, a word for
          each number); Salmon et al., SC 2011 (Philox)
Departs   fp16 numbers below 2^-14 keep their steps of 2^-24, where older GPUs' emulation flushes
          them to 0
"""

import torch

M0, M1, W0, W1, LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF
TOPS = {"int8": 127, "int16": 32767, "fp8": 448}  # the largest code of each block format
KINDS = ("fp32", "fp16", "bf16", *TOPS)
BITS = 13  # random bits a number
MOST = 32  # Philox rounds; its authors' own choice is 10


def philox(counter, key, rounds=10):
    """Philox4x32: counter (n,) int64, key of 64 bits, an int or an int64 () -> (n, 4) random words,
    int64 below 2^32.
    """
    if not 1 <= rounds <= MOST:
        raise ValueError(f"{rounds} rounds of Philox: 1 to {MOST}")
    c = [counter & LOW, counter >> 32 & LOW, torch.zeros_like(counter), torch.zeros_like(counter)]
    k0, k1 = key & LOW, key >> 32 & LOW
    for _ in range(rounds):
        x, y = c[0] * M0, c[2] * M1  # 64-bit products; int64 wraps as it should
        c = [(y >> 32 & LOW) ^ c[1] ^ k0, y & LOW, (x >> 32 & LOW) ^ c[3] ^ k1, x & LOW]
        k0, k1 = k0 + W0 & LOW, k1 + W1 & LOW
    return torch.stack(c, -1)


def noise(S, key, rounds):
    """A random number below 2^13 for each element of S, by its place and the key alone."""
    words = philox(torch.arange(0, S.numel(), 4, device=S.device), key, rounds).flatten()
    return (words[: S.numel()] & (1 << BITS) - 1).view(S.shape)


def mix(key):
    """An int64 () -> another that looks unrelated: how a counter becomes a key (SplitMix64)."""
    key = (key ^ (key >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    key = (key ^ (key >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return key ^ (key >> 31 & (1 << 33) - 1)


def to_fp16(S, r=None):
    """fp32 -> fp16's numbers, in fp32: to the nearest; or, with r (13 bits each), at random.

    What is beyond fp16 becomes its largest number, 65,504; what is infinite or NaN, NaN.
    """
    S = S + (S - S)  # adds nothing, or NaN: an infinity must not pass for a number
    if r is None:
        return S.clamp(-65504, 65504).half().float()
    if r.shape != S.shape or S.dtype != torch.float32:
        raise ValueError(f"random numbers {tuple(r.shape)} for a state {tuple(S.shape)}, {S.dtype}")
    magnitude = S.abs()
    small = magnitude < 2**-14
    bits = magnitude.view(torch.int32) + r.int()  # carries into the tenth bit as often as it should
    big = (bits & ~0x1FFF).view(torch.float32).clamp(max=65504)
    low = (magnitude * 2**24 + r.float() / 2**BITS).floor() / 2**24  # subnormal: an even grid
    return torch.where(small, low, big).copysign(S)


def to_blocks(S, kind, r=None, block=128):
    """fp32 -> int8's, int16's or E4M3's numbers with a scale for each run of `block` of them, in
    fp32.
    """
    if block < 1 or S.numel() % block:
        raise ValueError(f"a state of {S.numel()} numbers does not divide into blocks of {block}")
    x, top = S.reshape(-1, block), TOPS[kind]
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / top
    y, up = x / scale, None if r is None else r.view_as(x).float() / 2**BITS
    if kind == "fp8" and r is None:
        y = y.to(torch.float8_e4m3fn).float()
    elif kind == "fp8":
        step = torch.exp2(torch.floor(torch.log2(y.abs().clamp(min=2**-6))) - 3)
        y = ((y.abs() / step + up).floor() * step).clamp(max=448).copysign(y)
    else:
        y = (y.round() if r is None else (y + up).floor()).clamp(-top, top)
    return (y * scale).view_as(S)


class Store:
    """mamba.State's `store`: S (fp32) -> S as it will be found at the next token. Store("fp16",
    rounds=5, seed=0)(S).

    rounds None: to the nearest; else Philox rounds. `key` is a tensor, new after each call, so that
    a compiled step carries it on instead of having it built in. dtype: what holds the numbers.
    """

    def __init__(self, kind="fp16", rounds=None, seed=0, layer=0, block=128):
        self.kind, self.rounds, self.block = kind, rounds, block
        if kind not in KINDS:
            raise ValueError(f"a state in {kind!r}: choose {', '.join(KINDS)}")
        if rounds is not None and (not 1 <= rounds <= MOST or kind in ("fp32", "bf16")):
            raise ValueError(
                f"{kind} with {rounds} rounds: fp16, int8, int16 or fp8, and from 1 to {MOST}"
            )
        self.key = torch.tensor((seed << 20) + (layer << 40), dtype=torch.int64)
        self.dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(kind, torch.float32)

    def __call__(self, S):
        if self.kind == "fp32":
            return S
        if self.kind == "bf16":
            return S.bfloat16().float()
        r = None
        if self.rounds is not None:
            key = self.key.to(S.device)
            r, self.key = noise(S, mix(key), self.rounds), key + 1
        return to_fp16(S, r) if self.kind == "fp16" else to_blocks(S, self.kind, r, self.block)


def read(text, seed=0):
    """`fp16`, `fp16:5`, `int8:10`: a format and Philox rounds -> what makes a layer's Store."""
    kind, _, rounds = text.partition(":")
    if kind not in KINDS or rounds and not rounds.isdecimal():
        raise ValueError(
            f"{text!r} is no format of the state: {', '.join(KINDS)}, or with Philox rounds, "
            f"as fp16:5"
        )
    how = dict(kind=kind, rounds=int(rounds) if rounds else None, seed=seed)
    Store(**how)
    return lambda layer: Store(**how, layer=layer)


def drifts(kind, rounds, memories, tokens=8192, size=(8, 128), seed=0):
    """Heads that remember so many tokens, run side by side with their states rounded and not ->
    relative error and bias of S, a pair for each.

    a = exp(-1/memory) and u_t = x B^T / memory with x and B uniform in (0, 1): of one sign, as what
    a head counts up over a long text. Inputs that cancel dither the sum, and nothing drifts. Bias:
    the error along S itself, negative where the state is too small.
    """
    if not all(0 < m < float("inf") for m in memories) or tokens < 1:
        raise ValueError(f"memories {memories} over {tokens} tokens: all above 0")
    g, memory = torch.Generator().manual_seed(seed), torch.tensor(memories)[:, None, None]
    store, a = Store(kind, rounds, seed), (-1 / memory).exp()
    exact = rounded = torch.zeros(len(memories), *size)
    for _ in range(tokens):
        u = torch.rand(size[0], 1, generator=g) * torch.rand(1, size[1], generator=g) / memory
        exact, rounded = a * exact + u, store(a * rounded + u)
    pairs = zip(exact, rounded - exact)
    return [(float(e.norm() / S.norm()), float((e * S).sum() / S.square().sum())) for S, e in pairs]


def drift(kind, rounds, memory, *more, **how):
    """`drifts` of one head."""
    return drifts(kind, rounds, [memory], *more, **how)[0]


def neighbours(rounds, n=1 << 14, block=128, seed=0):
    """Spread of sums of 128 neighbours' noise, relative to that of independent noise: 1 is
    right.
    """
    keys = (mix(torch.tensor(seed + k)) for k in range(16))
    r = torch.cat([noise(torch.empty(n), key, rounds).double().view(-1, block) for key in keys])
    r = (r + 0.5) / 2**BITS - 0.5
    return float(r.sum(1).std() / (block / 12) ** 0.5)


def main():
    """Prints what the file claims: what drifts and what does not, and how many rounds are
    enough.
    """
    torch.set_num_threads(1)  # tensors this small: threads that wait for each other take longer
    torch.manual_seed(0)
    words = philox(torch.zeros(1, dtype=torch.int64), 0)[0].tolist()
    print("Philox4x32-10 of counter 0, key 0:", " ".join(f"{w:08x}" for w in words))
    print("\nspread of a sum of 128 neighbours' noise, 1 if they were independent")
    print("  " + "   ".join(f"{n} rounds {neighbours(n):.2f}" for n in (1, 2, 3, 4, 5, 10)))
    print("\nrelative error (bias) of the state after 2,048 tokens, percent, by memory in tokens")
    memories = 10, 100, 1000, 10000
    print(f"{'':12}" + "".join(f"{m:>20,}" for m in memories))
    for text in ("fp16", "fp16:5", "bf16", "int8", "int8:5", "fp8", "fp8:5"):
        kind, _, rounds = text.partition(":")
        row = drifts(kind, int(rounds) if rounds else None, memories, 2048)
        print(f"{text:12}" + "".join(f"{100 * e:11.3f} ({100 * b:+7.3f})" for e, b in row))
    print("to the nearest, a head of long memory loses what it adds; at random it keeps the mean")


if __name__ == "__main__":
    import command

    command.demo(main, __doc__)
