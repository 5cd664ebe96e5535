"""What a private step has to release: a loop over samples with plain autograd, in float64. Shares no code with anybody."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.case import Problem
from benchmarks.soundness.traps import Loss

Gradients = dict[str, Tensor]

CRITERION = "criterion."
"""Prefix of the names of a loss's own parameters."""


def trained(model: nn.Module, loss: Loss) -> dict[str, nn.Parameter]:
    """All parameters that training has to reach: those of the model and of a criterion that has some. Tied ones once."""
    named = dict(model.named_parameters())
    if isinstance(loss, nn.Module):
        named |= {CRITERION + name: parameter for name, parameter in loss.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def norm(gradients: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all entries of all gradients."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


class Oracle:
    """Clipped sums of a problem's model for any batch of the problem's shapes.

    `clipping` is "flat", "per_layer" (each of the K modules that own parameters is clipped at C / sqrt(K)), or None: not clipped.
    A sample whose norm (that of a module, for "per_layer") is not finite adds nothing.
    """

    def __init__(self, problem: Problem, clipping: str | None) -> None:
        self.clipping = clipping
        self.model = copy.deepcopy(problem.model).double()
        self.loss: Loss = copy.deepcopy(problem.loss)
        if isinstance(self.loss, nn.Module):
            self.loss.double()

    def clipping_norm(self, batch: Problem) -> float:
        """Half-way between the two middle norms of the batch's samples, so that half of them are clipped and none sits at C."""
        norms = sorted(size for size in map(norm, self._samples(batch, self.loss)) if math.isfinite(size))
        return (norms[(len(norms) - 1) // 2] + norms[len(norms) // 2]) / 2

    def clipped_sum(self, batch: Problem, max_grad_norm: float, reading: Loss | None = None) -> Gradients:
        """`sum_b c_b g_b` by parameter name. `reading` stands in for the problem's loss."""
        parameters = trained(self.model, self.loss)
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        groups = self._groups(list(parameters))
        bound = max_grad_norm / math.sqrt(len(groups))
        for gradients in self._samples(batch, reading or self.loss):
            for names in groups.values():
                size = norm({name: gradients[name] for name in names})
                if not math.isfinite(size):
                    continue
                factor = 1.0 if self.clipping is None or size <= bound else bound / size
                for name in names:
                    total[name] += factor * gradients[name]
        return total

    def _groups(self, names: list[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.rpartition(".")[0] if self.clipping == "per_layer" else "", []).append(name)
        return groups

    def _samples(self, batch: Problem, loss: Loss) -> list[Gradients]:
        double = dataclasses.replace(
            batch, inputs=tuple(map(_double, batch.inputs)), targets=_double(batch.targets), model=self.model, loss=loss
        )
        return [self._gradients(double.sample(b)) for b in range(batch.batch_size)]

    def _gradients(self, sample: Problem) -> Gradients:
        parameters = trained(self.model, self.loss)
        loss = sample.loss(self.model(*sample.inputs), sample.targets).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, found, strict=True))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
