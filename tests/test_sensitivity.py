"""Sensitivity: one record more, less or different moves the clipped sum by no more than the clipping norm allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models.sequence import Attention
from oracle import gradients_of, norm
from torch import Tensor, nn

NORM, SLACK, BATCH = 0.5, 1e-3, 5


class Reader(nn.Module):
    """Embedding, attention, a convolution and a tied head: a parameter for each kind of frontier. No normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 8)
        self.positions = nn.Parameter(torch.randn(7, 8))
        self.attention = Attention()
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.attention(torch.tanh(self.project(x)) + self.positions)
        return self.gain * (self.conv(hidden.mT).mT @ self.project.weight)


class Release:
    """Clipped sums (no noise) of a compiled model on any batch of records [B, 7, 4]."""

    def __init__(self, backend: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Reader()
        private = {"max_grad_norm": NORM, "noise_multiplier": 0.0, "loss_reduction": "sum"}
        self.compiled = torch.compile(self.model, backend=backend, dynamic=True, options=private | options)

    def __call__(self, records: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad()
        # A linear loss: the gradient grows with the record and never vanishes.
        self.compiled(records).sum().backward()
        return gradients_of(self.model)

    def distance(self, batch: Tensor, neighbour: Tensor) -> float:
        """Norm of the difference of the two clipped sums; both must be finite."""
        a, b = self(batch), self(neighbour)
        assert all(value.isfinite().all() for value in (*a.values(), *b.values()))
        return norm({name: (a[name] - b[name]).double() for name in a})


def _random(scale: float) -> Callable[[], Tensor]:
    return lambda: scale * torch.randn(1, 7, 4)


def _filled(value: float) -> Callable[[], Tensor]:
    return lambda: torch.full((1, 7, 4), value)


def _one_bad_entry(value: float) -> Callable[[], Tensor]:
    def record() -> Tensor:
        x = torch.randn(1, 7, 4)
        x[0, 3, 2] = value
        return x

    return record


RECORDS: dict[str, Callable[[], Tensor]] = {
    "ordinary": _random(1.0),
    "large": _random(1e4),
    "huge": _random(1e18),
    "overflowing": _random(1e30),
    "largest": _filled(torch.finfo(torch.float32).max),
    "tiny": _random(1e-30),
    "subnormal": _filled(1e-42),
    "blank": _filled(0.0),
    "nan": _one_bad_entry(torch.nan),
    "inf": _one_bad_entry(torch.inf),
    "minus_inf": _one_bad_entry(-torch.inf),
    "all_nan": _filled(torch.nan),
}
MODES: dict[str, dict[str, Any]] = {
    "flat": {},
    "materialize": {"norm_algorithm": "materialize"},
    "ghost": {"norm_algorithm": "ghost"},
    "recompute": {"norm_algorithm": "recompute", "memory_budget": 1.0},
    "per_layer": {"clipping": "per_layer"},
    "group": {"clipping": "group", "groups": {"project.*": 0.3, "*": 0.4}},
    "automatic": {"clipping": "automatic"},
}


@pytest.fixture(scope="module", params=MODES)
def release(request: pytest.FixtureRequest, backend: str) -> Release:
    """One compiled model a mode; its graphs are kept for all neighbours."""
    torch._dynamo.reset()
    return Release(backend, **MODES[request.param])


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    """Overrides the suite's: a reset of Dynamo between the tests would compile the module's releases again."""
    torch.manual_seed(1)


@pytest.mark.parametrize("record", RECORDS)
def test_remove_or_add(release: Release, record: str) -> None:
    """At most C, wherever in the batch the record stands."""
    others = torch.randn(BATCH, 7, 4)
    for place in (0, 2, BATCH):
        batch = torch.cat([others[:place], RECORDS[record](), others[place:]])
        assert release.distance(batch, others) <= NORM * (1 + SLACK)


@pytest.mark.parametrize("record", RECORDS)
def test_replace_or_blank(release: Release, record: str) -> None:
    """At most 2 C for a replaced record; at most C (1 + slack) more than what the ordinary one held."""
    batch = torch.randn(BATCH, 7, 4)
    neighbour = batch.clone()
    neighbour[1] = RECORDS[record]()[0]
    assert release.distance(batch, neighbour) <= 2 * NORM * (1 + SLACK)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e8])
def test_opposite_records(release: Release, scale: float) -> None:
    """The worst neighbour: the same record with its sign turned; and many copies of one, which must still add up."""
    batch = scale * torch.randn(BATCH, 7, 4)
    neighbour = batch.clone()
    neighbour[3] *= -1
    assert release.distance(batch, neighbour) <= 2 * NORM * (1 + SLACK)
    copies = batch[:1].expand(BATCH, -1, -1).contiguous()
    assert norm(release(copies)) <= BATCH * NORM * (1 + SLACK)


def test_record_that_is_clipped_reaches_the_bound(release: Release) -> None:
    """Not by returning too little: a record well above the norm contributes C (its groups', all of them together)."""
    others = torch.randn(BATCH, 7, 4)
    batch = torch.cat([others, 50 * torch.randn(1, 7, 4)])
    assert release.distance(batch, others) >= 0.97 * NORM


