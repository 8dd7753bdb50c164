"""
A CUDA card that is not there: the project's whole CUDA path on a CPU build of torch, with numbers.

A tensor "on the card" is a wrapper that says cuda:0 to autograd, autocast and whoever asks, and
holds a CPU tensor with the numbers. Every operation is done twice: by FakeTensorMode with device
cuda, where PyTorch's own rules for devices, dtypes and strides raise as they are written there;
and on the CPU, for the numbers. On the way three things are counted, by file and line:

    launches   kernels that the operation would start, at least one
    waits      where the host would wait for the card: a number read, a copy from ordinary memory,
               an operation whose CUDA form looks at its data to know the size of its answer
    replays    of captured graphs (torch.cuda.CUDAGraph): one launch each, whatever is in them

A copy from pinned memory with non_blocking=True is no wait. Attention counts as one fused call.

Not here  what CUDA's kernels compute, memory, streams, times
"""

import contextlib
import os
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils._foreach_utils as foreach
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
THERE, CPU = torch.device(os.environ.get("FAKE_DEVICE", "cuda"), 0), torch.device("cpu")
aten = torch.ops.aten

# Operations that start nothing: views are asked for their own flag.
FREE = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
}
# Operations whose CUDA form reads something back, and how often.
READS_BACK = {
    "aten::bincount": 2,
    "aten::nonzero": 1,
    "aten::_unique2": 1,
    "aten::masked_select": 1,
    "aten::multinomial": 2,
    "aten::equal": 1,
    "aten::repeat_interleave": 1,
}
CANNOT_SAY = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


