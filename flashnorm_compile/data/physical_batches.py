"""Logical batches of varying size as physical batches of one size, with a mask for the padding.

After Beltran et al., "Towards Efficient and Scalable Training of Differentially Private Deep Learning" (arXiv 2406.17298):
a Poisson draw of K samples becomes ceil(K / P) physical batches of P, the last one filled up, so that nothing recompiles
and memory is bounded by P. A masked sample has loss zero, hence gradient zero, and every clipping factor is finite: it
adds exactly zero to the clipped sum.

Dimensions: K samples of a draw on this rank, P samples of a physical batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..accounting.account import Batch
from ..options import real
from ..passes.errors import OptionsError
from ..state import PrivacyState
from .padding import PADDING, WithPadding, map_tensors, with_mask
from .poisson import PoissonSampler, positive

_INHERITED = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


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


def private_dataloader(
    source: DataLoader[Any] | Dataset[Any] | Sequence[Any],
    state: PrivacyState,
    *,
    sample_rate: float | None = None,
    expected_batch_size: float | None = None,
    physical_batch_size: int | Literal["variable"] | None = None,
    steps: int | None = None,
    truncated_batch_size: int | None = None,
    seed: int | None = None,
    mask_name: str | None = "sample_mask",
    padding_sample: Any = None,
    rank: int | None = None,
    world_size: int | None = None,
    lookahead: int = 0,
    **loading: Any,
) -> PrivateDataLoader:
    """Poisson-sampled batches for private training, credited by the account of ``state``.

        loader = private_dataloader(dataset, privacy(model), expected_batch_size=256, physical_batch_size=64)
        for x, y, mask in loader:
            (private_losses(x, y) * mask).mean().backward()
            if loader.batch_complete:
                optimizer.step()
                optimizer.zero_grad()

    Multiply each sample's loss by the mask (float32 [P], 1.0 for a sample and 0.0 for padding): then padding adds exactly
    zero. Tuples and lists get the mask as their last element, dicts as ``mask_name``, anything else comes as (batch, mask).
    One iteration has ``steps`` logical batches; iterating again goes on with the next draws.

    Args:
        source: a map-style data set, or a DataLoader, from which data set, collate function, workers and, where they are
            not given, expected and physical batch size are taken. Its shuffling and ``drop_last`` have no meaning here.
        state: ``privacy(model)``.
        sample_rate, expected_batch_size: q, or L = q * N; one of them.
        physical_batch_size: P, samples of one forward pass on one rank, for any size of draw. "variable" delivers each draw
            as one batch of its own size (possibly 0), marked unbacked along dimension 0, so that nothing recompiles either;
            memory is then bounded by ``truncated_batch_size`` only, and the loss must allow for an empty batch.
        steps, truncated_batch_size, seed: see ``PoissonSampler``.
        mask_name: key of the mask in dicts; None leaves the mask out, which needs a ``padding_sample`` whose loss has no
            gradient (labels that the loss ignores).
        padding_sample: a sample as the data set gives it, to fill batches with; default: its first one with every
            number set to 0 and every text empty.
        rank, world_size: which part of each draw is delivered here; default: from ``torch.distributed`` if initialized. All
            ranks split one and the same draw.
        lookahead: how many further batches the loop fetches before it uses one: 0 for a plain loop, 1 where a wrapper looks
            one batch ahead to know the last one, as accelerate's DataLoaderShard does. Needs draws of one physical batch
            each (``truncated_batch_size`` <= ``physical_batch_size`` * ``world_size``).
        loading: further arguments of DataLoader, such as ``num_workers`` and ``collate_fn``.

    Raises:
        OptionsError: an argument is missing or out of range, or the source has no length or no index.
    """
    if isinstance(source, DataLoader):
        inherited = {name: getattr(source, name) for name in _INHERITED}
        loading = {"collate_fn": source.collate_fn, **inherited, **loading}
        dataset: Any = source.dataset
        if sample_rate is None and expected_batch_size is None:
            expected_batch_size = source.batch_size
        physical_batch_size = source.batch_size if physical_batch_size is None else physical_batch_size
    else:
        dataset = source
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise OptionsError(
            f"private_dataloader needs a map-style data set, with __getitem__ and __len__; got {type(dataset).__name__}. "
            "Poisson sampling chooses among all records, which a stream does not allow."
        )
    if (sample_rate is None) == (expected_batch_size is None):
        raise OptionsError(
            f"sample_rate={sample_rate!r} and expected_batch_size={expected_batch_size!r}: set one of the two (L = q * N)."
        )
    if physical_batch_size is None:
        raise OptionsError("physical_batch_size is missing: the samples that one forward pass takes, such as 64, or 'variable'.")
    if mask_name is None and (padding_sample is None or physical_batch_size == "variable"):
        raise OptionsError(
            "mask_name=None leaves no mask to cancel the padding. Give a padding_sample whose loss has no gradient, and a "
            "physical_batch_size that is a number."
        )
    refused = {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"} & set(loading)
    if refused:
        raise OptionsError(f"{', '.join(sorted(refused))}: the private loader decides this. Leave it out.")
    size = positive("the number of records", len(dataset))
    rate = real("expected_batch_size", expected_batch_size) / size if sample_rate is None else sample_rate
    rank, world_size = _place(rank, world_size, seed)
    loader = PrivateDataLoader(
        dataset,
        state,
        PoissonSampler(size, rate, steps=steps, truncated_batch_size=truncated_batch_size, seed=seed),
        physical_batch_size=None if physical_batch_size == "variable" else positive("physical_batch_size", physical_batch_size),
        collate=loading.pop("collate_fn", None) or default_collate,
        mask_name=mask_name,
        padding_sample=padding_sample,
        rank=rank,
        world_size=world_size,
        lookahead=0 if lookahead == 0 else positive("lookahead", lookahead),
        loading=loading,
    )
    if lookahead and not loader.one_part:
        raise OptionsError(
            f"lookahead={lookahead} with draws of several physical batches: a loop that fetches ahead would add the noise to the "
            "wrong one. Set truncated_batch_size <= physical_batch_size * world_size, so that each draw is one batch."
        )
    return loader


def _place(rank: int | None, world_size: int | None, seed: int | None) -> tuple[int, int]:
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None and world_size is None:
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if initialized else (0, 1)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise OptionsError(f"rank={rank!r} and world_size={world_size!r}: set both, with 0 <= rank < world_size, or neither.")
    if world_size > 1 and seed is None and not initialized:
        raise OptionsError(
            "All ranks must split the same draws, but without torch.distributed each process has a key of its own. Call "
            "torch.distributed.init_process_group first, or give all ranks the same secret seed."
        )
    return rank, world_size


def _mark(tensor: Tensor) -> Tensor:
    mark_unbacked(tensor, 0)
    return tensor
