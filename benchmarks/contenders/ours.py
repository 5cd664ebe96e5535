"""This project's backend."""

from __future__ import annotations

from typing import Any

import torch

import flashnorm_compile
from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Prepared, Privacy


class Ours(Contender):
    """`torch.compile(backend="flashnorm")` with the given further options."""

    compiled = True

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options = name, options
        self.clipping = options.get("clipping", "flat")

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Prepared(problem, privacy, self.options)


class _Prepared(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy, options: dict[str, Any]) -> None:
        super().__init__(problem, privacy)
        given = {"max_grad_norm": privacy.max_grad_norm, "noise_multiplier": privacy.noise_multiplier, **options}
        self.whole = problem.mean_loss(self.model)
        self.loss = torch.compile(self.whole, backend="flashnorm", options=given, dynamic=False)

    def backward(self) -> None:
        self.loss(*self.problem.inputs, self.problem.targets).backward()

    def set_privacy(self, privacy: Privacy) -> None:
        super().set_privacy(privacy)
        state = flashnorm_compile.privacy(self.whole)
        state.max_grad_norm, state.noise_multiplier = privacy.max_grad_norm, privacy.noise_multiplier
