"""The same quantities as in factors.py and replay.py through the ``flashnorm::`` operators, which are fused kernels on a GPU.

On a CPU Inductor fuses compositions of ATen operators into better code than a call of an operator would be, so they stay there, but
for norms of products (factors.py) and for the sums: those go through operators one after another, or all their operands would be
alive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import sympy
import torch
from torch import Tensor

from ..templates import (  # noqa: F401 - the operators
    clipped_sum,
    clipped_sums,
    embedding_norm,
    ghost_norm,
    many_gradients,
    sample_products,
    tied_cross_term,
    weight_grads,
)
from .factors import CANCELLED, Outer, Rows, joined, product_norms, reach_of, reach_of_rows
from .sample_types import expression

ops = torch.ops.flashnorm
T = TypeVar("T")
# What one call releases at most: the per-sample gradients and the sums that go into it live until it ends. Seven sums of
# [3072, 768] have as many tiles as an H200 runs in four turns.
BYTES_AT_ONCE = 1 << 26


def fused(device: torch.device) -> bool:
    """Whether private gradients on this device are computed by the operators of ``templates``."""
    return device.type == "cuda"


def squared_norms(terms: list[Outer | Rows]) -> Tensor:
    """[B]: ``factors.squared_norms`` ("ghost")."""
    outers = [term for term in terms if isinstance(term, Outer)]
    rows = [term for term in terms if isinstance(term, Rows)]
    if not rows:
        return product_norms(outers)
    row = Rows(torch.cat([r.ids_bt for r in rows], 1), torch.cat([r.g_btd for r in rows], 1), rows[0].count)
    if not outers:
        return ops.embedding_norm(row.g_btd, row.ids_bt, row.count)
    outer = joined(outers)
    g, a = outer.g_btp, outer.a_btd
    dtype = torch.promote_types(g.dtype, row.g_btd.dtype)
    cross, size = ops.tied_cross_term(row.g_btd.to(dtype), row.ids_bt, g.to(dtype), a.to(dtype))
    total = ops.ghost_norm(g, a) + ops.embedding_norm(row.g_btd, row.ids_bt, row.count) + cross + ghost_norm.ROUNDING * size
    return torch.maximum(total, (CANCELLED * (reach_of(outer) + reach_of_rows(row))).square().float())


def products(terms: list[Outer], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Every sample's sum of products [B, p, d] in ``dtype``, and the squared norms of what is stored, float32 [B], if the same
    kernel gives them."""
    outer = joined(terms)
    g, a = outer.g_btp, outer.a_btd
    if g.dtype == dtype and by_library(g.shape[1]):
        return ops.sample_products(g, a), None
    return ops.weight_grads(g, a, dtype)  # type: ignore[no-any-return]


def by_library(positions: object) -> bool:
    """Whether gradients of samples this long come from the device's library; a length that is not fixed counts as long."""
    fixed = int(positions) if isinstance(positions, (int, sympy.Integer)) else None
    return fixed is None or fixed >= sample_products.FROM_POSITIONS


def sums_of_products(products: Sequence[tuple[Outer, int]], factors: Tensor) -> list[Tensor]:
    """The clipped sum of every product, float32 or better; beside it stands its row of ``factors`` [P, B]. On a GPU those of one
    shape are computed in one launch."""
    alike: dict[Hashable, list[int]] = {}
    for k, (product, _) in enumerate(products):
        sizes = (*product.g_btp.shape, product.a_btd.shape[2])
        alike.setdefault((*map(expression, sizes), product.g_btp.dtype), []).append(k)
    found: dict[int, Tensor] = {}
    for group in alike.values():
        some = [products[k] for k in group]
        if len(some) == 1 or not fused(factors.device):
            sums = [ops.clipped_sum(product.g_btp, product.a_btd, factors[row]) for product, row in some]
        else:
            operands = [product.g_btp for product, _ in some], [product.a_btd for product, _ in some]
            sums = list(ops.clipped_sums(*operands, factors, [row for _, row in some]).unbind())
        found |= dict(zip(group, sums, strict=True))
    return [found[k] for k in range(len(products))]


def together(parts: Sequence[T], kind: Callable[[T], Hashable], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Parts in groups for one launch each: of one kind, no more than a launch takes, no more bytes than ``BYTES_AT_ONCE``."""
    kinds: dict[Hashable, list[T]] = {}
    for part in parts:
        kinds.setdefault(kind(part), []).append(part)
    for alike in kinds.values():
        group: list[T] = []
        for part in alike:
            full = len(group) == many_gradients.AT_ONCE or sum(map(nbytes, [*group, part])) > BYTES_AT_ONCE
            if group and full:
                yield group
                group = []
            group.append(part)
        if group:
            yield group
