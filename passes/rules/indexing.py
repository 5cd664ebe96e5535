"""Gathers and scatters, embeddings among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..sample_types import PUBLIC, Axis, Mixed, PerSample, Public, SampleSum, SampleType, divides, expression
from .join import NONLINEAR_SCALE, NONLINEAR_SUM, TWO_AXES, additive, is_zero, pointwise
from .registry import Context, Result, rule

aten = torch.ops.aten
PICKS = "an index picks values of other samples"
WRITES = "samples write to the same place, and not by addition"


@dataclass(frozen=True)
class IndexSpace:
    """``x[indices]``: which dimension of the result comes from a dimension of x and which from the indices' shape."""

    origins: tuple[tuple[str, int], ...]  # ("x", dimension of x) or ("index", dimension of the broadcast index)
    index_rank: int
    indexed: tuple[int, ...]

    @staticmethod
    def of(ctx: Context, x: Any, indices: Sequence[Any]) -> IndexSpace:
        rank = len(ctx.shape(x))
        padded = [*indices, *[None] * (rank - len(indices))]
        indexed = tuple(dim for dim, index in enumerate(padded) if index is not None)
        index_rank = max(len(ctx.shape(padded[dim])) for dim in indexed)
        free = [("x", dim) for dim in range(rank) if dim not in indexed]
        block = [("index", dim) for dim in range(index_rank)]
        contiguous = indexed == tuple(range(indexed[0], indexed[-1] + 1))
        place = indexed[0] if contiguous else 0
        return IndexSpace(tuple(free[:place] + block + free[place:]), index_rank, indexed)

    def result_dim(self, kind: str, dim: int) -> int:
        return self.origins.index((kind, dim))


def _index_axis(ctx: Context, node: fx.Node, indices: Sequence[Any], rank: int) -> Axis | Mixed | None:
    """The sample axis on which the per-sample indices agree, as a dimension of their broadcast shape."""
    found: Axis | None = None
    for index in indices:
        type_ = ctx.type(index) if index is not None else PUBLIC
        if isinstance(type_, Mixed):
            return type_
        if type_.scale or isinstance(type_, SampleSum):
            return ctx.mixed(node, NONLINEAR_SUM)
        if isinstance(type_, PerSample):
            axis = Axis(type_.axis.dim + rank - len(ctx.shape(index)), type_.axis.inner)
            if found is not None and axis != found and ctx.batch != 1:
                return ctx.mixed(node, TWO_AXES)
            found = found or axis
    return found


def _own_row(ctx: Context, indices: Sequence[Any], dim: int, rank: int) -> Axis | None:
    """Where the index of dimension ``dim`` counts the samples (``arange(B)``), as a dimension of the index shape."""
    index = indices[dim] if dim < len(indices) else None
    type_ = ctx.type(index) if index is not None else PUBLIC
    if not isinstance(type_, Public) or type_.iota is None:
        return None
    return Axis(type_.iota.dim + rank - len(ctx.shape(index)), type_.iota.inner)


def _is_mask(index: Any) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


def index_type(ctx: Context, node: fx.Node, x: Any, indices: Sequence[Any]) -> SampleType:
    """``x[indices]``."""
    type_ = ctx.type(x)
    space = IndexSpace.of(ctx, x, indices)
    axis = _index_axis(ctx, node, indices, space.index_rank)
    if isinstance(type_, Mixed) or isinstance(axis, Mixed):
        return type_ if isinstance(type_, Mixed) else axis  # type: ignore[return-value]
    if any(_is_mask(index) for index in indices) and not isinstance(type_, Public):
        return ctx.mixed(node, "a mask selects a number of elements that depends on the data")
    if not isinstance(type_, PerSample):
        if axis is None:
            return Public(type_.zero, None, type_.scale) if isinstance(type_, Public) else type_
        if not isinstance(type_, Public):
            return ctx.mixed(node, NONLINEAR_SUM)
        if any(_is_mask(index) for index in indices):
            return ctx.mixed(node, "a mask selects a number of elements that depends on the data")
        return PerSample(Axis(space.result_dim("index", axis.dim), axis.inner), type_.scale)
    if type_.axis.dim not in space.indexed:
        if axis is not None and ctx.batch != 1:
            return ctx.mixed(node, PICKS)
        return PerSample(Axis(space.result_dim("x", type_.axis.dim), type_.axis.inner), type_.scale)
    own = _own_row(ctx, indices, type_.axis.dim, space.index_rank)
    if ctx.batch == 1:
        return PerSample(axis or Axis(space.result_dim("index", 0)), type_.scale)
    if own is None or type_.axis.inner != 1 or (axis is not None and axis != own):
        return ctx.mixed(node, PICKS)
    return PerSample(Axis(space.result_dim("index", own.dim), own.inner), type_.scale)


