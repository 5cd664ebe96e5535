"""The planner's order of algorithms against this machine's own timings, wherever those differ clearly.

Nothing here says how long anything takes: measured steps are compared with each other, and predictions with each other.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashnorm_compile

OPTIONS: dict[str, Any] = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "memory_budget": 100.0}
ALGORITHMS = ("materialize", "ghost", "flash")
# Timings that are closer than this say nothing about an order.
CLEAR = 1.2
# (samples, positions, columns, rows): few positions of a large weight, many of a small one, and as many as the weight is wide.
SHAPES = [(64, 8, 256, 256), (2, 512, 64, 64), (16, 160, 128, 128)]


def layer(shape: tuple[int, int, int, int]) -> tuple[nn.Module, Tensor]:
    batch, length, columns, rows = shape
    return nn.Linear(columns, rows, bias=False), torch.randn(batch, length, columns)


def predicted(shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Microseconds that each algorithm adds to the step."""
    model, x = layer(shape)
    row = flashnorm_compile.explain(model, x, options=OPTIONS).parameters[0]
    return {algorithm: row["considered"][algorithm] for algorithm in ALGORITHMS}


def private_step(shape: tuple[int, int, int, int], algorithm: str) -> Callable[[], None]:
    model, x = layer(shape)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="flashnorm", dynamic=False, options=OPTIONS | {"norm_algorithm": algorithm})

    def step() -> None:
        model.weight.grad = None
        compiled(x).sum().backward()

    step()
    return step


def measured(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of a step, the lower quartile of interleaved ones: what else the machine does only ever slows one down."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(24):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.quantiles(seconds, n=4)[0] for name, seconds in taken.items()}


def clear_pairs(seconds: dict[str, float]) -> set[tuple[str, str]]:
    """(faster, slower), where there can be no doubt."""
    return {(a, b) for a, b in itertools.permutations(seconds, 2) if seconds[b] > CLEAR * seconds[a]}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_predicted_order_is_the_measured_one(shape: tuple[int, int, int, int]) -> None:
    expected = predicted(shape)
    steps = {algorithm: private_step(shape, algorithm) for algorithm in ALGORITHMS}
    # A pair counts if it is clearly apart in both of two measurements, in the same order.
    pairs = clear_pairs(measured(steps)) & clear_pairs(measured(steps))
    wrong = {(a, b) for a, b in pairs if expected[a] > expected[b]}
    assert not wrong, f"measured to be faster, predicted to be slower: {wrong}, predicted {expected}"


def test_the_order_depends_on_the_shape() -> None:
    """One table for all shapes would not pass."""
    few, many = predicted((64, 8, 256, 256)), predicted((2, 512, 64, 64))
    assert few["ghost"] < few["flash"]
    assert many["flash"] < many["ghost"]
