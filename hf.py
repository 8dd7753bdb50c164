"""
The released checkpoint: our modules have its names, so loading is putting each tensor where it
belongs.

Only the experts differ. The release stores each one as tensors of its own; the model stacks those
of a layer, so that one call multiplies by them all. transformers 5 has yet another spelling. All of
these load:

    in the files                                                   in the model
    backbone.layers.7.mixer.q_proj.weight               (o, i)     the same
    backbone.layers.1.mixer.experts.3.up_proj.weight    (f, l)     ....1.mixer.experts.up_proj[3]
    model.layers.1.mixer.experts.up_proj                (E, f, l)  ....1.mixer.experts.up_proj

`places(model)` is this table: each released name, and the piece of the model's memory that holds
its numbers.

    census(config)    its names and shapes, from a model without memory
    load(dir)         for every tensor in the files: places[name].copy_(tensor), and no place may
                      stay empty
    save(model, dir)  the same table, written out

A quantised checkpoint (NVFP4, FP8, any mixture) has codes and scales where a matrix was. They are
names like the others, of packed modules, so the table is the same. Which modules is read from the
tensors (`survey`), and the JSON must agree.

There may be memory for one copy of the model, so there are never two: load reads the files into an
empty one, save writes from where the numbers are. Beside it there is one tensor, or one shard if
save changes the dtype.

Letters   E experts  f expert hidden  l latent (the model width where there is none)
          o, i outputs, inputs
Not here  what quantised matrices are made of: quant/packed.py; their JSON, and files that are only
          mapped: quant/ondisk.py
Sources   names of the released checkpoint; conversion_mapping.py of transformers 5.23
Departs   1. A_log, D, dt_bias and the router stay fp32; of these the release stores only the
          router's bias so
          2. config.json says at how many depths MTP was trained (mtp_num_layers); without it, two
          as in Super
"""

import json
import math
import re
import tempfile
from collections import Counter
from copy import deepcopy as copy_of
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import checkpoint
import command
from command import LONGEST, knob
from model import Config, Nemotron
from post import release
from quant import ondisk, packed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = (".A_log", ".D", ".dt_bias", ".gate.weight", ".gate.e_score_correction_bias")


def pieces(name, t):
    """A tensor of ours as released, {name: view}: a stack of experts is many, any other is
    itself.
    """
    layer, stacked, proj = name.partition(".experts.")
    proj += "" if "." in proj else ".weight"  # a packed stack has weight, weight_scale, ...
    return {f"{layer}.experts.{e}.{proj}": v for e, v in enumerate(t)} if stacked else {name: t}


def places(model):
    """{released name: the piece of memory (or of a file) that holds its numbers}."""
    held = model.state_dict().items()
    return {name: view for n, t in held for name, view in pieces(n, t).items()} | packed.loose(
        model
    )


def blank(config, plan=(), kv=()):
    """The model without memory, packed where plan {module: kind} says, with an FP8 cache in layers
    kv.
    """
    with torch.device("meta"):
        return packed.swap(Nemotron(config), dict(plan), kv)


def census(config, plan=(), kv=()):
    """{released name: shape} of everything that a checkpoint with this config holds; no weight is
    made.
    """
    return {name: tuple(view.shape) for name, view in places(blank(config, plan, kv)).items()}


def stored(name, t):
    """The dtype in which the release stores a tensor of the model: codes and scales as they are."""
    if scales(name) or t.dtype in (torch.uint8, torch.float8_e4m3fn):
        return t.dtype
    return torch.float32 if name.endswith(".e_score_correction_bias") else torch.bfloat16


def scales(name):
    return name.endswith(("_scale", "_scale_2"))


def ours(name):
    return re.sub(r"^model\.", "backbone.", name)


def precision(name, t, dtype):
    """The dtype in which a tensor of a model in `dtype` is kept: what decides little but exactly in
    fp32, codes and scales as they are.
    """
    if scales(name) or t.dtype in (torch.uint8, torch.float8_e4m3fn):
        return t.dtype
    return torch.promote_types(dtype, torch.float32) if name.endswith(SMALL) else dtype


def opened(path, how=lambda path: safe_open(path, "pt")):
    try:
        return how(path)
    except (OSError, ValueError, TypeError, SafetensorError) as e:
        raise ValueError(f"{path} is missing, truncated or of another format: {e}") from None


