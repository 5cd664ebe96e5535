"""Runs pieces of a joint graph again on other values: one sample at a time, or with one operand scaled per sample."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from . import over_ranks
from .errors import UnsupportedGraphError
from .factored import SAME
from .match import Use
from .rules.join import SHARING_SUMS
from .sample_types import Axis, Expr, expression

aten, prims = torch.ops.aten, torch.ops.prims
Values = dict[fx.Node, Any]


class Sizes:
    """The batch size, and other sizes of the graph, as numbers that tracing follows."""

    def __init__(self, batch: int | torch.SymInt, tensors: Sequence[Any]) -> None:
        self.batch = batch
        self._symbols: dict[Any, Any] = {}
        for tensor in tensors:
            for size in tensor.shape if isinstance(tensor, Tensor) else [tensor]:
                if isinstance(size, torch.SymInt):
                    self._symbols.setdefault(size.node.expr, size)

    def known(self, expr: Expr) -> Expr:
        """The expression with what the shape environment has learned since it was written down (``s0 == 2``, say)."""
        if not isinstance(self.batch, torch.SymInt) or self.batch.node.shape_env is None:
            return expr
        return self.batch.node.shape_env.simplify(expr)

    def __call__(self, expr: Expr) -> Any:
        expr = self.known(expr)
        if expr.is_Integer:
            return int(expr)
        if expr in self._symbols:
            return self._symbols[expr]
        parts = [self(part) for part in expr.args]
        if isinstance(expr, sympy.Mul):
            return math.prod(parts)
        if isinstance(expr, sympy.Add):
            return sum(parts)
        if isinstance(expr, sympy.Pow):
            return parts[0] ** parts[1]
        if isinstance(expr, FloorDiv):
            return parts[0] // parts[1]
        raise UnsupportedGraphError(f"the size {expr} cannot be computed from the sizes of the graph's values; mark it static.")


def samples_first(x: Tensor, axis: Axis, sizes: Sizes) -> Tensor:
    """``[.., outer * B * inner, ..]`` as ``[B, .., outer * inner, ..]``: slice b is sample b's part, its layout kept."""
    batch, inner = sizes.batch, sizes(axis.inner)
    outer = _outer(x, axis, sizes)
    if _is_one(outer):
        split = x.unflatten(axis.dim, (batch, inner)) if not _is_one(inner) else x.unsqueeze(axis.dim + 1)
        return split.movedim(axis.dim, 0)
    split = x.unflatten(axis.dim, (outer, batch, inner)).movedim(axis.dim + 1, 0)
    return split.flatten(axis.dim + 1, axis.dim + 2)


def _outer(x: Tensor, axis: Axis, sizes: Sizes) -> Any:
    size = x.shape[axis.dim]
    return sizes(sympy.cancel(expression(size) / (expression(sizes.batch) * sizes.known(axis.inner))))


def along_axis(per_sample: Tensor, axis: Axis, x: Tensor, sizes: Sizes) -> Tensor:
    """A [B] tensor stretched along the sample dimension of x, shaped to broadcast against it."""
    size = x.shape[axis.dim]
    stretched = per_sample.view(1, sizes.batch, 1).expand(_outer(x, axis, sizes), sizes.batch, sizes(axis.inner)).reshape(size)
    return stretched.view(size, *[1] * (x.dim() - axis.dim - 1))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


