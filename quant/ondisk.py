"""
Quantised checkpoints on disk: what the two JSON files say, and how to look at a tensor without
reading it.

A module X of kind NVFP4 or FP8 is stored as X.weight, X.weight_scale and what packed.py names
beside; that alone makes it quantised. The same is said twice more, for readers that decide before
they open a file:

    config.json            quantization_config: quant_algo, quantized_layers, config_groups,
                           ignore, kv_cache_scheme
    hf_quant_config.json   quantization: quant_algo, quantized_layers | exclude_modules,
                           kv_cache_quant_algo

MIXED_PRECISION lists every quantised module; NVFP4 and FP8 say it of all but those excluded. A name
there is exact, or a piece of a module's path, or a pattern with *; a trailing * covers all below.
Of experts the published files name every matrix, Model Optimizer's own a layer's, with a tail
behind a zero byte. `told` understands them all; `agree` compares them with what the tensors say,
and the groups' numbers of bits, and the cache's.

A file is mapped, not read (`views`): a page comes from the disk when somebody looks at its numbers,
and `fetch` asks for a matrix at once, before it is touched page by page.

Not here  what codes mean: packed.py. Names of everything else: census.py; loading: hf.py
Sources   the two files of Super-NVFP4 and Nano-NVFP4; Model Optimizer 0.47; how vLLM reads them
"""

import fnmatch
import json
import math
import mmap
import re
from pathlib import Path

import command

import torch

DTYPES = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
EXPERT = re.compile(r"\.experts\.\d+\.(up|down)_proj$")


# 1. What is quantised: said by the tensors, and by the JSON.


def by_tensors(dtypes):
    """{name: dtype as stored} of all tensors -> {module: kind}, [attention layers with k_scale or
    v_scale].

    A matrix with a weight_scale_2 is NVFP4, with a weight_scale alone FP8. A layer's experts are
    one module, and must be of one kind.
    """
    if not isinstance(dtypes, dict) or not all(isinstance(n, str) for n in dtypes):
        raise ValueError(f"dtypes is {dtypes!r:.60}: those of tensors, by name")
    plan = {}
    for n in sorted(dtypes):
        lacking = {"U8": ("weight_scale", "weight_scale_2"), "F8_E4M3": ("weight_scale",)}
        m, dot, leaf = n.rpartition(".")
        for scale in lacking.get(dtypes[n], ()) if leaf == "weight" else ():
            if f"{m}.{scale}" not in dtypes:
                raise ValueError(f"{n} is {dtypes[n]}, that is codes, and {m}.{scale} is missing")
        if leaf == "weight_scale":
            four_bits = "NVFP4" if f"{m}.input_scale" in dtypes else "W4A16_NVFP4"
            kind = four_bits if f"{m}.weight_scale_2" in dtypes else "FP8"
            base = EXPERT.sub(".experts", m)
            if plan.setdefault(base, kind) != kind:
                raise ValueError(f"{m} is {kind}, other experts of its layer {plan[base]}")
    kv = sorted({n.rsplit(".", 2)[0] for n in dtypes if n.endswith((".k_scale", ".v_scale"))})
    return plan, kv


def clean(name):
    """A module's name without Model Optimizer's tail `.\\0backbone.pt_name_sentinel`."""
    return re.sub(r"\.?\0[\w.]*", "", name)


def module(name):
    """A matrix's name -> the module that has its kind: of experts, their layer's."""
    return re.sub(r"\.experts(\..*)?$", ".experts", clean(name))


def covers(pattern, module):
    """Whether an entry of `ignore` or `exclude_modules` means this module."""
    below = pattern[:-1] if pattern.endswith("*") else pattern
    return module == pattern or below in module or fnmatch.fnmatchcase(module, pattern)


