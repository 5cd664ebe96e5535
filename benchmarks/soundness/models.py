"""The smallest models that hold one trap each.

B samples, T positions, D channels, V token ids. Inputs are [B, T, D] floats or [B, T] ids; outputs keep B first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, VOCABULARY = 6, 7


class Plain(nn.Module):
    """Two linear layers, LayerNorm between them; any number of axes between B and D."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(x_btd))))


class Language(nn.Module):
    """Embedding, one residual layer, a head: tied as a module, as a function's argument, or not at all (`tied=None`)."""

    def __init__(self, tied: str | None, **embedding: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, CHANNELS, **embedding)
        self.mix = nn.Linear(CHANNELS, CHANNELS)
        self.tied = tied
        if tied != "function":
            self.head = nn.Linear(CHANNELS, VOCABULARY, bias=False)
        if tied == "module":
            self.head.weight = self.emb.weight

    def forward(self, ids_bt: Tensor) -> Tensor:
        embedded_btd = self.emb(ids_bt)
        hidden_btd = embedded_btd + 0.1 * torch.tanh(self.mix(embedded_btd))
        return F.linear(hidden_btd, self.emb.weight) if self.tied == "function" else self.head(hidden_btd)


class SharedWeight(nn.Module):
    """Two linear layers with biases of their own and one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.last.weight = self.first.weight

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.last(x_btd + 0.1 * torch.tanh(self.first(x_btd)))


class CalledTwice(nn.Module):
    """One layer in two places, as an unrolled recurrent network has it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.cell(x_btd + 0.1 * torch.tanh(self.cell(x_btd)))


class RawParameters(nn.Module):
    """Parameters that no layer owns: an einsum, a gain and an offset that broadcasts over samples and positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.project = nn.Linear(CHANNELS, CHANNELS)
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / CHANNELS**0.5)
        self.offset = nn.Parameter(torch.randn(positions, CHANNELS))
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.gain * torch.einsum("btd,de->bte", torch.tanh(self.project(x_btd) + self.offset), self.weight)


class Positions(nn.Module):
    """A position embedding that is looked up without a batch axis: `pos_emb(arange(T))`."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.pos_emb, self.last = nn.Embedding(positions, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.last(torch.tanh(x_btd + self.pos_emb(torch.arange(x_btd.shape[1], device=x_btd.device))))


class BatchStatistics(nn.Module):
    """Normalizes or centers over the batch, in a function that no list of layer types can see."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x_btd: Tensor) -> Tensor:
        hidden_btd = torch.tanh(self.first(x_btd))
        if self.kind == "batch_norm":
            hidden_btd = F.batch_norm(hidden_btd.mT, None, None, training=True).mT
        else:
            hidden_btd = hidden_btd - hidden_btd.mean((0, 1))
        return self.last(hidden_btd)


class Dropped(nn.Module):
    """Dropout with a mask for each sample, or with one mask for the batch."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.first, self.last = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x_btd: Tensor) -> Tensor:
        hidden_btd = torch.tanh(self.first(x_btd))
        mask = torch.ones_like(hidden_btd[0] if self.shared else hidden_btd)
        return self.last(hidden_btd * F.dropout(mask, 0.5, training=True))


class GroupedConvolution(nn.Module):
    """Convolution along T in two groups, with stride, padding and dilation, then a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, stride=2, padding=2, dilation=2, groups=2)
        self.back = nn.ConvTranspose1d(CHANNELS, CHANNELS, 3, stride=2, padding=1)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.back(torch.tanh(self.conv(x_btd.mT))).mT


class PartlyFrozen(nn.Module):
    """A frozen layer below, a layer of which only the bias is trained, and a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.bias_only, self.last = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.bias_only.weight.requires_grad_(False)

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.last(torch.tanh(self.bias_only(torch.tanh(self.frozen(x_btd)))))


class LearnedWeights(nn.Module):
    """A criterion that learns: one weight for each output channel. Gives one loss for each sample, [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, CHANNELS))

    def forward(self, outputs_btd: Tensor, targets_btd: Tensor) -> Tensor:
        return (self.weight * outputs_btd * targets_btd).flatten(1).sum(1)
