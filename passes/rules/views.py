"""Operators that move elements without computing with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._prims_common import is_contiguous_or_false

from ..sample_types import Affine, Axis, Expr, Mixed, PerSample, Public, SampleSum, Scale, divides, expression, product
from .join import NONLINEAR_SUM, additive, along, is_zero
from .registry import Context, Result, rule

aten, prims = torch.ops.aten, torch.ops.prims


@rule(
    aten.view.default,
    aten.reshape,
    aten._unsafe_view,
    aten.unsqueeze,
    aten.squeeze,
    aten.flatten,
    aten._reshape_alias,
    aten.view_copy.default,
)
def view(ctx: Context, node: fx.Node) -> Result:
    source = node.args[0]
    return ctx.view(ctx.type(source), node, ctx.shape(source), ctx.shape(node))


@rule(aten.as_strided)
def as_strided(ctx: Context, node: fx.Node) -> Result:
    """Reads memory, not dimensions: known only where it amounts to a view of the whole contiguous tensor."""
    source = node.args[0]
    old, new = source.meta["val"], node.meta["val"]
    whole = is_contiguous_or_false(old) and is_contiguous_or_false(new) and product(ctx.shape(source)) == product(ctx.shape(node))
    offset = node.args[3] if len(node.args) > 3 else None
    if whole and (offset is None or offset == old.storage_offset()):
        return ctx.view(ctx.type(source), node, ctx.shape(source), ctx.shape(node))
    if isinstance(ctx.type(source), Public):
        return Public(scale=ctx.type(source).scale)
    return ctx.first_mixed([source]) or ctx.mixed(node, "it reads memory across dimensions")


@rule(aten.as_strided_scatter)
def as_strided_scatter(ctx: Context, node: fx.Node) -> Result:
    """Known only where it overwrites the whole contiguous destination in order: then it is the second operand, reshaped."""
    base, part = node.args[:2]
    strides = [expression(stride.meta["val"] if isinstance(stride, fx.Node) else stride) for stride in node.args[3]]
    shape = ctx.shape(part)
    in_order = strides == [product(shape[dim + 1 :]) for dim in range(len(shape))]
    whole = is_contiguous_or_false(base.meta["val"]) and product(shape) == product(ctx.shape(base))
    offset = node.args[4] if len(node.args) > 4 else None
    if in_order and whole and offset in (None, 0):
        return ctx.view(ctx.type(part), node, shape, ctx.shape(node))
    if isinstance(ctx.type(base), Public) and isinstance(ctx.type(part), Public):
        return Public()
    return ctx.first_mixed([base, part]) or ctx.mixed(node, "it writes memory across dimensions")


def _renamed(ctx: Context, source: Any, new_dim: Any) -> Result:
    """The type after dimension ``d`` became ``new_dim(d)``."""
    type_ = ctx.type(source)
    if isinstance(type_, PerSample):
        return PerSample(Axis(new_dim(type_.axis.dim), type_.axis.inner), type_.scale)
    if isinstance(type_, Public) and type_.iota is not None:
        return Public(type_.zero, Axis(new_dim(type_.iota.dim), type_.iota.inner), type_.scale)
    return type_


@rule(aten.copy)
def copy(ctx: Context, node: fx.Node) -> Result:
    """The second operand, broadcast to the shape of the first."""
    added = len(ctx.shape(node)) - len(ctx.shape(node.args[1]))
    return _renamed(ctx, node.args[1], lambda dim: dim + added)


@rule(aten.permute)
def permute(ctx: Context, node: fx.Node) -> Result:
    source, order = node.args
    order = [ctx.dim(dim, source) for dim in order]
    return _renamed(ctx, source, order.index)


@rule(aten.t)
def t(ctx: Context, node: fx.Node) -> Result:
    rank = len(ctx.shape(node.args[0]))
    return _renamed(ctx, node.args[0], lambda dim: rank - 1 - dim)


@rule(aten.transpose.int, prims.transpose)
def transpose(ctx: Context, node: fx.Node) -> Result:
    if node.target is prims.transpose.default:
        return _renamed(ctx, node.args[0], list(node.args[1]).index)
    one, two = (ctx.dim(dim, node.args[0]) for dim in node.args[1:])
    return _renamed(ctx, node.args[0], lambda dim: {one: two, two: one}.get(dim, dim))


@rule(aten.expand)
def expand(ctx: Context, node: fx.Node) -> Result:
    added = len(ctx.shape(node)) - len(ctx.shape(node.args[0]))
    return _renamed(ctx, node.args[0], lambda dim: dim + added)


@rule(prims.broadcast_in_dim)
def broadcast_in_dim(ctx: Context, node: fx.Node) -> Result:
    return _renamed(ctx, node.args[0], lambda dim: node.args[2][dim])


@rule(aten.repeat)
def repeat(ctx: Context, node: fx.Node) -> Result:
    """Repeats whole tensors, so along the sample axis only whole periods: the axis keeps its inner size."""
    added = len(ctx.shape(node)) - len(ctx.shape(node.args[0]))
    return _renamed(ctx, node.args[0], lambda dim: dim + added)


def _bound(value: Any, size: Expr) -> Expr:
    """A slice bound as Python clamps it."""
    value = expression(value.meta["val"] if isinstance(value, fx.Node) else value)
    if value.is_Integer and value < 0:
        value = value + size
    if value.is_Integer and (value >= 2**62 or (size.is_Integer and value > size)):
        return size
    return value


@rule(aten.slice)
def slice_(ctx: Context, node: fx.Node) -> Result:
    settings: list[Any] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
    source, (given_dim, start, end, step) = node.args[0], settings
    type_ = ctx.type(source)
    dim = ctx.dim(given_dim, source)
    size = ctx.shape(source)[dim]
    start = _bound(0 if start is None else start, size)
    end = _bound(2**63 - 1 if end is None else end, size)
    if isinstance(type_, Affine):
        return _slice_of_blocks(ctx, node, type_, dim, start, end, step)
    if start == 0 and end == size and step == 1:
        return type_
    if isinstance(type_, PerSample) and type_.axis.dim == dim:
        if step == 1 and _whole_periods(ctx, type_.axis, start, ctx.shape(node)[dim]):
            return type_
        return ctx.mixed(node, "it picks some of the samples")
    if isinstance(type_, Public):
        return Public(type_.zero, None if type_.iota and type_.iota.dim == dim else type_.iota, type_.scale)
    return type_


def _whole_periods(ctx: Context, axis: Axis, *positions: Expr) -> bool:
    period = ctx.batch * axis.inner
    return all(position == 0 or divides(period, position) for position in positions)


def _slice_of_blocks(ctx: Context, node: fx.Node, type_: Affine, dim: int, start: Expr, end: Expr, step: Any) -> Result:
    """The upper right block of an analytic function of ``[[A, G], [0, A]]`` is linear in G (Higham 2008, Theorem 3.6)."""
    size = ctx.shape(node.args[0])[dim]
    if start == 0 and end == size and step == 1:
        return type_
    if type_.blocks is None or step != 1:
        return ctx.mixed(node, NONLINEAR_SUM)
    rank = len(ctx.shape(node))
    if not type_.rows_cut and dim == rank - 2 and start == 0 and end == type_.blocks:
        return Affine(type_.blocks, True, type_.scale)
    if type_.rows_cut and dim == rank - 1 and start == type_.blocks and end == size:
        return SampleSum(type_.scale)
    return ctx.mixed(node, NONLINEAR_SUM)


@rule(aten.select)
def select(ctx: Context, node: fx.Node) -> Result:
    source, dim, _ = node.args
    return along(ctx, node, source, [dim], linear=True, keep=False, what="it picks one sample out of the batch")


@rule(aten.unbind)
def unbind(ctx: Context, node: fx.Node) -> Result:
    dim = node.args[1] if len(node.args) > 1 else 0
    found = along(ctx, node, node.args[0], [dim], linear=True, keep=False, what="it takes the samples apart")
    return (found,) * len(node.meta["val"])


@rule(aten.split, aten.split_with_sizes, aten.chunk)
def split(ctx: Context, node: fx.Node) -> Result:
    source, dim = node.args[0], node.args[2] if len(node.args) > 2 else 0
    type_ = ctx.type(source)
    parts = [tuple(expression(size) for size in part.shape) for part in node.meta["val"]]
    if isinstance(type_, PerSample) and type_.axis.dim == ctx.dim(dim, source):
        whole = _whole_periods(ctx, type_.axis, *(part[type_.axis.dim] for part in parts))
        return (type_ if whole else ctx.mixed(node, "it splits the batch into parts"),) * len(parts)
    return (along(ctx, node, source, [dim], linear=True, what="it splits the batch into parts"),) * len(parts)


@rule(aten.cat)
def cat(ctx: Context, node: fx.Node) -> Result:
    tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    tensors = [tensor for tensor in tensors if ctx.shape(tensor) != (0,)]
    dim = ctx.dim(dim, tensors[0])
    found = additive(ctx, node, tensors)
    if isinstance(found, PerSample) and found.axis.dim == dim:
        if not _whole_periods(ctx, found.axis, *(ctx.shape(tensor)[dim] for tensor in tensors)):
            return ctx.mixed(node, "it joins parts of the batch that are not whole batches")
        public = [t for t in tensors if isinstance(ctx.type(t), Public) and not is_zero(ctx, t)]
        return ctx.mixed(node, "it appends public rows to the batch") if public and ctx.batch != 1 else found
    if isinstance(found, Mixed) and _public_beside_sum(ctx, tensors):
        return Affine(scale=_scale_of_sums(ctx, tensors))
    return found


def _public_beside_sum(ctx: Context, args: Any) -> bool:
    """Whether public values and sums over samples stand side by side (not added), as in a block matrix."""
    types = [ctx.type(arg) for arg in args]
    sums = {type_.scale for type_ in types if isinstance(type_, (SampleSum, Affine))}
    unscaled = not any(type_.scale for type_ in types if isinstance(type_, Public))
    return {type(type_) for type_ in types} <= {Public, SampleSum, Affine} and len(sums) == 1 and unscaled


def _scale_of_sums(ctx: Context, args: Any) -> Scale:
    return next(ctx.type(arg).scale for arg in args if not isinstance(ctx.type(arg), Public))


@rule(aten.flip, aten.roll, prims.rev)
def reorder(ctx: Context, node: fx.Node) -> Result:
    dims = node.args[2] if node.target is aten.roll.default and len(node.args) > 2 else node.args[1]
    if node.target is aten.roll.default and len(node.args) < 3:
        dims = range(len(ctx.shape(node)))
    return along(ctx, node, node.args[0], dims, linear=True, what="it moves values from one sample to another")


@rule(aten.constant_pad_nd)
def pad(ctx: Context, node: fx.Node) -> Result:
    source, amounts = node.args[:2]
    fill = node.args[2] if len(node.args) > 2 else 0
    rank = len(ctx.shape(source))
    padded = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if not (isinstance(amount, int) and amount == 0)}
    type_ = ctx.type(source)
    if isinstance(type_, PerSample) and type_.axis.dim in padded:
        first = 2 * (rank - 1 - type_.axis.dim)
        sizes = [expression(a.meta["val"] if isinstance(a, fx.Node) else a) for a in amounts[first : first + 2]]
        if is_zero(ctx, fill) and _whole_periods(ctx, type_.axis, *sizes):
            return type_
    return along(ctx, node, source, padded, linear=is_zero(ctx, fill), what="it adds rows beside the samples")


@rule(aten.slice_scatter)
def slice_scatter(ctx: Context, node: fx.Node) -> Result:
    base, part = node.args[:2]
    dim = ctx.dim(node.args[2] if len(node.args) > 2 else 0, base)
    found = additive(ctx, node, (base, part))
    if isinstance(found, PerSample) and found.axis.dim == dim:
        start = _bound(node.args[3] if len(node.args) > 3 and node.args[3] is not None else 0, ctx.shape(base)[dim])
        if not _whole_periods(ctx, found.axis, start, ctx.shape(part)[dim]):
            return ctx.mixed(node, "it writes to some of the samples")
    if isinstance(found, Mixed) and _public_beside_sum(ctx, (base, part)):
        return Affine(scale=_scale_of_sums(ctx, (base, part)))
    return found


@rule(aten.select_scatter)
def select_scatter(ctx: Context, node: fx.Node) -> Result:
    base, part, dim, _ = node.args
    dim = ctx.dim(dim, base)
    one, two = ctx.type(base), ctx.type(part)
    if isinstance(two, PerSample):
        two = PerSample(Axis(two.axis.dim + (two.axis.dim >= dim), two.axis.inner), two.scale)
    mixed = ctx.first_mixed((base, part))
    if mixed is not None:
        return mixed
    if isinstance(one, PerSample) and one.axis.dim == dim:
        return ctx.mixed(node, "it writes to one of the samples")
    if is_zero(ctx, base) or one == two:
        return two if not (isinstance(two, Public) and not two.zero) else Public(scale=two.scale)
    if is_zero(ctx, part):
        return one
    if isinstance(one, (Public, PerSample)) and isinstance(two, (Public, PerSample)) and one.scale == two.scale == ():
        both = [type_ for type_ in (one, two) if isinstance(type_, PerSample)]
        return (
            both[0]
            if len({type_.axis for type_ in both}) == 1
            else (Public() if not both else ctx.mixed(node, "sample axes differ"))
        )
    return ctx.mixed(node, NONLINEAR_SUM)


@rule(aten.unfold)
def unfold(ctx: Context, node: fx.Node) -> Result:
    return along(ctx, node, node.args[0], [node.args[1]], linear=True)


@rule(aten.unfold_backward)
def unfold_backward(ctx: Context, node: fx.Node) -> Result:
    return along(ctx, node, node.args[0], [node.args[2], len(ctx.shape(node.args[0])) - 1], linear=True)


@rule(aten.diagonal, aten.diagonal_copy)
def diagonal(ctx: Context, node: fx.Node) -> Result:
    dims = node.args[2:4] if len(node.args) > 2 else (0, 1)
    return along(ctx, node, node.args[0], dims, linear=True, keep=False)


@rule(aten.diagonal_scatter)
def diagonal_scatter(ctx: Context, node: fx.Node) -> Result:
    """Diagonal entries lie on two dimensions: allowed for values without a sample axis."""
    base, part = (ctx.type(arg) for arg in node.args[:2])
    if isinstance(base, Public) and isinstance(part, Public):
        return Public()
    if is_zero(ctx, node.args[0]) and isinstance(part, SampleSum):
        return part
    return ctx.first_mixed(node.args[:2]) or ctx.mixed(node, "a diagonal crosses the sample axis")
