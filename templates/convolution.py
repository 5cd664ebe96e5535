"""``flashnorm::conv_weight_grads``: every sample's gradient of a convolution's kernel.

    grad          [B, K, O, *out]  gradient of the convolution's output; a sample owns K images
    source        [B, K, I, *in]   its input
    weight_shape  sizes of the kernel: [O, I/groups, *k], or [I, O/groups, *k] when transposed
    returns       [B, *weight_shape], in the dtype of ``grad``

The library's own weight gradient is called for one sample at a time, or for narrow kernels once, with each sample a group of
channels: the same arithmetic as the sum over the batch, and no unfolded copy of the input. Works for one to three spatial
dimensions, with stride, padding, dilation, groups and transposition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


# Measured with oneDNN on two cores: up to this many channels one grouped call is 1.8 to 20 times as fast, from twice as many on it
# is 2 to 6 times as slow.
NARROW = 32


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
    only_weight = [False, True, False]
    samples = grad.shape[0]
    if samples > 1 and max(weight_shape[:2]) <= NARROW:
        as_groups = [x.transpose(0, 1).flatten(1, 2) for x in (grad, source)]
        weight = grad.new_empty(()).expand(samples * weight_shape[0], *weight_shape[1:])
        settings = (stride, padding, dilation, transposed, output_padding, groups * samples, only_weight)
        return aten.convolution_backward(*as_groups, weight, None, *settings)[1].view(samples, *weight_shape)
    out = grad.new_empty((samples, *weight_shape))
    weight = grad.new_empty(()).expand(*weight_shape)  # only its shape is read
    settings = (stride, padding, dilation, transposed, output_padding, groups, only_weight)
    for sample in range(samples):
        own = (_images(grad, sample), _images(source, sample))
        out[sample] = aten.convolution_backward(*own, weight, None, *settings)[1]
    return out


def _images(x: Tensor, sample: int) -> Tensor:
    """A sample's images [K, C, *sizes]. A single one has the stride of samples: by another, PyTorch does not see that channels lie
    last, and copies."""
    return x[sample : sample + 1, 0] if x.shape[1] == 1 else x[sample]


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
