"""Residual networks with GroupNorm: the basic one for small images, and BiT (Kolesnikov et al. 2020).

Dimensions: B samples, C channels, H and W height and width of an image, L classes.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016) for small images, [B, 3, H, W] -> [B, L]: 3 x 3 stem with no pooling behind it."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(32, width)
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(
            *(
                block
                for stage, (before, after) in enumerate(itertools.pairwise(channels))
                for block in (BasicBlock(before, after, 1 if stage == 0 else 2), BasicBlock(after, after, 1))
            )
        )
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images_bchw: Tensor) -> Tensor:
        x_bchw = self.blocks(F.relu(self.norm(self.stem(images_bchw))))
        return self.head(x_bchw.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with GroupNorm, and a 1 x 1 convolution on the way around where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(32, after), nn.GroupNorm(32, after)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.around = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.GroupNorm(32, after))

    def forward(self, x_bchw: Tensor) -> Tensor:
        hidden_bchw = F.relu(self.norm1(self.conv1(x_bchw)))
        return F.relu(self.norm2(self.conv2(hidden_bchw)) + self.around(x_bchw))


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 when they are used (Qiao et al. 2019)."""

    def forward(self, x_bchw: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-10)
        return F.conv2d(x_bchw, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BiT(nn.Module):
    """Pre-activation bottleneck ResNet with GroupNorm and weight standardization, [B, 3, H, W] -> [B, L].

    `stages` holds the number of blocks of each stage: (3, 4, 6, 3) is R50x1, (3, 4, 23, 3) R101x1. Where `standardized`
    is not set, the convolutions are plain ones. `width` is the number of channels of the stem; GroupNorm has `groups`.
    """

    def __init__(
        self,
        stages: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        classes: int = 1000,
        standardized: bool = True,
        groups: int = 32,
    ) -> None:
        super().__init__()
        conv = StandardizedConv2d if standardized else nn.Conv2d
        self.stem = conv(3, width, 7, stride=2, padding=3, bias=False)
        blocks: list[nn.Module] = []
        before = width
        for stage, count in enumerate(stages):
            inner = width * 2**stage
            for index in range(count):
                blocks.append(Bottleneck(conv, before, inner, stride=2 if index == 0 and stage > 0 else 1, groups=groups))
                before = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(groups, before)
        self.head = nn.Linear(before, classes)

    def forward(self, images_bchw: Tensor) -> Tensor:
        x_bchw = F.max_pool2d(F.pad(self.stem(images_bchw), (1, 1, 1, 1)), 3, stride=2)
        x_bchw = F.relu(self.norm(self.blocks(x_bchw)))
        return self.head(x_bchw.mean((2, 3)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution, each behind GroupNorm and ReLU, [B, before, H, W] -> [B, 4 * inner, H', W']."""

    def __init__(self, conv: type[nn.Conv2d], before: int, inner: int, stride: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, channels) for channels in (before, inner, inner))
        self.conv1 = conv(before, inner, 1, bias=False)
        self.conv2 = conv(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.conv3 = conv(inner, 4 * inner, 1, bias=False)
        self.around: nn.Module | None = None
        if stride != 1 or before != 4 * inner:
            self.around = conv(before, 4 * inner, 1, stride=stride, bias=False)

    def forward(self, x_bchw: Tensor) -> Tensor:
        active_bchw = F.relu(self.norm1(x_bchw))
        around_bchw = x_bchw if self.around is None else self.around(active_bchw)
        hidden_bchw = F.relu(self.norm2(self.conv1(active_bchw)))
        hidden_bchw = F.relu(self.norm3(self.conv2(hidden_bchw)))
        return self.conv3(hidden_bchw) + around_bchw
