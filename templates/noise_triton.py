"""Triton kernel of ``flashnorm::add_noise``: the stream of noise.py and noise_cpu.cpp, drawn on a GPU.

    grid     persistent: min(tiles, PROGRAMS_PER_SM * multiprocessors) programs, each takes every grid-th tile
    tile     COUNTERS Philox counters = 4 * COUNTERS elements; a thread holds the four neighbours that share a counter, or for
             16-bit values the eight of two, so that it draws the noise of what one vector load brings and one vector store takes
    accumulator   float32, float64 for float64 values
    bytes    value read once, result written once; keys and std are scalars. In place with std == 0: 4 bytes per program

PARTS: keys have five words (noise.py), and values may be parts of larger tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import ir
from torch._inductor.utils import sympy_product
from torch.utils._sympy.functions import CeilDiv

from ._normals import PHILOX, normals, part_normals, random_words, rounded, with_noise  # noqa: F401  (random_words: for tests)


@dataclass(frozen=True)
class NoiseTile:
    """Launch settings: ``counters`` per tile, a power of two; four elements each. Programs have Triton's default of 4 warps."""

    counters: int = 256


TILE = NoiseTile()
PROGRAMS_PER_SM = 8  # 8 * 4 warps keep enough loads in flight to cover the latency of ten dependent rounds


