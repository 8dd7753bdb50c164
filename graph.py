"""
A decoding step as one call: what Python would start operation by operation, anew for every token,
is written down once.

A token of a small model is hundreds of operations of a few microseconds each, and starting one
costs as much. On CUDA they are recorded as a graph, a list of kernels with their addresses, and
replayed. So everything must lie where it lay, and nothing may depend on what the host would read:
the cache has its full length from the start (KV.fix), where a row writes is a tensor, and the step
ends by copying the new states over the old ones. On a CPU a step becomes a library of machine code.

    step = captured(model)                                   on CUDA
    step = compiled(model)                                   on a CPU
    sample.generate(model, [[1, 2, 3]], 100, step=step)

A round of drafting, verifying and keeping is recorded alike (`drafted`): always d + 1 tokens, and a
tensor says how many of them count.

Not here  what a step is: decode.py; a round: speculate.py
Sources   torch.cuda.graph's own notes: a few steps on a side stream first, so that libraries have
          made what they make once; torch.export and AOTInductor
"""

import contextlib
import copy
import io
import sys
import tempfile

import torch

import latent_moe

WARM = 2  # steps before the one that is recorded


# 1. On CUDA


class Recorded:
    """What `run` does to tensors of fixed shapes: run(tensors) -> an answer, and what the tensors
    are after it. Its own tensors, its graph, its answer.
    """

    def __init__(self, run, tensors):
        self.held = [x.clone() for x in tensors]
        kept = [x.clone() for x in self.held]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self.once(run)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.answer = self.once(run)
        self.take(kept)

    def once(self, run):
        answer, after = run(self.held)
        self.take(after)
        return answer

    def take(self, tensors):
        for mine, x in zip(self.held, tensors):
            if mine is not x:
                mine.copy_(x)

    def __call__(self, tensors):
        """The answer; afterwards `held` is what the tensors are."""
        self.take(tensors)
        self.graph.replay()
        return self.answer


def on_cuda(model, what):
    device = model.lm_head.weight.device
    if device.type != "cuda":
        raise ValueError(f"a captured {what} is for CUDA, and the model is on {device.type}")


def recordable(model, tokens):
    """ValueError where so many tokens at once would make the host wait, which no graph records."""
    for moe in latent_moe.layers(model):
        if moe.experts.waits(tokens, moe.top_k):
            kind = str(moe.experts.up_proj.dtype).removeprefix("torch.")
            raise ValueError(
                f"{tokens} tokens at once in {kind} cannot be captured: their experts' rows go "
                f"through a loop that waits for the GPU; take fewer rows or drafts, or bf16"
            )


def captured(model):
    """`generate(..., step=captured(model))`: recorded at the second token, and again for every
    other batch, or room for text. ValueError for a model that is not on CUDA.
    """
    on_cuda(model, "step")
    made = {}

    def step(ids, cache):
        def run(held):
            cache.put(held[1:])
            logits = model(held[0], cache)
            after = cache.tensors()
            cache.put(held[1:])
            return logits, [held[0], *after]

        tensors = [ids, *cache.tensors()]
        shapes = tuple(x.shape for x in tensors)
        if shapes not in made:
            recordable(model, ids.numel())
            made[shapes] = Recorded(run, tensors)
        logits = made[shapes](tensors)
        cache.put(made[shapes].held[1:])
        return logits

    return step


def drafted(model, one_round):
    """speculate.one_round as one launch: `generate(..., speculate=3, turn=drafted(model,
    one_round))`. Greedily: a graph draws from no generator of ours. ValueError for a model that is
    not on CUDA.
    """
    on_cuda(model, "round")
    made = {}

    def turn(model, cache, drafting, now, d, how, over):
        if not how.greedy:
            raise ValueError("a captured round chooses greedily: temperature 0")
        last, size = list(drafting.last), len(now)
        ends = len(cache.tensors()), len(cache.tensors()) + len(drafting.tensors())

        def put(held):
            cache.put(held[: ends[0]])
            drafting.put(held[ends[0] : ends[1]])
            drafting.last.update(zip(last, held[ends[1] :]))
            return type(now)(*held[-1 - size : -1])

        def tensors(now, over):
            memory = *cache.tensors(), *drafting.tensors(), *(drafting.last[k] for k in last)
            return [*memory, *now, over]

        def run(held):
            after, said = one_round(model, cache, drafting, put(held), d, how, held[-1])
            found = tensors(after, held[-1])
            put(held)
            return said, found

        before = tensors(now, over)
        key = d, *(x.shape for x in before)
        if key not in made:
            recordable(model, len(now.token) * (d + 1))
            made[key] = Recorded(run, before)
        said = made[key](before)
        return put(made[key].held), said

    return turn


# 2. On a CPU


class Step(torch.nn.Module):
    """model(ids, cache) as a function of tensors alone, which is what can be exported."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, copy.deepcopy(cache)

    def forward(self, ids, tensors):
        self.cache.put(tensors)
        return self.model(ids, self.cache), self.cache.tensors()


def compiled(model, tune=True):
    """`generate(..., step=compiled(model))`: machine code for a CPU. torch.export writes down one
    step, AOTInductor fuses what is small, packs the weights as they are now for the CPU's caches,
    and has a C++ compiler make a library of it. That takes a minute, at the second token; again for
    every other batch, or room for text. tune: most of that minute goes into timing ways to do each
    matrix product.
    """
    import torch._inductor as inductor
    from torch._inductor import config, cpp_builder, exc

    if model.lm_head.weight.device.type != "cpu":
        raise ValueError(
            f"a compiled step is for the CPU, and the model is on "
            f"{model.lm_head.weight.device.type}"
        )
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as e:
        raise ValueError(
            "a compiled step needs a C++ compiler (g++, or the one that CXX names): there is none"
        ) from e
    made = {}

    def step(ids, cache):
        args = ids, cache.tensors()
        shapes = ids.shape, *(x.shape for x in args[1])
        if shapes not in made:
            print("compiling a step for this shape: a minute or more ...", file=sys.stderr)
            with (
                tempfile.TemporaryDirectory() as folder,
                config.patch(freezing=True, max_autotune=tune),
                contextlib.redirect_stderr(io.StringIO()),  # it would print every timing
            ):
                program = torch.export.export(Step(model, cache), args)
                made[shapes] = inductor.aoti_load_package(
                    inductor.aoti_compile_and_package(program, package_path=f"{folder}/step.pt2")
                ).loader
        # calling the package would, each time, parse how its arguments are nested
        logits, *tensors = made[shapes].boxed_run([ids, *args[1]])
        cache.put(tensors)
        return logits

    return step


if __name__ == "__main__":
    import command

    command.part("python sample.py --run runs/toy --prompt 'def ' --compile")
