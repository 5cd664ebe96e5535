"""Triton kernel of ``flashnorm::add_noise``: the stream of noise.py and noise_cpu.cpp, drawn on a GPU.

    grid     persistent: min(tiles, PROGRAMS_PER_SM * multiprocessors) programs, each takes every grid-th tile
    tile     COUNTERS Philox counters = 4 * COUNTERS elements; a thread holds the four neighbours that share a counter, so one
             generator call serves one vector load and one vector store
    accumulator   float32, float64 for float64 values
    bytes    value read once, result written once; keys and std are scalars. In place with std == 0: 4 bytes per program

Integer words equal the CPU kernel's bit for bit. Normals use the same polynomials (no slow path of sin, cos or log, and no local
memory), so that they agree to the rounding of float32 operations.
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


@dataclass(frozen=True)
class NoiseTile:
    """Launch settings: ``counters`` per tile, a power of two; four elements each. Programs have Triton's default of 4 warps."""

    counters: int = 256


TILE = NoiseTile()
PHILOX = tl.constexpr("philox4x32-10")
PROGRAMS_PER_SM = 8  # 8 * 4 warps keep enough loads in flight to cover the latency of ten dependent rounds


@triton.jit
def random_words(key: tl.tensor, stream: tl.tensor, counter: tl.tensor, GENERATOR: tl.constexpr) -> tuple:
    """Four blocks of uint32 words for each int64 ``counter`` under a 64-bit key and stream."""
    tl.static_assert(GENERATOR == PHILOX, "unknown generator")
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, high, zero + stream.to(tl.uint32), zero + (stream >> 32).to(tl.uint32), 10)