# Operators that vmap has no rule for, as operators that it has.
def _masked_put(x: Tensor, mask: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> Tensor:
    clamped = [i if i is None else torch.where(_like(mask, i), i, 0) for i in indices]
    return aten.index_put(x, clamped, torch.where(mask, values, 0), True)


def _like(mask: Tensor, index: Tensor) -> Tensor:
    while mask.dim() > index.dim() and mask.shape[-1] == 1:
        mask = mask.squeeze(-1)
    return mask


def _weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    along = (grad * v).sum(others, keepdim=True)
    norms = norms.reshape(g.shape)
    return g / norms * grad - g / norms**3 * along * v, along / norms


SUBSTITUTES: dict[Any, Callable[..., Any]] = {
    prims.convert_element_type.default: lambda x, dtype: x.to(dtype),
    prims.device_put.default: lambda x, device, *_: x.to(device),
    aten._unsafe_masked_index_put_accumulate.default: _masked_put,
    aten._unsafe_index_put.default: aten.index_put.default,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
    aten._unsafe_view.default: lambda x, size: x.reshape(size),
    aten.view.default: lambda x, size: x.reshape(size),
    **over_ranks.SUBSTITUTES,
}


def call(target: Any, args: Any, kwargs: Any) -> Any:
    return SUBSTITUTES.get(target, target)(*args, **kwargs)


def lookup(tree: Any, values: Values) -> Any:
    return fx.node.map_arg(tree, values.__getitem__)


def shares(use: Use, values: Values, sizes: Sizes) -> Tensor:
    """``[B, *out]``: what each sample adds to the reduction."""
    if use.operation.target is aten.convolution_backward.default:
        return _convolution_shares(use, values, sizes)
    leaves, tree = pytree.tree_flatten((use.operation.args, use.operation.kwargs))
    leaves = [values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    positions = sorted(use.axes)

    def one(*slices: Tensor) -> Tensor:
        own = list(leaves)
        for position, part in zip(positions, slices, strict=True):
            own[position] = part
        args, kwargs = pytree.tree_unflatten(own, tree)
        return call(use.operation.target, args, kwargs)

    return torch.vmap(one)(*(samples_first(leaves[i], use.axes[i], sizes) for i in positions))


def _convolution_shares(use: Use, values: Values, sizes: Sizes) -> Tensor:
    grad, source, weight, _, *settings = lookup(use.operation.args, values)
    grad, source = (samples_first(x, use.axes[i], sizes) for i, x in enumerate((grad, source)))
    if use.node.args[1] == 2:
        return grad.flatten(3).sum((1, 3))
    return torch.ops.flashnorm.conv_weight_grads(grad, source, list(weight.shape), *settings[:-1])


def _shared_addend(node: fx.Node, args: Any, here: Values, weight: Any) -> Any:
    """In a sum of a sample's values and public ones, the public part counts for each sample by its weight."""
    if node.target not in SHARING_SUMS:
        return args
    pairs = zip(node.args, args, strict=True)
    return [value if isinstance(arg, fx.Node) and arg in here else value * weight for arg, value in pairs]


def tail_per_sample(tail: Sequence[fx.Node], uses: Sequence[Use], values: Values, sizes: Sizes, result: fx.Node) -> Tensor:
    """``[B, *parameter]``: each sample's gradient, the linear tail run on each sample's shares."""
    parts = [shares(use, values, sizes) for use in uses]
    if not tail:
        return parts[0]
    weight = 1 / sizes.batch
    return torch.vmap(lambda *own: run_tail(tail, uses, own, values, result, weight, narrow=True))(*parts)


def moved_for_each(tail: Sequence[fx.Node], use: Use, part: Tensor, values: Values, result: fx.Node) -> Tensor:
    """``[B, *parameter]`` from each sample's share [B, *out] of the only use, where the tail only moves and casts elements.

    Casts are left out: what reads the gradients rounds once, at the end.
    """
    moves = [node for node in tail if node.target not in SAME]
    if not moves:
        return part

    def one(own: Tensor) -> Tensor:
        here: Values = {use.node: own}
        for node in tail:
            if node.target in SAME:
                here[node] = here[node.args[0]]  # type: ignore[index]
            else:
                args, kwargs = lookup((node.args, node.kwargs), {**values, **here})
                here[node] = call(node.target, args, kwargs)
        return here[result]

    return torch.vmap(one)(part)


def run_tail(
    tail: Sequence[fx.Node],
    uses: Sequence[Use],
    parts: Sequence[Tensor],
    values: Values,
    result: fx.Node,
    weight: Any,
    narrow: bool,
) -> Tensor:
    """The tail on other values of its uses. With ``narrow=False`` casts to a narrower float are left out.

    ``weight``: what a public term that is added to the samples' sum counts for (1/B for one sample).
    """
    here: Values = {use.node: part for use, part in zip(uses, parts, strict=True)}
    for node in tail:
        args, kwargs = lookup((node.args, node.kwargs), {**values, **here})
        args = _shared_addend(node, args, here, weight)
        if not narrow:
            args, kwargs = _widened(node, args, kwargs)
            if args is None:
                here[node] = kwargs
                continue
        here[node] = call(node.target, args, kwargs)
    return here[result]


_MOVES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.t.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.clone.default,
    aten.alias.default, aten.add.Tensor, operator.getitem,
}  # fmt: skip


def _widened(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Operands as the node expects them, except that pure moves and sums stay in the wider type they arrive in."""
    if node.target in (prims.convert_element_type.default, aten._to_copy.default):
        old, new = args[0].dtype, node.meta["val"].dtype
        return (None, args[0]) if new.itemsize < old.itemsize else (args, kwargs)
    if node.target in _MOVES:
        return args, kwargs

    def narrowed(original: Any, value: Any) -> Any:
        if isinstance(original, fx.Node) and isinstance(value, Tensor):
            wanted = original.meta["val"].dtype
            return value.to(wanted) if value.dtype != wanted else value
        return value

    flat, tree = pytree.tree_flatten((node.args, node.kwargs))
    given = pytree.tree_leaves((args, kwargs))
    return pytree.tree_unflatten([narrowed(o, v) for o, v in zip(flat, given, strict=True)], tree)


def clipped_use(use: Use, values: Values, factors: Tensor, sizes: Sizes) -> Tensor:
    """The reduction with each sample's share multiplied by its factor; a share with factor 0 counts as exactly 0.

    ``factors`` [B], float32. Narrow operands are widened, so that the sum over samples is not rounded before the noise.
    """
    leaves, tree = pytree.tree_flatten((use.operation.args, use.operation.kwargs))
    leaves = [values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    keep = factors != 0
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            continue
        wide = leaf.float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf
        if position in use.axes:
            axis = use.axes[position]
            if position == use.linear:
                wide = wide * along_axis(factors, axis, leaf, sizes).to(wide.dtype)
            wide = torch.where(along_axis(keep, axis, leaf, sizes), wide, 0)
        leaves[position] = wide
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    if use.operation.target is aten.convolution_backward.default:
        output = use.node.args[1]
        return call(use.operation.target, [*args[:10], [i == output for i in range(3)]], kwargs)[output]
    return call(use.operation.target, args, kwargs)
