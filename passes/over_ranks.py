"""Collectives of single samples' values, for ``torch.vmap``: what ranks reduce or join, they do for all samples at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .rules.collectives import ALL_REDUCE, GATHERS, REDUCTIONS, WAIT


class _OverRanks(torch.autograd.Function):
    """``forward(target, x, *settings)``: one functional collective, or the wait for one."""

    @staticmethod
    def forward(target: Any, x: Tensor, *settings: Any) -> Tensor:
        return target(x, *settings)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, target: Any, x: Tensor, *settings: Any) -> tuple[Tensor, int]:
        """The samples' dimension comes second where ranks cut or join dimension 0."""
        along = target not in (ALL_REDUCE, WAIT)
        x = x.movedim(in_dims[1], 1).contiguous() if along else x
        return _OverRanks.apply(target, x, *settings), 1 if along else in_dims[1]


SUBSTITUTES: dict[Any, Callable[..., Tensor]] = {
    target: partial(_OverRanks.apply, target) for target in (*GATHERS, *REDUCTIONS, WAIT)
}
"""For each collective a function of the same arguments that ``torch.vmap`` takes."""
