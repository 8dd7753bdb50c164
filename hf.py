"""
The released checkpoint, both ways: loading is putting each tensor where it belongs, saving is the
same table written out.

    load(dir)         for every tensor in the files: places[name].copy_(tensor), and no place may
                      stay empty (places: census.py)
    save(model, dir)  from each place into a file, under its released name
    Parts(dir)        one module at a time, for models larger than the memory

There may be memory for one copy of the model, so there are never two: load reads the files into an
empty one, save writes from where the numbers are. Beside it there is one tensor, or one shard if
save changes the dtype.

Not here  which names there are, and whether a folder fits its config: census.py; what quantised
          matrices are made of: quant/packed.py; files that are only mapped: quant/ondisk.py
Sources   the released checkpoint; safetensors
Departs   1. A_log, D, dt_bias and the router stay fp32; of these the release stores only the
          router's bias so
          2. config.json says at how many depths MTP was trained (mtp_num_layers); without it, two
          as in Super
"""

import json
import re
import tempfile
from collections import Counter
from copy import deepcopy as copy_of
from dataclasses import dataclass
from pathlib import Path

import command

import torch

import bounds
import census
import checkpoint
from bounds import LONGEST, knob
from model import Config, Nemotron
from post import release
from quant import ondisk, packed

# 1. Loading

SMALL = (".A_log", ".D", ".dt_bias", ".gate.weight", ".gate.e_score_correction_bias")


def precision(name, t, dtype):
    """The dtype in which a tensor of a model in `dtype` is kept: what decides little but exactly in
    fp32, codes and scales as they are.
    """
    if census.scales(name) or t.dtype in (torch.uint8, torch.float8_e4m3fn):
        return t.dtype
    return torch.promote_types(dtype, torch.float32) if name.endswith(SMALL) else dtype


@torch.no_grad()
def load(dir, dtype=torch.float32, device="cpu", lazy=False):
    """The model in a directory, in eval mode. Every tensor there is used exactly once, or this
    raises.

    Quantised matrices stay packed, in their own dtypes. lazy: of those nothing is read; they are
    views of the files, and what no token asks for is never read. On a CPU only.
    """
    if lazy and torch.device(device).type != "cpu":
        raise ValueError(f"lazy weights are views of files, which {device} cannot see: use the CPU")
    config, tensors, plan, kv = census.survey(dir)
    if plan or kv:
        command.float8(device, f"{dir} is quantised")
    model = census.skeleton(config, tensors, plan, kv)
    if lazy:
        if not plan:
            raise ValueError(
                f"{dir} is not quantised: lazy leaves packed matrices on disk, no others"
            )
        packed.empty(model)
    for name, t in model.state_dict(keep_vars=True).items():
        t.data = t.data.to(precision(name, t, dtype))
    if torch.device(device).type == "cpu":  # of lazy weights only those that are not packed
        size = sum(t.numel() * t.itemsize for t in model.state_dict().values())
        command.fits(size, f"{dir}: its weights in {str(dtype).split('.')[1]}")
    model.to_empty(device=device)  # the only copy there will be
    for b in model.buffers():
        b.zero_()  # the experts' load is in no file
    (view if lazy else copy)(model, Path(dir), tensors)
    return model.eval()


def ends(dir):
    """The ids that end a text, as config.json and generation_config.json name them."""
    said = command.document(Path(dir) / "config.json")
    found, size = [], said.get("vocab_size", bounds.ENDLESS)
    for name in ("config.json", "generation_config.json"):
        path = Path(dir) / name
        ids = command.document(path).get("eos_token_id") if path.exists() else None
        ids = [] if ids is None else ids
        for i in ids if isinstance(ids, list) else [ids]:
            if type(i) is not int or not 0 <= i < size:
                raise ValueError(
                    f"{path}: eos_token_id {bounds.brief(ids)} holds {i!r}, no id of {size}"
                )
            found.append(i)
    return sorted(set(found))


