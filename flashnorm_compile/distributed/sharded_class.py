"""Modules whose sharded parameters are gathered where they are used, by class-swapped properties.

``module.weight`` is the sharded DTensor, as in ``parameters()`` and ``state_dict()``, except while a forward pass runs: there it is
the gathered tensor, and torch.compile traces the gather and, in the backward, the reduction of the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Sharding:
    """How the parameters of one module lie on the data-parallel mesh, and how they are gathered.

    ``shards``: the part of the mesh along which shards lie; None: the whole mesh.
    """

    mesh: DeviceMesh
    shards: DeviceMesh | None
    reshard_after_forward: bool
    policy: MixedPrecisionPolicy


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


def gathered(parameter: DTensor, sharding: Sharding) -> torch.Tensor:
    """The whole parameter on this rank, in ``param_dtype``. Its gradient is averaged over the mesh in ``reduce_dtype``: first over
    the shards' ranks, and then each shard over its copies."""
    reduce_dtype = sharding.policy.reduce_dtype or sharding.policy.param_dtype
    if sharding.shards is not None:
        shape, stride = parameter.shape, parameter.stride()
        shard = parameter.redistribute(placements=parameter.placements, backward_dtype=reduce_dtype)
        local = shard.to_local(grad_placements=[Partial("avg"), Shard(0)])
        parameter = DTensor.from_local(local, sharding.shards, [Shard(0)], run_check=False, shape=shape, stride=stride)
    whole = parameter.redistribute(placements=[Replicate()], forward_dtype=sharding.policy.param_dtype, backward_dtype=reduce_dtype)
    return whole.to_local(grad_placements=[Partial("avg")])


def _access(name: str) -> property:
    def get(self: Any) -> Any:
        parameter = self._parameters[name]
        if torch.compiler.is_compiling() or _Forwards.running:
            return gathered(parameter, self._flashnorm_sharding)
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
