"""The gradient gate: no time is reported for a private step whose gradients are wrong.

The reference is a loop over samples with plain autograd in float64. It shares no code with the library.
"""

import copy

import torch
import torch.nn as nn
from torch import Tensor

TOLERANCE = 1e-4


class GateError(RuntimeError):
    """A private gradient differs from the loop over samples by more than the tolerance."""


def clipped_mean(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], float]:
    """Clips each sample's gradient at the median norm (half the norm where B is 1) and averages.

    Returns the averaged gradient of each parameter in float64, and the clipping norm.
    """
    model = copy.deepcopy(model).double()
    samples = [tuple(_as_double(x[b : b + 1]) for x in inputs) for b in range(inputs[0].shape[0])]
    norms = torch.stack([_norm(_gradients(model, sample)) for sample in samples])
    max_grad_norm = float(norms.quantile(0.5) if len(samples) > 1 else norms[0] / 2)
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sample, norm in zip(samples, norms.tolist(), strict=True):
        factor = min(1.0, max_grad_norm / norm)
        for name, gradient in _gradients(model, sample).items():
            total[name] += gradient * (factor / len(samples))
    return total, max_grad_norm


def rounding_error(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The error of the non-private `.grad` of a whole batch against float64: what this model's float32 costs anybody."""
    exact = copy.deepcopy(model).double()
    return gradient_error(model, _gradients(exact, tuple(_as_double(x) for x in inputs)))


def gradient_error(model: nn.Module, reference: dict[str, Tensor]) -> float:
    """The largest relative distance, over parameters, of `.grad` to the reference; infinite where one is missing."""
    errors = [_relative_distance(parameter.grad, reference[name]) for name, parameter in model.named_parameters()]
    return max(errors)


def _relative_distance(gradient: Tensor | None, reference: Tensor) -> float:
    if gradient is None:
        return float("inf")
    error = float((gradient.double() - reference).norm() / reference.norm())
    return error if error == error else float("inf")


def _gradients(model: nn.Module, sample: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(model(*sample), parameters), strict=True))


def _norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


def _as_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
