"""What is timed: a model, one batch of it, and a loss of its own for each sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Problem:
    """A model with one batch.

    `inputs` and `targets` hold B samples along dimension 0. `loss(outputs, targets)` gives one loss for each sample, [B];
    what is trained is their mean. A parameter that is frozen stays so for every contender.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def batch_size(self) -> int:
        return self.targets.shape[0]

    def mean_loss(self, model: nn.Module) -> nn.Module:
        """A module that takes `*inputs, targets` and returns the mean loss of `model`; its parameters are `model`'s."""
        return WithLoss(model, self.loss)

    def sample(self, index: int) -> Problem:
        """The same with sample `index` alone."""
        chosen = slice(index, index + 1)
        return dataclasses.replace(self, inputs=tuple(x[chosen] for x in self.inputs), targets=self.targets[chosen])

    def to(self, device: str, dtype: torch.dtype) -> Problem:
        """The same on `device`, with floating-point parameters and inputs in `dtype`."""
        cast = tuple(x.to(device, dtype) if x.is_floating_point() else x.to(device) for x in (*self.inputs, self.targets))
        return dataclasses.replace(self, model=self.model.to(device, dtype), inputs=cast[:-1], targets=cast[-1])


class WithLoss(nn.Module):
    """A model and its loss as one module, so that both are compiled together."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> Tensor:
        *inputs, targets = batch
        return self.loss(self.model(*inputs), targets).mean()


@dataclass(frozen=True)
class Stack:
    """Builds a problem whose model is a stack of `layers` equal blocks, or has runs of at most so many of them.

    Code for `shallow` of them holds everything that is in the code for all: a first block, a last one, and what stands between
    two. `of(layers)` makes the problem with another number.
    """

    layers: int
    of: Callable[[int], Problem]
    shallow: int = 2

    def __call__(self) -> Problem:
        return self.of(self.layers)


@dataclass(frozen=True)
class Case:
    """One row group of a suite: `build()` makes the problem in float32, on PyTorch's default device, after a fixed torch seed.

    `point` holds the coordinates that the report plots and sorts by, such as {"B": 1, "T": 4096}. `headline` cases of a
    suite run before all others. `target` is the largest ratio to the compiled non-private step that an issue accepts.
    `like` names a case of the same suite, with the same contenders or more, whose graph differs in sizes only.
    """

    name: str
    description: str
    build: Callable[[], Problem]
    point: Mapping[str, int] = field(default_factory=dict)
    precisions: tuple[str, ...] = ("float32",)
    headline: bool = False
    like: str | None = None
    target: float | None = None
    oracle_dtype: torch.dtype = torch.float64
    contenders: tuple[str, ...] | None = None
    """Names of the contenders that take part; None for all."""


@dataclass(frozen=True)
class Suite:
    """Cases that answer one question, at sizes for two CPU cores and at the sizes of the papers."""

    name: str
    title: str
    small: tuple[Case, ...]
    paper: tuple[Case, ...]

    def cases(self, sizes: str) -> tuple[Case, ...]:
        return {"small": self.small, "paper": self.paper}[sizes]


def in_order(suites: Sequence[Suite], sizes: str) -> list[tuple[Suite, Case]]:
    """All cases in the order in which they run: headlines before others, and the suites in turn.

    So a run that its time ends early has the first cases of every suite, and not all cases of the first suites.
    """
    ranked = []
    for suite in suites:
        for headline in (True, False):
            cases = [case for case in suite.cases(sizes) if case.headline is headline]
            ranked += [(not headline, rank, suite, case) for rank, case in enumerate(cases)]
    return [(suite, case) for *_, suite, case in sorted(ranked, key=lambda one: one[:2])]


def per_sample(loss: Callable[..., Tensor], **settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over all but dimension 0 of an elementwise loss such as `F.mse_loss`."""

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss(outputs, targets, reduction="none", **settings).flatten(1).mean(1)

    return losses


def token_cross_entropy(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """Mean cross-entropy of each sample's T tokens, [B]."""
    return nn.functional.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten(), reduction="none").view_as(targets_bt).mean(1)


def class_cross_entropy(logits_bc: Tensor, targets_b: Tensor) -> Tensor:
    """Cross-entropy of each sample, [B]."""
    return nn.functional.cross_entropy(logits_bc, targets_b, reduction="none")
