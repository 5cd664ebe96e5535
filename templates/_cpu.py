"""Builds the C++ kernels of this folder with Inductor's own toolchain and calls them through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor.codecache import CppCodeCache

log = logging.getLogger(__name__)

# Column and row of the kernel table in noise_cpu.cpp.
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

# Inductor turns these off because generated code has to match eager bit for bit. Here no value depends on errno, and
# the vectorizer is what makes the kernel fast.
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")

# The processor's widest vectors, which GCC leaves aside by default: noise then costs a sixth less.
_WIDE_VECTORS = ("-mprefer-vector-width=512",) if platform.machine().lower() in ("x86_64", "amd64") else ()

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "noise_cpu.cpp": {
        "flashnorm_add_noise": (_POINTER, _POINTER, _SIZE, _POINTER, _INT, _FLOAT, _INT, _INT, _INT),
        "flashnorm_weighted_sum_noise": (
            _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _INT, _FLOAT, _INT, _INT, _INT,
        ),
    },
    "ghost_cpu.cpp": {"flashnorm_ghost_norm": (_POINTER, _POINTER, _POINTER, *[_SIZE] * 8, _INT)},
}  # fmt: skip
_WITHOUT = {
    "noise_cpu.cpp": "Noise is drawn by a PyTorch implementation instead: as private, but about 40 times slower.",
    "ghost_cpu.cpp": "Ghost norms are computed by PyTorch instead: as exact, but two to five times slower.",
}


@dataclass(frozen=True)
class NoiseKernels:
    """The functions of noise_cpu.cpp; pointers are passed as integers.

    ``add_noise(out, in, n, words, count, std, in_type, out_type, threads)``
    ``weighted_sum_noise(out, w, batch, stride, factors, n, words, count, std, in_type, out_type, threads)``
    """

    add_noise: Callable[..., None]
    weighted_sum_noise: Callable[..., None]


def _cpu_name() -> str:
    """Text that differs where ``-march=native`` does: machines with unlike processors may share a cache folder."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return torch.backends.cpu.get_cpu_capability()
    return " ".join(sorted(name for name, value in capabilities().items() if value is True))


@functools.cache
def noise_kernels() -> NoiseKernels | None:
    """The C++ kernels for noise, or None without a compiler."""
    functions = _built("noise_cpu.cpp")
    return NoiseKernels(*functions) if functions else None


@functools.cache
def ghost_norm_kernel() -> Callable[..., None] | None:
    """The function of ghost_cpu.cpp, or None without a compiler; pointers are passed as integers.

    ``ghost_norm(g, a, out, batch, length, p, d, g_batch, g_row, a_batch, a_row, threads)``
    """
    functions = _built("ghost_cpu.cpp")
    return functions[0] if functions else None


def _built(name: str, *flags: str) -> list[Callable[..., None]] | None:
    """The functions of one file, compiled with further ``flags``.

    Compiles on the first call on a machine (about two seconds), then loads from Inductor's cache folder, whose file
    locks make that safe for several processes.
    """
    source = Path(__file__).with_name(name).read_text(encoding="utf-8")
    try:
        library = CppCodeCache.load(f"// Processor: {_cpu_name()}\n{source}", extra_flags=(*_FLAGS, *_WIDE_VECTORS, *flags))
    except (RuntimeError, OSError) as error:
        log.warning(
            "The C++ kernels of %s could not be built (%s). %s Install a C++ compiler, or point CXX at one.",
            name, error, _WITHOUT[name],
        )  # fmt: skip
        return None
    functions = [getattr(library, function) for function in _SIGNATURES[name]]
    for function, signature in zip(functions, _SIGNATURES[name].values(), strict=True):
        function.restype, function.argtypes = None, signature
    return functions
