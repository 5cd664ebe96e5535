"""Poisson sampling of logical batches, plain and truncated.

Draw n is a function of (key, n) alone: a SHAKE-128 stream gives one 64-bit number for each record, and a record is in
the draw if its number is below ``sample_rate * 2**64``. So any draw can be made again at any time, on any rank, and
nothing but the key has to be kept secret.
"""

from __future__ import annotations

import hashlib
import numbers
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..accounting.mechanism import Sampling
from ..options import real
from ..passes.errors import OptionsError

_CHUNK = 2**20  # records whose random numbers are in memory at once, 8 bytes each


class PoissonSampler(Sampler[list[int]]):
    """Logical batches: every record is in each of them with probability ``sample_rate``, independently of all else.

    A batch sampler for map-style data sets. Batches differ in size and may be empty; ``private_dataloader`` makes batches
    of one size from them, and is what the account credits.

    Args:
        dataset_size: number of records N >= 1.
        sample_rate: probability q, 0 < q <= 1. The expected batch size is q * N.
        steps: draws in one iteration; default: 1/q, rounded.
        truncated_batch_size: larger draws are cut to a uniformly random subset of this size.
        seed: makes the draws repeatable, in this process and after a resume. Who knows the seed knows who was in which
            batch, and no privacy amplification holds against them. Default: a key from the operating system, shared by
            broadcast when ``torch.distributed`` is initialized; it is never stored, so that a resumed run draws afresh.

    Raises:
        OptionsError: an argument is out of range.
    """

    def __init__(
        self,
        dataset_size: int,
        sample_rate: float,
        *,
        steps: int | None = None,
        truncated_batch_size: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.dataset_size = positive("dataset_size", dataset_size)
        rate = real("sample_rate", sample_rate)
        if not rate <= 1:
            raise OptionsError(
                f"sample_rate must be a probability, > 0 and <= 1; got {sample_rate!r}. It is expected batch size / N."
            )
        self.steps = positive("steps", max(round(1 / rate), 1) if steps is None else steps)
        truncated = None if truncated_batch_size is None else positive("truncated_batch_size", truncated_batch_size)
        kind = "poisson" if truncated is None else "truncated_poisson"
        self.sampling = Sampling(kind, rate, self.dataset_size, truncated)  # type: ignore[arg-type]
        self._threshold = int(rate * 2**64) - 2**63
        self._key = _shared_key() if seed is None else hashlib.blake2b(f"sampler seed {seed}".encode(), digest_size=32).digest()
        self.position = 0

    @property
    def expected_batch_size(self) -> float:
        """q * N, before truncation: the L that the clipped sum is divided by."""
        return self.sampling.sample_rate * self.dataset_size

    @property
    def stream(self) -> str:
        """A public name of this sequence of draws. It tells nothing about them."""
        return hashlib.blake2b(self._key, digest_size=8, person=b"sampler stream").hexdigest()

    def draw(self, number: int) -> Tensor:
        """Indices of the records in draw ``number``: int64 [K], ascending; K varies and may be 0."""
        found, keys = [], []
        for start in range(0, self.dataset_size, _CHUNK):
            count = min(_CHUNK, self.dataset_size - start)
            uniform = self._uniform(number, start, count)
            inside = (
                torch.arange(count, device="cpu") if self._threshold >= 2**63 else (uniform < self._threshold).nonzero().squeeze(1)
            )
            found.append(inside + start)
            keys.append(uniform[inside])
        records = torch.cat(found)
        limit = self.sampling.truncated_batch_size
        if limit is not None and len(records) > limit:
            # Below the threshold the numbers are still uniform and independent, so the smallest are a uniform subset.
            smallest = torch.cat(keys).topk(limit, largest=False).indices
            records = records[smallest].sort().values
        return records

    def _uniform(self, number: int, start: int, count: int) -> Tensor:
        """int64 [count], uniform over all 64-bit values."""
        material = self._key + number.to_bytes(8, "little") + start.to_bytes(8, "little")
        return torch.frombuffer(bytearray(hashlib.shake_128(material).digest(8 * count)), dtype=torch.int64)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            number, self.position = self.position, self.position + 1
            yield self.draw(number).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands. The key is not in it: it must stay unknown to whoever sees a checkpoint."""
        return {"position": self.position, "stream": self.stream, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on behind the last draw. With the same seed the draws are those that an unbroken run would have made.

        Raises:
            OptionsError: the state is of a sampler with other settings.
        """
        expected = {**self._settings(), "position": None, "stream": None}
        different = [
            name for name in {*expected, *state} if name not in ("position", "stream") and state.get(name) != expected.get(name)
        ]
        if different or "position" not in state:
            shown = ", ".join(
                f"{name}: {state.get(name)!r} in the state, {expected.get(name)!r} here" for name in sorted(different)
            )
            raise OptionsError(
                f"The state is not of this sampler ({shown or 'no position'}). Make the sampler with the same settings."
            )
        self.position = int(state["position"])

    def _settings(self) -> dict[str, Any]:
        sampling = self.sampling
        return {
            "dataset_size": sampling.dataset_size,
            "sample_rate": sampling.sample_rate,
            "truncated_batch_size": sampling.truncated_batch_size,
        }


def positive(name: str, value: Any) -> int:
    """Returns ``value`` as an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise OptionsError(f"{name} must be an integer >= 1; got {value!r}.")
    return int(value)


def _shared_key() -> bytes:
    """32 bytes of the operating system's entropy, the same on all ranks."""
    key = os.urandom(32)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shared = [key]
        torch.distributed.broadcast_object_list(shared, src=0)
        key = shared[0]
    return key