def test_random_neighbours(release: Release) -> None:
    """Forty random pairs over eight orders of magnitude."""
    for _ in range(40):
        batch = torch.randn(BATCH, 7, 4) * torch.logspace(-4, 4, 9)[torch.randint(9, (BATCH, 1, 1))]
        neighbour = batch.clone()
        neighbour[torch.randint(BATCH, ())] = torch.randn(7, 4) * 10 ** (8 * torch.rand(()).item() - 4)
        assert release.distance(batch, neighbour) <= 2 * NORM * (1 + SLACK)


def test_bad_record_contributes_exactly_zero(release: Release) -> None:
    """Bit for bit what zero in its place would give; the others do not notice that it was there."""
    batch = torch.randn(BATCH, 7, 4)
    with_nan, with_inf = batch.clone(), batch.clone()
    with_nan[2], with_inf[2] = torch.nan, torch.inf
    a, b = release(with_nan), release(with_inf)
    assert all(torch.equal(a[name], b[name]) for name in a)
    alone = release(torch.cat([batch[:2], batch[3:]]))
    assert norm({name: a[name] - alone[name] for name in a}) <= 1e-5 * norm(alone)


def test_batch_of_bad_records_only(release: Release) -> None:
    assert not any(value.any() for value in release(torch.full((BATCH, 7, 4), torch.nan)).values())


class Weighted(nn.Module):
    """``sum_t w_t (x_t W)``: the caller chooses each token's gradient, so tokens can be made to cancel each other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return (w * (x @ self.weight)).flatten(1).sum(1)


class WeightedTable(nn.Module):
    """The same for an embedding that is also a head: two uses of one weight, made to cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        rows = self.table(torch.arange(2, device=x.device).expand(x.shape[0], -1))
        read = (w[:, :1] * rows[:, :1]).flatten(1).sum(1)
        return read + (w[:, 1:] * (x[:, 1:] @ self.table.weight)).flatten(1).sum(1)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("algorithm", ["auto", "materialize", "ghost", "flash"])
@pytest.mark.parametrize("build", [Weighted, WeightedTable])
def test_cancelling_tokens(build: type[nn.Module], algorithm: str, size: float, backend: str) -> None:
    """A record whose tokens all but cancel: rounding must not hide from the norm what it leaves in the sum."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build()
    options = {"max_grad_norm": NORM, "noise_multiplier": 0.0, "loss_reduction": "sum", "norm_algorithm": algorithm}
    compiled = torch.compile(model, backend=backend, options=options)
    for gap in (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        x = torch.eye(4)[:1].expand(3, 2, -1) if build is WeightedTable else torch.randn(3, 1, 4).expand(-1, 2, -1)
        w = torch.tensor([1.0, -1.0 - gap])[None, :, None] * torch.tensor([size, 0.0, 0.0])[:, None, None]
        model.zero_grad()
        compiled(x.contiguous(), w * torch.randn(8)).sum().backward()
        (gradient,) = gradients_of(model).values()
        assert gradient.norm().item() <= NORM * (1 + SLACK), f"relative gap {gap}"


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("algorithm", ["auto", "materialize", "ghost", "flash"])
@pytest.mark.parametrize(("given", "back"), [(1e19, 1e-18), (1e24, 1e-24), (1e-24, 1e24)])
def test_squares_that_float32_cannot_hold(given: float, back: float, algorithm: str, tokens: int, backend: str) -> None:
    """A record whose input is huge and whose gradient is tiny for it, as in front of a layer that normalises."""
    model = Weighted()
    options = {"max_grad_norm": NORM, "noise_multiplier": 0.0, "loss_reduction": "sum", "norm_algorithm": algorithm}
    compiled = torch.compile(model, backend=backend, options=options)
    x, w = torch.zeros(2, tokens, 4), torch.zeros(2, tokens, 8)
    x[0], w[0] = given * (1 + torch.rand(tokens, 4)), back * (1 + torch.rand(tokens, 8))
    compiled(x, w).sum().backward()
    released = norm(gradients_of(model))
    dropped = algorithm == "flash" and released == 0  # what its terms add up to at most is more than float32 holds
    assert released == pytest.approx(NORM, rel=1e-3) or dropped


class Rowed(nn.Module):
    """Rows of a table by number; Python's negative numbers count from its end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 3))

    def forward(self, ids: Tensor, weight: Tensor) -> Tensor:
        return (self.table[ids] * weight).sum((1, 2))


@pytest.mark.parametrize("algorithm", ["auto", "ghost", "materialize"])
def test_two_names_of_one_row(algorithm: str, backend: str) -> None:
    """Row 5 of 6 is row -1 too: its two gradients add before they are squared."""
    model = Rowed()
    options = {"max_grad_norm": NORM, "noise_multiplier": 0.0, "loss_reduction": "sum", "norm_algorithm": algorithm}
    compiled = torch.compile(model, backend=backend, options=options)
    ids, weight = torch.tensor([[5, -1, 2], [0, 1, 2]]), torch.ones(2, 3, 3)
    weight[1] = 0
    compiled(ids, weight).sum().backward()
    assert norm(gradients_of(model)) == pytest.approx(NORM, rel=1e-4)
