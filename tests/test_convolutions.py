"""Per-sample norms and gradients of convolutions' kernels on a CPU, against PyTorch's gradient for one sample at a time."""

from __future__ import annotations

import pytest
import torch
from flashnorm_compile.passes.factors import convolution_factors, squared_norms
from torch import Tensor

CONVOLVE = {
    (1, False): torch.nn.functional.conv1d,
    (2, False): torch.nn.functional.conv2d,
    (1, True): torch.nn.functional.conv_transpose1d,
    (2, True): torch.nn.functional.conv_transpose2d,
}
SAMPLES, IMAGES, SIZE = 3, 2, 9


def _sample_gradients(kernel: tuple[int, ...], transposed: bool, **settings: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input [B, K, 4, *in], gradient of the output [B, K, 5, *out], and of the kernel [B, *kernel's shape]."""
    source = torch.randn(SAMPLES, IMAGES, 4, *[SIZE] * len(kernel))
    weight = torch.randn(*((4, 5) if transposed else (5, 4)), *kernel, requires_grad=True)
    grads, found = [], []
    for images in source:
        out = CONVOLVE[len(kernel), transposed](images, weight, **settings)
        grads.append(torch.randn_like(out))
        found += torch.autograd.grad(out, weight, grads[-1])
    return source, torch.stack(grads), torch.stack(found)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [(3,), (1, 2), (3, 2)])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 0, 2)])
def test_norms_do_not_depend_on_the_order_of_patches(
    kernel: tuple[int, ...], stride: int, padding: int, dilation: int, transposed: bool
) -> None:
    source, grad, want = _sample_gradients(kernel, transposed, stride=stride, padding=padding, dilation=dilation)
    settings = [[setting] * len(kernel) for setting in (stride, padding, dilation)]
    for channels_last in (False, True):
        factors = convolution_factors(grad, source, kernel, [*settings, transposed], channels_last)
        torch.testing.assert_close(squared_norms([factors]).float(), want.flatten(1).square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("images", [1, 2])
def test_gradients_of_channels_last_operands(images: int) -> None:
    """A sample's only image is a view whose strides say that channels lie last."""
    source, grad = (torch.randn(2, 40, 6, 6 * images).contiguous(memory_format=torch.channels_last) for _ in range(2))
    operands = [x.unflatten(3, (images, 6)).movedim(3, 1) for x in (grad, source)]
    found = torch.ops.flashnorm.conv_weight_grads(*operands, [40, 40, 3, 3], [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    for own_grad, own_source, own in zip(*operands, found, strict=True):
        weight = torch.zeros(40, 40, 3, 3, requires_grad=True)
        (want,) = torch.autograd.grad(torch.nn.functional.conv2d(own_source, weight, padding=1), weight, own_grad)
        torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-4)
