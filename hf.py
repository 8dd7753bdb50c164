"""
The released checkpoint: our modules have its names, so loading is putting each tensor where it
belongs.

Only the experts differ. The release stores each one as tensors of its own; the model stacks those
of a layer, so that one call multiplies by them all. transformers 5 has yet another spelling. All of
these load:

    in the files                                                   in the model
    backbone.layers.7.mixer.q_proj.weight               (o, i)     the same
    backbone.layers.1.mixer.experts.3.up_proj.weight    (f, l)     backbone.layers.1.mixer.experts.up_proj[3]
    model.layers.1.mixer.experts.up_proj                (E, f, l)  backbone.layers.1.mixer.experts.up_proj

`places(model)` is this table: each released name, and the piece of the model's memory that holds
its numbers.

    census(config)    its names and shapes, from a model without memory
    load(dir)         for every tensor in the files: places[name].copy_(tensor), and no place may
                      stay empty
    save(model, dir)  the same table, written out

There may be memory for one copy of the model, so there are never two: load reads the files into an
empty one, save writes from where the numbers are. Beside it there is one tensor, or one shard if
save changes the dtype.

Letters   E experts  f expert hidden  l latent (the model width where there is none)  o, i outputs, inputs
Not here  quantised checkpoints (NVFP4, FP8): refused
Sources   names of the released checkpoint; conversion_mapping.py of transformers 5.23
Departs   1. A_log, D, dt_bias and the router stay fp32; of these the release stores only the
          router's bias so
          2. config.json says at how many depths MTP was trained (mtp_num_layers); without it, two
          as in Super
"""

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import checkpoint
import command
from command import LONGEST, knob
from model import Config, Nemotron

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = (".A_log", ".D", ".dt_bias", ".gate.weight", ".gate.e_score_correction_bias")


def pieces(name, t):
    """A tensor of ours as released, {name: view}: a stack of experts is many, any other is itself."""
    layer, stacked, proj = name.partition(".experts.")
    return (
        {f"{layer}.experts.{e}.{proj}.weight": v for e, v in enumerate(t)} if stacked else {name: t}
    )


def places(model):
    return {
        name: view for n, t in model.state_dict().items() for name, view in pieces(n, t).items()
    }


def census(config):
    """{released name: shape} of everything that a checkpoint with this config holds; no weight is
    made.
    """
    with torch.device("meta"):
        return {name: tuple(view.shape) for name, view in places(Nemotron(config)).items()}


def ours(name):
    return re.sub(r"^model\.", "backbone.", name)


def precision(name, t):
    return torch.promote_types(t, torch.float32) if name.endswith(SMALL) else t


def opened(path):
    try:
        return safe_open(path, "pt")
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