def told(quantization, plan):
    """What a quantization_config says of the modules: {module: kind}, in `plan`'s names.

    One algorithm for all says nothing of modules that the files do not store so; of those that they
    do, it must be theirs.
    """
    algo = quantization.get("quant_algo")
    sizes = [quantization, *(quantization.get("quantized_layers") or {}).values()]
    if odd := [v["group_size"] for v in sizes if v.get("group_size", 16) != 16]:
        raise ValueError(f"blocks of {odd[0]} numbers in its quantisation config: 16 are read")
    if algo == "MIXED_PRECISION":
        found = {}
        for n, v in (quantization.get("quantized_layers") or {}).items():
            kind = found.setdefault(module(n), v["quant_algo"])
            if kind != v["quant_algo"]:
                raise ValueError(f"{n} is {v['quant_algo']}, other experts of its layer {kind}")
        return found
    excluded = quantization.get("ignore", quantization.get("exclude_modules")) or []
    excluded = [clean(p) for p in excluded]
    return {m: None if any(covers(p, m) for p in excluded) else algo for m in plan}


def rule(kind):
    """How a config_group describes numbers of a kind."""
    blocks = {} if kind == "FP8" else dict(group_size=16)
    return dict(dynamic=False, num_bits=8 if kind == "FP8" else 4, type="float", **blocks)


def described_as(given, kind):
    """Whether a description of numbers, perhaps with other words in it, is that of a kind."""
    return {k: given.get(k) for k in rule("NVFP4")} == dict(group_size=None) | rule(kind)


def groups(said, plan):
    """ValueError unless the config_groups, if there are any, describe the modules as they are
    stored: so many bits, blocks of 16, inputs rounded or not.
    """
    for name, group in (said.get("config_groups") or {}).items():
        targets = plan if group["targets"] == ["Linear"] else map(module, group["targets"])
        for m in targets:
            kind, inputs = plan.get(m), group.get("input_activations")
            same = kind and described_as(group["weights"], kind)
            if kind == "W4A16_NVFP4":
                same = same and not inputs
            elif not (same and inputs and described_as(inputs, kind)):
                same = False
            if not same:
                raise ValueError(
                    f"{name} of config_groups and the tensors disagree about {m}: "
                    f"{group['weights']} with inputs {inputs} there, "
                    f"{kind or 'not quantised'} in the files"
                )


def cache(said, kv):
    """ValueError unless what is said of keys and values fits the scales in the files. Where FP8 is
    said and no scale is stored, the sentence that has to be shown.
    """
    scheme = said.get("kv_cache_scheme", said.get("kv_cache_quant_algo"))
    eight = scheme == "FP8" or isinstance(scheme, dict) and described_as(scheme, "FP8")
    if scheme and not eight:
        raise ValueError(f"keys and values in {scheme}: FP8 is read, no other format of a cache")
    if kv and not scheme:
        raise ValueError(f"{kv[0]} has scales of an FP8 cache, and the config says nothing of one")
    if eight and not kv:
        return "the config says an FP8 cache, and no file holds its scales: kept as computed"
    return ""


def agree(dir, given, plan, kv=()):
    """Raises if the JSON (config.json's, else hf_quant_config.json's) and the tensors disagree.
    Returns what else is to be said of them, in a sentence.

    dir: the folder; given: its config.json as a dict; plan, kv: as `by_tensors` has them.
    """
    said, path = given.get("quantization_config"), Path(dir) / "hf_quant_config.json"
    if not said and path.is_file():
        try:
            said = command.document(path)["quantization"]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is no quantisation config: {e!r}") from None
    if said is None:
        return ""
    if not isinstance(said, dict) or said.get("quant_method", "modelopt") != "modelopt":
        raise ValueError(
            f"{dir}: quant_method "
            f"{said.get('quant_method') if isinstance(said, dict) else said!r}: "
            "only modelopt's formats are read"
        )
    try:
        differ(told(said, plan), plan)
        groups(said, plan)
        line = cache(said, kv)
    except ValueError as e:
        raise ValueError(f"{dir}: {e}") from None
    except (LookupError, TypeError, AttributeError) as e:
        raise ValueError(
            f"{dir}: its quantisation config is malformed ({type(e).__name__}: {e})"
        ) from None
    if not plan and said.get("quant_algo"):
        raise ValueError(
            f"{dir}: the config says {said['quant_algo']}, but no tensor there is quantised"
        )
    return line and f"{dir}: {line}"


