"""Noise for a budget, and steps for a budget: the questions before a training starts."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from ..options import real
from ..passes.errors import OptionsError
from .accountant import (
    AccountantName,
    Relation,
    check_delta,
    epsilon_of,
    event_of,
    fresh_accountant,
    require_dp_accounting,
    sensitivity,
)
from .mechanism import Mechanism, Sampling

_NOISE_TOLERANCE = 1e-3  # relative; the result errs to the private side
_MOST_STEPS = 2**40
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e9


def planned_epsilon(
    *,
    noise_multiplier: float,
    steps: int,
    delta: float,
    sample_rate: float | None,
    dataset_size: int | None = None,
    truncated_batch_size: int | None = None,
    accountant: AccountantName = "pld",
    relation: Relation = "add_or_remove_one",
) -> float:
    """Epsilon at ``delta`` after ``steps`` noised releases. Arguments as for ``calibrate``."""
    noise = real("noise_multiplier", noise_multiplier, allow_zero=True)
    sampling = _sampling(sample_rate, dataset_size, truncated_batch_size)
    return epsilon_of({Mechanism(noise, sampling): _steps(steps, allow_zero=True)}, delta, accountant, relation)


def calibrate(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float | None,
    steps: int,
    dataset_size: int | None = None,
    truncated_batch_size: int | None = None,
    accountant: AccountantName = "pld",
    relation: Relation = "add_or_remove_one",
) -> float:
    """The least noise multiplier, to a thousandth, with which ``steps`` releases cost at most ``epsilon`` at ``delta``.

    Args:
        epsilon, delta: the budget; epsilon > 0 and 0 < delta < 1.
        sample_rate: probability with which a Poisson sampler takes each record into a batch; None for batches that were
            drawn in any other way, for which sampling earns nothing.
        steps: noised releases, one for each logical batch.
        dataset_size, truncated_batch_size: both for truncated Poisson sampling, neither for plain Poisson sampling.
        accountant: "pld" (tight) or "rdp".
        relation: which data sets count as neighbors: one record added or removed, or one replaced.

    Raises:
        ImportError: dp-accounting is not installed.
        OptionsError: an argument is out of range, or the accountant cannot compute this.
    """
    target, steps, delta = real("epsilon", epsilon), _steps(steps), check_delta(delta)
    sampling = _sampling(sample_rate, dataset_size, truncated_batch_size)

    def spent(noise: float) -> float:
        return epsilon_of({Mechanism(noise, sampling): steps}, delta, accountant, relation)

    package = require_dp_accounting()
    if sampling is None and accountant == "pld":
        noise = float(package.get_sigma_gaussian(target, delta)) * math.sqrt(steps) * sensitivity(relation)
    else:
        low, high = _bracket(spent, target)
        mechanism = Mechanism(low, sampling)  # the least noise needs the coarsest grid
        noise = package.calibrate_dp_mechanism(
            lambda: fresh_accountant(package, accountant, relation, {mechanism: steps}),
            lambda noise: package.SelfComposedDpEvent(event_of(package, Mechanism(noise, sampling), accountant, relation), steps),
            target,
            delta,
            package.ExplicitBracketInterval(low, high),
            tol=_NOISE_TOLERANCE * low,
        )
    while spent(noise) > target:  # rounding in the search
        noise *= 1 + _NOISE_TOLERANCE / 10
    return float(noise)


def calibrate_steps(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float | None,
    noise_multiplier: float,
    dataset_size: int | None = None,
    truncated_batch_size: int | None = None,
    accountant: AccountantName = "pld",
    relation: Relation = "add_or_remove_one",
) -> int:
    """The most noised releases that cost at most ``epsilon`` at ``delta``; 0 if one is too much. Arguments as for ``calibrate``."""
    target, delta, noise = real("epsilon", epsilon), check_delta(delta), real("noise_multiplier", noise_multiplier)
    mechanism = Mechanism(noise, _sampling(sample_rate, dataset_size, truncated_batch_size))

    def fits(steps: int) -> bool:
        return epsilon_of({mechanism: steps}, delta, accountant, relation) <= target

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
        if high > _MOST_STEPS:
            raise OptionsError(
                f"More than {_MOST_STEPS} steps fit into epsilon={target:g} at delta={delta:g}. Check the arguments."
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _bracket(spent: Callable[[float], float], target: float) -> tuple[float, float]:
    """Noise multipliers, a factor 2 apart, of which the lower spends more than ``target`` and the higher does not."""
    high = 1.0
    while spent(high) > target:
        high *= 2
        if high > _MOST_NOISE:
            raise OptionsError(f"No noise_multiplier up to {_MOST_NOISE:g} meets epsilon={target:g}. Raise epsilon or delta.")
    while spent(high / 2) <= target:
        high /= 2
        if high < _LEAST_NOISE:
            raise OptionsError(f"Any noise_multiplier meets epsilon={target:g}. Check epsilon, delta and sample_rate.")
    return high / 2, high


def _steps(steps: Any, *, allow_zero: bool = False) -> int:
    least = 0 if allow_zero else 1
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or int(steps) < least:
        raise OptionsError(f"steps must be an integer >= {least}, the number of noised releases; got {steps!r}.")
    return int(steps)


def _sampling(sample_rate: float | None, dataset_size: int | None, truncated_batch_size: int | None) -> Sampling | None:
    if truncated_batch_size is None:
        return None if sample_rate is None else Sampling("poisson", real("sample_rate", sample_rate), dataset_size)
    if sample_rate is None or dataset_size is None:
        raise OptionsError(
            f"truncated_batch_size={truncated_batch_size!r} also needs sample_rate and dataset_size: how often a batch is "
            "cut depends on both."
        )
    return Sampling("truncated_poisson", real("sample_rate", sample_rate), dataset_size, truncated_batch_size)
