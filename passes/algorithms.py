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
from .factored import is_convolution
from .factors import Outer, squared_norms, squared_products, wide
from .match import ParameterGradient, Use
from .operands import factor_values, outer_values, scaled_by_kernels
from .plan import ParameterPlan
from .replay import Sizes, Values, clipped_use, moved_for_each, run_tail, tail_per_sample
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
        original, dense = _value(gradient), _real(self.dense)
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
    def at_once(self) -> bool:
        """Whether the noise may come in the sum's own kernel; behind a reduction over ranks it comes later."""
        return not _reduced_later(self.gradient)

    def released(self, release: Release, sizes: Sizes) -> Tensor:
        total = ops.weighted_sum(self.dense, release.factors[self.gradient.row])
        is_complex = _value(self.gradient).is_complex()
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
        """The same with the operands that the second backward computes, if it does."""
        if not self.plan.again:
            return self
        values = {**self.values, **{node: rerun[node] for node in self.plan.again}}
        fused = kernels.fused(self.norms_sq.device)
        terms = [factor_values(factor, values, sizes) for factor in self.plan.factors if factor.kind == "outer"]
        products = [factor for factor in self.plan.factors if factor.kind == "outer"]
        return Factored(self.plan, self.norms_sq, values, scaled_by_kernels(products, terms, fused))

    @property
    def wide_bytes(self) -> int:
        """Of the clipped sum."""
        return 4 * _value(self.gradient).numel()

    @property
    def at_once(self) -> bool:
        """Whether the sum shares the launch that adds its noise. A large one is noised where it lies."""
        few = 4 * self.wide_bytes <= kernels.BYTES_AT_ONCE and not self.plan.again
        return few and kernels.fused(self.norms_sq.device) and not _reduced_later(self.gradient)

    def released(self, release: Release, sizes: Sizes) -> Tensor:
        return _noised(self.gradient, _summed([self], release, sizes)[0], release, sizes)

    def summed(self, products: Mapping[fx.Node, Tensor], factors: Tensor, sizes: Sizes) -> Tensor:
        """The clipped sum without its noise, float32 or better, in the gradient's shape. ``products``: those of its uses whose sum
        a kernel scales on the way, summed; ``factors``: float32 [B]."""
        gradient = self.gradient
        parts = [_clipped(use, products, self.values, factors, sizes) for use in gradient.uses]
        share = factors.sum() / sizes.batch
        assert gradient.node is not None
        total = run_tail(gradient.tail, gradient.uses, parts, self.values, gradient.node, share, narrow=False)
        return _in_shape(gradient, total, sizes)


def _clipped(use: Use, products: Mapping[fx.Node, Tensor], values: Values, factors: Tensor, sizes: Sizes) -> Tensor:
    """One use's share of a clipped sum."""
    if use.node not in products:
        return clipped_use(use, values, factors, sizes)
    return products[use.node].view([sizes(expression(size)) for size in use.node.meta["val"].shape])


def _summed(parts: Sequence[Factored], release: Release, sizes: Sizes) -> list[Tensor]:
    """The clipped sums of several parameters; products of one shape share a launch.

    Parameters that are added before they are used have one and the same product, and each takes its own factors of it.
    """
    nodes = [[use.node for use in part.gradient.uses if use.node in part.products] for part in parts]
    products = [(part.products[node], part.gradient.row) for part, own in zip(parts, nodes, strict=True) for node in own]
    sums = iter(kernels.sums_of_products(products, release.factors))
    return [
        part.summed({node: next(sums) for node in own}, release.factors[part.gradient.row], sizes)
        for part, own in zip(parts, nodes, strict=True)
    ]


Part = Gradients | Stored | Factored


