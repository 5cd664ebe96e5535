"""``flashnorm::sample_products``: every sample's gradient of a weight from the device's library ("materialize", long samples).

    flashnorm::sample_products(Tensor g_btp, Tensor a_btd) -> Tensor

    g_btp    [B, T, p]  any floating-point type and strides
    a_btd    [B, T, d]  the same type, any strides
    returns  [B, p, d]  ``G_b^T A_b`` in that type, as the library rounds it; a sample's gradient depends on this sample alone

Their norms are taken of what is stored, together with many others' (``flashnorm::squared_norms``). Against ``weight_grads``, whose
kernel squares what it stores, that reads B * p * d elements once more. Libraries' products are faster than Triton's, so that from
``FROM_POSITIONS`` on it is worth it: an element then takes longer to multiply than to read.

Legend: B samples, T positions, p rows and d columns of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import lowerings

from . import _lowering as lowering
from ._compat import library_bmm
from ._order import before_later_layers
from ._triton import check_lengths, check_operands

# [8, 1024, 2304] with [8, 1024, 768] in bfloat16 take an H200's library 0.047 ms and ``weight_grads`` 0.067 ms, and reading the
# result at 4 TB/s 0.007 ms: with as many FLOPs for each element at T = 1024, equal at about 360.
FROM_POSITIONS = 512

aten = torch.ops.aten


def sample_products(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    """For every device."""
    _check(g_btp, a_btd)
    return torch.bmm(g_btp.mT, a_btd)


def _check(g_btp: Tensor, a_btd: Tensor) -> None:
    check_operands("sample_products", ("g_btp", g_btp), ("a_btd", a_btd))
    check_lengths("sample_products", ("g_btp", g_btp), ("a_btd", a_btd))


def _fake(g_btp: Tensor, a_btd: Tensor) -> Tensor:
    _check(g_btp, a_btd)
    return g_btp.new_empty((g_btp.shape[0], g_btp.shape[2], a_btd.shape[2]))


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define("sample_products(Tensor g_btp, Tensor a_btd) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("sample_products", sample_products, "CompositeExplicitAutograd")
torch.library.register_fake("flashnorm::sample_products", _fake, lib=_library)


def _lower(g: Any, a: Any) -> Any:
    operands = lowering.realized(g, a)
    (batch, length, p), d = g.get_size(), a.get_size()[2]
    if lowering.is_zero(batch, length, p, d):
        return None
    layout = ir.FixedLayout(g.get_device(), g.get_dtype(), [batch, p, d])
    transposed = lowerings[aten.permute.default](g, [0, 2, 1])
    return before_later_layers(operands, lambda: library_bmm(transposed, operands[1], layout))


lowering.register(torch.ops.flashnorm.sample_products.default, _lower)
