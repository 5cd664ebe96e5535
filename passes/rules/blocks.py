"""Operators that treat leading dimensions as independent: attention, pooling, resampling, Fourier transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor import inductor_prims

from ..sample_types import Axis, Mixed, PerSample, Public, SampleSum
from .join import NONLINEAR_SCALE, NONLINEAR_SUM, TWO_AXES, along
from .registry import Context, Result, present, rule

aten = torch.ops.aten


def independent(ctx: Context, node: fx.Node, args: list[Any], leading: int, linear_in: int | None = None) -> Result:
    """One type for every output: the axis must be one of the ``leading`` dimensions, the same in every operand.

    ``linear_in``: position in ``args`` of an operand in which the operator is linear, so that it may carry a scale.
    """
    args = [arg for arg in args if ctx.is_tensor(arg)]
    value = node.meta["val"]
    count = len(value) if isinstance(value, (tuple, list)) else 0

    def all_outputs(found: Any) -> Result:
        return (found,) * count if count else found

    mixed = ctx.first_mixed(args)
    if mixed is not None:
        return all_outputs(mixed)
    types = [ctx.type(arg) for arg in args]
    scale = types[linear_in].scale if linear_in is not None else ()
    if any(type_.scale for i, type_ in enumerate(types) if i != linear_in):
        return all_outputs(ctx.mixed(node, NONLINEAR_SCALE))
    if any(isinstance(type_, SampleSum) for type_ in types):
        alone = linear_in is not None and all(isinstance(t, Public) for i, t in enumerate(types) if i != linear_in)
        return all_outputs(SampleSum(scale) if alone else ctx.mixed(node, NONLINEAR_SUM))
    axes = {type_.axis for type_ in types if isinstance(type_, PerSample)}
    if not axes:
        return all_outputs(Public(scale=scale))
    if len(axes) > 1 and ctx.batch != 1:
        return all_outputs(ctx.mixed(node, TWO_AXES))
    axis = next(iter(axes))
    if axis.dim >= leading and ctx.batch != 1:
        return all_outputs(ctx.mixed(node, "it combines values along the sample axis"))
    return all_outputs(PerSample(axis, scale))


def _mask_fits(ctx: Context, mask: Any, axis: Axis | None, rank: int) -> bool:
    """A mask that broadcasts against the scores has its sample axis where the queries have theirs."""
    type_ = ctx.type(mask)
    if not isinstance(type_, PerSample):
        return isinstance(type_, Public)
    return axis is not None and Axis(type_.axis.dim + rank - len(ctx.shape(mask)), type_.axis.inner) == axis


def _attention(ctx: Context, node: fx.Node, tensors: list[Any], mask: Any, linear_in: int | None) -> Result:
    """Queries, keys, values ``[N, H, T, D]``: rows attend within one n and one h."""
    found = independent(ctx, node, tensors, leading=2, linear_in=linear_in)
    if mask is None:
        return found
    kinds = found if isinstance(found, tuple) else (found,)
    axis = next((type_.axis for type_ in kinds if isinstance(type_, PerSample)), None)
    if any(isinstance(type_, Mixed) for type_ in kinds) or _mask_fits(ctx, mask, axis, 4) or ctx.batch == 1:
        return found
    return (ctx.first_mixed([mask]) or ctx.mixed(node, "the attention mask's sample axis is not the queries'"),) * len(kinds)


_CPU = aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


@rule(_CPU)
def flash_attention_cpu(ctx: Context, node: fx.Node) -> Result:
    return _attention(ctx, node, list(node.args[:3]), node.kwargs.get("attn_mask"), None)


@rule(_CPU_BACKWARD)
def flash_attention_cpu_backward(ctx: Context, node: fx.Node) -> Result:
    return _attention(ctx, node, list(node.args[:6]), node.kwargs.get("attn_mask"), 0)


@rule(aten._scaled_dot_product_efficient_attention)
def efficient_attention(ctx: Context, node: fx.Node) -> Result:
    return _with_public_tail(_attention(ctx, node, list(node.args[:3]), node.args[3], None), 2)


@rule(aten._scaled_dot_product_efficient_attention_backward)
def efficient_attention_backward(ctx: Context, node: fx.Node) -> Result:
    bias = node.args[4]
    return _attention(ctx, node, [*node.args[:4], *node.args[5:7]], bias, 0)


@rule(aten._scaled_dot_product_flash_attention)
def flash_attention(ctx: Context, node: fx.Node) -> Result:
    found = _attention(ctx, node, list(node.args[:3]), None, None)
    return _with_public_tail(found, 2)


@rule(aten._scaled_dot_product_cudnn_attention)
def cudnn_attention(ctx: Context, node: fx.Node) -> Result:
    return _with_public_tail(_attention(ctx, node, list(node.args[:3]), node.args[3], None), 2)


@rule(aten._scaled_dot_product_flash_attention_backward)
def flash_attention_backward(ctx: Context, node: fx.Node) -> Result:
    return _attention(ctx, node, list(node.args[:6]), None, 0)


@rule(aten._scaled_dot_product_cudnn_attention_backward)
def cudnn_attention_backward(ctx: Context, node: fx.Node) -> Result:
    return _attention(ctx, node, list(node.args[:6]), node.args[8], 0)


def _with_public_tail(found: Result, own: int) -> Result:
    """Beyond the first outputs come generator states, offsets and sizes."""
    if not isinstance(found, tuple) or any(isinstance(type_, Mixed) for type_ in found[:1]):
        return found
    return found[:own] + (Public(),) * (len(found) - own)


def _spatial(ctx: Context, node: fx.Node, count: int, linear_in: int | None) -> Result:
    """Operators on ``[N, C, ...]`` that work plane by plane; without N (rank one less) only C is independent."""
    args = list(node.args[:count])
    first = ctx.shape(next(arg for arg in args if ctx.is_tensor(arg)))
    planes = {"1d": 1, "2d": 2, "3d": 3}
    name = node.target._schema.name
    work = next((dims for text, dims in planes.items() if text in name), 2)
    return independent(ctx, node, args, leading=len(first) - work, linear_in=linear_in)


@rule(
    aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten.avg_pool1d,
    aten.adaptive_avg_pool1d, aten.upsample_nearest1d.default, aten.upsample_nearest2d.default, aten.upsample_nearest3d.default,
    aten._upsample_nearest_exact2d.default, aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default,
    aten.upsample_linear1d.default, aten.upsample_trilinear3d.default, aten.reflection_pad1d.default,
    aten.reflection_pad2d.default, aten.reflection_pad3d.default, aten.replication_pad1d.default,
    aten.replication_pad2d.default, aten.replication_pad3d.default,
    aten.upsample_nearest1d_backward.default, aten.upsample_nearest2d_backward.default, aten.upsample_nearest3d_backward.default,
    aten._upsample_nearest_exact2d_backward.default, aten.upsample_bilinear2d_backward.default,
    aten.upsample_bicubic2d_backward.default,
)  # fmt: skip
def linear_resampling(ctx: Context, node: fx.Node) -> Result:
    return _spatial(ctx, node, 1, 0)


@rule(
    aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default, aten._adaptive_avg_pool2d_backward.default,
    aten._adaptive_avg_pool3d_backward.default, aten.reflection_pad1d_backward.default,
    aten.reflection_pad2d_backward.default, aten.reflection_pad3d_backward.default,
    aten.replication_pad1d_backward.default, aten.replication_pad2d_backward.default,
    aten.replication_pad3d_backward.default,
)  # fmt: skip
def resampling_backward(ctx: Context, node: fx.Node) -> Result:
    return _spatial(ctx, node, 2, 0)


@rule(
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default, aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    *present(inductor_prims, "_low_memory_max_pool_with_offsets", "_low_memory_max_pool2d_with_offsets"),
)  # fmt: skip
def max_pool(ctx: Context, node: fx.Node) -> Result:
    return _spatial(ctx, node, 1, None)


@rule(*present(inductor_prims, "_low_memory_max_pool_offsets_to_indices", "_low_memory_max_pool2d_offsets_to_indices"))
def offsets_to_indices(ctx: Context, node: fx.Node) -> Result:
    return _spatial(ctx, node, 1, None)


@rule(aten.max_pool2d_with_indices_backward.default, aten.max_pool3d_with_indices_backward.default)
def max_pool_backward(ctx: Context, node: fx.Node) -> Result:
    grad, source, indices = node.args[0], node.args[1], node.args[-1]
    return independent(ctx, node, [grad, source, indices], leading=2, linear_in=0)


@rule(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(ctx: Context, node: fx.Node) -> Result:
    return independent(ctx, node, list(node.args[:2]), leading=1, linear_in=None)


@rule(aten.im2col, aten.col2im)
def columns(ctx: Context, node: fx.Node) -> Result:
    return independent(ctx, node, list(node.args[:1]), leading=1, linear_in=0)


@rule(aten.pixel_shuffle, aten.pixel_unshuffle)
def pixel_shuffle(ctx: Context, node: fx.Node) -> Result:
    """Moves channels into space: only what comes before the channels is independent."""
    return independent(ctx, node, list(node.args[:1]), leading=len(ctx.shape(node.args[0])) - 3, linear_in=0)


def _of_one_rank(ctx: Context, node: fx.Node, tensors: list[Any]) -> Result | None:
    """Operands of different rank would broadcast, and their leading dimensions mean different things."""
    if len({len(ctx.shape(tensor)) for tensor in tensors}) == 1 or all(isinstance(ctx.type(t), Public) for t in tensors):
        return None
    mixed = ctx.first_mixed(tensors) or ctx.mixed(node, "its operands broadcast, so that their sample axes may not line up")
    value = node.meta["val"]
    return (mixed,) * len(value) if isinstance(value, (tuple, list)) else mixed


@rule(aten._cdist_forward, aten._cdist_backward)
def distances(ctx: Context, node: fx.Node) -> Result:
    tensors = [arg for arg in node.args if ctx.is_tensor(arg)]
    found = _of_one_rank(ctx, node, tensors)
    return found or independent(ctx, node, tensors, leading=max(0, len(ctx.shape(tensors[0])) - 2), linear_in=None)


@rule(aten._fft_r2c, aten._fft_c2r, aten._fft_c2c, aten.fft_fftshift, aten.fft_ifftshift)
def fourier(ctx: Context, node: fx.Node) -> Result:
    return along(ctx, node, node.args[0], node.args[1], linear=True, what="a Fourier transform runs over the samples")


@rule(
    aten.linalg_inv_ex, aten.linalg_cholesky_ex, aten.linalg_qr, aten.linalg_solve_triangular, aten._linalg_solve_ex,
    aten._linalg_svd, aten._linalg_eigh, aten.linalg_lu_factor_ex, aten._linalg_det, aten.triangular_solve,
    aten.linalg_lu_solve, aten._linalg_slogdet,
)  # fmt: skip
def matrices(ctx: Context, node: fx.Node) -> Result:
    tensors = [arg for arg in node.args if ctx.is_tensor(arg)]
    rank = len(ctx.shape(tensors[0]))
    found = _of_one_rank(ctx, node, tensors)
    return found or independent(ctx, node, tensors, leading=rank - 2, linear_in=None)


@rule(aten.native_layer_norm)
def layer_norm(ctx: Context, node: fx.Node) -> Result:
    normalized = len(node.args[1])
    found = independent(ctx, node, [node.args[0]], leading=len(ctx.shape(node.args[0])) - normalized)
    weights_public = all(isinstance(ctx.type(arg), Public) for arg in node.args[2:4] if arg is not None)
    return found if weights_public else (ctx.mixed(node, NONLINEAR_SUM),) * 3


@rule(aten.native_dropout)
def dropout(ctx: Context, node: fx.Node) -> Result:
    return ctx.type(node.args[0]), Public()


@rule(aten._weight_norm_interface_backward)
def weight_norm_backward(ctx: Context, node: fx.Node) -> Result:
    """Linear in the gradient of the normalised weight."""
    grad, *others = node.args[:4]
    mixed = ctx.first_mixed(node.args[:4])
    if mixed is None and not all(isinstance(ctx.type(other), Public) and not ctx.type(other).scale for other in others):
        mixed = ctx.mixed(node, NONLINEAR_SUM)
    if mixed is None and isinstance(ctx.type(grad), PerSample):
        mixed = ctx.mixed(node, TWO_AXES)
    return (mixed or ctx.type(grad),) * 2
