"""
Sampling: read the prompts once, then one token at a time, each from the cache the last one left.

    prefill     the prompts, `prefill` tokens at a time: memory for activations stays bounded at any length
    decode      logits of the last token -> temperature, top-k, top-p -> one token per row -> one cached step

Rows may have prompts of unequal length: padded on the right, and the model is told how many tokens are real.
Padding is neither written into the Mamba states nor ever attended to: each row gets what it would get alone.

    python sample.py --run runs/toy --prompt "def "                     a run of train.py
    python sample.py --hf DIR --prompt "The capital of France is"       a released checkpoint

Letters   b batch  t time  v vocabulary
Sources   temperature 1.0 and top-p 0.95 are the released model's own defaults for every mode
"""
import argparse
import codecs
import contextlib
import copy
import ctypes
import io
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

import checkpoint
import data
import hf
import mtp
from model import Config, Nemotron, paths


def quicken():
    """Lets glibc keep the memory it has: getting fresh pages for every tensor costs, on a CPU, a tenth of a
    training step and a third of a decoding step. Changes no number; does nothing where there is no glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)                     # M_MMAP_THRESHOLD: below 32 MiB, take it from the heap
        libc.mallopt(-1, 1 << 30)                      # M_TRIM_THRESHOLD: return it only from 1 GiB up


class Step(torch.nn.Module):
    """model(ids, cache) as a function of tensors alone, which is what can be exported."""
    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, copy.deepcopy(cache)

    def forward(self, ids, tensors):
        self.cache.put(tensors)
        return self.model(ids, self.cache), self.cache.tensors()


def compiled(model, tune=True):
    """The decoding step as machine code: `generate(..., step=compiled(model))`. torch.export writes down one step,
    AOTInductor fuses what is small, packs the weights as they are now for the CPU's caches, and has a C++ compiler
    make a library of it. That takes a minute, at the second token; again for every other batch, or room for text.
    tune: most of that minute goes into timing ways to do each matrix product."""
    import torch._inductor as inductor
    from torch._inductor import config, cpp_builder, exc
    if model.lm_head.weight.device.type != "cpu":
        raise ValueError(f"a compiled step is for the CPU, and the model is on {model.lm_head.weight.device.type}")
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as e:
        raise ValueError("a compiled step needs a C++ compiler (g++, or the one that CXX names): there is none") from e
    made = {}
    def step(ids, cache):
        args = ids, cache.tensors()
        shapes = ids.shape, *(x.shape for x in args[1])
        if shapes not in made:
            with (tempfile.TemporaryDirectory() as folder, config.patch(freezing=True, max_autotune=tune),
                  contextlib.redirect_stderr(io.StringIO())):                # it would print every timing
                program = torch.export.export(Step(model, cache), args)
                made[shapes] = inductor.aoti_load_package(inductor.aoti_compile_and_package(
                    program, package_path=f"{folder}/step.pt2")).loader
        logits, *tensors = made[shapes].boxed_run([ids, *args[1]])           # calling the package would, each time,
        cache.put(tensors)                                                   # parse how its arguments are nested
        return logits
    return step


def choose(logits, temperature=0, top_p=1.0, top_k=0, generator=None):
    """One token a row from logits (b, v). temperature 0 is greedy; top_k, top_p as in `probabilities`."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, temperature, top_p, top_k), 1, generator=generator)[:, 0]


def probabilities(logits, temperature=1.0, top_p=1.0, top_k=0):
    """softmax(logits / temperature), cut to the k best, then to the fewest that hold mass top_p.   (b, v)"""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ranked, order = p.sort(descending=True, stable=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)  # the token crossing top_p stays
        p = torch.zeros_like(p).scatter_(-1, order, ranked)
    return p / p.sum(-1, keepdim=True)


def read(model, cache, rows, prefill=1024):
    """Feeds rows (lists of ids, lengths may differ) into an empty cache, `prefill` tokens at a time -> logits
    (b, v) after each row's own last token, and only those: the head runs on b states, not on all of them."""
    return model.logits(read_states(model, cache, rows, prefill))


def read_states(model, cache, rows, prefill=1024, drafts=None):
    """The states (b, d) behind those logits. drafts: the MTP block's cache, which reads along one token behind."""
    device = model.lm_head.weight.device
    length = torch.tensor([len(r) for r in rows])
    padded = torch.zeros(len(rows), int(length.max()), dtype=torch.long)
    for i, r in enumerate(rows):
        padded[i, :len(r)] = torch.as_tensor(r)
    even, last = bool((length == length[0]).all()), None
    for i in range(0, padded.shape[1], prefill):
        ids = padded[:, i:i + prefill].to(device)
        count = (length - i).clamp(0, ids.shape[1]).to(device)
        h = model.hidden(ids, cache, None if even else count)                # (b, t, d)
        if drafts and (told := padded[:, i + 1:i + prefill + 1].to(device)).shape[1]:
            known = (length - 1 - i).clamp(0, told.shape[1]).to(device)      # the last token's next is not
            mtp.follow(model.mtp, drafts, h[:, :told.shape[1]], model.backbone.embeddings(told),
                       None if even else known)
        end = h[torch.arange(len(h), device=device), (count - 1).clamp(min=0)]
        last = end if last is None else torch.where(count[:, None] > 0, end, last)
    return last


