"""``flashnorm::weight_grads``: every sample's gradient of a weight, with its squared norm from the same pass ("materialize").

    flashnorm::weight_grads(Tensor g_btp, Tensor a_btd, ScalarType? store_dtype=None) -> (Tensor, Tensor)

    g_btp        [B, T, p]  bf16, fp16 or fp32 (fp64 on a CPU), any strides
    a_btd        [B, T, d]  the same dtype, any strides
    store_dtype  of the gradients; by default float32 (float64 for float64)
    returns      [B, p, d]  ``G_b^T A_b``, accumulated in float32, rounded once
                 [B]        float32; squared norms of the gradients *as stored*

What is released is ``sum_b c_b W_b`` over the stored values, so the norm that bounds c_b is theirs: the norm before rounding could
be smaller by 2^-9 (bf16), and the clipped contribution exceed the clip norm by as much.

Kernel. A batched GEMM, one program for each tile of each sample, T streamed. The epilogue rounds the tile, stores it, and squares
what it stored: 4 bytes for each tile instead of another read of B * p * d elements. Every tile has a slot of its own in [B, slots];
slots are added in a fixed order.

Source: Lee and Kifer 2021, "Scaling up Differentially Private Deep Learning with Fast Per-Example Gradient Clipping", section 4.

Legend: B samples, T positions, p rows and d columns of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.select_algorithm import SymbolicGridFn
from torch.utils._sympy.functions import CeilDiv

from . import _lowering as lowering
from ._order import before_later_layers
from ._store import store_tile
from ._triton import (
    HAS_TRITON,
    KERNEL_DTYPES,
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
from ._weight_tiles import Tiles, tile_choices

_CPU_CHUNK = 1 << 24  # elements of operands and products that the ATen form widens at a time


@jit
def weight_grad_tile(
    item: tl.tensor,
    g: tl.tensor,
    a: tl.tensor,
    squares_ptr: tl.tensor,
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
    G_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    STORED: tl.constexpr,
) -> tl.tensor:
    """(sample, first row, first column, product) of one item; writes the product's sum of squares. Neighbours share operands.

    ``product``: STORED [BLOCK_P, BLOCK_D], 0 outside the weight.
    """
    tiles = tl.cdiv(p, BLOCK_P) * tl.cdiv(d, BLOCK_D)
    b = item // tiles
    tile = item % tiles
    column_p, column_d = tile_corner(tile, p, d, BLOCK_P, BLOCK_D)
    product = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for t in tl.range(0, length, BLOCK_T):
        # [BLOCK_T, BLOCK_P] and [BLOCK_T, BLOCK_D]
        g_tile = load_tile(g, b, t, column_p, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
        a_tile = load_tile(a, b, t, column_d, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
        product = tl.dot(g_tile.trans(), a_tile, product, input_precision=PRECISION)
    stored = product.to(STORED)
    squares = squares_ptr + b.to(tl.int64) * slots
    tl.store(squares + tile, tl.sum(stored.to(tl.float32) * stored.to(tl.float32)))
    # Slots that other tile shapes would use count for nothing.
    for unused in tl.range(tile + tiles, slots, tiles):
        tl.store(squares + unused, 0.0)
    return b, column_p, column_d, stored


@jit
def weight_grads_kernel(
    g_ptr: tl.tensor,
    a_ptr: tl.tensor,
    out_ptr: tl.tensor,
    squares_ptr: tl.tensor,
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
    G_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Writes ``out`` [B, p, d], contiguous, and ``squares`` float32 [B, slots]."""
    g = open_operand(g_ptr, batch, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(a_ptr, batch, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
    b, column_p, column_d, stored = weight_grad_tile(
        tl.program_id(0), g, a, squares_ptr, length, p, d, slots,
        g_stride_b, g_stride_t, g_stride_w, a_stride_b, a_stride_t, a_stride_w,
        BLOCK_P, BLOCK_D, BLOCK_T, G_LAYOUT, A_LAYOUT, PRECISION, out_ptr.dtype.element_ty,
    )  # fmt: skip
    store_tile(out_ptr, b, column_p, column_d, stored, p, d)


_TEMPLATE = """
from flashnorm_compile.templates.weight_grads import weight_grad_tile
from flashnorm_compile.templates._triton import open_operand
{{def_kernel("G", "A", "SQUARES")}}
    batch = {{size("G", 0)}}
    length = {{size("G", 1)}}
    p = {{size("G", 2)}}
    d = {{size("A", 2)}}
    g = open_operand(G, batch, length, p, {{stride("G")}}, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(A, batch, length, d, {{stride("A")}}, BLOCK_T, BLOCK_D, A_LAYOUT)
    idx_b, column_p, column_d, stored = weight_grad_tile(
        tl.program_id(0), g, a, SQUARES, length, p, d, {{size("SQUARES", 1)}}, {{stride("G")}}, {{stride("A")}},
        BLOCK_P, BLOCK_D, BLOCK_T, G_LAYOUT, A_LAYOUT, PRECISION, STORED)
    idx_p = column_p + tl.arange(0, BLOCK_P)[:, None]
    idx_d = column_d + tl.arange(0, BLOCK_D)[None, :]
    inside = (idx_p < p) & (idx_d < d)
    {{store_output(("idx_b", "idx_p", "idx_d"), "stored", "inside", indent_width=4, val_shape=("BLOCK_P", "BLOCK_D"))}}
"""


def launch(
    g_btp: Tensor, a_btd: Tensor, store: torch.dtype, tiles: Tiles, layouts: Sequence[int], precision: str
) -> tuple[Tensor, Tensor]:
    """The kernel: gradients [B, p, d], and their squares float32 [B, slots]."""
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    slots = ceil_div(p, tiles.BLOCK_P) * ceil_div(d, tiles.BLOCK_D)
    out = torch.empty((batch, p, d), dtype=store, device=g_btp.device)
    squares = torch.empty((batch, slots), dtype=torch.float32, device=g_btp.device)
    weight_grads_kernel[(batch * slots,)](
        g_btp, a_btd, out, squares, batch, length, p, d, slots, *g_btp.stride(), *a_btd.stride(),
        G_LAYOUT=layouts[0], A_LAYOUT=layouts[1], PRECISION=precision, **asdict(tiles),
    )  # fmt: skip
    return out, squares


def _stored_dtype(g_btp: Any, store_dtype: torch.dtype | None) -> torch.dtype:
    return store_dtype or torch.promote_types(g_btp.dtype, torch.float32)


def weight_grads_triton(g_btp: Tensor, a_btd: Tensor, store_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The kernel with the best tiles by the formula; other types than the kernel's, and empty operands, by ATen."""
    _check(g_btp, a_btd)
    store = _stored_dtype(g_btp, store_dtype)
    if g_btp.dtype not in KERNEL_DTYPES or store not in KERNEL_DTYPES or g_btp.numel() == 0 or a_btd.numel() == 0:
        return weight_grads_aten(g_btp, a_btd, store)
    device, layouts = device_for(g_btp, a_btd)
    precision = matmul_precision(g_btp.dtype)
    tiles = tile_choices((*g_btp.shape, a_btd.shape[2]), g_btp.dtype, device, precision, store)[0]
    allocate_descriptors()
    out, squares = launch(g_btp, a_btd, store, tiles, layouts, precision)
    return out, squares.sum(1)


def weight_grads_aten(g_btp: Tensor, a_btd: Tensor, store_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """In plain PyTorch, for every device: a few samples at a time are widened and multiplied, if possible into the result."""
    _check(g_btp, a_btd)
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    store, wide = _stored_dtype(g_btp, store_dtype), torch.promote_types(g_btp.dtype, torch.float32)
    out = torch.empty((batch, p, d), dtype=store, device=g_btp.device)
    norms = torch.zeros(batch, dtype=wide, device=g_btp.device)
    copied = (0 if g_btp.dtype == wide else length * (p + d)) + (0 if store == wide else p * d)
    samples = max(1, _CPU_CHUNK // copied) if copied else max(1, batch)
    for first in range(0, batch, samples):
        few = slice(first, first + samples)
        g, a = g_btp[few].to(wide).mT, a_btd[few].to(wide)
        if store == wide:
            torch.bmm(g, a, out=out[few])
        else:
            out[few] = torch.bmm(g, a)
        norms[few] = torch.linalg.vector_norm(out[few].flatten(1), dim=1, dtype=wide).square()
    return out, norms.float()


def reference(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """float64 [B, p, d]: one outer product after another, not rounded to a stored type."""
    grads = torch.zeros((g_btp.shape[0], g_btp.shape[2], a_btd.shape[2]), dtype=torch.float64)
    for grad, g_tp, a_td in zip(grads, g_btp.double(), a_btd.double(), strict=True):
        for g_p, a_d in zip(g_tp, a_td, strict=True):
            grad += torch.outer(g_p, a_d)
    return grads


def _check(g_btp: Tensor, a_btd: Tensor) -> None:
    check_operands("weight_grads", ("g_btp", g_btp), ("a_btd", a_btd))
    check_lengths("weight_grads", ("g_btp", g_btp), ("a_btd", a_btd))


def _fake(g_btp: Tensor, a_btd: Tensor, store_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    _check(g_btp, a_btd)
    batch, _, p = g_btp.shape
    out = g_btp.new_empty((batch, p, a_btd.shape[2]), dtype=_stored_dtype(g_btp, store_dtype))
    return out, g_btp.new_empty((batch,), dtype=torch.float32)


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define(
    "weight_grads(Tensor g_btp, Tensor a_btd, ScalarType? store_dtype=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("weight_grads", weight_grads_aten, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("weight_grads", weight_grads_triton, "CUDA")
torch.library.register_fake("flashnorm::weight_grads", _fake, lib=_library)


@SymbolicGridFn
def _grid(batch: Any, p: Any, d: Any, meta: Mapping[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (batch * cdiv(p, meta["BLOCK_P"]) * cdiv(d, meta["BLOCK_D"]), 1, 1)


def _aten_form(g_btp: Tensor, a_btd: Tensor, squares: Tensor, *, store: torch.dtype) -> Tensor:
    """What the template leaves: the gradients, and the whole norm in the first slot."""
    out, norms = weight_grads_aten(g_btp, a_btd, store)
    squares.zero_()[:, 0] = norms
    return out


_kernel = lowering.Kernel("weight_grads", _TEMPLATE, _aten_form, _grid)


def _lower(g: Any, a: Any, store_dtype: torch.dtype | None = None) -> Any:
    store = store_dtype or torch.promote_types(g.get_dtype(), torch.float32)
    if g.get_dtype() not in KERNEL_DTYPES or store not in KERNEL_DTYPES:
        return None
    g, a = lowering.realized(g, a)
    (batch, length, p), d, where = g.get_size(), a.get_size()[2], g.get_device()
    if lowering.is_zero(batch, length, p, d):
        return None
    device, layouts = lowering.device_for_nodes(g, a)
    precision = matmul_precision(g.get_dtype())
    sizes = tuple(lowering.hints(batch, length, p, d))
    choices = lowering.considered(tile_choices(sizes, g.get_dtype(), device, precision, store))
    smallest = min(choices, key=lambda tiles: tiles.BLOCK_P * tiles.BLOCK_D)
    slots = CeilDiv(p, smallest.BLOCK_P) * CeilDiv(d, smallest.BLOCK_D)
    squares = lowering.scratch([batch, slots], torch.float32, where)
    settings = {
        "G_LAYOUT": layouts[0],
        "A_LAYOUT": layouts[1],
        "PRECISION": repr(precision),
        "STORED": {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}[store],
    }
    candidates = [lowering.Candidate({**t.constants, **settings}, t.num_warps, t.num_stages) for t in choices]
    layout = ir.FixedLayout(where, store, [batch, p, d])
    out = before_later_layers([g, a], lambda: _kernel.lower([g, a, squares], layout, candidates, mutated=[squares], store=store))
    return out, lowering.summed(squares)


lowering.register(torch.ops.flashnorm.weight_grads.default, _lower)
