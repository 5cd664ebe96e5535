"""Norms, clipped sums and noise of many materialised gradients at once: a launch for all of them, where each would be too small
to fill a GPU.

    flashnorm::norm_slots(Tensor[] grads) -> Tensor
    flashnorm::weighted_sums_noise(Tensor[] grads, Tensor factors, Tensor keys, Tensor std, int[] rows, ScalarType dtype)
        -> Tensor[]

    grads    K of [B, ...]  per-sample gradients, real floating-point numbers of one type, any strides
    factors  [P, B]         float32; a sample with factor 0.0 adds exactly 0, whatever it holds (NaN and Inf too)
    keys, std, rows         gradient k takes factors[rows[k]] and the noise of ``flashnorm::add_noise`` with row rows[k]
    returns  [K, B, slots]  float32 (float64 for float64): adding the slots gives the squared norms
             K of [...]     what ``weighted_sum_noise`` gives for each, in ``dtype``

A training step has hundreds of parameters, most of them short vectors, and a launch costs as much as moving 12 MB.

Kernels. The gradients' addresses are a tuple of arguments; their sizes, and so where the tiles of each begin, are constants. An
item is a tile of one gradient, which a chain of K selects finds, without reading memory. ``norm_slots``: items are [B, tiles];
CHUNK elements are squared and added in float32, in a fixed order, and each chunk has a slot of its own (slots that a short gradient
does not need are 0). ``weighted_sums_noise``: the tile of ``weighted_sum_noise``, the same sums and the same noise.

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
from ._triton import HAS_TRITON, KERNEL_DTYPES, ceil_div

CHUNK = 16384  # elements of a slot
AT_ONCE = 64  # gradients of one launch: kernels take 4 KiB of arguments on every CUDA version


@functools.cache
def _kernels() -> ModuleType | None:
    """many_triton.py, or None without Triton."""
    return importlib.import_module("flashnorm_compile.templates.many_triton") if noise.triton_kernels() else None


def slots_of(grads: Sequence[Tensor]) -> int:
    """Slots of the longest gradient."""
    return max([1, *(ceil_div(_size(grad), CHUNK) for grad in grads)])


def _size(grad: Tensor) -> int:
    size = 1
    for length in grad.shape[1:]:
        size *= length
    return size


def _fits(grads: Sequence[Tensor]) -> bool:
    """Whether the kernels take these gradients: their indices have 32 bits."""
    return grads[0].dtype in KERNEL_DTYPES and max(map(_size, grads)) < 2**30


def norm_slots_aten(grads: list[Tensor]) -> Tensor:
    """In plain PyTorch, for every device: each norm in the first slot."""
    _check(grads)
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    batch = grads[0].shape[0]
    out = torch.zeros((len(grads), batch, slots_of(grads)), dtype=wide, device=grads[0].device)
    for k, grad in enumerate(grads):
        flat = grad.reshape(batch, -1) if grad.numel() else grad.new_zeros(batch, 1)
        out[k, :, 0] = torch.linalg.vector_norm(flat, dim=1, dtype=wide).square()
    return out


def norm_slots_triton(grads: list[Tensor]) -> Tensor:
    """The kernel; other types than its own by ATen."""
    _check(grads)
    kernels = _kernels()
    if not kernels or not _fits(grads):
        return norm_slots_aten(grads)
    grads = [grad.contiguous() for grad in grads]
    out = torch.zeros((len(grads), grads[0].shape[0], slots_of(grads)), dtype=torch.float32, device=grads[0].device)
    for begin in range(0, len(grads), AT_ONCE):
        kernels.norm_slots(grads[begin : begin + AT_ONCE], out[begin : begin + AT_ONCE], CHUNK)
    return out


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
    for row in rows:
        noise.check_arguments(grads[0], keys, std, row)
    outs: list[Tensor] = []
    for begin in range(0, len(grads), AT_ONCE):
        some = [grad.contiguous() for grad in grads[begin : begin + AT_ONCE]]
        outs += kernels.weighted_sums_noise(some, factors, keys, std, rows[begin : begin + AT_ONCE], dtype)
    return outs


def _check(grads: Sequence[Tensor], factors: Tensor | None = None, rows: Sequence[int] = ()) -> None:
    first = grads[0] if grads else None
    if first is None or any(grad.dtype != first.dtype or grad.dim() < 1 or grad.shape[0] != first.shape[0] for grad in grads):
        shapes = [(grad.dtype, tuple(grad.shape)) for grad in grads]
        raise ValueError(f"flashnorm: many gradients of one type and number of samples are needed, got {shapes}.")
    if factors is not None and (
        factors.dtype is not torch.float32 or factors.dim() != 2 or factors.shape[1] != first.shape[0] or len(rows) != len(grads)
    ):
        raise ValueError(
            f"flashnorm::weighted_sums_noise got factors of dtype {factors.dtype} and shape {tuple(factors.shape)} and {len(rows)} "
            f"rows for {len(grads)} gradients of {first.shape[0]} samples; it needs float32 [P, B] and a row for each."
        )


def _fake_norm_slots(grads: list[Tensor]) -> Tensor:
    _check(grads)
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    return grads[0].new_empty((len(grads), grads[0].shape[0], slots_of(grads)), dtype=wide)


def _fake_sums(
    grads: list[Tensor], factors: Tensor, keys: Tensor, std: Tensor, rows: list[int], dtype: torch.dtype
) -> list[Tensor]:
    _check(grads, factors, rows)
    weighted_sum.check_gradients(*grads)
    return [grad.new_empty(grad.shape[1:], dtype=dtype) for grad in grads]


_library = torch.library.Library("flashnorm", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_library.define("norm_slots(Tensor[] grads) -> Tensor", tags=_PT2)
_library.define(
    "weighted_sums_noise(Tensor[] grads, Tensor factors, Tensor keys, Tensor std, int[] rows, ScalarType dtype) -> Tensor[]",
    tags=_PT2,
)
_library.impl("norm_slots", norm_slots_aten, "CompositeExplicitAutograd")
_library.impl("weighted_sums_noise", weighted_sums_noise_aten, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("norm_slots", norm_slots_triton, "CUDA")
    _library.impl("weighted_sums_noise", weighted_sums_noise_triton, "CUDA")
torch.library.register_fake("flashnorm::norm_slots", _fake_norm_slots, lib=_library)
torch.library.register_fake("flashnorm::weighted_sums_noise", _fake_sums, lib=_library)