def indexed(path):
    """The files that an index names: beside it, and nowhere else."""
    names = command.document(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path} has no weight_map from tensors to files")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or ":" in file:
            raise ValueError(f"{path} names {command.brief(file)}, which is no file beside it")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{path} names {command.brief(file)}, which is no .safetensors file")
    return set(names.values())


def ends(dir):
    """The ids that end a text, as config.json and generation_config.json name them."""
    found = []
    for name in ("config.json", "generation_config.json"):
        path = Path(dir) / name
        ids = command.document(path).get("eos_token_id") if path.exists() else None
        for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if type(i) is not int or i < 0:
                raise ValueError(f"{path}: eos_token_id {command.brief(ids)} holds {i!r}, no id")
            found.append(i)
    return sorted(set(found))


class Survey(NamedTuple):
    """What a checkpoint's JSON and headers say."""

    config: Config
    tensors: list  # (file, name, dtype, shape) of each, in the order of the bytes
    plan: dict  # {module: kind} of what is quantised, experts by their layer
    kv: list  # attention layers with an FP8 cache


def inventory(dir):
    """(file, name, dtype, shape) of all tensors of a checkpoint, from the headers alone."""
    tensors, files = [], set()
    if (dir / INDEX).exists():
        files.update(indexed(dir / INDEX))
    if (dir / SINGLE).exists() or not files:  # both: then its tensors are there twice
        files.add(SINGLE)
    for file in sorted(files):
        table, _ = opened(dir / file, ondisk.header)
        rows = sorted(table.items(), key=lambda row: row[1]["data_offsets"])
        tensors += [(file, name, h["dtype"], tuple(h["shape"])) for name, h in rows]
    return tensors


def survey(dir):
    """The Survey of a checkpoint. Reads only headers."""
    dir = Path(dir)
    given, tensors = command.document(dir / "config.json"), inventory(dir)
    kinds = {dtype for _, _, dtype, _ in tensors}
    if odd := sorted(kinds - set(ondisk.DTYPES)):
        raise ValueError(
            f"{dir} holds tensors in {', '.join(odd)}: of quantised ones NVFP4 (U8) and FP8 "
            f"(F8_E4M3) "
            "are read, no others"
        )
    try:
        plan, kv = ondisk.by_tensors({ours(name): dtype for _, name, dtype, _ in tensors})
    except ValueError as e:
        raise ValueError(f"{dir}: {e}") from None
    if plan:
        ondisk.agree(dir, given, plan)
    if given.pop("quantization_config", None) and not plan:
        print(
            f"{dir}: config.json has a quantization_config, but every tensor is "
            f"{', '.join(sorted(kinds))}: "
            "loading them as they are"
        )
    config, mtp = Config.from_hf(given), any(name.startswith("mtp.") for _, name, _, _ in tensors)
    if mtp and not config.num_nextn_predict_layers:
        raise ValueError(
            f"{dir} holds mtp.* tensors, but its config.json has num_nextn_predict_layers 0: "
            "write the number of MTP blocks there (1 in Super), or remove the tensors"
        )
    if config.num_nextn_predict_layers and not mtp:  # transformers saves without MTP
        print(
            f"{dir}: config.json announces an MTP block, but no file holds one: loading without MTP"
        )
        config = Config.from_hf(given | dict(num_nextn_predict_layers=0))
    return Survey(config, tensors, plan, kv)


def skeleton(config, tensors, plan=(), kv=()):
    """The model without memory, if these tensors are just what it needs; else an error that lists
    why.
    """
    model = blank(config, plan, kv)
    whole, rows, found, wrong = model.state_dict(), places(model), Counter(), []
    for _, name, dtype, shape in tensors:
        n = ours(name)
        place = rows.get(n, whole.get(n))
        found.update([n] if n in rows else [name] if place is None else pieces(n, place).keys())
        if place is not None and tuple(place.shape) != shape:
            wrong.append(
                f"wrong shape  {name} {list(shape)}, the config makes it {list(place.shape)}"
            )
        elif place is not None and (ondisk.DTYPES[dtype].itemsize == 1) != (place.itemsize == 1):
            wrong.append(f"wrong dtype  {name} is {dtype}, it must be {place.dtype}")
    wrong += [f"missing      {name} {list(rows[name].shape)}" for name in rows if name not in found]
    wrong += [f"unexpected   {name}" for name in found if name not in rows]
    wrong += [f"twice        {name}" for name, times in found.items() if times > 1]
    if n := len(wrong):
        lines = [
            f"{n} tensors do not fit config.json:",
            *wrong[:20],
            *[f"... and {n - 20} more"] * (n > 20),
        ]
        raise ValueError("\n  ".join(lines))
    return model


