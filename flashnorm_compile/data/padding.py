"""Samples that only fill a batch up, and the mask that tells them from records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..passes.errors import OptionsError

PADDING = -1
"""The index of a sample that only fills up."""


class WithPadding(Dataset[Any]):
    """A data set in which index -1 is a sample that only fills up.

    It is not a record: a loop that forgets the mask would otherwise train on that record in every batch, unaccounted for.
    """

    def __init__(self, dataset: Any, padding: Any) -> None:
        self.dataset = dataset
        self.padding = padding

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        real = [index for index in indices if index != PADDING]
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = list(fetch(real)) if fetch and real else [self.dataset[index] for index in real]
        if len(real) < len(indices):
            if self.padding is None:
                self.padding = blank(self.dataset[0])
            samples += [self.padding] * (len(indices) - len(real))
        return samples


def blank(sample: Any) -> Any:
    """The sample with every number 0 and every text empty; shapes and types stay."""
    if isinstance(sample, Tensor):
        return torch.zeros_like(sample)
    if isinstance(sample, Mapping):
        return {key: blank(value) for key, value in sample.items()}
    if isinstance(sample, (tuple, list)):
        parts = [blank(value) for value in sample]
        return type(sample)(*parts) if hasattr(sample, "_fields") else type(sample)(parts)
    if sample is None or isinstance(sample, (bool, int, float, complex, str, bytes)):
        return None if sample is None else type(sample)()
    if type(sample).__module__ == "numpy":
        import numpy  # present if the sample is, but not needed by this package

        return numpy.zeros_like(sample)
    raise OptionsError(
        f"A sample holds a {type(sample).__name__}, and nothing says what an empty one is. Give private_dataloader a "
        "padding_sample, which is public and as the data set gives its samples."
    )


def with_mask(collated: Any, mask: Tensor, name: str | None) -> Any:
    """The batch with ``mask`` [P]: under ``name`` in a dict, last in a tuple, else (batch, mask); as it is without a name."""
    if name is None:
        return collated
    if isinstance(collated, Mapping):
        if name in collated:
            raise OptionsError(
                f"The batches already have a key {name!r}. Choose another one: private_dataloader(..., mask_name=...)."
            )
        collated[name] = mask  # type: ignore[index]
        return collated
    if isinstance(collated, (tuple, list)) and not hasattr(collated, "_fields"):
        return (*collated, mask)
    return collated, mask


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Applies ``function`` to all tensors that have a first dimension, in nested dicts, tuples and lists."""
    if isinstance(value, Tensor):
        return function(value) if value.dim() else value
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, function) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(item, function) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
