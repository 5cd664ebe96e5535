"""The memory that a generated wrapper allocates, by walking its code.

The walk follows names: `empty_strided_cuda` and calls that return tensors take memory, assignments and `reinterpret_tensor` share
it, and it is given back when the last name is deleted. Bytes are those asked for; the allocator's rounding and what libraries
take for themselves (cuBLAS workspaces) come on top. Only static sizes are known.
"""

from __future__ import annotations

import ast
import collections
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(eq=False)
class Storage:
    """Memory that one or several names show. `name` is the first one."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Walked:
    """What a wrapper does: memory in bytes beyond its parameters and inputs, and calls by name."""

    peak_bytes: int
    at_peak: tuple[Storage, ...]
    """What is held at the peak, the largest first."""
    allocations: tuple[Storage, ...]
    outputs: tuple[Storage | None, ...]
    """Memory of each output; None for an input that is handed back, and for what is no tensor."""
    library_calls: Mapping[str, int]
    """Calls of operators and of libraries such as cuBLAS."""
    launches: int
    """Launches of Triton kernels."""
    live_at: Mapping[str, int]
    """By library call: the most that is held when it begins."""


# Calls whose result shows the memory of their first argument (the second one hardly ever copies).
_SHARING = ("reinterpret_tensor", "copy_if_misaligned")


def walk(
    code: str,
    nbytes_of: Callable[[str], int | None],
    held: Mapping[str, Storage] | None = None,
    uncounted: Collection[str] = (),
) -> Walked:
    """Walks the function `call` of a wrapper's source.

    Args:
        code: the source of the module that Inductor generated.
        nbytes_of: size in bytes of the tensor that a call leaves in a name; None if unknown, which counts as nothing.
        held: inputs whose memory belongs to this step (what the forward pass saved), by name. It is part of the peak, and is
            given back when the code deletes the input. Other inputs are parameters and data, and count nothing.
        uncounted: first names of memory that counts nothing either.

    Raises:
        ValueError: the source has no function `call`.
    """
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    if not calls:
        raise ValueError("The generated code has no function named call, where Inductor (torch 2.13) puts what a graph runs.")
    return _Walk(calls[0], nbytes_of, held or {}, uncounted).result()


@dataclass
class _Walk:
    function: ast.FunctionDef
    nbytes_of: Callable[[str], int | None]
    held: Mapping[str, Storage]
    uncounted: Collection[str]
    names: dict[str, tuple[Storage, ...]] = field(default_factory=dict)
    references: collections.Counter[Storage] = field(default_factory=collections.Counter)
    live: int = 0
    peak: int = 0
    at_peak: list[Storage] = field(default_factory=list)
    allocations: list[Storage] = field(default_factory=list)
    library: collections.Counter[str] = field(default_factory=collections.Counter)
    launches: int = 0
    live_at: collections.Counter[str] = field(default_factory=collections.Counter)

    def result(self) -> Walked:
        statements = _in_order(self.function)
        self.elements = _elements(statements)
        outputs: tuple[Storage | None, ...] = ()
        for name, storage in self.held.items():
            self._bind(name, (storage,))
        for statement in statements:
            self._count(statement)
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                self._bind(name, self._value(name, statement.value))
            elif isinstance(statement, ast.Delete):
                for target in statement.targets:
                    if isinstance(target, ast.Name):
                        self._unbind(target.id)
            elif isinstance(statement, ast.Return) and isinstance(statement.value, (ast.Tuple, ast.List)):
                outputs = tuple(next(iter(self._value("", element)), None) for element in statement.value.elts)
        largest = sorted(self.at_peak, key=lambda storage: -storage.nbytes)
        return Walked(
            self.peak, tuple(largest), tuple(self.allocations), outputs, dict(self.library), self.launches, dict(self.live_at)
        )

    def _bind(self, name: str, storages: tuple[Storage, ...]) -> None:
        self._unbind(name)
        self.names[name] = storages
        for storage in storages:
            self.references[storage] += 1
            if self.references[storage] == 1:
                self.live += storage.nbytes
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = [storage for storage, count in self.references.items() if count]

    def _unbind(self, name: str) -> None:
        for storage in self.names.pop(name, ()):
            self.references[storage] -= 1
            if self.references[storage] == 0:
                self.live -= storage.nbytes

    def _value(self, name: str, value: ast.expr) -> tuple[Storage, ...]:
        if isinstance(value, ast.Name):
            return self.names.get(value.id, ())
        if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name) and isinstance(value.slice, ast.Constant):
            return tuple(storage for storage in self.names.get(value.value.id, ()) if storage.name == name)
        if not isinstance(value, ast.Call):
            return ()
        if isinstance(value.func, ast.Attribute) and value.func.attr == "as_strided":  # a part of what is allocated here
            return self._value(name, value.func.value)
        called = ast.unparse(value.func)
        if called in _SHARING:
            return self._value(name, value.args[0])
        if called.startswith("empty_strided"):
            return (self._allocated(name, _strided_bytes(value.args)),)
        sizes = [(part, self.nbytes_of(part)) for part in self.elements.get(name, [name])]
        return tuple(self._allocated(part, nbytes) for part, nbytes in sizes if nbytes is not None)

    def _allocated(self, name: str, nbytes: int) -> Storage:
        self.allocations.append(Storage(name, 0 if name in self.uncounted else nbytes))
        return self.allocations[-1]

    def _count(self, statement: ast.stmt) -> None:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.startswith(("extern_kernels.", "torch.ops.")):
                    self.library[called] += 1
                    self.live_at[called] = max(self.live_at[called], self.live)
                elif called.endswith(".run"):
                    self.launches += 1


def _in_order(node: ast.AST) -> list[ast.stmt]:
    """Statements in the order in which they run, those of `with` blocks included."""
    found: list[ast.stmt] = []
    for statement in getattr(node, "body", []):
        if isinstance(statement, (ast.With, ast.If)):
            found += _in_order(statement)
        else:
            found.append(statement)
    return found


def _elements(statements: Sequence[ast.stmt]) -> dict[str, list[str]]:
    """For calls that return several tensors: the names that they are unpacked into."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript(value=ast.Name(id=source), slice=ast.Constant())):
                found[source].append(name)
    return found


def _strided_bytes(args: Sequence[ast.expr]) -> int:
    sizes, strides = ast.literal_eval(args[0]), ast.literal_eval(args[1])
    return strided_bytes(sizes, strides, getattr(torch, ast.unparse(args[2]).removeprefix("torch.")))


def strided_bytes(sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes from the first to the last element of a strided tensor."""
    if math.prod(sizes) == 0:
        return 0
    return dtype.itemsize * (1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)))


def nbytes_in(lowering: Any) -> Callable[[str], int | None]:
    """Sizes of the buffers of Inductor's graph (a GraphLowering), by name."""

    def nbytes(name: str) -> int | None:
        buffer = lowering.try_get_buffer(name)
        layout: Any = getattr(buffer, "layout", None)
        if not all(hasattr(layout, name) for name in ("size", "stride", "dtype")):
            return None
        return strided_bytes([int(s) for s in layout.size], [int(s) for s in layout.stride], layout.dtype)

    return nbytes
