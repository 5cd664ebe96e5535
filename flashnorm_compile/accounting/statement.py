"""What was spent, as numbers and as text for a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..options import real
from .accountant import AccountantName, Relation, accountant_version, epsilon_of
from .mechanism import History, Mechanism, Sampling

_SCOPE = (
    "This covers a single run and its released gradients: no other run, no choice of hyperparameters by results, and no "
    "loss or metric computed from the training data."
)


@dataclass(frozen=True)
class Spent:
    """The privacy spent by one training. ``str()`` gives a statement for a report, ``to_dict()`` the numbers."""

    releases: int
    """Noised releases of clipped gradient sums."""
    micro_batches: int
    """Backward passes that went into them."""
    unreadable: int
    """Damaged lines of the ledger that were counted as a release each."""
    unknown_sampler: int
    """Releases whose batches came from nobody knows where; sampling is not credited for them."""
    epsilons: dict[float, float]
    """delta -> epsilon, with amplification by sampling only where this package drew the batches."""
    assumed_rate: float | None
    """The sample rate that the caller claims for the unknown sampler."""
    assumed_epsilons: dict[float, float] | None
    """delta -> epsilon, if every batch of the unknown sampler was a Poisson draw at ``assumed_rate``."""
    mechanisms: tuple[tuple[Mechanism, int], ...]
    accountant: str
    """Name and version."""
    relation: Relation
    clipping: str
    notes: tuple[str, ...] = ()
    """What the figures do not cover."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        neighbors = "adding or removing one record" if self.relation == "add_or_remove_one" else "replacing one record"
        mechanism = (
            f"Mechanism: {self.releases} releases of clipped gradient sums ({self.clipping}) by the Gaussian mechanism, "
            f"noise multiplier {_span(m.noise_multiplier for m, _ in self.mechanisms)}."
        )
        lines = [
            mechanism,
            "Unit of privacy: one record, that is, one sample of the batch dimension.",
            f"Neighboring relation: {neighbors}.",
            f"Sampler: {self._samplers()}.",
            f"Accountant: {self.accountant}.",
            *self._figures(),
            _SCOPE,
            *self.notes,
        ]
        if self.unreadable:
            lines.append(f"{self.unreadable} damaged lines of the ledger are counted as a release each.")
        return "\n".join(lines)

    def _samplers(self) -> str:
        counts: Counter[Sampling | None] = Counter()
        for mechanism, count in self.mechanisms:
            counts[mechanism.sampling] += count
        return "; ".join(f"{_describe(sampling)} ({count} draws)" for sampling, count in counts.items()) or "none"

    def _figures(self) -> list[str]:
        if not self.unknown_sampler:
            return [f"Privacy: {_pairs(self.epsilons)}."]
        without = (
            f"Without amplification: {_pairs(self.epsilons)}. It holds however batches were drawn, as long as a record's "
            "presence does not decide which other records share its batch."
        )
        if self.assumed_epsilons is None:
            return [
                without,
                "With amplification: not computed, because the sample rate is not known; pass sample_rate=... if you know it.",
            ]
        amplified = (
            f"With amplification: {_pairs(self.assumed_epsilons)}. It holds only if every batch of the unknown sampler was an "
            f"independent Poisson draw at rate {self.assumed_rate:g}, which shuffled batches of a fixed size are not."
        )
        return [without, amplified]


def _describe(sampling: Sampling | None) -> str:
    if sampling is None:
        return "unknown"
    size = "" if sampling.dataset_size is None else f" of {sampling.dataset_size} records"
    if sampling.kind == "poisson":
        return f"Poisson, rate {sampling.sample_rate:g}{size}"
    return f"Poisson, rate {sampling.sample_rate:g}{size}, truncated to {sampling.truncated_batch_size}"


def _span(values: Any) -> str:
    distinct = sorted(set(values))
    if not distinct:
        return "none"
    return f"{distinct[0]:.6g}" if len(distinct) == 1 else f"{distinct[0]:.6g} to {distinct[-1]:.6g}"


def _pairs(epsilons: Mapping[float, float]) -> str:
    return ", ".join(f"epsilon = {rounded_up(epsilon)} at delta = {delta:g}" for delta, epsilon in epsilons.items())


def rounded_up(epsilon: float) -> str:
    """An epsilon with four digits, never less than the number."""
    if not 0 < epsilon < math.inf:
        return "0" if epsilon == 0 else "infinite (no privacy)"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
    return f"{math.ceil(epsilon / unit) * unit:.4g}"


def spent(
    history: History,
    *deltas: float,
    sample_rate: float | None = None,
    accountant: AccountantName = "pld",
    relation: Relation = "add_or_remove_one",
    clipping: str = "norm at most C for each record",
    notes: tuple[str, ...] = (),
) -> Spent:
    """What these releases cost. ``sample_rate`` is the caller's claim about batches from an unknown sampler.

    Raises:
        ImportError: dp-accounting is not installed.
        OptionsError: a delta or the rate is out of range, or the accountant cannot compute this.
    """
    counts = history.mechanisms()
    unknown = sum(count for mechanism, count in counts.items() if mechanism.sampling is None)
    assumed: Counter[Mechanism] | None = None
    if sample_rate is not None and unknown:
        claimed = Sampling("poisson", real("sample_rate", sample_rate))
        assumed = Counter()
        for mechanism, count in counts.items():
            assumed[Mechanism(mechanism.noise_multiplier, mechanism.sampling or claimed)] += count
    return Spent(
        releases=history.releases,
        micro_batches=history.micro_batches,
        unreadable=history.unreadable,
        unknown_sampler=unknown,
        epsilons={delta: epsilon_of(counts, delta, accountant, relation) for delta in deltas},
        assumed_rate=None if assumed is None else sample_rate,
        assumed_epsilons=None if assumed is None else {delta: epsilon_of(assumed, delta, accountant, relation) for delta in deltas},
        mechanisms=tuple(counts.items()),
        accountant=accountant_version(accountant),
        relation=relation,
        clipping=clipping,
        notes=notes,
    )
