"""Every kernel configuration that the tile choices make for common shapes, compiled: ``python tests/kernels/configurations.py``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from flashnorm_compile.templates._flash_tiles import tile_choices
from flashnorm_compile.templates._ghost_tiles import pair_choices
from flashnorm_compile.templates._triton import COLUMNS, POINTERS, ROWS, Device
from flashnorm_compile.templates.embedding_norm import embedding_norm_kernel, range_tiles
from flashnorm_compile.templates.flash_norm import flash_norm_kernel
from flashnorm_compile.templates.ghost_norm import ghost_norm_kernel
from flashnorm_compile.templates.tied_cross_term import cross_choices, cross_term_kernel
from helpers import TRITON_NAMES, Compiled, compile_kernel, device_of_capability

# B, T, p, d: GPT-2 at B 1 and 8, ViT-B/16 at B 64, a Llama-3.2-1B block at B 4, 8 x Linear(1024, 1024), and odd ones.
SHAPES = (
    (1, 1024, 768, 768), (8, 1024, 2304, 768), (8, 1024, 768, 3072), (1, 4096, 3072, 768), (64, 197, 768, 768),
    (64, 197, 3072, 768), (4, 2048, 2048, 8192), (4, 2048, 512, 2048), (1, 4096, 1024, 1024), (1, 262144, 1024, 1024),
    (3, 101, 77, 55), (8, 16, 10, 4), (16, 64, 1, 300),
)  # fmt: skip
LAYOUT_NAMES = {POINTERS: "pointers", ROWS: "TMA rows", COLUMNS: "TMA columns"}


@dataclass(frozen=True)
class Configuration:
    """``rows``: what one warp group multiplies at least (wgmma takes 64); ``tensor_cores``: whether it may use them."""

    name: str
    capability: int
    dtype: torch.dtype
    precision: str
    layout: int
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    rows: int

    @property
    def tensor_cores(self) -> bool:
        return self.dtype.itemsize == 2 or self.precision == "tf32"

    @property
    def label(self) -> str:
        tile = " ".join(f"{key.removeprefix('BLOCK_').lower()}={value}" for key, value in self.constants if key.isupper())
        kind = TRITON_NAMES[self.dtype] if self.dtype.itemsize == 2 else f"fp32 {self.precision}"
        launch = f"w={self.num_warps} s={self.num_stages}"
        return f"{self.name:<16} sm_{self.capability} {kind:<9} {LAYOUT_NAMES[self.layout]:<12} {tile} {launch}"


KERNELS = {
    "flash_norm": flash_norm_kernel,
    "ghost_norm": ghost_norm_kernel,
    "embedding_norm": embedding_norm_kernel,
    "tied_cross_term": cross_term_kernel,
}


def _tiles(name: str, dtype: torch.dtype, precision: str, device: Device) -> Iterator[tuple[dict[str, Any], int]]:
    for batch, length, p, d in SHAPES:
        if name == "flash_norm":
            for choice in tile_choices(batch, length, p, d, dtype, device, precision):
                # How many segments there are does not change the code.
                tiles = replace(choice.tiles, SPLIT=min(choice.tiles.SPLIT, 2))
                yield asdict(tiles), tiles.BLOCK_P
        elif name == "embedding_norm":
            yield {**asdict(range_tiles(batch, length, d, dtype, device)), "RANGES": 2}, 0
        else:
            choices = pair_choices if name == "ghost_norm" else cross_choices
            for pair in choices(batch, length, p + d, dtype, device, precision):
                yield asdict(pair), pair.BLOCK


def configurations(name: str, capability: int) -> list[Configuration]:
    """Distinct ones: both layouts of TMA where the device has it, and pointers; on Hopper those of one type only."""
    found: dict[Configuration, None] = {}
    device = device_of_capability(capability)
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
        if name == "embedding_norm" and precision == "tf32":
            continue
        for layout in _layouts(name, dtype, device):
            for tiles, rows in _tiles(name, dtype, precision, device if layout else replace(device, tma=False)):
                if layout == COLUMNS and 0 < rows < 64:
                    continue
                num_warps, num_stages = tiles.pop("num_warps"), tiles.pop("num_stages")
                constants = tuple(tiles.items())
                found[Configuration(name, capability, dtype, precision, layout, constants, num_warps, num_stages, rows)] = None
    return list(found)


def _layouts(name: str, dtype: torch.dtype, device: Device) -> tuple[int, ...]:
    if name == "embedding_norm" or not device.tma:
        return (POINTERS,)
    return (ROWS, COLUMNS, POINTERS) if dtype == torch.bfloat16 else (ROWS,)


@functools.cache
def compiled(configuration: Configuration) -> Compiled:
    kernel = KERNELS[configuration.name]
    constants = dict(configuration.constants)
    for parameter in kernel.params:
        if parameter.name.endswith("LAYOUT"):
            constants[parameter.name] = configuration.layout
        elif parameter.name == "PRECISION":
            constants[parameter.name] = configuration.precision
        elif parameter.name.endswith("stride_w") and configuration.layout != COLUMNS:
            constants[parameter.name] = 1
    operand = "*" + TRITON_NAMES[configuration.dtype]
    special = {"out_ptr": "*fp32", "partials": "*fp32", "counters": "*i32", "ids_ptr": "*i64", "order_ptr": "*i64"}
    types = {
        parameter.name: special.get(parameter.name, operand if parameter.name.endswith("_ptr") else "i32")
        for parameter in kernel.params
    }
    return compile_kernel(kernel, types, constants, configuration.capability, configuration.num_warps, configuration.num_stages)


def resource_table(names: tuple[str, ...] = tuple(KERNELS), capabilities: tuple[int, ...] = (90, 80)) -> str:
    """Registers of a thread, KiB of shared memory and spilled bytes of every configuration."""
    lines = [f"{'kernel':<16} {'arch':<5} {'operands':<9} {'layout':<12} tile, warps, stages: registers, shared KiB, spilled bytes"]
    for name in names:
        for capability in capabilities:
            for configuration in configurations(name, capability):
                made = compiled(configuration)
                lines.append(f"{configuration.label}: {made.registers}, {made.shared / 1024:.0f}, {made.stack}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(resource_table() + "\n")
