"""Elementwise operators. PyTorch tags them; the linear ones have rules of their own, because a sum may pass through them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..sample_types import PUBLIC, Affine, Axis, Mixed, PerSample, Public, SampleSum, SampleType, expression
from .join import NONLINEAR_SCALE, NONLINEAR_SUM, additive, along, is_zero, multiplicative, pointwise
from .registry import Context, Result, rule

aten, prims = torch.ops.aten, torch.ops.prims


def elementwise(ctx: Context, node: fx.Node) -> Result:
    """The rule for every operator tagged ``pointwise`` that has none of its own."""
    found = pointwise(ctx, node, node.all_input_nodes)
    value = node.meta.get("val")
    return (found,) * len(value) if isinstance(value, (tuple, list)) else found


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, prims.add.default, prims.sub.default)
def add(ctx: Context, node: fx.Node) -> Result:
    return additive(ctx, node, node.args[:2], equal_sizes=True)


@rule(aten.mul.Tensor, aten.mul.Scalar, prims.mul.default)
def mul(ctx: Context, node: fx.Node) -> Result:
    return multiplicative(ctx, node, node.args[0], node.args[1])


@rule(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, prims.div.default)
def div(ctx: Context, node: fx.Node) -> Result:
    return multiplicative(ctx, node, node.args[0], node.args[1], inverse=True)


@rule(aten.reciprocal.default)
def reciprocal(ctx: Context, node: fx.Node) -> Result:
    if ctx.batch_scalar(node.args[0]) is not None:
        return multiplicative(ctx, node, 1, node.args[0], inverse=True)
    return pointwise(ctx, node, node.args)


@rule(aten.where.self)
def where(ctx: Context, node: fx.Node) -> Result:
    condition, *values = node.args
    chosen = additive(ctx, node, values, equal_sizes=True)
    if isinstance(chosen, Mixed) or isinstance(ctx.type(condition), Public):
        return chosen
    if isinstance(chosen, SampleSum):
        return ctx.mixed(node, NONLINEAR_SUM)
    return multiplicative(ctx, node, condition, _strongest(ctx, values, chosen))


def _strongest(ctx: Context, values: list[Any], chosen: SampleType) -> Any:
    """The operand whose type is the type of the choice (the others are zero or public)."""
    alike = (value for value in values if type(ctx.type(value)) is type(chosen) and not is_zero(ctx, value))
    return next(alike, values[0])


@rule(
    aten.neg,
    aten.clone,
    aten.alias,
    aten.detach,
    aten.positive,
    aten.lift_fresh_copy,
    aten.view_as_real,
    aten.view_as_complex,
    aten._conj,
    aten.resolve_conj,
    aten.resolve_neg,
    aten.real,
    aten.imag,
    aten.conj_physical,
    aten._neg_view,
)
def passes_through(ctx: Context, node: fx.Node) -> Result:
    """Linear in its operand, axis kept. Real-linear is enough: a sum over samples stays one under conjugation."""
    return ctx.type(node.args[0])


@rule(prims.convert_element_type, aten._to_copy, prims.device_put)
def convert(ctx: Context, node: fx.Node) -> Result:
    type_ = ctx.type(node.args[0])
    old, new = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    keeps = new.is_floating_point or new.is_complex
    if keeps or isinstance(type_, Mixed):
        return type_
    if isinstance(type_, (SampleSum, Affine)):
        integers = not old.is_floating_point and not old.is_complex and new not in (torch.bool,)
        return type_ if integers else ctx.mixed(node, NONLINEAR_SUM)
    return ctx.mixed(node, NONLINEAR_SCALE) if type_.scale else type_


@rule(aten.view.dtype)
def reinterpret(ctx: Context, node: fx.Node) -> Result:
    """Complex numbers as pairs of reals and back are linear; any other reinterpretation of bits is not."""
    type_ = ctx.type(node.args[0])
    old, new = node.args[0].meta["val"].dtype, node.meta["val"].dtype
    pairs = {old.is_complex, new.is_complex} == {True, False} and old.to_real() == new.to_real()
    if not pairs and old != new:
        return along(ctx, node, node.args[0], [-1], linear=False, what="it reinterprets bits along the samples")
    if isinstance(type_, PerSample) and old != new and type_.axis.dim == len(ctx.shape(node)) - 1:
        grown, shrunk = (2, 1) if old.is_complex else (1, 2)
        return PerSample(Axis(type_.axis.dim, type_.axis.inner * grown / shrunk), type_.scale)
    return type_


@rule(
    aten.full, aten.zeros, aten.ones, aten.empty, aten.scalar_tensor, aten.rand, aten.randn, aten.randint, aten.randperm,
    aten.full_like, aten.zeros_like, aten.ones_like, aten.empty_like, aten.rand_like, aten.randn_like, aten.randint_like,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided, aten.empty_strided, aten.arange,
    aten.eye, aten.linspace, prims.empty_permuted,
)  # fmt: skip
def constant(ctx: Context, node: fx.Node) -> Result:
    """Depends on sizes only, or on chance; a fill value that is data keeps its own type."""
    data = [arg for arg in (*node.args[1:], *node.kwargs.values()) if isinstance(arg, fx.Node)]
    mixed = ctx.first_mixed([*data, *(a for a in node.args[:1] if not ctx.is_tensor(a))])
    if mixed is not None:
        return mixed
    name = node.target._schema.name.split("::")[1]
    value = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}.get(name)
    zero = name in ("zeros", "zeros_like", "new_zeros") or (
        value is not None and not isinstance(node.args[value], fx.Node) and node.args[value] == 0
    )
    return Public(zero=zero)


@rule(prims.iota)
def iota(ctx: Context, node: fx.Node) -> Result:
    length = expression(node.args[0] if not isinstance(node.args[0], fx.Node) else node.args[0].meta["val"])
    counts_samples = node.kwargs.get("start") == 0 and node.kwargs.get("step") == 1 and length == ctx.batch
    return Public(iota=Axis(0) if counts_samples else None)


@rule(aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default)
def size(ctx: Context, node: fx.Node) -> Result:
    """Shapes are public. A size that depends on data comes from an operator that is typed by itself."""
    type_ = ctx.type(node.args[0])
    return type_ if isinstance(type_, Mixed) else PUBLIC


@rule(aten._local_scalar_dense, aten.item)
def item(ctx: Context, node: fx.Node) -> Result:
    type_ = ctx.type(node.args[0])
    if isinstance(type_, Public):
        return PUBLIC
    return type_ if isinstance(type_, Mixed) else ctx.mixed(node, "a Python number is read from the data of the batch")


@rule(operator.getitem)
def getitem(ctx: Context, node: fx.Node) -> Result:
    source, index = node.args
    found = ctx.types[source]
    return found[index] if isinstance(found, tuple) else found


@rule(
    aten._assert_scalar,
    aten._assert_async,
    aten._assert_tensor_metadata,
    aten.sym_constrain_range_for_size,
    aten.sym_constrain_range,
)
def check(ctx: Context, node: fx.Node) -> Result:
    return PUBLIC
