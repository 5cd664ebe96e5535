"""Which tile, and how many programs, the one-launch form of ``flashnorm::per_layer`` uses; or that two launches do better.

All constants are counted from published peaks; nothing was measured.

Legend: B samples, T positions, p rows and d columns of the weight, S programs.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import _clipped_tiles, _flash_tiles
from ._triton import Device, ceil_div, narrowed

# Product and total are 8 bytes of registers for an element: 128 x 128 take half of those of 256 threads. Without tensor cores,
# products of operands take registers too.
MOST_ELEMENTS = 128 * 128
_MOST_WITHOUT_TENSOR_CORES = 64 * 64
_LONGEST_EDGE_BYTES = 2048  # of one position: 1024 elements of two bytes, 512 of four; longer ones spill registers
_STAGE_BYTES = 48 * 1024  # three stages of both operands fit Ampere's 163 KiB
_LAUNCH_CLOCKS = 2000  # about 1 us


@dataclass(frozen=True)
class Tiles:
    """The layer as one tile, and how it is compiled. ``SPLIT``: S."""

    BLOCK_P: int
    BLOCK_D: int
    BLOCK_T: int
    num_warps: int
    num_stages: int
    SPLIT: int = 1

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel takes as constants."""
        return {name: value for name, value in asdict(self).items() if name.isupper()}


def whole_layer(p: int, d: int, dtype: torch.dtype, precision: str, split: int = 1) -> Tiles | None:
    """The tile that holds a layer, if one does."""
    longest = _LONGEST_EDGE_BYTES // dtype.itemsize
    rows, columns = narrowed(longest, p), narrowed(longest, d)
    tensor_cores = dtype.itemsize == 2 or precision == "tf32"
    if max(p, d) > longest or rows * columns > (MOST_ELEMENTS if tensor_cores else _MOST_WITHOUT_TENSOR_CORES):
        return None
    position_bytes = (rows + columns) * dtype.itemsize
    most = min(_STAGE_BYTES // position_bytes, max(rows, columns))
    positions = next((n for n in (64, 32) if n <= most), 16)
    stages = 3 if positions * position_bytes <= _STAGE_BYTES else 2
    return Tiles(rows, columns, positions, 8 if rows * columns > 64 * 64 else 4, stages, split)


def clocks(tiles: Tiles, sizes: tuple[int, ...], dtype: torch.dtype, device: Device, precision: str) -> float:
    """ceil(B / S) * (max(FLOPs / peak, bytes / L2 rate) of one sample + squaring and scaling it) + adding the S totals."""
    batch, length, p, d = sizes
    peak = device.flops_per_clock * 2 / dtype.itemsize if dtype.itemsize == 2 or precision == "tf32" else 256
    area = tiles.BLOCK_P * tiles.BLOCK_D
    rows = ceil_div(length, tiles.BLOCK_T) * tiles.BLOCK_T
    load = (tiles.BLOCK_P + tiles.BLOCK_D) * dtype.itemsize * rows / device.l2_bytes_per_clock
    sample = max(2 * area * rows / peak, load) + 2 * area / 128
    exchange = 8 * tiles.SPLIT * p * d / (device.l2_bytes_per_clock * device.multiprocessors) + _LAUNCH_CLOCKS
    return ceil_div(batch, tiles.SPLIT) * sample + (exchange if tiles.SPLIT > 1 else 0)


@functools.lru_cache(maxsize=4096)
def one_launch(sizes: tuple[int, ...], dtype: torch.dtype, device: Device, precision: str) -> Tiles | None:
    """The best one-launch tile for ``sizes`` (B, T, p, d); None where the layer does not fit, or two launches cost fewer clocks."""
    batch, length, p, d = sizes
    splits = range(1, min(batch, device.multiprocessors) + 1)
    fitting = [tiles for split in splits if (tiles := whole_layer(p, d, dtype, precision, split))]
    if not fitting:
        return None
    best = min(fitting, key=lambda tiles: clocks(tiles, sizes, dtype, device, precision))
    norms = _flash_tiles.tile_choices(batch, length, p, d, dtype, device, precision)[0].clocks(device)
    sums = _clipped_tiles.tile_choices(sizes, dtype, device, precision)[0].clocks(device)
    return best if clocks(best, sizes, dtype, device, precision) <= norms + _LAUNCH_CLOCKS + sums else None
