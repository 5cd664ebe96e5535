"""``flashnorm::ghost_norm``: per-sample squared norms of ``G_b^T A_b`` from inner products of positions; no T x T matrix in memory.

    flashnorm::ghost_norm(Tensor g_btp, Tensor a_btd) -> Tensor

    g_btp   [B, T, p]  bf16, fp16 or fp32 (fp64 on a CPU), any strides
    a_btd   [B, T, d]  the same dtype, any strides
    returns [B]        float32; 0 where T, p or d is 0

    ||G_b^T A_b||^2 = sum_{t,s} (g_t . g_s) (a_t . a_s)

Kernel. A persistent grid; one item is a tile pair (i, j), i <= j, of one sample's T x T products. Both Gram tiles are
float32 [BLOCK, BLOCK] in registers, multiplied and summed there, and doubled off the diagonal. Each item has a slot of its own,
[B, pairs, 4]; slots are added afterwards in float64 and in a fixed order. FLOPs: B * T * (T + BLOCK) * (p + d).

What rounding may hide. These terms cancel where the gradient's own terms do, and float32 then holds rounding error. With
``reach = sum_t |g_t| |a_t|``, which no norm exceeds and which the diagonal tiles give for free, the norm is never below

    sqrt( max( sum + ROUNDING * reach^2,  (CANCELLED * reach)^2 ) ) + lost,

so that a sample is clipped harder than by exact arithmetic, never less. ROUNDING is what float32 sums of this form lose at worst in
practice, not a worst case over all inputs. ``lost``: the squares of a row shorter than SHORTEST may be less than float32 can hold,
and beside a huge partner (an input of 1e18 in front of a layer that normalises) they matter; such a row counts with that length.
Rows of zeros do too, which adds nothing that can be seen.

On a CPU, where the first bound would be DOUBTFUL of the sum or more, or where short rows are not zero, the sample's products are
taken again in float64, and only CANCELLED is needed.

On a CPU a C++ kernel (ghost_cpu.cpp) takes float32 inner products of half of the pairs, a block of positions at a time; operands in
half precision are widened for a few samples at a time. FLOPs: B * T * (T + 8) * (p + d). Without a compiler everything is taken
in float64.

Source: Li et al. 2022, "Large Language Models Can Be Strong Differentially Private Learners", section 4 ("ghost clipping").

Legend: B samples, T positions, p rows and d columns of the weight.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import lowerings
from torch.utils._sympy.functions import CeilDiv, FloorDiv

from . import _lowering as lowering
from ._cpu import ghost_norm_kernel as cpu_kernel
from ._ghost_tiles import pair_choices
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
    tl,
)

aten, prims = torch.ops.aten, torch.ops.prims

# Below this share of its reach, a sum of terms has lost its digits in float32, whatever computes it.
CANCELLED = 1e-3
# Four roundings of float32: products, two accumulations, and the sum over a tile.
ROUNDING = 2.0**-22
# Where that is more than this share of the sum, a CPU takes the sample again in float64.
DOUBTFUL = 2.0**-12
# The square of a shorter row may lack terms that float32 cannot hold.
SHORTEST = tl.constexpr(2.0**-48)
_CPU_CHUNK = 1 << 22  # elements of float64 Gram matrices that the ATen form holds at a time
_CPU_ROWS = 256


@jit
def tile_pair(index: tl.tensor, blocks: tl.tensor) -> tl.tensor:
    """(i, j), i <= j: the ``index``-th of blocks * (blocks + 1) / 2 pairs, in integers alone.

    The triangle's rows q and blocks - 1 - q (or blocks - q) are laid end to end, which makes a rectangle.
    """
    even = 1 - blocks % 2
    q = index // (blocks + even)
    column = index % (blocks + even)
    first = column < blocks - q
    i = tl.where(first, q, blocks - even - q)
    return i, tl.where(first, q + column, column - even)


@jit
def gram_tile(
    x: tl.tensor, b: tl.tensor, row: tl.tensor, column: tl.tensor, length: tl.tensor, width: tl.tensor,
    stride_b: tl.tensor, stride_t: tl.tensor, stride_w: tl.tensor,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """float32 [BLOCK, BLOCK]: inner products of positions ``row``.. and ``column``.. of one sample."""
    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    for block in tl.range(0, tl.cdiv(width, BLOCK_K)):
        w = block * BLOCK_K
        left = load_tile(x, b, row, w, length, width, stride_b, stride_t, stride_w, BLOCK, BLOCK_K, LAYOUT)
        right = load_tile(x, b, column, w, length, width, stride_b, stride_t, stride_w, BLOCK, BLOCK_K, LAYOUT)
        gram = tl.dot(left, right.trans(), gram, input_precision=PRECISION)
    return gram


@jit
def ghost_norm_item(
    item: tl.tensor, g: tl.tensor, a: tl.tensor, length: tl.tensor, p: tl.tensor, d: tl.tensor, slots: tl.tensor,
    g_stride_b: tl.tensor, g_stride_t: tl.tensor, g_stride_w: tl.tensor,
    a_stride_b: tl.tensor, a_stride_t: tl.tensor, a_stride_w: tl.tensor,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, G_LAYOUT: tl.constexpr, A_LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(sample, slot, [sum, reach, lost, 0]) of one item; items are ordered [B, slots], and slots beyond the pairs get 0."""
    blocks = tl.cdiv(length, BLOCK)
    slot = item % slots
    b = item // slots
    total = 0.0
    reach = 0.0
    lost = 0.0
    if slot < blocks * (blocks + 1) // 2:
        i, j = tile_pair(slot, blocks)
        row, column = i * BLOCK, j * BLOCK
        own = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
        gg = tl.zeros((BLOCK,), tl.float32)
        products = gram_tile(g, b, row, column, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK, BLOCK_K, G_LAYOUT, PRECISION)
        if i == j:
            gg = tl.sum(tl.where(own, products, 0.0), 1)
        partners = gram_tile(a, b, row, column, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK, BLOCK_K, A_LAYOUT, PRECISION)
        total = tl.sum(products * partners)
        if i == j:
            aa = tl.sum(tl.where(own, partners, 0.0), 1)
            reach = tl.sum(tl.sqrt(gg) * tl.sqrt(aa))
            lost = SHORTEST * tl.sum(tl.where(gg < SHORTEST * SHORTEST, tl.sqrt(aa), 0.0))
            lost += SHORTEST * tl.sum(tl.where(aa < SHORTEST * SHORTEST, tl.sqrt(gg), 0.0))
        else:
            total *= 2
    which = tl.arange(0, 4)
    return b, slot, tl.where(which == 0, total, tl.where(which == 1, reach, tl.where(which == 2, lost, 0.0)))


