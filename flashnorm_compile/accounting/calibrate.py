"""Noise for a budget, and steps for a budget: the questions before a training starts."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from ..options import real
from ..passes.errors import OptionsError
from .accountant import (
    LEAST_NOISE,
    MOST_NOISE,
    AccountantName,
    Relation,
    check_delta,
    epsilon_of,
    quick_epsilon,
    require_dp_accounting,
    sensitivity,
)
from .mechanism import Mechanism, Sampling

_NOISE_TOLERANCE = 1e-3  # relative; the result errs to the private side
MOST_STEPS = 10**7
"""The PLD accountant takes up to a minute for these, and does not end for ten times as many."""


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

    def about_spent(noise: float) -> float:
        return quick_epsilon({Mechanism(noise, sampling): steps}, delta, relation)

    if sampling is not None or accountant == "rdp":
        start = _least_noise(about_spent, target, start=1.0, factor=2.0, tolerance=0.02)
        return _least_noise(spent, target, start, factor=1.2, tolerance=_NOISE_TOLERANCE)
    noise = float(require_dp_accounting().get_sigma_gaussian(target, delta)) * math.sqrt(steps) * sensitivity(relation)
    while spent(noise) > target:  # rounding in the formula
        noise *= 1 + _NOISE_TOLERANCE / 10
    return noise


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

    def seems_to_fit(steps: int) -> bool:
        return quick_epsilon({mechanism: steps}, delta, relation) <= target

    low, high = _last(fits, start=_last(seems_to_fit, start=1)[0])
    if high > MOST_STEPS:
        raise OptionsError(f"More than {MOST_STEPS:,} steps fit into epsilon={target:g} at delta={delta:g}. Check the arguments.")
    return low


def _least_noise(spent: Callable[[float], float], target: float, start: float, factor: float, tolerance: float) -> float:
    """The least noise multiplier, within a relative ``tolerance`` above it, that does not spend more than ``target``."""
    high = start
    while spent(high) > target:
        high *= factor
        if high > MOST_NOISE:
            raise OptionsError(f"No noise_multiplier up to {MOST_NOISE:g} meets epsilon={target:g}. Raise epsilon or delta.")
    low = high / factor
    while spent(low) <= target:
        low, high = low / factor, low
        if low < LEAST_NOISE:
            raise OptionsError(f"Any noise_multiplier meets epsilon={target:g}. Check epsilon, delta and sample_rate.")
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= target else (middle, high)
    return high


def _last(fits: Callable[[int], bool], start: int) -> tuple[int, int]:
    """The last number that fits, at least 0, and the one behind it; only numbers up to ``MOST_STEPS`` are tried."""
    low, high, stride = 0, MOST_STEPS + 1, max(start // 8, 1)
    near = min(max(start, 1), MOST_STEPS)
    while low < near < high:  # ever farther from the start, until one fits and one does not
        low, high = (near, high) if fits(near) else (low, near)
        near, stride = min(low + stride, MOST_STEPS) if low == near else max(high - stride, 0), 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def _steps(steps: Any, *, allow_zero: bool = False) -> int:
    least = 0 if allow_zero else 1
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or not least <= int(steps) <= MOST_STEPS:
        raise OptionsError(
            f"steps must be an integer >= {least} and <= {MOST_STEPS:,}, the number of noised releases; got {steps!r}."
        )
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
