"""``flashnorm::conv_weight_grads``: every sample's gradient of a convolution's kernel.

    grad          [B, K, O, *out]  gradient of the convolution's output; a sample owns K images
    source        [B, K, I, *in]   its input
    weight_shape  sizes of the kernel: [O, I/groups, *k], or [I, O/groups, *k] when transposed
    returns       [B, *weight_shape], in the dtype of ``grad``

The library's own weight gradient is called for one sample at a time: the same arithmetic as the sum over the batch, and no
unfolded copy of the input. Works for one to three spatial dimensions, with stride, padding, dilation, groups and transposition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def conv_weight_grads(
    grad: Tensor,
    source: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    out = grad.new_empty((grad.shape[0], *weight_shape))
    weight = grad.new_empty(()).expand(*weight_shape)  # only its shape is read
    only_weight = [False, True, False]
    settings = (stride, padding, dilation, transposed, output_padding, groups, only_weight)
    for sample in range(grad.shape[0]):
        out[sample] = aten.convolution_backward(grad[sample], source[sample], weight, None, *settings)[1]
    return out


def _fake(grad: Tensor, source: Tensor, weight_shape: Sequence[int], *_: object) -> Tensor:
    return grad.new_empty((grad.shape[0], *weight_shape))


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define(
    "conv_weight_grads(Tensor grad, Tensor source, SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("conv_weight_grads", conv_weight_grads, "CompositeExplicitAutograd")
torch.library.register_fake("flashnorm::conv_weight_grads", _fake, lib=_library)