def numbers(dir, tensors):
    """(name, tensor) of the files, one after the other. ValueError at the first whose numbers are
    not all finite.
    """
    last, seen = None, 0
    for file, name, _, _ in tensors:
        if file != last or seen > 2**25:
            # A file is a memory map: opening it again lets go of what has been read.
            f, last, seen = census.opened(dir / file), file, 0
        tensor = f.get_tensor(name)
        yield name, checkpoint.finite({name: tensor}, dir / file)[name]
        seen += tensor.nbytes


def copy(model, dir, tensors):
    """Puts every tensor of the files into its place."""
    place = model.state_dict() | census.places(model)
    for name, tensor in numbers(dir, tensors):
        place[census.ours(name)].copy_(tensor)


def view(model, dir, tensors):
    """Puts what is not quantised into its place, and gives packed modules views of the files. Their
    numbers are not looked at, but for the scales of whole tensors.
    """
    place, last = model.state_dict() | census.places(model), None
    for file, name, _, _ in tensors:
        if file != last:
            maps, last = census.opened(dir / file, ondisk.views), file
        n = census.ours(name)
        one = {name: maps[name]}
        if n in place:
            ondisk.fetch(one)
        if n in place or maps[name].numel() == 1:
            checkpoint.finite(one, dir / file)
        if n in place:
            place[n].copy_(maps[name])
        else:
            packed.put(model, n, maps[name])


class Parts:
    """A checkpoint that is not quantised, one module at a time: for models larger than the memory.

    Tensors are read, not mapped, so that no more than the module asked for takes address space.
    """

    def __init__(self, dir):
        self.dir = Path(dir)
        found = census.survey(dir)
        self.config, self.blank = found.config, census.skeleton(*found)
        packed.refuse(self.blank, f"{dir}, one module at a time")
        self.at = {}
        for file in {file for file, *_ in found.tensors}:
            table, begin = ondisk.header(self.dir / file)
            for name, h in table.items():
                self.at[census.ours(name)] = self.dir / file, h, begin

    def tensor(self, name):
        """One tensor as it is stored."""
        path, h, begin = self.at[name]
        a, b = h["data_offsets"]
        with open(path, "rb") as f:
            f.seek(begin + a)
            raw = torch.frombuffer(bytearray(f.read(b - a)), dtype=torch.uint8)
        return raw.view(ondisk.DTYPES[h["dtype"]]).view(h["shape"])

    def dtype(self, name, t):
        """The dtype in which a tensor of the model is stored there."""
        stacked = re.sub(r"\.experts\.\d+\.(\w+)\.weight$", r".experts.\1", name)
        return ondisk.DTYPES[self.at[name if name in self.at else stacked][1]["dtype"]]

    @torch.no_grad()
    def module(self, name):
        """A module by its name, in fp32 and eval mode."""
        made = copy_of(self.blank.get_submodule(name)).to_empty(device="cpu")
        for b in made.buffers():
            b.zero_()
        for n, t in made.state_dict().items():
            n = f"{name}.{n}"
            for released, place in ({n: t} if n in self.at else census.pieces(n, t)).items():
                found = {released: self.tensor(released)}
                place.copy_(checkpoint.finite(found, self.dir)[released])
        return made.eval()


# 2. Saving


def documents(config, dtype, size, files, plan, kv):
    """{file: what it says}: the JSON beside the tensors of {name: bytes}, which lie in {file:
    names}.
    """
    made = {}
    if len(files) > 1:
        where = {name: file for file, names in files.items() for name in names}
        made[census.INDEX] = dict(metadata=dict(total_size=sum(size.values())), weight_map=where)
    made["config.json"] = config.to_hf() | dict(dtype=str(dtype).split(".")[1])
    if plan or kv:
        inside, beside = ondisk.quantization_config(plan, kv, config.n_routed_experts)
        made["config.json"]["quantization_config"] = inside
        made["hf_quant_config.json"] = beside
    return made


