"""What each way to compute a gradient privately costs: FLOPs, memory traffic, memory held, launches.

A way is a list of kernels; each takes the longer of its arithmetic and its traffic (Williams et al. 2009, "Roofline: An
Insightful Visual Performance Model"), plus its launch. All sizes are sympy expressions in the graph's own symbols.

Legend: B samples, T positions per sample, p rows and d columns of the weight, w bytes of an operand's element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
import torch

from .peaks import Peaks
from .sample_types import Expr

ZERO = sympy.S.Zero
# Norms and sums are kept in float32, inner products for tables that are also looked up in float64 (see factors.squared_norms).
WIDE, GRAM = 4, 8
# Positions of a block of the CPU's ghost norms: blocks on the diagonal are computed whole.
_BLOCK = 8
# Launches of ATen's that a call of an operator from Python takes as long as.
CALL = sympy.Integer(12)


@dataclass(frozen=True)
class Kernel:
    """One pass over memory. ``dtype`` is that of a matrix product's operands; element-wise work counts as traffic only.
    ``launches``: 0 where it shares a launch with many others. ``inner``: inner products in float32 by ``ghost_cpu.cpp``."""

    flops: Expr = ZERO
    traffic: Expr = ZERO
    dtype: torch.dtype = torch.float32
    launches: Expr = sympy.S.One
    inner: bool = False

    def rate(self, peaks: Peaks) -> float:
        """FLOPs per second."""
        return peaks.flops_inner if self.inner else peaks.flops(self.dtype)

    def seconds(self, peaks: Peaks, number: Callable[[Expr], float]) -> float:
        """Its time, with ``number`` giving every size a value."""
        work = max(number(self.flops) / self.rate(peaks), number(self.traffic) / peaks.bandwidth)
        return work + number(self.launches) * peaks.launch


@dataclass(frozen=True)
class Cost:
    """Kernels that privacy adds, those of the non-private step that it replaces, and memory until the clip factors are known.

    ``held`` counts what nobody else would still hold then: per-sample gradients, or operands of the clipped sum.
    """

    kernels: tuple[Kernel, ...] = ()
    replaced: tuple[Kernel, ...] = ()
    held: Expr = ZERO
    held_nodes: tuple[object, ...] = field(default=(), repr=False)
    """Nodes of the graph that stay alive until then (their bytes are not part of ``held``)."""

    @property
    def flops(self) -> Expr:
        """Added floating-point operations."""
        return _total(k.flops for k in self.kernels) - _total(k.flops for k in self.replaced)

    @property
    def traffic(self) -> Expr:
        """Added bytes to and from memory."""
        return _total(k.traffic for k in self.kernels) - _total(k.traffic for k in self.replaced)

    def seconds(self, peaks: Peaks, number: Callable[[Expr], float]) -> float:
        """Predicted added time; negative where privacy saves a kernel."""
        added = sum(kernel.seconds(peaks, number) for kernel in self.kernels)
        return added - sum(kernel.seconds(peaks, number) for kernel in self.replaced)


def _total(parts: object) -> Expr:
    return sympy.Add(*parts)  # type: ignore[misc]


@dataclass(frozen=True)
class Product:
    """The contraction behind a weight gradient: sample b's share is ``G_b^T A_b``; operands of type ``dtype``."""

    batch: Expr
    length: Expr
    p: Expr
    d: Expr
    dtype: torch.dtype

    @property
    def operands(self) -> Expr:
        """Bytes of G and A together."""
        return self.dtype.itemsize * self.batch * self.length * (self.p + self.d)

    @property
    def g_bytes(self) -> Expr:
        """Bytes of G."""
        return self.dtype.itemsize * self.batch * self.length * self.p

    @property
    def weight(self) -> Expr:
        """Elements of the weight."""
        return self.p * self.d

    def summed(self) -> Kernel:
        """The non-private gradient: one product over samples and positions."""
        flops = 2 * self.batch * self.length * self.weight
        return Kernel(flops, self.operands + self.dtype.itemsize * self.weight, self.dtype)

    def per_sample(self) -> Kernel:
        """All samples' gradients, written in float32 or the operands' type, whichever is wider."""
        return Kernel(self.summed().flops, self.operands + self.dense_bytes, self.dtype)

    @property
    def dense_bytes(self) -> Expr:
        """Bytes of all samples' gradients."""
        return max(WIDE, self.dtype.itemsize) * self.batch * self.weight


def release(size: Expr, width: int) -> Kernel:
    """Noise and cast: reads and writes the gradient once."""
    return Kernel(traffic=(WIDE + width) * size)


def dense_norm_and_sum(batch: Expr, size: Expr) -> tuple[Kernel, Kernel]:
    """Norms of materialised per-sample gradients, and their weighted sum."""
    dense = WIDE * batch * size
    return Kernel(traffic=dense), Kernel(traffic=dense + WIDE * size)


def scaled_sum(product: Product) -> tuple[Kernel, ...]:
    """The clipped sum as one product of which the smaller operand is scaled, a chunk at a time."""
    total = Kernel(product.summed().flops, product.operands + WIDE * product.weight, product.dtype)
    smaller = product.batch * product.length * sympy.Min(product.p, product.d)
    return Kernel(traffic=(product.dtype.itemsize + WIDE) * smaller), total


def inner_norm(product: Product) -> Kernel:
    """Norms from inner products of positions, those of half of the pairs."""
    flops = product.batch * product.length * (product.length + _BLOCK) * (product.p + product.d)
    return Kernel(flops, product.operands, product.dtype, CALL, product.dtype != torch.float64)


def gram_norm(product: Product) -> tuple[Kernel, ...]:
    """Norms from inner products of positions: both T x T matrices in float64, in memory; and one look at the operands for what
    rounding may hide."""
    flops = 2 * product.batch * product.length**2 * (product.p + product.d)
    grams = GRAM * product.batch * product.length**2
    widen = Kernel(traffic=(1 + sympy.Rational(GRAM, product.dtype.itemsize)) * product.operands)
    copies = sympy.Rational(GRAM, product.dtype.itemsize) * product.operands
    reach = Kernel(traffic=product.operands)
    return widen, Kernel(flops, copies + 2 * grams, torch.float64), Kernel(traffic=2 * grams), reach
