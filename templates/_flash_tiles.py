"""Which tiles, and how many segments of T, ``flashnorm::flash_norm`` uses for a shape.

All constants are counted from published peaks; nothing was measured.

Legend: B samples, T positions, p rows and d columns of the weight, S segments of T.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ._triton import FLOPS_WITHOUT_TENSOR_CORES, Device, ceil_div, narrowed

_LAUNCH_CLOCKS = 2000  # about 1 us: zeroing the counters, which only a split needs
_LARGEST_SPLIT = 16


@dataclass(frozen=True)
class Tiles:
    """A tile's shape and how it is compiled. ``SPLIT``: S."""

    BLOCK_P: int
    BLOCK_D: int
    BLOCK_T: int
    num_warps: int
    num_stages: int
    SPLIT: int = 1


# Two-byte operands. A tile does BLOCK_P * BLOCK_D / (BLOCK_P + BLOCK_D) FLOPs for each byte that it loads: 128 x 256 does 85,
# 128 x 128 does 64 and 64 x 64 does 32, against 107 that keep Hopper's tensor cores busy out of L2. The accumulator of 128 x 256 is
# 128 registers of 256 threads; anything larger spills. Stages fill shared memory: the first takes 192 KiB, the second twice 96 KiB.
_HALF = (Tiles(128, 256, 64, 8, 4), Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 4), Tiles(64, 64, 64, 4, 4))
# tf32: the same bytes in flight with half the positions. Without tensor cores 64 x 32 does 11 FLOPs for a byte,
# more than the 7 that keep the lanes busy, and larger tiles spill.
_TF32 = (Tiles(128, 128, 32, 8, 3), Tiles(64, 128, 32, 4, 4), Tiles(64, 64, 32, 4, 4))
_IEEE = (Tiles(64, 32, 16, 4, 3), Tiles(32, 32, 16, 4, 3))


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
    def tiles_of_a_sample(self) -> int:
        return ceil_div(self.p, self.tiles.BLOCK_P) * ceil_div(self.d, self.tiles.BLOCK_D)

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel is specialized for."""
        return {name: value for name, value in asdict(self.tiles).items() if name.isupper()}

    def partial_elements(self, slots: int) -> int:
        """float32 elements for the partial tiles of a split; 0 without one."""
        t = self.tiles
        return self.batch * slots * t.SPLIT * t.BLOCK_P * t.BLOCK_D if t.SPLIT > 1 else 0

    def programs(self, device: Device) -> int:
        """How many programs run at once: one or two on each multiprocessor, as shared memory allows."""
        t = self.tiles
        shared = (t.BLOCK_P + t.BLOCK_D) * t.BLOCK_T * self.itemsize * t.num_stages + 1024
        return device.multiprocessors * max(1, min(2, device.shared_bytes // shared))

    def clocks(self, device: Device) -> float:
        """waves * (max(FLOPs / peak, bytes / L2 rate) of one item + its share of the split).

        waves = ceil(B * tiles * S / multiprocessors). An item reads ceil(ceil(T / BLOCK_T) / S) blocks of both operands. With S > 1
        it also writes its partial tile, the last one reads S of them, and the counters are zeroed.
        """
        t = self.tiles
        waves = ceil_div(self.batch * self.tiles_of_a_sample * t.SPLIT, device.multiprocessors)
        rows = ceil_div(ceil_div(self.length, t.BLOCK_T), t.SPLIT) * t.BLOCK_T
        peak = device.flops_per_clock * 2 / self.itemsize if self.tensor_cores else FLOPS_WITHOUT_TENSOR_CORES
        multiply = 2 * t.BLOCK_P * t.BLOCK_D * rows / peak
        load = (t.BLOCK_P + t.BLOCK_D) * self.itemsize * rows / device.l2_bytes_per_clock
        exchange = 4 * t.BLOCK_P * t.BLOCK_D * (1 + t.SPLIT) / device.l2_bytes_per_clock
        return waves * (max(multiply, load) + (exchange if t.SPLIT > 1 else 0)) + (_LAUNCH_CLOCKS if t.SPLIT > 1 else 0)


@functools.lru_cache(maxsize=4096)
def tile_choices(batch: int, length: int, p: int, d: int, dtype: torch.dtype, device: Device, precision: str) -> list[Choice]:
    """Every tile shape with its best split; the best by ``Choice.clocks`` comes first. All sizes are at least 1."""
    family = _HALF if dtype.itemsize == 2 else _TF32 if precision == "tf32" else _IEEE
    tensor_cores = dtype.itemsize == 2 or precision == "tf32"
    best: dict[tuple[int, int], Choice] = {}
    for tiles in _fitted(family, p, d, device):
        for split in range(1, min(_LARGEST_SPLIT, ceil_div(length, tiles.BLOCK_T)) + 1):
            choice = Choice(replace(tiles, SPLIT=split), batch, length, p, d, dtype.itemsize, tensor_cores)
            edges = (tiles.BLOCK_P, tiles.BLOCK_D)
            if edges not in best or choice.clocks(device) < best[edges].clocks(device):
                best[edges] = choice
    return sorted(best.values(), key=lambda choice: choice.clocks(device))


def _fitted(family: tuple[Tiles, ...], p: int, d: int, device: Device) -> Iterator[Tiles]:
    """Tiles no larger than the weight; without TMA half the positions at a time, because addresses take registers."""
    for tiles in family:
        edges = {"BLOCK_P": narrowed(tiles.BLOCK_P, p), "BLOCK_D": narrowed(tiles.BLOCK_D, d)}
        whole = edges == {"BLOCK_P": tiles.BLOCK_P, "BLOCK_D": tiles.BLOCK_D}
        warps = tiles.num_warps if whole or edges["BLOCK_P"] * edges["BLOCK_D"] > 64 * 128 else 4
        length = tiles.BLOCK_T if device.tma else max(16, tiles.BLOCK_T // 2)
        if device.tma or edges["BLOCK_P"] * edges["BLOCK_D"] <= 128 * 128:
            yield replace(tiles, **edges, num_warps=warps, BLOCK_T=length)
