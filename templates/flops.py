"""Floating-point operations of this project's operators, told to PyTorch: its FLOP counter counts them, and Inductor knows which of
them are worth overlapping with communication.

Only matrix products count, two for each multiplication with its addition.

Legend: B samples, T and S positions, d and p widths of a weight gradient's operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import (  # noqa: F401 - the operators
    clipped_sum,
    clipped_sums,
    convolution,
    flash_norm,
    ghost_norm,
    per_layer,
    sample_products,
    tied_cross_term,
    weight_grads,
)

Shape = tuple[int, ...]


def _weight_gradient(g_btp: Shape, a_btd: Shape, *_: Any, **__: Any) -> int:
    batch, positions, rows = g_btp
    return 2 * batch * positions * rows * a_btd[2]


def _weight_gradients(gs: Sequence[Shape], a_s: Sequence[Shape], *_: Any, **__: Any) -> int:
    return sum(map(_weight_gradient, gs, a_s))


def _ghost(g_btp: Shape, a_btd: Shape, *_: Any, **__: Any) -> int:
    """Two products of T x T, of which the half with i <= j is computed."""
    batch, positions, rows = g_btp
    return batch * positions**2 * (rows + a_btd[2])


def _norm_and_sum(g_btp: Shape, a_btd: Shape, *_: Any, **__: Any) -> int:
    """In one launch it would be half as much."""
    return 2 * _weight_gradient(g_btp, a_btd)


def _conv_weight_grads(grad: Shape, source: Shape, weight_shape: Shape, stride: Any, padding: Any, dilation: Any,
                       transposed: bool, *_: Any, **__: Any) -> int:  # fmt: skip
    return 2 * math.prod(source if transposed else grad) * math.prod(weight_shape[1:])


def _tied_cross_term(h_btd: Shape, index_bt: Shape, g_bsv: Shape, a_bsd: Shape, *_: Any, **__: Any) -> int:
    batch, positions, width = h_btd
    return 2 * batch * positions * a_bsd[1] * width


FORMULAS: Mapping[str, Callable[..., int]] = {
    "flash_norm": _weight_gradient,
    "ghost_norm": _ghost,
    "weight_grads": _weight_gradient,
    "sample_products": _weight_gradient,
    "clipped_sum": _weight_gradient,
    "clipped_sums": _weight_gradients,
    "per_layer": _norm_and_sum,
    "conv_weight_grads": _conv_weight_grads,
    "tied_cross_term": _tied_cross_term,
}
"""By operator of the namespace `flashnorm`; they take shapes in place of tensors."""

for _name, _formula in FORMULAS.items():
    _operator = getattr(torch.ops.flashnorm, _name)
    if _operator not in flop_registry:  # a module that is loaded twice registers once
        register_flop_formula(_operator)(_formula)
