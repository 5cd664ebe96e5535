"""GPT-2 (Radford et al. 2019).

Dimensions: B samples, T tokens, V vocabulary, D width, H heads, K width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GPT(nn.Module):
    """Tokens [B, T], int64 -> logits [B, T, V]. T is at most `context`.

    Where `tied` is set, the head's weight is the token embedding's, as in GPT-2. Where `positions_per_sample` is set, every
    sample looks up its own positions, [B, T]: hooks on an embedding need the samples along dimension 0. Otherwise one lookup,
    [T], serves all samples. The gradients are the same.
    """

    def __init__(
        self,
        vocabulary: int = 50257,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        context: int = 1024,
        tied: bool = True,
        positions_per_sample: bool = True,
    ) -> None:
        super().__init__()
        self.positions_per_sample = positions_per_sample
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token_embedding.weight
        self._initialize(layers)

    def _initialize(self, layers: int) -> None:
        """GPT-2's: normal weights, smaller where a block adds to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds_to_residual = name.endswith(("attention_out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if adds_to_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        positions = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
        if self.positions_per_sample:
            positions = positions.repeat(tokens_bt.shape[0], 1)
        x_btd = self.token_embedding(tokens_bt) + self.position_embedding(positions)
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(self.final_norm(x_btd))


class GPTBlock(nn.Module):
    """Pre-norm causal attention, then an MLP of four times the width, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x_btd: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_btd)).unflatten(-1, (3, self.heads, -1))
        q_bhtk, k_bhtk, v_bhtk = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed_bhtk = F.scaled_dot_product_attention(q_bhtk, k_bhtk, v_bhtk, is_causal=True)
        x_btd = x_btd + self.attention_out(mixed_bhtk.transpose(1, 2).flatten(2))
        return x_btd + self.mlp(self.mlp_norm(x_btd))
