"""The zoo against the oracle: every model's private gradients, parameter by parameter."""

from __future__ import annotations

import pytest
import torch
from flashnorm_compile.passes.errors import PrivacyError
from models.sequence import Checkpointed, Dropped
from models.zoo import ZOO
from oracle import assert_agree, case_gradients, check, clip, gradients_of, halving_options, norm

# One of each kind through Inductor's code generation; FLASHNORM_TEST_BACKEND=flashnorm sends the whole zoo through it.
THROUGH_INDUCTOR = ("mlp_over_time", "gpt2", "unet", "gru_cell", "checkpointed")


@pytest.mark.parametrize("name", ZOO)
def test_oracle_is_sound(name: str) -> None:
    """Unclipped, the oracle's samples add up to the whole batch's gradient: each case's slices and shares are right."""
    case = ZOO[name]
    model, inputs, targets = case.make()
    samples = case_gradients(case, model, inputs, targets, double=False)
    case.loss(model(**inputs), targets).backward()
    # The batch divides by its own valid tokens, the oracle by a fixed number of them.
    scale = case.share(inputs) / case.batch_size if case.share(inputs) != 1.0 else 1.0
    whole = {name: scale * gradient for name, gradient in gradients_of(model).items()}
    assert_agree(whole, {name: torch.stack([s[name] for s in samples]).mean(0) for name in whole})


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str, backend: str) -> None:
    case = ZOO[name]
    try:
        check(case, backend=backend)
    except PrivacyError:
        if not case.may_refuse:
            raise


@pytest.mark.slow
@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_zoo_through_inductor(name: str) -> None:
    check(ZOO[name], backend="flashnorm")


def _bf16_errors(name: str, backend: str, parameters: bool) -> tuple[float, float]:
    """Distance of the private and of a plain bf16 loop's clipped gradient from the float64 oracle, relative."""
    case = ZOO[name]
    model, inputs, targets = case.make()
    dtype = torch.bfloat16 if parameters else torch.float32
    model, inputs, targets = model.to(dtype), _cast(inputs, dtype), _cast(targets, dtype)
    exact = case_gradients(case, model, inputs, targets)
    options = halving_options(exact, "flat")
    want = clip(exact, options).released
    with torch.autocast("cpu", torch.bfloat16, enabled=not parameters):
        plain = clip(case_gradients(case, model, inputs, targets, double=False), options).released
        compiled = torch.compile(model, backend=backend, options=options | case.options)
        loss = case.loss(compiled(**inputs), targets)
    loss.backward()
    got = gradients_of(model)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    return tuple(norm({n: found[n].double() - want[n] for n in want}) / norm(want) for found in (got, plain))  # type: ignore[return-value]


def _cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


@pytest.mark.parametrize("parameters", [False, True], ids=["autocast", "parameters"])
@pytest.mark.parametrize("name", ["mlp_over_time", "gpt2", "resnet_groupnorm", "attention", "tied_by_function"])
def test_bf16(name: str, parameters: bool, backend: str) -> None:
    """At most twice the error that plain PyTorch makes in bf16."""
    got, plain = _bf16_errors(name, backend, parameters)
    assert plain > 0
    assert got <= 2 * plain, f"relative error {got:.3e}, plain bf16 {plain:.3e}"


@pytest.mark.parametrize("build", [Dropped, lambda: Checkpointed(dropout=0.3)], ids=["mlp", "checkpointed"])
def test_dropout_clips_every_sample(build: type, backend: str) -> None:
    """Masks are random, so no oracle; but the release is bounded, nonzero, and changes from one step to the next."""
    torch.manual_seed(1)
    model = build()
    x = torch.randn(4, 6) if isinstance(model, Dropped) else torch.randn(4, 5, 8)
    options = {"max_grad_norm": 1e-2, "noise_multiplier": 0.0, "loss_reduction": "sum"}
    compiled = torch.compile(model, backend=backend, options=options)
    releases = []
    for _ in range(2):
        model.zero_grad()
        compiled(x).square().sum().backward()
        releases.append(gradients_of(model))
    assert all(0 < norm(release) <= 4 * 1e-2 * (1 + 1e-3) for release in releases)
    assert norm({n: releases[0][n] - releases[1][n] for n in releases[0]}) > 1e-4


def test_dropout_uses_one_mask(backend: str) -> None:
    """Forward and backward see the same mask: a linear model's release is the input where the output survived."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 64, bias=False), torch.nn.Dropout(0.5))
    options = {"max_grad_norm": 1e9, "noise_multiplier": 0.0, "loss_reduction": "sum"}
    compiled = torch.compile(model, backend=backend, options=options)
    output = compiled(torch.ones(1, 3))
    output.sum().backward()
    weight = model[0].weight
    assert weight.grad is not None
    survived = (output[0] != 0).float()[:, None]
    torch.testing.assert_close(weight.grad, 2 * survived.expand_as(weight))
