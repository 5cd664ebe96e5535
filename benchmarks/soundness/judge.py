"""Finds out what a contender does in a trap: by running it, on neighbouring batches, without noise.

The released sum of a batch and of the same batch with one sample blanked, removed or replaced are compared. Their distance
is what this sample contributes: at most C, C and 2 C, if the noise is to cover it. Blanking keeps the batch size, and so
the compiled code; removing is left out for compiled contenders in most traps, for the sake of time.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, NotInstalledError, Privacy
from benchmarks.machine import PACKAGES, device_name, today, versions
from benchmarks.soundness import verdict
from benchmarks.soundness.oracle import CRITERION, Gradients, Oracle, norm
from benchmarks.soundness.traps import SAMPLES, TRAPS, Loss, Trap, removed, replaced
from benchmarks.soundness.verdict import SoundnessRow

SEED = 0
FLOOR = 1e-2
"""A parameter's error counts against its own gradient's norm, but no less than this part of the whole gradient's norm."""


@dataclass
class Findings:
    """What was measured over all batches of a trap."""

    contribution: float = 0.0
    relation: str | None = None
    errors: dict[str | None, float] = dataclasses.field(default_factory=dict)
    """Largest relative error by reading; None is the trap's own loss."""
    poisoned: bool = False
    reached: set[str] = dataclasses.field(default_factory=set)
    """Parameters that got a gradient other than zero."""
    wanted: set[str] = dataclasses.field(default_factory=set)
    """Parameters to which the oracle gives one."""

    refused_smaller: str | None = None
    """What was said to a batch with one sample less, and not to the whole batch."""

    def see_contribution(self, relation: str, ratio: float) -> None:
        if ratio > self.contribution:
            self.contribution, self.relation = ratio, relation


class Releaser:
    """A prepared contender, fed with one batch after the other in the tensors that it was prepared with."""

    def __init__(self, contender: Contender, problem: Problem, privacy: Privacy) -> None:
        self.problem = dataclasses.replace(
            problem,
            model=copy.deepcopy(problem.model),
            inputs=tuple(x.clone() for x in problem.inputs),
            targets=problem.targets.clone(),
            loss=copy.deepcopy(problem.loss),
        )
        self.prepared = contender.prepare(self.problem, privacy)

    def __call__(self, batch: Problem) -> dict[str, Tensor]:
        """The released sum, B times the released mean, in float64; a parameter without a gradient is left out."""
        self._load(batch)
        self.prepared.backward()
        gradients = self.prepared.gradients()
        if isinstance(self.problem.loss, nn.Module):
            gradients |= {CRITERION + name: p.grad for name, p in self.problem.loss.named_parameters() if p.requires_grad}
        sums = {name: batch.batch_size * grad.detach().double() for name, grad in gradients.items() if grad is not None}
        self._clear()
        return sums

    def step(self, batch: Problem) -> None:
        """A whole training step: some refuse only when the optimizer is about to use a gradient."""
        self._load(batch)
        self.prepared.step()
        self._clear()

    def close(self) -> None:
        self.prepared.close()

    def _load(self, batch: Problem) -> None:
        torch.manual_seed(SEED)
        for mine, given in zip((*self.problem.inputs, self.problem.targets), (*batch.inputs, batch.targets), strict=True):
            mine.copy_(given)

    def _clear(self) -> None:
        self.prepared.clear()
        if isinstance(self.problem.loss, nn.Module):
            self.problem.loss.zero_grad(set_to_none=True)


def run(
    contenders: Sequence[Contender], device: str, traps: Sequence[Trap] = TRAPS, deadline: float = math.inf
) -> Iterator[SoundnessRow]:
    """Every contender in every trap; one that fails is a row with the reason, and so is one whose turn comes after `deadline`."""
    for contender in contenders:
        for trap in traps:
            if time.monotonic() > deadline:
                yield SoundnessRow(trap.name, trap.description, contender.name, verdict.NOT_JUDGED, date=today())
            else:
                yield judge(contender, trap, device)


