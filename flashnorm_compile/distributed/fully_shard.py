"""``fully_shard`` and ``replicate``: data parallelism for torch.compile, with the collectives in the graph.

``torch.distributed.fsdp.fully_shard`` gathers and reduces in hooks that torch.compile does not trace. Private training has to see
both: it clips before the reduction and adds noise behind it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ..passes import _compat
from ..passes.errors import OptionsError
from .groups import is_data_parallel, register_data_mesh
from .sharded_class import Inner, Sharding, sharded_class
from .tensor_parallel import inner_layout

_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def fully_shard(
    module: nn.Module | Sequence[nn.Module],
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | None = True,
    shard_placement_fn: Any = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
) -> Any:
    """Shards the parameters of ``module`` over the ranks of ``mesh``, as FSDP2 does, for a model that torch.compile compiles.

    Each parameter becomes a DTensor, ``Shard(0)`` (of dimension 0, in pieces of equal size but the last ones), under its own name;
    with a two-dimensional mesh, ``(Replicate(), Shard(0))``: shards within dimension 1, copies along dimension 0 (HSDP). While a
    forward pass runs it is gathered where it is used; its gradient arrives as the average over all ranks, in the same shards.
    Parameters that an earlier call has sharded (bottom-up, on submodules) keep their sharding. A parameter shared by modules of
    one call stays shared. Parameters that ``parallelize_module`` has distributed over another dimension of the same mesh keep that
    layout, within which they are sharded; ``mesh`` has one dimension then. Call it before the optimizer is made. Values are taken
    from each rank as they are: all ranks must have built the module alike, or build it on the meta device and call ``to_empty`` and
    the initialisation afterwards.

    Args:
        module: the module, or several.
        mesh: data-parallel ranks; None: all ranks of the default process group.
        reshard_after_forward: whether the backward gathers parameters again; else the gathered ones are kept for it. None: True.
            Under other backends than this project's, the backend decides; plain Inductor keeps them.
        mp_policy: types for computing, reducing and the inputs and outputs of ``module``, as in FSDP2.
        ignored_params: parameters to leave as they are. Private training refuses them unless they are frozen.

    Returns:
        ``module``, changed in place: ``isinstance`` with its old class holds.

    Raises:
        OptionsError: torch.distributed is not initialized, or an argument asks for what only FSDP2 can do.
    """
    placements: dict[int, list[Placement]] = {1: [Shard(0)], 2: [Replicate(), Shard(0)]}
    if shard_placement_fn is not None or (offload_policy is not None and type(offload_policy) is not OffloadPolicy):
        raise OptionsError("fully_shard shards dimension 0 on the device: leave shard_placement_fn and offload_policy out.")
    if not isinstance(reshard_after_forward, (bool, type(None))):
        raise OptionsError(
            f"reshard_after_forward={reshard_after_forward!r}: allowed are True, False and None. Resharding to a smaller mesh is "
            "not supported; use a two-dimensional mesh (HSDP)."
        )
    mesh = _mesh("fully_shard", mesh)
    if mesh.ndim not in placements:
        raise OptionsError(f"fully_shard needs a mesh of one dimension, or of two (replicate, shard); got {mesh.ndim} ({mesh}).")
    shards = None if mesh.ndim == 1 else DeviceMesh.from_group(mesh.get_group(1), mesh.device_type)
    sharding = Sharding(mesh, shards, reshard_after_forward is not False, mp_policy or MixedPrecisionPolicy())
    return _shard(module, sharding, placements[mesh.ndim], ignored_params or set())


def replicate(
    module: nn.Module | Sequence[nn.Module],
    *,
    mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
) -> Any:
    """Keeps a copy of every parameter on each rank of a one-dimensional ``mesh``; gradients arrive averaged over the ranks.

    What DistributedDataParallel does, for a model that torch.compile compiles. Arguments and errors as for ``fully_shard``.
    """
    mesh = _mesh("replicate", mesh)
    if mesh.ndim != 1:
        raise OptionsError(f"replicate needs a mesh of one dimension; got {mesh.ndim} ({mesh}).")
    sharding = Sharding(mesh, None, False, mp_policy or MixedPrecisionPolicy(), copies=True)
    return _shard(module, sharding, [Replicate()], ignored_params or set())


def _mesh(caller: str, mesh: DeviceMesh | None) -> DeviceMesh:
    if mesh is not None:
        return mesh
    if not torch.distributed.is_initialized():
        raise OptionsError(
            f"{caller} needs torch.distributed: call torch.distributed.init_process_group() first (torchrun sets what it needs)."
        )
    accelerator = torch.accelerator.current_accelerator()
    return init_device_mesh("cpu" if accelerator is None else accelerator.type, (torch.distributed.get_world_size(),))


def _shard(module: Any, sharding: Sharding, placements: list[Placement], ignored: set[nn.Parameter]) -> Any:
    register_data_mesh(sharding.mesh)
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for root in [module] if isinstance(module, nn.Module) else module:
        for owner in list(root.modules()):
            _shard_own(owner, sharding, placements, ignored, shared)
        if not hasattr(root, "_flashnorm_original"):
            root.__class__ = sharded_class(type(root), frozenset())  # type: ignore[arg-type]
        root._flashnorm_boundary = sharding.policy
    return module


def _shard_own(
    owner: nn.Module,
    sharding: Sharding,
    placements: list[Placement],
    ignored: set[nn.Parameter],
    shared: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Shards the parameters that ``owner`` itself holds, unless an earlier call has."""
    own = {n: p for n, p in owner._parameters.items() if p is not None and p not in ignored and not is_data_parallel(p)}
    if not own:
        return
    before: Any = getattr(owner, "_flashnorm_sharding", None)
    inner: dict[str, Inner] = {} if before is None else dict(before.inner)
    for name, parameter in own.items():
        if isinstance(parameter, DTensor):
            inner[name] = inner_layout(parameter, sharding.mesh)
        if parameter not in shared:
            if isinstance(parameter, DTensor):
                pieces = _distribute_part(parameter, sharding.mesh, placements)
            else:
                pieces = distribute_tensor(parameter.detach(), sharding.mesh, placements, src_data_rank=None)
            shared[parameter] = nn.Parameter(pieces, requires_grad=parameter.requires_grad)
        owner._parameters[name] = shared[parameter]
    original = getattr(owner, "_flashnorm_original", type(owner))
    names = frozenset(name for name, parameter in owner._parameters.items() if isinstance(parameter, DTensor))
    owner.__class__ = sharded_class(original, names)  # type: ignore[arg-type]
    owner._flashnorm_sharding = replace(sharding, inner=inner)  # type: ignore[assignment]
    _modules.add(owner)


def _distribute_part(part: DTensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """Shards or copies this rank's part under tensor parallelism, as FSDP2 does: the whole is a DTensor over both meshes."""
    pieces = distribute_tensor(part.to_local().detach(), mesh, placements, src_data_rank=None)
    both = _compat.joined_mesh(mesh, part.device_mesh)
    outer = [_compat.shard_within(part, one) if isinstance(one, Shard) else one for one in placements]
    whole, stride = part.shape, part.stride()
    return DTensor.from_local(pieces.to_local(), both, [*outer, *part.placements], run_check=False, shape=whole, stride=stride)


def shardings() -> dict[int, Sharding]:
    """How every parameter that lives and was sharded here is gathered, by its id."""
    return {
        id(parameter): module._flashnorm_sharding  # type: ignore[misc]
        for module in _modules
        for parameter in module._parameters.values()
        if isinstance(parameter, DTensor)
    }
