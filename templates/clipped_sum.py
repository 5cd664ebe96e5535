"""``flashnorm::clipped_sum``: the sum of all samples' gradients, each times its clip factor; no scaled copy of G exists.

    flashnorm::clipped_sum(Tensor g_btp, Tensor a_btd, Tensor factors_b, ScalarType? dtype=None) -> Tensor

    g_btp      [B, T, p]  bf16, fp16 or fp32 (fp64 on a CPU), any strides
    a_btd      [B, T, d]  the same dtype, any strides
    factors_b  [B]        float32; a sample with factor 0.0 adds exactly 0, whatever it holds (NaN and Inf too)
    returns    [p, d]     ``sum_b c_b G_b^T A_b`` in ``dtype``, by default float32 (float64 for float64); 0 where B or T is 0

Kernel. One GEMM over B * T. A step multiplies BLOCK_T positions of *one* sample, straight into the tile's total, which is kept in
units of that sample's factor: when the next sample begins, the total is multiplied by ``c_b / c_(b+1)``, and at the end by the last
factor. This costs one multiplication for each element of the tile and sample, and two roundings of a float32. What it buys against
an operand that is scaled before it is multiplied: operands go from TMA to the tensor cores untouched; a clipped contribution is not
rounded to the operands' 16 bits after the norm was taken, which would let it exceed the clip norm by 2^-9; and a dropped sample is
not read. Against a product of its own for each sample that is scaled and then added: half the registers, so that a tile may be
128 x 256. A factor is 0 or C / norm, and norms are square roots of float32 numbers, so that no quotient overflows.

Few positions (T <= FEW_POSITIONS, ROWS): a step would be mostly empty. Steps then take BLOCK_T rows of B * T, whatever their
samples; G's rows are scaled in registers and multiplied as tf32x3, which keeps 21 bits of them.

Split. Where the tiles leave multiprocessors idle, the steps are cut into S segments, each with a partial sum of its own in
[S, p, d], which are added in their order: for a given shape the result is deterministic. Costs 8 * S * p * d bytes and a launch.
Tiles and S minimize ``Choice.clocks`` of ``_clipped_tiles``.

Legend: B samples, T positions, p rows and d columns of the weight, S segments of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import SymbolicGridFn

from . import _lowering as lowering
from ._clip_factor import check_factors
from ._clipped_tiles import Tiles, tile_choices
from ._store import store_tile
from ._triton import (
    HAS_TRITON,
    KERNEL_DTYPES,
    POINTERS,
    allocate_descriptors,
    ceil_div,
    check_lengths,
    check_operands,
    device_for,
    jit,
    load_tile,
    matmul_precision,
    open_operand,
    tile_corner,
    tl,
)

aten = torch.ops.aten
_CPU_CHUNK = 1 << 20  # elements of each operand that the ATen form copies at a time: few enough to stay in a cache


@jit
def clipped_sum_tile(
    item: tl.tensor,
    g: tl.tensor,
    a: tl.tensor,
    factors_ptr: tl.tensor,
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
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """(segment, first row, first column, total) of one item. Items are ordered [S, tiles]: those that run together share positions.

    ``total``: float32 [BLOCK_P, BLOCK_D], the segment's share of the sum. ``WHOLE``: no sample is longer than a step, so that one
    loop goes over all of them and loads run ahead.
    """
    tiles = tl.cdiv(p, BLOCK_P) * tl.cdiv(d, BLOCK_D)
    segment = item // tiles
    column_p, column_d = tile_corner(item % tiles, p, d, BLOCK_P, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    if ROWS:
        rows_in_all = batch * length
        each = tl.cdiv(tl.cdiv(rows_in_all, BLOCK_T), SPLIT) * BLOCK_T
        for first_row in tl.range(segment * each, tl.minimum(segment * each + each, rows_in_all), BLOCK_T):
            row = first_row + tl.arange(0, BLOCK_T)
            sample, position = (row // length).to(tl.int64), (row % length).to(tl.int64)
            factor = tl.load(factors_ptr + sample, mask=row < rows_in_all, other=0.0)
            live = (factor != 0)[:, None]
            columns_p = column_p + tl.arange(0, BLOCK_P).to(tl.int64)[None, :]
            columns_d = column_d + tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
            g_at = g + sample[:, None] * g_stride_b + position[:, None] * g_stride_t + columns_p * g_stride_w
            a_at = a + sample[:, None] * a_stride_b + position[:, None] * a_stride_t + columns_d * a_stride_w
            # A dropped sample's rows are not read at all.
            g_tile = tl.load(g_at, mask=live & (columns_p < p), other=0.0).to(tl.float32) * factor[:, None]
            a_tile = tl.load(a_at, mask=live & (columns_d < d), other=0.0).to(tl.float32)
            total = tl.dot(g_tile.trans(), a_tile, total, input_precision=PRECISION)
    else:
        blocks = tl.cdiv(length, BLOCK_T)
        steps = batch * blocks
        each = tl.cdiv(steps, SPLIT)
        first, end = segment * each, tl.minimum(segment * each + each, steps)
        unit = 0.0
        for b in tl.range(first // blocks, tl.cdiv(end, blocks)):
            factor = tl.load(factors_ptr + b)
            live = factor != 0
            # From here on `total` is in units of this sample's factor. A dropped sample is not read.
            total *= tl.where(live & (unit != 0), unit / tl.where(live, factor, 1.0), 1.0)
            unit = tl.where(live, factor, unit)
            # [BLOCK_T, BLOCK_P] and [BLOCK_T, BLOCK_D]
            if WHOLE:
                t = tl.where(live, 0, length)  # behind the sample there are zeros
                g_tile = load_tile(g, b, t, column_p, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
                a_tile = load_tile(a, b, t, column_d, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
                total = tl.dot(g_tile.trans(), a_tile, total, input_precision=PRECISION)
            else:
                start = tl.maximum(first - b * blocks, 0)
                stop = tl.where(live, tl.minimum(end - b * blocks, blocks), start)
                for block in tl.range(start, stop):
                    t = block * BLOCK_T
                    g_tile = load_tile(g, b, t, column_p, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
                    a_tile = load_tile(a, b, t, column_d, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
                    total = tl.dot(g_tile.trans(), a_tile, total, input_precision=PRECISION)
        total *= unit
    return segment, column_p, column_d, total


@jit
def clipped_sum_kernel(
    g_ptr: tl.tensor,
    a_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    out_ptr: tl.tensor,
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
    """Writes ``out`` [S, p, d], contiguous."""
    g = open_operand(g_ptr, batch, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(a_ptr, batch, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
    segment, column_p, column_d, total = clipped_sum_tile(
        tl.program_id(0), g, a, factors_ptr, batch, length, p, d,
        g_stride_b, g_stride_t, g_stride_w, a_stride_b, a_stride_t, a_stride_w,
        BLOCK_P, BLOCK_D, BLOCK_T, SPLIT, ROWS, WHOLE, G_LAYOUT, A_LAYOUT, PRECISION,
    )  # fmt: skip
    store_tile(out_ptr, segment, column_p, column_d, total, p, d)


_TEMPLATE = """
from flashnorm_compile.templates.clipped_sum import clipped_sum_tile
from flashnorm_compile.templates._triton import open_operand
{{def_kernel("G", "A", "FACTORS")}}
    batch = {{size("G", 0)}}
    length = {{size("G", 1)}}
    p = {{size("G", 2)}}
    d = {{size("A", 2)}}
    g = open_operand(G, batch, length, p, {{stride("G")}}, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(A, batch, length, d, {{stride("A")}}, BLOCK_T, BLOCK_D, A_LAYOUT)
    idx_s, column_p, column_d, total = clipped_sum_tile(
        tl.program_id(0), g, a, FACTORS, batch, length, p, d, {{stride("G")}}, {{stride("A")}},
        BLOCK_P, BLOCK_D, BLOCK_T, SPLIT, ROWS, WHOLE, G_LAYOUT, A_LAYOUT, PRECISION)
    idx_p = column_p + tl.arange(0, BLOCK_P)[:, None]
    idx_d = column_d + tl.arange(0, BLOCK_D)[None, :]
    inside = (idx_p < p) & (idx_d < d)
    {{store_output(("idx_s", "idx_p", "idx_d"), "total", "inside", indent_width=4, val_shape=("BLOCK_P", "BLOCK_D"))}}
"""


def settings(tiles: Tiles, whole: bool, dtype: torch.dtype, layouts: Sequence[int], precision: str) -> dict[str, Any]:
    """The kernel's constants that do not belong to the tile. ``whole``: no sample is longer than a step."""
    g_layout, a_layout = (POINTERS, POINTERS) if tiles.ROWS else layouts
    precision = "tf32x3" if tiles.ROWS and dtype.itemsize == 2 else precision
    return {"WHOLE": whole and not tiles.ROWS, "G_LAYOUT": g_layout, "A_LAYOUT": a_layout, "PRECISION": precision}


def launch(
    g_btp: Tensor, a_btd: Tensor, factors_b: Tensor, tiles: Tiles, layouts: Sequence[int], precision: str, whole: bool | None = None
) -> Tensor:
    """float32 [S, p, d]: the segments' partial sums. ``whole``: as ``settings`` takes it; by default what this length allows."""
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    out = torch.empty((tiles.SPLIT, p, d), dtype=torch.float32, device=g_btp.device)
    grid = (ceil_div(p, tiles.BLOCK_P) * ceil_div(d, tiles.BLOCK_D) * tiles.SPLIT,)
    whole = length <= tiles.BLOCK_T if whole is None else whole
    clipped_sum_kernel[grid](
        g_btp, a_btd, factors_b, out, batch, length, p, d, *g_btp.stride(), *a_btd.stride(),
        **settings(tiles, whole, g_btp.dtype, layouts, precision), **asdict(tiles),
    )  # fmt: skip
    return out


def clipped_sum_triton(g_btp: Tensor, a_btd: Tensor, factors_b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The kernel with the best tiles by the formula; other types than the kernel's, and empty sums, by ATen."""
    _check(g_btp, a_btd, factors_b)
    if not HAS_TRITON or g_btp.dtype not in KERNEL_DTYPES or g_btp.numel() == 0 or a_btd.numel() == 0:
        return clipped_sum_aten(g_btp, a_btd, factors_b, dtype)
    device, layouts = device_for(g_btp, a_btd)
    precision = matmul_precision(g_btp.dtype)
    best = tile_choices((*g_btp.shape, a_btd.shape[2]), g_btp.dtype, device, precision)[0]
    allocate_descriptors()
    segments = launch(g_btp, a_btd, factors_b.contiguous(), best.tiles, layouts, precision)
    return segments.sum(0, dtype=dtype) if best.tiles.SPLIT > 1 else segments[0].to(dtype or torch.float32)


def clipped_sum_aten(g_btp: Tensor, a_btd: Tensor, factors_b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In plain PyTorch, for every device: the smaller operand is scaled, and products are accumulated over chunks of B and T.

    Holds a copy of one chunk: of the smaller operand, and of the other unless it is contiguous, float32 or wider, and no sample is
    dropped.
    """
    _check(g_btp, a_btd, factors_b)
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    wide = torch.promote_types(g_btp.dtype, torch.float32)
    if g_btp.numel() == 0 or a_btd.numel() == 0:
        return torch.zeros((p, d), dtype=dtype or wide, device=g_btp.device)
    total = torch.empty((p, d), dtype=wide, device=g_btp.device)
    factors = factors_b.to(wide)[:, None, None]
    dropped = factors_b.device.type != "cpu" or not factors_b.all()
    as_it_is = not dropped and g_btp.dtype == wide and (a_btd if p <= d else g_btp).is_contiguous()
    copied = min(p, d) if as_it_is else max(p, d)
    positions = min(length, max(1, _CPU_CHUNK // copied))
    samples = min(batch, max(1, _CPU_CHUNK // copied // length))
    for first in range(0, batch, samples):
        for start in range(0, length, positions):
            g, a, c = g_btp, a_btd, factors
            if samples < batch or positions < length:
                chunk = slice(first, first + samples), slice(start, start + positions)
                g, a, c = g[chunk], a[chunk], c[chunk[0]]
            g, a = (g.to(wide) * c, a.to(wide)) if p <= d else (g.to(wide), a.to(wide) * c)
            if dropped:
                g, a = torch.where(c != 0, g, 0), torch.where(c != 0, a, 0)
            is_first = first == start == 0  # writes what the others add to
            total.addmm_(g.reshape(-1, p).t(), a.reshape(-1, d), beta=0 if is_first else 1)
    return total.to(dtype or wide)


def reference(g_btp: Tensor, a_btd: Tensor, factors_b: Tensor) -> Tensor:
    """float64 [p, d]: one outer product after another."""
    total = torch.zeros((g_btp.shape[2], a_btd.shape[2]), dtype=torch.float64)
    for g_tp, a_td, factor in zip(g_btp.double(), a_btd.double(), factors_b.tolist(), strict=True):
        for g_p, a_d in zip(g_tp, a_td, strict=True):
            if factor != 0:
                total += factor * torch.outer(g_p, a_d)
    return total


def check(g_btp: Tensor, a_btd: Tensor) -> None:
    """Refuses operands that do not fit together."""
    check_operands("clipped_sum", ("g_btp", g_btp), ("a_btd", a_btd))
    check_lengths("clipped_sum", ("g_btp", g_btp), ("a_btd", a_btd))


def _check(g_btp: Tensor, a_btd: Tensor, factors_b: Tensor) -> None:
    check(g_btp, a_btd)
    check_factors("clipped_sum", factors_b, g_btp.shape[0])


def _fake(g_btp: Tensor, a_btd: Tensor, factors_b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    _check(g_btp, a_btd, factors_b)
    dtype = dtype or torch.promote_types(g_btp.dtype, torch.float32)
    return g_btp.new_empty((g_btp.shape[2], a_btd.shape[2]), dtype=dtype)


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define(
    "clipped_sum(Tensor g_btp, Tensor a_btd, Tensor factors_b, ScalarType? dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("clipped_sum", clipped_sum_aten, "CompositeExplicitAutograd")
_library.impl("clipped_sum", clipped_sum_triton, "CUDA")
torch.library.register_fake("flashnorm::clipped_sum", _fake, lib=_library)


@SymbolicGridFn
def _grid(segments: Any, p: Any, d: Any, meta: Mapping[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(p, meta["BLOCK_P"]) * cdiv(d, meta["BLOCK_D"]) * segments, 1, 1)


def _aten_segments(g_btp: Tensor, a_btd: Tensor, factors_b: Tensor, *, segments: int) -> Tensor:
    """The template's output from ATen: the sum in the first segment."""
    total = clipped_sum_aten(g_btp, a_btd, factors_b, torch.float32)
    return torch.nn.functional.pad(total[None], (0, 0, 0, 0, 0, segments - 1))


_kernel = lowering.Kernel("clipped_sum", _TEMPLATE, _aten_segments, _grid)


def _cast(total: Any, dtype: torch.dtype | None) -> Any:
    return total if dtype in (None, torch.float32) else lowerings[torch.ops.prims.convert_element_type.default](total, dtype)


def _lower(g: Any, a: Any, factors: Any, dtype: torch.dtype | None = None) -> Any:
    if g.get_dtype() not in KERNEL_DTYPES:
        return None
    g, a, factors = lowering.realized(g, a, factors)
    (batch, length, p), d, where = g.get_size(), a.get_size()[2], g.get_device()
    if lowering.is_zero(batch, length, p, d):
        return _cast(lowering.zeros([p, d], where), dtype)
    device, layouts = lowering.device_for_nodes(g, a)
    precision = matmul_precision(g.get_dtype())
    sizes = tuple(lowering.hints(batch, length, p, d))
    choices = lowering.considered(tile_choices(sizes, g.get_dtype(), device, precision))
    # One buffer takes the segments of whichever tiles are chosen, so that all have as many as the best by the formula.
    segments = choices[0].tiles.SPLIT
    candidates = []
    for tiles in (replace(choice.tiles, SPLIT=segments) for choice in choices):
        whole = lowering.is_at_most(length, tiles.BLOCK_T)
        constants = {**tiles.constants, **settings(tiles, whole, g.get_dtype(), layouts, precision)}
        constants["PRECISION"] = repr(constants["PRECISION"])
        candidates.append(lowering.Candidate(constants, tiles.num_warps, tiles.num_stages))
    layout = lowering.output_layout([segments, p, d], where)
    partial = _kernel.lower([g, a, factors], layout, candidates, segments=segments)
    return _cast(lowerings[aten.sum.dim_IntList](partial, [0]) if segments > 1 else lowerings[aten.squeeze.dim](partial, 0), dtype)


lowering.register(torch.ops.flashnorm.clipped_sum.default, _lower)