@rule(aten.index, aten._unsafe_index)
def index(ctx: Context, node: fx.Node) -> Result:
    return index_type(ctx, node, node.args[0], node.args[1])


@rule(aten._unsafe_masked_index)
def masked_index(ctx: Context, node: fx.Node) -> Result:
    x, mask, indices, fill = node.args
    found = index_type(ctx, node, x, indices)
    mixed = ctx.first_mixed([mask])
    if isinstance(found, Mixed) or mixed is not None:
        return found if isinstance(found, Mixed) else mixed  # type: ignore[return-value]
    if isinstance(ctx.type(mask), Public) and (is_zero(ctx, fill) or not isinstance(found, SampleSum)):
        return found
    axis = _axis_in(ctx, node, mask)
    if isinstance(found, Public) and not found.scale and axis is not None:
        return PerSample(axis)
    return found if isinstance(found, PerSample) and found.axis == axis else ctx.mixed(node, TWO_AXES)


def _axis_in(ctx: Context, node: fx.Node, arg: Any) -> Axis | None:
    type_ = ctx.type(arg)
    if not isinstance(type_, PerSample):
        return None
    return Axis(type_.axis.dim + len(ctx.shape(node)) - len(ctx.shape(arg)), type_.axis.inner)


def write_type(
    ctx: Context, node: fx.Node, x: Any, indices: Sequence[Any], values: Any, adds: bool, mask: Any = None
) -> SampleType:
    """``x[indices] = values`` or ``+=``."""
    mixed = ctx.first_mixed([x, values, *([mask] if mask is not None else []), *[i for i in indices if i is not None]])
    if mixed is not None:
        return mixed
    base, value = ctx.type(x), ctx.type(values)
    space = IndexSpace.of(ctx, x, indices)
    if any(_is_mask(index) for index in indices):
        public = all(isinstance(ctx.type(a), Public) for a in (x, values, *[i for i in indices if i is not None]))
        return PUBLIC if public else ctx.mixed(node, "a mask selects a number of elements that depends on the data")
    axis = _index_axis(ctx, node, [*indices, *([mask] if mask is not None and _fits(ctx, mask, space) else [])], space.index_rank)
    if isinstance(axis, Mixed):
        return axis
    place = _axis_of_values(ctx, values, space)
    if axis is not None:
        in_values = Axis(space.result_dim("index", axis.dim), axis.inner)
        if place is not None and place != in_values and ctx.batch != 1:
            return ctx.mixed(node, TWO_AXES)
        place = in_values
    if place is None:
        return additive(ctx, node, (x, values)) if isinstance(value, Public) or isinstance(base, (Public, SampleSum)) else base
    if isinstance(value, SampleSum):
        return ctx.mixed(node, NONLINEAR_SUM)
    return _write_samples(ctx, node, x, indices, space, place, value, adds)


def _fits(ctx: Context, mask: Any, space: IndexSpace) -> bool:
    return len(ctx.shape(mask)) <= space.index_rank


def _axis_of_values(ctx: Context, values: Any, space: IndexSpace) -> Axis | None:
    type_ = ctx.type(values)
    if not isinstance(type_, PerSample):
        return None
    return Axis(type_.axis.dim + len(space.origins) - len(ctx.shape(values)), type_.axis.inner)


def _write_samples(
    ctx: Context,
    node: fx.Node,
    x: Any,
    indices: Sequence[Any],
    space: IndexSpace,
    place: Axis,
    value: SampleType,
    adds: bool,
) -> SampleType:
    base = ctx.type(x)
    kind, dim = space.origins[place.dim]
    own: Axis | None = None
    if kind == "x":
        own = Axis(dim, place.inner)
    else:
        rows = [d for d in space.indexed if _own_row(ctx, indices, d, space.index_rank) == Axis(dim, place.inner)]
        own = Axis(rows[0]) if rows else None
    if own is not None:
        if is_zero(ctx, x) or (isinstance(base, PerSample) and base.axis == own and base.scale == value.scale):
            return PerSample(own, value.scale)
        if isinstance(base, Public) and not base.scale and not value.scale:
            return PerSample(own)
        return ctx.mixed(node, NONLINEAR_SUM)
    if isinstance(base, PerSample) and not adds:
        return ctx.mixed(node, WRITES)
    if adds and is_zero(ctx, x):
        return SampleSum(value.scale)
    return ctx.mixed(node, WRITES)


