"""What every contender has to be able to do: leave clipped and noised gradients in `.grad`, and take a step with them."""

from __future__ import annotations

import abc
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.case import Problem


class CannotRunError(RuntimeError):
    """A contender does not take this model. The text becomes its row's error."""


class NotInstalledError(CannotRunError):
    """A contender's package is not there, or not for this device."""


@dataclass(frozen=True)
class Privacy:
    """The setting of a run. Noise is `noise_multiplier * max_grad_norm / B` on the mean gradient."""

    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0


class Prepared(abc.ABC):
    """A contender's own copy of a model with its optimizer, ready to step.

    `model` is the copy whose parameters have the names of `problem.model`.
    """

    def __init__(self, problem: Problem, privacy: Privacy) -> None:
        self.problem, self.privacy = problem, privacy
        self.model: nn.Module = copy.deepcopy(problem.model)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)

    @abc.abstractmethod
    def backward(self) -> None:
        """Forward and backward of the whole batch: every `.grad` of `model` then holds the released mean gradient."""

    def set_privacy(self, privacy: Privacy) -> None:
        """Changes clipping norm and noise for the following steps, with no new compilation."""
        self.privacy = privacy

    def step(self) -> None:
        """One training step: `backward`, AdamW, gradients set to None."""
        self.backward()
        self.optimizer.step()
        self.clear()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor | None]:
        """`.grad` by parameter name, trainable parameters only."""
        return {name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Takes back whatever was changed outside this object (hooks, patched functions)."""


class Contender(abc.ABC):
    """A way to train. `clipping` tells the gate what to compare with; None for non-private ones."""

    name: str
    clipping: str | None = "flat"
    compiled: bool = False
    """With `torch.compile`."""
    mirrors: bool = False
    """It runs no PyTorch model, but a copy of it in another framework."""
    on_cuda_only: bool = False

    def version(self) -> str | None:
        """Package and version of a peer that is not part of this project, such as "opacus 1.6.0"."""
        return None

    @abc.abstractmethod
    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        """Builds. Nothing is compiled yet where compiling waits for the first step. Raises CannotRunError."""
