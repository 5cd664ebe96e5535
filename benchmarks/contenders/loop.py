"""A loop over the samples: backward of one sample, clip, add up. The simplest way to train privately, and an exact one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Prepared, Privacy
from benchmarks.contenders.release import add_noise_, clip_factors, noise_std


class Loop(Contender):
    """Physical batch 1, eager or compiled: the loss of one sample, and the clipping and adding up, each one graph."""

    def __init__(self, name: str, *, compiled: bool) -> None:
        self.name, self.compiled = name, compiled

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Prepared(problem, privacy, self.compiled)


class _Prepared(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy, compiled: bool) -> None:
        super().__init__(problem, privacy)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.loss: Callable[..., Tensor] = problem.mean_loss(self.model)
        self.clip: Callable[..., list[Tensor]] = _clip
        self.clip_and_add: Callable[..., None] = _clip_and_add_
        if compiled:
            self.loss = torch.compile(self.loss, dynamic=False)
            self.clip = torch.compile(_clip, dynamic=False)
            self.clip_and_add = torch.compile(_clip_and_add_fused_, dynamic=False)

    def backward(self) -> None:
        problem, privacy = self.problem, self.privacy
        max_grad_norm = torch.tensor(privacy.max_grad_norm, device=problem.targets.device)
        total: list[Tensor] = []
        for b in range(problem.batch_size):
            gradients = self._sample_gradients(b)
            with torch.no_grad():
                if total:
                    self.clip_and_add(total, gradients, max_grad_norm, problem.batch_size)
                else:
                    total = self.clip(gradients, max_grad_norm, problem.batch_size)
        add_noise_(total, noise_std(problem, privacy))
        for parameter, gradient in zip(self.used, total, strict=True):
            parameter.grad = gradient

    def _sample_gradients(self, index: int) -> list[Tensor]:
        sample = self.problem.sample(index)
        self.loss(*sample.inputs, sample.targets).backward()
        self.used = [parameter for parameter in self.parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in self.used if parameter.grad is not None]
        for parameter in self.used:
            parameter.grad = None
        return gradients


def _factor(gradients: list[Tensor], max_grad_norm: Tensor, samples: int) -> Tensor:
    """The clip factor of one sample's gradients, over B."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, dtype=dtype)))
    return clip_factors(norm, max_grad_norm) / samples


# With a batch of one, two gradients can be views of one tensor (a position's and the class token's), so none is changed in place.
def _clip(gradients: list[Tensor], max_grad_norm: Tensor, samples: int) -> list[Tensor]:
    return list(torch._foreach_mul(gradients, _factor(gradients, max_grad_norm, samples)))


def _clip_and_add_(total: list[Tensor], gradients: list[Tensor], max_grad_norm: Tensor, samples: int) -> None:
    factor = _factor(gradients, max_grad_norm, samples)
    if factor.is_cuda:  # reading the factor would wait for the GPU
        torch._foreach_add_(total, torch._foreach_mul(gradients, factor))
    else:
        torch._foreach_add_(total, gradients, alpha=float(factor))


def _clip_and_add_fused_(total: list[Tensor], gradients: list[Tensor], max_grad_norm: Tensor, samples: int) -> None:
    """For the compiler, which makes one pass over memory of product and sum."""
    factor = _factor(gradients, max_grad_norm, samples)
    for sum_, gradient in zip(total, gradients, strict=True):
        sum_.add_(gradient * factor.to(gradient.dtype))
