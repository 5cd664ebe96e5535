"""One parameter's part of the private computation, by the algorithm that the plan chose: its squared norms first, and what is
released of it once the clip factors are known.

Legend: B samples, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from . import kernels
from .collectives import reduce_again
from .factored import Factor, is_convolution, unwidened
from .factors import Outer, Rows, convolution_factors, squared_norms, squared_products, wide
from .match import ParameterGradient, Use, write_operands
from .plan import ParameterPlan
from .replay import Sizes, Values, clipped_use, moved_for_each, run_tail, samples_first, tail_per_sample
from .rules import Context
from .sample_types import expression
from .second_backward import Rerun

ops = torch.ops.flashnorm


@dataclass(frozen=True)
class Release:
    """What ``flashnorm::release`` returned: ``factors`` float32 [P, B], ``keys`` int64 [P, 2] or [P, 5], ``std`` float32 []."""

    factors: Tensor
    keys: Tensor
    std: Tensor


@dataclass(frozen=True)
class Gradients:
    """Per-sample gradients ``dense`` [B, *parameter] that are summed one parameter after another; ``norms_sq`` float32 [B].

    ``stored``: they lie in memory, and one kernel adds them up with the noise. Else (what is the same for every sample) Inductor
    sums them as it makes them.
    """

    gradient: ParameterGradient
    dense: Tensor
    norms_sq: Tensor
    stored: bool

    def released(self, release: Release, sizes: Sizes) -> Tensor:
        gradient, factors = self.gradient, release.factors[self.gradient.row]
        if not self.stored or _reduced_later(gradient):
            return _noised(gradient, _weighted_sum(self.dense, factors), release, sizes)
        original, dense = gradient.node.meta["val"], _real(self.dense)  # type: ignore[union-attr]
        dtype = _real_dtype(original.dtype)
        cast = () if torch.promote_types(dense.dtype, torch.float32) == dtype else (dtype,)
        noised = ops.weighted_sum_noise(dense, factors, release.keys, release.std, gradient.row, *cast)
        return torch.view_as_complex(noised) if original.is_complex() else noised


@dataclass(frozen=True)
class Stored:
    """Per-sample gradients that kernels add up, many parameters at once: ``dense`` [B, *parameter], real numbers.

    ``norms_sq``: float32 [B], or None where they are still to be taken from ``dense``.
    """

    gradient: ParameterGradient
    dense: Tensor
    norms_sq: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the released gradient, as pairs of real numbers where it is complex."""
        return _real_dtype(self.gradient.node.meta["val"].dtype)  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Of the released gradient."""
        return self.dtype.itemsize * math.prod(self.dense.shape[1:])

    @property
    def at_once(self) -> bool:
        """Whether the noise may come in the sum's own kernel; behind a reduction over ranks it comes later."""
        return not _reduced_later(self.gradient)

    def released(self, release: Release, sizes: Sizes) -> Tensor:
        total = ops.weighted_sum(self.dense, release.factors[self.gradient.row])
        is_complex = self.gradient.node.meta["val"].is_complex()  # type: ignore[union-attr]
        return _noised(self.gradient, torch.view_as_complex(total) if is_complex else total, release, sizes)


@dataclass(frozen=True)
class Factored:
    """A gradient whose norms came from factors: the clipped sum is computed from operands, with G scaled on the way.

    ``plan.again``: operands that are not held until then, but come from a second backward pass.
    """

    plan: ParameterPlan
    norms_sq: Tensor
    values: Values
    products: Mapping[fx.Node, Outer]
    """Factors of uses whose sum a kernel scales on the way, by use; the others' operands are scaled before."""

    @property
    def gradient(self) -> ParameterGradient:
        return self.plan.gradient

    def from_second(self, rerun: Rerun, sizes: Sizes) -> Factored:
        """The same with the operands that the second backward computes."""
        values = {**self.values, **{node: rerun[node] for node in self.plan.again}}
        fused = kernels.fused(self.norms_sq.device)
        terms = [_factor_values(factor, values, sizes) for factor in self.plan.factors if factor.kind == "outer"]
        products = [factor for factor in self.plan.factors if factor.kind == "outer"]
        return Factored(self.plan, self.norms_sq, values, _scaled_by_kernels(products, terms, fused))

    def released(self, release: Release, sizes: Sizes) -> Tensor:
        gradient, factors = self.gradient, release.factors[self.gradient.row]
        parts = [self._clipped(use, factors, sizes) for use in gradient.uses]
        share = factors.sum() / sizes.batch
        assert gradient.node is not None
        total = run_tail(gradient.tail, gradient.uses, parts, self.values, gradient.node, share, narrow=False)
        return _noised(gradient, total, release, sizes)

    def _clipped(self, use: Use, factors: Tensor, sizes: Sizes) -> Tensor:
        if use.node not in self.products:
            return clipped_use(use, self.values, factors, sizes)
        product = self.products[use.node]
        total = ops.clipped_sum(product.g_btp, product.a_btd, factors)
        return total.view([sizes(expression(size)) for size in use.node.meta["val"].shape])


