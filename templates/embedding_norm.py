"""``flashnorm::embedding_norm``: per-sample squared norms of an embedding's gradient; no row of the table is ever written.

    flashnorm::embedding_norm(Tensor g_btd, Tensor index_bt, SymInt num_embeddings, int padding_idx) -> Tensor

    g_btd           [B, T, d]  bf16, fp16 or fp32 (fp64 on a CPU), any strides: gradient of the looked-up rows
    index_bt        [B, T]     int64 or int32: row t of sample b came from row index[b, t]; a negative one counts from the end
    num_embeddings  V, rows of the table
    padding_idx     a row that gets no gradient; -1 for none, else in [0, V)
    returns         [B]        float32: sum over rows v of |sum of g_t over t with index v|^2

Which form. Pairs of equal indices (a T x T product with a mask) read G about T / 128 times, from L2, and do B T^2 d FLOPs. Sorting
the indices moves 32 bytes a position and lets G be read once, 2 B T d bytes, with FLOPs linear in T: at B 8, T 1024, d 768 that is
13 MB against 113 MB. It also adds before it squares, so that nothing cancels. Sorting is used for every shape.

Kernel. Indices are sorted within each sample, equal ones in their order. One item walks a range of sorted positions over BLOCK_D
columns: a block of gathered rows is added up by index as a product with a 0/1 matrix (exact, in float32), and the sum of the index
that is still open is carried on. An index belongs to the range in which it starts: that range reads on past its end until the index
ends, the next one skips it. Work is linear in T for any indices, and the order of all sums is fixed. Each item writes its sum of
squares and ``sum_t |g_t|`` over its columns to a slot of its own, [B, column blocks, ranges, 2].

What rounding may hide: for each block of columns the result is never below ``(CANCELLED * sum_t |g_t|)^2``, as in ``ghost_norm``.

Legend: B samples, T positions, d columns, V rows of the table.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import fallback_handler, lowerings
from torch.utils._sympy.functions import CeilDiv

from . import _lowering as lowering
from ._triton import (
    HAS_TRITON,
    KERNEL_DTYPES,
    Device,
    ceil_div,
    check_indices,
    check_lengths,
    check_operands,
    device_of,
    jit,
    narrowed,
    tl,
)
from .ghost_norm import CANCELLED

aten = torch.ops.aten

_CPU_CHUNK = 1 << 24  # elements of G that the ATen form holds at a time, in float32


@dataclass(frozen=True)
class RangeTiles:
    """BLOCK_T sorted positions by BLOCK_D columns at a time, RANGES ranges of positions, and how the kernel is compiled."""

    BLOCK_T: int
    BLOCK_D: int
    RANGES: int
    num_warps: int
    num_stages: int = 3

    @property
    def constants(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name.isupper()}


@functools.lru_cache(maxsize=4096)
def range_tiles(batch: int, length: int, d: int, dtype: torch.dtype, device: Device) -> RangeTiles:
    """256 bytes of a row at a time, two cache lines; ranges until each multiprocessor has two items, of four blocks or more.

    float32 is added as it is, without tensor cores: half the positions, since FLOPs grow with them, and one cache line, since more
    spills. Counted from sizes; nothing was measured.
    """
    half = dtype.itemsize == 2
    block_t = narrowed(64 if half else 32, length)
    block_d = narrowed(128 if half else 32, d)
    items = batch * ceil_div(d, block_d)
    ranges = min(ceil_div(2 * device.multiprocessors, items), ceil_div(length, 4 * block_t))
    return RangeTiles(block_t, block_d, max(1, ranges), num_warps=8 if block_t * block_d >= 64 * 64 else 4)


@jit
def add_by_index(
    carry: tl.tensor, total: tl.tensor, reach: tl.tensor, g_ptr: tl.tensor, ids: tl.tensor, order: tl.tensor,
    t: tl.tensor, start: tl.tensor, stop: tl.tensor, before: tl.tensor, tail: tl.tensor, padding: tl.tensor,
    column: tl.tensor, length: tl.tensor, d: tl.tensor, stride_t: tl.tensor, stride_w: tl.tensor,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(carry, total, reach) after sorted positions t.. of a range; ``carry`` [BLOCK_D] is the sum of the index that is open."""
    lane = tl.arange(0, BLOCK_T)
    rows = t + lane
    index = tl.load(ids + rows, mask=rows < length, other=-1)
    previous = tl.load(ids + rows - 1, mask=(rows > 0) & (rows <= length), other=-1)
    ours = (index != before) & ((rows < stop) | (index == tail)) & (rows < length) & (index != padding)
    position = tl.load(order + rows, mask=rows < length, other=0)
    columns = column + tl.arange(0, BLOCK_D)
    offsets = position[:, None] * stride_t + columns.to(tl.int64)[None, :] * stride_w
    values = tl.load(g_ptr + offsets, mask=ours[:, None] & (columns < d)[None, :], other=0.0)  # [BLOCK_T, BLOCK_D]
    wide = values.to(tl.float32)
    reach += tl.sum(tl.sqrt(tl.sum(wide * wide, 1)))

    rank = tl.cumsum(((index != previous) & (lane > 0)).to(tl.int32), 0)
    last = tl.max(rank)
    belongs = (lane[:, None] == rank[None, :]).to(tl.float32).to(values.dtype)
    sums = tl.dot(belongs, values, input_precision="ieee")  # [ranks, BLOCK_D]
    goes_on = (t > start) & (tl.sum(tl.where(lane == 0, (index == previous).to(tl.int32), 0)) > 0)
    total += tl.where(goes_on, 0.0, tl.sum(carry * carry))
    sums += tl.where((lane == 0)[:, None] & goes_on, carry[None, :], 0.0)
    total += tl.sum(tl.where((lane < last)[:, None], sums * sums, 0.0))
    return tl.sum(tl.where((lane == last)[:, None], sums, 0.0), 0), total, reach


