"""Which tiles ``flashnorm::ghost_norm`` uses for a shape. All constants are counted from published peaks; nothing was measured.

Legend: B samples, T positions, p rows and d columns of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ._triton import FLOPS_WITHOUT_TENSOR_CORES, Device, ceil_div, narrowed


@dataclass(frozen=True)
class PairTiles:
    """BLOCK positions on either side of a pair, BLOCK_K columns at a time, and how the kernel is compiled."""

    BLOCK: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name.isupper()}

    def clocks(self, batch: int, length: int, width: int, itemsize: int, tensor_cores: bool, device: Device) -> float:
        """waves * max(FLOPs / peak, bytes / L2 rate) of one pair; ``width``: p + d."""
        blocks = ceil_div(length, self.BLOCK)
        waves = ceil_div(batch * blocks * (blocks + 1) // 2, device.multiprocessors)
        peak = device.flops_per_clock * 2 / itemsize if tensor_cores else FLOPS_WITHOUT_TENSOR_CORES
        multiply = 2 * self.BLOCK * self.BLOCK * width / peak
        return waves * max(multiply, 2 * self.BLOCK * width * itemsize / device.l2_bytes_per_clock)

    def programs(self, itemsize: int, device: Device) -> int:
        """One or two at a time on each multiprocessor, as shared memory allows."""
        shared = 2 * self.BLOCK * self.BLOCK_K * itemsize * self.num_stages + 1024
        return device.multiprocessors * max(1, min(2, device.shared_bytes // shared))


# Two accumulators of 128 x 128 are 128 registers of 256 threads, the most that does not spill; two-byte operands of 128 x 64 take
# 32 KiB of shared memory for each stage. Smaller tiles give more pairs where B * T is small.
_HALF = (PairTiles(128, 64, 8, 4), PairTiles(64, 64, 4, 4), PairTiles(32, 64, 4, 4))
_TF32 = (PairTiles(128, 32, 8, 4), PairTiles(64, 32, 4, 4), PairTiles(32, 32, 4, 4))
_IEEE = (PairTiles(64, 16, 8, 3), PairTiles(32, 16, 4, 3))


@functools.lru_cache(maxsize=4096)
def pair_choices(batch: int, length: int, width: int, dtype: torch.dtype, device: Device, precision: str) -> list[PairTiles]:
    """Every tile shape for T = ``length`` and p + d = ``width``; the best by ``PairTiles.clocks`` comes first."""
    family = _HALF if dtype.itemsize == 2 else _TF32 if precision == "tf32" else _IEEE
    tensor_cores = dtype.itemsize == 2 or precision == "tf32"

    def fitted() -> Iterator[PairTiles]:
        for tiles in family:
            block = narrowed(tiles.BLOCK, length)
            columns = tiles.BLOCK_K if device.tma else tiles.BLOCK_K // 2
            yield replace(tiles, BLOCK=block, BLOCK_K=max(16, columns), num_warps=tiles.num_warps if block >= 64 else 4)

    distinct = list(dict.fromkeys(fitted()))
    return sorted(distinct, key=lambda tiles: tiles.clocks(batch, length, width, dtype.itemsize, tensor_cores, device))
