"""Which tiles, and how many segments of the steps, ``flashnorm::clipped_sum`` uses for a shape.

Peaks are published ones; how much of them a tile reaches, and what a sample's beginning costs, an H200 was timed for.

Legend: B samples, T positions, p rows and d columns of the weight, S segments of the steps, N products of one launch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ._triton import FLOPS_WITHOUT_TENSOR_CORES, Device, ceil_div, narrowed

FEW_POSITIONS = 8  # up to here at least half of the smallest step that tensor cores take would be empty
_LAUNCH_CLOCKS = 2000  # about 1 us: adding the segments is a launch
_LARGEST_SPLIT = 32
# Segments are written and read through memory, at 2.1 to 2.5 TB/s: a quarter of what all multiprocessors could read from L2.
_EXCHANGE = 4
# Of the tensor cores' peak: a tile of 128 x 256, and smaller ones, of which several share a multiprocessor.
_REACHED_WIDE, _REACHED = 0.78, 0.70
# Clocks for each sample: filling the pipeline of its positions again; scaling 128 x 128 elements where samples are single steps.
_RESTART, _SCALE = 1500, 800
_MOST_BLOCKS, _REGISTERS = 3, 65536  # of one multiprocessor


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


# The total of 128 x 256 takes half of the registers of 256 threads, that of 128 x 128 as much of 128 threads.
_HALF = (
    Tiles(128, 256, 64, 8, 3),
    Tiles(128, 128, 64, 4, 3),
    Tiles(128, 128, 32, 4, 3),
    Tiles(64, 128, 64, 4, 3),
    Tiles(64, 64, 64, 4, 4),
)
# Without TMA, addresses take registers too.
_POINTERS = (Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 32, 8, 4), Tiles(64, 128, 64, 8, 4), Tiles(64, 64, 64, 4, 4))
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
    count: int = 1

    @property
    def steps(self) -> int:
        rows = self.tiles.BLOCK_T
        return ceil_div(self.batch * self.length, rows) if self.tiles.ROWS else self.batch * ceil_div(self.length, rows)

    def clocks(self, device: Device) -> float:
        """Time of N products: that of the multiprocessors' last blocks, and adding the segments.

        A multiprocessor runs as many blocks as its registers and shared memory hold, one launch fills all of them as often as there
        are tiles, and the last time only in part. A block takes ceil(steps / S) steps, each of max(FLOPs / reached peak, bytes / L2
        rate), and something for each sample. With S > 1 the segments are written, read by a second launch, and added, and the sum
        is written.
        """
        t = self.tiles
        grid = self.count * ceil_div(self.p, t.BLOCK_P) * ceil_div(self.d, t.BLOCK_D) * t.SPLIT
        steps = ceil_div(self.steps, t.SPLIT)
        together = self._blocks(device)
        full, rest = divmod(grid, device.multiprocessors * together)
        share = max(1.0, rest / device.multiprocessors) if rest else 0.0
        work = (full * together + share) * steps * self._step(device)
        each, alone = self._for_samples(steps)
        work += each * (full * together + share) + alone * (full + bool(rest))
        moved = _EXCHANGE * self.count * (8 * t.SPLIT + 4) * self.p * self.d / (device.l2_bytes_per_clock * device.multiprocessors)
        return work + (moved + _LAUNCH_CLOCKS if t.SPLIT > 1 else 0)

    def _step(self, device: Device) -> float:
        """Clocks of a multiprocessor for one step of one block."""
        t = self.tiles
        area = t.BLOCK_P * t.BLOCK_D
        reached = _REACHED_WIDE if area > 128 * 128 else _REACHED
        peak = reached * device.flops_per_clock * 2 / self.itemsize if self.tensor_cores else FLOPS_WITHOUT_TENSOR_CORES
        split_in_three = 1 if self.itemsize == 4 or not t.ROWS else 6
        multiply = 2 * area * t.BLOCK_T * split_in_three / peak
        rows = min(t.BLOCK_T, self.length / ceil_div(self.length, t.BLOCK_T)) if not t.ROWS else t.BLOCK_T
        return max(multiply, (t.BLOCK_P + t.BLOCK_D) * self.itemsize * rows / device.l2_bytes_per_clock / 1.5)

    def _for_samples(self, steps: int) -> tuple[float, float]:
        """Clocks of a block for its samples: while others of the multiprocessor wait, and while they go on."""
        t = self.tiles
        if t.ROWS:
            return 0.0, 0.0
        if self.length <= t.BLOCK_T:
            return steps * _SCALE * t.BLOCK_P * t.BLOCK_D / 128**2, 0.0
        return 0.0, _RESTART * steps / ceil_div(self.length, t.BLOCK_T)

    def _blocks(self, device: Device) -> int:
        """How many fit a multiprocessor."""
        t = self.tiles
        shared = (t.BLOCK_P + t.BLOCK_D) * t.BLOCK_T * self.itemsize * t.num_stages + 1024
        registers = t.BLOCK_P * t.BLOCK_D + 40 * 32 * t.num_warps
        return max(1, min(_MOST_BLOCKS, device.shared_bytes // shared, _REGISTERS // registers))


@functools.lru_cache(maxsize=4096)
def tile_choices(sizes: tuple[int, ...], dtype: torch.dtype, device: Device, precision: str, count: int = 1) -> tuple[Choice, ...]:
    """Every tile shape, each with its best split; the best by the formula comes first. ``sizes``: B, T, p, d; ``count``: N."""
    batch, length, p, d = sizes
    half = _HALF if device.tma else _POINTERS
    family = half if dtype.itemsize == 2 else _TF32 if precision == "tf32" else _IEEE
    family = _FEW if length <= FEW_POSITIONS and family is not _IEEE else family
    tensor_cores = family is not _IEEE
    best = []
    for tiles in _fitted(family, length, p, d):
        choice = Choice(tiles, batch, length, p, d, dtype.itemsize, tensor_cores, count)
        splits = range(1, max(1, min(_LARGEST_SPLIT, choice.steps)) + 1)
        best.append(min((replace(choice, tiles=replace(tiles, SPLIT=s)) for s in splits), key=lambda one: one.clocks(device)))
    return tuple(sorted(best, key=lambda one: one.clocks(device)))


def _fitted(family: tuple[Tiles, ...], length: int, p: int, d: int) -> Iterator[Tiles]:
    """Tiles no larger than the weight and a sample; steps of rows where a sample would leave half of the smallest step empty."""
    few = length <= FEW_POSITIONS
    found: dict[tuple[int, int, int], Tiles] = {}
    for t in family:
        tiles = replace(t, BLOCK_P=narrowed(t.BLOCK_P, p), BLOCK_D=narrowed(t.BLOCK_D, d), ROWS=few)
        tiles = tiles if few else replace(tiles, BLOCK_T=narrowed(t.BLOCK_T, length))
        small = tiles.BLOCK_P * tiles.BLOCK_D < 64 * 64
        tiles = replace(tiles, num_warps=4) if small else tiles
        found.setdefault((tiles.BLOCK_P, tiles.BLOCK_D, tiles.BLOCK_T), tiles)
    yield from found.values()
