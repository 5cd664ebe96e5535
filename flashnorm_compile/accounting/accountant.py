"""Epsilon of a set of mechanisms, by Google's dp-accounting. All privacy mathematics is theirs.

One optimizer step is one Gaussian release whatever the clipping: the group norms combine to C, every group gets noise of
standard deviation s * C, so the whole gradient is a sum of vectors of norm at most C with noise s * C.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from ..options import real
from ..passes.errors import OptionsError
from .mechanism import Mechanism, Sampling, combined_noise

AccountantName = Literal["pld", "rdp"]
Relation = Literal["add_or_remove_one", "replace_one"]

# dp-accounting's own default for the grid on which PLD rounds privacy losses (always up).
_FINEST_GRID = 1e-4
# A loss distribution of a million points takes about a second to compose. Beyond it the grid is made coarser, which
# rounds up more: the figure grows, memory does not.
_GRID_POINTS = 10**6
# Beyond these dp-accounting's floats run over. With less noise, or larger losses, nothing is hidden and epsilon is called
# infinite; more noise counts as this much.
_LARGEST_LOSS = 5e8
LEAST_NOISE, MOST_NOISE = 1e-4, 1e6
# Each distinct mechanism is a distribution of its own. More than these are grouped, each group with its least noise.
_DISTINCT = 32


def require_dp_accounting() -> Any:
    """The package ``dp_accounting``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            "Epsilon is computed by Google's dp-accounting, which could not be imported "
            f"({error}). Install it: pip install 'flashnorm_compile[accounting]', or pip install 'dp-accounting>=0.6'. "
            "Training, counting and the ledger work without it."
        ) from error
    return dp_accounting


def accountant_version(accountant: AccountantName) -> str:
    """Name and version for a report, such as ``PLD of dp-accounting 0.6.0``."""
    return f"{accountant.upper()} of dp-accounting {importlib.metadata.version('dp-accounting')}"


def check_accountant(accountant: str, relation: str) -> None:
    """Refuses names that do not exist."""
    for name, value, allowed in (
        ("accountant", accountant, ("pld", "rdp")),
        ("relation", relation, ("add_or_remove_one", "replace_one")),
    ):
        if value not in allowed:
            raise OptionsError(f"{name} must be {allowed[0]!r} or {allowed[1]!r}; got {value!r}.")


def check_delta(delta: float) -> float:
    """Returns delta, 0 < delta < 1."""
    if not real("delta", delta) < 1:
        raise OptionsError(f"delta must be > 0 and < 1, usually well below 1 / (number of records); got {delta!r}.")
    return float(delta)


def epsilon_of(
    mechanisms: Mapping[Mechanism, int],
    delta: float,
    accountant: AccountantName = "pld",
    relation: Relation = "add_or_remove_one",
) -> float:
    """Epsilon at ``delta`` of all these mechanisms (mechanism -> how often), each seeing the results of the others.

    Never below what dp-accounting gives. It is above where that would take too much memory or time: very large losses
    (a coarser grid; infinite beyond what floats hold, or for a noise multiplier below 1e-4), and more than 32 distinct noise levels
    under "pld" (grouped, the least noise of each group).

    Raises:
        ImportError: dp-accounting is not installed.
        OptionsError: the accountant cannot compute this; "rdp" knows neither truncated sampling nor sampling under "replace_one".
    """
    check_accountant(accountant, relation)
    counts: Counter[Mechanism] = Counter()
    for mechanism, count in mechanisms.items():
        counts[replace(mechanism, noise_multiplier=min(mechanism.noise_multiplier, MOST_NOISE))] += count
    ordered = tuple(sorted(((m, n) for m, n in counts.items() if n), key=repr))
    return _epsilon(ordered, check_delta(delta), accountant, relation)


