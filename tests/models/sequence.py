"""Attention, recurrence, embeddings and layouts of the batch that a per-layer method would trip over."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models.case import Case, Tensors, gaussian, own_loss, spread, squared_error, tokens, weights_and_noise

WIDTH = 8
VOCABULARY = 13
LENGTH = 5


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` behind a projection; mean over time at the end."""

    def __init__(self, batch_first: bool, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 12, dropout=dropout, batch_first=batch_first, norm_first=batch_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)
        self.time = 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)).mean(self.time)


class TimeFirst(nn.Module):
    """Recurrent attention over inputs [T, B, d], with the batch in the middle all the way through."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(LENGTH, LENGTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, LENGTH)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.project(x)) * self.gain
        hidden = self.mix(hidden.permute(1, 2, 0)).permute(2, 0, 1)
        return (hidden * x).sum(0)


class GruCell(nn.Module):
    """A GRU cell unrolled over time: every weight is used T times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, WIDTH)
        self.start = nn.Parameter(0.1 * torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = self.start.expand(x.shape[0], -1)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


class LstmCell(nn.Module):
    """An LSTM cell unrolled over time, without biases; both of its states are used."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, WIDTH, bias=False)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = None
        for step in x.unbind(1):
            states = self.cell(step, states)
        return self.head(torch.cat(states, 1))


class HandWrittenRnn(nn.Module):
    """An Elman cell from matrix products alone; returns every state."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Parameter(0.4 * torch.randn(6, WIDTH))
        self.recurrent = nn.Parameter(0.4 * torch.randn(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(x.shape[0], WIDTH), []
        for t in range(x.shape[1]):
            state = torch.tanh(x[:, t] @ self.inward + state @ self.recurrent + self.bias)
            states.append(state)
        return torch.stack(states, 1)


class PositionedText(nn.Module):
    """Token and position embeddings (``pos_emb(arange(T))``); the head is tied by a function call alone."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = None if tied else nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        hidden = self.norm(torch.tanh(hidden))
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)


class LastToken(nn.Module):
    """Pools the hidden state at each sample's last valid position, ``h[arange(B), lengths]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        hidden = F.gelu(self.layer(self.embedding(ids)))
        return self.head(hidden[torch.arange(ids.shape[0], device=ids.device), lengths])


class Siamese(nn.Module):
    """Both inputs go through one trunk as one batch of 2B, and are told apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.trunk(torch.cat([left, right])).chunk(2)
        return a - b * a.norm(dim=1, keepdim=True)


class Attention(nn.Module):
    """Causal self-attention by hand, heads split by views; one residual block."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        parts = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k, v = parts
        scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
        hidden_above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(hidden_above, -torch.inf).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class BareAttention(nn.Module):
    """No heads, only square matrices: with B == T == d no size tells the axes apart."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.table = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT + self.table
        return scores.softmax(-1) @ self.value(x) * self.table


def _keep_products(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(nn.Module):
    """Two attention blocks under activation checkpointing, whole or selective."""

    def __init__(self, selective: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.dropout = nn.Dropout(dropout)
        self.selective = selective

    def forward(self, x: Tensor) -> Tensor:
        extra = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if self.selective else {}
        for block in self.blocks:
            x = checkpoint(lambda h, block=block: self.dropout(F.gelu(block(h))), x, use_reentrant=False, **extra)
        return x


class Dropped(nn.Module):
    """A small MLP with dropout."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(rate), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class MaskedText(nn.Module):
    """A language model with its loss inside, averaged over the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.text = PositionedText(tied=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.text(ids).flatten(0, 1), labels.flatten(), ignore_index=-1)


def _sequences(batch_size: int, length: int = LENGTH, width: int = WIDTH) -> Tensor:
    return gaussian(batch_size, length, width) * spread(batch_size)[:, None, None]


def _x(width: int = WIDTH, length: int = LENGTH) -> object:
    return lambda batch_size: {"x": _sequences(batch_size, length, width)}


def _time_first(batch_size: int) -> Tensors:
    return {"x": _sequences(batch_size).transpose(0, 1).contiguous()}


def _time_first_targets(inputs: Tensors, width: int = 3) -> Tensors:
    return weights_and_noise("x", width)({"x": inputs["x"].transpose(0, 1)})


def _ids(batch_size: int) -> Tensors:
    ids = tokens(batch_size, LENGTH, VOCABULARY)
    keep = torch.arange(LENGTH) < LENGTH - torch.arange(batch_size)[:, None] % 3
    return {"ids": ids * keep}


def _pooled(batch_size: int) -> Tensors:
    ids = _ids(batch_size)["ids"]
    return {"ids": ids, "lengths": (ids != 0).sum(1) - 1}


def _pairs(batch_size: int) -> Tensors:
    return {"left": gaussian(batch_size, 6) * spread(batch_size)[:, None], "right": gaussian(batch_size, 6)}


def _masked(batch_size: int) -> Tensors:
    ids = _ids(batch_size)["ids"]
    return {"ids": ids, "labels": torch.where(ids == 0, -1, ids.roll(-1, 1))}


def _masked_share(inputs: Tensors) -> float:
    return (inputs["labels"] != -1).sum().item() / LENGTH


def _case(name: str, build: object, inputs: object, first: str, *out: int, **extra: object) -> Case:
    return Case(name, build, inputs, squared_error, targets=weights_and_noise(first, *out), **extra)  # type: ignore[arg-type]


_TIME_FIRST = {"dims": {"x": 1}}

CASES = [
    _case("transformer_encoder", lambda: Encoder(True), _x(), "x", 3),
    Case(
        "transformer_encoder_time_first",
        lambda: Encoder(False),
        _time_first,
        squared_error,
        targets=_time_first_targets,
        **_TIME_FIRST,  # type: ignore[arg-type]
    ),
    Case(
        "time_first",
        TimeFirst,
        _time_first,
        squared_error,
        targets=partial(_time_first_targets, width=WIDTH),
        **_TIME_FIRST,  # type: ignore[arg-type]
    ),
    _case("gru_cell", GruCell, _x(6), "x", 3),
    _case("lstm_cell", LstmCell, _x(6), "x", 3),
    _case("hand_written_rnn", HandWrittenRnn, _x(6), "x", LENGTH, WIDTH),
    _case("tied_by_function", PositionedText, _ids, "ids", LENGTH, VOCABULARY),
    _case("position_embedding", lambda: PositionedText(False), _ids, "ids", LENGTH, VOCABULARY),
    _case("last_token", LastToken, _pooled, "ids", 3),
    _case("siamese", Siamese, _pairs, "left", 4),
    _case("attention", Attention, _x(), "x", LENGTH, WIDTH),
    _case("square", lambda: BareAttention(6), _x(6, 6), "x", 6, 6, batch_size=6),
    _case("checkpointed", Checkpointed, _x(), "x", LENGTH, WIDTH),
    _case("checkpointed_selectively", lambda: Checkpointed(True), _x(), "x", LENGTH, WIDTH),
    Case(
        "masked_text",
        MaskedText,
        _masked,
        own_loss,
        options={"loss_normalizer": float(LENGTH)},
        share=_masked_share,
    ),
]
