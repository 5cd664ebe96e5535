"""What every Triton kernel of this folder shares: operand layouts, tile loads, device peaks, precision.

Importing works without Triton (CPU builds of PyTorch do not bring it): kernels are then plain functions that nobody calls.

Legend: B samples, T positions, w columns of one operand [B, T, w]. An operand is read in one of three ways, ``LAYOUT``:

    POINTERS  masked pointers, any strides
    ROWS      a TMA descriptor over [B, T, w]; columns are contiguous
    COLUMNS   a TMA descriptor over [B, w, T]; positions are contiguous (what a transposed view or a convolution hands over)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = None
    HAS_TRITON = False

POINTERS, ROWS, COLUMNS = 0, 1, 2
# Types that tensor cores multiply and kernels here take; products are accumulated in float32.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# TMA (CUDA driver API, cuTensorMapEncodeTiled): base address and all strides but the innermost are multiples of 16 bytes.
_TMA_ALIGNMENT = 16
_TMA_LARGEST_BOX = 256  # elements of one dimension of a block


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, or the function itself where there is no Triton."""
    return triton.jit(function) if HAS_TRITON else function


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def narrowed(block: int, size: int) -> int:
    """A tile's edge for a dimension of ``size``: no larger than it needs, no smaller than tensor cores take (16)."""
    return max(16, min(block, next_power_of_2(size)))


@dataclass(frozen=True)
class Device:
    """What tile choices depend on.

    ``multiprocessors``: how many there are. ``tma``: whether descriptors are loaded by hardware (compute capability 9.0 on).
    ``shared_bytes``: shared memory that one block may use. ``flops_per_clock``: dense bf16 FLOPs of one multiprocessor.
    ``l2_bytes_per_clock``: what one multiprocessor can read from L2 while all do.
    """

    multiprocessors: int
    tma: bool
    shared_bytes: int
    flops_per_clock: int
    l2_bytes_per_clock: int


