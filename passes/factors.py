"""Per-sample gradients in factored form, for norms without the gradients themselves.

A matrix product over the samples gives sample b the gradient ``G_b^T A_b`` (``Outer``); an embedding gives it rows of
``G_b`` at its token ids (``Rows``). Norms of sums of such terms need only inner products of the factors ("ghost norm": Li et
al. 2022, "Large Language Models Can Be Strong Differentially Private Learners", section 4; for a weight shared by an
embedding and a matrix product the cross term below makes it exact).

Legend: B samples, T positions, p rows and d columns of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """``sum_t g_btp a_btd``: ``g_btp`` [B, T, p], ``a_btd`` [B, T, d]."""

    g_btp: Tensor
    a_btd: Tensor


@dataclass(frozen=True)
class Rows:
    """Row ``ids_bt`` of ``count`` receives ``g_btd``: ids [B, T] (int64, not negative), values [B, T, d]."""

    ids_bt: Tensor
    g_btd: Tensor
    count: int | torch.SymInt


def convolution_factors(
    grad: Tensor, source: Tensor, kernel: Sequence[int], settings: Sequence[Any], channels_last: bool = False
) -> Outer:
    """A convolution's weight gradient as a product over output positions: patches of the input times gradients.

    ``grad`` [B, K, O, *out], ``source`` [B, K, I, *in], one or two spatial dimensions; ``settings``: stride, padding,
    dilation, transposed. A transposed convolution swaps the two operands' roles. ``channels_last``: patches have their channels
    last, which suits norms alone.
    """
    stride, padding, dilation, transposed = settings
    rows, patched = (source, grad) if transposed else (grad, source)
    batch, images = rows.shape[:2]
    flat = patched.flatten(0, 1)
    if len(kernel) == 1:
        flat, kernel = flat.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    of = _patches_channels_last if channels_last else _patches
    patches_btd = of(flat, kernel, stride, padding, dilation)
    rows_bpt = rows.flatten(0, 1).flatten(2)
    patches_btd = patches_btd[:, : rows_bpt.shape[2]]
    a = patches_btd.reshape(batch, images * rows_bpt.shape[2], patches_btd.shape[2])
    return Outer(rows_bpt.mT.reshape(batch, images * rows_bpt.shape[2], rows_bpt.shape[1]), a)


def _patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """[N, T, d]: what each output position of a convolution over ``x`` [N, C, H, W] reads, ordered as the kernel's elements."""
    return torch.ops.aten.im2col(x, kernel, dilation, padding, stride).mT


