"""Launches ``kernel[grid](...)`` of the library itself in Triton's interpreter, on CPU tensors and on memory that holds NaN."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from helpers import interpret
from torch import Tensor
from triton.runtime.jit import JITFunction

_COMPILER_OPTIONS = ("num_warps", "num_stages")


@contextlib.contextmanager
def interpreted_launches(seed: int = 0) -> Iterator[None]:
    """Programs run in a shuffled order, since a GPU promises none; ``torch.empty`` gives NaN."""
    shuffle = random.Random(seed).shuffle

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        order = list(range(grid[0]))
        shuffle(order)
        interpret(self, order, *args, **{name: value for name, value in constants.items() if name not in _COMPILER_OPTIONS})

    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.dtype.is_floating_point else made

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(torch, "empty", poisoned):
        yield
