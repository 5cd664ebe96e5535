"""Triton kernels of ``many_gradients``: tuples of addresses, with their sizes as constants."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for

from . import _compat
from ._triton import ceil_div
from .noise_triton import PHILOX, TILE, NoiseTile, sum_tile

WARPS = 4
# Choosing one of 30 gradients takes the time of 8 elements' noise in each thread, which here draws that of 64.
TILES = 8


@triton.jit
def pick(
    addresses: tl.tensor, targets: tl.tensor, tile: tl.tensor,
    STARTS: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(row, address, target, first tile, size) of the gradient that ``tile`` belongs to.

    One loop for all of them: what a comparison gives is used at once, and its register is free again.
    """
    row = tile * 0 + ROWS[0]
    address = addresses[0].to(tl.int64)
    target = targets[0].to(tl.int64)
    first = tile * 0
    size = tile * 0 + SIZES[0]
    for k in tl.static_range(1, COUNT):
        begun = tile >= STARTS[k]
        row = tl.where(begun, ROWS[k], row)
        address = tl.where(begun, addresses[k].to(tl.int64), address)
        target = tl.where(begun, targets[k].to(tl.int64), target)
        first = tl.where(begun, STARTS[k], first)
        size = tl.where(begun, SIZES[k], size)
    return row, address, target, first, size


