"""What a parameter's gradient is a product of, as values of the private computation, samples first.

Legend: B samples, T positions, p rows and d columns of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from . import kernels
from .factored import Factor, is_convolution, unwidened
from .factors import Outer, Rows, convolution_factors
from .match import Use, write_operands
from .replay import Sizes, Values, samples_first
from .rules import Context
from .sample_types import expression


def factor_values(factor: Factor, values: Values, sizes: Sizes) -> Outer | Rows:
    """The operands of one use's share of the gradient."""
    if factor.kind == "rows":
        return _row_values(factor, values, sizes)
    if not is_convolution(factor):
        return outer_values(factor, values, sizes)
    use = factor.use
    grad, source, weight = use.operation.args[:3]
    settings = [use.operation.args[i] for i in (4, 5, 6, 7)]
    grads, sources = (samples_first(values[leaf], use.axes[i], sizes) for i, leaf in enumerate((grad, source)))
    norms_alone = not kernels.fused(grads.device)  # see scaled_by_kernels
    return convolution_factors(grads, sources, values[weight].shape[2:], settings, channels_last=norms_alone)


def outer_values(factor: Factor, values: Values, sizes: Sizes) -> Outer:
    """The same, of a matrix product."""
    left, right = _sides(factor.use, values, sizes)
    return Outer(right, left.mT) if factor.swapped else Outer(left.mT, right)


# On a CPU, this much smaller than their product operands may be copied whole: Inductor scales them on the way to a plain product.
SMALL_COPIES = 8


def scaled_by_kernels(factors: Sequence[Factor], terms: Sequence[Outer | Rows], fused: bool) -> dict[fx.Node, Outer]:
    """Products in the orientation of their use, by use. A convolution's are those of its input's patches (``fused``); on a CPU
    its own weight gradient is faster."""
    found: dict[fx.Node, Outer] = {}
    for factor, term in zip(factors, terms, strict=True):
        if isinstance(term, Outer) and (fused or not (is_convolution(factor) or _is_small(term))):
            found[factor.use.node] = Outer(term.a_btd, term.g_btp) if factor.swapped else term
    return found


def _is_small(term: Outer) -> bool:
    """Whether scaled copies of both operands are small beside the product. A size that is not fixed counts as large."""
    batch, length, p = term.g_btp.shape
    d = term.a_btd.shape[2]
    return all(isinstance(size, int) for size in (batch, length, p, d)) and SMALL_COPIES * batch * length * (p + d) <= p * d


def _sides(use: Use, values: Values, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """A matrix product's operands, left [B, m, T] and right [B, T, n]: sample b's share of it is their product."""
    left, right = (samples_first(values[use.leaves[i]], use.axes[i], sizes) for i in (0, 1))
    return left, right


def _row_values(factor: Factor, values: Values, sizes: Sizes) -> Rows:
    use = factor.use
    _, indices, grads, mask = write_operands(_NO_CONTEXT, use.operation)
    position = {id(leaf): i for i, leaf in enumerate(use.leaves) if isinstance(leaf, fx.Node)}

    def own(node: fx.Node) -> Tensor:
        value = values[unwidened(node)]
        axis = use.axes.get(position[id(node)])
        return value.unsqueeze(0).expand(sizes.batch, *value.shape) if axis is None else samples_first(value, axis, sizes)

    count = sizes(expression(use.operation.meta["val"].shape[0]))
    ids, g = own(indices[0]), own(grads)
    ids = torch.where(ids < 0, ids + count, ids)  # weight[-1] is the last row, and the norm has to add both names of it
    shape = torch.broadcast_shapes(ids.shape, g.shape[:-1])
    ids, g = ids.expand(shape), g.expand(*shape, g.shape[-1])
    if mask is not None:
        keep = own(mask).expand(*shape, 1) if values[mask].dim() == values[grads].dim() else own(mask).expand(shape).unsqueeze(-1)
        g = torch.where(keep, g, 0)
        ids = torch.where(keep.squeeze(-1), ids, 0)
    return Rows(ids.flatten(1), g.flatten(1, -2), count)


_NO_CONTEXT = Context(None, {})  # type: ignore[arg-type]
