"""What is released minus the clipped sum is N(0, (s C)^2), independent everywhere; a wrong scale would be noticed."""

from __future__ import annotations

import math
import os
from typing import Any

import forked
import noise_child
import pytest
import torch
from oracle import Gradients, gradients_of
from torch import Tensor, nn

import flashnorm_compile

SIGMA, NORM, STEPS = 1.3, 0.7, 120
# Chance that a sound release fails one of these checks.
ALPHA = 1e-7
# Two-sided normal quantile of ALPHA, in standard deviations.
QUANTILE = 5.33


class Repeated(nn.Module):
    """Three identical blocks with identical weights: if their noise is ever shared, it shows here."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        for block in self.blocks:
            block.load_state_dict(self.blocks[0].state_dict())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def releases(model: nn.Module, x: Tensor, steps: int, backend: str, reseed: bool = False, **options: Any) -> list[Gradients]:
    """Noise of ``steps`` backward passes: the release minus the same release without noise."""
    private = {"max_grad_norm": NORM, "noise_multiplier": SIGMA, "loss_reduction": "sum"}
    compiled = torch.compile(model, backend=backend, options=private | options)

    def release() -> Gradients:
        if reseed:
            torch.manual_seed(0)
        model.zero_grad()
        compiled(x).square().sum().backward()
        return gradients_of(model)

    found = [release() for _ in range(steps)]
    flashnorm_compile.privacy(model).noise_multiplier = 0.0
    base = release()
    return [{name: value - base[name] for name, value in one.items()} for one in found]


def ks_distance(sample: Tensor, scale: float) -> float:
    """Kolmogorov-Smirnov distance of ``sample`` from N(0, scale^2)."""
    ordered = sample.double().sort().values
    expected = 0.5 * (1 + torch.erf(ordered / (scale * math.sqrt(2))))
    ranks = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return max((ranks[1:] - expected).max().item(), (expected - ranks[:-1]).max().item())


def ks_bound(count: int) -> float:
    """The distance that ``count`` draws of the right law exceed with probability ALPHA (Massart's bound)."""
    return math.sqrt(math.log(2 / ALPHA) / (2 * count))


def uncorrelated(a: Tensor, b: Tensor) -> bool:
    """No linear correlation, sign or not, beyond chance."""
    a, b = a.double().flatten(), b.double().flatten()
    coefficient = (a @ b / (a.norm() * b.norm())).item()
    return abs(coefficient) < QUANTILE / math.sqrt(len(a))


@pytest.fixture(scope="module")
def noise() -> list[Gradients]:
    """Many steps of one model, compiled once."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    return releases(Repeated(), torch.randn(4, 16), STEPS, os.environ.get("FLASHNORM_TEST_BACKEND", "flashnorm_eager"))


def _flat(one: Gradients) -> Tensor:
    return torch.cat([value.flatten() for value in one.values()])


def test_scale_is_right(noise: list[Gradients]) -> None:
    everything = torch.cat([_flat(one) for one in noise])
    bound = ks_bound(len(everything))
    assert ks_distance(everything, SIGMA * NORM) < bound
    for wrong in (0.9, 1.1):
        assert ks_distance(everything, wrong * SIGMA * NORM) > bound


def test_every_parameter_has_the_scale(noise: list[Gradients]) -> None:
    """No parameter hides a wrong scale behind the others; the biases are small but there are many steps."""
    for name in noise[0]:
        sample = torch.cat([one[name].flatten() for one in noise])
        assert ks_distance(sample, SIGMA * NORM) < ks_bound(len(sample)), name


def test_no_correlation_across_blocks_and_parameters(noise: list[Gradients]) -> None:
    stacked = {name: torch.stack([one[name] for one in noise]) for name in noise[0]}
    names = list(stacked)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            count = min(stacked[first][0].numel(), stacked[second][0].numel())
            a, b = (stacked[name].flatten(1)[:, :count] for name in (first, second))
            assert uncorrelated(a, b), f"{first} and {second}"


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_no_correlation_across_steps(noise: list[Gradients], lag: int) -> None:
    stacked = torch.stack([_flat(one) for one in noise])
    assert uncorrelated(stacked[lag:], stacked[:-lag])


def test_no_correlation_within_a_parameter(noise: list[Gradients]) -> None:
    weights = torch.stack([one["blocks.0.weight"] for one in noise])
    assert uncorrelated(weights[:, 1:], weights[:, :-1])
    assert uncorrelated(weights[:, :, 1:], weights[:, :, :-1])


def test_no_draw_twice(noise: list[Gradients]) -> None:
    """Repeated values betray a reused stream even where a correlation would average out."""
    everything = torch.cat([_flat(one) for one in noise])
    # Differences of two float32 numbers round, so equal draws are nearly, not exactly, equal: compare whole tensors.
    rows = torch.stack([one[f"blocks.{i}.weight"].flatten() for one in noise for i in range(3)])
    distances = torch.cdist(rows, rows) + torch.eye(len(rows)) * 1e3
    expected = SIGMA * NORM * math.sqrt(2 * rows.shape[1])
    assert distances.min().item() > 0.6 * expected
    assert everything.isfinite().all()


def test_torch_seed_does_not_fix_the_noise(backend: str) -> None:
    """A loop that seeds torch before every step still gets fresh noise."""
    first, second = releases(Repeated(), torch.randn(4, 16), 2, backend, reseed=True)
    assert uncorrelated(_flat(first), _flat(second))


def test_two_models_in_one_process(backend: str) -> None:
    """Equal models, compiled with equal options, share neither a stream nor a compiled constant."""
    x = torch.randn(4, 16)
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(_flat(releases(Repeated(), x, 1, backend)[0]))
    assert uncorrelated(*pair)


def test_resume_reuses_no_noise(backend: str) -> None:
    """A state restored into a new model goes on behind the steps already taken, explicit seed or not."""
    x = torch.randn(4, 16)
    torch.manual_seed(0)
    model = Repeated()
    before = releases(model, x, 3, backend, seed=11)
    saved = flashnorm_compile.privacy(model).state_dict()
    torch._dynamo.reset()
    torch.manual_seed(0)
    resumed = Repeated()
    options = {"max_grad_norm": NORM, "noise_multiplier": SIGMA, "loss_reduction": "sum", "seed": 11}
    compiled = torch.compile(resumed, backend=backend, options=options)
    output = compiled(x)
    flashnorm_compile.privacy(resumed).load_state_dict(saved)
    flashnorm_compile.privacy(resumed).noise_multiplier = SIGMA
    output.square().sum().backward()
    again = gradients_of(resumed)
    flashnorm_compile.privacy(resumed).noise_multiplier = 0.0
    resumed.zero_grad()
    compiled(x).square().sum().backward()
    after = _flat({name: value - gradients_of(resumed)[name] for name, value in again.items()})
    assert all(uncorrelated(after, _flat(one)) for one in before)
    assert after.std().item() == pytest.approx(SIGMA * NORM, rel=0.2)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"loss_reduction": "mean"}, 1 / 4),
        ({"loss_reduction": "mean", "expected_batch_size": 10}, 1 / 10),
        ({"loss_reduction": "sum", "expected_batch_size": 10}, 1.0),
        ({"clipping": "per_layer"}, 1.0),
        ({"clipping": "automatic"}, 1.0),
        ({"clipping": "group", "groups": {"blocks.0.*": 0.42, "*": 0.56}}, 1.0),
    ],
    ids=str,
)
def test_scale_under_options(options: dict[str, Any], factor: float, backend: str) -> None:
    """s C / L: groups combine to C, so the noise is the same for all modes."""
    found = torch.cat([_flat(one) for one in releases(Repeated(), torch.randn(4, 16), 12, backend, **options)])
    assert ks_distance(found, factor * SIGMA * NORM) < ks_bound(len(found))
    assert ks_distance(found, 1.2 * factor * SIGMA * NORM) > ks_bound(len(found))


def test_bf16_parameters_get_noise(backend: str) -> None:
    """Noise is added in float32 and rounded once with the sum: the scale survives bf16."""
    model = Repeated().bfloat16()
    found = torch.cat([_flat(one).float() for one in releases(model, torch.randn(4, 16).bfloat16(), 12, backend)])
    assert found.std().item() == pytest.approx(SIGMA * NORM, rel=0.05)


@pytest.mark.slow
def test_scale_through_inductor() -> None:
    """Generated code: right scale, blocks and steps apart, and torch's seed does not matter."""
    found = releases(Repeated(), torch.randn(4, 16), 40, "flashnorm", reseed=True)
    stacked = torch.stack([_flat(one) for one in found])
    assert ks_distance(stacked.flatten(), SIGMA * NORM) < ks_bound(stacked.numel())
    assert uncorrelated(stacked[1:], stacked[:-1])
    blocks = [torch.stack([one[f"blocks.{i}.weight"] for one in found]) for i in range(3)]
    assert uncorrelated(blocks[0], blocks[1])
    assert uncorrelated(blocks[1], blocks[2])


@pytest.fixture(scope="module")
def processes() -> list[Tensor]:
    """Gradients of one and the same step from four processes: two without a seed, two with the same one."""
    backend = os.environ.get("FLASHNORM_TEST_BACKEND", "flashnorm_eager")
    options = {"max_grad_norm": NORM, "noise_multiplier": SIGMA, "loss_reduction": "sum"}
    each = [(backend, options | {"seed": seed}) for seed in (None, None, 7, 7)]
    return [torch.tensor(found) for found in forked.results(noise_child.released, each)]


@pytest.mark.parametrize("other", [1, 2], ids=["unseeded", "seeded"])
def test_processes_with_the_same_torch_seed(processes: list[Tensor], other: int) -> None:
    """Processes that start alike (two ranks, two runs of one script) draw different noise."""
    # What is common to both is the clipped sum: their difference is noise alone.
    difference = (processes[0] - processes[other]) / math.sqrt(2)
    assert ks_distance(difference, SIGMA * NORM) < ks_bound(len(difference))


def test_seed_option_repeats(processes: list[Tensor]) -> None:
    """The same explicit seed gives a run its noise again."""
    torch.testing.assert_close(processes[2], processes[3], rtol=1e-6, atol=1e-6)


def test_complex_parameters_get_complex_noise(backend: str) -> None:
    """A complex parameter has two real ones in each entry: both parts carry the full scale, independently."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.randn(16, 64, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(self.turn.dtype) @ self.turn).abs()

    found = torch.stack([one["turn"] for one in releases(Turned(), torch.randn(4, 16), 4, backend)])
    for part in (found.real, found.imag):
        assert ks_distance(part.flatten(), SIGMA * NORM) < ks_bound(part.numel())
    assert uncorrelated(found.real, found.imag)
