"""How types of several operands combine: side by side (pointwise), by addition, by multiplication, along dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ..sample_types import (
    PUBLIC,
    Affine,
    Axis,
    Mixed,
    PerSample,
    Public,
    SampleSum,
    SampleType,
    common_scale,
    scale_inverse,
    scale_product,
)
from .registry import Context

NONLINEAR_SUM = "a sum over the samples is used in a way that is not linear, so one sample's share depends on the others"
NONLINEAR_SCALE = "a value scaled by a number that depends on the whole batch is used in a way that is not linear"
SCALES_DIFFER = "terms that are scaled by different batch-dependent numbers are added"
TWO_AXES = "it combines values of different samples: their sample axes do not line up"
# Sums in which a public term may stand beside a sum over samples: it is shared out equally among them.
SHARING_SUMS = {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor}
PUBLIC_TERM = "a term that belongs to no sample is added to a sum over the samples"
SUM_TIMES_SAMPLE = "a sum over all samples meets the values of single samples"


def broadcast_axis(ctx: Context, arg: Any, type_: PerSample, rank: int) -> Axis:
    """The operand's axis as a dimension of the broadcast result."""
    return Axis(type_.axis.dim + rank - len(ctx.shape(arg)), type_.axis.inner)


def common_axis(ctx: Context, node: fx.Node, args: Sequence[Any], rank: int, equal_sizes: bool = True) -> Axis | Mixed | None:
    """The axis on which all per-sample operands agree; ``equal_sizes``: the operator requires them to be of one size there."""
    found: tuple[Any, Axis, Axis] | None = None
    for arg in args:
        type_ = ctx.type(arg)
        if not isinstance(type_, PerSample):
            continue
        axis = broadcast_axis(ctx, arg, type_, rank)
        if found is None or ctx.batch == 1:
            found = found or (arg, type_.axis, axis)
        elif axis.dim != found[2].dim or not (
            ctx.same_layout(found[0], found[1], arg, type_.axis) if equal_sizes else found[1].inner == type_.axis.inner
        ):
            return ctx.mixed(node, TWO_AXES)
    return found[2] if found is not None else None


def pointwise(ctx: Context, node: fx.Node, args: Iterable[Any]) -> SampleType:
    """Any elementwise function."""
    args = [arg for arg in args if isinstance(arg, fx.Node)]
    mixed = ctx.first_mixed(args)
    if mixed is not None:
        return mixed
    types = [ctx.type(arg) for arg in args]
    if any(isinstance(type_, (SampleSum, Affine)) for type_ in types):
        return ctx.mixed(node, NONLINEAR_SUM)
    if any(type_.scale for type_ in types):
        return ctx.scale_mixed(node, [type_.scale for type_ in types], NONLINEAR_SCALE)
    axis = common_axis(ctx, node, args, len(ctx.shape(node)))
    if isinstance(axis, Mixed):
        return axis
    return PerSample(axis) if axis is not None else PUBLIC


def additive(ctx: Context, node: fx.Node, args: Sequence[Any], equal_sizes: bool = False) -> SampleType:
    """A sum, or a choice, of terms: linear in all of them together. ``equal_sizes``: as in ``common_axis``."""
    args = [arg for arg in args if not (isinstance(ctx.type(arg), Public) and is_zero(ctx, arg))]
    mixed = ctx.first_mixed(args)
    if mixed is not None:
        return mixed
    if not args:
        return Public(zero=True)
    types = [ctx.type(arg) for arg in args]
    scale = common_scale([type_.scale for type_ in types])
    if scale is None:
        return ctx.scale_mixed(node, [type_.scale for type_ in types], SCALES_DIFFER)
    sums = [isinstance(type_, SampleSum) for type_ in types]
    if any(sums):
        public = [isinstance(type_, (SampleSum, Public)) for type_ in types]
        if all(sums) or (all(public) and node.target in SHARING_SUMS):
            return SampleSum(scale)
        return ctx.mixed(node, SUM_TIMES_SAMPLE if any(isinstance(t, PerSample) for t in types) else PUBLIC_TERM)
    if any(isinstance(type_, Affine) for type_ in types):
        return ctx.mixed(node, NONLINEAR_SUM)
    axis = common_axis(ctx, node, args, len(ctx.shape(node)), equal_sizes)
    if isinstance(axis, Mixed):
        return axis
    if axis is None:
        return Public(scale=scale)
    if scale and any(isinstance(type_, Public) and not type_.scale for type_ in types):
        return ctx.scale_mixed(node, [scale], NONLINEAR_SCALE)
    return PerSample(axis, scale)


