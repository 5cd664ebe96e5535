"""BERT (Devlin et al. 2019) that classifies a text.

Dimensions: B samples, T tokens, D width, H heads, K width of a head, L classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BERT(nn.Module):
    """Tokens [B, T], int64 -> logits [B, L]. Without padding, dropout and a second segment. T is at most `context`."""

    def __init__(
        self,
        vocabulary: int = 30522,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        context: int = 512,
        classes: int = 2,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.segment_embedding = nn.Embedding(2, width)
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(BERTBlock(width, heads) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        # Samples lie along dimension 0 of every lookup: hooks on an embedding need them there.
        positions_bt = torch.arange(tokens_bt.shape[1], device=tokens_bt.device).repeat(tokens_bt.shape[0], 1)
        segments_bt = torch.zeros_like(tokens_bt)
        x_btd = self.token_embedding(tokens_bt) + self.position_embedding(positions_bt) + self.segment_embedding(segments_bt)
        x_btd = self.embedding_norm(x_btd)
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(torch.tanh(self.pooler(x_btd[:, 0])))


class BERTBlock(nn.Module):
    """Post-norm attention over all tokens, then an MLP of four times the width, [B, T, D] -> [B, T, D].

    The biases of keys get no gradient but rounding errors (softmax ignores them). In one layer with queries and values they
    do not stand alone when gradients are compared parameter by parameter.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x_btd: Tensor) -> Tensor:
        q_bhtk, k_bhtk, v_bhtk = self.qkv(x_btd).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed_bhtk = F.scaled_dot_product_attention(q_bhtk, k_bhtk, v_bhtk)
        x_btd = self.attention_norm(x_btd + self.attention_out(mixed_bhtk.transpose(1, 2).flatten(2)))
        return self.mlp_norm(x_btd + self.mlp(x_btd))
