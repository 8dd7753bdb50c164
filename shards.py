"""
Checkpoints of a model over many ranks: every rank writes its part, and any number of ranks reads them.

    runs/<name>/ckpt/step-00000050/run.pt          step, settings, tokenizer, random state
                                  /__0_0.distcp    rank 0's part of the weights and of AdamW's moments
                                  /.metadata       which numbers are where: written last, so it is the commit

The parts are copied, and written while training goes on. So a folder with a
.metadata is meant to be whole, and one without is never read. Between two numbers of ranks nothing needs converting:
a parameter is named, and a piece of it has its place in the whole one.

    torchrun --nproc-per-node 4 shards.py --release RUN/ckpt/step-00000050 DIR     as released: hf.py reads it
    torchrun --nproc-per-node 4 shards.py --adopt DIR RUN/ckpt/step-00000000       and back, without moments

Not here  training; checkpoints of one process: checkpoint.py
Sources   torch.distributed.checkpoint; the released layout: hf.py
"""
import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Shard

import checkpoint
import hf
import parallel
from model import Config

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)   # moments by parameter name, whatever the groups


def whole(folder):
    """Every finished checkpoint of a run, oldest first."""
    return sorted(p.parent for p in (Path(folder) / "ckpt").glob("step-*/.metadata"))


def newest(folder, step=0):
    """The newest finished checkpoint of a run, or that of `step`; None if there is none yet."""
    done = {int(p.name.split("-")[1]): p for p in whole(folder)}
    if step and step not in done:
        raise ValueError(f"{folder} has no whole checkpoint of step {step}; there are {sorted(done) or '(none)'}")
    if not done and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):    # a restart starts from the start
        raise ValueError(f"{folder} holds no whole sharded checkpoint (ckpt/step-*/.metadata)")
    return done[step or max(done)] if done else None


class Writer:
    """Writes one checkpoint at a time, while training goes on."""
    def __init__(self, world):
        self.world, self.writing = world, None
        self.group = dist.new_group(backend="gloo")          # its messages must not mix with training's

    def save(self, folder, step, model, opt, extra, keep=0):
        """Copies this rank's parts and returns. The checkpoint before is whole by then."""
        self.finish()
        path = folder / "ckpt" / f"step-{step:08d}"
        if self.world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)          # what a killed process left of it
            for old in whole(folder)[:-keep] if keep else []:
                (old / ".metadata").unlink()                 # first: a half removed one must not look whole
                shutil.rmtree(old)
            path.mkdir(parents=True)
            checkpoint.store(path / "run.pt", extra)
        dist.barrier()
        weights, moments = get_state_dict(model, opt, options=FLAT)
        self.writing = dcp.async_save(dict(model=weights, optim=moments), checkpoint_id=path,
                                      process_group=self.group)

    def finish(self):
        """Waits for what is being written."""
        if self.writing:
            self.writing.result()
            self.writing = None
            dist.barrier()


def load(path, model, opt):
    """Reads this rank's part of a checkpoint into model and optimiser."""
    weights, moments = get_state_dict(model, opt, options=FLAT)
    dcp.load(dict(model=weights, optim=moments), checkpoint_id=path)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=moments, options=FLAT)


def views(world, model):
    """{released name: my part of it}. An expert is a tensor there and a row of a stack here, so: views of it."""
    found, rank = {}, world.experts["ep"].get_local_rank()
    for name, p in model.state_dict().items():
        layer, stacked, proj = name.partition(".experts.")
        for j, v in enumerate(p.to_local()) if stacked else ():
            v = DTensor.from_local(v, world.experts["edp"], [Shard(0)], run_check=False)
            found[f"{layer}.experts.{rank * len(p.to_local()) + j}.{proj}.weight"] = v
        found |= {} if stacked else {name: p}
    return found


def adopt(world, dir, **how):
    """A released checkpoint as a sharded model: every rank reads its part and no more."""
    config, tensors = hf.survey(dir)
    hf.skeleton(config, tensors)                             # all tensors there, each of the right shape
    model = world.model(config, **how)
    dcp.load(views(world, model), storage_reader=dcp.HuggingFaceStorageReader(str(dir)))
    return model


def release(world, model, dir, shard_bytes=5e9):
    """Writes a sharded model as released: files of about shard_bytes, joined from the parts of all ranks."""
    files, filled = {}, 0
    for name, shape in hf.census(model.config).items():
        files[name] = 1 + int(filled // shard_bytes)
        filled += 4 * torch.Size(shape).numel()
    writer = dcp.HuggingFaceStorageWriter(str(dir), fqn_to_index_mapping=files, save_distributed=True,
                                          enable_consolidation=True)
    dcp.save(views(world, model), storage_writer=writer)
    if world.rank == 0:
        (Path(dir) / "config.json").write_text(json.dumps(model.config.to_hf(), indent=1))
    dist.barrier()


def main():
    p = argparse.ArgumentParser(description="Sharded checkpoints to the released layout and back.", allow_abbrev=False)
    p.add_argument("--release", action="store_true", help="from a sharded checkpoint to a released folder")
    p.add_argument("--adopt", action="store_true", help="from a released folder to a sharded checkpoint")
    p.add_argument("--ep", type=int, default=1, help="ranks that share the experts")
    p.add_argument("source", type=Path)
    p.add_argument("target", type=Path)
    a = p.parse_args()
    if a.release == a.adopt:
        p.error("choose one of --release and --adopt")
    world = parallel.start(a.ep)
    if a.adopt:
        model = adopt(world, a.source)
        dcp.save(dict(model=model.state_dict()), checkpoint_id=a.target)
        if world.rank == 0:
            checkpoint.store(a.target / "run.pt", dict(config=asdict(model.config)))
    else:
        model = world.model(Config(**checkpoint.read(a.source / "run.pt")["config"]))
        dcp.load(dict(model=model.state_dict()), checkpoint_id=a.source)
        release(world, model, a.target)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
