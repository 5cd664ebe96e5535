"""What ranks that train one model together must have in common: options, settings, counters, and the secret of the noise."""

from __future__ import annotations

import pickle
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..noise_key import NoiseKey
from ..passes import _compat
from ..passes.errors import PrivacyError

# A rank that waits this long for the others is alone: one of them died, or did not make the same change.
TIMEOUT = timedelta(minutes=5)
_made: Counter[tuple[int, ...]] = Counter()


class Team:
    """``ranks`` train together; ``data_ranks`` of them hold samples of their own (the others compute parts of the same ones)."""

    def __init__(self, ranks: tuple[int, ...], data_ranks: int) -> None:
        self.ranks, self.data_ranks = ranks, data_ranks
        self._group: Any = None

    def _everybodys(self, mine: Any) -> list[Any]:
        """What every rank gives, in the order of the ranks; by a process group of the team's own, on the CPU."""
        if self._group is None:
            # A name that the ranks have in common whatever other groups each of them has made. torch's own names for groups that
            # only their members make hold how many a rank has: members that differ in that wait for each other forever.
            _made[self.ranks] += 1
            self._group = _compat.gloo_group(f"flashnorm team {self.ranks}, {_made[self.ranks]}", self.ranks, TIMEOUT)
        told = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in self.ranks]
        self._group.allgather([sizes], [torch.tensor([len(told)], device="cpu")]).wait()
        longest = int(max(sizes))
        everybodys = [torch.zeros(longest, dtype=torch.uint8, device="cpu") for _ in self.ranks]
        self._group.allgather([everybodys], [torch.nn.functional.pad(told, (0, longest - len(told)))]).wait()
        return [pickle.loads(one[: int(size)].numpy().tobytes()) for one, size in zip(everybodys, sizes, strict=True)]

    def agree(self, key: NoiseKey, facts: dict[str, Any], account: Any = None) -> Any:
        """Compares ``facts`` among all ranks, and gives all the first rank's secret. Every rank has to call it.

        Returns:
            The first rank's ``account``, which a ledger may have kept beyond the checkpoint that the others know.

        Raises:
            PrivacyError: on every rank, if ranks differ in a fact; it names the fact, the ranks and their values.
        """
        first = dist.get_rank() == self.ranks[0]
        mine = (facts, key.share() if first else b"", account if first else None)
        everybody = self._everybodys(mine)
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