Part = Gradients | Stored | Factored


def part_of(plan: ParameterPlan, values: Values, sizes: Sizes) -> Part:
    """The part of a parameter whose gradient is private."""
    gradient = plan.gradient
    assert gradient.node is not None
    fused = kernels.fused(gradient.node.meta["val"].device)
    if plan.norms == "ghost":
        terms = [_factor_values(factor, values, sizes) for factor in plan.factors]
        norms_sq = (kernels.squared_norms(terms) if fused else squared_norms(terms)).float()
        return Factored(plan, norms_sq, values, _scaled_by_kernels(plan.factors, terms, fused))
    if plan.norms == "flash":
        products: list[Any] = [_factor_values(factor, values, sizes) for factor in plan.factors]
        norms_sq = kernels.squared_products(products) if fused else squared_products(products)
        return Factored(plan, norms_sq, values, _scaled_by_kernels(plan.factors, products, fused))
    if fused and plan.chosen == "materialize" and _is_product(plan):
        return Stored(gradient, *_products(plan, values, sizes))
    dense = _dense(plan, values, sizes)
    stored = plan.chosen in ("materialize", "single")
    if fused and stored:
        return Stored(gradient, _real(dense), None)
    return Gradients(gradient, dense, _squares(dense), stored)


def norms_of(parts: Sequence[Part]) -> tuple[Tensor, list[int]]:
    """Squared norms, float32 [B, N], and the row of each column. Those of stored gradients are taken together."""
    ready = [part for part in parts if part.norms_sq is not None]
    missing = [part for part in parts if isinstance(part, Stored) and part.norms_sq is None]
    rows = [part.gradient.row for part in ready]
    found = [torch.stack([part.norms_sq for part in ready])] if ready else []  # type: ignore[misc]
    for group in kernels.together(missing, lambda part: part.dense.dtype, lambda part: 0):
        rows += [part.gradient.row for part in group]
        found.append(ops.squared_norms([part.dense for part in group]).float())
    return torch.cat(found).t(), rows


def released(parts: Sequence[Part], release: Release, sizes: Sizes, rerun: Rerun) -> list[Tensor]:
    """The released gradients, in the order of ``parts``."""
    found: dict[int, Tensor] = {}
    stored = [part for part in parts if isinstance(part, Stored) and part.at_once]
    for group in kernels.together(stored, lambda part: (part.dense.dtype, part.dtype), lambda part: part.nbytes):
        rows = [part.gradient.row for part in group]
        denses = [part.dense for part in group]
        sums = ops.weighted_sums_noise(denses, release.factors, release.keys, release.std, rows, group[0].dtype)
        for part, total in zip(group, sums, strict=True):
            is_complex = part.gradient.node.meta["val"].is_complex()  # type: ignore[union-attr]
            found[part.gradient.row] = torch.view_as_complex(total) if is_complex else total
    late = {p.gradient.row: p for p in parts if isinstance(p, Factored) and p.plan.again}
    for p in parts:
        if p.gradient.row not in found and p.gradient.row not in late:
            found[p.gradient.row] = p.released(release, sizes)
    for row, again in sorted(late.items(), key=lambda item: max(map(rerun.moment, item[1].plan.again))):
        found[row] = again.from_second(rerun, sizes).released(release, sizes)
    return [found[p.gradient.row] for p in parts]


def _dense(plan: ParameterPlan, values: Values, sizes: Sizes) -> Tensor:
    """[B, *parameter], by replaying the reduction and its tail for each sample."""
    gradient = plan.gradient
    if plan.chosen == "single":
        return values[gradient.node].unsqueeze(0)  # type: ignore[index]
    if plan.chosen == "constant":
        value = values[gradient.node]  # type: ignore[index]
        value = value if value.is_complex() else wide(value)
        return (value / sizes.batch).unsqueeze(0).expand(sizes.batch, *value.shape)
    if plan.chosen == "empty":
        node = gradient.node.meta["val"]  # type: ignore[union-attr]
        return torch.zeros((0, *node.shape), dtype=node.dtype, device=node.device)
    return tail_per_sample(gradient.tail, gradient.uses, values, sizes, gradient.node)  # type: ignore[arg-type]


