"""Which tiles, and how many segments of the steps, ``flashnorm::clipped_sum`` uses for a shape.

Constants are counted from published peaks, but for two that an H200 was timed for (benchmarks/results/kernels): sums over several
segments, and short steps.

Legend: B samples, T positions, p rows and d columns of the weight, S segments of the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ._triton import Device, ceil_div, narrowed

FEW_POSITIONS = 8  # up to here at least half of the smallest step that tensor cores take would be empty
_LAUNCH_CLOCKS = 2000  # about 1 us: adding the segments is a launch
_LARGEST_SPLIT = 32
# Segments are written and read through memory, at 2.1 to 2.5 TB/s: a quarter of what all multiprocessors could read from L2.
_EXCHANGE = 4
# A step of 32 positions takes 1.5 to 1.7 times what its FLOPs and its bytes say; one of 64 takes just that.
_SHORT_STEP = 1.5


@dataclass(frozen=True)
class Tiles:
    """A tile's shape and how it is compiled. ``SPLIT``: S; ``ROWS``: steps take rows of several samples."""

    BLOCK_P: int
    BLOCK_D: int
    BLOCK_T: int
    num_warps: int
    num_stages: int
    SPLIT: int = 1
    ROWS: bool = False

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel takes as constants."""
        return {name: value for name, value in asdict(self).items() if name.isupper()}


# Product and total are 2 * BLOCK_P * BLOCK_D * 4 bytes of registers: at 128 x 128 they are half of those of 256 threads.
_HALF = (Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 32, 8, 4), Tiles(64, 128, 64, 8, 4), Tiles(64, 64, 64, 4, 4))
_TF32 = (Tiles(128, 128, 32, 8, 3), Tiles(64, 64, 32, 4, 3))
_IEEE = (Tiles(64, 64, 16, 8, 2), Tiles(32, 32, 16, 4, 2))
_FEW = (Tiles(64, 128, 32, 8, 2, ROWS=True), Tiles(64, 64, 32, 4, 2, ROWS=True))


@dataclass(frozen=True)
class Choice:
    """Tiles for a shape; ``clocks`` is what the choice minimizes."""

    tiles: Tiles
    batch: int
    length: int
    p: int
    d: int
    itemsize: int
    tensor_cores: bool

    @property
    def steps(self) -> int:
        rows = self.tiles.BLOCK_T
        return ceil_div(self.batch * self.length, rows) if self.tiles.ROWS else self.batch * ceil_div(self.length, rows)

    def clocks(self, device: Device) -> float:
        """waves * (max(FLOPs / peak, bytes / L2 rate) + scaling of one item) + adding the segments.

        waves = ceil(tiles * S / multiprocessors). An item takes ceil(steps / S) steps; it scales 128 elements in a clock, once for
        each sample that it meets. With S > 1 the segments are written, read by a second launch, and added, and the sum is written.
        """
        t = self.tiles
        grid = ceil_div(self.p, t.BLOCK_P) * ceil_div(self.d, t.BLOCK_D) * t.SPLIT
        rows = ceil_div(self.steps, t.SPLIT) * t.BLOCK_T
        peak = device.flops_per_clock * 2 / self.itemsize if self.tensor_cores else 256
        area = t.BLOCK_P * t.BLOCK_D
        multiply = 2 * area * rows * (1 if self.itemsize == 4 or not t.ROWS else 6) / peak
        load = (t.BLOCK_P + t.BLOCK_D) * self.itemsize * rows / device.l2_bytes_per_clock
        scale = 0 if t.ROWS else area / 128 * ceil_div(self.batch, t.SPLIT)
        step = max(multiply, load) * (_SHORT_STEP if self.itemsize == 2 and t.BLOCK_T < 64 and not t.ROWS else 1)
        moved = _EXCHANGE * (8 * t.SPLIT + 4) * self.p * self.d / (device.l2_bytes_per_clock * device.multiprocessors)
        exchange = moved + _LAUNCH_CLOCKS if t.SPLIT > 1 else 0
        return ceil_div(grid, device.multiprocessors) * (step + scale) + exchange


@functools.lru_cache(maxsize=4096)
def tile_choices(sizes: tuple[int, ...], dtype: torch.dtype, device: Device, precision: str) -> list[Choice]:
    """Every tile shape, each with its best split; the best by the formula comes first. ``sizes``: B, T, p, d."""
    batch, length, p, d = sizes
    family = _HALF if dtype.itemsize == 2 else _TF32 if precision == "tf32" else _IEEE
    family = _FEW if length <= FEW_POSITIONS and family is not _IEEE else family
    tensor_cores = family is not _IEEE
    best = []
    for tiles in _fitted(family, length, p, d):
        choice = Choice(tiles, batch, length, p, d, dtype.itemsize, tensor_cores)
        splits = range(1, max(1, min(_LARGEST_SPLIT, choice.steps)) + 1)
        best.append(min((replace(choice, tiles=replace(tiles, SPLIT=s)) for s in splits), key=lambda one: one.clocks(device)))
    return sorted(best, key=lambda one: one.clocks(device))


def _fitted(family: tuple[Tiles, ...], length: int, p: int, d: int) -> Iterator[Tiles]:
    """Tiles no larger than the weight; steps of rows where a sample would leave half of the smallest step empty."""
    for tiles in dict.fromkeys(
        replace(t, BLOCK_P=narrowed(t.BLOCK_P, p), BLOCK_D=narrowed(t.BLOCK_D, d), ROWS=length <= FEW_POSITIONS) for t in family
    ):
        small = tiles.BLOCK_P * tiles.BLOCK_D < 64 * 64
        yield replace(tiles, num_warps=4) if small else tiles