def check(model, rows, max_new_tokens, temperature, top_p, top_k, prefill):
    """Raises for what makes no sense."""
    if not rows or min(len(r) for r in rows) == 0:
        raise ValueError("a prompt needs at least one token: start an empty one with the end-of-text token")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 0:
        raise ValueError(f"need temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_new_tokens >= 0, not "
                         f"{temperature}, {top_p}, {top_k} and {max_new_tokens}")
    if prefill < 1:
        raise ValueError(f"prefill={prefill}: at least one token at a time")
    vocab = model.config.vocab_size
    if wrong := [i for r in rows for i in r if not 0 <= i < vocab]:
        raise ValueError(f"token {wrong[0]} is not in the model's vocabulary of {vocab}")

@torch.no_grad()
def stream(model, rows, max_new_tokens, temperature=0, top_p=1.0, top_k=0, seed=None, stop=(), prefill=1024, step=None):
    """Yields one token a row, (b,) ids on the CPU, until every row has stopped or max_new_tokens are out. A
    stopped row goes on repeating its stop token. seed makes the draw reproducible, on one kind of device.
    step: `compiled(model)`, or None."""
    check(model, rows, max_new_tokens, temperature, top_p, top_k, prefill)
    device = model.lm_head.weight.device
    g = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = model.new_cache(len(rows))
    done, stops = None, torch.tensor(sorted(stop), dtype=torch.long)
    for i in range(max_new_tokens):
        if step and i == 1:
            long = max(map(len, rows)) + max_new_tokens - 1
            unit = 1 << max(6, long.bit_length() - 3)                        # few sizes, so few steps to compile
            cache.fix(-(-long // unit) * unit)
        logits = (read(model, cache, rows, prefill) if i == 0 else
                  (step or model)(token[:, None].to(device), cache)[:, -1])
        new = choose(logits, temperature, top_p, top_k, g).cpu()
        token = new if done is None else torch.where(done, token, new)
        yield token
        if stop:
            done = torch.isin(token, stops) if done is None else done | torch.isin(token, stops)
            if bool(done.all()):
                return


@torch.no_grad()
def rounds(model, rows, max_new_tokens, speculate, temperature=0, top_p=1.0, top_k=0, seed=None, stop=(),
           prefill=1024, tally=None, remember=True):
    """Speculative decoding: yields, round by round, what each row got, a list of lists, rows cut after their
    stop token. The text is the one `stream` gives (greedy), or one of its distribution; only sooner.

    speculate: how many tokens the MTP block drafts, 1 ... 7 or more, or "auto". Each round:
    1. draft    the MTP block reads what was accepted, then drafts d tokens                        mtp.draft
    2. verify   one pass of the model over [last token, drafts], on trial            mtp.match or mtp.accept
    3. keep     the cache forgets the drafts that fell; rows may keep different numbers           Cache.keep
    remember=False drafts without a cache. With auto, a seed does not fix the text: d follows the clock.
    """
    check(model, rows, max_new_tokens, temperature, top_p, top_k, prefill)
    if model.mtp is None:
        raise ValueError(f"speculate={speculate}: this model has no MTP block to draft with")
    if speculate != "auto" and not (isinstance(speculate, int) and speculate >= 1):
        raise ValueError(f"speculate={speculate!r}: a number of drafts, at least 1, or 'auto'")
    device, embed, head = model.lm_head.weight.device, model.backbone.embeddings, model.logits
    g = None if seed is None else torch.Generator(device).manual_seed(seed)
    tally = tally or mtp.Tally(7 if speculate == "auto" else speculate)
    cache, drafting = model.new_cache(len(rows)), model.new_draft_cache(len(rows)) if remember else None
    def spread(logits):                                                      # (b, t, v) -> (b, t, v)
        return probabilities(logits.flatten(0, 1), temperature, top_p, top_k).view_as(logits)
    def pick(logits):
        if temperature == 0:
            return logits.argmax(-1), None
        q = probabilities(logits, temperature, top_p, top_k)
        return torch.multinomial(q, 1, generator=g)[:, 0], q
    left, done = [max_new_tokens] * len(rows), [max_new_tokens == 0] * len(rows)
    def take(row, tokens):                                                   # what of them the row still wants
        tokens = tokens[:0 if done[row] else left[row]]
        end = next((i + 1 for i, t in enumerate(tokens) if t in stop), None)
        left[row] -= len(tokens[:end])
        done[row] = done[row] or end is not None or left[row] == 0
        return tokens[:end]
    if all(done):
        return
    h = read_states(model, cache, rows, prefill, drafting)[:, None]          # (b, 1, d)
    token, _ = pick(head(h)[:, -1])
    told, count = token[:, None], None
    yield [take(i, [t]) for i, t in enumerate(token.tolist())]
    while not all(done):
        start, d = time.perf_counter(), tally.choose() if speculate == "auto" else speculate
        end = torch.full_like(token, told.shape[1]) if count is None else count
        if drafting:
            x = mtp.follow(model.mtp, drafting, h, embed(told), count)
        else:
            at = torch.arange(len(h), device=device), (end - 1).clamp(min=0)
            x = model.mtp(h[at][:, None], embed(told[at][:, None]))
        drafts, q = mtp.draft(model.mtp, x, d, embed, head, pick, drafting)
        cache.trial()
        h = model.hidden(torch.cat([token[:, None], drafts], 1), cache)      # (b, d+1, d)
        logits = head(h)
        n, token = (mtp.match(drafts, logits.argmax(-1)) if temperature == 0 else
                    mtp.accept(drafts, q, spread(logits), g))
        over = torch.tensor(done, device=device)
        count = torch.where(over, 0, n + 1)                                  # a finished row stands still
        cache.keep(count, d + 1)
        most, standing = int(count.max()), n.tolist()
        told = torch.cat([drafts, token[:, None]], 1).scatter(1, n[:, None], token[:, None])[:, :most]
        h, kept, count = h[:, :most], count, None if bool((count == most).all()) else count
        tally.note(d, [m for m, o in zip(standing, done) if not o], time.perf_counter() - start)
        yield [take(i, r[:m]) for i, (r, m) in enumerate(zip(told.tolist(), kept.tolist()))]


def generate(model, ids, max_new_tokens, temperature=0, top_p=1.0, top_k=0, speculate=0, seed=None, stop=(),
             prefill=1024, step=None, **how):
    """Prompts and what follows them. ids: a tensor (b, t), answered with one (b, t + new); or lists of
    unequal length, answered with lists, cut after their stop token. speculate: see `rounds`; step: `compiled`."""
    rows = ids.tolist() if torch.is_tensor(ids) else [list(r) for r in ids]
    args = temperature, top_p, top_k, seed, stop, prefill
    if speculate and step:
        raise ValueError(f"speculate={speculate}: only plain decoding has a compiled step")
    if speculate:
        for some in rounds(model, [list(r) for r in rows], max_new_tokens, speculate, *args, **how):
            for row, new in zip(rows, some):
                row.extend(new)
        if torch.is_tensor(ids):
            long = max(map(len, rows))
            return torch.tensor([r + r[-1:] * (long - len(r)) for r in rows]).to(ids.device)
        return rows
    new = list(stream(model, rows, max_new_tokens, *args, step))
    if torch.is_tensor(ids):
        return torch.cat([ids.cpu(), *(t[:, None] for t in new)], 1).to(ids.device)
    for i, row in enumerate(rows):
        for t in new:
            row.append(int(t[i]))
            if row[-1] in stop:
                break
    return rows


def load_run(path, device="cpu"):
    """A run folder or one checkpoint file -> the model in eval mode, its tokenizer, the step."""
    saved = checkpoint.read(path)
    model = Nemotron(Config(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model.to(device).eval(), data.unpack(saved["tokenizer"]), saved["step"]


def spell(enc, token):
    """The bytes of one id; one the model has and the tokenizer has not becomes the replacement character."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


class Printer:
    """Prints tokens as they come, holding back bytes that do not yet make a whole character."""
    def __init__(self, enc):
        self.enc, self.utf8 = enc, codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token=None):
        """The next token; without one, the end: what is still held back is shown as a replacement character."""
        raw = b"" if token is None else spell(self.enc, token)
        print(self.utf8.decode(raw, final=token is None), end="", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(usage="sample.py [--flag value ...]; -h lists the flags",
                                description="Sample from a run of train.py or from a released checkpoint.",
                                allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--run", default="runs/toy", help="a run folder, or one checkpoint file in it")
    add("--hf", default="", help="a released folder (config.json, *.safetensors, tokenizer.json)")
    add("--prompt", action="append", help="what to go on from; several make a batch (default: 'def ')")
    add("--prompt-file", default="", help="read one prompt from this text file")
    add("--max-new-tokens", type=int, default=200, help="tokens to produce")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-p", type=float, default=0.95, help="keep the fewest tokens that hold this much probability")
    add("--top-k", type=int, default=0, help="keep the k most likely tokens; 0 keeps all")
    add("--seed", type=int, default=None, help="the same seed gives the same text")
    add("--stop", action="append", default=[], help="stop at this text, one token; end-of-text always stops")
    add("--prefill", type=int, default=1024, help="prompt tokens read at a time: bounds the memory")
    add("--prompt-tokens", type=int, default=0, help="repeat the prompt up to this many tokens")
    add("--speculate", default="0", help="tokens the MTP block drafts a round; auto: what pays; 0: none")
    add("--compile", action="store_true", help="plain decoding on a CPU through torch.compile; needs a C++ compiler")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights loaded with --hf")
    add("--fast", action="store_true", help="Triton kernels (kernels/); needs a CUDA GPU")
    a = p.parse_args(argv)
    quicken()
    try:
        if a.device not in ("cpu", "cuda", "mps"):
            raise ValueError(f"--device {a.device!r}: choose cpu, cuda or mps")
        if a.hf:
            model, enc = hf.load(a.hf, dtype=getattr(torch, a.dtype), device=a.device), data.tokenizer(a.hf)
        else:
            model, enc, _ = load_run(a.run, a.device)
        lines = paths(model, a.fast)
        if a.fast:
            print(*lines, sep="\n")
        prompts = [Path(a.prompt_file).read_text(encoding="utf-8")] if a.prompt_file else a.prompt or ["def "]
        ends = enc.special_tokens_set & {"<|endoftext|>", "</s>", "<|im_end|>"}
        end = [enc.encode_single_token(s) for s in ends]
        for s in a.stop:
            ids = enc.encode_ordinary(s)
            if len(ids) != 1:
                raise ValueError(f"--stop {s!r} is {len(ids)} tokens in this vocabulary, it must be one")
            end += ids
        rows = [enc.encode_ordinary(s) or end[:1] for s in prompts]
        if a.prompt_tokens:
            rows = [(r * (a.prompt_tokens // len(r) + 1))[:a.prompt_tokens] for r in rows]
        show, start, first, n = Printer(enc), time.perf_counter(), None, 0
        new = [[] for _ in rows]
        if len(rows) == 1 and not a.prompt_tokens:
            print(prompts[0], end="", flush=True)
        how = a.temperature, a.top_p, a.top_k, a.seed, end, a.prefill
        if a.speculate != "auto" and not a.speculate.isdecimal():
            raise ValueError(f"--speculate {a.speculate!r}: a number of drafts, or auto")
        if a.compile and a.speculate != "0":
            raise ValueError(f"--compile with --speculate {a.speculate}: only plain decoding has a compiled step")
        step = compiled(model) if a.compile else None
        d, tally = a.speculate if a.speculate == "auto" else int(a.speculate), mtp.Tally(7)
        if d:
            tally = mtp.Tally(7 if d == "auto" else d)
            pieces = rounds(model, rows, a.max_new_tokens, d, *how, tally=tally)
        else:
            pieces = ([[t] for t in token.tolist()] for token in stream(model, rows, a.max_new_tokens, *how, step))
        begin = 2 if step else 1                                             # the second token waits for the compiler
        for some in pieces:
            n += max(map(len, some))
            first = time.perf_counter() - start if first is None and n >= begin else first
            for row, tokens in zip(new, some):
                for t in tokens:
                    if not (row and row[-1] in end):
                        row.append(t)
                        if len(rows) == 1 and t not in end:
                            show(t)
        show()
        took = time.perf_counter() - start - (first or 0)
    except (ValueError, OSError, ImportError) as e:
        p.error(str(e))
    print()
    if len(rows) > 1:
        for prompt, row in zip(prompts, new):
            text = b"".join(spell(enc, t) for t in row if t not in end)
            print(f"--- {prompt!r}\n{prompt}{text.decode('utf-8', 'replace')}")
    if tally.rounds:
        begun = time.perf_counter()                                          # the same again, one at a time
        again = sum(1 for _ in stream(model, rows, max(map(len, new)), *how[:-2], (), how[-1])) if n > 1 else 0
        plain = (time.perf_counter() - begun - first) / max(1, again - 1)
        print(f"[mean accepted length {tally.tokens / tally.rounds:.2f}; of the drafts reached stood "
              + ", ".join(f"{k}: {s / r:.2f}" for k, (r, s) in enumerate(zip(tally.reached, tally.stood)) if k and r)
              + f"; {plain * (max(map(len, new)) - 1) / took:.2f} times as fast as plain decoding]", file=sys.stderr)
    if n > begin:
        print(f"[{sum(map(len, rows)):,} prompt tokens{' and the compiler' * bool(step)} in {first:.2f} s; "
              f"{len(rows) * (n - begin) / took:,.0f} tokens/s after]", file=sys.stderr)


if __name__ == "__main__":
    main()
