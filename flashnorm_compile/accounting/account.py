"""The account of one training while it runs: which samples went into a release, and the ledger that it is written to."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..passes.errors import PrivacyError
from .ledger import Ledger
from .mechanism import History, Mechanism, Release, Sampling


@dataclasses.dataclass(frozen=True)
class Batch:
    """A physical batch: one part of one draw of a sampler. Its samples are in no other part of that draw."""

    sampling: Sampling
    stream: str
    draw: int
    part: int
    is_last: bool
    """Whether it completes its logical batch, so that its backward pass adds the noise."""


class Account:
    """Counts noised releases and what they depend on.

    Without a ``Batch`` nothing is known about the samples of a backward pass: it is taken, as the documentation of
    ``accumulate`` asks, that no sample is in two passes of one release, and no amplification by sampling is credited.
    With one, a sample that was in several passes of one release is seen, and its larger sensitivity is recorded as a
    smaller noise multiplier.
    """

    def __init__(self) -> None:
        self.history = History()
        self.batch: Batch | None = None
        self.upcoming: deque[Batch] = deque()
        """Batches that a loop fetched ahead and has yet to use, one in each of the next passes, after the loader ended."""
        self._ledger: Ledger | None = None
        self._passes: Counter[Batch | None] = Counter()  # what the next noised release may contain
        self._noised = False

    @property
    def ledger_path(self) -> str | None:
        """Where releases are recorded, or None."""
        return None if self._ledger is None else str(self._ledger.path)

    @contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """Says that backward passes inside use the samples of ``batch``."""
        outer, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = outer

    def count_pass(self, sums_wait: bool) -> None:
        """Counts one backward pass. ``sums_wait``: whether sums from before the last noise may still lack theirs."""
        if self._noised and not sums_wait:
            self._passes.clear()
        self._noised = False
        ahead = self.upcoming.popleft() if self.batch is None and self.upcoming else None
        self._passes[self.batch or ahead] += 1

    @property
    def holds_sums(self) -> bool:
        """Whether clipped sums wait for their noise."""
        return bool(self._passes)

    def drop_sums(self) -> None:
        """The sums that waited for their noise are gone: no gradient holds them any more."""
        self._passes.clear()

    def release(self, noise_multiplier: float) -> None:
        """Counts a noised release of everything since the last one, durably if there is a ledger.

        Raises:
            PrivacyError, OSError: the ledger cannot be written. Nothing must be released then.
        """
        release = self._release(noise_multiplier)
        if self._ledger is None:
            self.history.add(release)
        else:
            self._ledger.append(release)
        self._noised = True

    def _release(self, noise_multiplier: float) -> Release:
        micro_batches = max(self._passes.total(), 1)
        # How often one sample can be in the sum: once for each draw, and once more for each pass that repeats a batch.
        repeats: dict[tuple[str, int] | None, int] = {}
        for batch, count in self._passes.items():
            draw = None if batch is None else (batch.stream, batch.draw)
            repeats[draw] = max(repeats.get(draw, 1), 1 if batch is None else count)
        multiplicity = max(sum(repeats.values()), 1)
        draws = [draw for draw in repeats if draw is not None]
        one_draw = len(repeats) == 1 and len(draws) == 1
        sampling = next(batch.sampling for batch in self._passes if batch) if one_draw else None
        return Release(Mechanism(noise_multiplier / multiplicity, sampling), draws[0] if one_draw else None, micro_batches)

    def record_to(self, path: str | os.PathLike[str]) -> None:
        """Writes every release from now on to the ledger at ``path``, and takes over what it already holds.

        Raises:
            PrivacyError: the file is no ledger, is in use, or holds fewer releases than this account.
        """
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
        ledger = Ledger(path, carried=self.history)
        if ledger.history.releases < self.history.releases:
            ledger.close()
            raise PrivacyError(
                f"The ledger {ledger.path} holds {ledger.history.releases} releases, fewer than the "
                f"{self.history.releases} that this training has made. It belongs to another training or an older "
                "copy. Give record_to the ledger of this training, or a path that does not exist yet."
            )
        self._ledger, self.history = ledger, ledger.history

    def close(self) -> None:
        """Closes the ledger, if there is one."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Takes over ``History.to_plain``. With a ledger, that one stays the record, and may hold more.

        Raises:
            PrivacyError: the ledger holds fewer releases than what is to be restored.
        """
        restored = History.from_plain(plain)
        if self._ledger is None:
            self.history = restored
        elif self.history.releases < restored.releases:
            raise PrivacyError(
                f"The checkpoint counts {restored.releases} releases, the ledger {self.ledger_path} only "
                f"{self.history.releases}: it is not this training's ledger. Load the checkpoint first, then call "
                "record_to with the right path, or with a path that does not exist yet."
            )
        self._passes.clear()