def differ(want, plan):
    """ValueError if a module is said to be of one kind, and stored in another."""
    wrong = sorted(m for m in want.keys() | plan.keys() if want.get(m) != plan.get(m))
    if wrong:
        m = wrong[0]
        raise ValueError(
            f"the quantisation config and the tensors disagree about {len(wrong)} modules, first "
            f"{m}: {want.get(m) or 'not quantised'} there, {plan.get(m) or 'not quantised'} in the "
            "files"
        )


def quantization_config(plan, kv, experts, version="0.43.0"):
    """-> config.json's quantization_config, and hf_quant_config.json: as the release writes them.

    Always MIXED_PRECISION, an entry for every module and every expert's matrix: all readers take
    that, and it needs no patterns.
    """

    def each(n):
        if not n.endswith(".experts"):
            return [n]
        return [f"{n}.{e}.{p}" for e in range(experts) for p in ("up_proj", "down_proj")]

    def entry(kind):
        return dict(quant_algo=kind) | (dict(group_size=16) if "NVFP4" in kind else {})

    layers = {m: entry(kind) for n, kind in plan.items() for m in each(n)}
    groups = {}
    for i, kind in enumerate(sorted(set(plan.values()))):
        inputs = {} if kind == "W4A16_NVFP4" else dict(input_activations=rule(kind))
        targets = [m for m, e in layers.items() if e["quant_algo"] == kind]
        groups[f"group_{i}"] = dict(**inputs, weights=rule(kind), targets=targets)
    producer = dict(name="modelopt", version=version)
    scheme = dict(kv_cache_scheme=rule("FP8")) if kv else {}
    inside = dict(
        config_groups=groups,
        quantized_layers=layers,
        ignore=[],
        quant_algo="MIXED_PRECISION",
        **scheme,
        producer=producer,
        quant_method="modelopt",
    )
    beside = dict(
        quant_algo="MIXED_PRECISION",
        kv_cache_quant_algo="FP8" if kv else None,
        quantized_layers=layers,
    )
    return inside, dict(producer=producer, quantization=beside)


# 2. Super's own map, by layer: what the search of the report chose (139 modules FP8, 40,961 NVFP4).

IN_PROJ = [0, 2, 4, 6, 9, 11, 13, 15, 18, 20, 27, 29, 31, 40]
IN_PROJ += [49, 51, 53, 55, 57, 60, 62, 66, 68, 71, 73, 82, 84, 86]
OUT_PROJ = [0, 2, 4, 9, 11, 13, 18, 38, 40, 42, 44, 49, 51, 53, 55]
OUT_PROJ += [57, 60, 62, 64, 66, 68, 71, 73, 75, 77, 80, 82, 84, 86]


