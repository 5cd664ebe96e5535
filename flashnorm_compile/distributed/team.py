"""What ranks that train one model together must have in common: options, settings, counters, and the secret of the noise."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..noise_key import NoiseKey
from ..passes.errors import PrivacyError

# A rank that waits this long for the others is alone: one of them died, or did not make the same change.
TIMEOUT = timedelta(minutes=5)


class Team:
    """``ranks`` train together; ``data_ranks`` of them hold samples of their own (the others compute parts of the same ones)."""

    def __init__(self, ranks: tuple[int, ...], data_ranks: int) -> None:
        self.ranks, self.data_ranks = ranks, data_ranks
        self._group: Any = None

    @property
    def group(self) -> Any:
        """A process group for Python objects, on the CPU, made when it is first needed."""
        if self._group is None:
            self._group = dist.new_group(self.ranks, timeout=TIMEOUT, backend="gloo", use_local_synchronization=True)
        return self._group

    def agree(self, key: NoiseKey, facts: dict[str, Any], account: Any = None) -> Any:
        """Compares ``facts`` among all ranks, and gives all the first rank's secret. Every rank has to call it.

        Returns:
            The first rank's ``account``, which a ledger may have kept beyond the checkpoint that the others know.

        Raises:
            PrivacyError: on every rank, if ranks differ in a fact; it names the fact, the ranks and their values.
        """
        first = dist.get_rank() == self.ranks[0]
        mine = (facts, key.share() if first else b"", account if first else None)
        everybody: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(everybody, mine, group=self.group)
        differences = [line for name in facts for line in self._differences(name, [told.get(name) for told, *_ in everybody])]
        if differences:
            shown = "\n".join(differences[:8])
            raise PrivacyError(
                f"The ranks of this training do not agree, so nothing was released:\n{shown}\n"
                "Give every rank the same options, change settings on every rank alike, and load the same checkpoint everywhere."
            )
        key.take(everybody[0][1])
        return everybody[0][2]

    def _differences(self, name: str, values: list[Any]) -> list[str]:
        odd = [(rank, value) for rank, value in zip(self.ranks, values, strict=True) if value != values[0]]
        return [f"  {name}: rank {rank} has {value!r}, rank {self.ranks[0]} has {values[0]!r}" for rank, value in odd[:2]]
