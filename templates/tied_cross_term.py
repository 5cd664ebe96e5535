"""``flashnorm::tied_cross_term``: what a weight that is both an embedding and an output head adds to the squared norm.

    flashnorm::tied_cross_term(Tensor h_btd, Tensor index_bt, Tensor g_bsv, Tensor a_bsd, int padding_idx) -> (Tensor, Tensor)

    h_btd        [B, T, d]  gradient of the looked-up rows; bf16, fp16 or fp32 (fp64 on a CPU), any strides, as all three
    index_bt     [B, T]     int64 or int32: row t of sample b was looked up at index[b, t]; a negative one counts from the end
    g_bsv        [B, S, V]  gradient of the head's output
    a_bsd        [B, S, d]  input of the head
    padding_idx  a row that the embedding gives no gradient; -1 for none, else in [0, V)
    returns      two float32 [B]: the cross term, and the same with absolute values

    2 <E_b, H_b> = 2 * sum_{t,s} (h_t . a_s) * g_s[index_t],  E_b = sum_t e_{index_t} h_t^T,  H_b = sum_s g_s a_s^T

so that ``||E_b + H_b||^2 = ||E_b||^2 + ||H_b||^2 + cross``. The sum may cancel; the second result times 2^-22 (``ROUNDING`` of
``ghost_norm``) is what the rounding of its terms may hide.

Kernel. A persistent grid; one item is a tile [BLOCK_T, BLOCK_S] of ``h_t . a_s``, a float32 accumulator in registers. The matching
elements of G are gathered by index, multiplied in and summed: no T x S product and nothing of size V is written. FLOPs: 2 B T S d.
Bytes: a gathered element costs a sector of 32, so 32 B T S, against 2 B S V for reading all of G; below V = 16 T the whole would be
cheaper to read, but no vocabulary is that small. Each item has a slot of its own, added in float64 in a fixed order.

Legend: B samples, T looked-up positions, S positions of the head (T and S are mostly equal), d columns and V rows of the weight.
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import lowerings
from torch.utils._sympy.functions import CeilDiv

from . import _lowering as lowering
from ._ghost_tiles import PairTiles, pair_choices
from ._triton import (
    HAS_TRITON,
    KERNEL_DTYPES,
    Device,
    allocate_descriptors,
    ceil_div,
    check_indices,
    check_lengths,
    check_operands,
    device_for,
    jit,
    load_tile,
    matmul_precision,
    open_operand,
    tl,
)

aten, prims = torch.ops.aten, torch.ops.prims

_CPU_CHUNK = 1 << 22  # elements of float64 products that the ATen form holds at a time
_CPU_ROWS = 256


@functools.lru_cache(maxsize=4096)
def cross_choices(batch: int, length: int, d: int, dtype: torch.dtype, device: Device, precision: str) -> list[PairTiles]:
    """The tiles of ``ghost_norm`` up to 64: the gathered elements' addresses take twice the registers of an accumulator."""
    return [tiles for tiles in pair_choices(batch, length, d, dtype, device, precision) if tiles.BLOCK <= 64]