@triton.jit
def _drawn(keys: tl.tensor, word_stride: tl.tensor, start: tl.tensor, PARTS: tl.constexpr, COUNTERS: tl.constexpr,
           BITS: tl.constexpr, GENERATOR: tl.constexpr) -> tl.tensor:  # fmt: skip
    """float32 [4 * COUNTERS]: the noise of elements ``start`` and on, a multiple of four, for values of BITS bits at least."""
    EIGHT: tl.constexpr = BITS == 16
    if PARTS:
        z = part_normals(keys, word_stride, start, COUNTERS, EIGHT, GENERATOR)
    else:
        z = normals(tl.load(keys), tl.load(keys + word_stride), start // 4, COUNTERS, EIGHT, GENERATOR)
    return z


@triton.jit
def _tiles(
    out_ptr: tl.tensor,
    value_ptr: tl.tensor,
    keys: tl.tensor,
    word_stride: tl.tensor,
    std: tl.tensor,
    n: tl.tensor,
    columns: tl.tensor,
    outer: tl.tensor,
    inner: tl.tensor,
    STRIDED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PARTS: tl.constexpr,
    COUNTERS: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> None:
    ELEMENTS: tl.constexpr = 4 * COUNTERS
    BITS: tl.constexpr = min(out_ptr.dtype.element_ty.primitive_bitwidth, value_ptr.dtype.element_ty.primitive_bitwidth)
    wide = tl.float64 if value_ptr.dtype.element_ty == tl.float64 else tl.float32
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, ELEMENTS), tl.num_programs(0)):
        start = tile * ELEMENTS
        element = start + tl.arange(0, ELEMENTS)
        inside = element < n
        source = (element // columns) * outer + (element % columns) * inner if STRIDED else element
        value = tl.load(value_ptr + source, mask=inside, other=0).to(wide)
        if std != 0:
            value = with_noise(value, _drawn(keys, word_stride, start, PARTS, COUNTERS, BITS, GENERATOR), std)
        target = source if IN_PLACE else element
        tl.store(out_ptr + target, rounded(value, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_noise_kernel(
    out_ptr: tl.tensor,
    value_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    std_ptr: tl.tensor,
    row: tl.tensor,
    key_stride: tl.tensor,
    word_stride: tl.tensor,
    n: tl.tensor,
    columns: tl.tensor,
    outer: tl.tensor,
    inner: tl.tensor,
    STRIDED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    PARTS: tl.constexpr,
    COUNTERS: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> None:
    """``out[i] = value[i] + std * z[i]`` for i < n, row-major.

    ``value`` is contiguous, or (STRIDED) rows of ``columns`` elements: element i lies at ``i // columns * outer + i % columns *
    inner``. ``out`` is contiguous, or ``value`` itself (IN_PLACE).
    """
    std = tl.load(std_ptr)
    if std != 0 or not IN_PLACE:
        keys = keys_ptr + row * key_stride
        _tiles(
            out_ptr, value_ptr, keys, word_stride, std, n, columns, outer, inner, STRIDED, IN_PLACE, PARTS, COUNTERS, GENERATOR
        )  # fmt: skip


@triton.jit
def weighted_sum_noise_kernel(
    out_ptr: tl.tensor,
    w_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    std_ptr: tl.tensor,
    row: tl.tensor,
    factor_stride: tl.tensor,
    key_stride: tl.tensor,
    word_stride: tl.tensor,
    batch: tl.tensor,
    sample_stride: tl.tensor,
    n: tl.tensor,
    PARTS: tl.constexpr,
    COUNTERS: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> None:
    """``out[i] = sum_b factors[b] * w[b, i] + std * z[i]`` for i < n, in float32; each sample of ``w`` and ``out`` are contiguous.

    A sample with factor 0 adds exactly 0. At std == 0 no noise is drawn.
    """
    ELEMENTS: tl.constexpr = 4 * COUNTERS
    std = tl.load(std_ptr)
    keys = keys_ptr + row * key_stride
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, ELEMENTS), tl.num_programs(0)):
        sum_tile(
            out_ptr, w_ptr, factors_ptr, keys, word_stride, std, tile * ELEMENTS, factor_stride, batch, sample_stride, n, PARTS,
            COUNTERS, GENERATOR,
        )  # fmt: skip


@triton.jit
def sum_tile(
    out_ptr: tl.tensor, w_ptr: tl.tensor, factors_ptr: tl.tensor, keys: tl.tensor, word_stride: tl.tensor, std: tl.tensor,
    start: tl.tensor, factor_stride: tl.tensor, batch: tl.tensor, sample_stride: tl.tensor, n: tl.tensor,
    PARTS: tl.constexpr, COUNTERS: tl.constexpr, GENERATOR: tl.constexpr,
) -> None:  # fmt: skip
    """Elements ``start``.. of a weighted sum with its noise; ``start`` is a multiple of four."""
    ELEMENTS: tl.constexpr = 4 * COUNTERS
    BITS: tl.constexpr = min(out_ptr.dtype.element_ty.primitive_bitwidth, w_ptr.dtype.element_ty.primitive_bitwidth)
    element = start + tl.arange(0, ELEMENTS)
    inside = element < n
    total = tl.zeros((ELEMENTS,), tl.float32)
    # Four samples' loads are in flight at a time.
    for b in tl.range(0, batch, loop_unroll_factor=4):
        factor = tl.load(factors_ptr + b * factor_stride)
        sample = w_ptr + tl.cast(b, tl.int64) * sample_stride
        # A dropped sample is not read.
        read = element < tl.where(factor != 0, n, 0)
        total += tl.load(sample + element, mask=read, other=0.0).to(tl.float32) * factor
    if std != 0:
        total = with_noise(total, _drawn(keys, word_stride, start, PARTS, COUNTERS, BITS, GENERATOR), std)
    tl.store(out_ptr + element, rounded(total, out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def programs_of(device: torch.device) -> int:
    """Programs that fill ``device``; two on a CPU, where the interpreter runs them in turn."""
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def grid_for(n: Any, tile: NoiseTile, device: torch.device) -> Any:
    """Programs of the persistent grid over ``n`` elements, a number or an expression in a graph's sizes; at least 1."""
    elements = 4 * tile.counters
    if isinstance(n, int):
        return max(1, min(triton.cdiv(n, elements), programs_of(device)))
    return sympy.Max(1, sympy.Min(CeilDiv(n, elements), programs_of(device)))


def rows_of(value: Tensor) -> tuple[int, int, int] | None:
    """``(columns, outer, inner)`` of a strided ``value`` as rows of elements, or None if two strides cannot say it."""
    sizes: list[tuple[int, int]] = []
    for size, stride in zip(value.shape, value.stride(), strict=True):
        if size == 1:
            continue
        if sizes and sizes[-1][1] == size * stride:
            sizes[-1] = sizes[-1][0] * size, stride
        else:
            sizes.append((size, stride))
    if len(sizes) > 2:
        return None
    columns, inner = sizes[-1] if sizes else (1, 1)
    return columns, sizes[0][1] if len(sizes) == 2 else 0, inner


def launch_in_graph(kernel: Any, programs: Any, **arguments: Any) -> None:
    """Puts a launch of ``kernel`` into the graph that Inductor is lowering. Tensors among ``arguments`` must be realized."""
    index = kernel_side_table.add_kernel(kernel)
    for name, value in arguments.items():
        if isinstance(value, ir.IRNode) and not isinstance(value, ir.TensorBox):
            arguments[name] = ir.TensorBox(value)
    ir.UserDefinedTritonKernel(kernel_idx=index, grid=[(programs, 1, 1)], tma_descriptor_metadata={}, kernel_args=arguments)


def _parts(keys: Any) -> bool:
    return bool(keys.get_size()[1] == 5)


def lower_add_noise(out: Any, value: Any, keys: Any, std: Any, row: int) -> None:
    """Inductor: ``out = value + std * z``; both contiguous and realized, perhaps the same buffer."""
    n = sympy_product(value.get_size())
    keys.freeze_layout()
    key_stride, word_stride = keys.get_stride()
    launch_in_graph(
        add_noise_kernel, grid_for(n, TILE, value.get_device()), out_ptr=out, value_ptr=value, keys_ptr=keys, std_ptr=std, row=row,
        key_stride=key_stride, word_stride=word_stride, n=n, columns=n, outer=n, inner=1, STRIDED=False, IN_PLACE=out is value,
        PARTS=_parts(keys), COUNTERS=TILE.counters, GENERATOR=PHILOX.value,
    )  # fmt: skip


def lower_weighted_sum_noise(out: Any, w: Any, factors: Any, keys: Any, std: Any, row: int) -> None:
    """Inductor: ``out = sum_b factors[b] * w[b] + std * z``; all realized, ``w`` and ``out`` contiguous."""
    n = sympy_product(out.get_size())
    for operand in (factors, keys):
        operand.freeze_layout()
    key_stride, word_stride = keys.get_stride()
    launch_in_graph(
        weighted_sum_noise_kernel, grid_for(n, TILE, w.get_device()), out_ptr=out, w_ptr=w, factors_ptr=factors, keys_ptr=keys,
        std_ptr=std, row=row, factor_stride=factors.get_stride()[0], key_stride=key_stride, word_stride=word_stride,
        batch=w.get_size()[0], sample_stride=n, n=n, PARTS=_parts(keys), COUNTERS=TILE.counters, GENERATOR=PHILOX.value,
    )  # fmt: skip


def weighted_sum_noise_triton(w_bn: Tensor, factors_b: Tensor, keys: Tensor, std: Tensor, row: int,
                              dtype: torch.dtype | None = None, *, tile: NoiseTile = TILE,
                              generator: str = PHILOX.value) -> Tensor:  # fmt: skip
    """``flashnorm::weighted_sum_noise``: float32 or ``dtype``. Samples that are not contiguous in themselves are copied first."""
    if w_bn.shape[0] and not w_bn[0].is_contiguous():
        w_bn = w_bn.contiguous()
    out = torch.empty(w_bn.shape[1:], dtype=dtype or torch.float32, device=w_bn.device)
    if out.numel():
        weighted_sum_noise_kernel[(grid_for(out.numel(), tile, out.device),)](
            out, w_bn, factors_b, keys, std, row, factors_b.stride(0), *keys.stride(), w_bn.shape[0], w_bn.stride(0),
            out.numel(), PARTS=keys.shape[1] == 5, COUNTERS=tile.counters, GENERATOR=generator,
        )  # fmt: skip
    return out


def _launch(out: Tensor, value: Tensor, keys: Tensor, std: Tensor, row: int, tile: NoiseTile, generator: str) -> None:
    if value.numel() == 0:
        return
    rows = rows_of(value)
    assert rows is not None
    add_noise_kernel[(grid_for(value.numel(), tile, value.device),)](
        out, value, keys, std, row, keys.stride(0), keys.stride(1), value.numel(), *rows,
        STRIDED=not value.is_contiguous(), IN_PLACE=out is value, PARTS=keys.shape[1] == 5, COUNTERS=tile.counters,
        GENERATOR=generator,
    )  # fmt: skip


def add_noise_triton(value: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None, *,
                     tile: NoiseTile = TILE, generator: str = PHILOX.value) -> Tensor:  # fmt: skip
    """``flashnorm::add_noise``: contiguous, in ``dtype`` or that of ``value``. Never waits for the device.

    A value whose strides do not collapse to two dimensions is copied first.
    """
    if rows_of(value) is None:
        value = value.contiguous()
    out = torch.empty(value.shape, dtype=dtype or value.dtype, device=value.device)
    _launch(out, value, keys, std, row, tile, generator)
    return out


def add_noise_triton_(value: Tensor, keys: Tensor, std: Tensor, row: int, *, tile: NoiseTile = TILE,
                      generator: str = PHILOX.value) -> Tensor:  # fmt: skip
    """``flashnorm::add_noise_``: noises ``value`` where it lies."""
    if rows_of(value) is None:
        return value.copy_(add_noise_triton(value, keys, std, row, tile=tile, generator=generator))
    _launch(value, value, keys, std, row, tile, generator)
    return value
