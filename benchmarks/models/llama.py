"""Llama (Touvron et al. 2023, Grattafiori et al. 2024).

Dimensions: B samples, T tokens, V vocabulary, D width, H heads, G heads of keys and values, K width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Llama(nn.Module):
    """Tokens [B, T], int64 -> logits [B, T, V]. The defaults are Llama-3.2-1B.

    The rescaling of rotary frequencies for contexts beyond 8192 tokens is left out: it changes constants only.
    """

    def __init__(
        self,
        vocabulary: int = 128256,
        width: int = 2048,
        layers: int = 16,
        heads: int = 32,
        key_heads: int = 8,
        mlp_width: int = 8192,
        rotary_base: float = 500000.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.decoder = LlamaBlocks(width, layers, heads, key_heads, mlp_width, rotary_base)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        return self.head(self.norm(self.decoder(self.embedding(tokens_bt))))


class LlamaBlocks(nn.Module):
    """The blocks alone, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, layers: int, heads: int, key_heads: int, mlp_width: int, rotary_base: float) -> None:
        super().__init__()
        self.head_width, self.rotary_base = width // heads, rotary_base
        self.layers = nn.ModuleList(LlamaBlock(width, heads, key_heads, mlp_width) for _ in range(layers))

    def forward(self, x_btd: Tensor) -> Tensor:
        angles_tk = self._rotary_angles(x_btd.shape[1], x_btd.device)
        cos_tk, sin_tk = angles_tk.cos().to(x_btd.dtype), angles_tk.sin().to(x_btd.dtype)
        for layer in self.layers:
            x_btd = layer(x_btd, cos_tk, sin_tk)
        return x_btd

    def _rotary_angles(self, tokens: int, device: torch.device) -> Tensor:
        """Angle of each pair of entries at each position, float32, [T, K] (Su et al. 2021, section 3.2.2)."""
        exponents_k = torch.arange(0, self.head_width, 2, device=device, dtype=torch.float32) / self.head_width
        positions_t = torch.arange(tokens, device=device, dtype=torch.float32)
        return (positions_t[:, None] * self.rotary_base**-exponents_k).repeat(1, 2)


class LlamaBlock(nn.Module):
    """Pre-norm grouped-query attention with rotary positions, then SwiGLU, [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, key_heads: int, mlp_width: int) -> None:
        super().__init__()
        head_width = width // heads
        self.head_width, self.queries_per_key = head_width, heads // key_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, key_heads * head_width, bias=False)
        self.value = nn.Linear(width, key_heads * head_width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, mlp_width, bias=False), nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x_btd: Tensor, cos_tk: Tensor, sin_tk: Tensor) -> Tensor:
        normed_btd = self.attention_norm(x_btd)
        q_bhtk = _rotate(self._heads(self.query(normed_btd)), cos_tk, sin_tk)
        k_bhtk = self._repeat(_rotate(self._heads(self.key(normed_btd)), cos_tk, sin_tk))
        v_bhtk = self._repeat(self._heads(self.value(normed_btd)))
        mixed_bhtk = F.scaled_dot_product_attention(q_bhtk, k_bhtk, v_bhtk, is_causal=True)
        x_btd = x_btd + self.attention_out(mixed_bhtk.transpose(1, 2).flatten(2))
        normed_btd = self.mlp_norm(x_btd)
        return x_btd + self.down(F.silu(self.gate(normed_btd)) * self.up(normed_btd))

    def _heads(self, x_btd: Tensor) -> Tensor:
        return x_btd.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _repeat(self, x_bgtk: Tensor) -> Tensor:
        """One head of keys or values for each query head, [B, G, T, K] -> [B, H, T, K]."""
        if self.queries_per_key == 1:
            return x_bgtk
        return x_bgtk.unsqueeze(2).expand(-1, -1, self.queries_per_key, -1, -1).flatten(1, 2)


def _rotate(x_bhtk: Tensor, cos_tk: Tensor, sin_tk: Tensor) -> Tensor:
    """Rotates the pairs (k, k + K/2) of every head."""
    first, second = x_bhtk.chunk(2, dim=-1)
    return x_bhtk * cos_tk + torch.cat([-second, first], dim=-1) * sin_tk