@jit
def ghost_norm_kernel(
    g_ptr: tl.tensor, a_ptr: tl.tensor, out_ptr: tl.tensor, batch: tl.tensor, length: tl.tensor, p: tl.tensor, d: tl.tensor,
    slots: tl.tensor, g_stride_b: tl.tensor, g_stride_t: tl.tensor, g_stride_w: tl.tensor,
    a_stride_b: tl.tensor, a_stride_t: tl.tensor, a_stride_w: tl.tensor,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, G_LAYOUT: tl.constexpr, A_LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Writes ``out`` [B, slots, 4], float32."""
    g = open_operand(g_ptr, batch, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK, BLOCK_K, G_LAYOUT)
    a = open_operand(a_ptr, batch, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK, BLOCK_K, A_LAYOUT)
    for item in tl.range(tl.program_id(0), batch * slots, tl.num_programs(0)):
        b, pair, values = ghost_norm_item(
            item, g, a, length, p, d, slots, g_stride_b, g_stride_t, g_stride_w, a_stride_b, a_stride_t, a_stride_w,
            BLOCK, BLOCK_K, G_LAYOUT, A_LAYOUT, PRECISION,
        )  # fmt: skip
        tl.store(out_ptr + (b.to(tl.int64) * slots + pair) * 4 + tl.arange(0, 4), values)


_TEMPLATE = """
from flashnorm_compile.templates.ghost_norm import ghost_norm_item
from flashnorm_compile.templates._triton import open_operand
{{def_kernel("G", "A")}}
    batch = {{size("G", 0)}}
    length = {{size("G", 1)}}
    p = {{size("G", 2)}}
    d = {{size("A", 2)}}
    slots = {{size(None, 1)}}
    g = open_operand(G, batch, length, p, {{stride("G")}}, BLOCK, BLOCK_K, G_LAYOUT)
    a = open_operand(A, batch, length, d, {{stride("A")}}, BLOCK, BLOCK_K, A_LAYOUT)
    idx_which = tl.arange(0, 4)
    mask = idx_which < 4
    for item in tl.range(tl.program_id(0), batch * slots, tl.num_programs(0)):
        idx_b, idx_pair, values = ghost_norm_item(
            item, g, a, length, p, d, slots, {{stride("G")}}, {{stride("A")}},
            BLOCK, BLOCK_K, G_LAYOUT, A_LAYOUT, PRECISION)
        {{store_output(("idx_b", "idx_pair", "idx_which"), "values", "mask", indent_width=8, val_shape=("4",))}}
"""


def reference_ghost_norm(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """[B] float64: ``||sum_t g_t a_t^T||^2`` as a loop over samples and positions, with nothing added for rounding."""
    norms = []
    for g_tp, a_td in zip(g_btp.double(), a_btd.double(), strict=True):
        weight = torch.zeros(g_tp.shape[1], a_td.shape[1], dtype=torch.float64, device=g_btp.device)
        for t in range(g_tp.shape[0]):
            weight += g_tp[t][:, None] * a_td[t][None, :]
        norms.append((weight * weight).sum())
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64, device=g_btp.device)


def aten_ghost_norm(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """[B] from float64 Gram matrices of a few samples and ``_CPU_ROWS`` rows, right of the diagonal."""
    batch, length, p = g_btp.shape
    norms = torch.zeros(batch, dtype=torch.float64, device=g_btp.device)
    rows = min(max(1, length), _CPU_ROWS)
    samples = max(1, _CPU_CHUNK // max(1, rows * length, length * (p + a_btd.shape[2])))
    for b in range(0, batch, samples):
        few = slice(b, b + samples)
        g, a = g_btp[few].double(), a_btd[few].double()
        reach = (torch.linalg.vector_norm(g, dim=2) * torch.linalg.vector_norm(a, dim=2)).sum(1)
        for row in range(0, length, rows):
            part, on = slice(row, row + rows), min(row + rows, length) - row
            products = torch.bmm(g[:, part], g[:, row:].mT).mul_(torch.bmm(a[:, part], a[:, row:].mT))
            norms[few] += products[:, :, :on].sum((1, 2)) + 2 * products[:, :, on:].sum((1, 2))
        norms[few] = torch.maximum(norms[few], (CANCELLED * reach).square())
    return norms.float()


def cpu_ghost_norm(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """[B] from the C++ kernel; samples for which float32 is not enough once more from ``aten_ghost_norm``."""
    kernel = cpu_kernel()
    if kernel is None or g_btp.dtype not in KERNEL_DTYPES or 0 in (*g_btp.shape, a_btd.shape[2]):
        return aten_ghost_norm(g_btp, a_btd)
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    parts = torch.empty((batch, 3), dtype=torch.float64)
    copied = g_btp.dtype != torch.float32 or 1 not in (g_btp.stride(2), p) or 1 not in (a_btd.stride(2), d)
    samples = max(1, _CPU_CHUNK // (length * (p + d))) if copied else batch
    for b in range(0, batch, samples):
        g, a = (_rows_contiguous(x[b : b + samples].float()) for x in (g_btp, a_btd))
        kernel(
            g.data_ptr(), a.data_ptr(), parts[b:].data_ptr(), len(g), length, p, d,
            g.stride(0), g.stride(1), a.stride(0), a.stride(1), torch.get_num_threads(),
        )  # fmt: skip
    total, reach, missing = parts.unbind(1)
    rounding = ROUNDING * reach.square()
    # (sqrt(total) + missing)^2 is no more than the total and its rounding, as neither root exceeds the reach.
    sure = total.isfinite() & (rounding <= DOUBTFUL * total) & (4 * missing <= ROUNDING * reach)
    norms = (total + rounding).float()
    if not bool(sure.all()):
        again = (~sure).nonzero()[:, 0]
        norms[again] = aten_ghost_norm(g_btp[again], a_btd[again])
    return norms


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if 1 in (x.stride(2), x.shape[2]) else x.contiguous()


def _bounded(slots_bn4: Tensor) -> Tensor:
    """[B] from the slots, in float64."""
    total, reach, lost, _ = slots_bn4.double().sum(1).unbind(1)
    square = reach.square()
    return (torch.maximum(total + ROUNDING * square, CANCELLED**2 * square).sqrt() + lost).square().float()


def _check(g_btp: Tensor, a_btd: Tensor) -> None:
    check_operands("ghost_norm", ("g_btp", g_btp), ("a_btd", a_btd))
    check_lengths("ghost_norm", ("g_btp", g_btp), ("a_btd", a_btd))


def _launch(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """The kernel on a CUDA device, outside of generated code."""
    _check(g_btp, a_btd)
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    if g_btp.dtype not in KERNEL_DTYPES:
        return aten_ghost_norm(g_btp, a_btd)
    if 0 in (batch, length, p, d):
        return torch.zeros(batch, dtype=torch.float32, device=g_btp.device)
    device, layouts = device_for(g_btp, a_btd)
    precision = matmul_precision(g_btp.dtype)
    tiles = pair_choices(batch, length, p + d, g_btp.dtype, device, precision)[0]
    blocks = ceil_div(length, tiles.BLOCK)
    slots = blocks * (blocks + 1) // 2
    out = torch.empty((batch, slots, 4), dtype=torch.float32, device=g_btp.device)
    allocate_descriptors()
    programs = min(batch * slots, tiles.programs(g_btp.element_size(), device))
    ghost_norm_kernel[(programs,)](
        g_btp, a_btd, out, batch, length, p, d, slots, *g_btp.stride(), *a_btd.stride(),
        G_LAYOUT=layouts[0], A_LAYOUT=layouts[1], PRECISION=precision, **asdict(tiles),
    )  # fmt: skip
    return _bounded(out)


def _fake(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    _check(g_btp, a_btd)
    return g_btp.new_empty(g_btp.shape[0], dtype=torch.float32)


def _on_any_device(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    _check(g_btp, a_btd)
    return cpu_ghost_norm(g_btp, a_btd) if g_btp.device.type == "cpu" else aten_ghost_norm(g_btp, a_btd)


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define("ghost_norm(Tensor g_btp, Tensor a_btd) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("ghost_norm", _on_any_device, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("ghost_norm", _launch, "CUDA")
torch.library.register_fake("flashnorm::ghost_norm", _fake, lib=_library)


def _aten_slots(g_btp: Tensor, a_btd: Tensor, *, slots: int) -> Tensor:
    """The template's output from ATen: the norm in the first slot, and nothing else, since rounding is in it already."""
    return torch.nn.functional.pad(aten_ghost_norm(g_btp, a_btd)[:, None, None], (0, 3, 0, slots - 1))


_kernel = lowering.Kernel("ghost_norm", _TEMPLATE, _aten_slots)


def _bounded_node(slots: Any) -> Any:
    """``_bounded`` in Inductor's IR: one reduction, fused with what reads it."""
    sums = lowerings[aten.sum.dim_IntList](lowerings[prims.convert_element_type.default](slots, torch.float64), [1])
    total, reach, lost = (lowerings[aten.select.int](sums, 1, column) for column in range(3))
    mul, add = lowerings[aten.mul.Tensor], lowerings[aten.add.Tensor]
    square = mul(reach, reach)
    bounded = lowerings[aten.maximum.default](add(total, mul(square, ROUNDING)), mul(square, CANCELLED**2))
    norm = add(lowerings[aten.sqrt.default](bounded), lost)
    return lowerings[prims.convert_element_type.default](mul(norm, norm), torch.float32)


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
    samples, positions, width = lowering.hints(batch, length, p + d)
    choices = lowering.considered(pair_choices(samples, positions, width, dtype, device, precision))
    blocks = CeilDiv(length, min(tiles.BLOCK for tiles in choices))
    slots = FloorDiv(blocks * (blocks + 1), 2)
    given = {"G_LAYOUT": layouts[0], "A_LAYOUT": layouts[1], "PRECISION": repr(precision)}
    candidates = [
        lowering.Candidate(
            {**tiles.constants, **given, "PROGRAMS": tiles.programs(dtype.itemsize, device)}, tiles.num_warps, tiles.num_stages
        )
        for tiles in choices
    ]
    layout = lowering.output_layout([batch, slots, 4], where)
    return _bounded_node(_kernel.lower([g, a], layout, candidates, slots=slots))


lowering.register(torch.ops.flashnorm.ghost_norm.default, _lower)
