"""What is timed: modules that return their own mean loss, with random inputs.

Dimensions: B samples, T tokens, D width, C channels, H and W height and width of an image.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from examples.byte_gpt import ByteGPT


@dataclass(frozen=True)
class Case:
    """One row of the benchmark. `target` is the largest accepted ratio of a private step to a non-private one."""

    name: str
    description: str
    target: float
    build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


class MLP(nn.Module):
    """Square layers with ReLU between them; mean squared error."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x_bd: Tensor, target_bd: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x_bd = F.relu(layer(x_bd))
        return F.mse_loss(self.layers[-1](x_bd), target_bd)


class ViT(nn.Module):
    """Patches of 16 x 16 pixels, a class token, learned positions, pre-norm encoder; cross-entropy."""

    def __init__(self, width: int, layers: int, heads: int, pixels: int, classes: int) -> None:
        super().__init__()
        patches = (pixels // 16) ** 2
        self.patch = nn.Conv2d(3, width, kernel_size=16, stride=16)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images_bchw: Tensor, labels_b: Tensor) -> Tensor:
        patches_btd = self.patch(images_bchw).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(patches_btd.shape[0], -1, -1)
        x_btd = torch.cat([class_token, patches_btd], dim=1) + self.positions
        for block in self.blocks:
            x_btd = block(x_btd)
        return F.cross_entropy(self.head(self.norm(x_btd[:, 0])), labels_b)


class EncoderBlock(nn.Module):
    """Pre-norm attention over all tokens, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_btd: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_btd)).unflatten(-1, (3, self.heads, -1))
        mixed_bhtk = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())
        x_btd = x_btd + self.attention_out(mixed_bhtk.transpose(1, 2).flatten(2))
        return x_btd + self.mlp(self.mlp_norm(x_btd))


class ResNet(nn.Module):
    """ResNet-18 for small images (3 x 3 stem, no pooling after it) with GroupNorm; cross-entropy."""

    def __init__(self, width: int, classes: int) -> None:
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

    def forward(self, images_bchw: Tensor, labels_b: Tensor) -> Tensor:
        x_bchw = self.blocks(F.relu(self.norm(self.stem(images_bchw))))
        return F.cross_entropy(self.head(x_bchw.mean((2, 3))), labels_b)


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


def _gpt(batch: int, window: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ByteGPT(window, width=256, layers=4, heads=4), (torch.randint(1, 256, (batch, window + 1)),)


def _vit(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = ViT(width=384, layers=6, heads=6, pixels=224, classes=100)
    return model, (torch.randn(batch, 3, 224, 224), torch.randint(100, (batch,)))


def _mlp(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MLP(width=1024, layers=8), (torch.randn(batch, 1024), torch.randn(batch, 1024))


def _resnet(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ResNet(width=64, classes=10), (torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))


CASES = (
    Case("gpt", "GPT, tied head, d 256, 4 layers, 4 heads, vocabulary 256, B 8, T 256", 1.2, lambda: _gpt(8, 256)),
    Case("gpt-b1", "the same GPT, B 1, T 1024", 1.15, lambda: _gpt(1, 1024)),
    Case("vit", "ViT-S-like, d 384, 6 layers, 6 heads, 197 tokens, 100 classes, B 8", 1.25, lambda: _vit(8)),
    Case("mlp", "8 x Linear(1024, 1024) with ReLU, B 64", 1.25, lambda: _mlp(64)),
    Case("resnet-gn", "ResNet-18 with GroupNorm, width 64, 32 x 32 pixels, 10 classes, B 16", 1.6, lambda: _resnet(16)),
)
