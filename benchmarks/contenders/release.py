"""What several peers share: clipping and noise for those that bring none of their own, versions and refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from importlib import metadata

import torch
from torch import Tensor

from benchmarks.case import Problem
from benchmarks.contenders.base import CannotRunError, Privacy


def clip_factors(norms: Tensor, max_grad_norm: float | Tensor) -> Tensor:
    """min(1, C / norm), in the shape of `norms`; 1 where a norm is 0."""
    return (max_grad_norm / norms).clamp(max=1.0)


def noise_std(problem: Problem, privacy: Privacy) -> float:
    """Standard deviation of the noise on the mean gradient."""
    return privacy.noise_multiplier * privacy.max_grad_norm / problem.batch_size


@torch.no_grad()
def add_noise_(gradients: Iterable[Tensor], std: float) -> None:
    """Adds normal noise of standard deviation `std` in place; nothing where it is 0."""
    if std:
        for gradient in gradients:
            gradient.add_(torch.randn_like(gradient), alpha=std)


def package_version(name: str) -> str | None:
    """Name and version of an installed package, None where there is none."""
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def refusals(peer: str) -> Iterator[None]:
    """For libraries with no exception of their own for what they cannot do: every error but lack of memory is a refusal."""
    try:
        yield
    except (CannotRunError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CannotRunError(f"{peer}: {type(error).__name__}: {error}") from error
