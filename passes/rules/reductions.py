"""Reductions, scans, sorting, normalisation: operators that combine elements along some dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..sample_types import Affine, PerSample, Public, SampleSum, SampleType
from .join import NONLINEAR_SUM, along, is_zero
from .registry import Context, Result, rule

aten, prims = torch.ops.aten, torch.ops.prims


def _dims(ctx: Context, node: fx.Node, dims: Any) -> list[int]:
    rank = len(ctx.shape(node.args[0]))
    if dims is None or (isinstance(dims, Sequence) and not len(dims)):
        return list(range(rank))
    return [ctx.dim(dim, node.args[0]) for dim in (dims if isinstance(dims, Sequence) else [dims])]


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return default


@rule(aten.sum, prims.sum)
def sum_(ctx: Context, node: fx.Node) -> Result:
    """The one reduction that is linear: over the sample axis it gives a ``SampleSum``.

    A mean is not among them: replayed on one sample it would divide by another number.
    """
    source = node.args[0]
    dims = _dims(ctx, node, _argument(node, "dim", _argument(node, "dims")))
    type_ = ctx.type(source)
    if isinstance(type_, PerSample) and type_.axis.dim in dims:
        return SampleSum(type_.scale)
    return along(ctx, node, source, dims, linear=True, keep=bool(_argument(node, "keepdim", False)))


@rule(
    aten.amax, aten.amin, aten.prod, aten.any, aten.all, aten.argmax, aten.argmin, aten.median, aten.nanmedian, aten.mode,
    aten.var_mean.correction, aten.var.correction, aten.std.correction, aten.std_mean.correction, aten.logsumexp,
    aten.linalg_vector_norm, aten.norm, aten.max.dim, aten.min.dim, aten.max.default, aten.min.default,
    aten.mean,
    aten.kthvalue, aten.count_nonzero, prims.amax, prims.amin, prims.prod, prims.var,
)  # fmt: skip
def reduce(ctx: Context, node: fx.Node) -> Result:
    dims = _dims(ctx, node, _argument(node, "dim", _argument(node, "dims")))
    keep = bool(_argument(node, "keepdim", False))
    name = node.target._schema.name.split("::")[1]
    found = along(ctx, node, node.args[0], dims, linear=False, keep=keep, what=f"{name} is taken over the samples")
    value = node.meta["val"]
    return (found,) * len(value) if isinstance(value, (tuple, list)) else found


@rule(
    aten.cumsum,
    aten.logcumsumexp,
    aten.cumprod,
    aten.cummax,
    aten.cummin,
    aten.sort,
    aten.argsort,
    aten.topk,
    aten._softmax,
    aten._log_softmax,
)
def scan(ctx: Context, node: fx.Node) -> Result:
    dim = _argument(node, "dim", -1)
    name = node.target._schema.name.split("::")[1]
    linear = node.target is aten.cumsum.default
    found = along(ctx, node, node.args[0], [dim], linear=linear, what=f"{name} runs over the samples")
    value = node.meta["val"]
    return (found,) * len(value) if isinstance(value, (tuple, list)) else found


@rule(aten.histc, aten.bincount, aten.unique_dim, aten._unique2, aten.nonzero, aten.masked_select)
def counts_everything(ctx: Context, node: fx.Node) -> Result:
    """Looks at all elements at once, and the size of the result may depend on them."""
    tensors = [arg for arg in node.args if ctx.is_tensor(arg)]
    found: SampleType = Public()
    if not all(isinstance(ctx.type(arg), Public) for arg in tensors):
        found = ctx.first_mixed(tensors) or ctx.mixed(node, "its result depends on the values of all samples together")
    value = node.meta["val"]
    return (found,) * len(value) if isinstance(value, (tuple, list)) else found


@rule(aten.linalg_matrix_exp)
def matrix_exp(ctx: Context, node: fx.Node) -> Result:
    source = node.args[0]
    type_ = ctx.type(source)
    if isinstance(type_, Affine):
        half = block_upper_triangular(ctx, source)
        return Affine(half, scale=type_.scale) if half is not None else ctx.mixed(node, NONLINEAR_SUM)
    rank = len(ctx.shape(source))
    return along(ctx, node, source, [rank - 2, rank - 1], linear=False)


def block_upper_triangular(ctx: Context, node: fx.Node) -> Any:
    """n if the node builds a 2n x 2n matrix ``[[A, G], [0, A]]`` in which only G is a sum over samples, else ``None``.

    This is how autograd differentiates a function of a matrix.
    """
    rows = _halves(ctx, node, -2)
    blocks = [_halves(ctx, row, -1) for row in rows] if rows else []
    if len(blocks) != 2 or not all(blocks):
        return None
    (upper, corner), (zero, lower) = blocks
    public = upper is lower and isinstance(ctx.type(upper), Public) and not ctx.type(upper).scale
    square = ctx.shape(corner) == ctx.shape(upper) and ctx.shape(upper)[-1] == ctx.shape(upper)[-2]
    fits = public and square and isinstance(ctx.type(corner), SampleSum) and is_zero(ctx, zero)
    return ctx.shape(upper)[-1] if fits else None


def _halves(ctx: Context, node: fx.Node, dim: int) -> list[Any]:
    if node.target is not aten.cat.default or len(node.args[0]) != 2 or len(node.args) < 2:
        return []
    return list(node.args[0]) if ctx.dim(node.args[1], node) == len(ctx.shape(node)) + dim else []
