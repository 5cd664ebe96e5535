"""Flat, per-layer, group and automatic clipping; both norm algorithms; both reductions and every divisor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.algebra import Mlp
from models.zoo import ZOO
from one_graph import compiled_once
from oracle import (
    assert_agree,
    case_gradients,
    check,
    clip,
    gradients_of,
    halving_options,
    private_gradients,
)

import flashnorm_compile

GROUPS = {
    "mlp_over_time": ("first.*", "*.bias", "*"),
    "gpt2": ("*wte*", "*attn*", "*"),
    "resnet_groupnorm": ("*norm*", "*"),
    "tied_by_function": ("embedding.*", "*"),
}
MODES = ("flat", "per_layer", "group", "automatic")


@pytest.mark.parametrize("name", GROUPS)
def test_modes(name: str, backend: str) -> None:
    with compiled_once() as graphs:
        for clipping in MODES:
            check(ZOO[name], backend=backend, clipping=clipping, groups=GROUPS[name] if clipping == "group" else ())
    assert len(graphs) == 1


@pytest.mark.parametrize("clipping", MODES)
def test_mode(clipping: str, backend: str) -> None:
    """Compiled for itself."""
    case = ZOO["mlp_over_time"]
    check(case, backend=backend, clipping=clipping, groups=GROUPS[case.name] if clipping == "group" else ())


@pytest.mark.parametrize("algorithm", ["materialize", "ghost", "flash", "recompute"])
@pytest.mark.parametrize("name", [*GROUPS, "attention", "gru_cell", "unet", "siamese", "bert_masked"])
def test_norm_algorithm(name: str, algorithm: str, backend: str) -> None:
    # A second backward begins as far up as it can where there is no memory to spare.
    budget = {"memory_budget": 1.0} if algorithm == "recompute" else {}
    with compiled_once() as graphs:
        for clipping in ("flat", "per_layer"):
            check(ZOO[name], backend=backend, clipping=clipping, norm_algorithm=algorithm, **budget)
    assert len(graphs) == 1


def test_norm_algorithm_by_glob(backend: str) -> None:
    check(ZOO["gpt2"], backend=backend, norm_algorithm={"*attn*weight": "ghost", "*mlp*": "materialize"})


@pytest.mark.slow
@pytest.mark.parametrize("clipping", ["per_layer", "automatic"])
def test_mode_through_inductor(clipping: str) -> None:
    check(ZOO["mlp_over_time"], backend="flashnorm", clipping=clipping)


@pytest.mark.parametrize("stability", [1e-3, 1.0])
def test_stability_constant(stability: float, backend: str) -> None:
    check(ZOO["mlp"], backend=backend, clipping="automatic", stability_constant=stability)


@pytest.mark.parametrize(
    "extra",
    [
        {"loss_reduction": "sum"},
        {"expected_batch_size": 11.5},
        {"accumulation_steps": 1, "expected_batch_size": 3.0},
        {"loss_reduction": "sum", "expected_batch_size": 11.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_divisor(name: str, extra: dict[str, Any], backend: str) -> None:
    """Only ``mean`` divides; the expected batch size wins over the physical one. A sample's gradient stays its own."""
    check(ZOO[name], backend=backend, **extra)


def test_loose_norm_changes_nothing(backend: str) -> None:
    """With a clipping norm that nobody reaches, the release is the plain mean gradient."""
    case = ZOO["attention"]
    model, inputs, targets = case.make()
    samples = case_gradients(case, model, inputs, targets)
    options = {"max_grad_norm": 1e6, "noise_multiplier": 0.0}
    want = {name: torch.stack([s[name] for s in samples]).mean(0) for name in samples[0]}
    assert_agree(private_gradients(case, model, inputs, targets, options, backend), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("clipping", MODES)
def test_sample_that_is_not_finite_adds_zero(bad: float, clipping: str, backend: str) -> None:
    """Exactly zero: the release is that of the others, and finite."""
    case = ZOO["mlp_over_time"]
    model, inputs, targets = case.make()
    groups = GROUPS[case.name] if clipping == "group" else ()
    options = halving_options(case_gradients(case, model, inputs, targets), clipping, groups)
    inputs["x"][2, 1, 3] = bad
    want = clip(case_gradients(case, model, inputs, targets), options)
    assert all(factors[2] == 0 for factors in want.factors.values())
    assert_agree(private_gradients(case, model, inputs, targets, options, backend), want.released)


def test_clipping_norm_changes_without_recompiling(backend: str) -> None:
    """A new clipping norm takes effect at the next backward, in the same compiled graphs."""
    torch.manual_seed(3)
    model, x = Mlp(), torch.randn(5, 6)
    counters = torch._dynamo.utils.counters
    options = {"max_grad_norm": 1e-2, "noise_multiplier": 0.0, "loss_reduction": "sum"}
    compiled = torch.compile(model, backend=backend, options=options)
    compiled(x).square().sum().backward()
    graphs = counters["stats"]["unique_graphs"]
    small = gradients_of(model)
    flashnorm_compile.privacy(model).max_grad_norm = 3e-2
    model.zero_grad()
    compiled(x).square().sum().backward()
    assert counters["stats"]["unique_graphs"] == graphs
    assert_agree(gradients_of(model), {name: 3 * value for name, value in small.items()})


def test_statistics_of_the_last_step(backend: str) -> None:
    case = ZOO["mlp"]
    model, inputs, targets = case.make()
    options = halving_options(case_gradients(case, model, inputs, targets), "flat")
    inputs["x"][0, 0] = torch.nan
    private_gradients(case, model, inputs, targets, options, backend)
    last = flashnorm_compile.privacy(model).last
    assert (last.batch_size, last.nonfinite) == (6, 1)
    assert last.clipped_fraction == pytest.approx(0.5)