def super_map(pattern):
    """Super's pattern of letters -> the release's {module: kind} and its layers with an FP8
    cache.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern is {pattern!r:.60}: a text of letters")
    at = {letter: [i for i, x in enumerate(pattern) if x == letter] for letter in "ME*"}
    plan = {f"backbone.layers.{i}.mixer.experts": "NVFP4" for i in at["E"]}
    up, down = "shared_experts.up_proj", "shared_experts.down_proj"
    eight = dict(in_proj=IN_PROJ, out_proj=OUT_PROJ, o_proj=[69, 78])
    eight |= dict(fc1_latent_proj=[1, 3, 5], fc2_latent_proj=[3])
    eight |= {
        up: [i for i in at["E"] if i != 41],
        down: [i for i in at["E"] if i not in (1, 8, 76)],
    }
    plan |= {f"backbone.layers.{i}.mixer.{m}": "FP8" for m, layers in eight.items() for i in layers}
    plan[f"backbone.layers.1.mixer.{down}"] = "NVFP4"
    return plan, [f"backbone.layers.{i}.mixer" for i in at["*"]]


# 3. Files that are looked at, not read.


def described(h):
    """Whether an entry of a header says what it has to: a dtype, a shape, and two offsets."""
    if not isinstance(h, dict) or not isinstance(h.get("dtype"), str):
        return False
    numbers = h.get("shape"), h.get("data_offsets")
    whole = all(isinstance(x, list) and all(type(i) is int and i >= 0 for i in x) for x in numbers)
    return whole and len(numbers[1]) == 2 and numbers[1][0] <= numbers[1][1]


def header(path):
    """A safetensors file's table {name: {dtype, shape, data_offsets}} and where its bytes begin.

    A file shorter than its table promises is refused: touching what is missing under a mapping
    would kill the process.
    """
    if not isinstance(path, (str, Path)):
        raise ValueError(f"{path!r:.60} is no path")
    path = Path(command.ending_file(path))
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or not 2 <= n <= size - 8:
            raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes")
        table = command.parsed(f.read(n), f"{path}, its header,")
    table.pop("__metadata__", None)
    for name, h in table.items():
        if not described(h):
            raise ValueError(f"{path}: {name} has no dtype, shape and data_offsets: {str(h)[:80]}")
    end = 8 + n + max((h["data_offsets"][1] for h in table.values()), default=0)
    if end > size:
        raise ValueError(f"{path} is truncated: its header needs {end} bytes, it has {size}")
    for name, h in table.items():
        a, b = h["data_offsets"]
        if h["dtype"] in DTYPES and b - a != math.prod(h["shape"]) * DTYPES[h["dtype"]].itemsize:
            raise ValueError(f"{path}: {name} of shape {h['shape']} does not fit {b - a} bytes")
    return table, 8 + n


def store(f, tensors):
    """Writes {name: tensor} to an open file as safetensors does, a tensor at a time: no second copy
    of them all is made.

    Wider numbers first, then by name, so that each lies on an address it can be read from.
    """
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"tensors is {tensors!r:.60}: tensors by name")
    words = {dtype: word for word, dtype in DTYPES.items()} | {torch.int64: "I64"}
    order = sorted(tensors, key=lambda n: (-tensors[n].itemsize, n))
    table, end = {"__metadata__": dict(format="pt")}, 0
    for n in order:
        t, begin = tensors[n], end
        end += t.numel() * t.itemsize
        table[n] = dict(dtype=words[t.dtype], shape=list(t.shape), data_offsets=[begin, end])
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    f.write(len(head).to_bytes(8, "little") + head)
    for n in order:
        f.write(tensors[n].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def views(path):
    """{name: tensor} of a safetensors file, none of which is read before somebody looks at its
    numbers.

    Not safetensors' get_tensor: it looks at each tensor's first page, and the kernel reads
    megabytes around it. Here a page is read when it is needed (RANDOM), or, by `fetch`, a tensor at
    once (WILLNEED): as many bytes as are used. The mapping is private: writing to a view changes
    no file. Numbers at an odd address are copied, for they cannot be looked at where they are.
    """
    table, begin = header(path)
    with open(path, "rb") as f:
        file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_RANDOM"):  # Linux and macOS
        file.madvise(mmap.MADV_RANDOM)
    raw, out = torch.frombuffer(file, dtype=torch.uint8), {}
    for name, h in table.items():
        a, b = (begin + x for x in h["data_offsets"])
        dtype = DTYPES[h["dtype"]]
        here = raw[a:b].clone() if a % dtype.itemsize else raw[a:b]
        out[name] = here.view(dtype).view(h["shape"])
        out[name].range = file, a // mmap.PAGESIZE * mmap.PAGESIZE, b
    return out


def fetch(tensors):
    """Asks for the pages of tensors of a file before they are touched; of others there is nothing
    to ask.
    """
    if hasattr(mmap, "MADV_WILLNEED"):
        for t in tensors.values():
            if hasattr(t, "range"):
                file, a, b = t.range
                file.madvise(mmap.MADV_WILLNEED, a, b - a)
