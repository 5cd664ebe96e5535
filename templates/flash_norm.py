"""``flashnorm::flash_norm``: per-sample squared norms of ``G_b^T A_b``; the product never reaches memory.

    flashnorm::flash_norm(Tensor g_btp, Tensor a_btd) -> Tensor

    g_btp   [B, T, p]  bf16, fp16 or fp32 (fp64 on a CPU), any strides
    a_btd   [B, T, d]  the same dtype, any strides
    returns [B]        float32; 0 where T, p or d is 0

Kernel. A persistent grid; one item is a tile [BLOCK_P, BLOCK_D] of one sample's product. T streams through the tile, the
accumulator is float32, and the epilogue squares and sums it: 4 bytes leave the multiprocessor for a tile. Each tile has a slot of
its own in [B, tiles], and the slots are added afterwards in a fixed order: for a given shape the result is deterministic.

T-split. Where B * tiles leaves multiprocessors idle, T is cut into S segments. Partial tiles have to be added *before* squaring:
each item writes its partial tile to a place of its own, and the last one to arrive (a zeroed counter for each tile) adds all S in
their order, squares and sums. For a tile that moves 2 S partial tiles of 4 BLOCK_P BLOCK_D bytes through L2, where all of it stays
(132 * 128 KiB = 17 MB). A cluster would send S - 1 of them to its leader through distributed shared memory, once, and need no
counters: less than half the bytes, but at most 8 segments, and Triton cannot say it. Hence the workspace.
Without a split, the loops over items and positions are one for the compiler (``flatten``), so that an item's loads begin before the
item in front of it has been squared: a tenth to a quarter of the time at T 128 to 197 on an H200.
Tiles and S minimize ``Choice.clocks`` of ``_flash_tiles``, which is counted from published peaks; nothing was measured.

Legend: B samples, T positions, p rows and d columns of the weight, S segments of T.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._sympy.functions import CeilDiv

from . import _lowering as lowering
from ._flash_tiles import tile_choices
from ._triton import (
    HAS_TRITON,
    KERNEL_DTYPES,
    allocate_descriptors,
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

_CPU_CHUNK = 1 << 20  # elements of operands or product that the ATen form holds at a time: few enough to stay in a cache


@jit
def flash_norm_item(
    item: tl.tensor,
    g: tl.tensor,
    a: tl.tensor,
    partials: tl.tensor,
    counters: tl.tensor,
    length: tl.tensor,
    p: tl.tensor,
    d: tl.tensor,
    slots: tl.tensor,
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
    G_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """(sample, tile, sum of squares, whether it is complete) of one item; items are ordered [B, S, slots].

    Programs that run together therefore read the same positions of the same sample, which L2 then holds once. There may be more
    ``slots`` than tiles: the others get 0.
    """
    tiles = tl.cdiv(p, BLOCK_P) * tl.cdiv(d, BLOCK_D)
    tile = item % slots
    segment = (item // slots) % SPLIT
    b = item // (slots * SPLIT)
    column_p, column_d = tile_corner(tile, p, d, BLOCK_P, BLOCK_D)

    blocks = tl.cdiv(length, BLOCK_T)
    blocks_each = tl.cdiv(blocks, SPLIT)
    first = segment * blocks_each
    last = tl.where(tile < tiles, tl.minimum(first + blocks_each, blocks), first)
    product = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for block in tl.range(first, last):
        t = block * BLOCK_T
        # [BLOCK_T, BLOCK_P] and [BLOCK_T, BLOCK_D]
        g_tile = load_tile(g, b, t, column_p, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
        a_tile = load_tile(a, b, t, column_d, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
        product = tl.dot(g_tile.trans(), a_tile, product, input_precision=PRECISION)

    complete = item >= 0
    if SPLIT == 1:
        total = tl.sum(product * product)
    else:
        total = tl.sum(tl.zeros((BLOCK_P,), tl.float32))
        place = b.to(tl.int64) * slots + tile
        area: tl.constexpr = BLOCK_P * BLOCK_D
        rows = tl.arange(0, BLOCK_P)[:, None] * BLOCK_D
        columns = tl.arange(0, BLOCK_D)[None, :]
        tl.store(partials + (place * SPLIT + segment) * area + rows + columns, product)
        # All of this block's stores come before its arrival, and the last arrival before the loads below.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu")
        complete = arrived == SPLIT - 1
        if complete:
            tl.store(counters + place, 0)  # for a launch that finds the same counters
            # 16 rows at a time: a second whole tile would not fit the registers.
            few = tl.arange(0, 16)[:, None] * BLOCK_D + columns
            for row in tl.range(0, BLOCK_P, 16):
                summed = tl.zeros((16, BLOCK_D), tl.float32)
                for other in tl.range(0, SPLIT):
                    summed += tl.load(partials + (place * SPLIT + other) * area + row * BLOCK_D + few, cache_modifier=".cg")
                total += tl.sum(summed * summed)
    return b, tile, total, complete


@jit
def flash_norm_kernel(
    g_ptr: tl.tensor,
    a_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partials: tl.tensor,
    counters: tl.tensor,
    batch: tl.tensor,
    length: tl.tensor,
    p: tl.tensor,
    d: tl.tensor,
    slots: tl.tensor,
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
    G_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Writes ``out`` [B, slots], float32. Only for a split: ``partials`` float32 [B, slots, S, BLOCK_P, BLOCK_D], and ``counters``
    int32 [B, slots], zero before and after."""
    g = open_operand(g_ptr, batch, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(a_ptr, batch, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
    for item in tl.range(tl.program_id(0), batch * slots * SPLIT, tl.num_programs(0), flatten=SPLIT == 1):
        b, tile, total, complete = flash_norm_item(
            item, g, a, partials, counters, length, p, d, slots,
            g_stride_b, g_stride_t, g_stride_w, a_stride_b, a_stride_t, a_stride_w,
            BLOCK_P, BLOCK_D, BLOCK_T, SPLIT, G_LAYOUT, A_LAYOUT, PRECISION,
        )  # fmt: skip
        tl.store(out_ptr + b.to(tl.int64) * slots + tile, total, mask=complete)


_TEMPLATE = """
from flashnorm_compile.templates.flash_norm import flash_norm_item
from flashnorm_compile.templates._triton import open_operand
{% if GIVEN_SCRATCH %}
{{def_kernel("G", "A", "PARTIALS")}}
{% else %}
{{def_kernel("G", "A")}}
{% endif %}
    batch = {{size("G", 0)}}
    length = {{size("G", 1)}}
    p = {{size("G", 2)}}
    d = {{size("A", 2)}}
    slots = {{size(None, 1)}}
    g = open_operand(G, batch, length, p, {{stride("G")}}, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(A, batch, length, d, {{stride("A")}}, BLOCK_T, BLOCK_D, A_LAYOUT)
    for item in tl.range(tl.program_id(0), batch * slots * SPLIT, tl.num_programs(0), flatten=SPLIT == 1):
        idx_b, idx_tile, total, complete = flash_norm_item(
            item, g, a, {{"PARTIALS" if GIVEN_SCRATCH else "G"}}, {{"ws_ptr" if SPLIT > 1 else "G"}}, length, p, d, slots,
            {{stride("G")}}, {{stride("A")}},
            BLOCK_P, BLOCK_D, BLOCK_T, SPLIT, G_LAYOUT, A_LAYOUT, PRECISION)
        value = total + tl.zeros((1,), tl.float32)
        mask = complete & tl.full((1,), True, tl.int1)
        {{store_output(("idx_b", "idx_tile"), "value", "mask", indent_width=8, val_shape=("1",))}}
"""


def reference_flash_norm(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """``flashnorm::flash_norm`` as loops over samples, positions and rows of the weight, in float64."""
    norms = []
    for g_tp, a_td in zip(g_btp.double(), a_btd.double(), strict=True):
        total = torch.zeros((), dtype=torch.float64, device=g_btp.device)
        for row in range(g_tp.shape[1]):
            weight_row = torch.zeros(a_td.shape[1], dtype=torch.float64, device=g_btp.device)
            for t in range(g_tp.shape[0]):
                weight_row += g_tp[t, row] * a_td[t]
            total += weight_row.square().sum()
        norms.append(total)
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64, device=g_btp.device)


def aten_flash_norm(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """[B] through batched matrix products of a few samples, or a few rows of one sample, at a time."""
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    accumulator = torch.promote_types(g_btp.dtype, torch.float32)
    lengths = torch.empty((batch, p), dtype=accumulator, device=g_btp.device)  # of each sample's rows
    samples = min(max(1, batch), max(1, _CPU_CHUNK // max(1, p * d, length * (p + d))))
    rows = max(1, min(p, _CPU_CHUNK // max(1, d)))
    place = torch.empty((samples, rows, d), dtype=accumulator, device=g_btp.device)
    for b in range(0, batch, samples):
        few = slice(b, b + samples)
        a = a_btd[few].to(accumulator)
        for row in range(0, p, rows):
            some = slice(row, row + rows)
            g = g_btp[few, :, some].to(accumulator)
            product = torch.bmm(g.mT, a, out=place[: len(g), : g.shape[2]])
            torch.linalg.vector_norm(product, dim=2, out=lengths[few, some])
    return lengths.square_().sum(1).float()


def _check(g_btp: Tensor, a_btd: Tensor) -> None:
    check_operands("flash_norm", ("g_btp", g_btp), ("a_btd", a_btd))
    check_lengths("flash_norm", ("g_btp", g_btp), ("a_btd", a_btd))


def _launch(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """The kernel on a CUDA device, outside of generated code."""
    _check(g_btp, a_btd)
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    if g_btp.dtype not in KERNEL_DTYPES:
        return aten_flash_norm(g_btp, a_btd)
    if 0 in (batch, length, p, d):
        return torch.zeros(batch, dtype=torch.float32, device=g_btp.device)
    device, layouts = device_for(g_btp, a_btd)
    precision = matmul_precision(g_btp.dtype)
    choice = tile_choices(batch, length, p, d, g_btp.dtype, device, precision)[0]
    slots = choice.tiles_of_a_sample
    out = torch.empty((batch, slots), dtype=torch.float32, device=g_btp.device)
    partials, counters = out, out
    if choice.tiles.SPLIT > 1:
        partials = torch.empty(choice.partial_elements(slots), dtype=torch.float32, device=g_btp.device)
        counters = torch.zeros(batch * slots, dtype=torch.int32, device=g_btp.device)
    allocate_descriptors()
    items = batch * slots * choice.tiles.SPLIT
    flash_norm_kernel[(min(items, choice.programs(device)),)](
        g_btp, a_btd, out, partials, counters, batch, length, p, d, slots, *g_btp.stride(), *a_btd.stride(),
        G_LAYOUT=layouts[0], A_LAYOUT=layouts[1], PRECISION=precision, **asdict(choice.tiles),
    )  # fmt: skip
    return out.sum(1)


def _fake(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    _check(g_btp, a_btd)
    return g_btp.new_empty(g_btp.shape[0], dtype=torch.float32)


def _on_any_device(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    _check(g_btp, a_btd)
    return aten_flash_norm(g_btp, a_btd)


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define("flash_norm(Tensor g_btp, Tensor a_btd) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("flash_norm", _on_any_device, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("flash_norm", _launch, "CUDA")
torch.library.register_fake("flashnorm::flash_norm", _fake, lib=_library)


def _aten_slots(g_btp: Tensor, a_btd: Tensor, partials: Tensor | None = None, *, slots: int) -> Tensor:
    """The template's output from ATen: the norm in the first slot."""
    return torch.nn.functional.pad(aten_flash_norm(g_btp, a_btd)[:, None], (0, slots - 1))


_kernel = lowering.Kernel("flash_norm", _TEMPLATE, _aten_slots)


def _lower(g: Any, a: Any) -> Any:
    g, a = lowering.realized(g, a)
    batch, length, p = g.get_size()
    d = a.get_size()[2]
    where, dtype = g.get_device(), g.get_dtype()
    if dtype not in KERNEL_DTYPES:
        return None
    if lowering.is_zero(batch, length, p, d):
        return lowering.zeros([batch], where)
    device, layouts = lowering.device_for_nodes(g, a)
    precision = matmul_precision(dtype)
    samples, positions, rows, columns = lowering.hints(batch, length, p, d)
    choices = lowering.considered(tile_choices(samples, positions, rows, columns, dtype, device, precision))
    smallest = min(choices, key=lambda choice: choice.tiles.BLOCK_P * choice.tiles.BLOCK_D).tiles
    slots = CeilDiv(p, smallest.BLOCK_P) * CeilDiv(d, smallest.BLOCK_D)
    elements = max(choice.partial_elements(1) // choice.batch for choice in choices)
    inputs = [g, a] + ([lowering.scratch([batch * slots * elements], torch.float32, where)] if elements else [])
    candidates = [
        lowering.Candidate(
            {
                **choice.constants,
                "GIVEN_SCRATCH": bool(elements),
                "G_LAYOUT": layouts[0],
                "A_LAYOUT": layouts[1],
                "PRECISION": repr(precision),
                "PROGRAMS": choice.programs(device),
            },
            choice.tiles.num_warps,
            choice.tiles.num_stages,
            batch * slots if choice.tiles.SPLIT > 1 else 0,
        )
        for choice in choices
    ]
    layout = lowering.output_layout([batch, slots], where)
    return lowering.summed(_kernel.lower(inputs, layout, candidates, mutated=inputs[2:], slots=slots))


lowering.register(torch.ops.flashnorm.flash_norm.default, _lower)
