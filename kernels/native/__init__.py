"""Builds and loads the C++ CPU kernels.

A source file is compiled with the machine's C++ compiler when it is first used (a few seconds: plain C interface, no
PyTorch headers) and cached under `$XDG_CACHE_HOME/gated-vision-suite` by source, flags, compiler, processor and OpenMP
library: that which PyTorch has already loaded, so that both share one pool of threads.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections import defaultdict
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

SHARED = Path(__file__).resolve().parent  # headers that every source may include
KERNELS = SHARED.parent
FLAGS = (
    "-std=c++17",
    "-O2",  # as fast as -O3, for vectors are explicit, and a third sooner compiled
    "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
)

# dtype codes of the C interface (kernels/native/tensor.h)
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class NativeTensor(ctypes.Structure):
    """A view of a tensor whose last dimension is contiguous: `struct Tensor` of kernels/native/tensor.h."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("dtype", ctypes.c_int32))


def native_tensor(tensor: torch.Tensor | None) -> NativeTensor:
    """Describe `tensor` (at most five dimensions, the last contiguous; None is a null pointer) to a kernel."""
    if tensor is None:
        return NativeTensor()
    return NativeTensor(tensor.data_ptr(), tensor.stride()[:-1], DTYPE_CODES[tensor.dtype])


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in a dtype and layout that `native_tensor` can describe, without a copy where it already is."""
    if tensor.dtype not in DTYPE_CODES:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


@cache
def compiler() -> str | None:
    """Path of the C++ compiler: `$CXX`, or the first of c++, g++, clang++ that is found."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


@cache
def load_error() -> str | None:
    """Why native kernels cannot run on this machine, or None when they can."""
    if platform.system() == "Windows":
        return "native kernels are built on Linux and macOS only"
    if compiler() is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    try:
        library("native/probe.cpp")
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


def library(source: str) -> ctypes.CDLL:
    """Compile (or find in the cache) and load the kernels of `source`, a path below `kernels/`.

    Raises:
        RuntimeError: the compiler failed; the message holds its output.
    """
    with _being_built[source]:  # who needs it meanwhile waits, instead of compiling it again
        return _library(source)


def build_ahead(*sources: str) -> None:
    """Begin to compile what is not in the cache, beside whatever the program does next.

    Errors are kept for the first use of the kernels.
    """

    def build(source: str) -> None:
        with suppress(RuntimeError, OSError):
            library(source)

    if compiler() is not None:
        for source in sources:
            threading.Thread(target=build, args=(source,)).start()


_being_built: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


@cache
def _library(source: str) -> ctypes.CDLL:
    path = KERNELS / source
    headers = sorted([*SHARED.glob("*.h"), *path.parent.glob("*.h")])
    texts = [file.read_bytes() for file in (path, *headers)]
    build = " ".join([*FLAGS, _openmp_library()]).encode()
    key = hashlib.sha256(b"\0".join([*texts, build, _compiler_version(), _processor()])).hexdigest()
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gated-vision-suite"
    target = directory / f"{path.parent.name}-{key[:16]}.so"
    if not target.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _compile(path, target)
    return ctypes.CDLL(str(target))


def _compile(source: Path, target: Path) -> None:
    """Write the library beside `target` and move it there, so that processes that build at once do not collide."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        object_file, built = Path(scratch) / "kernel.o", Path(scratch) / "kernel.so"
        includes = ("-I", str(SHARED))
        _run([compiler(), *FLAGS, *includes, "-c", str(source), "-o", str(object_file)])
        _run([compiler(), "-shared", str(object_file), _openmp_library(), "-o", str(built)])
        os.replace(built, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling a native kernel failed: {' '.join(command)}\n{done.stderr[-4000:]}")


@cache
def _openmp_library() -> str:
    """The OpenMP runtime of this process's PyTorch (other packages bring their own); the compiler's where unknown."""
    maps = Path("/proc/self/maps")
    mapped = re.findall(r"/.*/lib(?:gomp|omp|iomp5)[^/\n]*\.so[^/\n]*", maps.read_text()) if maps.exists() else []
    packages = Path(torch.__file__).resolve().parent.parent  # torch/lib, or torch.libs beside it
    of_torch = [path for path in mapped if path.startswith((f"{packages}/torch/", f"{packages}/torch.libs/"))]
    return next(iter(of_torch or mapped), "-fopenmp")


def _compiler_version() -> bytes:
    return subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout


def _processor() -> bytes:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(kinds)]).encode()
