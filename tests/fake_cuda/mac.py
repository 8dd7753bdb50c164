"""
Apple's MPS on a machine without one: card.py's tensors, which say mps:0 and hold the CPU's numbers.

What Apple's device would refuse is refused:

    an operation without an MPS kernel   by PyTorch's own list, which its wheels bring along
                                         (torchgen's native_functions.yaml)
    numbers that Metal does not have     fp64, float8, complex fp64
    an operation of tensors here and there

Not here  what MPS computes, and how fast; an operation that is made of others on every device may
          meet one of them that is missing
"""

import re
from functools import cache
from pathlib import Path

import card
import torch
from card import CPU, THERE, OnCard

LACKING = {torch.float64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2}
EVERYWHERE = ("MPS", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
COPIES = "aten::_to_copy", "aten::copy_"


@cache
def kernels():
    """Name of an operation -> whether PyTorch has it on MPS."""
    import torchgen

    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    own, whose = {}, {}
    for entry in re.split(r"^- func: ", path.read_text(), flags=re.M)[1:]:
        name = f"aten::{entry.partition('(')[0]}"
        lines = re.findall(r"^    ([\w, ]+): \w+", entry, re.M)
        own[name] = "dispatch:" not in entry or any(k in s for s in lines for k in EVERYWHERE)
        if delegate := re.search(r"^  structured_delegate: (\S+)", entry, re.M):
            whose[name] = f"aten::{delegate[1]}"
    return own | {name: own[other] for name, other in whose.items()}


class Mac(card.Card):
    """Runs every operation that meets the device, or says why there it could not."""

    def run(self, op, args, kwargs):
        out = super().run(op, args, kwargs)
        for x in card.flat(out):
            if isinstance(x, OnCard) and x.dtype in LACKING:
                kind = str(x.dtype).removeprefix("torch.")
                raise TypeError(f"Cannot convert a MPS Tensor to {kind} dtype: {card.where()}")
        return out

    def rules(self, op, args, kwargs, leaves):
        name, overload = op._schema.name, op._schema.overload_name
        if name == "aten::_local_scalar_dense":
            return CPU
        if not kernels().get(f"{name}.{overload}".rstrip("."), True):
            raise NotImplementedError(
                f"The operator '{name}' is not currently implemented for the MPS device: "
                f"{card.where()}"
            )
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        there = [isinstance(x, OnCard) for x in tensors]
        if name in COPIES:
            asked = [x for x in leaves if isinstance(x, torch.device)]
            return asked[0] if asked else THERE if there[0] else CPU
        if any(x.ndim for x, far in zip(tensors, there) if not far):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"mps:0 and cpu: {op} at {card.where()}"
            )
        return THERE


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **how):
    """One operation after the other, where a CPU build has no answer for this device."""
    if not isinstance(query, OnCard):
        return card.STOCK_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **how)
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, None, **how)[0]


def install():
    """From here on torch says that it runs on a Mac."""
    card.CARD = Mac()
    torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # new Parameters, not .data
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device): made here, then moved
    card.foreach._foreach_supported_types.append(OnCard)
    card.CARD.__enter__()