@rule(aten.index_put, aten._unsafe_index_put)
def index_put(ctx: Context, node: fx.Node) -> Result:
    x, indices, values = node.args[:3]
    adds = bool(node.args[3]) if len(node.args) > 3 else bool(node.kwargs.get("accumulate", False))
    return write_type(ctx, node, x, indices, values, adds)


@rule(aten._unsafe_masked_index_put_accumulate)
def masked_index_put(ctx: Context, node: fx.Node) -> Result:
    x, mask, indices, values = node.args
    found = write_type(ctx, node, x, indices, values, True)
    if isinstance(found, Mixed) or isinstance(ctx.type(mask), Public):
        return found
    axis = _axis_in_values(ctx, mask, values)
    value, space = ctx.type(values), IndexSpace.of(ctx, x, indices)
    in_index = _index_axis(ctx, node, indices, space.index_rank)
    own = Axis(space.result_dim("index", in_index.dim), in_index.inner) if isinstance(in_index, Axis) else None
    same = axis in (own, value.axis if isinstance(value, PerSample) else None)
    return found if same and axis is not None else ctx.first_mixed([mask]) or ctx.mixed(node, TWO_AXES)


def _axis_in_values(ctx: Context, arg: Any, values: Any) -> Axis | None:
    type_ = ctx.type(arg)
    if not isinstance(type_, PerSample):
        return None
    return Axis(type_.axis.dim + len(ctx.shape(values)) - len(ctx.shape(arg)), type_.axis.inner)


@rule(aten.embedding)
def embedding(ctx: Context, node: fx.Node) -> Result:
    return index_type(ctx, node, node.args[0], [node.args[1]])


@rule(aten.embedding_dense_backward)
def embedding_dense_backward(ctx: Context, node: fx.Node) -> Result:
    grad, rows = node.args[:2]
    if len(node.args) > 4 and node.args[4]:
        return ctx.first_mixed(node.args) or ctx.mixed(node, "scale_grad_by_freq divides by how often the whole batch uses a row")
    one, two = ctx.type(grad), ctx.type(rows)
    if isinstance(two, Public) and isinstance(one, (Public, SampleSum)):
        return one
    joined = pointwise(ctx, node, [rows]) if isinstance(two, PerSample) else two
    if isinstance(joined, Mixed) or isinstance(one, Mixed):
        return joined if isinstance(joined, Mixed) else one
    aligned = not isinstance(one, PerSample) or not isinstance(two, PerSample) or one.axis == two.axis
    return SampleSum(one.scale) if aligned and not isinstance(one, SampleSum) else ctx.mixed(node, TWO_AXES)


@rule(aten.gather)
def gather(ctx: Context, node: fx.Node) -> Result:
    x, dim, indices = node.args[:3]
    dim = ctx.dim(dim, x)
    mixed = ctx.first_mixed((x, indices))
    if mixed is not None:
        return mixed
    source, index_ = ctx.type(x), ctx.type(indices)
    if index_.scale or not isinstance(index_, (Public, PerSample)):
        return ctx.mixed(node, NONLINEAR_SCALE)
    if isinstance(index_, Public):
        if isinstance(source, PerSample) and (source.axis.dim == dim or not _same_size(ctx, x, indices, source.axis.dim)):
            return ctx.mixed(node, PICKS)
        return Public(scale=source.scale) if isinstance(source, Public) else source
    if isinstance(source, Public):
        return PerSample(index_.axis, source.scale)
    if isinstance(source, PerSample):
        own = source.axis == index_.axis and source.axis.dim != dim  # an index may be shorter: it holds whole periods
        if own or ctx.batch == 1:
            return source
    return ctx.mixed(node, PICKS)


def _same_size(ctx: Context, one: Any, two: Any, dim: int) -> bool:
    return ctx.shape(one)[dim] == ctx.shape(two)[dim]


