"""Records for the demo: every top-level function and class of this Python's standard library, as bytes."""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.byte_gpt import PADDING

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
"""Folders that are not the library, or that only some distributions of Python install."""

HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Records:
    """Two sets of records, each int64 [number of records, length], padded at the end. No file is in both."""

    train: Tensor
    held_out: Tensor
    files: int


def load_records(length: int) -> Records:
    """Reads the standard library's source; a record longer than `length` keeps its first `length` bytes."""
    train: list[bytes] = []
    held_out: list[bytes] = []
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if LEFT_OUT.isdisjoint(path.relative_to(root).parts)]
    for path in paths:
        kept = held_out if _is_held_out(path.relative_to(root)) else train
        kept.extend(definition[:length] for definition in _definitions(path.read_bytes()))
    return Records(_as_tensor(train, length), _as_tensor(held_out, length), len(paths))


def _is_held_out(path: Path) -> bool:
    """Splits by the file's name, so that the split does not depend on what else is installed."""
    return hashlib.sha256(path.as_posix().encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def _definitions(source: bytes) -> Iterator[bytes]:
    """The source of each top-level function and class, without its decorators; nothing for a file with errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines(keepends=True)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield b"".join(lines[node.lineno - 1 : node.end_lineno])


def _as_tensor(records: list[bytes], length: int) -> Tensor:
    padded = b"".join(record.ljust(length, bytes([PADDING])) for record in records)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(len(records), length).long()