@triton.jit
def box_muller(a: tl.tensor, b: tl.tensor) -> tuple:
    """Two float32 standard normals from each pair of uint32 words; the polynomials and their errors are noise_cpu.cpp's."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    # u = m * 2^e with m in [sqrt(1/2), sqrt(2))
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    t = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = -0.17444486916065216 * t + 0.28733575344085693
    p = p * t - 0.2990456521511078
    p = p * t + 0.33124804496765137
    p = p * t - 0.39913666248321533
    p = p * t + 0.5000414848327637
    p = p * t - 0.6666837334632874
    p = p * t + 0.9999997615814209
    p = p * t - 2.0
    radius = tl.sqrt(e * -1.3862943611198906 + p * t)
    # The top bit of b is half a turn, which turns both results round; the other 31 are w quarter turns, w in [-1, 1).
    radius = (radius.to(tl.uint32, bitcast=True) | (b & 0x80000000)).to(tl.float32, bitcast=True)
    w = (b << 1).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    s = w * w
    sine = 0.0001508226414443925 * s - 0.004672233015298843
    sine = sine * s + 0.07968848198652267
    sine = sine * s - 0.6459633708000183
    sine = sine * s + 1.570796251296997
    cosine = -0.0008566648466512561 * s + 0.01995125412940979
    cosine = cosine * s - 0.2336980253458023
    cosine = cosine * s + 0.9999999403953552
    return radius * (cosine * (1.0 - s)), radius * (sine * w)


@triton.jit
def normals(
    key: tl.tensor, stream: tl.tensor, first_counter: tl.tensor, COUNTERS: tl.constexpr, GENERATOR: tl.constexpr
) -> tl.tensor:
    """float32 [4 * COUNTERS]: z of elements 4 * first_counter and on, in their order."""
    counter = first_counter + tl.arange(0, COUNTERS).to(tl.int64)
    a, b, c, d = random_words(key, stream, counter, GENERATOR)
    z0, z1 = box_muller(a, b)
    z2, z3 = box_muller(c, d)
    # [COUNTERS, pair, half of the pair]
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(4 * COUNTERS)


@triton.jit
def with_noise(value: tl.tensor, z: tl.tensor, std: tl.tensor) -> tl.tensor:
    """``value + std * z`` in the type of ``value`` (float32 or float64); at std == 0 ``value`` itself, bit for bit."""
    return tl.where(std == 0, value, value + std.to(value.dtype) * z.to(value.dtype))


@triton.jit
def rounded(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """``value`` (float32 or float64) in DTYPE, to nearest even; 16-bit types by way of float32, as on the CPU."""
    return value.to(tl.float32).to(DTYPE) if DTYPE.primitive_bitwidth == 16 else value.to(DTYPE)


@triton.jit
def _tiles(
    out_ptr: tl.tensor,
    value_ptr: tl.tensor,
    key: tl.tensor,
    stream: tl.tensor,
    std: tl.tensor,
    n: tl.tensor,
    columns: tl.tensor,
    outer: tl.tensor,
    inner: tl.tensor,
    STRIDED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    COUNTERS: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> None:
    ELEMENTS: tl.constexpr = 4 * COUNTERS
    wide = tl.float64 if value_ptr.dtype.element_ty == tl.float64 else tl.float32
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, ELEMENTS), tl.num_programs(0)):
        start = tile * ELEMENTS
        element = start + tl.arange(0, ELEMENTS)
        inside = element < n
        source = (element // columns) * outer + (element % columns) * inner if STRIDED else element
        value = tl.load(value_ptr + source, mask=inside, other=0).to(wide)
        z = normals(key, stream, start // 4, COUNTERS, GENERATOR)
        target = source if IN_PLACE else element
        tl.store(out_ptr + target, rounded(with_noise(value, z, std), out_ptr.dtype.element_ty), mask=inside)


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
        key, stream = tl.load(keys), tl.load(keys + word_stride)
        _tiles(out_ptr, value_ptr, key, stream, std, n, columns, outer, inner, STRIDED, IN_PLACE, COUNTERS, GENERATOR)


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
    COUNTERS: tl.constexpr,
    GENERATOR: tl.constexpr,
) -> None:
    """``out[i] = sum_b factors[b] * w[b, i] + std * z[i]`` for i < n, in float32; each sample of ``w`` and ``out`` are contiguous.

    A sample with factor 0 adds exactly 0. At std == 0 no noise is drawn.
    """
    ELEMENTS: tl.constexpr = 4 * COUNTERS
    std = tl.load(std_ptr)
    keys = keys_ptr + row * key_stride
    key, stream = tl.load(keys), tl.load(keys + word_stride)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, ELEMENTS), tl.num_programs(0)):
        start = tile * ELEMENTS
        element = start + tl.arange(0, ELEMENTS)
        inside = element < n
        total = tl.zeros((ELEMENTS,), tl.float32)
        # Four samples' loads are in flight at a time.
        for b in tl.range(0, batch, loop_unroll_factor=4):
            factor = tl.load(factors_ptr + b * factor_stride)
            sample = w_ptr + tl.cast(b, tl.int64) * sample_stride
            weighted = tl.load(sample + element, mask=inside, other=0.0).to(tl.float32) * factor
            total += tl.where(factor != 0, weighted, 0.0)
        if std != 0:
            total = with_noise(total, normals(key, stream, start // 4, COUNTERS, GENERATOR), std)
        tl.store(out_ptr + element, rounded(total, out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that fill ``device``; two on a CPU, where the interpreter runs them in turn."""
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def grid_for(n: Any, tile: NoiseTile, device: torch.device) -> Any:
    """Programs of the persistent grid over ``n`` elements, a number or an expression in a graph's sizes; at least 1."""
    elements = 4 * tile.counters
    if isinstance(n, int):
        return max(1, min(triton.cdiv(n, elements), _programs(device)))
    return sympy.Max(1, sympy.Min(CeilDiv(n, elements), _programs(device)))


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


def lower_add_noise(out: Any, value: Any, keys: Any, std: Any, row: int) -> None:
    """Inductor: ``out = value + std * z``; both contiguous and realized, perhaps the same buffer."""
    n = sympy_product(value.get_size())
    keys.freeze_layout()
    key_stride, word_stride = keys.get_stride()
    launch_in_graph(
        add_noise_kernel, grid_for(n, TILE, value.get_device()), out_ptr=out, value_ptr=value, keys_ptr=keys, std_ptr=std, row=row,
        key_stride=key_stride, word_stride=word_stride, n=n, columns=n, outer=n, inner=1, STRIDED=False, IN_PLACE=out is value,
        COUNTERS=TILE.counters, GENERATOR=PHILOX.value,
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
        batch=w.get_size()[0], sample_stride=n, n=n, COUNTERS=TILE.counters, GENERATOR=PHILOX.value,
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
            out.numel(), COUNTERS=tile.counters, GENERATOR=generator,
        )  # fmt: skip
    return out


def _launch(out: Tensor, value: Tensor, keys: Tensor, std: Tensor, row: int, tile: NoiseTile, generator: str) -> None:
    if value.numel() == 0:
        return
    rows = rows_of(value)
    assert rows is not None
    add_noise_kernel[(grid_for(value.numel(), tile, value.device),)](
        out, value, keys, std, row, keys.stride(0), keys.stride(1), value.numel(), *rows,
        STRIDED=not value.is_contiguous(), IN_PLACE=out is value, COUNTERS=tile.counters, GENERATOR=generator,
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
