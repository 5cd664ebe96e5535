"""A Hopper GPU that is not there: what PyTorch, Inductor and Triton are told about it, and how they are kept from using it.

All private names of torch and triton that code generation needs are in this file and in `generate.py`. Checked with torch 2.13
and triton 3.7, on a CPU build and without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch._dynamo import device_interface
from torch._inductor.runtime.hints import DeviceProperties
from torch.utils import cpp_extension
from triton.backends.compiler import GPUTarget

CUDA = torch.device("cuda", 0)


def _hopper(name: str, multiprocessors: int, gibibytes: int, l2_mebibytes: int, **others: int) -> types.SimpleNamespace:
    """Limits of compute capability 9.0: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"."""
    properties = types.SimpleNamespace(
        name=name,
        major=9,
        minor=0,
        multi_processor_count=multiprocessors,
        warp_size=32,
        total_memory=gibibytes * 2**30,
        L2_cache_size=l2_mebibytes * 2**20,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        gcnArchName="",
        clock_rate=1_980_000,
        memory_clock_rate=3_201_000,
        memory_bus_width=6144,
    )
    vars(properties).update(others)
    return properties


# What capability 8.0 has less of (the same table), and the A100's clocks (NVIDIA A100 whitepaper).
_AMPERE = {
    "major": 8,
    "shared_memory_per_block_optin": 166912,
    "shared_memory_per_multiprocessor": 167936,
    "clock_rate": 1_410_000,
    "memory_clock_rate": 1_593_000,
    "memory_bus_width": 5120,
}
# NVIDIA's datasheets and the whitepapers of H100 (SXM5: 132 multiprocessors, 50 MB of L2) and A100 (108, 40 MB). Memory is what a
# program may use of it.
PROPERTIES: Mapping[str, types.SimpleNamespace] = {
    "H200": _hopper("NVIDIA H200", 132, 139, 50),
    "H100": _hopper("NVIDIA H100 80GB HBM3", 132, 79, 50),
    "A100": _hopper("NVIDIA A100-SXM4-80GB", 108, 79, 40, **_AMPERE),
}


@contextlib.contextmanager
def pretended_device(name: str = "H200", count: int = 1) -> Iterator[types.SimpleNamespace]:
    """PyTorch, Inductor and Triton see `count` CUDA devices of that name; launching anything on them fails.

    What the libraries remember about devices is forgotten before and after. The one thing that stays is a device guard for
    CUDA that does nothing, where this build of PyTorch has none.

    Raises:
        KeyError: the name is not in PROPERTIES.
        RuntimeError: this machine has a GPU, whose properties would get mixed up with the pretended ones; or g++ is missing.
    """
    properties = PROPERTIES[name]
    if torch.cuda.is_available():
        raise RuntimeError(f"pretended_device({name!r}) is for machines without a GPU, but torch.cuda.is_available() is True.")
    install_device_guard()
    device_interface.get_registered_device_interfaces()
    before = triton.runtime.driver._active
    _forget()
    with contextlib.ExitStack() as stack:
        for attribute, value in _cuda_module(properties, count).items():
            stack.enter_context(mock.patch.object(torch.cuda, attribute, value))
        # Dynamo would ask a CUDA build for the current stream of the device.
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", return_value=False))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0))
        stack.enter_context(mock.patch.object(torch._utils_internal, "max_clock_rate", return_value=properties.clock_rate // 1000))
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, {"cuda": _interface(properties)}))
        triton.runtime.driver.set_active(_Driver(properties))
        try:
            yield properties
        finally:
            triton.runtime.driver._active = before
            _forget()


class _Driver:
    """Triton's driver, as far as code generation and Inductor's estimates of run times ask it."""

    def __init__(self, properties: types.SimpleNamespace) -> None:
        told = {
            "max_shared_mem": properties.shared_memory_per_block_optin,
            "multiprocessor_count": properties.multi_processor_count,
            "sm_clock_rate": properties.clock_rate,
            "mem_clock_rate": properties.memory_clock_rate,
            "mem_bus_width": properties.memory_bus_width,
        }
        self.target = GPUTarget("cuda", 10 * properties.major + properties.minor, properties.warp_size)
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: told)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_current_stream(self, index: int = 0) -> int:
        return 0


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _cuda_module(properties: types.SimpleNamespace, count: int) -> dict[str, Any]:
    """What functions of `torch.cuda` answer."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "can_device_access_peer": lambda *a, **k: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda *a, **k: properties,
        "get_device_capability": lambda *a, **k: (properties.major, properties.minor),
        "get_device_name": lambda *a, **k: properties.name,
        "is_bf16_supported": lambda *a, **k: True,
        "synchronize": _nothing,
        "_lazy_init": _nothing,
        "_exchange_device": lambda *a: 0,
        "_maybe_exchange_device": lambda *a: 0,
        "memory_allocated": lambda *a, **k: 0,
        "get_rng_state": lambda *a, **k: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": _nothing,
        "current_stream": lambda *a, **k: types.SimpleNamespace(cuda_stream=0),
    }


def _interface(properties: types.SimpleNamespace) -> type[device_interface.CudaInterface]:
    """Dynamo's and Inductor's view of CUDA."""
    shared = {
        "get_device_properties": staticmethod(lambda device=None: properties),
        "current_device": staticmethod(lambda: 0),
        "set_device": staticmethod(_nothing),
    }
    worker = type("Worker", (device_interface.CudaInterface.Worker,), dict(shared))
    members = {
        **shared,
        "Worker": worker,
        "is_available": staticmethod(lambda: True),
        "get_compute_capability": staticmethod(lambda device=None: 10 * properties.major + properties.minor),
        "is_bf16_supported": staticmethod(lambda including_emulation=False: True),
        "synchronize": staticmethod(_nothing),
        "get_raw_stream": staticmethod(lambda *args: 0),
        "raise_if_triton_unavailable": staticmethod(_nothing),
        "is_triton_capable": staticmethod(lambda *args, **kwargs: True),
    }
    return type("PretendedCuda", (device_interface.CudaInterface,), members)


_REMEMBERING = (
    "torch.utils._triton",
    "torch._inductor.utils",
    "torch._inductor.comm_analysis",
    "flashnorm_compile.templates",
    "flashnorm_compile.passes.peaks",
)


def _forget() -> None:
    """Clears every `functools` cache of the modules that look at devices."""
    for name, module in list(sys.modules.items()):
        if name in _REMEMBERING or name.startswith("flashnorm_compile.templates."):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    DeviceProperties.create.cache_clear()  # type: ignore[attr-defined]


_GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>); }
"""


@functools.cache
def install_device_guard() -> None:
    """Registers torch's own no-op device guard for CUDA, without which many operators refuse fake CUDA tensors on a CPU build."""
    if torch.version.cuda:
        return
    if shutil.which("g++") is None:
        raise RuntimeError("Generating code for a GPU with a CPU build of PyTorch needs g++, for a device guard of two lines.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "guard.cpp").write_text(_GUARD)
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10"]
        command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", *includes, "guard.cpp", "-o", "guard.so", *libraries]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ could not build the device guard:\n{done.stderr}")
        ctypes.CDLL(str(Path(folder) / "guard.so"))