@rule(
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add,
    aten.scatter_reduce.two,
    aten.scatter.value_reduce,
    aten.scatter.reduce,
)
def scatter(ctx: Context, node: fx.Node) -> Result:
    x, dim, indices, values = node.args[:4]
    dim = ctx.dim(dim, x)
    name = str(node.target)
    reduce = node.args[4] if len(node.args) > 4 else node.kwargs.get("reduce")
    if reduce not in (None, "sum", "add"):
        return _plain_scatter(ctx, node, x, dim, indices, values)
    adds = "scatter_add" in name or reduce in ("sum", "add")
    include_self = node.args[5] if len(node.args) > 5 else node.kwargs.get("include_self", True)
    mixed = ctx.first_mixed([a for a in (x, indices, values) if isinstance(a, fx.Node)])
    if mixed is not None:
        return mixed
    base, index_, value = ctx.type(x), ctx.type(indices), ctx.type(values)
    if isinstance(index_, SampleSum) or index_.scale:
        return ctx.mixed(node, NONLINEAR_SUM)
    axes = {type_.axis for type_ in (base, index_, value) if isinstance(type_, PerSample)}
    if not axes:
        return additive(ctx, node, (x, values)) if not adds or include_self else ctx.type(values)
    if len(axes) > 1 and ctx.batch != 1:
        return ctx.mixed(node, TWO_AXES)
    axis = next(iter(axes))
    if isinstance(base, SampleSum) or isinstance(value, SampleSum):
        return ctx.mixed(node, NONLINEAR_SUM)
    scale = value.scale if is_zero(ctx, x) else base.scale
    if not is_zero(ctx, x) and base.scale != value.scale and not is_zero(ctx, values):
        return ctx.mixed(node, NONLINEAR_SCALE)
    if axis.dim != dim:
        whole = isinstance(base, PerSample) or divides(ctx.batch * axis.inner, ctx.shape(x)[axis.dim])
        return PerSample(axis, scale) if whole or ctx.batch == 1 else ctx.mixed(node, PICKS)
    if adds and is_zero(ctx, x):
        return SampleSum(scale)
    return ctx.mixed(node, WRITES)


def _plain_scatter(ctx: Context, node: fx.Node, x: Any, dim: int, indices: Any, values: Any) -> SampleType:
    found = pointwise(ctx, node, [a for a in (x, indices, values) if isinstance(a, fx.Node)])
    if isinstance(found, PerSample) and (found.axis.dim == dim or not _same_size(ctx, x, indices, found.axis.dim)):
        return ctx.mixed(node, WRITES)
    return found


@rule(aten.index_select)
def index_select(ctx: Context, node: fx.Node) -> Result:
    x, dim, rows = node.args
    return index_type(ctx, node, x, [*[None] * ctx.dim(dim, x), rows])


@rule(aten.index_add)
def index_add(ctx: Context, node: fx.Node) -> Result:
    x, dim, rows, values = node.args[:4]
    return write_type(ctx, node, x, [*[None] * ctx.dim(dim, x), rows], values, True)


@rule(aten.bucketize.Tensor, aten.searchsorted.Tensor)
def bucketize(ctx: Context, node: fx.Node) -> Result:
    values, boundaries = node.args[:2] if "bucketize" in str(node.target) else node.args[1::-1]
    if not isinstance(ctx.type(boundaries), Public):
        return ctx.first_mixed(node.args[:2]) or ctx.mixed(node, "the bucket boundaries depend on samples")
    return pointwise(ctx, node, [values])


@rule(aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(ctx: Context, node: fx.Node) -> Result:
    """Flat ids with a bag per sample: offsets that count in steps of a sample's ids."""
    weight, ids, offsets = node.args[:3]
    mixed = ctx.first_mixed((weight, ids, offsets))
    if mixed is not None:
        return (mixed,) * 4
    type_ = ctx.type(ids)
    if isinstance(type_, Public) and isinstance(ctx.type(weight), Public) and isinstance(ctx.type(offsets), Public):
        return (PUBLIC,) * 4
    per_bag = isinstance(offsets, fx.Node) and offsets.target is torch.ops.prims.iota.default and offsets.kwargs["start"] == 0
    if per_bag and isinstance(type_, PerSample) and type_.axis.dim == 0 and isinstance(ctx.type(weight), Public):
        steps = expression(_value(offsets.kwargs["step"])) == type_.axis.inner
        if steps and ctx.shape(offsets)[0] == ctx.batch:
            return (PerSample(Axis(0)),) * 4
    return (ctx.mixed(node, "a bag may hold values of several samples: pass ids of shape [B, T] without offsets"),) * 4


def _value(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, fx.Node) else arg
