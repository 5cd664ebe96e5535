"""Vision Transformer (Dosovitskiy et al. 2021).

Dimensions: B samples, T tokens, D width, C channels, H and W height and width of an image, L classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ViT(nn.Module):
    """Images [B, C, H, W] -> logits [B, L]: patches of `patch` x `patch` pixels, a class token, learned positions.

    Class token and positions are parameters of no layer. They are trained only where `train_raw` is set.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        pixels: int = 224,
        patch: int = 16,
        classes: int = 1000,
        train_raw: bool = False,
    ) -> None:
        super().__init__()
        tokens = (pixels // patch) ** 2 + 1
        self.patch = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02, requires_grad=train_raw)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02, requires_grad=train_raw)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, images_bchw: Tensor) -> Tensor:
        patches_btd = self.patch(images_bchw).flatten(2).transpose(1, 2)
        class_token_b1d = self.class_token.expand(patches_btd.shape[0], -1, -1)
        x_btd = torch.cat([class_token_b1d, patches_btd], dim=1) + self.positions
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(self.norm(x_btd)[:, 0])


class EncoderBlock(nn.Module):
    """Pre-norm attention over all tokens, then an MLP of four times the width, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_btd: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_btd)).unflatten(-1, (3, self.heads, -1))
        mixed_bhtk = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())
        x_btd = x_btd + self.attention_out(mixed_bhtk.transpose(1, 2).flatten(2))
        return x_btd + self.mlp(self.mlp_norm(x_btd))
