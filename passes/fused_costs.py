"""What each way costs where the kernels of ``templates`` compute it (see kernels.py): the same roofline terms as in costs.py.

Per-sample gradients are stored in the type that the graph's own gradient has; their sum, noise and cast are one pass of a launch
that many parameters share, and so are norms that no other kernel gives. Sums of products are written in float32 and noised behind
that, many in one launch.

Legend: B samples, T positions per sample, p rows and d columns of the weight, w bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from .costs import WIDE, ZERO, Cost, Kernel, Product
from .kernels import by_library
from .sample_types import Expr

# Positions of a tile of the ghost norm: tiles on the diagonal are computed whole.
_BLOCK = 128
# Bytes that a sorted index moves, and a gathered element of the head's gradient (a sector).
_SORTED, _SECTOR = 32, 32


@dataclass(frozen=True)
class Target:
    """The gradient that is released: ``size`` elements of ``width`` bytes, for each of ``batch`` samples where it is stored."""

    batch: Expr
    size: Expr
    width: int

    @property
    def stored(self) -> Expr:
        """Bytes of all samples' gradients."""
        return self.batch * self.size * self.width

    @property
    def written(self) -> Expr:
        """Bytes of the released one."""
        return self.size * self.width


@dataclass(frozen=True)
class Lookups:
    """Rows of an embedding: ``positions`` per sample, of ``width`` elements of ``itemsize`` bytes."""

    positions: Expr
    width: Expr
    itemsize: int


def own(size: Expr, width: int) -> Cost:
    """The only sample's gradient, which is there anyway: its norm, and a pass that clips and noises it."""
    target = Target(sympy.S.One, size, width)
    return Cost((Kernel(traffic=target.stored, launches=ZERO), released_from_store(target)))


def released_from_store(target: Target) -> Kernel:
    """Weighted sum, noise and cast."""
    return Kernel(traffic=target.stored + target.written, launches=ZERO)


def materialized_product(product: Product, target: Target) -> Cost:
    """Gradients with their squares from one kernel, and the squares of its tiles added in another; of long samples from the
    library, and one look at them for their norms."""
    made = Kernel(product.summed().flops, product.operands + target.stored, product.dtype)
    norms = Kernel(traffic=target.stored, launches=ZERO) if by_library(product.length) else Kernel()
    return Cost((made, norms, released_from_store(target)), (product.summed(),), target.stored)


def materialized_convolution(product: Product, target: Target) -> Cost:
    """A call of the library for each sample."""
    made = Kernel(product.summed().flops, product.operands + target.stored, product.dtype, launches=target.batch)
    norms = Kernel(traffic=target.stored, launches=ZERO)
    return Cost((made, norms, released_from_store(target)), (product.summed(),), target.stored)


def materialized_rows(product: Product | None, target: Target) -> Cost:
    """A float32 table for each sample: zeroed, scattered to, and rounded; with a product, the sum of both."""
    table = target.batch * target.size * WIDE
    made = [Kernel(traffic=table), Kernel(traffic=table + target.stored), Kernel(traffic=target.stored, launches=ZERO)]
    if product is not None:
        made += [Kernel(product.summed().flops, product.operands + target.stored, product.dtype)]
        made += [Kernel(traffic=2 * table + 2 * target.stored)]
    return Cost((*made, released_from_store(target)), _plain_rows(product, target), table + target.stored)


def _plain_rows(product: Product | None, target: Target) -> tuple[Kernel, ...]:
    """The non-private gradient of an embedding: a float32 table that is zeroed, scattered to (not counted: few bytes), and cast;
    with a product, the sum of both."""
    table = WIDE * target.size
    if product is None:
        return Kernel(traffic=table), Kernel(traffic=table + target.written)
    return product.summed(), Kernel(traffic=table), Kernel(traffic=table + 2 * target.written)


def materialized(target: Target, reread: Expr = ZERO) -> Cost:
    """Anything that Inductor makes for all samples at once, such as the sum over positions of a bias. ``reread``: bytes that are
    read once more for it; the non-private sum of a normalisation's weight is fused with the gradient of its input."""
    made = Kernel(traffic=target.stored + reread, launches=ZERO)
    norms = Kernel(traffic=target.stored, launches=ZERO)
    return Cost((made, norms, released_from_store(target)), (Kernel(traffic=target.written, launches=ZERO),), target.stored)


def ghost(product: Product | None, lookups: Lookups | None, convolution: bool, target: Target) -> Cost:
    """Inner products for products, sorted rows for embeddings, the cross term between them; then the sums."""
    kernels: list[Kernel] = []
    if product is not None:
        kernels += [*_product_norm(product), *_patches(product, convolution), *_summed_product(product, target, convolution)]
    if lookups is not None:
        entries = sympy.Mul(target.batch, lookups.positions, lookups.width) * lookups.itemsize
        kernels += [Kernel(traffic=_SORTED * target.batch * lookups.positions, launches=sympy.Integer(2)), Kernel(traffic=entries)]
        table = WIDE * target.size
        kernels += [Kernel(traffic=table), Kernel(traffic=entries)]
        if product is None:
            kernels += [Kernel(traffic=table + target.written)]
        else:
            pairs = sympy.Mul(target.batch, lookups.positions, product.length)
            kernels += [Kernel(2 * pairs * lookups.width, _SECTOR * pairs, product.dtype), Kernel()]
            kernels += [Kernel(traffic=3 * table)]
    assert product is not None or lookups is not None
    replaced = _plain_rows(product, target) if lookups is not None else (product.summed(),)  # type: ignore[union-attr]
    held = product.dtype.itemsize * product.batch * product.length * product.d if product is not None and convolution else ZERO
    return Cost(tuple(kernels), replaced, held)


def flash(product: Product, target: Target) -> Cost:
    """Squared products, and one look at the operands for what rounding may hide; then the sum."""
    norm = Kernel(product.summed().flops, product.operands, product.dtype)
    reach = Kernel(traffic=product.operands, launches=sympy.Integer(2))
    return Cost((norm, Kernel(), reach, *_summed_product(product, target, convolution=False)), (product.summed(),), ZERO)


def _product_norm(product: Product) -> list[Kernel]:
    if product.length == 1:
        return [Kernel(traffic=product.operands, launches=sympy.Integer(2))]
    flops = product.batch * product.length * (product.length + _BLOCK) * (product.p + product.d)
    return [Kernel(flops, product.operands, product.dtype), Kernel()]


def _patches(product: Product, convolution: bool) -> list[Kernel]:
    patches = product.dtype.itemsize * product.batch * product.length * product.d
    return [Kernel(traffic=2 * patches)] if convolution else []


def _summed_product(product: Product, target: Target, convolution: bool) -> list[Kernel]:
    """A convolution's is the library's, from a scaled copy of G."""
    scaled = [Kernel(traffic=2 * product.g_bytes)] if convolution else []
    wide = WIDE * target.size
    noise = Kernel(traffic=wide + target.written, launches=ZERO)
    return [*scaled, Kernel(product.summed().flops, product.operands + wide, product.dtype), noise]
