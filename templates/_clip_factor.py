"""The clip factor of a squared norm, in each form that the operators need, and the check of factors that are given.

c = scale * min(1, C / norm), or scale * C / (norm + stability) for automatic clipping; exactly 0 where the norm is not finite
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.virtualized import ops

from ._triton import jit, tl


@jit
def clip_factor(square: tl.tensor, bound: tl.tensor, scale: tl.tensor, STABILITY: tl.constexpr) -> tl.tensor:
    """In a kernel. ``STABILITY`` is the constant of automatic clipping, negative for min(1, C / norm)."""
    norm = tl.sqrt(square)
    factor = tl.minimum(bound / norm, 1.0) if STABILITY < 0 else bound / (norm + STABILITY)
    return tl.where(norm < float("inf"), factor * scale, 0.0)


def stability_code(stability: float | None) -> float:
    """What a kernel takes as ``STABILITY``."""
    return -1.0 if stability is None else float(stability)


def clip_factors(norms_sq: Tensor, max_norm: Tensor, scale: Tensor, stability: float | None) -> Tensor:
    """In PyTorch, in the type of ``norms_sq``."""
    norms = norms_sq.sqrt()
    factors = (max_norm / norms).clamp(max=1.0) if stability is None else max_norm / (norms + stability)
    return torch.where(norms.isfinite(), factors * scale, 0)


def clip_factors_in_graph(norms_sq: Any, max_norm: Any, scale: Any, stability: float | None) -> Any:
    """In Inductor's own operations, which fuse."""
    square_at, bound_at, scale_at = norms_sq.make_loader(), max_norm.make_loader(), scale.make_loader()

    def factor(index: Any) -> Any:
        norm, bound = ops.sqrt(square_at(index)), bound_at([])
        if stability is None:
            clipped = ops.minimum(ops.truediv(bound, norm), ops.constant(1.0, torch.float32))
        else:
            clipped = ops.truediv(bound, ops.add(norm, ops.constant(stability, torch.float32)))
        finite = ops.lt(norm, ops.constant(float("inf"), torch.float32))
        return ops.where(finite, ops.mul(clipped, scale_at([])), ops.constant(0.0, torch.float32))

    return ir.Pointwise.create(device=norms_sq.get_device(), dtype=torch.float32, inner_fn=factor, ranges=norms_sq.get_size())


def check_factors(name: str, factors_b: Tensor, batch: Any) -> None:
    """Refuses clip factors that are not float32 [B]."""
    if factors_b.dtype is not torch.float32 or factors_b.dim() != 1 or factors_b.shape[0] != batch:
        raise ValueError(
            f"flashnorm::{name} got factors of dtype {factors_b.dtype} and shape {tuple(factors_b.shape)} for {batch} samples; "
            "it needs float32 [B]."
        )
