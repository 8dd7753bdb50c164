"""
Capture: a step's forward pass, gradient and clipping on CUDA as one launch.

A step of a small model is two thousand kernels of a few microseconds each, and starting one costs
the host as much. All shapes of a step are fixed: experts' rows are sorted, and how many each of
them has is a tensor. So the step is recorded at the first batch, by graph.py, and replayed for
every other one. The optimiser's few launches stay outside, where the learning rate is a number.

Refused, because a graph would repeat what is the host's to say: rows of several documents, four
bits (their random bytes begin with a number), many ranks, a batch of changing length; and experts
whose rows go through a loop that waits for the GPU.

Not here  the recording itself, a decoding step, a round of drafts: graph.py
Sources   torch.cuda.graph's own notes
"""

import torch

import latent_moe
from graph import Recorded


def chosen(gradient, model, run, world, say):
    """train.gradient, or with --capture what records it and replays it."""
    if not run.capture:
        return gradient
    refuse(model, run, world)
    return captured(gradient, say)


def refuse(model, run, world):
    """ValueError for a run whose step cannot be recorded."""
    device = world.device
    if device.type != "cuda" or world.sharded:
        raise ValueError(f"--capture is for one process on CUDA, and this one is on {device.type}")
    if run.documents or world.recipe:
        what = "--documents" if run.documents else f"--precision {run.precision}"
        raise ValueError(f"--capture with {what}: a recorded step would repeat the first one's")
    name, kind = torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0]
    with world.cast():
        cast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if cast else torch.float32
    # F.grouped_mm's own kernel; elsewhere torch loops
    grouped = dtype == torch.bfloat16 and kind in (9, 10)
    if latent_moe.layers(model) and not (run.fast or grouped):
        raise ValueError(
            f"--capture: experts' products in {str(dtype)[6:]} wait for a {name}; --fast, which "
            "takes bf16 and fp32, does not"
        )


def captured(gradient, say):
    """train.gradient, recorded once for each shape of a batch. Its answer is the caller's."""
    made = {}

    def replayed(model, batch, run, world):
        params = [p for p in model.parameters() if p.requires_grad]
        if any(x is not None for piece in batch.pieces for x in piece[2:]):
            raise ValueError("--capture: rows of several documents have another shape every step")
        tensors = [x for ids, mask, *_ in batch.pieces for x in (ids, mask)]
        key = tuple(batch.counts), *(x.shape for x in tensors)

        def once(held):
            for p in params:
                p.grad = None
            pieces = [(*pair, None, None) for pair in zip(held[::2], held[1::2])]
            return gradient(model, batch._replace(pieces=pieces), run, world), held

        if key not in made:
            loads = [m.load for m in latent_moe.layers(model)]
            before = [x.clone() for x in loads]
            graph = Recorded(once, tensors)
            for mine, x in zip(loads, before):
                mine.copy_(x)
            made[key] = graph, [p.grad for p in params]
            say("captured   a step's gradient as one CUDA graph")
        graph, grads = made[key]
        seen = graph(tensors).clone()
        for p, g in zip(params, grads):
            p.grad = g  # the optimiser lets go of it, the graph writes there again
        return seen

    return replayed