@jit
def cross_term_item(
    item: tl.tensor, h: tl.tensor, a: tl.tensor, ids_ptr: tl.tensor, g_ptr: tl.tensor, length: tl.tensor, heads: tl.tensor,
    d: tl.tensor, vocabulary: tl.tensor, padding: tl.tensor, down: tl.tensor, across: tl.tensor,
    ids_stride_b: tl.tensor, ids_stride_t: tl.tensor,
    h_stride_b: tl.tensor, h_stride_t: tl.tensor, h_stride_w: tl.tensor,
    g_stride_b: tl.tensor, g_stride_t: tl.tensor, g_stride_w: tl.tensor,
    a_stride_b: tl.tensor, a_stride_t: tl.tensor, a_stride_w: tl.tensor,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, H_LAYOUT: tl.constexpr, A_LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(sample, tile of T, tile of S, [sum, sum of absolute values]) of one item; items are ordered [B, down, across].

    There may be more slots (down, across) than tiles: the others get 0.
    """
    column = item % across
    row = (item // across) % down
    b = item // (across * down)
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    for block in tl.range(0, tl.cdiv(d, BLOCK_K)):
        w = block * BLOCK_K
        left = load_tile(h, b, row * BLOCK, w, length, d, h_stride_b, h_stride_t, h_stride_w, BLOCK, BLOCK_K, H_LAYOUT)
        right = load_tile(a, b, column * BLOCK, w, heads, d, a_stride_b, a_stride_t, a_stride_w, BLOCK, BLOCK_K, A_LAYOUT)
        products = tl.dot(left, right.trans(), products, input_precision=PRECISION)

    rows = (row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (column * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    sample = b.to(tl.int64)
    ids = tl.load(ids_ptr + sample * ids_stride_b + rows * ids_stride_t, mask=rows < length, other=0).to(tl.int64)
    ids = tl.where(ids < 0, ids + vocabulary, ids)
    inside = ((rows < length) & (ids != padding))[:, None] & (columns < heads)[None, :]
    offsets = columns[None, :] * g_stride_t + ids[:, None] * g_stride_w
    gathered = tl.load(g_ptr + sample * g_stride_b + offsets, mask=inside, other=0.0)
    terms = tl.where(inside, products * gathered.to(tl.float32), 0.0)
    return b, row, column, 2 * tl.where(tl.arange(0, 2) == 0, tl.sum(terms), tl.sum(tl.abs(terms)))


@jit
def cross_term_kernel(
    h_ptr: tl.tensor, ids_ptr: tl.tensor, g_ptr: tl.tensor, a_ptr: tl.tensor, out_ptr: tl.tensor, batch: tl.tensor,
    length: tl.tensor, heads: tl.tensor, d: tl.tensor, vocabulary: tl.tensor, padding: tl.tensor, down: tl.tensor,
    across: tl.tensor, ids_stride_b: tl.tensor, ids_stride_t: tl.tensor,
    h_stride_b: tl.tensor, h_stride_t: tl.tensor, h_stride_w: tl.tensor,
    g_stride_b: tl.tensor, g_stride_t: tl.tensor, g_stride_w: tl.tensor,
    a_stride_b: tl.tensor, a_stride_t: tl.tensor, a_stride_w: tl.tensor,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, H_LAYOUT: tl.constexpr, A_LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``out`` [B, down, across, 2], float32."""
    h = open_operand(h_ptr, batch, length, d, h_stride_b, h_stride_t, h_stride_w, BLOCK, BLOCK_K, H_LAYOUT)
    a = open_operand(a_ptr, batch, heads, d, a_stride_b, a_stride_t, a_stride_w, BLOCK, BLOCK_K, A_LAYOUT)
    for item in tl.range(tl.program_id(0), batch * down * across, tl.num_programs(0)):
        b, row, column, values = cross_term_item(
            item, h, a, ids_ptr, g_ptr, length, heads, d, vocabulary, padding, down, across, ids_stride_b, ids_stride_t,
            h_stride_b, h_stride_t, h_stride_w, g_stride_b, g_stride_t, g_stride_w, a_stride_b, a_stride_t, a_stride_w,
            BLOCK, BLOCK_K, H_LAYOUT, A_LAYOUT, PRECISION,
        )  # fmt: skip
        tl.store(out_ptr + ((b.to(tl.int64) * down + row) * across + column) * 2 + tl.arange(0, 2), values)


_TEMPLATE = """
from flashnorm_compile.templates.tied_cross_term import cross_term_item
from flashnorm_compile.templates._triton import open_operand
{{def_kernel("H", "IDS", "G", "A")}}
    batch = {{size("H", 0)}}
    length = {{size("H", 1)}}
    heads = {{size("A", 1)}}
    d = {{size("H", 2)}}
    h = open_operand(H, batch, length, d, {{stride("H")}}, BLOCK, BLOCK_K, H_LAYOUT)
    a = open_operand(A, batch, heads, d, {{stride("A")}}, BLOCK, BLOCK_K, A_LAYOUT)
    idx_which = tl.arange(0, 2)
    mask = idx_which < 2
    down = {{size(None, 1)}}
    across = {{size(None, 2)}}
    for item in tl.range(tl.program_id(0), batch * down * across, tl.num_programs(0)):
        idx_b, idx_row, idx_column, values = cross_term_item(
            item, h, a, IDS, G, length, heads, d, {{size("G", 2)}}, PADDING, down, across, {{stride("IDS")}},
            {{stride("H")}}, {{stride("G")}}, {{stride("A")}}, BLOCK, BLOCK_K, H_LAYOUT, A_LAYOUT, PRECISION)
        {{store_output(("idx_b", "idx_row", "idx_column", "idx_which"), "values", "mask", indent_width=8, val_shape=("2",))}}
"""


def reference_tied_cross_term(h_btd: Tensor, index_bt: Tensor, g_bsv: Tensor, a_bsd: Tensor, padding_idx: int = -1) -> Tensor:
    """[B] float64: both gradients of the weight, written out for each sample, and twice their inner product."""
    vocabulary = g_bsv.shape[2]
    crosses = []
    for h_td, index_t, g_sv, a_sd in zip(h_btd.double(), index_bt.tolist(), g_bsv.double(), a_bsd.double(), strict=True):
        embedding = torch.zeros(vocabulary, h_td.shape[1], dtype=torch.float64)
        for t, index in enumerate(index_t):
            if index % vocabulary != padding_idx:
                embedding[index % vocabulary] += h_td[t].cpu()
        head = torch.zeros_like(embedding)
        for s in range(g_sv.shape[0]):
            head += g_sv[s].cpu()[:, None] * a_sd[s].cpu()[None, :]
        crosses.append(2 * (embedding * head).sum())
    return torch.stack(crosses) if crosses else torch.zeros(0, dtype=torch.float64)


def aten_tied_cross_term(h_btd: Tensor, index_bt: Tensor, g_bsv: Tensor, a_bsd: Tensor, padding_idx: int) -> Tensor:
    """[B, 2] from float64 products of a few samples and ``_CPU_ROWS`` looked-up positions."""
    (batch, length, _), heads = h_btd.shape, g_bsv.shape[1]
    index = index_bt.long()
    index = torch.where(index < 0, index + g_bsv.shape[2], index)
    sums = torch.zeros(batch, 2, dtype=torch.float64, device=h_btd.device)
    rows = min(max(1, length), _CPU_ROWS)
    samples = max(1, _CPU_CHUNK // max(1, rows * heads))
    for b in range(0, batch, samples):
        few = slice(b, b + samples)
        a = a_bsd[few].double()
        for row in range(0, length, rows):
            ids = index[few, row : row + rows]
            products_bst = torch.bmm(a, h_btd[few, row : row + rows].double().mT)
            products_bst *= torch.gather(g_bsv[few], 2, ids[:, None, :].expand(-1, heads, -1))
            products_bst = torch.where((ids != padding_idx)[:, None, :], products_bst, 0)
            sums[few] += 2 * torch.stack([products_bst.sum((1, 2)), products_bst.abs().sum((1, 2))], 1)
    return sums.float()


def _check(h_btd: Tensor, index_bt: Tensor, g_bsv: Tensor, a_bsd: Tensor) -> None:
    check_operands("tied_cross_term", ("h_btd", h_btd), ("g_bsv", g_bsv), ("a_bsd", a_bsd))
    check_lengths("tied_cross_term", ("h_btd", h_btd), ("index_bt", index_bt))
    check_lengths("tied_cross_term", ("g_bsv", g_bsv), ("a_bsd", a_bsd))
    check_indices("tied_cross_term", index_bt)
    if h_btd.shape[0] != a_bsd.shape[0] or h_btd.shape[2] != a_bsd.shape[2]:
        raise ValueError(
            f"flashnorm::tied_cross_term got h_btd of shape {tuple(h_btd.shape)} and a_bsd of shape {tuple(a_bsd.shape)}; "
            "samples and columns must agree."
        )


def _launch(h_btd: Tensor, index_bt: Tensor, g_bsv: Tensor, a_bsd: Tensor, padding_idx: int = -1) -> tuple[Tensor, Tensor]:
    """The kernel on a CUDA device, outside of generated code."""
    _check(h_btd, index_bt, g_bsv, a_bsd)
    batch, length, d = h_btd.shape
    heads, vocabulary = g_bsv.shape[1:]
    if h_btd.dtype not in KERNEL_DTYPES or 0 in (batch, length, heads, d, vocabulary):
        return _columns(aten_tied_cross_term(h_btd, index_bt, g_bsv, a_bsd, padding_idx))
    device, layouts = device_for(h_btd, a_bsd)
    precision = matmul_precision(h_btd.dtype)
    tiles = cross_choices(batch, max(length, heads), d, h_btd.dtype, device, precision)[0]
    shape = (batch, ceil_div(length, tiles.BLOCK), ceil_div(heads, tiles.BLOCK), 2)
    out = torch.empty(shape, dtype=torch.float32, device=h_btd.device)
    allocate_descriptors()
    cross_term_kernel[(min(out.numel() // 2, tiles.programs(h_btd.element_size(), device)),)](
        h_btd, index_bt, g_bsv, a_bsd, out, batch, length, heads, d, vocabulary, padding_idx, *shape[1:3], *index_bt.stride(),
        *h_btd.stride(), *g_bsv.stride(), *a_bsd.stride(),
        H_LAYOUT=layouts[0], A_LAYOUT=layouts[1], PRECISION=precision, **asdict(tiles),
    )  # fmt: skip
    return _columns(out.double().sum((1, 2)).float())


def _columns(sums_b2: Tensor) -> tuple[Tensor, Tensor]:
    """Operators must not return two views of one tensor."""
    return sums_b2[:, 0].clone(), sums_b2[:, 1].clone()


def _fake(h_btd: Tensor, index_bt: Tensor, g_bsv: Tensor, a_bsd: Tensor, padding_idx: int = -1) -> tuple[Tensor, Tensor]:
    _check(h_btd, index_bt, g_bsv, a_bsd)
    batch = h_btd.shape[0]
    return h_btd.new_empty(batch, dtype=torch.float32), h_btd.new_empty(batch, dtype=torch.float32)


def _on_any_device(h_btd: Tensor, index_bt: Tensor, g_bsv: Tensor, a_bsd: Tensor, padding_idx: int = -1) -> tuple[Tensor, Tensor]:
    _check(h_btd, index_bt, g_bsv, a_bsd)
    return _columns(aten_tied_cross_term(h_btd, index_bt, g_bsv, a_bsd, padding_idx))


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define(
    "tied_cross_term(Tensor h_btd, Tensor index_bt, Tensor g_bsv, Tensor a_bsd, int padding_idx=-1) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("tied_cross_term", _on_any_device, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("tied_cross_term", _launch, "CUDA")
torch.library.register_fake("flashnorm::tied_cross_term", _fake, lib=_library)


def _aten_slots(h: Tensor, ids: Tensor, g: Tensor, a: Tensor, *, down: int, across: int, padding_idx: int) -> Tensor:
    """The template's output from ATen: both sums in the first slot."""
    sums = aten_tied_cross_term(h, ids, g, a, padding_idx)
    return torch.nn.functional.pad(sums[:, None, None, :], (0, 0, 0, across - 1, 0, down - 1))


_kernel = lowering.Kernel("tied_cross_term", _TEMPLATE, _aten_slots)


def _lower(h: Any, index: Any, g: Any, a: Any, padding_idx: int = -1) -> Any:
    h, index, g, a = lowering.realized(h, index, g, a)
    (batch, length, d), (heads, vocabulary) = h.get_size(), g.get_size()[1:]
    where, dtype = h.get_device(), h.get_dtype()
    if dtype not in KERNEL_DTYPES or lowering.is_zero(batch, length, d, heads, vocabulary):
        return None
    device, layouts = lowering.device_for_nodes(h, a)
    precision = matmul_precision(dtype)
    samples, positions, width = lowering.hints(batch, length, d)
    choices = lowering.considered(cross_choices(samples, positions, width, dtype, device, precision))
    block = min(tiles.BLOCK for tiles in choices)
    down, across = CeilDiv(length, block), CeilDiv(heads, block)
    given = {"H_LAYOUT": layouts[0], "A_LAYOUT": layouts[1], "PRECISION": repr(precision), "PADDING": padding_idx}
    candidates = [
        lowering.Candidate(
            {**tiles.constants, **given, "PROGRAMS": tiles.programs(dtype.itemsize, device)}, tiles.num_warps, tiles.num_stages
        )
        for tiles in choices
    ]
    layout = lowering.output_layout([batch, down, across, 2], where)
    slots = _kernel.lower([h, index, g, a], layout, candidates, down=down, across=across, padding_idx=padding_idx)
    wide = lowerings[prims.convert_element_type.default](slots, torch.float64)
    sums = lowerings[prims.convert_element_type.default](lowerings[aten.sum.dim_IntList](wide, [1, 2]), torch.float32)
    return tuple(lowerings[aten.select.int](sums, 1, column) for column in (0, 1))


lowering.register(torch.ops.flashnorm.tied_cross_term.default, _lower)
