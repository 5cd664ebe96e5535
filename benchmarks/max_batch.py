"""The largest physical batch that fits into a GPU's memory, as Rodriguez Beltran et al. 2024 report it."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Privacy
from benchmarks.runner import DTYPES, matmul_precision
from benchmarks.suites.vision import ARCHITECTURES

FILE_NAME = "max_batch.json"


@dataclass(frozen=True)
class MaxBatchRow:
    """`batch` samples fit, 0 if not even one does; None beside an `error`."""

    architecture: str
    contender: str
    precision: str
    batch: int | None
    error: str | None
    device: str
    versions: Mapping[str, str]
    date: str


def search(architectures: Sequence[str], contenders: Sequence[Contender], precision: str) -> Iterable[MaxBatchRow]:
    """A row for each pair. Compiled contenders compile at every size that is tried, about ten times."""
    for architecture in architectures:
        for contender in contenders:
            batch, error = None, None
            with matmul_precision(precision):
                try:
                    batch = max_physical_batch(contender, architecture, dtype=DTYPES[precision])
                except Exception as raised:  # the row tells it
                    error = f"{type(raised).__name__}: {raised}"
            peer = contender.version()
            versions = machine.versions() | ({"peer": peer} if peer else {})
            row = MaxBatchRow(
                architecture, contender.name, precision, batch, error, machine.device_name("cuda"), versions, machine.today()
            )
            yield row


def write(rows: Iterable[MaxBatchRow], path: Path) -> None:
    """Adds rows to a file, replacing those of the same architecture, contender and precision."""
    kept = {(row.architecture, row.contender, row.precision): row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(row) for row in kept.values()], indent=1) + "\n")


def read(path: Path) -> list[MaxBatchRow]:
    return [MaxBatchRow(**row) for row in json.loads(path.read_text())] if path.exists() else []


def markdown_table(rows: Sequence[MaxBatchRow]) -> str:
    """Contenders down, architectures across."""
    columns = list(dict.fromkeys((row.architecture, row.precision) for row in rows))
    lines = ["| contender | " + " | ".join(f"{name}, {precision}" for name, precision in columns) + " |"]
    lines.append("| --- " + "| ---: " * len(columns) + "|")
    for contender in dict.fromkeys(row.contender for row in rows):
        own = {(row.architecture, row.precision): row for row in rows if row.contender == contender}
        cells = ["-" if (row := own.get(key)) is None else "failed" if row.batch is None else str(row.batch) for key in columns]
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def max_physical_batch(contender: Contender, architecture: str, *, dtype: torch.dtype = torch.float32, limit: int = 8192) -> int:
    """The largest batch size, to within 1/16 of it, with which `contender` takes two steps on the CUDA device.

    `architecture` is a name in `benchmarks.suites.vision.ARCHITECTURES`. Sizes beyond `limit` are not tried. 0 means that
    not even one sample fits. As in the timed runs, a second copy of the weights is held. Whatever is raised for another
    reason than memory, such as CannotRunError, is passed on.
    """
    layers, problem = ARCHITECTURES[architecture].layers, ARCHITECTURES[architecture].problem
    return largest_batch(lambda batch: fits(contender, lambda: problem(layers, batch).to("cuda", dtype)), limit=limit)


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
