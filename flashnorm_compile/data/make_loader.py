"""The function that makes a private loader of what a training loop has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..options import real
from ..passes.errors import OptionsError
from ..state import PrivacyState
from .physical_batches import PrivateDataLoader
from .poisson import PoissonSampler, positive

_INHERITED = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


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
    dataset: Any = source
    if isinstance(source, DataLoader):
        loading = {name: getattr(source, name) for name in _INHERITED} | loading
        dataset = source.dataset
        if sample_rate is None and expected_batch_size is None:
            expected_batch_size = source.batch_size
        physical_batch_size = source.batch_size if physical_batch_size is None else physical_batch_size
    _check_data(dataset)
    _check_loading(loading)
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


def _check_data(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise OptionsError(
            f"private_dataloader needs a map-style data set, with __getitem__ and __len__; got {type(dataset).__name__}. "
            "Poisson sampling chooses among all records, which a stream does not allow."
        )


def _check_loading(loading: Mapping[str, Any]) -> None:
    refused = {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"} & set(loading)
    if refused:
        raise OptionsError(f"{', '.join(sorted(refused))}: the private loader decides this. Leave it out.")


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
