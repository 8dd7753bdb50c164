"""
The census of a released checkpoint: which tensors there must be, under which names, and whether a
folder holds just those. No weight is read or made.

Our modules have the release's names. Only the experts differ: the release stores each one as
tensors of its own; the model stacks those of a layer, so that one call multiplies by them all.
transformers 5 has yet another spelling. All of these are known:

    in the files                                                   in the model
    backbone.layers.7.mixer.q_proj.weight               (o, i)     the same
    backbone.layers.1.mixer.experts.3.up_proj.weight    (f, l)     ....1.mixer.experts.up_proj[3]
    model.layers.1.mixer.experts.up_proj                (E, f, l)  ....1.mixer.experts.up_proj

    places(model)     this table: each released name, and the piece of the model's memory that holds
                      its numbers
    census(config)    its names and shapes, from a model without memory
    survey(dir)       what a folder holds, from its JSON and the headers of its files
    skeleton(...)     the model without memory, if that is just what it needs; else why not

A quantised checkpoint (NVFP4, FP8, any mixture) has codes and scales where a matrix was. They are
names like the others, of packed modules, so the table is the same. Which modules are quantised is
read from the tensors, and the JSON must agree.

Letters   E experts  f expert hidden  l latent (the model width where there is none)
          o, i outputs, inputs
Not here  the numbers, read and written: hf.py; what quantised matrices are made of:
          quant/packed.py; the JSON of those: quant/ondisk.py
Sources   names of the released checkpoint; conversion_mapping.py of transformers 5.23
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import command

import torch
from safetensors import SafetensorError, safe_open

import bounds
from model import Config, Nemotron
from quant import ondisk, packed

# 1. The table


def pieces(name, t):
    """A tensor of ours as released, {name: view}: a stack of experts is many, any other is
    itself.
    """
    layer, stacked, proj = name.partition(".experts.")
    if not stacked:
        return {name: t}
    proj += "" if "." in proj else ".weight"  # a packed stack has weight, weight_scale, ...
    return {f"{layer}.experts.{e}.{proj}": v for e, v in enumerate(t)}


def places(model):
    """{released name: the piece of memory (or of a file) that holds its numbers}."""
    held = model.state_dict().items()
    found = {name: view for n, t in held for name, view in pieces(n, t).items()}
    return found | packed.loose(model)


def blank(config, plan=(), kv=()):
    """The model without memory, packed where plan {module: kind} says, with an FP8 cache in layers
    kv.
    """
    with torch.device("meta"):
        return packed.swap(Nemotron(config), dict(plan), kv)


def census(config, plan=(), kv=()):
    """{released name: shape} of everything that a checkpoint with this config holds."""
    return {name: tuple(view.shape) for name, view in places(blank(config, plan, kv)).items()}


def stored(name, t):
    """The dtype in which the release stores a tensor of the model: codes and scales as they are."""
    if scales(name) or t.dtype in (torch.uint8, torch.float8_e4m3fn):
        return t.dtype
    return torch.float32 if name.endswith(".e_score_correction_bias") else torch.bfloat16


def scales(name):
    """Whether it is one of a quantised matrix's scales."""
    return name.endswith(("_scale", "_scale_2"))


def ours(name):
    """A name in a file, transformers 5's too -> the name as released."""
    return re.sub(r"^model\.", "backbone.", name)


# 2. What a folder holds


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def shards(size, most):
    """{file: its parts}: parts of so many bytes each, {part: bytes}, in their order, in files of no
    more than `most` bytes unless one part has more.
    """
    groups, room = [], 0
    for part in size:
        if size[part] > room:
            groups.append([])
            room = most
        groups[-1].append(part)
        room -= size[part]
    n = len(groups)
    if n == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{n:05}.safetensors": parts for i, parts in enumerate(groups, 1)}


def opened(path, how=lambda path: safe_open(path, "pt")):
    """What `how` makes of a file; ValueError if it is none, or a damaged one."""
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
            raise ValueError(f"{path} names {bounds.brief(file)}, which is no file beside it")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{path} names {bounds.brief(file)}, which is no .safetensors file")
    return set(names.values())


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
            "(F8_E4M3) are read, no others"
        )
    try:
        plan, kv = ondisk.by_tensors({ours(name): dtype for _, name, dtype, _ in tensors})
    except ValueError as e:
        raise ValueError(f"{dir}: {e}") from None
    if plan and (said := ondisk.agree(dir, given, plan, kv)):
        print(said)
    if given.pop("quantization_config", None) and not plan:
        print(
            f"{dir}: config.json has a quantization_config, but every tensor is "
            f"{', '.join(sorted(kinds))}: loading them as they are"
        )
    config = Config.from_hf(given)
    mtp = any(name.startswith("mtp.") for _, name, _, _ in tensors)
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
    """The model without memory, if these tensors are just what it needs; else ValueError lists
    what is wrong.
    """
    model = blank(config, plan, kv)
    wrong = misfits(model, tensors)
    if n := len(wrong):
        more = [f"... and {n - 20} more"] if n > 20 else []
        lines = [f"{n} tensors do not fit config.json:", *wrong[:20], *more]
        raise ValueError("\n  ".join(lines))
    return model


def is_code(dtype, other):
    """Whether one of two dtypes that differ has codes, which a copy would convert."""
    return dtype != other and min(dtype.itemsize, other.itemsize) == 1


def misfits(model, tensors):
    """What of these tensors does not fit the model, a line each."""
    whole, rows = model.state_dict(), places(model)
    found, wrong = Counter(), []
    for _, name, dtype, shape in tensors:
        n = ours(name)
        place = rows.get(n, whole.get(n))
        if n in rows or place is None:
            found[n if n in rows else name] += 1
        else:  # a stack of experts, as transformers 5 stores it
            found.update(pieces(n, place).keys())
        if place is None:
            continue
        if tuple(place.shape) != shape:
            wrong.append(
                f"wrong shape  {name} {list(shape)}, the config makes it {list(place.shape)}"
            )
        elif is_code(ondisk.DTYPES[dtype], place.dtype):
            wrong.append(f"wrong dtype  {name} is {dtype}, it must be {place.dtype}")
    wrong += [f"missing      {name} {list(rows[name].shape)}" for name in rows if name not in found]
    wrong += [f"unexpected   {name}" for name in found if name not in rows]
    wrong += [f"twice        {name}" for name, times in found.items() if times > 1]
    return wrong


# 3. In lines


def layout(config, plan=(), kv=()):
    """The lines of a census: tensors by layer letter, experts as one, and their numbers."""
    letter = lambda at: config.hybrid_override_pattern[int(at[0])]
    rows, kinds = Counter(), Counter()
    for name, shape in census(config, plan, kv).items():
        name = re.sub(r"(?<=\.experts\.)\d+", "e", name)
        name = re.sub(r"(?<=backbone\.layers\.)\d+", letter, name)
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


if __name__ == "__main__":
    command.part("python hf.py")