@jit
def embedding_norm_item(
    item: tl.tensor, g_ptr: tl.tensor, ids_ptr: tl.tensor, order_ptr: tl.tensor, length: tl.tensor, d: tl.tensor,
    padding: tl.tensor, stride_b: tl.tensor, stride_t: tl.tensor, stride_w: tl.tensor,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, RANGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(sample, column block, range, [sum, reach]) of one item; items are ordered [B, ranges, column blocks]."""
    tiles = tl.cdiv(d, BLOCK_D)
    tile = item % tiles
    part = (item // tiles) % RANGES
    b = (item // (tiles * RANGES)).to(tl.int64)
    ids = ids_ptr + b * length
    order = order_ptr + b * length
    g = g_ptr + b * stride_b
    each = tl.cdiv(tl.cdiv(length, BLOCK_T), RANGES) * BLOCK_T
    start = part * each
    stop = tl.minimum(start + each, length)
    before = tl.load(ids + start - 1, mask=(start > 0) & (start <= length), other=-1)
    tail = tl.load(ids + stop - 1, mask=stop > start, other=-2)

    carry = tl.zeros((BLOCK_D,), tl.float32)
    total = tl.sum(carry)
    reach = tl.sum(carry)
    for t in tl.range(start, stop, BLOCK_T):
        carry, total, reach = add_by_index(
            carry, total, reach, g, ids, order, t, start, stop, before, tail, padding, tile * BLOCK_D, length, d,
            stride_t, stride_w, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    t = start + each
    following = tl.load(ids + t, mask=t < length, other=-1)
    while (following == tail) & (tail != before):
        carry, total, reach = add_by_index(
            carry, total, reach, g, ids, order, t, start, stop, before, tail, padding, tile * BLOCK_D, length, d,
            stride_t, stride_w, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        t += BLOCK_T
        following = tl.load(ids + t, mask=t < length, other=-1)
    total += tl.sum(carry * carry)
    return b, tile, part, tl.where(tl.arange(0, 2) == 0, total, reach)


@jit
def embedding_norm_kernel(
    g_ptr: tl.tensor, ids_ptr: tl.tensor, order_ptr: tl.tensor, out_ptr: tl.tensor, batch: tl.tensor, length: tl.tensor,
    d: tl.tensor, padding: tl.tensor, stride_b: tl.tensor, stride_t: tl.tensor, stride_w: tl.tensor,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, RANGES: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``out`` [B, column blocks, RANGES, 2], float32. ``ids`` and ``order``: what ``sort_indices`` returns."""
    tiles = tl.cdiv(d, BLOCK_D)
    for item in tl.range(tl.program_id(0), batch * tiles * RANGES, tl.num_programs(0)):
        b, tile, part, values = embedding_norm_item(
            item, g_ptr, ids_ptr, order_ptr, length, d, padding, stride_b, stride_t, stride_w, BLOCK_T, BLOCK_D, RANGES
        )
        tl.store(out_ptr + ((b * tiles + tile) * RANGES + part) * 2 + tl.arange(0, 2), values)


_TEMPLATE = """
from flashnorm_compile.templates.embedding_norm import embedding_norm_item
{{def_kernel("G", "IDS", "ORDER")}}
    d = {{size("G", 2)}}
    tiles = {{size(None, 1)}}
    idx_which = tl.arange(0, 2)
    mask = idx_which < 2
    for item in tl.range(tl.program_id(0), {{size("G", 0)}} * tiles * RANGES, tl.num_programs(0)):
        idx_b, idx_tile, idx_part, values = embedding_norm_item(
            item, G, IDS, ORDER, {{size("G", 1)}}, d, PADDING, {{stride("G")}}, BLOCK_T, BLOCK_D, RANGES)
        {{store_output(("idx_b", "idx_tile", "idx_part", "idx_which"), "values", "mask", indent_width=8, val_shape=("2",))}}
"""


def reference_embedding_norm(g_btd: Tensor, index_bt: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    """[B] float64: a table of gradients for each sample, filled position by position, with nothing added for rounding."""
    norms = []
    for g_td, index_t in zip(g_btd.double(), index_bt.tolist(), strict=True):
        table = torch.zeros(num_embeddings, g_td.shape[1], dtype=torch.float64)
        for t, index in enumerate(index_t):
            if index % num_embeddings != padding_idx:
                table[index % num_embeddings] += g_td[t].cpu()
        norms.append((table * table).sum())
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)


def sort_indices(index_bt: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """(sorted, positions), int64 [B, T], contiguous. Equal ones keep their order, negative ones count from the end."""
    index = index_bt.long()
    ids, order = torch.sort(torch.where(index < 0, index + num_embeddings, index), dim=1, stable=True)
    return ids.contiguous(), order.contiguous()


def aten_sorted_norm(g_btd: Tensor, ids_bt: Tensor, order_bt: Tensor, padding_idx: int) -> Tensor:
    """[B] from sorted indices: equal ones are added, a few samples at a time, then squared."""
    batch, length, d = g_btd.shape
    accumulator = torch.promote_types(g_btd.dtype, torch.float32)
    norms = torch.zeros(batch, dtype=accumulator, device=g_btd.device)
    for b in range(0, batch, samples := max(1, _CPU_CHUNK // max(1, length * d))):
        few = slice(b, b + samples)
        ids, order = ids_bt[few], order_bt[few]
        values = torch.gather(g_btd[few], 1, order[:, :, None].expand(-1, -1, d)).to(accumulator)
        values = torch.where((ids != padding_idx)[:, :, None], values, 0)
        starts = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()], 1)
        segments = starts.cumsum(1) + torch.arange(len(ids), device=ids.device)[:, None] * length
        sums = values.new_zeros(len(ids) * length, d).index_add_(0, segments.reshape(-1), values.flatten(0, 1))
        reach = torch.linalg.vector_norm(values, dim=2).sum(1)
        norms[few] = torch.maximum(sums.square().view(len(ids), length * d).sum(1), (CANCELLED * reach).square())
    return norms.float()


def _bounded(slots: Tensor) -> Tensor:
    """[B] from slots [B, column blocks, ranges, 2]."""
    total, reach = slots.sum(2).unbind(2)
    return torch.maximum(total, (CANCELLED * reach).square()).sum(1)


def _check(g_btd: Tensor, index_bt: Tensor) -> None:
    check_operands("embedding_norm", ("g_btd", g_btd))
    check_lengths("embedding_norm", ("g_btd", g_btd), ("index_bt", index_bt))
    check_indices("embedding_norm", index_bt)


def _launch(g_btd: Tensor, index_bt: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    """The kernel on a CUDA device, outside of generated code."""
    _check(g_btd, index_bt)
    ids, order = sort_indices(index_bt, num_embeddings)
    batch, length, d = g_btd.shape
    if g_btd.dtype not in KERNEL_DTYPES:
        return aten_sorted_norm(g_btd, ids, order, padding_idx)
    if 0 in (batch, length, d):
        return torch.zeros(batch, dtype=torch.float32, device=g_btd.device)
    device = device_of(g_btd.device)
    tiles = range_tiles(batch, length, d, g_btd.dtype, device)
    out = torch.empty((batch, ceil_div(d, tiles.BLOCK_D), tiles.RANGES, 2), dtype=torch.float32, device=g_btd.device)
    embedding_norm_kernel[(min(out.numel() // 2, 2 * device.multiprocessors),)](
        g_btd, ids, order, out, batch, length, d, padding_idx, *g_btd.stride(), **asdict(tiles)
    )
    return _bounded(out)


def _fake(g_btd: Tensor, index_bt: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    _check(g_btd, index_bt)
    return g_btd.new_empty(g_btd.shape[0], dtype=torch.float32)


def _on_any_device(g_btd: Tensor, index_bt: Tensor, num_embeddings: int, padding_idx: int = -1) -> Tensor:
    _check(g_btd, index_bt)
    return aten_sorted_norm(g_btd, *sort_indices(index_bt, num_embeddings), padding_idx)


def _fake_sort(index_bt: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    both = [torch.empty(index_bt.shape, dtype=torch.int64, device=index_bt.device) for _ in range(2)]
    return both[0], both[1]


_library = torch.library.Library("flashnorm", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_library.define("embedding_norm(Tensor g_btd, Tensor index_bt, SymInt num_embeddings, int padding_idx=-1) -> Tensor", tags=_PT2)
_library.define("sort_indices(Tensor index_bt, SymInt num_embeddings) -> (Tensor, Tensor)", tags=_PT2)
_library.impl("embedding_norm", _on_any_device, "CompositeExplicitAutograd")
_library.impl("sort_indices", sort_indices, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("embedding_norm", _launch, "CUDA")
torch.library.register_fake("flashnorm::embedding_norm", _fake, lib=_library)
torch.library.register_fake("flashnorm::sort_indices", _fake_sort, lib=_library)

_sort = fallback_handler(torch.ops.flashnorm.sort_indices.default)


def _aten_slots(g_btd: Tensor, ids: Tensor, order: Tensor, *, tiles: int, ranges: int, padding_idx: int) -> Tensor:
    """The template's output from ATen: the norm in the first slot, and no reach, since rounding is in it already."""
    norms = aten_sorted_norm(g_btd, ids, order, padding_idx)
    return torch.nn.functional.pad(norms[:, None, None, None], (0, 1, 0, ranges - 1, 0, tiles - 1))


_kernel = lowering.Kernel("embedding_norm", _TEMPLATE, _aten_slots)


def _bounded_node(slots: Any) -> Any:
    """``_bounded`` in Inductor's IR."""
    sums = lowerings[aten.sum.dim_IntList](slots, [2])
    total, reach = (lowerings[aten.select.int](sums, 2, column) for column in (0, 1))
    mul = lowerings[aten.mul.Tensor]
    least = mul(mul(reach, reach), CANCELLED**2)
    return lowerings[aten.sum.dim_IntList](lowerings[aten.maximum.default](total, least), [1])


def _lower(g: Any, index: Any, num_embeddings: Any, padding_idx: int = -1) -> Any:
    batch, length, d = g.get_size()
    where, dtype = g.get_device(), g.get_dtype()
    if dtype not in KERNEL_DTYPES:
        return None
    if lowering.is_zero(batch, length, d):
        return lowering.zeros([batch], where)
    inputs = lowering.realized(g, *_sort(index, num_embeddings))
    device = device_of(where)
    samples, positions, width = lowering.hints(batch, length, d)
    tiles = range_tiles(samples, positions, width, dtype, device)
    blocks = CeilDiv(d, tiles.BLOCK_D)
    constants = {**tiles.constants, "PADDING": padding_idx, "PROGRAMS": 2 * device.multiprocessors}
    layout = lowering.output_layout([batch, blocks, tiles.RANGES, 2], where)
    only = lowering.Candidate(constants, tiles.num_warps, tiles.num_stages)
    settings: dict[str, Any] = {"tiles": blocks, "ranges": tiles.RANGES, "padding_idx": padding_idx}
    return _bounded_node(_kernel.lower(inputs, layout, [only], **settings))


lowering.register(torch.ops.flashnorm.embedding_norm.default, _lower)
