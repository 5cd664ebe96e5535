"""``flashnorm::clipped_sums``: the clipped sums of several products of one shape, in one launch.

    flashnorm::clipped_sums(Tensor[] gs, Tensor[] a_s, Tensor factors, int[] rows) -> Tensor

    gs       N of [B, T, p]  bf16, fp16 or fp32 (fp64 on a CPU), any strides
    a_s      N of [B, T, d]  the same dtype, any strides
    factors  [P, B]          float32; a sample with factor 0.0 adds exactly 0, whatever it holds (NaN and Inf too)
    rows     N               product k takes factors[rows[k]]
    returns  [N, p, d]       ``sum_b c_b G_b^T A_b`` of each, float32 (float64 for float64)

The blocks of a deep model have layers of the same shapes, and one layer's sum has too few tiles for a large GPU, or a few more than
it runs at once. A sum that is cut into segments to fill it pays for writing, reading and adding them; the tiles of all blocks' sums
fill it without. On an H200 eight sums of [3072, 768] over 64 samples of 197 positions take three quarters of the time that they
take one by one, those of [768, 768] half (benchmarks/results/kernels).

Kernel. That of ``clipped_sum``, whose programs first choose their product by a chain of selects over a tuple of addresses. Products
that differ in strides, or whose operands no descriptor can say, are summed one by one.

Legend: N products, P parameters of the graph, B samples, T positions, p rows and d columns of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from . import clipped_sum as one
from ._clipped_tiles import FEW_POSITIONS, Tiles, tile_choices
from ._store import store_tile
from ._triton import (
    HAS_TRITON,
    KERNEL_DTYPES,
    POINTERS,
    allocate_descriptors,
    ceil_div,
    device_for,
    jit,
    matmul_precision,
    open_operand,
    tl,
)
from .clipped_sum import clipped_sum_tile

AT_ONCE = 32  # products of one launch: kernels take 4 KiB of arguments on every CUDA version


@jit
def clipped_sums_kernel(
    gs: tl.tensor,
    a_s: tl.tensor,
    factors_ptr: tl.tensor,
    out_ptr: tl.tensor,
    factor_stride: tl.tensor,
    batch: tl.tensor,
    length: tl.tensor,
    p: tl.tensor,
    d: tl.tensor,
    g_stride_b: tl.tensor,
    g_stride_t: tl.tensor,
    g_stride_w: tl.tensor,
    a_stride_b: tl.tensor,
    a_stride_t: tl.tensor,
    a_stride_w: tl.tensor,
    NUMBERS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Writes ``out`` [COUNT, S, p, d], contiguous. ``gs`` and ``a_s``: tuples of COUNT addresses; product k takes row NUMBERS[k] of
    the factors [P, B], whose rows are contiguous."""
    items = tl.cdiv(p, BLOCK_P) * tl.cdiv(d, BLOCK_D) * SPLIT
    number = tl.program_id(0) // items
    g_address, a_address, row = gs[0].to(tl.int64), a_s[0].to(tl.int64), number * 0 + NUMBERS[0]
    for k in tl.static_range(1, COUNT):
        g_address = tl.where(number >= k, gs[k].to(tl.int64), g_address)
        a_address = tl.where(number >= k, a_s[k].to(tl.int64), a_address)
        row = tl.where(number >= k, NUMBERS[k], row)
    g_ptr, a_ptr = g_address.to(gs[0].dtype), a_address.to(a_s[0].dtype)
    g = open_operand(g_ptr, batch, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(a_ptr, batch, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
    segment, column_p, column_d, total = clipped_sum_tile(
        tl.program_id(0) % items, g, a, factors_ptr + row * factor_stride, batch, length, p, d,
        g_stride_b, g_stride_t, g_stride_w, a_stride_b, a_stride_t, a_stride_w,
        BLOCK_P, BLOCK_D, BLOCK_T, SPLIT, ROWS, WHOLE, G_LAYOUT, A_LAYOUT, PRECISION,
    )  # fmt: skip
    store_tile(out_ptr, number * SPLIT + segment, column_p, column_d, total, p, d)


def launch(
    gs: Sequence[Tensor], a_s: Sequence[Tensor], factors: Tensor, rows: Sequence[int], tiles: Tiles, layouts: Sequence[int],
    precision: str,
) -> Tensor:  # fmt: skip
    """float32 [N, S, p, d]: the segments' partial sums of products with the same strides."""
    (batch, length, p), d, count = gs[0].shape, a_s[0].shape[2], len(gs)
    out = torch.empty((count, tiles.SPLIT, p, d), dtype=torch.float32, device=gs[0].device)
    grid = (count * ceil_div(p, tiles.BLOCK_P) * ceil_div(d, tiles.BLOCK_D) * tiles.SPLIT,)
    clipped_sums_kernel[grid](
        tuple(gs), tuple(a_s), factors, out, factors.stride(0), batch, length, p, d, *gs[0].stride(), *a_s[0].stride(),
        NUMBERS=tuple(rows), COUNT=count, **one.settings(tiles, length <= tiles.BLOCK_T, gs[0].dtype, layouts, precision),
        **asdict(tiles),
    )  # fmt: skip
    return out


def clipped_sums_triton(gs: list[Tensor], a_s: list[Tensor], factors: Tensor, rows: list[int]) -> Tensor:
    """The kernel with the best tiles by the formula; products that it does not take one by one."""
    _check(gs, a_s, factors, rows)
    if not HAS_TRITON or gs[0].dtype not in KERNEL_DTYPES or gs[0].numel() == 0 or a_s[0].numel() == 0:
        return clipped_sums_aten(gs, a_s, factors, rows)
    alike = all(g.stride() == gs[0].stride() for g in gs) and all(a.stride() == a_s[0].stride() for a in a_s)
    device, layouts = device_for(gs[0], a_s[0])
    if not alike or POINTERS in layouts or gs[0].shape[1] <= FEW_POSITIONS or _some_unaligned(gs) or _some_unaligned(a_s):
        return torch.stack([one.clipped_sum_triton(g, a, factors[row]) for g, a, row in zip(gs, a_s, rows, strict=True)])
    precision = matmul_precision(gs[0].dtype)
    sizes = (*gs[0].shape, a_s[0].shape[2])
    factors = factors if factors.stride(1) == 1 else factors.contiguous()
    allocate_descriptors()
    found = []
    for begin in range(0, len(gs), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        tiles = tile_choices(sizes, gs[0].dtype, device, precision, len(gs[part]))[0].tiles
        segments = launch(gs[part], a_s[part], factors, rows[part], tiles, layouts, precision)
        found.append(segments.sum(1) if tiles.SPLIT > 1 else segments[:, 0])
    return found[0] if len(found) == 1 else torch.cat(found)


def _some_unaligned(operands: Sequence[Tensor]) -> bool:
    return any(operand.data_ptr() % 16 for operand in operands)


def clipped_sums_aten(gs: list[Tensor], a_s: list[Tensor], factors: Tensor, rows: list[int]) -> Tensor:
    """One after the other, for every device."""
    _check(gs, a_s, factors, rows)
    return torch.stack([torch.ops.flashnorm.clipped_sum(g, a, factors[row]) for g, a, row in zip(gs, a_s, rows, strict=True)])


def _check(gs: Sequence[Tensor], a_s: Sequence[Tensor], factors: Tensor, rows: Sequence[int]) -> None:
    alike = gs and all(g.shape == gs[0].shape and a.shape == a_s[0].shape for g, a in zip(gs, a_s, strict=False))
    if not alike or not len(gs) == len(a_s) == len(rows):
        raise ValueError(
            f"flashnorm::clipped_sums got {len(gs)} and {len(a_s)} operands of shapes {[tuple(x.shape) for x in (*gs, *a_s)]} and "
            f"{len(rows)} rows; it needs as many of each, at least one, all of the same shape."
        )
    for g, a in zip(gs, a_s, strict=True):
        one.check(g, a)
    if factors.dtype is not torch.float32 or factors.dim() != 2 or factors.shape[1] != gs[0].shape[0]:
        raise ValueError(
            f"flashnorm::clipped_sums got factors of dtype {factors.dtype} and shape {tuple(factors.shape)} for "
            f"{gs[0].shape[0]} samples; it needs float32 [P, B]."
        )


def _fake(gs: list[Tensor], a_s: list[Tensor], factors: Tensor, rows: list[int]) -> Tensor:
    _check(gs, a_s, factors, rows)
    return gs[0].new_empty((len(gs), gs[0].shape[2], a_s[0].shape[2]), dtype=torch.promote_types(gs[0].dtype, torch.float32))


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define(
    "clipped_sums(Tensor[] gs, Tensor[] a_s, Tensor factors, int[] rows) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.impl("clipped_sums", clipped_sums_aten, "CompositeExplicitAutograd")
_library.impl("clipped_sums", clipped_sums_triton, "CUDA")
torch.library.register_fake("flashnorm::clipped_sums", _fake, lib=_library)
