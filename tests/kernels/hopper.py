"""Inductor's code for a Hopper GPU, generated on a machine that has none.

A graph is traced on the CPU, and its tensors' metadata is moved to ``cuda:0`` once it reaches Inductor, so that lowerings and code
generation see an H200. Nothing runs: compiling stops where a launch would need a driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils._triton
import triton
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._inductor import async_compile, compile_fx, graph
from torch.utils import _pytree as pytree
from torch.utils import cpp_extension
from triton.backends.compiler import GPUTarget

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=141 * 2**30,
    L2_cache_size=60 * 2**20, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip


class Generated(Exception):  # noqa: N818
    """Raised instead of running the generated code."""


@dataclass
class Output:
    """``codes``: the wrapper's source for each graph; ``kernels``: name and source of every Triton kernel."""

    codes: list[str] = field(default_factory=list)
    kernels: list[tuple[str, str]] = field(default_factory=list)


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_stream(self, index: int = 0) -> int:
        return 0


class _Interface(device_interface.CudaInterface):
    class Worker(device_interface.CudaInterface.Worker):
        get_device_properties = staticmethod(lambda device=None: H200)
        current_device = staticmethod(lambda: 0)
        set_device = staticmethod(lambda device: None)

    get_device_properties = staticmethod(lambda device=None: H200)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    is_available = staticmethod(lambda: True)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    synchronize = staticmethod(lambda *args, **kwargs: None)
    get_raw_stream = staticmethod(lambda *args: 0)
    raise_if_triton_unavailable = staticmethod(lambda *args, **kwargs: None)
    is_triton_capable = staticmethod(lambda *args, **kwargs: True)


@functools.cache
def _install_device_guard() -> None:
    """PyTorch's no-op device guard for CUDA, which a CPU build lacks: without it many operators refuse fake CUDA tensors."""
    if torch.version.cuda:
        return
    source = (
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>); }\n"
    )
    folder = Path(tempfile.mkdtemp())
    (folder / "guard.cpp").write_text(source)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", *includes, "guard.cpp", "-o", "guard.so", f"-L{libraries}", "-lc10"]
    subprocess.run(command, check=True, cwd=folder)
    ctypes.CDLL(str(folder / "guard.so"))


def _on_cuda(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type == "cuda":
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")


def _retarget(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(_on_cuda, node.meta["val"])


@contextlib.contextmanager
def hopper() -> Iterator[Output]:
    """Code for graphs without a backward that are compiled and called inside; the call ends the block."""
    _install_device_guard()
    out = Output()
    compile_inner, codegen = compile_fx._compile_fx_inner, graph.GraphLowering.codegen

    def on_compile_inner(gm: fx.GraphModule, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _retarget(gm)
        inputs = [_on_cuda(node.meta["val"]) for node in gm.graph.find_nodes(op="placeholder")]
        compile_inner(gm, inputs, *args, **kwargs)

        def stop(*_: Any) -> None:
            raise Generated

        stop._boxed_call = True  # type: ignore[attr-defined]
        return stop

    def on_codegen(self: Any) -> Any:
        result = codegen(self)
        out.codes.append(getattr(result[0], "value", result[0]))
        return result

    def on_triton(self: Any, name: str, source: str, **_: Any) -> Any:
        out.kernels.append((name, source))
        return SimpleNamespace(run=lambda *args, **kwargs: None)

    device_interface.get_registered_device_interfaces()
    _forget_devices()
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_devices)
        stack.enter_context(mock.patch.multiple(torch.cuda, **_FAKE_CUDA))
        # Dynamo would ask a CUDA build for the current stream of the device.
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", return_value=False))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True))
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, {"cuda": _Interface}))
        stack.enter_context(mock.patch.object(async_compile.AsyncCompile, "triton", on_triton))
        stack.enter_context(mock.patch.object(compile_fx, "_compile_fx_inner", on_compile_inner))
        stack.enter_context(mock.patch.object(graph.GraphLowering, "codegen", on_codegen))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(torch._inductor.config.patch(force_disable_caches=True, compile_threads=1))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver()))
        stack.enter_context(contextlib.suppress(Generated))
        yield out
    torch._dynamo.reset()


def _forget_devices() -> None:
    """Torch remembers, for the whole process, whether the devices that it once saw can run Triton."""
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _nothing(*_: Any, **__: Any) -> None:
    return None


_FAKE_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_properties": lambda *_, **__: H200,
    "get_device_capability": lambda *_, **__: (9, 0),
    "get_device_name": lambda *_, **__: H200.name,
    "synchronize": _nothing,
    "_lazy_init": _nothing,
    "_exchange_device": lambda *_: 0,
    "_maybe_exchange_device": lambda *_: 0,
    "get_rng_state": lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": _nothing,
    "memory_allocated": lambda *_, **__: 0,
    "current_stream": lambda *_, **__: SimpleNamespace(cuda_stream=0),
}