@torch.no_grad()
def save(model, dir, dtype=None, shard_bytes=5e9, overwrite=False, enc=None):
    """Writes the tensors and config.json in the released layout; dtype None keeps what each tensor
    has. With enc, also what other engines chat by: post/release.py.
    """
    dir, table, (plan, kv) = Path(dir), census.places(model), packed.plan(model)
    if dtype and dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"not saved: weights in {dtype} would be other numbers")
    if {name: tuple(t.shape) for name, t in table.items()} != census.census(model.config, plan, kv):
        raise ValueError(
            "not saved: these are not the tensors of the model's config (converted? sharded?)"
        )
    dir.mkdir(parents=True, exist_ok=True)
    old = sorted(dir.glob("model*.safetensors*"))
    if old and not overwrite:
        raise ValueError(
            f"{dir} already holds {old[0].name}: choose another directory, or overwrite=True"
        )
    kept = {name: precision(name, t, dtype) if dtype else t.dtype for name, t in table.items()}
    size = {name: t.numel() * kept[name].itemsize for name, t in table.items()}
    files = census.shards(size, shard_bytes)
    texts = documents(model.config, kept["lm_head.weight"], size, files, plan, kv)
    with tempfile.TemporaryDirectory(dir=dir) as new:  # a failed save leaves all as it was
        for file, names in files.items():
            with open(f"{new}/{file}", "wb") as f:
                ondisk.store(f, {k: table[k].to("cpu", kept[k]) for k in names})
        for file, content in texts.items():
            Path(new, file).write_text(json.dumps(content, indent=2) + "\n")
        for path in old:
            path.unlink()
        for file in [*files, *texts]:  # config.json comes last, or hf_quant_config.json
            Path(new, file).replace(dir / file)
        if "hf_quant_config.json" not in texts:
            (dir / "hf_quant_config.json").unlink(missing_ok=True)
    if enc:
        release.beside(dir, enc)


# 3. The command


@dataclass(frozen=True)
class Flags:
    dir: str | None = knob(None, "a checkpoint to inspect", least=1, most=LONGEST, place=True)
    numbers: bool = knob(
        True, "read every number of it too, all must be finite; without: the files' headers alone"
    )


def inspect(a):
    """Whether a folder fits its config.json, and what is in it."""
    config, tensors, plan, kv = census.survey(a.dir)
    print(a.dir, "holds tensors in", dict(Counter(dtype for _, _, dtype, _ in tensors)))
    census.skeleton(config, tensors, plan, kv)
    print(*census.layout(config, plan, kv), sep="\n")
    if plan or kv:
        print(*census.quantised(config, plan, kv, tensors), sep="\n")
    print("every tensor has its place, and every place its tensor", end="; ")
    if not a.numbers:
        return print("numbers were not read")
    count = sum(t.numel() for _, t in numbers(Path(a.dir), tensors))
    print(f"{count:,} numbers, all finite")


def show(a):
    """Prints the layout of Super, what a round trip returns, and Super-NVFP4's map; or what is in a
    folder.
    """
    if a.dir:
        return inspect(a)
    config, toy = Config.preset("super"), Nemotron(Config.preset("toy"))
    print(*census.layout(config), sep="\n")
    with tempfile.TemporaryDirectory() as dir:
        save(toy, dir, shard_bytes=4e6)
        print("toy, saved as", *sorted(path.name for path in Path(dir).iterdir()))
        again = load(dir).state_dict().values()
    same = [torch.equal(a, b) for a, b in zip(toy.state_dict().values(), again)]
    print(f"loaded again: {sum(same)} of {len(same)} tensors equal bit for bit")
    print("Super-NVFP4, by the map of the release:")
    print(*census.quantised(config, *ondisk.super_map(config.hybrid_override_pattern)), sep="\n")


def main(argv=None):
    command.run(show, Flags, "hf.py", __doc__, argv)


if __name__ == "__main__":
    main()
