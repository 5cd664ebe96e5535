"""``flashnorm::per_layer``: norm, clip and sum of one layer, where the layer is clipped by itself.

    flashnorm::per_layer(Tensor g_btp, Tensor a_btd, Tensor max_norm, Tensor scale, float? stability_constant=None)
        -> (Tensor, Tensor)

    g_btp      [B, T, p]  bf16, fp16 or fp32 (fp64 on a CPU), any strides
    a_btd      [B, T, d]  the same dtype, any strides
    max_norm   []         float32, C_k > 0
    scale      []         float32, multiplies every contribution: 1 / L, or 1
    returns    [p, d]     ``sum_b c_b W_b`` with ``W_b = G_b^T A_b``, float32 (float64 for float64)
               [B]        float32 squared norms of W_b

``c_b = scale * min(1, C_k / norm)``, or ``scale * C_k / (norm + stability_constant)``; exactly 0 where the norm is not finite.

One launch: a program's tile is the whole layer, so that a sample's product is complete in its registers; it is squared, clipped
and added to the program's total, and never written. Samples are spread over S programs, whose totals [S, p, d] are added in their
order. Reads B * T * (p + d) elements once, and writes 4 * (S * p * d + B) bytes. Layers of up to 128 * 128 elements fit: low-rank
adapters, heads and convolutions, but no wide linear layer.

Two launches, else: ``flash_norm`` and ``clipped_sum``. They multiply twice (4 B T p d FLOPs), read the operands twice, and also
never write a sample's gradient. The one-launch form is taken where it fits and costs no more clocks by the three formulas: few
samples of many positions leave most of the device idle in it.

Source: Wang et al. 2025, "FlashDP: Private Training Large Language Models with Efficient DP-SGD". There, larger layers exchange
their tiles' norms between blocks that wait for each other; here none waits, since nothing promises that all run at once.

Legend: B samples, T positions, p rows and d columns of the weight, S programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import SymbolicGridFn

from . import _lowering as lowering
from . import flash_norm  # noqa: F401  (registers the operator)
from ._clip_factor import clip_factor, clip_factors, clip_factors_in_graph, stability_code
from ._layer_tiles import Tiles, one_launch
from ._store import store_tile
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
    tl,
)
from .clipped_sum import clipped_sum_triton

aten = torch.ops.aten


@jit
def per_layer_tile(
    g: tl.tensor,
    a: tl.tensor,
    norms_ptr: tl.tensor,
    bound: tl.tensor,
    scale: tl.tensor,
    program: tl.tensor,
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
    STABILITY: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """float32 [BLOCK_P, BLOCK_D]: the clipped sum over the program's samples; writes their squared norms."""
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    product = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    blocks = tl.cdiv(length, BLOCK_T)
    each = tl.cdiv(batch, SPLIT)
    # One loop over all samples' positions, so that loads run ahead across samples.
    for step in tl.range(program * each * blocks, tl.minimum(program * each + each, batch) * blocks):
        b = step // blocks
        t = (step % blocks) * BLOCK_T
        # [BLOCK_T, BLOCK_P] and [BLOCK_T, BLOCK_D]
        g_tile = load_tile(g, b, t, 0, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
        a_tile = load_tile(a, b, t, 0, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
        product = tl.dot(g_tile.trans(), a_tile, product, input_precision=PRECISION)
        if t + BLOCK_T >= length:
            square = tl.sum(product * product)
            tl.store(norms_ptr + b, square)
            factor = clip_factor(square, bound, scale, STABILITY)
            total += tl.where(factor != 0, product * factor, 0.0)
            product = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    return total


@jit
def per_layer_kernel(
    g_ptr: tl.tensor,
    a_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    norms_ptr: tl.tensor,
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
    STABILITY: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Writes ``out`` float32 [S, p, d], contiguous, and ``norms`` float32 [B], squared."""
    g = open_operand(g_ptr, batch, length, p, g_stride_b, g_stride_t, g_stride_w, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(a_ptr, batch, length, d, a_stride_b, a_stride_t, a_stride_w, BLOCK_T, BLOCK_D, A_LAYOUT)
    program = tl.program_id(0)
    total = per_layer_tile(
        g, a, norms_ptr, tl.load(bound_ptr), tl.load(scale_ptr), program, batch, length, p, d,
        g_stride_b, g_stride_t, g_stride_w, a_stride_b, a_stride_t, a_stride_w,
        BLOCK_P, BLOCK_D, BLOCK_T, SPLIT, STABILITY, G_LAYOUT, A_LAYOUT, PRECISION,
    )  # fmt: skip
    store_tile(out_ptr, program, 0, 0, total, p, d)


_TEMPLATE = """
from flashnorm_compile.templates.per_layer import per_layer_tile
from flashnorm_compile.templates._triton import open_operand
{{def_kernel("G", "A", "BOUND", "SCALE", "NORMS")}}
    batch = {{size("G", 0)}}
    length = {{size("G", 1)}}
    p = {{size("G", 2)}}
    d = {{size("A", 2)}}
    g = open_operand(G, batch, length, p, {{stride("G")}}, BLOCK_T, BLOCK_P, G_LAYOUT)
    a = open_operand(A, batch, length, d, {{stride("A")}}, BLOCK_T, BLOCK_D, A_LAYOUT)
    idx_s = tl.program_id(0)
    total = per_layer_tile(
        g, a, NORMS, tl.load(BOUND), tl.load(SCALE), idx_s, batch, length, p, d, {{stride("G")}}, {{stride("A")}},
        BLOCK_P, BLOCK_D, BLOCK_T, SPLIT, STABILITY, G_LAYOUT, A_LAYOUT, PRECISION)
    idx_p = tl.arange(0, BLOCK_P)[:, None]
    idx_d = tl.arange(0, BLOCK_D)[None, :]
    inside = (idx_p < p) & (idx_d < d)
    {{store_output(("idx_s", "idx_p", "idx_d"), "total", "inside", indent_width=4, val_shape=("BLOCK_P", "BLOCK_D"))}}
"""


def launch(
    g_btp: Tensor,
    a_btd: Tensor,
    max_norm: Tensor,
    scale: Tensor,
    stability: float | None,
    tiles: Tiles,
    layouts: Sequence[int],
    precision: str,
) -> tuple[Tensor, Tensor]:
    """The one-launch kernel: totals float32 [S, p, d], and squared norms [B]."""
    batch, length, p = g_btp.shape
    d = a_btd.shape[2]
    out = torch.empty((tiles.SPLIT, p, d), dtype=torch.float32, device=g_btp.device)
    norms = torch.empty(batch, dtype=torch.float32, device=g_btp.device)
    per_layer_kernel[(tiles.SPLIT,)](
        g_btp, a_btd, max_norm, scale, norms, out, batch, length, p, d, *g_btp.stride(), *a_btd.stride(),
        STABILITY=stability_code(stability), G_LAYOUT=layouts[0], A_LAYOUT=layouts[1], PRECISION=precision, **asdict(tiles),
    )  # fmt: skip
    return out, norms


def per_layer_triton(
    g_btp: Tensor, a_btd: Tensor, max_norm: Tensor, scale: Tensor, stability_constant: float | None = None
) -> tuple[Tensor, Tensor]:
    """One launch, or two; other types than the kernels', and empty operands, by ATen."""
    _check(g_btp, a_btd, max_norm, scale)
    if g_btp.dtype not in KERNEL_DTYPES or g_btp.numel() == 0 or a_btd.numel() == 0:
        return per_layer_aten(g_btp, a_btd, max_norm, scale, stability_constant)
    device, layouts = device_for(g_btp, a_btd)
    precision = matmul_precision(g_btp.dtype)
    tiles = one_launch((*g_btp.shape, a_btd.shape[2]), g_btp.dtype, device, precision)
    if tiles is None:
        norms_sq = torch.ops.flashnorm.flash_norm(g_btp, a_btd)
        return clipped_sum_triton(g_btp, a_btd, clip_factors(norms_sq, max_norm, scale, stability_constant)), norms_sq
    allocate_descriptors()
    totals, norms_sq = launch(g_btp, a_btd, max_norm, scale, stability_constant, tiles, layouts, precision)
    return totals.sum(0) if tiles.SPLIT > 1 else totals[0], norms_sq


def per_layer_aten(
    g_btp: Tensor, a_btd: Tensor, max_norm: Tensor, scale: Tensor, stability_constant: float | None = None
) -> tuple[Tensor, Tensor]:
    """In plain PyTorch, for every device: holds one sample's gradient at a time."""
    _check(g_btp, a_btd, max_norm, scale)
    wide = torch.promote_types(g_btp.dtype, torch.float32)
    total = torch.zeros((g_btp.shape[2], a_btd.shape[2]), dtype=wide, device=g_btp.device)
    norms_sq = torch.zeros(g_btp.shape[0], dtype=wide, device=g_btp.device)
    for b in range(g_btp.shape[0]):
        product = g_btp[b].to(wide).t() @ a_btd[b].to(wide)
        norms_sq[b] = torch.linalg.vector_norm(product).square()
        factor = clip_factors(norms_sq[b], max_norm, scale, stability_constant)
        total += torch.where(factor != 0, product * factor, 0)
    return total, norms_sq.float()


def reference(
    g_btp: Tensor, a_btd: Tensor, max_norm: float, scale: float, stability_constant: float | None = None
) -> tuple[Tensor, Tensor]:
    """float64 [p, d] and [B]: one outer product after another."""
    total = torch.zeros((g_btp.shape[2], a_btd.shape[2]), dtype=torch.float64)
    norms_sq = []
    for g_tp, a_td in zip(g_btp.double(), a_btd.double(), strict=True):
        grad = torch.zeros_like(total)
        for g_p, a_d in zip(g_tp, a_td, strict=True):
            grad += torch.outer(g_p, a_d)
        norm = float(grad.square().sum()) ** 0.5
        norms_sq.append(norm**2)
        if norm < float("inf"):
            plain = 1.0 if norm <= max_norm else max_norm / norm
            total += scale * (plain if stability_constant is None else max_norm / (norm + stability_constant)) * grad
    return total, torch.tensor(norms_sq, dtype=torch.float64)


def _check(g_btp: Tensor, a_btd: Tensor, max_norm: Tensor, scale: Tensor) -> None:
    check_operands("per_layer", ("g_btp", g_btp), ("a_btd", a_btd))
    check_lengths("per_layer", ("g_btp", g_btp), ("a_btd", a_btd))
    for name, value in (("max_norm", max_norm), ("scale", scale)):
        if value.dtype is not torch.float32 or value.dim() != 0:
            raise ValueError(
                f"flashnorm::per_layer got {name} of dtype {value.dtype} and shape {tuple(value.shape)}; it needs 0-d float32."
            )


def _fake(
    g_btp: Tensor, a_btd: Tensor, max_norm: Tensor, scale: Tensor, stability_constant: float | None = None
) -> tuple[Tensor, Tensor]:
    _check(g_btp, a_btd, max_norm, scale)
    wide = torch.promote_types(g_btp.dtype, torch.float32)
    return g_btp.new_empty((g_btp.shape[2], a_btd.shape[2]), dtype=wide), g_btp.new_empty(g_btp.shape[:1], dtype=torch.float32)


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define(
    "per_layer(Tensor g_btp, Tensor a_btd, Tensor max_norm, Tensor scale, float? stability_constant=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("per_layer", per_layer_aten, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("per_layer", per_layer_triton, "CUDA")
torch.library.register_fake("flashnorm::per_layer", _fake, lib=_library)


@SymbolicGridFn
def _grid(segments: Any, p: Any, d: Any, meta: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return (segments, 1, 1)


def _aten_form(g_btp: Tensor, a_btd: Tensor, max_norm: Tensor, scale: Tensor, norms: Tensor, *, stability: float | None,
               programs: int) -> Tensor:  # fmt: skip
    """What the template leaves: the total in the first program's place, and the norms."""
    total, norms_sq = per_layer_aten(g_btp, a_btd, max_norm, scale, stability)
    norms.copy_(norms_sq)
    return torch.nn.functional.pad(total[None], (0, 0, 0, 0, 0, programs - 1))


_kernel = lowering.Kernel("per_layer", _TEMPLATE, _aten_form, _grid)


def _lower(g: Any, a: Any, max_norm: Any, scale: Any, stability: float | None = None) -> Any:
    (batch, length, p), d, dtype, where = g.get_size(), a.get_size()[2], g.get_dtype(), g.get_device()
    if dtype not in KERNEL_DTYPES or lowering.is_zero(batch, length, p, d):
        return None
    g, a, max_norm, scale = lowering.realized(g, a, max_norm, scale)
    device, layouts = lowering.device_for_nodes(g, a)
    precision = matmul_precision(dtype)
    fixed = all(isinstance(size, int) or size.is_number for size in (p, d))
    sizes = tuple(lowering.hints(batch, length, p, d))
    tiles = one_launch(sizes, dtype, device, precision) if fixed else None
    if tiles is None:
        norms_sq = lowerings[torch.ops.flashnorm.flash_norm.default](g, a)
        factors = clip_factors_in_graph(norms_sq, max_norm, scale, stability)
        return lowerings[torch.ops.flashnorm.clipped_sum.default](g, a, factors), norms_sq
    norms_sq = lowering.scratch([batch], torch.float32, where)
    settings = {
        "G_LAYOUT": layouts[0],
        "A_LAYOUT": layouts[1],
        "PRECISION": repr(precision),
        "STABILITY": stability_code(stability),
    }
    candidates = [lowering.Candidate({**tiles.constants, **settings}, tiles.num_warps, tiles.num_stages)]
    layout, inputs = lowering.output_layout([tiles.SPLIT, p, d], where), [g, a, max_norm, scale, norms_sq]
    totals = _kernel.lower(inputs, layout, candidates, mutated=[norms_sq], stability=stability, programs=tiles.SPLIT)
    total = lowerings[aten.sum.dim_IntList](totals, [0]) if tiles.SPLIT > 1 else lowerings[aten.squeeze.dim](totals, 0)
    return total, norms_sq


lowering.register(torch.ops.flashnorm.per_layer.default, _lower)