FLOPS_WITHOUT_TENSOR_CORES = 256  # per clock of one multiprocessor: float32 on Hopper (128 lanes), the form for "ieee"
# FLOPs: NVIDIA's H100 and A100 whitepapers. L2: 5120 bytes per clock over all multiprocessors, as the A100 whitepaper has it;
# none is published for Hopper, so the same is assumed. H200 differs from H100 in memory only.
HOPPER = Device(132, True, 232448, 4096, 5120 // 132)
AMPERE = Device(108, False, 166912, 2048, 5120 // 108)


@functools.cache
def device_of(device: torch.device) -> Device:
    """The properties of a CUDA device; architectures newer than Hopper count as Hopper, older than Ampere as Ampere."""
    properties = torch.cuda.get_device_properties(device)
    base = HOPPER if properties.major >= 9 else AMPERE
    shared = getattr(properties, "shared_memory_per_block_optin", base.shared_bytes)
    count = properties.multi_processor_count
    return Device(count, base.tma, shared, base.flops_per_clock, 5120 // count)


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision``: ``"tf32"`` only for float32, and only where the user's settings let matmuls use it."""
    allowed = torch.get_float32_matmul_precision() != "highest" or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def tma_layout(sizes: Sequence[int], strides: Sequence[int], itemsize: int, offset_bytes: int) -> int:
    """How an operand [B, T, w] can be read on a device with TMA: ``ROWS``, ``COLUMNS`` or ``POINTERS``.

    ``offset_bytes``: the address of the first element, or its distance from one that is a multiple of 16.
    """
    if offset_bytes % _TMA_ALIGNMENT:
        return POINTERS

    def fits(*dims: int) -> bool:
        return all(sizes[d] == 1 or (strides[d] > 0 and strides[d] * itemsize % _TMA_ALIGNMENT == 0) for d in dims)

    if strides[2] == 1 and fits(0, 1):
        return ROWS
    return COLUMNS if strides[1] == 1 and fits(0, 2) else POINTERS


def layout_of(x_btw: Tensor, device: Device) -> int:
    """``LAYOUT`` of a real tensor."""
    if not device.tma:
        return POINTERS
    return tma_layout(x_btw.shape, x_btw.stride(), x_btw.element_size(), x_btw.data_ptr())


def device_for(*operands: Tensor) -> tuple[Device, list[int]]:
    """The operands' device and their ``LAYOUT``; tiles for a device without TMA where one of them needs pointers."""
    device = device_of(operands[0].device)
    return with_layouts(device, [layout_of(operand, device) for operand in operands])


def with_layouts(device: Device, layouts: list[int]) -> tuple[Device, list[int]]:
    return (device if POINTERS not in layouts else replace(device, tma=False)), layouts


def allocate_descriptors() -> None:
    """Lets kernels build descriptors on the device: Triton asks an allocator for the memory that holds them."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(allocate)


def check_operands(name: str, *operands: tuple[str, Tensor], rank: int = 3) -> None:
    """Refuses factors that do not fit together.

    Raises:
        ValueError: wrong rank, or samples or positions that differ.
        TypeError: types that differ, or are not real floating point.
    """
    first_name, first = operands[0]
    for label, operand in operands:
        if operand.dim() != rank:
            raise ValueError(f"flashnorm::{name} got {label} of shape {tuple(operand.shape)}; it needs {rank} dimensions.")
        if operand.dtype != first.dtype:
            raise TypeError(
                f"flashnorm::{name} got {first_name} of dtype {first.dtype} and {label} of dtype {operand.dtype}; "
                "cast one of them, so that both have the same."
            )
        if not operand.dtype.is_floating_point:
            raise TypeError(f"flashnorm::{name} got {label} of dtype {operand.dtype}; it needs a real floating-point one.")


def check_lengths(name: str, a: tuple[str, Tensor], b: tuple[str, Tensor], dims: int = 2) -> None:
    """Refuses operands whose leading sizes (samples and positions) differ."""
    if a[1].shape[:dims] != b[1].shape[:dims]:
        raise ValueError(
            f"flashnorm::{name} got {a[0]} of shape {tuple(a[1].shape)} and {b[0]} of shape {tuple(b[1].shape)}; "
            f"the first {dims} sizes (samples, positions) must agree."
        )


def check_indices(name: str, index_bt: Tensor) -> None:
    """Refuses indices that are not integers."""
    if index_bt.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"flashnorm::{name} got indices of dtype {index_bt.dtype}; it needs int64 or int32.")


@jit
def open_operand(
    ptr: tl.tensor,
    batch: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_w: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LAYOUT: tl.constexpr,
) -> tl.tensor:
    """The descriptor of an operand, or its pointer. A dimension of size 1 may have any stride, so it gets one that fits."""
    if LAYOUT == 0:
        return ptr
    elif LAYOUT == 1:  # noqa: RET505  (Triton compiles what follows a constant `if` as well)
        outer, inner = _fitting(stride_b, batch), _fitting(stride_t, length)
        return tl.make_tensor_descriptor(ptr, [batch, length, width], [outer, inner, 1], [1, BLOCK_T, BLOCK_W])
    else:
        outer, inner = _fitting(stride_b, batch), _fitting(stride_w, width)
        return tl.make_tensor_descriptor(ptr, [batch, width, length], [outer, inner, 1], [1, BLOCK_W, BLOCK_T])


@jit
def _fitting(stride: tl.tensor, size: tl.tensor) -> tl.tensor:
    return tl.where(size > 1, stride, 16).to(tl.int64)


@jit
def tile_corner(tile: tl.tensor, p: tl.tensor, d: tl.tensor, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr) -> tl.tensor:
    """(first row, first column) of a weight's ``tile``; a number beyond its tiles gives any.

    Eight rows of tiles are walked column by column. The tiles that run together then read about as many columns of one operand as
    of the other; row by row they would read all of a wide one, again for each column of tiles, and it does not fit into L2.
    """
    tiles_p, tiles_d = tl.cdiv(p, BLOCK_P), tl.cdiv(d, BLOCK_D)
    band = tile // (8 * tiles_d)
    within = tile % (8 * tiles_d)
    rows = tl.maximum(tl.minimum(tiles_p - band * 8, 8), 1)
    return (band * 8 + within % rows) * BLOCK_P, (within // rows) * BLOCK_D


@jit
def load_tile(
    operand: tl.tensor,
    b: tl.tensor,
    t: tl.tensor,
    w: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_w: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LAYOUT: tl.constexpr,
) -> tl.tensor:
    """Rows t.. and columns w.. of sample b, [BLOCK_T, BLOCK_W]; zero outside the sample."""
    if LAYOUT == 1:
        return operand.load([b, t, w]).reshape(BLOCK_T, BLOCK_W)
    elif LAYOUT == 2:  # noqa: RET505
        return operand.load([b, w, t]).reshape(BLOCK_W, BLOCK_T).trans()
    else:
        rows = t + tl.arange(0, BLOCK_T)
        columns = w + tl.arange(0, BLOCK_W)
        offsets = rows.to(tl.int64)[:, None] * stride_t + columns.to(tl.int64)[None, :] * stride_w
        inside = (rows < length)[:, None] & (columns < width)[None, :]
        return tl.load(operand + tl.cast(b, tl.int64) * stride_b + offsets, mask=inside, other=0.0)
