"""Dynamic sizes: a plan is made again where another algorithm becomes the better one, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from flashnorm_compile.passes import _compat, plan
from flashnorm_compile.passes.crossovers import _first
from flashnorm_compile.passes.peaks import DATASHEETS
from flashnorm_compile.passes.private_pass import Outcome
from torch import Tensor, fx, nn

from flashnorm_compile.backend import compile_private
from flashnorm_compile.options import Options

OPTIONS: dict[str, Any] = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "memory_budget": 100.0}
# Inner products are worth it up to some 20 positions of a layer of width 256 here; above, its gradients are stored.
PEAKS = replace(
    DATASHEETS[0],
    flops_half=1e9,
    flops_tf32=1e9,
    flops_float32=1e9,
    flops_float64=1e9,
    flops_inner=6e8,
    bandwidth=1e9,
    launch=0.0,
    source="a test",
)


class Compilations:
    """Compiles a model with dynamic sizes and records the algorithms of each compilation."""

    def __init__(self, model: nn.Sequential, **options: Any) -> None:
        self.found: list[list[str]] = []
        self._model = model
        self._options = Options.parse(OPTIONS | options)
        self._compiled = torch.compile(model, backend=self._backend)

    def _backend(self, gm: fx.GraphModule, example_inputs: Any) -> Any:
        def observe(stage: str, graph: fx.Graph, outcome: Outcome | None) -> None:
            if outcome is not None:
                self.found.append([parameter.chosen for parameter in outcome.plan.parameters])

        return compile_private(
            gm, example_inputs, self._options, inner_compile=_compat.run_graph, observers=(observe,), protect=False
        )

    def __call__(self, *shape: int, dynamic: tuple[int, ...] = (1,)) -> int:
        """Runs a step on samples and positions of this shape; how many compilations there have been."""
        x = torch.randn(*shape, self._model[0].in_features)
        for dim in dynamic:
            torch._dynamo.mark_dynamic(x, dim)
        return self.run(x)

    def run(self, x: Tensor) -> int:
        self._model.zero_grad()
        self._compiled(x).square().sum().backward()
        return len(self.found)


@pytest.fixture(autouse=True)
def _known_device() -> Any:
    with mock.patch.object(plan, "peaks_of", return_value=PEAKS):
        yield


def layers(count: int = 1, width: int = 256) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


@pytest.mark.parametrize("count", [1, 3])
def test_crossing_once_compiles_once_more(count: int) -> None:
    """However many layers of one shape there are."""
    steps = Compilations(layers(count))
    assert steps(3, 8) == 1
    assert set(steps.found[0]) == {"ghost"}
    assert steps(3, 4) == steps(3, 12) == steps(3, 18) == 1
    assert steps(3, 40) == 2
    assert set(steps.found[1]) == {"materialize"}
    assert steps(3, 90) == steps(3, 30) == steps(3, 200) == 2
    assert steps(3, 14) == 2, "back on the first side"


def test_a_crossover_that_two_sizes_decide() -> None:
    steps = Compilations(layers())
    assert steps(4, 8, dynamic=(0, 1)) == 1
    assert steps(9, 12, dynamic=(0, 1)) == 1
    assert steps(9, 40, dynamic=(0, 1)) == 2
    assert steps(3, 90, dynamic=(0, 1)) == 2


def test_a_size_that_decides_nothing_is_free() -> None:
    steps = Compilations(layers())
    for batch in (4, 3, 7, 64):
        assert steps(batch, 6, dynamic=(0,)) == 1


def test_a_choice_that_was_asked_for_is_kept() -> None:
    steps = Compilations(layers(), norm_algorithm="ghost")
    assert steps(4, 8) == steps(4, 60) == 1


def test_memory_decides_too() -> None:
    """Per-sample gradients of few positions are larger than everything else: below some length they no longer fit."""
    fast = replace(PEAKS, flops_inner=1.0)  # no inner products
    with mock.patch.object(plan, "peaks_of", return_value=fast):
        steps = Compilations(layers(4, 64), memory_budget=2.0)
        assert steps(4, 512) == 1
        assert steps(4, 400) == 1
        first = steps.found[0]
        assert steps(4, 8) == 2
        assert steps.found[1] != first
        assert steps(4, 480) == 2


@pytest.mark.parametrize("turn", [7, 8, 63, 64, 65, 1000])
def test_the_first_size_that_differs(turn: int) -> None:
    def up(size: int) -> bool:
        return size >= turn

    assert _first(up, 2, 10**6, up=True) == turn
    assert _first(lambda size: size < turn, 2000, 1, up=False) == turn - 1
    assert _first(up, 2, turn - 1, up=True) is None


def test_a_range_that_was_promised_is_left_alone() -> None:
    """``mark_dynamic`` with bounds asks for one graph for all sizes between them, so no guard may split them."""
    steps = Compilations(layers())
    for length in (8, 40):
        x = torch.randn(3, length, 256)
        torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
        assert steps.run(x) == 1
