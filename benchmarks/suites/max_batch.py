"""The largest physical batch that fits into a GPU's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Privacy
from benchmarks.suites.vision import ARCHITECTURES


def max_physical_batch(contender: Contender, architecture: str, *, dtype: torch.dtype = torch.float32, limit: int = 8192) -> int:
    """The largest batch size, to within 1/16 of it, with which `contender` takes two steps on the CUDA device.

    `architecture` is a name in `benchmarks.suites.vision.ARCHITECTURES`. Sizes beyond `limit` are not tried. 0 means that
    not even one sample fits. As in the timed runs, a second copy of the weights is held. Whatever is raised for another
    reason than memory, such as CannotRunError, is passed on.
    """
    problem_of = ARCHITECTURES[architecture].problem
    return largest_batch(lambda batch: fits(contender, lambda: problem_of(batch).to("cuda", dtype)), limit=limit)


def largest_batch(does_fit: Callable[[int], bool], *, limit: int, resolution: float = 1 / 16) -> int:
    """The largest size in 1..limit that fits: doubled while it does, then bisected to within `resolution` of it.

    The answer has been tried and fits. 0 where size 1 does not.
    """
    fitting, failing = 0, limit + 1
    size = 1
    while size < failing:
        if does_fit(size):
            fitting = size
            size = min(2 * size, limit) if size < limit else failing
        else:
            failing = size
    while failing - fitting > max(1.0, resolution * fitting):
        middle = (fitting + failing) // 2
        if does_fit(middle):
            fitting = middle
        else:
            failing = middle
    return fitting


def fits(contender: Contender, build: Callable[[], Problem]) -> bool:
    """Whether the problem takes two steps without running out of memory. The first one makes the optimizer's state."""
    torch._dynamo.reset()
    prepared = None
    try:
        prepared = contender.prepare(build(), Privacy())
        prepared.step()
        prepared.step()
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return False
    else:
        return True
    finally:
        if prepared is not None:
            prepared.close()
        prepared = None
        _give_back_memory()


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where the compiler wrapped it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _give_back_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
