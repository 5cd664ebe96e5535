"""The work of one training step, counted while it runs eagerly on fake tensors, and scaled to another depth or size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import nn

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Privacy
from benchmarks.contenders.loop import Loop
from benchmarks.hopper.attention import attention_of_cuda
from benchmarks.hopper.budget import eager_seconds
from benchmarks.hopper.eager import CountedStep
from benchmarks.hopper.estimate import peaks_named
from benchmarks.hopper.fakes import fake_problem


@dataclass(frozen=True)
class Amounts:
    """Of one step, or of one step over another."""

    seconds: float = 1.0
    operators: float = 1.0
    flops: float = 1.0
    nbytes: float = 1.0
    peak_bytes: float = 1.0

    def over(self, other: Amounts) -> Amounts:
        """Each amount over the other's; 1 where that is 0."""
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(Amounts)]
        return Amounts(*(own / theirs if theirs else 1.0 for own, theirs in pairs))

    def times(self, other: Amounts) -> Amounts:
        return Amounts(*(getattr(self, field.name) * getattr(other, field.name) for field in fields(Amounts)))


def eager_step(build: Callable[[], Problem], dtype: torch.dtype, contender: Contender, device: str) -> tuple[int, Amounts]:
    """The batch size, and what a step costs. A loop over samples is counted for one of them."""
    peaks = peaks_named(device)
    counted = CountedStep(peaks)
    with fake_problem(build, dtype) as problem, attention_of_cuda():
        times, part = (problem.batch_size, problem.sample(0)) if isinstance(contender, Loop) else (1, problem)
        prepared = contender.prepare(part, Privacy())
        with counted:
            prepared.backward()
        prepared.close()
        seconds = times * eager_seconds(counted.seconds, counted.launches) + update_seconds(prepared.model, device)
    totals = (times * counted.launches, times * counted.flops, times * counted.nbytes)
    return problem.batch_size, Amounts(seconds, *totals, counted.peak_bytes)


def update_seconds(model: nn.Module, device: str) -> float:
    """AdamW, fused: parameter, gradient and two moments are read, all but the gradient are written."""
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 7 * nbytes / peaks_named(device).bandwidth
