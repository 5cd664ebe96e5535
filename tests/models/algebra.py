"""Parameters that no layer owns: einsum, matrix functions, complex numbers, scalars, low-rank products, tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from models.case import Case, Tensors, gaussian, spread, squared_error, weights_and_noise

WIDTH = 8


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


class WeightNormed(nn.Module):
    """A linear layer and a convolution under weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(3, 4, 2))
        self.linear = weight_norm(nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(x.reshape(-1, 3, 6))).flatten(1))


class Einsum(nn.Module):
    """Raw parameters: two einsums with an orthogonal matrix, ``matrix_exp(a - a.T)``, between them."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(4, 5, 3) / 3)
        self.skew = nn.Parameter(torch.randn(5, 5) / 3)
        self.out = nn.Parameter(torch.randn(3, 2, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        rotated = x @ torch.linalg.matrix_exp(self.skew - self.skew.mT)
        hidden = torch.einsum("bti,hio->bhto", rotated, self.core)
        return torch.einsum("bhto,okh->btk", hidden.sigmoid(), self.out)


class ComplexMixing(nn.Module):
    """Mixes channels in the complex plane; only the modulus and the real part come back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64) / 3)
        self.phase = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        mixed = x.to(self.mix.dtype) @ self.mix
        turned = mixed * torch.polar(torch.ones_like(self.phase), self.phase)
        return turned.real + turned.abs()


class Scalars(nn.Module):
    """Scalar parameters (shape []) that scale, shift and bend."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.tensor(-0.2))
        self.power = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x.abs() + 0.1).pow(self.power).sum(1, keepdim=True) + self.shift


class LoraProduct(nn.Module):
    """A frozen weight plus the product of two thin ones, added before use."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, WIDTH)
        self.base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 6) / 2)
        self.up = nn.Parameter(torch.randn(WIDTH, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.base.weight + self.up @ self.down, self.base.bias))


class Frozen(nn.Module):
    """The middle layer and the last bias are frozen; gradients still pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
        for parameter in (*self.layers[2].parameters(), self.layers[3].bias):
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Interactions(nn.Module):
    """DLRM: dense features and embeddings, all pairs of dot products, an MLP on top."""

    def __init__(self, bags: bool) -> None:
        super().__init__()
        kind = (lambda n: nn.EmbeddingBag(n, 4, mode="sum")) if bags else (lambda n: nn.Embedding(n, 4))
        self.tables = nn.ModuleList([kind(rows) for rows in (7, 11, 5)])
        self.dense = nn.Linear(6, 4)
        self.top = nn.Linear(4 + 6, 3)
        self.bags = bags

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        looked_up = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        vectors = looked_up if self.bags else [rows.sum(1) for rows in looked_up]
        features = torch.stack([F.relu(self.dense(x)), *vectors], 1)
        rows, columns = torch.tril_indices(4, 4, -1).unbind()
        pairs = (features @ features.mT)[:, rows, columns]
        return self.top(torch.cat([features[:, 0], pairs], 1))


class PublicTable(nn.Module):
    """Reads from a table that the caller passes in and declares public."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, WIDTH)
        self.mix = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        attention = (self.project(x) @ table.mT).softmax(-1)
        return self.mix(attention @ torch.tanh(table * self.project.bias))


class Gathered(nn.Module):
    """Scatter, cumulative sums, sorting and ``index_select`` of a table of parameters by relative position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 2))
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(6, device=x.device)
        bias = self.table[(steps[:, None] - steps[None, :]) + 5]
        ordered = (x * self.scale).sort(1).values.cumsum(1)
        return torch.einsum("bi,ijh->bjh", ordered, bias).exp().log1p()


class MixtureOfExperts(nn.Module):
    """Every expert on every sample, weighted by a softmax gate; experts stacked in one parameter (``baddbmm``)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.bias = nn.Parameter(torch.zeros(3, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.baddbmm(self.bias, x.expand(3, -1, -1), self.experts)
        return torch.einsum("ebo,be->bo", hidden.tanh(), self.gate(x).softmax(-1))


def _rows(*shape: int) -> object:
    def inputs(batch_size: int) -> Tensors:
        return {"x": gaussian(batch_size, *shape) * spread(batch_size).reshape(-1, *[1] * len(shape))}

    return inputs


def _features(batch_size: int) -> Tensors:
    ids = torch.stack([torch.randint(0, rows, (batch_size, 2)) for rows in (7, 11, 5)], 1)
    return {"x": gaussian(batch_size, 6) * spread(batch_size)[:, None], "ids": ids}


def _with_table(batch_size: int) -> Tensors:
    return {"x": gaussian(batch_size, 6) * spread(batch_size)[:, None], "table": torch.randn(5, WIDTH)}


def _case(name: str, build: object, inputs: object, *out: int, **extra: object) -> Case:
    return Case(name, build, inputs, squared_error, targets=weights_and_noise("x", *out), **extra)  # type: ignore[arg-type]


CASES = [
    _case("mlp", Mlp, _rows(6), 3, batch_size=6),
    _case("mlp_over_time", Mlp, _rows(5, 6), 5, 3),
    _case("weight_norm", WeightNormed, _rows(18), 3),
    _case("einsum_matrix_exp", Einsum, _rows(4, 5), 4, 2),
    _case("complex", ComplexMixing, _rows(6), 5),
    _case("scalars", Scalars, _rows(6), 1),
    _case("lora_product", LoraProduct, _rows(5, 6), 5, WIDTH),
    _case("frozen", Frozen, _rows(6), 3),
    _case("dlrm", lambda: Interactions(False), _features, 3),
    _case("dlrm_bags", lambda: Interactions(True), _features, 3, may_refuse=True),
    _case("public_table", PublicTable, _with_table, 5, dims={"table": None}),
    _case("gathered", Gathered, _rows(6), 6, 2),
    _case("experts", MixtureOfExperts, _rows(6), 4),
]


class Stack(nn.Module):
    """Layers whose inputs are all that the forward saves, with as much to hold for each layer's output again. Over few positions
    per-sample gradients are larger than all activations."""

    def __init__(self, width: int = 64, layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()