def multiplicative(ctx: Context, node: fx.Node, left: Any, right: Any, inverse: bool = False) -> SampleType:
    """A product, or with ``inverse`` a quotient, of two elementwise operands."""
    one, two = ctx.type(left), ctx.type(right)
    scalar = ctx.batch_scalar(right) if not isinstance(two, (Public, PerSample)) else None
    if scalar is not None and (inverse or not isinstance(two, SampleSum) or not isinstance(one, Public)):
        factor = scale_product(two.scale, scalar)
        return _with_scale(one, scale_product(one.scale, scale_inverse(factor) if inverse else factor))
    if not inverse and not isinstance(one, (Public, PerSample)) and isinstance(two, (PerSample, SampleSum, Mixed)):
        scalar = ctx.batch_scalar(left)
        if scalar is not None:
            return _with_scale(two, scale_product(two.scale, one.scale, scalar))
    mixed = ctx.first_mixed((left, right))
    if mixed is not None:
        return mixed
    scale = scale_product(one.scale, scale_inverse(two.scale) if inverse else two.scale)
    for type_, other, linear in ((one, two, True), (two, one, not inverse)):
        if isinstance(type_, (SampleSum, Affine)):
            if isinstance(type_, SampleSum) and linear and isinstance(other, Public):
                return SampleSum(scale)
            return ctx.mixed(node, SUM_TIMES_SAMPLE if isinstance(other, PerSample) else NONLINEAR_SUM)
    axis = common_axis(ctx, node, (left, right), len(ctx.shape(node)))
    if isinstance(axis, Mixed):
        return axis
    return PerSample(axis, scale) if axis is not None else Public(scale=scale)


def _with_scale(type_: SampleType, scale: tuple[tuple[str, int], ...]) -> SampleType:
    from ..sample_types import rescaled

    return rescaled(Public(scale=type_.scale) if isinstance(type_, Public) else type_, scale)


def is_zero(ctx: Context, arg: Any) -> bool:
    if isinstance(arg, fx.Node):
        type_ = ctx.type(arg)
        return isinstance(type_, Public) and type_.zero
    return isinstance(arg, (int, float)) and arg == 0


def along(
    ctx: Context,
    node: fx.Node,
    arg: Any,
    dims: Iterable[int],
    *,
    linear: bool,
    keep: bool = True,
    what: str = "it works along the sample axis",
) -> SampleType:
    """An operation that combines elements along ``dims`` only; with ``keep=False`` those dimensions vanish."""
    type_ = ctx.type(arg)
    if isinstance(type_, Mixed):
        return type_
    if not linear:
        if isinstance(type_, (SampleSum, Affine)):
            return ctx.mixed(node, NONLINEAR_SUM)
        if type_.scale:
            return ctx.scale_mixed(node, [type_.scale], NONLINEAR_SCALE)
    if isinstance(type_, Affine):
        return ctx.mixed(node, NONLINEAR_SUM)
    if not isinstance(type_, PerSample):
        return Public(zero=type_.zero and linear, scale=type_.scale) if isinstance(type_, Public) else type_
    dims = {ctx.dim(dim, arg) for dim in dims}
    if type_.axis.dim in dims:
        return ctx.mixed(node, what)
    shift = 0 if keep else sum(dim < type_.axis.dim for dim in dims)
    return PerSample(Axis(type_.axis.dim - shift, type_.axis.inner), type_.scale)
