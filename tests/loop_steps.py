"""What any loop hands to its optimizer, step by step, and what the oracle says about it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from oracle import (
    Clipped,
    Gradients,
    SampleLoss,
    assert_agree,
    clip,
    double_copy,
    gradients_of,
    halving_options,
    per_sample_gradients,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Step = tuple[nn.Module, Gradients]


@contextmanager
def recorded_steps(model: nn.Module) -> Iterator[list[Step]]:
    """For each optimizer step a float64 copy of the model before it, and the gradients that it uses."""
    steps: list[Step] = []
    plain = copy.deepcopy(model)  # the model itself gets hooks and compiled calls, which do not copy
    twins: list[nn.Module] = []

    def before(*_: Any) -> None:
        plain.load_state_dict({_plain(name): value for name, value in model.state_dict().items()})
        twins.append(double_copy(plain))

    def after(*_: Any) -> None:  # only now: a closure computes gradients within the step
        steps.append((twins.pop(), {_plain(name): gradient for name, gradient in gradients_of(model).items()}))

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def clipping_options(
    model: nn.Module, loss: SampleLoss, size: int, clipping: str = "flat", groups: tuple[str, ...] = (), **options: Any
) -> dict[str, Any]:
    """Noiseless options whose norm cuts about half of the samples."""
    return halving_options(per_sample_gradients(double_copy(model), loss, size), clipping, groups) | options


def expected(twin: nn.Module, loss: SampleLoss, size: int, options: dict[str, Any]) -> Clipped:
    """The oracle on all ``size`` samples; they may have come in several micro-batches."""
    judged = {"expected_batch_size": size} | options
    judged.pop("accumulation_steps", None)
    return clip(per_sample_gradients(twin, loss, size), judged)


def assert_steps(steps: list[Step], count: int, loss: SampleLoss, size: int, options: dict[str, Any]) -> None:
    """Every step's gradients are the oracle's, on a model that moved in between; clipping mattered in the first."""
    assert len(steps) == count
    for number, (twin, got) in enumerate(steps):
        want = expected(twin, loss, size, options)
        assert_agree(got, want.released)
        assert number or 0 < want.clipped_fraction < 1
    first, last = (torch.cat([p.flatten() for p in twin.parameters()]) for twin, _ in (steps[0], steps[-1]))
    assert count == 1 or not torch.equal(first, last)
