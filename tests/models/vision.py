"""Convolutional networks: one to three dimensions, grouped, dilated, strided and transposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.case import Case, Tensors, gaussian, spread, squared_error, weights_and_noise


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with GroupNorm and a projected shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(2, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(2, channels_out)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, max pooling, two residual blocks, adaptive pooling, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(4, 6, 1), ResidualBlock(6, 8, 2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(F.max_pool2d(self.stem(x), 2))
        return self.head(F.adaptive_avg_pool2d(hidden, 1).flatten(1))


class ConvNextBlock(nn.Module):
    """Depthwise 7 x 7, LayerNorm over channels, two pointwise layers, a scale for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 2 * channels)
        self.contract = nn.Linear(2 * channels, channels)
        self.gamma = nn.Parameter(0.5 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.gamma * self.contract(F.gelu(self.expand(hidden)))
        return x + hidden.permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Two levels down, two up by transposed convolutions, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(2, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.down3 = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2)
        self.up2 = nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=2)
        self.up1 = nn.ConvTranspose2d(12, 4, 2, stride=2, bias=False)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.silu(self.down1(x))
        two = F.silu(self.down2(one))
        three = F.silu(self.down3(two))
        two = torch.cat([F.silu(self.up2(three)), two], 1)
        return self.out(torch.cat([F.silu(self.up1(two)), one], 1))


class InterpolatedNet(nn.Module):
    """Average pooling, instance norm, nearest and bilinear upsampling, reflection padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.norm = nn.InstanceNorm2d(4, affine=True)
        self.second = nn.Conv2d(4, 2, 3, padding="same", padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.avg_pool2d(F.elu(self.norm(self.first(x))), 2)
        hidden = F.interpolate(self.second(hidden), scale_factor=2, mode="nearest")
        return F.interpolate(hidden, size=(5, 7), mode="bilinear", align_corners=False)


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, dilation=2, groups=2),
        nn.Tanh(),
        nn.Conv1d(6, 6, 3, stride=2, padding=2, groups=6),
        nn.GroupNorm(3, 6),
        nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1, dilation=2, groups=2),
    )


def _conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
        nn.GELU(),
        nn.Conv3d(4, 4, 2, groups=2, dilation=(1, 1, 2)),
        nn.ConvTranspose3d(4, 1, 2),
    )


def _dilated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, (3, 2), dilation=(2, 3), padding=(2, 1), groups=4),
        nn.LeakyReLU(0.1),
        nn.Conv2d(8, 4, 3, stride=(2, 1), padding=1, groups=2, bias=False),
    )


def _scaled(*shape: int) -> object:
    def inputs(batch_size: int) -> Tensors:
        scale = spread(batch_size).reshape(-1, *[1] * len(shape))
        return {"x": gaussian(batch_size, *shape) * scale}

    return inputs


class _Named(nn.Module):
    """Gives a Sequential's argument the name ``x``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _case(name: str, build: object, shape: tuple[int, ...], out: tuple[int, ...]) -> Case:
    return Case(name, build, _scaled(*shape), squared_error, targets=weights_and_noise("x", *out))  # type: ignore[arg-type]


CASES = [
    _case("resnet_groupnorm", ResNet, (3, 8, 8), (3,)),
    _case("convnext", lambda: _Named(nn.Sequential(ConvNextBlock(4), ConvNextBlock(4))), (4, 6, 6), (4, 6, 6)),
    _case("unet", UNet, (2, 8, 8), (1, 8, 8)),
    _case("interpolated", InterpolatedNet, (2, 8, 10), (2, 5, 7)),
    _case("conv1d", lambda: _Named(_conv1d()), (4, 11), (4, 14)),
    _case("conv3d", lambda: _Named(_conv3d()), (2, 3, 4, 5), (1, 3, 3, 4)),
    _case("dilated_grouped", lambda: _Named(_dilated()), (4, 7, 8), (4, 4, 7)),
]
