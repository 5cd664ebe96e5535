"""The step without privacy, which everybody's time is divided by."""

from __future__ import annotations

import torch

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Prepared, Privacy


class NonPrivate(Contender):
    """`torch.compile` with Inductor, or eager."""

    clipping = None

    def __init__(self, name: str, *, compiled: bool) -> None:
        self.name, self.compiled = name, compiled

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Prepared(problem, privacy, self.compiled)


class _Prepared(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy, compiled: bool) -> None:
        super().__init__(problem, privacy)
        whole = problem.mean_loss(self.model)
        self.loss = torch.compile(whole, dynamic=False) if compiled else whole

    def backward(self) -> None:
        self.loss(*self.problem.inputs, self.problem.targets).backward()
