"""Gradients that a second backward computes instead of holding them: the same release, in less memory, behind the clip factors.

The comparison with the oracle stands in test_clipping_modes.py and test_every_algorithm.py, with that of the other algorithms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from flashnorm_compile.passes import _compat, kernels
from models.algebra import Stack
from models.sequence import WIDTH, Checkpointed
from models.zoo import ZOO
from oracle import check, gradients_of
from torch import Tensor, fx, nn

import flashnorm_compile
from benchmarks.timing import peak_tensor_bytes
from flashnorm_compile.backend import compile_private
from flashnorm_compile.options import Options

OPTIONS: dict[str, Any] = {"max_grad_norm": 0.1, "noise_multiplier": 0.0}


@pytest.mark.parametrize("name", ["gpt2", "tied_by_function", "resnet_groupnorm"])
def test_oracle_of_the_kernels_operators(name: str) -> None:
    with mock.patch.object(kernels, "fused", return_value=True):
        check(ZOO[name], norm_algorithm="recompute", memory_budget=1.0, clipping="per_layer")


def step(model: nn.Module, x: Tensor, backend: str = "flashnorm_eager", **options: Any) -> Callable[[], None]:
    compiled = torch.compile(model, backend=backend, dynamic=False, options=OPTIONS | options)

    def run() -> None:
        model.zero_grad()
        torch.manual_seed(3)  # of dropout
        compiled(x).backward()

    return run


def released(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    step(twin, x, **options)()
    return gradients_of(twin)


def assert_same(model: nn.Module, x: Tensor, **options: Any) -> None:
    """The release from held gradients, but for the rounding of the clip factors: norms may come from inner products or not."""
    held = released(model, x, norm_algorithm="ghost", **options)
    again = released(model, x, norm_algorithm="recompute", memory_budget=1.0, **options)
    for name, value in held.items():
        close = 2 * torch.finfo(value.dtype).eps if value.dtype == torch.bfloat16 else 2e-6
        assert (again[name] - value).norm() <= close * value.norm(), name
    assert any(value.abs().max() > 0 for value in held.values())
    assert all(value.isfinite().all() for value in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_backward_computes_what_the_first_did(dtype: torch.dtype) -> None:
    assert_same(Stack(16, 4).to(dtype), torch.randn(5, 7, 16, dtype=dtype))


class Scored(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square().mean()


def test_dropout_keeps_its_masks() -> None:
    layers = [nn.Linear(16, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16)]
    assert_same(Scored(nn.Sequential(*layers)), torch.randn(5, 7, 16))


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointed_regions(selective: bool) -> None:
    assert_same(Scored(Checkpointed(selective, dropout=0.3)), torch.randn(3, 6, WIDTH))


def test_a_sample_that_is_not_finite_adds_nothing() -> None:
    model, x = Stack(16, 3), torch.randn(4, 7, 16)
    x[1, 2, 3] = float("nan")
    assert_same(model, x)


def private_graph(model: nn.Module, x: Tensor, **options: Any) -> fx.Graph:
    kept: list[fx.Graph] = []

    def observe(stage: str, graph: fx.Graph, outcome: Any) -> None:
        if stage == "after":
            kept.append(graph)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        given = Options.parse(OPTIONS | options)
        return compile_private(gm, example_inputs, given, inner_compile=_compat.run_graph, observers=(observe,), protect=False)

    torch.compile(model, backend=backend)(x).backward()
    return kept[0]


def test_what_is_computed_again_waits_for_the_clip_factors() -> None:
    """Otherwise a compiler could merge it with the first backward, and hold it after all."""
    graph = private_graph(Stack(16, 4), torch.randn(8, 4, 16), norm_algorithm="recompute", memory_budget=1.0)
    late = set(graph.find_nodes(op="call_function", target=torch.ops.flashnorm.release.default))
    for node in graph.nodes:
        if not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    sums = graph.find_nodes(op="call_function", target=torch.ops.flashnorm.clipped_sum.default)
    assert len(sums) == 4
    assert all(node.args[0] in late for node in sums)
    first = [node for node in graph.nodes if node.target is torch.ops.aten.mm.default and node not in late]
    again = [node for node in graph.nodes if node.target is torch.ops.aten.mm.default and node in late]
    assert len(first) == 7, "four products forward, three backward"
    assert len(again) == 3, "each gradient once"


def rows(model: nn.Module, x: Tensor, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    report = flashnorm_compile.explain(model, x, options=OPTIONS | options).to_dict()
    return {row["name"]: row for row in report["parameters"]}, report


def test_it_is_chosen_where_nothing_else_fits_the_budget() -> None:
    model, x = Stack(), torch.randn(64, 16, 64)
    plan, report = rows(model, x, memory_budget=1.3)
    chosen = [row["algorithm"] for row in plan.values()]
    assert "recompute" in chosen
    assert report["predicted_private_peak_bytes"] <= 1.3 * report["predicted_peak_bytes"]
    assert any("would be faster and does not fit the memory budget" in row["why"] for row in plan.values())
    ample, faster = rows(model, x, memory_budget=100.0)
    assert "recompute" not in {row["algorithm"] for row in ample.values()}
    assert faster["predicted_ratio"] < report["predicted_ratio"]


@pytest.mark.slow
def test_it_takes_less_memory_as_predicted() -> None:
    """Measured: gradients of the layers' outputs are as large as all that the forward saves."""
    x = torch.randn(64, 16, 64)
    taken = {}
    for algorithm in ("ghost", "recompute"):
        torch._dynamo.reset()
        model = Stack(layers=6)
        once = step(model, x, "flashnorm", norm_algorithm=algorithm, memory_budget=1.0)
        once()
        model.zero_grad()
        taken[algorithm] = peak_tensor_bytes(once)
    _, report = rows(Stack(layers=6), x, norm_algorithm="recompute", memory_budget=1.0)
    assert taken["recompute"] < taken["ghost"] - 2 * x.nbytes, taken
    # The clipped sum copies both operands of a few samples, and scales one of them.
    predicted = report["predicted_private_peak_bytes"]
    assert 0.9 * predicted < taken["recompute"] < 1.1 * (predicted + 3 * x.nbytes)


def test_one_glob_asks_for_it() -> None:
    plan, _ = rows(Stack(16, 3), torch.randn(4, 5, 16), memory_budget=100.0, norm_algorithm={"layers.1.*": "recompute"})
    assert plan["layers.1.weight"]["algorithm"] == "recompute"
    assert "asked for by norm_algorithm" in plan["layers.1.weight"]["why"]
    assert {plan[f"layers.{i}.weight"]["algorithm"] for i in (0, 2)} != {"recompute"}


def test_where_it_cannot_be_the_error_says_why() -> None:
    _, report = rows(Scored(nn.LayerNorm(4)), torch.randn(3, 5, 4), norm_algorithm={"inner.weight": "recompute"})
    assert "norm_algorithm={'inner.weight': 'recompute'} does not fit 'inner.weight'" in report["refused"]
    assert "whose operands the backward could compute a second time" in report["refused"]