class OnCard(torch.Tensor):
    """Says cuda:0, or mps:0 (mac.py); holds a CPU tensor, `real`."""

    @staticmethod
    def __new__(cls, real):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            dtype=real.dtype,
            storage_offset=real.storage_offset(),
            layout=real.layout,
            device=THERE,
        )
        made.held = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return CARD.run(op, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                copy = OnCard(self.held.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return self.held.detach().__reduce_ex__(protocol)

    def tolist(self):
        CARD.waits[where(), "tolist"] += 1
        return self.held.detach().tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def __repr__(self):
        return f"OnCard({self.held!r})"


@cache
def ours(name):
    """A file of the project, but none of the card's own, as its path there; else empty."""
    path = Path(name)
    mine = path.is_relative_to(ROOT) and not path.is_relative_to(Path(__file__).parent)
    return str(path.relative_to(ROOT)) if mine else ""


def where():
    """file:line of ours that is running."""
    frame = sys._getframe(1)
    while frame:
        if name := ours(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward" if threading.current_thread() is not threading.main_thread() else "?"


class Card(TorchDispatchMode):
    """Runs every operation that meets the card, and counts."""

    def __init__(self):
        super().__init__()
        self.fake, self.answers = FakeTensorMode(), {}
        self.recording = None  # the operations of a graph that is being captured
        self.reset()

    def reset(self):
        self.launches, self.waits, self.replays, self.grouped = Counter(), Counter(), 0, 0
        self.attention = Counter()  # of one token: the kernel that would answer

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.run(op, args, kwargs or {})

    def run(self, op, args, kwargs):
        leaves = [*flat(args), *flat(kwargs)]
        if not any(map(on_card, leaves)):
            return op(*args, **kwargs)
        device = self.rules(op, args, kwargs, leaves)
        plain, named = each(real, args), each(real, kwargs)
        if op._schema.name == "aten::_grouped_mm":
            self.grouped += 1
            offsets(*plain[:2], plain[2] if len(plain) > 2 else named["offs"])
        before = sum(self.waits.values())
        self.count(op, leaves, device)
        if self.recording is not None and sum(self.waits.values()) > before:
            raise RuntimeError(f"a wait while a graph is captured: {op} at {where()}")
        out = compute(op, plain, named)
        if self.recording is not None:
            self.recording.append((op, plain, named, out))
        mine = {id(x.held): x for x in leaves if isinstance(x, OnCard)}

        def back(x):
            if not isinstance(x, torch.Tensor) or device == CPU:
                return x
            return mine[id(x)] if id(x) in mine else OnCard(x)

        return each(back, out)

    def rules(self, op, args, kwargs, leaves):
        """What PyTorch's fake kernels for CUDA say: they raise, or the answer's device."""
        if op is aten._local_scalar_dense.default:
            return CPU
        key = op, signature(args), signature(kwargs)
        if key not in self.answers:
            self.answers[key] = THERE
            with self.fake, contextlib.suppress(*CANNOT_SAY):
                made = flat(op(*each(shape, args), **each(shape, kwargs)))
                kinds = {x.device.type for x in made if isinstance(x, torch.Tensor)}
                self.answers[key] = THERE if "cuda" in kinds or not kinds else CPU
        return self.answers[key]

    def count(self, op, leaves, device):
        name, at = op._schema.name, where()
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        host = [x for x in tensors if not isinstance(x, OnCard)]
        if name == "aten::_local_scalar_dense":
            self.waits[at, "a number read"] += 1
            return
        if name in ("aten::_to_copy", "aten::copy_"):
            down = device == CPU or (name == "aten::copy_" and not isinstance(tensors[0], OnCard))
            if down:
                self.waits[at, "copied to the host"] += 1
                return
            if host:
                asked = any(x is True for x in leaves)  # non_blocking
                pinned = all(getattr(x, "pinned", False) for x in host) and asked
                self.waits[at, "copied from the host"] += not pinned
                return
        sized = name == "aten::repeat_interleave" and any(type(x) is int for x in leaves)
        if name in READS_BACK and not sized:  # output_size: how long the answer is
            self.waits[at, name] += READS_BACK[name]
        if name in ("aten::index", "aten::index_put_"):
            masks = any(x.dtype == torch.bool for x in tensors[1:])
            moved = any(x.ndim for x in host)
            self.waits[at, "index by a mask"] += masks
            self.waits[at, "index from the host"] += moved
        if op not in FREE and not op.is_view:
            self.launches[at, name] += 1

    def story(self):
        """The waits, in words."""
        return "\n".join(f"{n} x {at} {what}" for (at, what), n in self.waits.items() if n)


class Graph:
    """torch.cuda.CUDAGraph: replaying does every operation again, into the same memory."""

    def __init__(self):
        self.operations = []

    def replay(self):
        CARD.replays += 1
        for op, args, kwargs, out in self.operations:
            again = compute(op, args, dict(kwargs))
            for old, new in zip(flat(out), flat(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph):
    """torch.cuda.graph: what is done inside is recorded. Whatever would wait is refused."""
    CARD.recording = graph.operations
    try:
        yield
    finally:
        CARD.recording = None


class Stream:
    def wait_stream(self, other):
        pass


def each(f, x):
    """f of everything in lists, tuples and dicts."""
    if isinstance(x, dict):
        return {k: each(f, v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        kind = list if isinstance(x, list) else tuple
        return kind([each(f, v) for v in x])
    return f(x)


def flat(x):
    """Everything in lists, tuples and dicts, as one list."""
    if not isinstance(x, (dict, list, tuple)):
        return [x]
    return [y for v in (x.values() if isinstance(x, dict) else x) for y in flat(v)]


def on_card(x):
    return isinstance(x, OnCard) or isinstance(x, torch.device) and x.type == THERE.type


def real(x):
    if isinstance(x, OnCard):
        return x.held
    return CPU if isinstance(x, torch.device) and x.type == THERE.type else x


def shape(x):
    """A tensor of the same shape, strides and type without numbers; no generator of them."""
    if isinstance(x, torch.Generator):
        return None
    if not isinstance(x, torch.Tensor):
        return x
    how = dict(dtype=x.dtype, device=THERE if isinstance(x, OnCard) else CPU)
    with torch.no_grad():
        return torch.empty_strided(x.shape, x.stride(), **how)


def signature(x):
    """What the rules look at, of a tensor or of all that is in lists, tuples and dicts."""
    if isinstance(x, dict):
        return tuple((k, signature(v)) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return type(x), *map(signature, x)
    if isinstance(x, torch.Tensor):
        return type(x), x.shape, x.stride(), x.dtype
    return type(x), "generator" if isinstance(x, torch.Generator) else repr(x)


def compute(op, args, kwargs):
    """On the CPU, which lacks a few forms that CUDA has."""
    name = op._schema.name
    if name == "aten::mm" and "dtype" in op._overloadname:
        return torch.mm(args[0].to(args[2]), args[1].to(args[2]))
    if name == "aten::addmm" and "dtype" in op._overloadname:
        return torch.addmm(args[0], args[1].to(args[3]), args[2].to(args[3]), out=kwargs["out"])
    kwargs.pop("pin_memory", None)
    return op(*args, **kwargs)


def offsets(a, b, ends):
    """What the CUDA kernel that prepares a grouped product asserts, with the real offsets."""
    size = ends.diff(prepend=ends.new_zeros(1))
    a_rows, b_rows = a.stride(-1) == 1, b.stride(-1) == 1
    whole = bool((size[:-1] % 8 == 0).all())  # runs of 16 bytes
    if a.ndim == b.ndim == 2:
        assert (not a_rows and b_rows) or (size > 0).all(), "an empty group along the sum"
        assert (not a_rows or whole) and (b_rows or whole), "groups along the sum: 16 bytes"
    elif a.ndim == 2:
        assert a_rows or whole, "groups of rows of a column-major a: 16 bytes"
    last = a.shape[-1] if b.ndim == 2 else a.shape[0]
    assert len(ends) < 1024 and int(ends[-1]) == last, "rows that nobody writes"


CARD = Card()
STOCK_ATTENTION = F.scaled_dot_product_attention


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **how):
    """One fused call, as on a card, in place of what a CPU build does for an unknown device."""
    if not isinstance(query, OnCard):
        return STOCK_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **how)
    if torch.is_autocast_enabled("cuda"):
        kind = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(kind) for x in (query, key, value))
    assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
    if not torch.is_grad_enabled() and query.shape[2] == 1 or not how.get("enable_gqa"):
        CARD.attention[backend(query, attn_mask, how)] += 1
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    if attn_mask is None:
        return fused(query, key, value, 0.0, is_causal)[0]
    bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill(~attn_mask, -torch.inf)
    bias = bias[None, None] if bias.ndim == 2 else bias
    return fused(query, key, value, 0.0, is_causal, attn_mask=bias)[0]


def backend(query, mask, how):
    """Of FLASH, EFFICIENT and MATH the first that takes it, by sdp_utils.cpp: flash wants 16 bits
    and no mask, efficient as many heads of keys as of queries.
    """
    if mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return "flash"
    return "math" if how.get("enable_gqa") else "efficient"


def pinned(x, *args, **kwargs):
    """x in memory that the card may read by itself."""
    made = x.clone()
    made.pinned = True
    return made


class Properties:
    """Of an H100."""

    name, total_memory, multi_processor_count = "Fake H100", 80 << 30, 132
    L2_cache_size, major, minor, shared_memory_per_block_optin = 50 << 20, 9, 0, 232448


def install():
    """From here on torch says that there is a card."""
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    cuda = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.get_device_name = lambda *a: Properties.name
    cuda.get_device_capability = lambda *a: (Properties.major, Properties.minor)
    cuda.get_device_properties = lambda *a: Properties
    cuda.get_arch_list = lambda: ["sm_80", "sm_90"]
    cuda.current_device, cuda.device_count = lambda: 0, lambda: 1
    cuda.mem_get_info = lambda *a: (Properties.total_memory, Properties.total_memory)
    nothing = lambda *args, **kwargs: None
    for name in ("_lazy_init", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, nothing)
    cuda.get_rng_state = lambda *a: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *a: torch.set_rng_state(state)
    cuda.CUDAGraph, cuda.graph, cuda.Stream = Graph, capture, Stream
    cuda.stream, cuda.current_stream = lambda s: contextlib.nullcontext(), Stream
    torch.amp.autocast_mode.amp_definitely_not_available = lambda: False
    foreach._foreach_supported_types.append(OnCard)
    F.scaled_dot_product_attention = attention
    torch.Tensor.pin_memory = pinned
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # new Parameters, not .data
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device): made here, then moved
    CARD.__enter__()


def interpret():
    """Kernels run in Triton's interpreter, on what the tensors hold."""
    import triton.runtime.interpreter as interpreter

    sys.path.insert(0, str(ROOT / "tests" / "interpreted"))
    import honest

    honest.repair()
    stock = interpreter.GridExecutor.__call__

    def launch(self, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        assert all(isinstance(x, OnCard) for x in tensors), f"{self.fn.__name__}: a CPU tensor"
        CARD.launches[where(), self.fn.__name__] += 1
        with torch.no_grad():
            return stock(self, *map(real, args), **{k: real(v) for k, v in kwargs.items()})

    interpreter.GridExecutor.__call__ = launch
