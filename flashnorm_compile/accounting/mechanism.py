"""What was released, in the terms of an accountant: one Gaussian mechanism for each draw of a batch, run-length coded.

A draw that was used for two noised releases is one mechanism with less noise, not two mechanisms with fresh samples:
Gaussian releases of the same samples with noise multipliers s_1, s_2 are as private as one with
(s_1^-2 + s_2^-2)^-1/2. Counting them as two subsampled mechanisms would promise too much.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..options import real
from ..passes.errors import PrivacyError

SamplerKind = Literal["poisson", "truncated_poisson"]


@dataclass(frozen=True)
class Sampling:
    """How the records of a batch were chosen."""

    kind: SamplerKind
    """"poisson": each record by itself with probability ``sample_rate``; "truncated_poisson": and if more than
    ``truncated_batch_size`` came, a uniformly random subset of that size."""
    sample_rate: float
    dataset_size: int | None = None
    """Number of records; needed for truncated sampling."""
    truncated_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("poisson", "truncated_poisson"):
            raise PrivacyError(f"sampler must be 'poisson' or 'truncated_poisson'; got {self.kind!r}.")
        if not real("sample_rate", self.sample_rate) <= 1:
            raise PrivacyError(f"sample_rate must be a probability > 0 and <= 1; got {self.sample_rate!r}.")
        if self.kind == "truncated_poisson" and self.dataset_size is None:
            raise PrivacyError("sampler 'truncated_poisson' needs dataset_size: how often a batch is cut depends on it.")
        if (self.truncated_batch_size is not None) != (self.kind == "truncated_poisson"):
            raise PrivacyError(
                f"sampler {self.kind!r} with truncated_batch_size={self.truncated_batch_size!r}: the size belongs to "
                "'truncated_poisson' and to nothing else."
            )


@dataclass(frozen=True)
class Mechanism:
    """A Gaussian mechanism on a batch: noise over sensitivity, and how the batch was drawn (None: unknown)."""

    noise_multiplier: float
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Release:
    """One noised release of gradients."""

    mechanism: Mechanism
    draw: tuple[str, int] | None = None
    """Which draw of which sampler the samples came from; None where nobody said."""
    micro_batches: int = 1


@dataclass
class Span:
    """``count`` equal mechanisms, on the draws ``first``, ``first + 1``, ... of ``stream`` if that is not None."""

    mechanism: Mechanism
    count: int
    stream: str | None = None
    first: int = 0

    def holds(self, draw: tuple[str, int]) -> bool:
        return self.stream == draw[0] and self.first <= draw[1] < self.first + self.count


class History:
    """All noised releases of one training, in a form that stays small.

    ``releases`` counts noised releases, ``micro_batches`` the backward passes that went into them, and ``unreadable``
    the lines of a ledger that could not be read and were counted as a release like the one before.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.releases = 0
        self.micro_batches = 0
        self.unreadable = 0
        self._newest: dict[str, int] = {}  # of each stream, the highest draw

    def add(self, release: Release) -> None:
        """Counts one release; a second one on the same draw makes that draw's mechanism noisier to hide less."""
        self.releases += 1
        self.micro_batches += release.micro_batches
        if release.draw is not None and release.draw[1] <= self._newest.get(release.draw[0], -1):
            release = self._with_earlier(release)
        self._append(release.mechanism, 1, release.draw)

    def _append(self, mechanism: Mechanism, count: int, draw: tuple[str, int] | None) -> None:
        stream, number = draw or (None, 0)
        last = self.spans[-1] if self.spans else None
        if last and last.mechanism == mechanism and last.stream == stream and stream in (None, _stream_at(last, number)):
            last.count += count
        else:
            self.spans.append(Span(mechanism, count, stream, number))
        if stream is not None:
            self._newest[stream] = max(self._newest.get(stream, -1), number + count - 1)

    def _with_earlier(self, release: Release) -> Release:
        """Takes the draw's earlier mechanism out of its span and returns the release that stands for both."""
        draw = release.draw
        assert draw is not None
        for index in reversed(range(len(self.spans))):
            span = self.spans[index]
            if span.holds(draw):
                before = Span(span.mechanism, draw[1] - span.first, span.stream, span.first)
                after = Span(span.mechanism, span.first + span.count - draw[1] - 1, span.stream, draw[1] + 1)
                self.spans[index : index + 1] = [part for part in (before, after) if part.count]
                return Release(_both(span.mechanism, release.mechanism), draw, release.micro_batches)
        return release

    def mechanisms(self) -> Counter[Mechanism]:
        """How often each mechanism was used."""
        counts: Counter[Mechanism] = Counter()
        for span in self.spans:
            counts[span.mechanism] += span.count
        return counts

    def to_plain(self) -> dict[str, Any]:
        """The history as numbers, texts, tuples and dicts; ``from_plain`` is its inverse.

        The same keys for any history, and no list: torch.distributed.checkpoint takes dicts and lists apart, and can only fill in
        entries that the state it loads into has as well.
        """
        spans = tuple(
            {**mechanism_to_plain(span.mechanism), "count": span.count, "stream": span.stream, "first": span.first}
            for span in self.spans
        )
        return {
            "releases": self.releases,
            "micro_batches": self.micro_batches,
            "unreadable": self.unreadable,
            "spans": spans,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> History:
        """Makes the history that ``to_plain`` described."""
        history = cls()
        for item in plain["spans"]:
            draw = None if item["stream"] is None else (str(item["stream"]), int(item["first"]))
            history._append(mechanism_from_plain(item), int(item["count"]), draw)
        for name in ("releases", "micro_batches", "unreadable"):
            setattr(history, name, int(plain[name]))
        return history


def _stream_at(span: Span, number: int) -> str | None:
    """The span's stream if the draw ``number`` directly follows the span, else None."""
    return span.stream if span.first + span.count == number else None


def _both(one: Mechanism, other: Mechanism) -> Mechanism:
    """Two releases of the same samples as one. If they disagree about the sampling, none is credited."""
    sampling = one.sampling if one.sampling == other.sampling else None
    return Mechanism(combined_noise([(one.noise_multiplier, 1), (other.noise_multiplier, 1)]), sampling)


def combined_noise(multipliers: Iterable[tuple[float, int]]) -> float:
    """The noise multiplier of the one Gaussian mechanism that equals all of these (multiplier, count) together."""
    precision = 0.0
    for multiplier, count in multipliers:
        precision += count * (math.inf if multiplier == 0 else multiplier**-2)
    return math.inf if precision == 0 else precision**-0.5


def mechanism_to_plain(mechanism: Mechanism) -> dict[str, Any]:
    """``noise_multiplier``, ``sampler`` and what belongs to it; ``sampler`` and ``sample_rate`` None when unknown."""
    if mechanism.sampling is None:
        return {"noise_multiplier": mechanism.noise_multiplier, "sampler": None, "sample_rate": None}
    sampling = {name: value for name, value in asdict(mechanism.sampling).items() if value is not None}
    return {"noise_multiplier": mechanism.noise_multiplier, "sampler": sampling.pop("kind"), **sampling}


def mechanism_from_plain(plain: Mapping[str, Any]) -> Mechanism:
    """Inverse of ``mechanism_to_plain``; further keys are ignored.

    Raises:
        PrivacyError: a value is out of range.
        KeyError, TypeError: a value is missing or of another kind.
    """
    noise = real("noise_multiplier", plain["noise_multiplier"], allow_zero=True)
    if plain["sampler"] is None:
        return Mechanism(noise)
    sizes = (None if value is None else int(value) for value in map(plain.get, ("dataset_size", "truncated_batch_size")))
    return Mechanism(noise, Sampling(plain["sampler"], float(plain["sample_rate"]), *sizes))