@torch.no_grad()
def load(dir, dtype=torch.float32, device="cpu", lazy=False):
    """The model in a directory, in eval mode. Every tensor there is used exactly once, or this
    raises.

    Quantised matrices stay packed, in their own dtypes. lazy: of those nothing is read; they are
    views of the files, and what no token asks for is never read. On a CPU only.
    """
    if lazy and torch.device(device).type != "cpu":
        raise ValueError(f"lazy weights are views of files, which {device} cannot see: use the CPU")
    config, tensors, plan, kv = survey(dir)
    model = skeleton(config, tensors, plan, kv)
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


def copy(model, dir, tensors):
    """Puts every tensor of the files into its place."""
    place, last, seen = model.state_dict() | places(model), None, 0
    for file, name, _, _ in tensors:
        if file != last or seen > 2**25:  # a file is a memory map: opening it
            f, last, seen = opened(dir / file), file, 0  # again lets go of what has been read
        tensor = f.get_tensor(name)
        checkpoint.finite({name: tensor}, Path(dir) / file)
        place[ours(name)].copy_(tensor)
        seen += tensor.nbytes


def view(model, dir, tensors):
    """Puts what is not quantised into its place, and gives packed modules views of the files."""
    place, last = model.state_dict() | places(model), None
    for file, name, _, _ in tensors:
        if file != last:
            maps, last = opened(dir / file, ondisk.views), file
        n = ours(name)
        if n in place:
            ondisk.fetch({name: maps[name]})
            place[n].copy_(maps[name])
        else:
            packed.put(model, n, maps[name])


class Parts:
    """A checkpoint that is not quantised, one module at a time: for models larger than the memory.

    Tensors are read, not mapped, so that no more than the module asked for takes address space.
    """

    def __init__(self, dir):
        self.dir = Path(dir)
        found = survey(dir)
        self.config, self.blank = found.config, skeleton(*found)
        packed.refuse(self.blank, f"{dir}, one module at a time")
        self.at = {}
        for file in {file for file, *_ in found.tensors}:
            table, begin = ondisk.header(self.dir / file)
            for name, h in table.items():
                self.at[ours(name)] = self.dir / file, h, begin

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
            places = {n: t} if n in self.at else pieces(n, t)
            for released, place in places.items():
                place.copy_(
                    checkpoint.finite({released: self.tensor(released)}, self.dir)[released]
                )
        return made.eval()


@torch.no_grad()
def save(model, dir, dtype=None, shard_bytes=5e9, overwrite=False, enc=None):
    """Writes the tensors and config.json in the released layout; dtype None keeps what each tensor
    has. With enc, also what other engines chat by: post/release.py.
    """
    dir, table, (plan, kv) = Path(dir), places(model), packed.plan(model)
    if dtype and dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"not saved: weights in {dtype} would be other numbers")
    if {name: tuple(t.shape) for name, t in table.items()} != census(model.config, plan, kv):
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
    shards, room = [], 0
    for name in table:
        if size[name] > room:
            shards, room = shards + [[]], shard_bytes
        shards[-1].append(name)
        room -= size[name]
    n = len(shards)
    shards = {
        SINGLE if n == 1 else f"model-{i:05}-of-{n:05}.safetensors": v
        for i, v in enumerate(shards, 1)
    }
    where = {name: file for file, names in shards.items() for name in names}
    texts = (
        {INDEX: dict(metadata=dict(total_size=sum(size.values())), weight_map=where)}
        if n > 1
        else {}
    )
    texts["config.json"] = model.config.to_hf() | dict(
        dtype=str(kept["lm_head.weight"]).split(".")[1]
    )
    if plan or kv:
        inside, beside = ondisk.quantization_config(plan, kv, model.config.n_routed_experts)
        texts["config.json"]["quantization_config"] = inside
        texts["hf_quant_config.json"] = beside
    with tempfile.TemporaryDirectory(dir=dir) as new:  # a failed save leaves all as it was
        for file, names in shards.items():
            save_file(
                {k: table[k].to("cpu", kept[k]) for k in names}, f"{new}/{file}", dict(format="pt")
            )
        for file, content in texts.items():
            Path(new, file).write_text(json.dumps(content, indent=2) + "\n")
        for path in old:
            path.unlink()
        for file in [*shards, *texts]:  # config.json comes last, or hf_quant_config.json
            Path(new, file).replace(dir / file)
        if "hf_quant_config.json" not in texts:
            (dir / "hf_quant_config.json").unlink(missing_ok=True)
    if enc:
        release.beside(dir, enc)


