"""Every compilation of the sum and noise kernels, and its faults; ``python tests/kernels/sum_configurations.py`` prints a table."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from flashnorm_compile.templates import (
    _clipped_tiles,
    _layer_tiles,
    _weight_tiles,
    clipped_sum,
    noise_triton,
    per_layer,
    weight_grads,
)
from flashnorm_compile.templates._triton import COLUMNS, POINTERS, ROWS, Device
from helpers import TRITON_NAMES, Compiled, compile_source, device_of_capability
from triton.compiler import ASTSource

TYPES = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
CAPABILITIES = (90, 80)
NAMES = {**TRITON_NAMES, torch.float64: "fp64"}
# What a launch finds to be multiples of 16; sizes of weights are not among them, so that the code for odd ones is compiled.
_EVEN = ("stride_b", "stride_t", "stride_w", "length", "n", "sample_stride")


@dataclass(frozen=True, eq=False)
class Configuration:
    """``types`` are Triton's, by parameter; ``constants`` are left out of them."""

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    capability: int
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False

    @property
    def tma(self) -> bool:
        """Whether both operands are loaded by descriptors."""
        return min(self.constants.get("G_LAYOUT", POINTERS), self.constants.get("A_LAYOUT", POINTERS)) > POINTERS

    def __str__(self) -> str:
        layout = {POINTERS: "pointers", ROWS: "rows", COLUMNS: "columns"}[self.constants.get("G_LAYOUT", POINTERS)]
        edges = "x".join(str(self.constants[name]) for name in ("BLOCK_P", "BLOCK_D", "BLOCK_T") if name in self.constants)
        kinds = [kind for name, kind in self.types.items() if name in ("g_ptr", "w_ptr", "value_ptr", "out_ptr")]
        flags = [name.lower() for name, value in self.constants.items() if value is True]
        words = [self.kernel.fn.__name__.removesuffix("_kernel"), f"sm_{self.capability}", *kinds, edges, layout, *flags]
        return " ".join([word for word in (*words, str(self.constants.get("PRECISION", ""))) if word]).replace("*", "")


@functools.cache
def compiled(configuration: Configuration) -> Compiled:
    names = [parameter.name for parameter in configuration.kernel.params]
    types = {name: configuration.types.get(name, "constexpr") for name in names}
    even = [name for name, kind in types.items() if kind.startswith("*") or (kind != "constexpr" and name.endswith(_EVEN))]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(configuration.kernel, types, dict(configuration.constants), attributes)
    return compile_source(source, configuration.capability, configuration.num_warps, configuration.num_stages)


def faults(configuration: Configuration) -> list[str]:
    """What is wrong with the code of a configuration."""
    made = compiled(configuration)
    device = device_of_capability(configuration.capability)
    wgmma = configuration.capability == 90 and configuration.tensor_cores and configuration.constants["BLOCK_P"] >= 64
    checks = {
        "spills": made.stack == 0,
        "takes more shared memory than there is": made.shared <= device.shared_bytes,
        "takes more registers than there are": made.registers * 32 * configuration.num_warps <= 65536,
        "has bulk tensor copies if and only if": bool(made.bulk_copies) == configuration.tma,
        "has no wgmma": not wgmma or made.wgmma > 0,
        "uses tensor cores if and only if": bool(made.wgmma + made.mma) == configuration.tensor_cores,
    }
    return [fault for fault, holds in checks.items() if not holds]


def _contraction(
    kernel: Any, tiles: Any, dtype: torch.dtype, precision: str, capability: int, outputs: Mapping[str, str], **constants: Any
) -> Iterator[Configuration]:
    """A kernel over G [B, T, p] and A [B, T, d] in all its layouts. ``outputs``: types of its other pointers."""
    operand = "*" + NAMES[dtype]
    for layout in _layouts(device_of_capability(capability), dtype):
        # A launch passes 1 for the stride of contiguous positions, or columns, which Triton makes a constant.
        unit = "t" if layout == COLUMNS else "w"
        fixed = {**tiles.constants, "G_LAYOUT": layout, "A_LAYOUT": layout, "PRECISION": precision, **constants}
        fixed.update({f"g_stride_{unit}": 1, f"a_stride_{unit}": 1})
        names = [parameter.name for parameter in kernel.params if parameter.name not in fixed]
        types = {name: {"g_ptr": operand, "a_ptr": operand, **outputs}.get(name, "i32") for name in names}
        tensor_cores = dtype.itemsize == 2 or precision != "ieee"
        yield Configuration(kernel, types, fixed, capability, tiles.num_warps, tiles.num_stages, tensor_cores)


def _layouts(device: Device, dtype: torch.dtype) -> tuple[int, ...]:
    """Columns of float32 take the code of two-byte types."""
    if not device.tma:
        return (POINTERS,)
    return (ROWS, POINTERS, COLUMNS) if dtype.itemsize == 2 else (ROWS, POINTERS)


def _cases() -> Iterator[tuple[int, Device, torch.dtype, str]]:
    for capability in CAPABILITIES:
        for dtype, precision in TYPES:
            yield capability, device_of_capability(capability), dtype, precision


