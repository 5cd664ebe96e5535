"""Triton kernels of ``many_gradients``: tuples of addresses, with their sizes as constants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import ceil_div
from .noise_triton import PHILOX, NoiseTile, programs_of, sum_tile

# A tile of ``weighted_sum_noise`` would spill here (float32, sm_90): the chosen addresses take registers as well.
TILE = NoiseTile(counters=128)


@triton.jit
def pick(addresses: tl.tensor, tile: tl.tensor, STARTS: tl.constexpr, SIZES: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """(number, address, first tile, size) of the gradient that ``tile`` belongs to."""
    number = tile * 0
    address = addresses[0].to(tl.int64)
    first = tile * 0
    size = tile * 0 + SIZES[0]
    for k in tl.static_range(1, COUNT):
        begun = tile >= STARTS[k]
        number = tl.where(begun, k, number)
        address = tl.where(begun, addresses[k].to(tl.int64), address)
        first = tl.where(begun, STARTS[k], first)
        size = tl.where(begun, SIZES[k], size)
    return number, address, first, size


@triton.jit
def norm_slots_kernel(
    grads: tl.tensor, out_ptr: tl.tensor, batch: tl.tensor, slots: tl.tensor,
    STARTS: tl.constexpr, SIZES: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``out`` [COUNT, B, slots], which holds zeros. ``EVEN``: all addresses and sizes are multiples of 16."""
    for item in tl.range(tl.program_id(0), batch * STARTS[COUNT], tl.num_programs(0)):
        b, tile = item // STARTS[COUNT], item % STARTS[COUNT]
        number, address, first, size = pick(grads, tile, STARTS, SIZES, COUNT)
        sample = address.to(grads[0].dtype) + tl.cast(b, tl.int64) * size
        if EVEN:
            sample, size = tl.multiple_of(sample, 16), tl.multiple_of(size, 16)
        start = (tile - first) * CHUNK
        total = tl.zeros((BLOCK,), tl.float32)
        for offset in tl.range(0, CHUNK, BLOCK):
            element = start + offset + tl.arange(0, BLOCK)
            value = tl.load(sample + element, mask=element < size, other=0.0).to(tl.float32)
            total += value * value
        tl.store(out_ptr + (tl.cast(number, tl.int64) * batch + b) * slots + (tile - first), tl.sum(total))


@triton.jit
def weighted_sums_noise_kernel(
    outs: tl.tensor, grads: tl.tensor, factors_ptr: tl.tensor, keys_ptr: tl.tensor, std_ptr: tl.tensor,
    factor_row: tl.tensor, factor_stride: tl.tensor, key_stride: tl.tensor, word_stride: tl.tensor, batch: tl.tensor,
    STARTS: tl.constexpr, SIZES: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, COUNTERS: tl.constexpr, GENERATOR: tl.constexpr,
) -> None:  # fmt: skip
    """``weighted_sum_noise_kernel`` for COUNT gradients (tuples ``outs`` and ``grads``); gradient k takes the factors and keys of
    row ROWS[k]. ``EVEN``: all addresses and sizes are multiples of 16."""
    std = tl.load(std_ptr)
    for tile in tl.range(tl.program_id(0), STARTS[COUNT], tl.num_programs(0)):
        number, address, first, size = pick(grads, tile, STARTS, SIZES, COUNT)
        _, target, _, _ = pick(outs, tile, STARTS, SIZES, COUNT)
        row = tile * 0 + ROWS[0]
        for k in tl.static_range(1, COUNT):
            row = tl.where(number == k, ROWS[k], row)
        out, grad = target.to(outs[0].dtype), address.to(grads[0].dtype)
        if EVEN:
            out, grad, size = tl.multiple_of(out, 16), tl.multiple_of(grad, 16), tl.multiple_of(size, 16)
        start = tl.cast(tile - first, tl.int64) * (4 * COUNTERS)
        sum_tile(
            out, grad, factors_ptr + row * factor_row, keys_ptr + row * key_stride, word_stride, std, start, factor_stride, batch,
            tl.cast(size, tl.int64), size, PARTS, COUNTERS, GENERATOR,
        )  # fmt: skip


def norm_slots(grads: Sequence[Tensor], out: Tensor, chunk: int, block: int = 1024) -> None:
    """Writes the sums of squares of each chunk to ``out`` [K, B, slots], which holds zeros; all contiguous, ``out`` float32."""
    sizes = tuple(grad[0].numel() if len(grad) else 0 for grad in grads)
    starts, batch = tiles_of(sizes, chunk), grads[0].shape[0]
    if batch * starts[-1]:
        norm_slots_kernel[(min(batch * starts[-1], programs_of(out.device)),)](
            tuple(grads), out, batch, out.shape[2],
            STARTS=starts, SIZES=sizes, COUNT=len(sizes), CHUNK=chunk, BLOCK=block, EVEN=is_even(*grads),
        )  # fmt: skip


def weighted_sums_noise(
    grads: Sequence[Tensor], factors: Tensor, keys: Tensor, std: Tensor, rows: Sequence[int], dtype: torch.dtype, *,
    tile: NoiseTile = TILE, generator: str = PHILOX.value,
) -> list[Tensor]:  # fmt: skip
    """``flashnorm::weighted_sums_noise`` in one launch; all gradients contiguous."""
    outs = [torch.empty(grad.shape[1:], dtype=dtype, device=grad.device) for grad in grads]
    sizes = tuple(out.numel() for out in outs)
    starts = tiles_of(sizes, 4 * tile.counters)
    if starts[-1]:
        weighted_sums_noise_kernel[(min(starts[-1], programs_of(factors.device)),)](
            tuple(outs), tuple(grads), factors, keys, std, *factors.stride(), *keys.stride(), grads[0].shape[0],
            STARTS=starts, SIZES=sizes, ROWS=tuple(rows), COUNT=len(outs), EVEN=is_even(*grads),
            PARTS=keys.shape[1] == 5, COUNTERS=tile.counters, GENERATOR=generator,
        )  # fmt: skip
    return outs


def tiles_of(sizes: Sequence[int], tile: int) -> tuple[int, ...]:
    """Where each gradient's tiles begin, and how many there are."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + ceil_div(size, tile))
    return tuple(starts)


def is_even(*tensors: Tensor) -> bool:
    """Whether vector loads of 16 bytes fit every sample of every tensor."""
    return all(x.data_ptr() % 16 == 0 and x[0].numel() % 16 == 0 for x in tensors if len(x))