def _patches_channels_last(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The same in another order, which norms do not depend on: a patch is then a few runs of channels, and not one index for each
    element."""
    windows = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):
        windows = windows.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])[..., :: dilation[axis]]
    return windows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


# Below this share of what its terms could add up to, a sum of terms has lost its digits in float32, whatever computes it.
CANCELLED = 1e-3


def wide(x: Tensor) -> Tensor:
    """Norms accumulate in float32 or better. Complex values come here as pairs of real ones."""
    assert not x.is_complex()
    return x if x.dtype == torch.float64 else x.float()


def squared_norms(terms: Sequence[Outer | Rows]) -> Tensor:
    """[B]: the squared norm of each sample's sum of terms, never less than rounding can make the released sum.

    Inner products of factors cancel where terms do. ``flashnorm::ghost_norm`` sees to that for products alone; for a table that is
    also looked up they are taken in float64. Where terms cancel so far that their sum in float32 is rounding error, the norm counts
    as ``CANCELLED`` times the sum of the terms' norms: clipped harder, never less.
    """
    outers = [term for term in terms if isinstance(term, Outer)]
    rows = [term for term in terms if isinstance(term, Rows)]
    if not rows:
        return product_norms(outers)
    parts, reach = [], []
    if outers:
        outer = Outer(_joined([o.g_btp for o in outers]), _joined([o.a_btd for o in outers]))
        reach.append(reach_of(outer))
        outer = Outer(outer.g_btp.double(), outer.a_btd.double())
        parts.append(outer_norms(outer))
    row = Rows(torch.cat([r.ids_bt for r in rows], 1), _joined([r.g_btd for r in rows]), rows[0].count)
    reach.append(reach_of_rows(row))
    parts.append(row_norms(row).double())
    if outers:
        parts.append(2 * cross_products(outer, Rows(row.ids_bt, row.g_btd.double(), row.count)))
    least = (CANCELLED * sum(reach[1:], reach[0]).double()).square()
    return torch.maximum(sum(parts[1:], parts[0]), least)


def product_norms(terms: Sequence[Outer]) -> Tensor:
    """[B]: the same for products alone."""
    outer = joined(terms)
    if isinstance(outer.g_btp.shape[1], int) and outer.g_btp.shape[1] == 1:
        # An outer product: its norm is that of its factors. One's squares may be less than float32 holds, and the other's more.
        return outer.g_btp.double().square().sum((1, 2)) * outer.a_btd.double().square().sum((1, 2))
    return torch.ops.flashnorm.ghost_norm(outer.g_btp, outer.a_btd)


def joined(terms: Sequence[Outer]) -> Outer:
    """Several uses of one weight are one longer contraction."""
    if len(terms) == 1:
        return terms[0]
    return Outer(torch.cat([term.g_btp for term in terms], 1), torch.cat([term.a_btd for term in terms], 1))


def squared_products(terms: Sequence[Outer]) -> Tensor:
    """[B], float32: the squared norm of each sample's sum of products, from products that are squared as they are made.

    The released sum is another product, whose rounding differs: the same least norm holds as for inner products.
    """
    outer = joined(terms)
    norms = torch.ops.flashnorm.flash_norm(outer.g_btp, outer.a_btd)
    return torch.maximum(norms, (CANCELLED * reach_of(outer)).square().float())


def reach_of(outer: Outer) -> Tensor:
    """[B]: ``sum_t |g_t| |a_t|``, which no norm exceeds."""
    return (_lengths(outer.g_btp) * _lengths(outer.a_btd)).sum(1)


def reach_of_rows(row: Rows) -> Tensor:
    """[B]: ``sum_t |g_t|``, which no norm exceeds."""
    return _lengths(row.g_btd).sum(1)


def _lengths(x_btw: Tensor) -> Tensor:
    return wide(x_btw).square().sum(2).sqrt()


def _joined(parts: list[Tensor]) -> Tensor:
    """Several uses of one weight are one longer contraction."""
    return wide(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


def outer_norms(term: Outer) -> Tensor:
    """``||G_b^T A_b||^2 = sum_ts (g_t . g_s)(a_t . a_s)``."""
    return (torch.bmm(term.g_btp, term.g_btp.mT) * torch.bmm(term.a_btd, term.a_btd.mT)).sum((1, 2))


def row_norms(term: Rows) -> Tensor:
    """Equal ids are brought together by a sort and added before squaring: O(B T d), no [B, V, d] and no [T, T]."""
    batch, length, width = term.g_btd.shape
    ids, order = torch.sort(term.ids_bt, dim=1, stable=True)
    starts = torch.cat([torch.zeros_like(ids[:, :1]), (ids[:, 1:] != ids[:, :-1]).long()], 1)
    segments = starts.cumsum(1) + torch.arange(batch, device=ids.device)[:, None] * length
    values = torch.gather(term.g_btd, 1, order[:, :, None].expand(-1, -1, width))
    sums = values.new_zeros(batch * length, width).index_put((segments.reshape(-1),), values.reshape(-1, width), accumulate=True)
    return sums.square().reshape(batch, length * width).sum(1)


def cross_products(outer: Outer, row: Rows) -> Tensor:
    """``<sum_s g_s a_s^T, sum_t e_{id_t} h_t^T> = sum_ts (h_t . a_s) g_s[id_t]``."""
    weights_bts = torch.bmm(row.g_btd, outer.a_btd.mT)
    ids = row.ids_bt[:, :, None].expand(-1, -1, outer.g_btp.shape[1])
    at_ids_bts = torch.gather(outer.g_btp.mT, 1, ids)
    return (weights_bts * at_ids_bts).sum((1, 2))
