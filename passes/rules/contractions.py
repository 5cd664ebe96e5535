"""Matrix products. Each operand dimension has a letter; a sample axis on a contracted letter becomes a sum over samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..sample_types import Affine, Axis, Mixed, PerSample, Public, SampleSum, SampleType, common_scale, scale_product
from .join import NONLINEAR_SUM, SCALES_DIFFER, SUM_TIMES_SAMPLE, is_zero, multiplicative
from .registry import Context, Result, present, rule

aten, prims = torch.ops.aten, torch.ops.prims


def contract(ctx: Context, node: fx.Node, equation: str, left: Any, right: Any) -> SampleType:
    """The type of a two-operand Einstein sum."""
    operands, out = equation.split("->")
    letters = operands.split(",")
    mixed = ctx.first_mixed((left, right))
    if mixed is not None:
        return mixed
    types = [ctx.type(left), ctx.type(right)]
    scale = scale_product(*(type_.scale for type_ in types))
    if any(isinstance(type_, (SampleSum, Affine)) for type_ in types):
        if sum(isinstance(type_, SampleSum) for type_ in types) == 1 and any(isinstance(t, Public) for t in types):
            return SampleSum(scale)
        return ctx.mixed(node, SUM_TIMES_SAMPLE if any(isinstance(t, PerSample) for t in types) else NONLINEAR_SUM)
    found: tuple[str, Any] | None = None
    for type_, names in zip(types, letters, strict=True):
        if isinstance(type_, PerSample):
            letter = names[type_.axis.dim]
            if found is not None and ctx.batch != 1:
                first, second = types[0], type_
                assert isinstance(first, PerSample)
                if letter != found[0] or not ctx.same_layout(left, first.axis, right, second.axis):
                    return ctx.mixed(node, "a matrix product multiplies values of different samples with each other")
            found = found or (letter, type_.axis.inner)
    if found is None:
        return Public(zero=is_zero(ctx, left) or is_zero(ctx, right), scale=scale)
    letter, inner = found
    return PerSample(Axis(out.index(letter), inner), scale) if letter in out else SampleSum(scale)


EQUATIONS = {
    aten.mm.default: "ij,jk->ik",
    aten.bmm.default: "bij,bjk->bik",
    aten.mv.default: "ij,j->i",
    aten.dot.default: "i,i->",
    aten.vdot.default: "i,i->",
}


@rule(*EQUATIONS)
def matrix_product(ctx: Context, node: fx.Node) -> Result:
    return contract(ctx, node, EQUATIONS[node.target], node.args[0], node.args[1])


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def matrix_product_plus(ctx: Context, node: fx.Node) -> Result:
    equation = {aten.addmm.default: "ij,jk->ik", aten.baddbmm.default: "bij,bjk->bik", aten.addmv.default: "ij,j->i"}
    bias, left, right = node.args[:3]
    return add_types(ctx, node, contract(ctx, node, equation[node.target], left, right), bias)


def add_types(ctx: Context, node: fx.Node, type_: SampleType, bias: Any, sums: bool = False) -> SampleType:
    """The type of a computed term plus an operand that broadcasts against it.

    ``sums``: whether the term may be a sum over samples added to another (not where the node itself reduces).
    """
    other = ctx.type(bias)
    if is_zero(ctx, bias) or isinstance(type_, Mixed):
        return type_
    if isinstance(other, Mixed):
        return other
    scale = common_scale([type_.scale, other.scale])
    if scale is None:
        return ctx.scale_mixed(node, [type_.scale, other.scale], SCALES_DIFFER)
    if isinstance(type_, Public) and type_.zero:
        return other
    if isinstance(other, Public):
        if isinstance(type_, (Public, PerSample)) and not type_.scale:
            return Public() if isinstance(type_, Public) else type_
        return ctx.mixed(node, "a term that belongs to no sample is added to a sum over the samples")
    if isinstance(other, PerSample):
        axis = Axis(other.axis.dim + len(ctx.shape(node)) - len(ctx.shape(bias)), other.axis.inner)
        if isinstance(type_, Public) and not type_.scale:
            return PerSample(axis)
        if isinstance(type_, PerSample) and (type_.axis == axis or ctx.batch == 1):
            return PerSample(axis, scale)
    if isinstance(other, SampleSum) and isinstance(type_, SampleSum) and sums:
        return SampleSum(scale)
    return ctx.mixed(node, NONLINEAR_SUM)


@rule(aten.convolution)
def convolution(ctx: Context, node: fx.Node) -> Result:
    source, weight, bias = node.args[:3]
    found = _over_samples(ctx, node, source, weight)
    return found if bias is None else add_bias(ctx, node, found, bias)


def add_bias(ctx: Context, node: fx.Node, found: SampleType, bias: Any) -> SampleType:
    other = ctx.type(bias)
    if isinstance(found, Mixed) or (isinstance(other, Public) and not found.scale and not isinstance(found, SampleSum)):
        return found
    return other if isinstance(other, Mixed) else ctx.mixed(node, "the bias of a convolution depends on samples")


def _over_samples(ctx: Context, node: fx.Node, source: Any, weight: Any) -> SampleType:
    """Input ``[N, C, ...]``: samples along N pass through a public kernel; a kernel that is a sum acts linearly."""
    mixed = ctx.first_mixed((source, weight))
    if mixed is not None:
        return mixed
    one, two = ctx.type(source), ctx.type(weight)
    scale = scale_product(one.scale, two.scale)
    if isinstance(one, Public) and isinstance(two, Public):
        return Public(zero=one.zero or two.zero, scale=scale)
    if isinstance(two, Public) and isinstance(one, PerSample):
        if one.axis.dim == 0:
            return PerSample(one.axis, scale)
        return ctx.mixed(node, "a convolution runs over the sample axis (the samples are not along the first dimension)")
    if (isinstance(one, SampleSum) and isinstance(two, Public)) or (isinstance(one, Public) and isinstance(two, SampleSum)):
        return SampleSum(scale)
    return ctx.mixed(node, "the kernel of a convolution depends on samples")


@rule(aten.convolution_backward)
def convolution_backward(ctx: Context, node: fx.Node) -> Result:
    grad, source, weight = node.args[:3]
    to_input = _over_samples(ctx, node, grad, weight)
    mixed = ctx.first_mixed((grad, source))
    if mixed is not None:
        return mixed, mixed, mixed
    one, two = ctx.type(grad), ctx.type(source)
    scale = scale_product(one.scale, two.scale)
    to_weight: SampleType
    if isinstance(one, PerSample) and isinstance(two, (PerSample, Public)):
        same = not isinstance(two, PerSample) or one.axis == two.axis
        to_weight = SampleSum(scale) if same and one.axis.dim == 0 else ctx.mixed(node, "a convolution runs over the sample axis")
    elif (isinstance(one, Public) and isinstance(two, PerSample) and two.axis.dim == 0) or (
        isinstance(one, SampleSum) and isinstance(two, Public)
    ):
        to_weight = SampleSum(scale)
    elif isinstance(one, Public) and isinstance(two, Public):
        to_weight = Public(scale=scale)
    else:
        to_weight = ctx.mixed(node, NONLINEAR_SUM)
    to_bias: SampleType = one
    if isinstance(one, PerSample):
        to_bias = SampleSum(one.scale) if one.axis.dim == 0 else ctx.mixed(node, "a convolution runs over the sample axis")
    return to_input, to_weight, to_bias


def _fused_product(ctx: Context, node: fx.Node, one: Any, two: Any, addend: Any, inverse: bool = False) -> SampleType:
    found = multiplicative(ctx, node, one, two, inverse)
    return add_types(ctx, node, found, addend, sums=True)


@rule(*present(prims, "fma"))
def fma(ctx: Context, node: fx.Node) -> Result:
    return _fused_product(ctx, node, *node.args)


@rule(aten.addcmul, aten.addcdiv)
def addcmul(ctx: Context, node: fx.Node) -> Result:
    addend, one, two = node.args[:3]
    return _fused_product(ctx, node, one, two, addend, inverse=node.target is aten.addcdiv.default)
