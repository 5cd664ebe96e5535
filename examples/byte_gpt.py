"""A small GPT over bytes that returns its own loss, so that model and loss compile as one graph.

Dimensions: B records, T predicted bytes of a record, V = 256 byte values, D width, H heads.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

PADDING = 0
"""Fills records that are shorter than the model's window. No source file holds this byte."""

BYTE_VALUES = 256


class Block(nn.Module):
    """Pre-norm causal attention and MLP, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_btd: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_btd)).unflatten(-1, (3, self.heads, -1))
        q_bhtk, k_bhtk, v_bhtk = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q_bhtk, k_bhtk, v_bhtk, is_causal=True)
        x_btd = x_btd + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x_btd + self.mlp(self.mlp_norm(x_btd))


class ByteGPT(nn.Module):
    """Maps records to the mean, over records, of each record's own mean loss per byte.

    The head is the byte embedding, used a second time. Each record's loss is divided by the number of its own bytes:
    dividing by the number of bytes in the batch would let one record change the gradient of the others.
    """

    def __init__(self, window: int = 128, width: int = 128, layers: int = 5, heads: int = 4) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(BYTE_VALUES, width)
        self.position_embedding = nn.Embedding(window, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.head_bias = nn.Parameter(torch.zeros(BYTE_VALUES))
        self._initialize(layers)

    def _initialize(self, layers: int) -> None:
        """Normal weights, smaller where a block adds to the residual stream, so that depth does not raise the loss."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds_to_residual = name.endswith(("attention_out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if adds_to_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, records_bt1: Tensor) -> Tensor:
        """`records_bt1`: int64 [B, T + 1], padded with zeros at the end. Returns a float32 scalar."""
        inputs_bt, targets_bt = records_bt1[:, :-1], records_bt1[:, 1:]
        positions_t = torch.arange(inputs_bt.shape[1], device=inputs_bt.device)
        x_btd = self.byte_embedding(inputs_bt) + self.position_embedding(positions_t)
        for block in self.blocks:
            x_btd = block(x_btd)
        logits_btv = F.linear(self.final_norm(x_btd), self.byte_embedding.weight, self.head_bias)
        losses_bt = F.cross_entropy(logits_btv.transpose(1, 2), targets_bt, reduction="none")
        counted_bt = (targets_bt != PADDING).to(losses_bt.dtype)
        return ((losses_bt * counted_bt).sum(1) / counted_bt.sum(1).clamp(min=1)).mean()
