"""Modules whose sharded parameters are gathered where they are used, by class-swapped properties.

``module.weight`` is the sharded DTensor, as in ``parameters()`` and ``state_dict()``, except while a forward pass runs: there it is
the gathered tensor, and torch.compile traces the gather and, in the backward, the reduction of the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Inner:
    """The tensor-parallel layout that a parameter had before it was sharded or copied among data-parallel ranks.

    ``shape``, ``stride``: of this rank's part under tensor parallelism; ``whole_shape``, ``whole_stride``: of the parameter.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    whole_shape: torch.Size
    whole_stride: tuple[int, ...]


@dataclass(frozen=True)
class Sharding:
    """How the parameters of one module lie on the data-parallel mesh, and how they are gathered.

    ``shards``: the part of the mesh along which shards lie; None: the whole mesh. ``copies``: whether nothing is sharded.
    ``inner``: tensor-parallel layouts, by the names of the parameters that have one.
    """

    mesh: DeviceMesh
    shards: DeviceMesh | None
    reshard_after_forward: bool
    policy: MixedPrecisionPolicy
    copies: bool = False
    inner: dict[str, Inner] = field(default_factory=dict)


class _Forwards:
    """Eager forward passes that run now. While one does, parameters are gathered."""

    running = 0


@contextmanager
def _forward() -> Iterator[None]:
    _Forwards.running += 1
    try:
        yield
    finally:
        _Forwards.running -= 1


def gathered(parameter: DTensor, sharding: Sharding, inner: Inner | None = None) -> torch.Tensor:
    """The whole parameter on this rank (under tensor parallelism, its DTensor), in ``param_dtype``. Its gradient is averaged over
    the mesh in ``reduce_dtype``: first over the shards' ranks, and then each shard over its copies."""
    reduce_dtype = sharding.policy.reduce_dtype or sharding.policy.param_dtype
    param_dtype = sharding.policy.param_dtype
    if inner is not None:
        return _gathered_parts(parameter, sharding, inner)
    if sharding.shards is not None:
        shape, stride = parameter.shape, parameter.stride()
        shard = parameter.redistribute(placements=parameter.placements, backward_dtype=reduce_dtype)
        local = shard.to_local(grad_placements=[Partial("avg"), Shard(0)])
        parameter = DTensor.from_local(local, sharding.shards, [Shard(0)], run_check=False, shape=shape, stride=stride)
    whole = parameter.redistribute(placements=[Replicate()], forward_dtype=param_dtype, backward_dtype=reduce_dtype)
    return whole.to_local(grad_placements=[Partial("avg")])


def _gathered_parts(parameter: DTensor, sharding: Sharding, inner: Inner) -> torch.Tensor:
    """This rank's part under tensor parallelism, gathered from the data-parallel ranks that share it, in its own layout."""
    reduce_dtype = sharding.policy.reduce_dtype or sharding.policy.param_dtype
    param_dtype = sharding.policy.param_dtype
    if sharding.copies:
        copy = parameter.redistribute(placements=parameter.placements, forward_dtype=param_dtype, backward_dtype=reduce_dtype)
        part = copy.to_local(grad_placements=[Partial("avg"), *inner.placements])
    else:
        local = parameter.to_local(grad_placements=parameter.placements)
        shard = DTensor.from_local(local, sharding.mesh, [Shard(0)], run_check=False, shape=inner.shape, stride=inner.stride)
        gathered = shard.redistribute(placements=[Replicate()], forward_dtype=param_dtype, backward_dtype=reduce_dtype)
        part = gathered.to_local(grad_placements=[Partial("avg")])
    return DTensor.from_local(
        part, inner.mesh, inner.placements, run_check=False, shape=inner.whole_shape, stride=inner.whole_stride
    )


def _access(name: str) -> property:
    def get(self: Any) -> Any:
        parameter = self._parameters[name]
        if torch.compiler.is_compiling() or _Forwards.running:
            return gathered(parameter, self._flashnorm_sharding, self._flashnorm_sharding.inner.get(name))
        return parameter

    return property(get)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


@functools.cache
def sharded_class(original: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """A subclass of ``original`` in which the parameters ``names`` are gathered by access; one for each class and set of names."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = self._flashnorm_boundary
        if policy is not None and policy.param_dtype is not None and policy.cast_forward_inputs:
            args, kwargs = _cast((args, kwargs), policy.param_dtype)
        if torch.compiler.is_compiling():
            out = original.forward(self, *args, **kwargs)
        else:
            with _forward():
                out = original.forward(self, *args, **kwargs)
        return out if policy is None or policy.output_dtype is None else _cast(out, policy.output_dtype)

    members: dict[str, Any] = {name: _access(name) for name in sorted(names)}
    members |= {"forward": forward, "_flashnorm_original": original, "_flashnorm_boundary": None, "__module__": original.__module__}
    return type(f"Sharded{original.__name__}", (original,), members)
