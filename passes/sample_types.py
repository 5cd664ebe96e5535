"""The type of a value with respect to the samples of a batch, and the arithmetic of sample axes.

A node of the joint graph is ``Public``, ``PerSample``, ``SampleSum`` or ``Mixed``. Types are found by structure, never by
comparing a size with the batch size: a dimension that a view has merged holds ``outer * B * inner`` elements, and position
``i`` along it belongs to sample ``(i // inner) % B``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv

Expr: TypeAlias = sympy.Expr
# Batch-dependent scalars that multiply a value, each with its power: {count: -1} is a value divided by a token count.
Scale = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Axis:
    """Where the samples lie: dimension ``dim`` of size ``outer * B * inner``."""

    dim: int
    inner: Expr = sympy.S.One


@dataclass(frozen=True)
class Public:
    """Depends on parameters, constants, random draws and public inputs only.

    ``zero``: known to be zero everywhere. ``iota``: the value at each position is the index of the sample that owns it.
    """

    zero: bool = False
    iota: Axis | None = None
    scale: Scale = ()

    def __str__(self) -> str:
        return "Public" + _scale_text(self.scale)


@dataclass(frozen=True)
class PerSample:
    """Slice b along the axis depends on sample b and on public values only."""

    axis: Axis
    scale: Scale = ()

    def __str__(self) -> str:
        inner = "" if self.axis.inner == 1 else f", inner={self.axis.inner}"
        return f"PerSample(dim={self.axis.dim}{inner}){_scale_text(self.scale)}"


@dataclass(frozen=True)
class SampleSum:
    """A sum over the samples of a ``PerSample`` value, used only linearly since."""

    scale: Scale = ()

    def __str__(self) -> str:
        return "SampleSum" + _scale_text(self.scale)


@dataclass(frozen=True)
class Affine:
    """A public value into which a ``SampleSum`` was written or added; ``blocks``: the size n of a 2n x 2n block upper
    triangular matrix (or an analytic function of one) whose upper right block is the only part that is not public."""

    blocks: Expr | None = None
    rows_cut: bool = False
    scale: Scale = ()

    def __str__(self) -> str:
        return "Affine"


@dataclass(frozen=True)
class Mixed:
    """Depends on two samples or more; ``origin`` is the node that mixed them and ``why`` says how."""

    origin: fx.Node
    why: str
    scale: Scale = ()

    def __str__(self) -> str:
        return f"Mixed(by {self.origin.name}: {self.why})"


SampleType: TypeAlias = Public | PerSample | SampleSum | Affine | Mixed
PUBLIC = Public()


def _scale_text(scale: Scale) -> str:
    return "".join(f" * {name}^{power}" for name, power in scale)


def scale_product(*scales: Scale) -> Scale:
    """The scale of a product of values with these scales."""
    powers: dict[str, int] = {}
    for scale in scales:
        for name, power in scale:
            powers[name] = powers.get(name, 0) + power
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def scale_inverse(scale: Scale) -> Scale:
    return tuple((name, -power) for name, power in scale)


# The scale of what an output's gradient is: whatever the loss outside the graph multiplies it by. Beside a scaled term in a
# sum it takes that term's scale, since it is a loss term of its own whose normaliser is not in the graph.
ANY_SCALE: Scale = (("*", 1),)


def known_scale(scale: Scale) -> Scale:
    """The scale without the unknown factor of an outside loss."""
    return tuple(entry for entry in scale if entry[0] != "*")


def common_scale(scales: Sequence[Scale]) -> Scale | None:
    """The scale of a sum of terms with these scales; ``None`` if they differ."""
    fixed = {scale for scale in scales if scale == known_scale(scale)}
    known = {known_scale(scale) for scale in scales}
    if len(fixed) > 1 or len(known - fixed - {()}) > (0 if fixed else 1):
        return None
    if fixed:
        return next(iter(fixed))
    return scale_product(max(known), ANY_SCALE)


def rescaled(type_: SampleType, scale: Scale) -> SampleType:
    return type_ if type_.scale == scale else replace(type_, scale=scale)


def expression(size: int | torch.SymInt | Expr) -> Expr:
    """A size as a sympy expression, simplified with what the shape environment knows."""
    if not isinstance(size, torch.SymInt):
        return sympy.sympify(size)
    node = size.node
    if node.shape_env is None:
        return _divided(node.expr)
    expr = node.shape_env.simplify(node.expr)
    if not expr.is_Atom and statically_known_true(size == 1):  # a guard: autograd has chosen what to sum over by it
        return sympy.S.One
    return _divided(expr)


def _divided(expr: Expr) -> Expr:
    """The expression with every exact integer division carried out: ``(s**2) // s`` is ``s``."""

    def exact(division: Expr) -> Expr:
        dividend, divisor = division.args
        return quotient(dividend, divisor) if divides(divisor, dividend) else division

    return expr.replace(lambda part: isinstance(part, FloorDiv), exact)


def divides(divisor: Expr, dividend: Expr) -> bool:
    """Whether ``dividend / divisor`` is known to be a whole number, for all values of the symbols."""
    if divisor.is_Integer and dividend.is_Integer:
        return divisor != 0 and dividend % divisor == 0
    _, denominator = sympy.cancel(dividend / divisor).as_numer_denom()  # of (s - 3)/2 as of 2/s
    return denominator == 1


def quotient(dividend: Expr, divisor: Expr) -> Expr:
    return sympy.cancel(dividend / divisor)


def product(sizes: Sequence[Expr]) -> Expr:
    return sympy.Mul(*sizes)


def stride_of(axis: Axis, shape: Sequence[Expr]) -> Expr:
    """How many elements, in row-major order, lie between a sample and the next: unchanged by any view."""
    return axis.inner * product(shape[axis.dim + 1 :])


def locate(stride: Expr, batch: Expr, shape: Sequence[Expr]) -> Axis | None:
    """The axis of ``shape`` along which samples repeat with this row-major stride; ``None`` if a dimension cuts it."""
    if batch == 1:
        return _locate_single(stride, shape)
    after = sympy.S.One
    for dim in reversed(range(len(shape))):
        through = after * shape[dim]
        if divides(after, stride) and divides(stride * batch, through):
            return Axis(dim, quotient(stride, after))
        after = through
    return None


def _locate_single(stride: Expr, shape: Sequence[Expr]) -> Axis | None:
    """With one sample its axis has size one and may have been merged away: any place with the right stride will do,
    a dimension of size one first, then the outer end of a dimension, then the inside of one."""
    afters = [product(shape[dim + 1 :]) for dim in range(len(shape))]
    for dim, after in enumerate(afters):
        if shape[dim] == 1 and after == stride:
            return Axis(dim)
    for dim, after in enumerate(afters):
        if quotient(after * shape[dim], stride) == 1:
            return Axis(dim, shape[dim])
    for dim, after in enumerate(afters):
        if divides(after, stride) and divides(stride, after * shape[dim]):
            return Axis(dim, quotient(stride, after))
    return None
