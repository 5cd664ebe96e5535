"""Which ranks hold which samples, and where a rank's part of a parameter lies in the whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..passes.errors import UnsupportedGraphError
from ..templates.noise import WHOLE

# Process groups whose ranks hold different samples, by name: those that fully_shard, replicate or DistributedDataParallel were
# given. Names come again after torch.distributed was shut down and started anew, so each is kept with the default group then.
_data_groups: dict[str, Any] = {}


def register_data_mesh(mesh: DeviceMesh) -> None:
    """The ranks of this mesh hold different samples, along each of its dimensions."""
    for group in mesh.get_all_groups():
        register_data_group(group)


def register_data_group(group: Any) -> None:
    """The ranks of this process group hold different samples."""
    _data_groups[group.group_name] = dist.group.WORLD


def is_data_parallel(parameter: Any) -> bool:
    """Whether fully_shard or replicate has spread a parameter over data-parallel ranks."""
    return isinstance(parameter, DTensor) and any(map(_is_data, parameter.device_mesh.get_all_groups()))


def _is_data(group: Any) -> bool:
    return group.group_name in _data_groups and _data_groups[group.group_name] is dist.group.WORLD


@dataclass(frozen=True)
class Ranks:
    """The ranks that train the parameters of one graph together.

    ``team``: all of them, in order; empty on one device, also where that is a mesh of one rank. ``data_meshes``: for each mesh of
    the parameters, the process groups of its data-parallel dimensions that have several ranks. ``data_ranks``: how many ranks'
    samples meet in a gradient. ``model_group``: the process group whose ranks compute parts of the same samples (tensor
    parallelism), if there is one.
    """

    team: tuple[int, ...] = ()
    data_meshes: tuple[tuple[str, ...], ...] = ()
    data_ranks: int = 1
    model_group: str | None = None


def ranks_of(parameters: Iterable[Any], copied_over: Any = None) -> Ranks:
    """``copied_over``: the process group whose ranks hold copies of all these parameters (DistributedDataParallel); None: what
    the parameters themselves say. A mesh dimension that no data parallelism was given is one of tensor parallelism.

    Raises:
        UnsupportedGraphError: parameters are spread over different data-parallel ranks, or over several tensor-parallel groups.
    """
    if copied_over is not None:
        team = tuple(dist.get_process_group_ranks(copied_over))
        return Ranks(team, ((copied_over.group_name,),), len(team)) if len(team) > 1 else Ranks()
    found: dict[tuple[str, ...], int] = {}
    model: set[str] = set()
    meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
    for mesh in meshes:
        groups = [group for group in mesh.get_all_groups() if group.size() > 1]  # DTensor sends nothing over the others
        sizes = {group.group_name: group.size() for group in groups if _is_data(group)}
        model |= {group.group_name for group in groups if not _is_data(group)}
        if sizes:
            found[tuple(sizes)] = math.prod(sizes.values())
    if len(model) > 1:
        raise UnsupportedGraphError(
            f"the parameters are distributed over {len(model)} process groups that fully_shard and replicate of flashnorm_compile "
            "were not given. There can be one, that of tensor parallelism (parallelize_module on a mesh of one dimension)."
        )
    if len(set(found.values())) > 1:
        raise UnsupportedGraphError(
            f"the parameters are spread over different numbers of data-parallel ranks ({sorted(set(found.values()))}). Give every "
            "call of fully_shard and replicate the same mesh."
        )
    team = tuple(sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}))
    if len(team) == 1:
        return Ranks()
    return Ranks(team, tuple(sorted(found)), max(found.values(), default=1), next(iter(model), None))


def is_split(parameter: Any, group: str | None) -> bool:
    """Whether the ranks of a process group hold different parts of a tensor, instead of a copy each.

    Raises:
        UnsupportedGraphError: each holds a summand of it.
    """
    if group is None or not isinstance(parameter, DTensor):
        return False
    groups = parameter.device_mesh.get_all_groups()
    own = [placement for one, placement in zip(groups, parameter.placements, strict=True) if one.group_name == group]
    if any(placement.is_partial() for placement in own):
        raise UnsupportedGraphError(
            f"a parameter or input of shape {tuple(parameter.shape)} has the placements {parameter.placements}: the ranks hold "
            "summands of it. Redistribute it to Replicate() or Shard() first."
        )
    return any(not placement.is_replicate() for placement in own)


def place_of(parameter: Tensor) -> tuple[int, int, int]:
    """(first, width, pitch) of this rank's part, as ``flashnorm::add_noise`` takes them: element i of the part in row-major order
    is element ``first + i // width * pitch + i % width`` of the whole parameter."""
    if not isinstance(parameter, DTensor):
        return WHOLE
    whole = tuple(parameter.shape)
    part, offset = compute_local_shape_and_global_offset(whole, parameter.device_mesh, parameter.placements)
    if parameter.device_mesh.ndim > 1 and tuple(part) != tuple(parameter.to_local().shape):
        raise UnsupportedGraphError(
            f"this rank's part of a parameter of shape {whole} has the shape {tuple(parameter.to_local().shape)}, and by its "
            f"placements {parameter.placements} {tuple(part)}: where its noise belongs is not known. Choose sizes that divide."
        )
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
