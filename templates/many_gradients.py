"""Norms, clipped sums and noise of many materialised gradients at once: a launch for all of them, where each would be too small
to fill a GPU.

    flashnorm::squared_norms(Tensor[] grads) -> Tensor
    flashnorm::weighted_sums_noise(Tensor[] grads, Tensor factors, Tensor keys, Tensor std, int[] rows, ScalarType dtype)
        -> Tensor[]

    grads    K of [B, ...]  per-sample gradients, real floating-point numbers of one type, any strides
    factors  [P, B]         float32; a sample with factor 0.0 adds exactly 0, whatever it holds (NaN and Inf too)
    keys, std, rows         gradient k takes factors[rows[k]] and the noise of ``flashnorm::add_noise`` with row rows[k]
    returns  [K, B]         float32 (float64 for float64): squared norms
             K of [...]     what ``weighted_sum_noise`` gives for each, in ``dtype``

A training step has hundreds of parameters, most of them short vectors, and a launch costs as much as moving 12 MB.

Kernels. The gradients' addresses are a tuple of arguments; their sizes, and so where the chunks of each begin, are constants. A
program works on a chunk of one gradient, which a chain of K selects finds, without reading memory; a chunk has many tiles, so that
this costs little. ``squared_norms``: programs are [B, chunks]; CHUNK elements are squared and added in float32; each chunk has a
place of its own, and the last one of a norm to arrive adds all of them in their order, so that the result is deterministic.
``weighted_sums_noise``: the tiles of ``weighted_sum_noise``, the same sums and the same noise.

Legend: K gradients, B samples, P parameters of the graph.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import noise, weighted_sum
from ._triton import HAS_TRITON, KERNEL_DTYPES

CHUNK = 16384  # elements that one program squares and adds
AT_ONCE = 64  # gradients of one launch: kernels take 4 KiB of arguments on every CUDA version


@functools.cache
def _kernels() -> ModuleType | None:
    """many_triton.py, or None without Triton."""
    return importlib.import_module("flashnorm_compile.templates.many_triton") if noise.triton_kernels() else None


def _fits(grads: Sequence[Tensor]) -> bool:
    """Whether the kernels take these gradients: their indices have 32 bits."""
    limit = 2**30 * max(1, grads[0].shape[0])
    return grads[0].dtype in KERNEL_DTYPES and max(map(Tensor.numel, grads)) < limit


def _contiguous(grads: list[Tensor]) -> list[Tensor]:
    return grads if all(map(Tensor.is_contiguous, grads)) else [grad.contiguous() for grad in grads]


def squared_norms_aten(grads: list[Tensor]) -> Tensor:
    """In plain PyTorch, for every device."""
    _check(grads)
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(grad.flatten(1) if grad.dim() > 1 else grad[:, None], dim=1, dtype=wide) for grad in grads]
    return torch.stack(norms).square_()


def squared_norms_triton(grads: list[Tensor]) -> Tensor:
    """The kernel; other types than its own by ATen."""
    _check(grads)
    kernels = _kernels()
    if not kernels or not _fits(grads):
        return squared_norms_aten(grads)
    grads = _contiguous(grads)
    parts = [kernels.squared_norms(grads[begin : begin + AT_ONCE], CHUNK) for begin in range(0, len(grads), AT_ONCE)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def weighted_sums_noise_aten(
    grads: list[Tensor], factors: Tensor, keys: Tensor, std: Tensor, rows: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """One after the other, for every device."""
    _check(grads, factors, rows)
    return [
        torch.ops.flashnorm.weighted_sum_noise(grad, factors[row], keys, std, row, dtype)
        for grad, row in zip(grads, rows, strict=True)
    ]


def weighted_sums_noise_triton(
    grads: list[Tensor], factors: Tensor, keys: Tensor, std: Tensor, rows: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """The kernel; other types than its own by ATen."""
    _check(grads, factors, rows)
    kernels = _kernels()
    if not kernels or not _fits(grads):
        return weighted_sums_noise_aten(grads, factors, keys, std, rows, dtype)
    noise.check_arguments(grads[0], keys, std, min(rows))
    noise.check_arguments(grads[0], keys, std, max(rows))
    outs: list[Tensor] = []
    for begin in range(0, len(grads), AT_ONCE):
        some = _contiguous(grads[begin : begin + AT_ONCE])
        outs += kernels.weighted_sums_noise(some, factors, keys, std, rows[begin : begin + AT_ONCE], dtype)
    return outs


def _check(grads: Sequence[Tensor], factors: Tensor | None = None, rows: Sequence[int] = ()) -> None:
    first = grads[0] if grads and all(map(Tensor.dim, grads)) else None
    if first is None or len({grad.dtype for grad in grads}) > 1 or any(grad.size(0) != first.size(0) for grad in grads):
        shapes = [(grad.dtype, tuple(grad.shape)) for grad in grads]
        raise ValueError(f"flashnorm: many gradients of one type and number of samples are needed, got {shapes}.")
    if factors is not None and (
        factors.dtype is not torch.float32 or factors.dim() != 2 or factors.shape[1] != first.shape[0] or len(rows) != len(grads)
    ):
        raise ValueError(
            f"flashnorm::weighted_sums_noise got factors of dtype {factors.dtype} and shape {tuple(factors.shape)} and {len(rows)} "
            f"rows for {len(grads)} gradients of {first.shape[0]} samples; it needs float32 [P, B] and a row for each."
        )


def _fake_norms(grads: list[Tensor]) -> Tensor:
    _check(grads)
    return grads[0].new_empty((len(grads), grads[0].shape[0]), dtype=torch.promote_types(grads[0].dtype, torch.float32))


def _fake_sums(
    grads: list[Tensor], factors: Tensor, keys: Tensor, std: Tensor, rows: list[int], dtype: torch.dtype
) -> list[Tensor]:
    _check(grads, factors, rows)
    weighted_sum.check_gradients(*grads)
    return [grad.new_empty(grad.shape[1:], dtype=dtype) for grad in grads]


_library = torch.library.Library("flashnorm", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_library.define("squared_norms(Tensor[] grads) -> Tensor", tags=_PT2)
_library.define(
    "weighted_sums_noise(Tensor[] grads, Tensor factors, Tensor keys, Tensor std, int[] rows, ScalarType dtype) -> Tensor[]",
    tags=_PT2,
)
_library.impl("squared_norms", squared_norms_aten, "CompositeExplicitAutograd")
_library.impl("weighted_sums_noise", weighted_sums_noise_aten, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("squared_norms", squared_norms_triton, "CUDA")
    _library.impl("weighted_sums_noise", weighted_sums_noise_triton, "CUDA")
torch.library.register_fake("flashnorm::squared_norms", _fake_norms, lib=_library)
torch.library.register_fake("flashnorm::weighted_sums_noise", _fake_sums, lib=_library)
