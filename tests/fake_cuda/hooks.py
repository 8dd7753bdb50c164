"""
Makes a CPU build of torch believe that there is a CUDA card: compiles hooks.cpp, and loads it
before anybody imports torch.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def torchs():
    """torch's folder, found without importing it."""
    return Path(importlib.util.find_spec("torch").origin).parent


def lacking():
    """Why there can be no fake card here; empty if there can."""
    if sys.platform != "linux":
        return f"the fake card is built for Linux, this is {sys.platform}"
    if (torchs() / "lib" / "libtorch_cuda.so").exists():
        return "this torch has CUDA of its own; the fake card stands in for it on a CPU build"
    return "" if shutil.which("g++") else "the fake card needs a C++ compiler, g++: there is none"


def build(folder):
    """hooks.cpp -> a library in folder, by g++."""
    library, torch = Path(folder) / "libfakecuda.so", torchs()
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-w"]
    command += [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    command += [HERE / "hooks.cpp", "-o", library, f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


def load(library):
    """Before torch: its first question then finds these answers."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: start pytest with -p hooks")
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torchs() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