def part_of(plan: ParameterPlan, values: Values, sizes: Sizes) -> Part:
    """The part of a parameter whose gradient is private."""
    gradient = plan.gradient
    assert gradient.node is not None
    fused = kernels.fused(gradient.node.meta["val"].device)
    if plan.norms == "ghost":
        terms = [factor_values(factor, values, sizes) for factor in plan.factors]
        norms_sq = (kernels.squared_norms(terms) if fused else squared_norms(terms)).float()
        return Factored(plan, norms_sq, values, scaled_by_kernels(plan.factors, terms, fused))
    if plan.norms == "flash":
        products: list[Any] = [factor_values(factor, values, sizes) for factor in plan.factors]
        norms_sq = squared_products(products)
        return Factored(plan, norms_sq, values, scaled_by_kernels(plan.factors, products, fused))
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
    """The released gradients, in the order of ``parts``. Many are noised in one launch: stored ones while they are summed up,
    clipped sums of products behind that. What a second backward computes comes last, in its order; what ranks reduce together is
    sent in one order by all of them, whatever each has planned: backwards, as a second backward goes."""
    stored = [(part.gradient, part.dense) for part in parts if isinstance(part, Stored) and part.at_once]
    found = _noised_together(stored, release.factors, release)
    # Alike ones stand together, so that their sums share launches.
    sums = sorted((part for part in parts if isinstance(part, Factored) and part.at_once), key=_form)
    for group in kernels.together(sums, lambda part: _value(part.gradient).dtype, lambda part: part.wide_bytes):
        totals = [(p.gradient, _real(t).unsqueeze(0)) for p, t in zip(group, _summed(group, release, sizes), strict=True)]
        found |= _noised_together(totals, release.factors.new_ones((release.factors.shape[0], 1)), release)
    for p in sorted((p for p in parts if p.gradient.row not in found), key=lambda p: _turn(p, rerun)):
        ready = p.from_second(rerun, sizes) if isinstance(p, Factored) else p
        found[p.gradient.row] = ready.released(release, sizes)
    return [found[p.gradient.row] for p in parts]


def _form(part: Factored) -> tuple[str, ...]:
    """Differs between parts whose products have different shapes."""
    shapes = [(*product.g_btp.shape, product.a_btd.shape[2]) for product in part.products.values()]
    return tuple(str([expression(size) for size in shape]) for shape in shapes)


def _turn(part: Part, rerun: Rerun) -> int:
    """Where a part stands in the order of those that are released one by one."""
    if _reduced_later(part.gradient):
        return -1 - part.gradient.row
    return max(map(rerun.moment, part.plan.again), default=0) if isinstance(part, Factored) else 0


def _noised_together(pairs: Sequence[tuple[ParameterGradient, Tensor]], factors: Tensor, release: Release) -> dict[int, Tensor]:
    """Row -> the weighted sum over dimension 0 of what stands beside its gradient, real numbers, with its noise."""
    found: dict[int, Tensor] = {}

    def kind(pair: tuple[ParameterGradient, Tensor]) -> tuple[torch.dtype, torch.dtype]:
        return pair[1].dtype, _real_dtype(_value(pair[0]).dtype)

    for group in kernels.together(pairs, kind, lambda pair: kind(pair)[1].itemsize * math.prod(pair[1].shape[1:])):
        rows = [gradient.row for gradient, _ in group]
        denses = [dense for _, dense in group]
        sums = ops.weighted_sums_noise(denses, factors, release.keys, release.std, rows, kind(group[0])[1])
        for (gradient, _), total in zip(group, sums, strict=True):
            found[gradient.row] = torch.view_as_complex(total) if _value(gradient).is_complex() else total
    return found


def _value(gradient: ParameterGradient) -> Tensor:
    """A gradient as the graph has it."""
    return gradient.node.meta["val"]  # type: ignore[union-attr, no-any-return]


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


def _products(plan: ParameterPlan, values: Values, sizes: Sizes) -> tuple[Tensor, Tensor | None]:
    """[B, *parameter] in the type that the graph's own product has, and its squared norms [B] if the same kernel gives them."""
    gradient, first = plan.gradient, plan.factors[0]
    dtype = first.use.node.meta["val"].dtype
    grads, norms_sq = kernels.products([outer_values(factor, values, sizes) for factor in plan.factors], dtype)
    if len(plan.factors) == 1:
        product = grads.mT if first.swapped else grads
        grads = moved_for_each(gradient.tail, first.use, product, values, gradient.node)  # type: ignore[arg-type]
    return grads, norms_sq


def _is_product(plan: ParameterPlan) -> bool:
    """Whether a gradient is a matrix product that its tail moves, or a sum of several in the parameter's own shape."""
    plain = all(factor.kind == "outer" and not is_convolution(factor) for factor in plan.factors)
    return plain and (len(plan.factors) == 1 or len(plan.factors) > 1 < len(plan.gradient.uses))


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
    original = _value(gradient)
    total = _in_shape(gradient, total, sizes)
    if gradient.reduced is not None and gradient.reduced.way:
        total = reduce_again(gradient.reduced, total)
        original = gradient.reduced.way[-1].meta["val"]
    total = _real(total)
    dtype = _real_dtype(original.dtype)
    cast = () if total.dtype == dtype else (dtype,)
    noised = ops.add_noise(total, release.keys, release.std, gradient.row, *cast)
    return torch.view_as_complex(noised) if original.is_complex() else noised


def _in_shape(gradient: ParameterGradient, total: Tensor, sizes: Sizes) -> Tensor:
    return total.reshape([sizes(expression(size)) for size in _value(gradient).shape])


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
