"""Per-sample gradients with `torch.func`: vmap of grad over the samples, as in PyTorch's own tutorial."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Prepared, Privacy
from benchmarks.contenders.release import add_noise_, clip_factors, noise_std

Gradients = dict[str, Tensor]


class Vmap(Contender):
    """`torch.func.vmap(grad(loss))`, then norms, clipping and sum; eager, or all of that compiled with Inductor as one graph."""

    def __init__(self, name: str, *, compiled: bool) -> None:
        self.name, self.compiled = name, compiled

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Prepared(problem, privacy, self.compiled)


class _Prepared(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy, compiled: bool) -> None:
        super().__init__(problem, privacy)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        clipped_mean = _ClippedMean(self.model, problem)
        self.clipped_mean = torch.compile(clipped_mean, dynamic=False) if compiled else clipped_mean

    def backward(self) -> None:
        problem, privacy = self.problem, self.privacy
        values = {name: parameter.detach() for name, parameter in self.parameters.items()}
        # As a tensor, so that a new value compiles nothing.
        max_grad_norm = torch.tensor(privacy.max_grad_norm, device=problem.targets.device)
        gradients = self.clipped_mean(values, problem.inputs, problem.targets, max_grad_norm)
        # Not compiled: on a CPU, Inductor draws normal numbers several times more slowly than PyTorch does.
        add_noise_(gradients.values(), noise_std(problem, privacy))
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient


class _ClippedMean(nn.Module):
    """Clipped and averaged gradients of a model, by name."""

    def __init__(self, model: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.model, self.loss = model, problem.loss

    def forward(self, values: Gradients, inputs: tuple[Tensor, ...], targets: Tensor, max_grad_norm: Tensor) -> Gradients:
        in_dims = (None, (0,) * len(inputs), 0)
        gradients = vmap(grad(self._sample_loss), in_dims=in_dims, randomness="different")(values, inputs, targets)
        norms_b = torch.stack([_norms(gradient) for gradient in gradients.values()]).square().sum(0).sqrt()
        factors_b = clip_factors(norms_b, max_grad_norm) / len(targets)
        return {name: torch.tensordot(factors_b.to(gradient.dtype), gradient, dims=1) for name, gradient in gradients.items()}

    def _sample_loss(self, values: Mapping[str, Tensor], inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        outputs = functional_call(self.model, dict(values), tuple(x.unsqueeze(0) for x in inputs))
        return self.loss(outputs, target.unsqueeze(0)).squeeze(0)


def _norms(gradients: Tensor) -> Tensor:
    """Of each sample's gradient of one parameter, [B]."""
    return torch.linalg.vector_norm(
        gradients.reshape(len(gradients), -1), dim=1, dtype=torch.promote_types(gradients.dtype, torch.float32)
    )
