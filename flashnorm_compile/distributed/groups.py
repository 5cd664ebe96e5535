"""Which ranks hold which samples, and where a rank's part of a parameter lies in the whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..passes.errors import UnsupportedGraphError
from ..templates.noise import WHOLE

# Process groups whose ranks hold different samples, by name: all that fully_shard and replicate were given. Names come again after
# torch.distributed was shut down and started anew, so each is kept with the default group of its time.
_data_groups: dict[str, Any] = {}


def register_data_mesh(mesh: DeviceMesh) -> None:
    """The ranks of this mesh hold different samples, along each of its dimensions."""
    _data_groups.update((group.group_name, dist.group.WORLD) for group in mesh.get_all_groups())


def _is_data(group: Any) -> bool:
    return group.group_name in _data_groups and _data_groups[group.group_name] is dist.group.WORLD


def data_meshes(parameters: Iterable[Any]) -> tuple[tuple[tuple[str, ...], ...], int]:
    """For each mesh of these parameters, the process groups of its data-parallel dimensions; and how many ranks' samples meet in
    a gradient.

    Raises:
        UnsupportedGraphError: parameters are spread over different data-parallel ranks, or over ranks that are not data-parallel:
            each of those would see a part of a sample's norm.
    """
    found: dict[tuple[str, ...], int] = {}
    for mesh in {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}:
        groups = mesh.get_all_groups()
        if any(group.size() > 1 and not _is_data(group) for group in groups):
            raise UnsupportedGraphError(
                f"parameters are distributed over {mesh}, which fully_shard and replicate of flashnorm_compile were not given "
                "(tensor parallelism, or FSDP2's own sharding). No rank would see a sample's whole gradient. Shard with "
                "flashnorm_compile.fully_shard alone."
            )
        sizes = {group.group_name: group.size() for group in groups if _is_data(group)}
        if sizes:
            found[tuple(sizes)] = math.prod(sizes.values())
    if len(set(found.values())) > 1:
        raise UnsupportedGraphError(
            f"the parameters are spread over different numbers of data-parallel ranks ({sorted(set(found.values()))}). Give every "
            "call of fully_shard and replicate the same mesh."
        )
    return tuple(sorted(found)), max(found.values(), default=1)


def team_of(parameters: Iterable[Any]) -> tuple[int, ...]:
    """All ranks that train these parameters together, in order; empty if they are on one device."""
    meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
    return tuple(sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}))


def place_of(parameter: Tensor) -> tuple[int, int, int]:
    """(first, width, pitch) of this rank's part, as ``flashnorm::add_noise`` takes them: element i of the part in row-major order
    is element ``first + i // width * pitch + i % width`` of the whole parameter."""
    if not isinstance(parameter, DTensor):
        return WHOLE
    whole = tuple(parameter.shape)
    part, offset = compute_local_shape_and_global_offset(whole, parameter.device_mesh, parameter.placements)
    first = sum(start * math.prod(whole[dim + 1 :]) for dim, start in enumerate(offset) if start < whole[dim])
    cut = [dim for dim in range(1, len(whole)) if part[dim] != whole[dim]]
    if not cut:
        return first, *WHOLE[1:]
    if len(cut) > 1:
        raise UnsupportedGraphError(
            f"a parameter of shape {whole} is sharded along dimensions {cut}. Its noise can be drawn in parts along dimension 0 "
            "and one other dimension; shard it along these."
        )
    return first, math.prod(part[cut[0] :]), math.prod(whole[cut[0] :])
