"""Triton kernels without a GPU: run by Triton's interpreter on poisoned operands, or compiled for one and inspected."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from flashnorm_compile.templates._triton import AMPERE, HOPPER, Device
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}
# How an operand [B, T, w] lies in memory, and whether a descriptor can say it.
FORMS = ("contiguous", "transposed", "padded", "odd rows", "every other column", "same for all samples")


def operand(sizes: Sequence[int], dtype: torch.dtype, form: str) -> Tensor:
    """A random [B, T, w] inside a larger block of NaN: reading anything that is not the operand's shows."""
    batch, length, width = sizes
    wide = -(-max(width, 1) // 8) * 8
    block = {
        "contiguous": (batch, length, width),
        "transposed": (batch, width, -(-max(length, 1) // 8) * 8),
        "padded": (batch, length + 1, wide + 8),
        "odd rows": (batch, length + 1, wide + 3),
        "every other column": (batch, length, 2 * width + 1),
        "same for all samples": (1, length, width),
    }[form]
    guard = 64
    memory = torch.full((int(np.prod(block)) + 2 * guard,), float("nan"), dtype=dtype)
    whole = memory[guard : memory.numel() - guard].view(block)
    view = {
        "contiguous": lambda: whole,
        "transposed": lambda: whole.mT[:, :length],
        "padded": lambda: whole[:, :length, :width],
        "odd rows": lambda: whole[:, :length, :width],
        "every other column": lambda: whole[:, :, : 2 * width : 2],
        "same for all samples": lambda: whole.expand(batch, -1, -1),
    }[form]()
    source = view[:1] if form == "same for all samples" else view
    source.copy_(torch.randn(source.shape))
    return view


def on_device(x_btw: Tensor) -> Tensor:
    """The same values and strides on a GPU, inside of a block of NaN as well."""
    own = x_btw if x_btw.stride(0) else x_btw[:1]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True)) if own.numel() else 0
    block = torch.full((extent + 64,), float("nan"), dtype=x_btw.dtype, device="cuda")
    return block.as_strided(own.shape, own.stride()).copy_(own).expand(x_btw.shape)


def poisoned(*sizes: int) -> Tensor:
    return torch.full(sizes, float("nan"))


def _dot(builder: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    """The interpreter multiplies the bit patterns of bfloat16 as integers; this multiplies what they stand for."""

    def numbers(x: Any) -> Any:
        is_bf16 = x.dtype.scalar == tl.bfloat16
        return (x.data.astype(np.uint32) << 16).view(np.float32) if is_bf16 else x.data.astype(np.float32)

    return interpreter.TensorHandle(np.matmul(numbers(a), numbers(b)) + d.data, d.dtype.scalar)


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    """Calls between ``@triton.jit`` functions run as Python.

    TRITON_INTERPRET works only if it is set before Triton is imported, which other tests of the same process may have done.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _rewritten(self)(*args, **kwargs)

    patched = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        with (
            mock.patch.object(JITFunction, "__call__", call),
            mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
        ):
            yield
    finally:
        patched.restore()


def _rewritten(kernel: Any) -> Any:
    return interpreter.InterpretedFunction(kernel.fn).rewrite()


def interpret(kernel: Any, order: Sequence[int], *args: Any, **constants: Any) -> None:
    """Runs a ``@triton.jit`` kernel on CPU tensors, one program after the other in ``order`` (a permutation of their numbers)."""
    given = inspect.getcallargs(kernel.fn, *args, **constants)
    fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    with _interpreted():
        run = _rewritten(kernel)
        values = {name: value if name in fixed else interpreter._implicit_cvt(value) for name, value in given.items()}
        interpreter.interpreter_builder.set_grid_dim(len(order), 1, 1)
        for program in order:
            interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
            run(**values)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel: registers of a thread, bytes of shared memory, bytes of stack (spills), and its PTX."""

    registers: int
    shared: int
    stack: int
    ptx: str

    @property
    def bulk_copies(self) -> int:
        return self.ptx.count("cp.async.bulk.tensor")

    @property
    def wgmma(self) -> int:
        return self.ptx.count("wgmma.mma_async")

    @property
    def mma(self) -> int:
        return self.ptx.count("mma.sync")


def device_of_capability(capability: int) -> Device:
    return {90: HOPPER, 80: AMPERE}[capability]


def compile_kernel(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], capability: int, num_warps: int, num_stages: int
) -> Compiled:
    """``signature``: Triton's names of types. Pointers, lengths and row strides count as multiples of 16, as they mostly are."""
    names = [parameter.name for parameter in kernel.params]
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name.endswith(("stride_b", "stride_t", "length"))
    }
    return compile_source(ASTSource(kernel, types, dict(constants), attributes), capability, num_warps, num_stages)


def compile_source(source: Any, capability: int, num_warps: int, num_stages: int) -> Compiled:
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(_cuobjdump()), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, _, local = map(int, found.groups())
    return Compiled(registers, made.metadata.shared, stack + local, made.asm["ptx"])


@functools.cache
def _cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