@lru_cache(maxsize=256)
def _epsilon(counts: tuple[tuple[Mechanism, int], ...], delta: float, accountant: AccountantName, relation: Relation) -> float:
    package = require_dp_accounting()
    if not counts:
        return 0.0
    if any(mechanism.noise_multiplier < LEAST_NOISE for mechanism, _ in counts):
        return math.inf
    if accountant == "pld":
        if all(mechanism.sampling is None for mechanism, _ in counts):
            # One Gaussian mechanism, for which dp-accounting has the exact formula.
            noise = combined_noise((mechanism.noise_multiplier, count) for mechanism, count in counts)
            return float(package.get_epsilon_gaussian(noise / sensitivity(relation), delta))
        counts = tuple(_grouped(counts).items())
    largest_loss = _largest_loss(dict(counts), relation)
    if largest_loss > _LARGEST_LOSS:
        return math.inf
    neighbors = package.NeighboringRelation[relation.upper()]
    if accountant == "rdp":
        composed = package.rdp.RdpAccountant(neighboring_relation=neighbors)
    else:
        composed = package.pld.PLDAccountant(neighbors, max(_FINEST_GRID, largest_loss / _GRID_POINTS))
    for mechanism, count in counts:
        composed.compose(event_of(package, mechanism, accountant, relation), count)
    return float(composed.get_epsilon(delta))


def sensitivity(relation: Relation) -> float:
    """In units of C: replacing a record takes one contribution out and puts another in."""
    return 2.0 if relation == "replace_one" else 1.0


def event_of(package: Any, mechanism: Mechanism, accountant: AccountantName, relation: Relation) -> Any:
    """The mechanism as an event of dp-accounting."""
    noise, sampling = mechanism.noise_multiplier, mechanism.sampling
    if sampling is None:
        # The PLD accountant knows that replacing a record moves a sum by 2C; the RDP accountant leaves that to the event.
        return package.GaussianDpEvent(noise / (sensitivity(relation) if accountant == "rdp" else 1.0))
    if accountant == "rdp" and (sampling.kind != "poisson" or relation == "replace_one"):
        raise OptionsError(
            f"The RDP accountant cannot account for the sampler {sampling.kind!r} under the relation {relation!r}: it "
            "knows Poisson sampling under 'add_or_remove_one' only. Use accountant='pld'."
        )
    if sampling.kind == "poisson":
        return package.PoissonSampledDpEvent(sampling.sample_rate, package.GaussianDpEvent(noise))
    return package.TruncatedSubsampledGaussianDpEvent(
        sampling.dataset_size, sampling.sample_rate, sampling.truncated_batch_size, noise
    )


def _largest_loss(counts: Mapping[Mechanism, int], relation: Relation) -> float:
    """About the largest privacy loss that the PLD accountant has to hold: epsilon at a delta below the tail that it cuts off."""
    noises = [mechanism.noise_multiplier / _doubling(mechanism, relation) for mechanism in counts]
    of_one = max(0.5 / noise**2 + 10 / noise for noise in noises)  # at ten standard deviations
    return max(quick_epsilon(counts, 1e-15, relation), of_one)


def quick_epsilon(counts: Mapping[Mechanism, int], delta: float, relation: Relation) -> float:
    """About epsilon at ``delta``, mostly above it, in a hundredth of a second: RDP with integer orders. For first guesses only."""
    package = require_dp_accounting()
    total = package.rdp.RdpAccountant(orders=range(2, 65))
    for mechanism, count in counts.items():
        gaussian = package.GaussianDpEvent(mechanism.noise_multiplier / _doubling(mechanism, relation))
        rate = 1.0 if mechanism.sampling is None else mechanism.sampling.sample_rate
        total.compose(package.PoissonSampledDpEvent(rate, gaussian), count)
    return float(total.get_epsilon(delta))


def _doubling(mechanism: Mechanism, relation: Relation) -> float:
    """What a quick bound divides the noise by: cutting a draw, too, exchanges one record for another."""
    truncated = mechanism.sampling is not None and mechanism.sampling.kind == "truncated_poisson"
    return 2.0 if truncated or relation == "replace_one" else 1.0


def _grouped(counts: tuple[tuple[Mechanism, int], ...]) -> Counter[Mechanism]:
    """At most about ``_DISTINCT`` mechanisms that together are no more private than these."""
    if len(counts) <= _DISTINCT:
        return Counter(dict(counts))
    by_sampling: dict[Sampling | None, list[tuple[float, int]]] = defaultdict(list)
    for mechanism, count in counts:
        by_sampling[mechanism.sampling].append((mechanism.noise_multiplier, count))
    grouped: Counter[Mechanism] = Counter()
    for sampling, levels in by_sampling.items():
        if sampling is None:
            grouped[Mechanism(combined_noise(levels))] += 1
            continue
        size = math.ceil(len(levels) * len(by_sampling) / _DISTINCT)
        levels.sort()
        for start in range(0, len(levels), size):
            group = levels[start : start + size]
            grouped[Mechanism(group[0][0], sampling)] += sum(count for _, count in group)
    return grouped
