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
import ctypes
import platform
import sys
import time
from pathlib import Path

import torch

import checkpoint
import data
import hf
from model import Config, Nemotron, paths


def quicken():
    """Lets glibc keep the memory it has: getting fresh pages for every tensor costs, on a CPU, a tenth of a
    training step and a third of a decoding step. Changes no number; does nothing where there is no glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)                     # M_MMAP_THRESHOLD: below 32 MiB, take it from the heap
        libc.mallopt(-1, 1 << 30)                      # M_TRIM_THRESHOLD: return it only from 1 GiB up


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
        end = h[torch.arange(len(h), device=device), (count - 1).clamp(min=0)]
        last = end if last is None else torch.where(count[:, None] > 0, end, last)
    return model.logits(last)


@torch.no_grad()
def stream(model, rows, max_new_tokens, temperature=0, top_p=1.0, top_k=0, seed=None, stop=(), prefill=1024):
    """Yields one token a row, (b,) ids on the CPU, until every row has stopped or max_new_tokens are out. A
    stopped row goes on repeating its stop token. seed makes the draw reproducible, on one kind of device."""
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
    device = model.lm_head.weight.device
    g = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = model.new_cache(len(rows))
    done, stops = None, torch.tensor(sorted(stop), dtype=torch.long)
    for i in range(max_new_tokens):
        logits = (read(model, cache, rows, prefill) if i == 0 else
                  model(token[:, None].to(device), cache)[:, -1])
        new = choose(logits, temperature, top_p, top_k, g).cpu()
        token = new if done is None else torch.where(done, token, new)
        yield token
        done = torch.isin(token, stops) if done is None else done | torch.isin(token, stops)
        if bool(done.all()):
            return


def generate(model, ids, max_new_tokens, temperature=0, top_p=1.0, top_k=0, speculate=0, seed=None, stop=(),
             prefill=1024):
    """Prompts and what follows them. ids: a tensor (b, t), answered with one (b, t + new); or lists of
    unequal length, answered with lists, cut after their stop token."""
    if speculate:
        raise ValueError(f"speculate={speculate}: drafting with the MTP block is not built yet, "
                         "only its training loss is")
    rows = ids.tolist() if torch.is_tensor(ids) else [list(r) for r in ids]
    new = list(stream(model, rows, max_new_tokens, temperature, top_p, top_k, seed, stop, prefill))
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
        for token in stream(model, rows, a.max_new_tokens, *how):
            first, n = first or time.perf_counter() - start, n + 1
            for row, t in zip(new, token.tolist()):
                if not (row and row[-1] in end):
                    row.append(t)
            if len(rows) == 1 and int(token) not in end:
                show(int(token))
        show()
    except (ValueError, OSError, ImportError) as e:
        p.error(str(e))
    print()
    if len(rows) > 1:
        for prompt, row in zip(prompts, new):
            text = b"".join(spell(enc, t) for t in row if t not in end)
            print(f"--- {prompt!r}\n{prompt}{text.decode('utf-8', 'replace')}")
    took = time.perf_counter() - start - (first or 0)
    if n > 1:
        print(f"[{sum(map(len, rows)):,} prompt tokens in {first:.2f} s; "
              f"{len(rows) * (n - 1) / took:,.0f} tokens/s after]", file=sys.stderr)


if __name__ == "__main__":
    main()