def judge(contender: Contender, trap: Trap, device: str = "cpu") -> SoundnessRow:
    """One row. Never raises on a contender's fault: an exception of any kind is a refusal, with the first line of its text."""
    row = SoundnessRow(trap.name, trap.description, contender.name, verdict.REFUSES, **_circumstances(contender, device))
    if contender.on_cuda_only and not device.startswith("cuda"):
        return dataclasses.replace(row, verdict=verdict.NEEDS_CUDA)
    torch._dynamo.reset()
    torch.manual_seed(SEED)
    problem = trap.build().to(device, torch.float32)
    if isinstance(problem.loss, nn.Module):
        problem.loss.to(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            findings = measure(contender, trap, problem)
    except Exception as error:  # whatever a contender raises is its answer
        text = refusal(error)
        absent = isinstance(error, NotInstalledError)
        return dataclasses.replace(row, verdict=verdict.ABSENT if absent else verdict.REFUSES, refusal=text)
    return _judged(row, findings, trap, contender.clipping)


def measure(contender: Contender, trap: Trap, problem: Problem) -> Findings:
    """Runs the contender on all batches and their neighbours. Raises what the contender raises at the batch size of the trap."""
    oracle = Oracle(problem, contender.clipping)
    privacy = Privacy(oracle.clipping_norm(problem), noise_multiplier=0.0)
    findings = Findings()
    release = Releaser(contender, problem, privacy)
    try:
        released = []
        for batch in trap.batches(problem):
            sums = release(batch)
            released.append((batch, sums))
            _compare(findings, sums, trap, oracle, batch, privacy.max_grad_norm)
            for b in range(SAMPLES):
                blanked, opposite = release(trap.blanked(batch, b)), release(replaced(batch, b))
                findings.see_contribution("blanked", _distance(sums, blanked) / privacy.max_grad_norm)
                findings.see_contribution("replaced", _distance(sums, opposite) / (2 * privacy.max_grad_norm))
        release.step(problem)
    finally:
        release.close()
    if not trap.random and (trap.resized or not contender.compiled):
        try:
            _remove_samples(findings, contender, released, privacy)
        except Exception as error:  # what fits B samples only is not safe for B: the findings so far stand
            findings.refused_smaller = refusal(error)
    return findings


def _remove_samples(findings: Findings, contender: Contender, released: list[tuple[Problem, Gradients]], privacy: Privacy) -> None:
    release = Releaser(contender, removed(released[0][0], 0), privacy)
    try:
        for batch, sums in released:
            for b in range(SAMPLES):
                findings.see_contribution("removed", _distance(sums, release(removed(batch, b))) / privacy.max_grad_norm)
    finally:
        release.close()


def _compare(findings: Findings, sums: Gradients, trap: Trap, oracle: Oracle, batch: Problem, max_grad_norm: float) -> None:
    findings.poisoned |= any(not bool(gradient.isfinite().all()) for gradient in sums.values())
    findings.reached |= {name for name, gradient in sums.items() if bool(gradient.any())}
    readings: list[tuple[str | None, Loss | None]] = [(None, None), *trap.readings.items()]
    for reading, loss in readings:
        wanted = oracle.clipped_sum(batch, max_grad_norm, loss)
        findings.errors[reading] = max(findings.errors.get(reading, 0.0), gradient_error(sums, wanted))
        findings.wanted |= {name for name, gradient in wanted.items() if bool(gradient.any())}


def gradient_error(sums: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative distance of a parameter's gradient; a missing one counts as zero, one too many is an infinite error."""
    if set(sums) - set(wanted):
        return math.inf
    whole = norm(wanted)
    errors = []
    for name, gradient in wanted.items():
        distance = float((sums.get(name, torch.zeros_like(gradient)) - gradient).norm())
        scale = max(float(gradient.norm()), FLOOR * whole)
        errors.append(distance / scale if scale else distance)
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)


def _distance(sums: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Norm of the difference; 0 where one of the two is not finite, which is reported on its own."""
    zero = torch.zeros(())
    names: Iterable[str] = sums.keys() | others.keys()
    distance = norm({name: sums.get(name, zero.to(others.get(name, zero))) - others.get(name, zero) for name in names})
    return distance if math.isfinite(distance) else 0.0


def _judged(row: SoundnessRow, findings: Findings, trap: Trap, clipping: str | None) -> SoundnessRow:
    reading, error = min(findings.errors.items(), key=lambda item: item[1])
    untrained = tuple(sorted(findings.wanted - findings.reached))
    decided = [
        (findings.poisoned, verdict.POISONED),
        (clipping is None, verdict.NO_BOUND),
        (findings.contribution > 1 + verdict.SLACK, verdict.OVER),
        (bool(untrained), verdict.UNTRAINED),
        (trap.random, verdict.WITHIN),
        (error > verdict.TOLERANCE, verdict.WRONG),
        (True, verdict.EXACT),
    ]
    return dataclasses.replace(
        row,
        verdict=next(name for holds, name in decided if holds),
        contribution=findings.contribution,
        relation=findings.relation,
        gradient_error=error if not trap.random and math.isfinite(error) else None,
        reading=reading,
        untrained=untrained,
        refusal=findings.refused_smaller,
    )


def refusal(error: BaseException) -> str:
    """The first line of what was said, without the words in which torch.compile wraps it."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _circumstances(contender: Contender, device: str) -> dict[str, Any]:
    peer = (contender.version() or "").split()[:1]
    return {"device": device_name(device), "versions": versions((*PACKAGES, *peer)), "date": today()}