def survey(dir):
    """The Config of a checkpoint, and (file, name, dtype, shape) of all its tensors. Reads only
    headers.
    """
    dir = Path(dir)
    given, tensors, files = command.document(dir / "config.json"), [], set()
    if (dir / INDEX).exists():
        files.update(indexed(dir / INDEX))
    if (dir / SINGLE).exists() or not files:  # both: then its tensors are there twice
        files.add(SINGLE)
    for file in sorted(files):
        f = opened(dir / file)
        slices = [
            (name, f.get_slice(name)) for name in f.offset_keys()
        ]  # in the order of the bytes
        tensors += [(file, name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices]
    kinds = sorted({dtype for _, _, dtype, _ in tensors})
    if set(kinds) - {"F64", "F32", "F16", "BF16"}:
        raise ValueError(
            f"{dir} is quantised (ModelOpt's packed NVFP4 or FP8 weights with scales; it holds "
            f"{', '.join(kinds)}): load the BF16 checkpoint instead"
        )
    if given.pop("quantization_config", None):
        print(
            f"{dir}: config.json has a quantization_config, but every tensor is {', '.join(kinds)}: "
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
    return config, tensors


def skeleton(config, tensors):
    """The model without memory, if these tensors are just what it needs; else an error that lists
    why.
    """
    with torch.device("meta"):
        model = Nemotron(config)
    whole, rows, found, wrong = model.state_dict(), places(model), Counter(), []
    for _, name, _, shape in tensors:
        n = ours(name)
        place = rows.get(n, whole.get(n))
        found.update([n] if n in rows else [name] if place is None else pieces(n, place).keys())
        if place is not None and tuple(place.shape) != shape:
            wrong.append(
                f"wrong shape  {name} {list(shape)}, the config makes it {list(place.shape)}"
            )
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
def load(dir, dtype=torch.float32, device="cpu"):
    """The model in a directory, in eval mode. Every tensor there is used exactly once, or this
    raises.
    """
    config, tensors = survey(dir)
    model = skeleton(config, tensors)
    for name, t in model.state_dict(keep_vars=True).items():
        t.data = t.data.to(precision(name, dtype))
    if torch.device(device).type == "cpu":
        size = sum(t.numel() * t.itemsize for t in model.state_dict().values())
        command.fits(size, f"{dir}: its weights in {str(dtype).split('.')[1]}")
    model.to_empty(device=device)  # the only copy there will be
    for b in model.buffers():
        b.zero_()  # the experts' load is in no file
    place, last, seen = model.state_dict() | places(model), None, 0
    for file, name, _, _ in tensors:
        if file != last or seen > 2**25:  # a file is a memory map: opening it
            f, last, seen = opened(Path(dir) / file), file, 0  # again lets go of what has been read
        tensor = f.get_tensor(name)
        checkpoint.finite({name: tensor}, Path(dir) / file)
        place[ours(name)].copy_(tensor)
        seen += tensor.nbytes
    return model.eval()


@torch.no_grad()
def save(model, dir, dtype=None, shard_bytes=5e9, overwrite=False):
    """Writes the tensors and config.json in the released layout; dtype None keeps what each tensor
    has.
    """
    dir, table = Path(dir), places(model)
    if dtype and dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"not saved: weights in {dtype} would be other numbers")
    if {name: tuple(t.shape) for name, t in table.items()} != census(model.config):
        raise ValueError(
            "not saved: these are not the tensors of the model's config (converted? sharded?)"
        )
    dir.mkdir(parents=True, exist_ok=True)
    old = sorted(dir.glob("model*.safetensors*"))
    if old and not overwrite:
        raise ValueError(
            f"{dir} already holds {old[0].name}: choose another directory, or overwrite=True"
        )
    kept = {name: precision(name, dtype) if dtype else t.dtype for name, t in table.items()}
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
    with tempfile.TemporaryDirectory(dir=dir) as new:  # a failed save leaves all as it was
        for file, names in shards.items():
            save_file(
                {k: table[k].to("cpu", kept[k]) for k in names}, f"{new}/{file}", dict(format="pt")
            )
        for file, content in texts.items():
            Path(new, file).write_text(json.dumps(content, indent=2) + "\n")
        for path in old:
            path.unlink()
        for file in [*shards, *texts]:  # config.json comes last
            Path(new, file).replace(dir / file)


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
    """Prints the layout of Super and what a round trip returns; or whether a directory fits its
    config.
    """
    config, dir = Config.preset("super"), a.dir
    if dir:
        config, tensors = survey(dir)
        print(dir, "holds tensors in", dict(Counter(dtype for _, _, dtype, _ in tensors)))
        skeleton(config, tensors)
    letter, rows, kinds = (
        lambda at: config.hybrid_override_pattern[int(at[0])],
        Counter(),
        Counter(),
    )
    for name, shape in census(config).items():  # layers by letter, experts as one
        name = re.sub(
            r"(?<=backbone\.layers\.)\d+", letter, re.sub(r"(?<=\.experts\.)\d+", "e", name)
        )
        rows[f"{name:57}{list(shape)}"] += 1
        kinds[re.match(r"(backbone\.layers\..|mtp)?", name)[0] or "others"] += 1
    for row, n in (rows + kinds + Counter({"in all": sum(kinds.values())})).items():
        print(f"{n:8,}  {row}")
    if dir:
        return print("every tensor has its place, and every place its tensor")
    with tempfile.TemporaryDirectory() as dir:
        save(toy := Nemotron(Config.preset("toy")), dir, shard_bytes=4e6)
        print("toy, saved as", *sorted(path.name for path in Path(dir).iterdir()))
        same = [
            torch.equal(a, b)
            for a, b in zip(toy.state_dict().values(), load(dir).state_dict().values())
        ]
    print(f"loaded again: {sum(same)} of {len(same)} tensors equal bit for bit")


def main(argv=None):
    command.run(show, Flags, "hf.py", __doc__, argv)


if __name__ == "__main__":
    main()