def clipped_sum_configurations() -> list[Configuration]:
    found = []
    outputs = {"factors_ptr": "*fp32", "out_ptr": "*fp32"}
    for capability, device, dtype, precision in _cases():
        shapes = ((8, 1024, 4096, 4096), (8, 1024, 16, 4096), (8, 32, 4096, 4096), (8, _clipped_tiles.FEW_POSITIONS, 4096, 4096))
        for tma in (True, False) if device.tma else (False,):
            kind = replace(device, tma=tma)
            choices = [choice for shape in shapes for choice in _clipped_tiles.tile_choices(shape, dtype, kind, precision)]
            for tiles, whole in dict.fromkeys((replace(c.tiles, SPLIT=4), c.length <= c.tiles.BLOCK_T) for c in choices):
                for one in _contraction(clipped_sum.clipped_sum_kernel, tiles, dtype, precision, capability, outputs):
                    layouts = one.constants["G_LAYOUT"], one.constants["A_LAYOUT"]
                    if one.tma == (tma and not tiles.ROWS):
                        settings = clipped_sum.settings(tiles, whole, dtype, layouts, precision)
                        found.append(replace(one, constants={**one.constants, **settings}))
    return found


def weight_grads_configurations() -> list[Configuration]:
    found: list[Configuration] = []
    for capability, device, dtype, precision in _cases():
        for p, store in dict.fromkeys([(4096, torch.float32), (4096, dtype), (16, torch.float32)]):
            outputs = {"squares_ptr": "*fp32", "out_ptr": "*" + NAMES[store]}
            for tiles in _weight_tiles.tile_choices((8, 1024, p, 4096), dtype, device, precision, store):
                found += _contraction(weight_grads.weight_grads_kernel, tiles, dtype, precision, capability, outputs)
    return found


def per_layer_configurations() -> list[Configuration]:
    """The largest layers of each shape."""
    found: list[Configuration] = []
    outputs = dict.fromkeys(("bound_ptr", "scale_ptr", "norms_ptr", "out_ptr"), "*fp32")
    for capability, _, dtype, precision in _cases():
        for p, d in ((16, 1024), (1024, 16), (512, 32), (64, 256), (128, 128), (64, 64), (16, 16)):
            tiles = _layer_tiles.whole_layer(p, d, dtype, precision, split=4)
            if tiles is not None:
                kernel = per_layer.per_layer_kernel
                found += _contraction(kernel, tiles, dtype, precision, capability, outputs, STABILITY=-1.0)
    return found


def noise_configurations() -> list[Configuration]:
    """Types of the value and of the result, in place and strided; the sum over samples with the noise."""
    found = []
    scalars = {"keys_ptr": "*i64", "std_ptr": "*fp32", "row": "i32", "key_stride": "i32", "n": "i32"}
    strides = dict.fromkeys(("columns", "outer", "inner"), "i32")
    common = {"word_stride": 1, "COUNTERS": noise_triton.TILE.counters, "GENERATOR": noise_triton.PHILOX.value}
    for capability in CAPABILITIES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for out in dict.fromkeys([dtype, torch.bfloat16]):
                types = {"out_ptr": "*" + NAMES[out], "value_ptr": "*" + NAMES[dtype], **scalars, **strides}
                layouts = ((False, False), (True, False), (False, True), (True, True))
                for (strided, in_place), parts in itertools.product(layouts, (False, True)):
                    if (out == dtype or not in_place) and (dtype == torch.float32 or not (strided or parts)):
                        flags = {"STRIDED": strided, "IN_PLACE": in_place, "PARTS": parts}
                        found.append(Configuration(noise_triton.add_noise_kernel, types, {**common, **flags}, capability))
        for dtype in (torch.float32, torch.bfloat16):
            pointers = {"out_ptr": "*bf16", "w_ptr": "*" + NAMES[dtype], "factors_ptr": "*fp32"}
            types = {**pointers, **scalars, "batch": "i32", "sample_stride": "i32"}
            for parts in (False, True):
                flags = {"PARTS": parts, "factor_stride": 1}
                found.append(Configuration(noise_triton.weighted_sum_noise_kernel, types, {**common, **flags}, capability))
    # The second parameter of a group has row 1, and a scalar one element: launches make constants of both.
    first = found[0]
    ones = {"row": 1, "n": 1, "columns": 1, "inner": 1}
    types = {name: kind for name, kind in first.types.items() if name not in ones}
    return [*found, replace(first, types=types, constants={**first.constants, **ones, "STRIDED": True})]


def resource_table() -> str:
    """Registers of a thread, bytes of shared memory and spilled bytes of every configuration."""
    lines = ["kernel, device, operand and result, tile, layout: registers, shared bytes, spilled bytes"]
    for make in (clipped_sum_configurations, weight_grads_configurations, per_layer_configurations, noise_configurations):
        for configuration in make():
            made = compiled(configuration)
            lines.append(f"{configuration}: {made.registers}, {made.shared}, {made.stack}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(resource_table() + "\n")
