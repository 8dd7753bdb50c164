"""
Compiles kernels for GPUs that are not there, and prints what the compiler made.

    python tests/compiled/aot.py ssd conv
    python tests/compiled/aot.py --small ssd      for cards whose blocks have 99 KB of shared memory

Triton's wheel carries ptxas, cuobjdump and nvdisasm: registers, spills, shared memory and the
instructions of a kernel can be read on any machine. Each kernel file has a list of rows beside this
file, ROWS in ssd.py, conv.py, ..., and SMALL, the launches of the smaller cards:

    Row(kernel, "what", types=dict(X="*bf16", T="i32"), consts=dict(BLOCK=64), warps=4, stages=2,
        wants={80: "mma.sync", 90: "wgmma", 100: "tcgen05"}, spill=0)

types name the runtime arguments: *bf16 *fp32 *i64 pointers, i32 i64 fp32 scalars; what the launch
passes is what belongs here. Integers and pointers are divisible by 16, as they are at Super's
sizes, but those named in `odd`. A row fails if a kernel spills more bytes than `spill` (a number,
or a number per card), if its shared memory or registers exceed the card's or the row's, if a
multiprocessor has no room for as many `blocks` as were meant, or if the instruction that was meant
is not the one that came out. Never in a process with TRITON_INTERPRET=1:
Triton's own library is then interpreted too.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CARDS = {
    80: ("A100", 163),
    90: ("H100", 227),
    100: ("B200", 227),
    86: ("A10", 99),  # and RTX 30
    89: ("L4", 99),  # and RTX 40
    120: ("5090", 99),
}  # sm: name, KiB of shared memory a block may have
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = dict(
    [
        ("mma.sync", r"(?<!w)\bmma\.sync"),
        ("wgmma", r"wgmma\.mma_async"),
        ("tcgen05", r"tcgen05\.mma"),
        ("block_scale", r"block_scale"),
        ("tma", r"cp\.async\.bulk\.tensor"),
        ("atomic", r"\b(?:red|atom)\."),
        ("16 bytes", r"ld\.global\S*\.v4\.b32"),
        ("8 bytes", r"ld\.global\S*\.v2\.b32"),
    ]
)


@dataclass
class Row:
    kernel: object
    what: str
    types: dict
    consts: dict = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    # sm: a name of INSTRUCTIONS that must be there, or (name, how often at least)
    wants: dict = field(default_factory=dict)
    spill: object = 0  # bytes a thread may spill, or {sm: bytes}
    regs: int = 255  # a thread's at most, where the number of warps rests on it
    shared: int | None = None  # bytes of a block at most, if fewer than the card's
    blocks: dict = field(default_factory=dict)  # sm: so many fit on a multiprocessor at once
    odd: tuple = ()  # arguments that need not be divisible by 16
    cards: tuple = (80, 90, 100)


@dataclass
class Made:
    regs: int
    stack: int  # bytes of local memory a thread: spilled registers
    shared: int
    found: dict  # instruction: how many times in the PTX
    seconds: float
    ptx: str


def make(row, sm):
    """One kernel for one card: what came out."""
    names = row.kernel.arg_names
    if unknown := {*row.types, *row.consts} ^ set(names):
        raise ValueError(
            f"{row.kernel.__name__} {row.what}: arguments without a type, or unknown: "
            f"{sorted(unknown)}"
        )
    types = {a: "constexpr" if a in row.consts else row.types[a] for a in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(names)
        if a not in row.odd and (types[a].startswith("*") or types[a] in ("i32", "i64"))
    }
    start = time.perf_counter()
    made = triton.compile(
        ASTSource(fn=row.kernel, signature=types, constexprs=row.consts, attrs=aligned),
        target=GPUTarget("cuda", sm, 32),
        options=dict(num_warps=row.warps, num_stages=row.stages, enable_fp_fusion=True),
    )
    seconds, ptx = time.perf_counter() - start, made.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = subprocess.run(
            [BIN / "cuobjdump", "--dump-resource-usage", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    regs, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    found = {
        name: len(re.findall(pattern, ptx))
        for name, pattern in INSTRUCTIONS.items()
        if re.search(pattern, ptx)
    }
    return Made(regs, stack, made.metadata.shared, found, seconds, ptx)


def faults(row, sm, made):
    """What is wrong with it, in words."""
    allowed = row.spill.get(sm, 0) if isinstance(row.spill, dict) else row.spill
    threads = 32 * row.warps
    if made.stack > allowed:
        yield f"spills {made.stack} bytes a thread, {allowed} allowed"
    if made.shared > CARDS[sm][1] * 1024:
        yield (
            f"wants {made.shared} bytes of shared memory, {CARDS[sm][0]} has {CARDS[sm][1] * 1024}"
        )
    if made.regs * threads > 65536:
        yield f"wants {made.regs * threads} registers, a multiprocessor has 65536"
    if made.regs > row.regs:
        yield f"takes {made.regs} registers a thread, {row.regs} allowed"
    if row.shared is not None and made.shared > row.shared:
        yield f"takes {made.shared} bytes of shared memory, {row.shared} allowed"
    # a multiprocessor has 1 KiB more than a block may have, and keeps 1 KiB of each block's
    fit = min(65536 // made.regs // threads, (CARDS[sm][1] + 1) * 1024 // (made.shared + 1024))
    if fit < (meant := row.blocks.get(sm, 0)):
        yield f"leaves a multiprocessor room for {fit} blocks, {meant} were meant"
    name, least = row.wants.get(sm, ""), 1
    if isinstance(name, tuple):
        name, least = name
    if name and made.found.get(name, 0) < least:
        yield f"has no {least} x {name}, only {made.found}"


def report(rows):
    """Prints the table; returns the sentences of what failed."""
    bad = []
    print(
        f"{'kernel':22} {'what':28} {'card':5} {'warps':>5} {'regs':>5} {'spill':>6} "
        f"{'shared':>9}  instructions"
    )
    for row in rows:
        for sm in row.cards:
            made = make(row, sm)
            found = " ".join(f"{name} {n}" for name, n in made.found.items()) or "-"
            print(
                f"{row.kernel.__name__:22} {row.what:28} {CARDS[sm][0]:5} {row.warps:5} "
                f"{made.regs:5}"
                f" {made.stack:4} B {made.shared / 1024:5.1f} KiB  {found}",
                flush=True,
            )
            bad += [
                f"{row.kernel.__name__} ({row.what}) on {CARDS[sm][0]} {why}"
                for why in faults(row, sm, made)
            ]
    return bad


def main(names):
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: that process interprets, it cannot compile")
    known = sorted(p.stem for p in HERE.glob("*.py") if p.stem != "aot")
    which = "SMALL" if names[:1] == ["--small"] else "ROWS"
    names = names[which == "SMALL" :]
    if strange := [n for n in names if n not in known]:
        sys.exit(f"{strange[0]}: give --small or nothing, then of {', '.join(known)} some or none")
    names = names or known
    start = time.perf_counter()
    bad = report([row for n in names for row in getattr(importlib.import_module(n), which)])
    print(
        f"{time.perf_counter() - start:.0f} s; registers and spills are per thread, shared "
        f"memory per block"
    )
    for line in bad:
        print("FAULT", line)
    sys.exit(bool(bad))


if __name__ == "__main__":
    sys.modules["aot"] = sys.modules["__main__"]  # the rows say `from aot import Row`: the same Row
    main(sys.argv[1:])
