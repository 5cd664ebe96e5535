"""Logical batches of varying size as physical batches of one size, with a mask for the padding.

After Beltran et al., "Towards Efficient and Scalable Training of Differentially Private Deep Learning" (arXiv 2406.17298):
a Poisson draw of K samples becomes ceil(K / P) physical batches of P, the last one filled up, so that nothing recompiles
and memory is bounded by P. A masked sample has loss zero, hence gradient zero, and every clipping factor is finite: it
adds exactly zero to the clipped sum.

Dimensions: K samples of a draw on this rank, P samples of a physical batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch.utils.data import DataLoader

from ..accounting.account import Batch
from ..passes.errors import OptionsError
from ..state import PrivacyState
from .padding import PADDING, WithPadding, map_tensors, with_mask
from .poisson import PoissonSampler


@dataclass(frozen=True)
class _Part:
    """What the main process knows about a physical batch that a worker is loading."""

    batch: Batch
    size: int
    """Samples that are not padding."""


class PrivateDataLoader:
    """Physical batches of Poisson draws, made by ``private_dataloader``. Iterating drives the privacy state.

    While a batch is out, the state knows which samples its backward pass uses: passes on all but the last physical batch
    of a draw add clipped sums, the last one adds the noise. ``batch_complete`` tells which it is.
    """

    def __init__(
        self,
        dataset: Any,
        state: PrivacyState,
        sampler: PoissonSampler,
        *,
        physical_batch_size: int | None,
        collate: Callable[[list[Any]], Any],
        mask_name: str | None,
        padding_sample: Any,
        rank: int,
        world_size: int,
        lookahead: int,
        loading: Mapping[str, Any],
    ) -> None:
        self.sampler = sampler
        self.physical_batch_size = physical_batch_size
        self.batch_complete = False
        """Whether the batch at hand is the last of its logical batch, so that the optimizer may step after it."""
        self._state = state
        self._mask_name = mask_name
        self._rank, self._world_size = rank, world_size
        self._lookahead = lookahead
        self._parts: deque[_Part] = deque()
        self._left: int | None = None  # draws that a loaded state says are left of an iteration
        self._remaining = sampler.steps
        self._loader: DataLoader[Any] = DataLoader(
            WithPadding(dataset, padding_sample),
            batch_sampler=_Indices(self),
            collate_fn=collate,
            **loading,
        )

    @property
    def expected_batch_size(self) -> float:
        """L = q * N, by which the state divides the clipped sum unless the option of that name says otherwise."""
        return self.sampler.expected_batch_size

    def __len__(self) -> int:
        """Batches in one iteration, where draws cannot need more than one physical batch.

        Raises:
            TypeError: the number depends on the draws.
        """
        if not self.one_part:
            raise TypeError(
                "The number of physical batches depends on the draws. It is fixed with truncated_batch_size <= "
                "physical_batch_size * world_size; loader.sampler.steps is the number of logical batches."
            )
        return self.sampler.steps

    @property
    def one_part(self) -> bool:
        """Whether every draw is one physical batch."""
        limit, size = self.sampler.sampling.truncated_batch_size, self.physical_batch_size
        return size is None or (limit is not None and self._share(limit) <= size)

    def _share(self, samples: int) -> int:
        """The most samples that one rank gets of so many."""
        return -(-samples // self._world_size)

    def _parts_of(self, number: int) -> Iterator[tuple[list[int], _Part]]:
        """The physical batches of a draw on this rank: indices, filled up with padding, and what is known about them.

        Every rank makes as many, so that collectives match.
        """
        drawn = self.sampler.draw(number)
        mine = drawn[self._rank :: self._world_size].tolist()
        size = self.physical_batch_size
        count = 1 if size is None else max(-(-self._share(len(drawn)) // size), 1)
        for part in range(count):
            indices = mine if size is None else mine[part * size : (part + 1) * size]
            batch = Batch(self.sampler.sampling, self.sampler.stream, number, part, part == count - 1)
            # An empty batch still needs one sample, for the shapes; the variable form cuts it off again.
            padding = max(1 - len(indices), 0) if size is None else size - len(indices)
            yield indices + [PADDING] * padding, _Part(batch, len(indices))

    def __iter__(self) -> Iterator[Any]:
        parts = self._parts = deque()  # an iteration that was left early may still hold the old one
        fetched: deque[Batch] = deque()  # handed out, not used yet
        self._state.account.upcoming.clear()
        self._remaining, self._left = self._left or self.sampler.steps, None
        for collated in self._loader:
            part = parts.popleft()
            self.batch_complete = part.batch.is_last
            if part.batch.is_last:
                self.sampler.position = part.batch.draw + 1
                self._remaining -= 1
            self._state.expected_batch_size = self.expected_batch_size
            fetched.append(part.batch)
            with self._state.using(fetched.popleft()) if len(fetched) > self._lookahead else nullcontext():
                yield self._deliver(collated, part.size)
        self._state.account.upcoming.extend(fetched)
        self.batch_complete = False

    def planned(self) -> Iterator[list[int]]:
        """Index lists in order, for the workers; runs ahead of what has been delivered."""
        return self._plan(self._parts, self.sampler.position, self._remaining)

    def _plan(self, parts: deque[_Part], first: int, draws: int) -> Iterator[list[int]]:
        for number in range(first, first + draws):
            for indices, part in self._parts_of(number):
                parts.append(part)
                yield indices

    def _deliver(self, collated: Any, size: int) -> Any:
        """The batch with its mask, float32 [P]: 1.0 for a sample, 0.0 for padding."""
        variable = self.physical_batch_size is None
        length = size if variable else self.physical_batch_size
        assert length is not None
        if variable and size == 0:
            collated = map_tensors(collated, lambda tensor: tensor[:0])
        mask = (torch.arange(length) < size).float()
        delivered = with_mask(collated, mask, self._mask_name)
        if variable:
            map_tensors(delivered, _mark)
        return delivered

    def state_dict(self) -> dict[str, Any]:
        """Position behind the last logical batch that was delivered completely. Holds no key; see ``PoissonSampler``."""
        return {"sampler": self.sampler.state_dict(), "left": self._remaining}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on there: the next iteration delivers what was left of the one that was interrupted.

        Raises:
            OptionsError: the state is of a sampler with other settings, or of something else.
        """
        if set(state) != {"sampler", "left"}:
            raise OptionsError(
                f"load_state_dict needs what state_dict() of a private loader returned; got the keys {sorted(state)}."
            )
        self.sampler.load_state_dict(state["sampler"])
        self._left = int(state["left"]) or None


class _Indices:
    """The batch sampler of the inner loader."""

    def __init__(self, loader: PrivateDataLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self._loader.planned()


def _mark(tensor: Tensor) -> Tensor:
    mark_unbacked(tensor, 0)
    return tensor