def _products(plan: ParameterPlan, values: Values, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """[B, *parameter] and its squared norms [B], from one kernel, in the type that the graph's own product has."""
    gradient, first = plan.gradient, plan.factors[0]
    dtype = first.use.node.meta["val"].dtype
    grads, norms_sq = kernels.products([_outer_values(factor, values, sizes) for factor in plan.factors], dtype)
    if len(plan.factors) == 1:
        product = grads.mT if first.swapped else grads
        grads = moved_for_each(gradient.tail, first.use, product, values, gradient.node)  # type: ignore[arg-type]
    return grads, norms_sq


def _is_product(plan: ParameterPlan) -> bool:
    """Whether a gradient is a matrix product that its tail moves, or a sum of several in the parameter's own shape."""
    plain = all(factor.kind == "outer" and not is_convolution(factor) for factor in plan.factors)
    return plain and (len(plan.factors) == 1 or len(plan.factors) > 1 < len(plan.gradient.uses))


def _factor_values(factor: Factor, values: Values, sizes: Sizes) -> Outer | Rows:
    if factor.kind == "rows":
        return _row_values(factor, values, sizes)
    if not is_convolution(factor):
        return _outer_values(factor, values, sizes)
    use = factor.use
    grad, source, weight = use.operation.args[:3]
    settings = [use.operation.args[i] for i in (4, 5, 6, 7)]
    grads, sources = (samples_first(values[leaf], use.axes[i], sizes) for i, leaf in enumerate((grad, source)))
    return convolution_factors(grads, sources, values[weight].shape[2:], settings)


def _outer_values(factor: Factor, values: Values, sizes: Sizes) -> Outer:
    left, right = _sides(factor.use, values, sizes)
    return Outer(right, left.mT) if factor.swapped else Outer(left.mT, right)


def _scaled_by_kernels(factors: Sequence[Factor], terms: Sequence[Outer | Rows], fused: bool) -> dict[fx.Node, Outer]:
    """Products in the orientation of their use, by use. A convolution's are those of its input's patches (``fused``); on a CPU
    its own weight gradient is faster."""
    found: dict[fx.Node, Outer] = {}
    for factor, term in zip(factors, terms, strict=True):
        if isinstance(term, Outer) and (fused or not is_convolution(factor)):
            found[factor.use.node] = Outer(term.a_btd, term.g_btp) if factor.swapped else term
    return found


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


def _squares(dense: Tensor) -> Tensor:
    """float32 [B]: squared norms."""
    squares = wide(_real(dense)).square()
    return (squares.sum(list(range(1, squares.dim()))) if squares.dim() > 1 else squares).float()


def _weighted_sum(dense: Tensor, factors: Tensor) -> Tensor:
    """``sum_b c_b W_b`` in float32 or better; a sample with factor 0 adds exactly 0, whatever it holds."""
    w = wide(_real(dense))
    c = factors.to(w.dtype).view(-1, *[1] * (w.dim() - 1))
    weighted = torch.where(c != 0, w * c, 0)
    total = weighted[0] if isinstance(dense.shape[0], int) and dense.shape[0] == 1 else weighted.sum(0)
    return torch.view_as_complex(total) if dense.is_complex() else total


def _reduced_later(gradient: ParameterGradient) -> bool:
    """Whether ranks reduce the clipped sum together: then the noise must not come before that."""
    return gradient.reduced is not None and bool(gradient.reduced.way)


def _noised(gradient: ParameterGradient, total: Tensor, release: Release, sizes: Sizes) -> Tensor:
    """The clipped sum with its noise, in the gradient's own type; where ranks reduce it together, the noise comes behind that."""
    original = gradient.node.meta["val"]  # type: ignore[union-attr]
    total = total.reshape([sizes(expression(size)) for size in original.shape])
    if gradient.reduced is not None and gradient.reduced.way:
        total = reduce_again(gradient.reduced, total)
        original = gradient.reduced.way[-1].meta["val"]
    total = _real(total)
    dtype = _real_dtype(original.dtype)
    cast = () if total.dtype == dtype else (dtype,)
    noised = ops.add_noise(total, release.keys, release.std, gradient.row, *cast)
    return torch.view_as_complex(noised) if original.is_complex() else noised


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