@triton.jit
def squared_norms_kernel(
    grads: tl.tensor, out_ptr: tl.tensor, partials: tl.tensor, counters: tl.tensor, batch: tl.tensor, slots: tl.tensor,
    STARTS: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``out`` [rows, B]. ``partials`` [rows, B, slots] may hold anything; ``counters`` int32 [rows, B] are zero before and
    after. ``EVEN``: all addresses are multiples of 16 bytes, all sizes of 8."""
    lane = tl.arange(0, BLOCK)
    b, tile = tl.program_id(0) // STARTS[COUNT], tl.program_id(0) % STARTS[COUNT]
    number, address, _, first, size = pick(grads, grads, tile, STARTS, SIZES, ROWS, COUNT)
    sample = address.to(grads[0].dtype) + tl.cast(b, tl.int64) * size
    chunks = (size + CHUNK - 1) // CHUNK
    if EVEN:
        sample, size = tl.multiple_of(sample, 16), tl.multiple_of(size, 8)
    start = (tile - first) * CHUNK
    total = tl.zeros((BLOCK,), tl.float32)
    # Four blocks' loads are in flight at a time.
    for offset in tl.range(0, tl.minimum(CHUNK, size - start), BLOCK, loop_unroll_factor=4):
        element = start + offset + lane
        value = tl.load(sample + element, mask=element < size, other=0.0).to(tl.float32)
        total += value * value
    place = tl.cast(number, tl.int64) * batch + b
    tl.store(partials + place * slots + (tile - first), tl.sum(total))
    # All stores of this program come before its arrival, and the last arrival before the loads below.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu")
    if arrived == chunks - 1:
        tl.store(counters + place, 0)
        total = tl.zeros((BLOCK,), tl.float32)
        for offset in tl.range(0, chunks, BLOCK):
            at = partials + place * slots + offset + lane
            total += tl.load(at, mask=offset + lane < chunks, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr + place, tl.sum(total))


@triton.jit
def weighted_sums_noise_kernel(
    outs: tl.tensor, grads: tl.tensor, factors_ptr: tl.tensor, keys_ptr: tl.tensor, std_ptr: tl.tensor,
    factor_row: tl.tensor, factor_stride: tl.tensor, key_stride: tl.tensor, word_stride: tl.tensor, batch: tl.tensor,
    STARTS: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, COUNTERS: tl.constexpr, GENERATOR: tl.constexpr,
) -> None:  # fmt: skip
    """``weighted_sum_noise_kernel`` for COUNT gradients (tuples ``outs`` and ``grads``); gradient k takes the factors and keys of
    row ROWS[k]. A program sums TILES tiles of one gradient. ``EVEN``: all addresses are multiples of 16 bytes, all sizes of 8."""
    ELEMENTS: tl.constexpr = 4 * COUNTERS
    std = tl.load(std_ptr)
    chunk = tl.program_id(0)
    row, address, target, first, size = pick(grads, outs, chunk, STARTS, SIZES, ROWS, COUNT)
    out, grad = target.to(outs[0].dtype), address.to(grads[0].dtype)
    if EVEN:
        out, grad, size = tl.multiple_of(out, 16), tl.multiple_of(grad, 16), tl.multiple_of(size, 8)
    size = tl.cast(size, tl.int64)
    begin = tl.cast(chunk - first, tl.int64) * (TILES * ELEMENTS)
    for start in tl.range(begin, tl.minimum(begin + TILES * ELEMENTS, size), ELEMENTS):
        sum_tile(
            out, grad, factors_ptr + row * factor_row, keys_ptr + row * key_stride, word_stride, std, start, factor_stride, batch,
            size, size, PARTS, COUNTERS, GENERATOR,
        )  # fmt: skip


def block_of(dtype: torch.dtype) -> int:
    """Elements of which each thread of a program loads 16 bytes."""
    return 32 * WARPS * 16 // dtype.itemsize


def squared_norms(grads: Sequence[Tensor], chunk: int, block: int | None = None) -> Tensor:
    """float32 [K, B], in one launch; all gradients contiguous. ``chunk`` elements are added by one program."""
    forms, batch, device = forms_of(tuple([grad.shape for grad in grads])), grads[0].shape[0], grads[0].device
    starts = _starts(forms.sizes, chunk)
    slots = max(1, ceil_div(forms.largest, chunk))
    out = torch.zeros((len(grads), batch), dtype=torch.float32, device=device)
    partials = torch.empty((len(grads), batch, slots), dtype=torch.float32, device=device)
    counters = torch.zeros((len(grads), batch), dtype=torch.int32, device=device)
    if batch * starts[-1]:
        squared_norms_kernel[(batch * starts[-1],)](
            tuple(grads), out, partials, counters, batch, slots, STARTS=starts, SIZES=forms.sizes, ROWS=_numbers(len(grads)),
            COUNT=len(grads), CHUNK=chunk, BLOCK=block or block_of(grads[0].dtype), EVEN=forms.even and _aligned(grads),
            num_warps=WARPS,
        )  # fmt: skip
    return out


def weighted_sums_noise(
    grads: Sequence[Tensor], factors: Tensor, keys: Tensor, std: Tensor, rows: Sequence[int], dtype: torch.dtype, *,
    tile: NoiseTile = TILE, generator: str = PHILOX.value,
) -> list[Tensor]:  # fmt: skip
    """``flashnorm::weighted_sums_noise`` in one launch; all gradients contiguous."""
    forms = forms_of(tuple([grad.shape for grad in grads]))
    starts = _starts(forms.sizes, 4 * tile.counters * TILES)
    outs = _compat.many_empty(forms.shapes, forms.strides, dtype, factors.device)
    if starts[-1]:
        weighted_sums_noise_kernel[(starts[-1],)](
            tuple(outs), tuple(grads), factors, keys, std, *factors.stride(), *keys.stride(), grads[0].shape[0],
            STARTS=starts, SIZES=forms.sizes, ROWS=tuple(rows), COUNT=len(outs), EVEN=forms.even and _aligned(grads),
            TILES=TILES, PARTS=keys.shape[1] == 5, COUNTERS=tile.counters, GENERATOR=generator, num_warps=WARPS,
        )  # fmt: skip
    return outs


@dataclass(frozen=True)
class Forms:
    """Of one sample's gradients: shapes, contiguous strides, and elements; ``even``: all sizes are multiples of 8."""

    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    largest: int
    even: bool


@functools.lru_cache(maxsize=4096)
def forms_of(shapes: tuple[torch.Size, ...]) -> Forms:
    """Of gradients [B, ...]. A step calls with the same shapes as the one before, and the device may be waiting for its calls."""
    own = tuple(tuple(shape[1:]) for shape in shapes)
    sizes = tuple(math.prod(shape) for shape in own)
    strides = tuple(tuple(make_contiguous_strides_for(shape)) for shape in own)
    return Forms(own, strides, sizes, max(sizes), all(size % 8 == 0 for size in sizes))


@functools.lru_cache(maxsize=4096)
def _starts(sizes: tuple[int, ...], tile: int) -> tuple[int, ...]:
    return tiles_of(sizes, tile)


@functools.cache
def _numbers(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def tiles_of(sizes: Sequence[int], tile: int) -> tuple[int, ...]:
    """Where each gradient's tiles begin, and how many there are."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + ceil_div(size, tile))
    return tuple(starts)


def _aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether loads of 16 bytes fit the first element of every tensor."""
    return not any(address % 16 for address in map(Tensor.data_ptr, tensors))
