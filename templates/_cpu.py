"""Builds the C++ kernels of this folder with Inductor's own toolchain and calls them through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch._inductor.codecache import CppCodeCache

log = logging.getLogger(__name__)

# Column and row of the kernel table in noise_cpu.cpp.
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

# Inductor turns these off because generated code has to match eager bit for bit. Here no value depends on errno, and
# the vectorizer is what makes the kernel fast.
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")

NoiseKernel = Callable[[int, int, int, int, int, float, int, int, int], None]


def _cpu_name() -> str:
    """Text that differs where ``-march=native`` does: machines with unlike processors may share a cache folder."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return torch.backends.cpu.get_cpu_capability()
    return " ".join(sorted(name for name, value in capabilities().items() if value is True))


@functools.cache
def noise_kernel() -> NoiseKernel | None:
    """``flashnorm_add_noise(out, in, n, words, word_count, std, in_type, out_type, threads)``, or None without a compiler.

    Compiles on the first call on a machine (about two seconds), then loads from Inductor's cache folder, whose file
    locks make that safe for several processes. Pointers are passed as integers.
    """
    source = Path(__file__).with_name("noise_cpu.cpp").read_text(encoding="utf-8")
    try:
        library = CppCodeCache.load(f"// Processor: {_cpu_name()}\n{source}", extra_flags=_FLAGS)
    except (RuntimeError, OSError) as error:
        log.warning(
            "The C++ noise kernel could not be built (%s). Noise is drawn by a PyTorch implementation instead: as "
            "private, but about 40 times slower. Install a C++ compiler, or point CXX at one.",
            error,
        )
        return None
    function = library.flashnorm_add_noise
    function.restype = None
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_float,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
    ]
    return function
