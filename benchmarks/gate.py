"""The gradient gate: no time is reported for a private step whose gradients are wrong.

The reference is a loop over samples with plain eager autograd, in float64 unless the case says otherwise. It shares no
code with the library or with any contender.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.case import Problem

TOLERANCE = 1e-4

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """What a private step has to release without noise: clipped mean gradients and the clipping norm they belong to."""

    gradients: Gradients
    max_grad_norm: float


class Oracle:
    """Per-sample gradients of a problem, one sample at a time.

    The clipping norm is the median of the samples' norms (half the norm where B is 1), so that about half of them are
    clipped. For `clipping="per_layer"` each of the K modules that own parameters is clipped at its part of it, C / sqrt(K).
    """

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        twin = dataclasses.replace(problem, model=copy.deepcopy(problem.model))
        self.problem = twin.to(str(problem.targets.device), dtype)
        self.references: dict[str, Reference] = {}

    def reference(self, clipping: str) -> Reference:
        """The reference for "flat" or "per_layer" clipping."""
        if clipping not in self.references:
            self.references[clipping] = self._reference(clipping)
        return self.references[clipping]

    def rounding_error(self, gradients: Mapping[str, Tensor | None]) -> float:
        """The error of non-private mean gradients: what this model costs anybody in this precision."""
        problem = self.problem
        return gradient_error(
            gradients, _gradients(problem.model, problem.mean_loss(problem.model)(*problem.inputs, problem.targets))
        )

    def _reference(self, clipping: str) -> Reference:
        group_of = {name: _group(name, clipping) for name, _ in _trainable(self.problem.model)}
        norms = [math.hypot(*_group_norms(self._sample_gradients(b), group_of).values()) for b in self._samples()]
        max_grad_norm = sorted(norms)[(len(norms) - 1) // 2] if len(norms) > 1 else norms[0] / 2
        bound = max_grad_norm / math.sqrt(len(set(group_of.values())))
        total = {name: torch.zeros_like(parameter) for name, parameter in _trainable(self.problem.model)}
        for b in self._samples():
            gradients = self._sample_gradients(b)
            factors = {group: min(1.0, bound / norm) if norm else 1.0 for group, norm in _group_norms(gradients, group_of).items()}
            for name, gradient in gradients.items():
                total[name].add_(gradient, alpha=factors[group_of[name]] / self.problem.batch_size)
        return Reference(total, max_grad_norm)

    def _samples(self) -> range:
        return range(self.problem.batch_size)

    def _sample_gradients(self, index: int) -> dict[str, Tensor]:
        sample = self.problem.sample(index)
        return _gradients(sample.model, sample.loss(sample.model(*sample.inputs), sample.targets).sum())


# A gradient that is zero on paper (a key's bias under softmax) is what rounding leaves of terms as large as its neighbours',
# so a parameter with less than this share of the whole gradient is measured against that share.
SMALL = 1e-2


def gradient_error(gradients: Mapping[str, Tensor | None], reference: Gradients) -> float:
    """The largest distance over the reference's parameters, each relative to the parameter's own gradient or to 1 % of the whole
    one, whichever is larger; infinite where a gradient is missing or not finite."""
    least = SMALL * math.hypot(*(float(wanted.norm()) for wanted in reference.values()))
    return max(_relative_distance(gradients.get(name), wanted, least) for name, wanted in reference.items())


def _relative_distance(gradient: Tensor | None, reference: Tensor, least: float) -> float:
    if gradient is None:
        return math.inf
    scale = max(float(reference.norm()), least)
    distance = float((gradient.detach().to(reference) - reference).norm())
    error = distance / scale if scale else distance
    return error if math.isfinite(error) else math.inf


def _group(name: str, clipping: str) -> str:
    return {"flat": "all", "per_layer": name.rpartition(".")[0]}[clipping]


def _group_norms(gradients: Gradients, group_of: Mapping[str, str]) -> dict[str, float]:
    squares: dict[str, float] = collections.defaultdict(float)
    for name, gradient in gradients.items():
        squares[group_of[name]] += float(gradient.double().square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}


def _trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*_trainable(model), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))