def layout(config, plan=(), kv=()):
    """The lines of a census: tensors by layer letter, experts as one, and their numbers."""
    letter = lambda at: config.hybrid_override_pattern[int(at[0])]
    rows, kinds = Counter(), Counter()
    for name, shape in census(config, plan, kv).items():
        name = re.sub(
            r"(?<=backbone\.layers\.)\d+", letter, re.sub(r"(?<=\.experts\.)\d+", "e", name)
        )
        rows[f"{name:57}{list(shape)}"] += 1
        kinds[re.match(r"(backbone\.layers\..|mtp)?", name)[0] or "others"] += 1
    total = Counter({"in all": sum(kinds.values())})
    return [f"{n:8,}  {row}" for row, n in (rows + kinds + total).items()]


def quantised(config, plan, kv, tensors=None):
    """Lines about what is packed: modules by kind, bytes (as released, or of these tensors), the
    cache.
    """
    place = places(blank(config, plan, kv))
    if tensors:
        size = sum(math.prod(shape) * ondisk.DTYPES[d].itemsize for _, _, d, shape in tensors)
    else:
        size = sum(t.numel() * stored(n, t).itemsize for n, t in place.items())
    each = lambda n: 2 * config.n_routed_experts if n.endswith(".experts") else 1
    count, leaf = Counter(), Counter()
    for n, kind in plan.items():
        count[kind] += each(n)
        leaf[f"{kind:12} {n.split('.mixer.')[-1]}"] += each(n)
    lines = [f"{n:8,}  {row}" for row, n in sorted(leaf.items())]
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(count.items())) or "none"
    lines.append(
        f"quantised: {sum(count.values()):,} modules, {kinds}; the rest is stored as it is"
    )
    lines.append(f"keys and values in {f'FP8 in {len(kv)} layers' if kv else 'the model dtype'}")
    lines.append(f"{len(place):,} tensors, {size:,} bytes")
    return lines


@dataclass(frozen=True)
class Flags:
    dir: str | None = knob(
        None,
        "a checkpoint to inspect, by the headers of its safetensors",
        least=1,
        most=LONGEST,
        place=True,
    )


def show(a):
    """Prints the layout of Super, what a round trip returns, and Super-NVFP4's map; or whether a
    directory fits its config.
    """
    config, dir = Config.preset("super"), a.dir
    if dir:
        config, tensors, plan, kv = survey(dir)
        print(dir, "holds tensors in", dict(Counter(dtype for _, _, dtype, _ in tensors)))
        skeleton(config, tensors, plan, kv)
        print(*layout(config, plan, kv), sep="\n")
        if plan or kv:
            print(*quantised(config, plan, kv, tensors), sep="\n")
        return print("every tensor has its place, and every place its tensor")
    print(*layout(config), sep="\n")
    with tempfile.TemporaryDirectory() as dir:
        save(toy := Nemotron(Config.preset("toy")), dir, shard_bytes=4e6)
        print("toy, saved as", *sorted(path.name for path in Path(dir).iterdir()))
        same = [
            torch.equal(a, b)
            for a, b in zip(toy.state_dict().values(), load(dir).state_dict().values())
        ]
    print(f"loaded again: {sum(same)} of {len(same)} tensors equal bit for bit")
    print("Super-NVFP4, by the map of the release:")
    print(*quantised(config, *ondisk.super_map(config.hybrid_override_pattern)), sep="\n")


def main(argv=None):
    command.run(show, Flags, "hf.py", __doc__, argv)


if __name__ == "__main__":
    main()
