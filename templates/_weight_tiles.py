"""Which tiles ``flashnorm::weight_grads`` uses for a shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ._triton import Device, ceil_div, narrowed


@dataclass(frozen=True)
class Tiles:
    """A tile's shape and how it is compiled."""

    BLOCK_P: int
    BLOCK_D: int
    BLOCK_T: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel takes as constants."""
        return {name: value for name, value in asdict(self).items() if name.isupper()}


_HALF = (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(64, 128, 64, 4, 3), Tiles(64, 64, 64, 4, 4))
_TF32 = (Tiles(128, 128, 32, 8, 3), Tiles(64, 64, 32, 4, 3))
_IEEE = (Tiles(64, 64, 16, 8, 2), Tiles(32, 32, 16, 4, 2))


@functools.lru_cache(maxsize=4096)
def tile_choices(sizes: tuple[int, ...], dtype: torch.dtype, device: Device, precision: str, store: torch.dtype) -> list[Tiles]:
    """Every tile shape for ``sizes`` (B, T, p, d), the best first.

    It has the least waves * (max(FLOPs / peak, bytes / L2 rate) + stored bytes / L2 rate) of one tile;
    waves = ceil(B * tiles / multiprocessors). Counted from published peaks; nothing was measured.
    """
    batch, length, p, d = sizes
    family: tuple[Tiles, ...] = _HALF if dtype.itemsize == 2 else _TF32 if precision == "tf32" else _IEEE
    peak = 256 if family is _IEEE else device.flops_per_clock * 2 / dtype.itemsize

    def clocks(t: Tiles) -> float:
        waves = ceil_div(batch * ceil_div(p, t.BLOCK_P) * ceil_div(d, t.BLOCK_D), device.multiprocessors)
        rows = ceil_div(length, t.BLOCK_T) * t.BLOCK_T
        load = (t.BLOCK_P + t.BLOCK_D) * dtype.itemsize * rows / device.l2_bytes_per_clock
        save = t.BLOCK_P * t.BLOCK_D * store.itemsize / device.l2_bytes_per_clock
        return waves * (max(2 * t.BLOCK_P * t.BLOCK_D * rows / peak, load) + save)

    # Addresses take registers: without TMA the largest tile spills.
    family = family if device.tma else tuple(t for t in family if t.BLOCK_P * t.BLOCK_D <= 128 * 128)
    return sorted(_fitted(family, p, d), key=clocks)


def _fitted(family: tuple[Tiles, ...], p: int, d: int) -> Iterator[Tiles]:
    """Tiles no larger than the weight, each once."""
    for tiles in dict.fromkeys(replace(t, BLOCK_P=narrowed(t.BLOCK_P, p), BLOCK_D=narrowed(t.BLOCK_D, d)) for t in family):
        yield replace(tiles, num_warps=4) if tiles.BLOCK_P * tiles.BLOCK_D < 64 * 64 else tiles
