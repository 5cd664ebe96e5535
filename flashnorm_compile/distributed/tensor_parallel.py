"""Tensor parallelism: ranks that compute parts of the same samples, with DTensor parameters (``parallelize_module``).

Each of these ranks holds a part of a sample's gradient. Squared norms of the parts are added up among them, once for all
parameters; those of parameters of which all hold a copy count once. The ranks then clip by the same factors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..passes.errors import OptionsError, PrivacyError, UnsupportedGraphError
from .sharded_class import Inner

# By how much the ranks' squared norms of copied parameters may differ, as part of themselves and of the whole gradient's: the same
# terms may be added in another order.
RELATIVE, OF_WHOLE = 1e-2, 1e-5


def inner_layout(parameter: DTensor, data_mesh: DeviceMesh) -> Inner:
    """What ``fully_shard`` and ``replicate`` keep of a parameter that is distributed already.

    Raises:
        OptionsError: one of the meshes has more than one dimension, or the layout is not of tensor parallelism.
    """
    plain = all(placement.is_replicate() or type(placement) is Shard for placement in parameter.placements)
    if parameter.device_mesh.ndim != 1 or data_mesh.ndim != 1 or not plain:
        raise OptionsError(
            f"a parameter is distributed over {parameter.device_mesh} as {parameter.placements} already, and would be over "
            f"{data_mesh} too. Tensor parallelism (Shard or Replicate over one mesh dimension) goes together with one "
            "data-parallel dimension."
        )
    part = parameter.to_local()
    whole_stride = tuple(parameter.stride())
    return Inner(parameter.device_mesh, tuple(parameter.placements), part.shape, part.stride(), parameter.shape, whole_stride)


def keep_layouts(gm: fx.GraphModule, inputs: int) -> None:
    """Makes the gradient of every distributed parameter arrive as its parameter lies, in place: DTensor may leave that of a copied
    one in summands, which are no rank's gradient. ``inputs``: how many of the graph's inputs come from Dynamo."""
    placeholders = gm.graph.find_nodes(op="placeholder")[:inputs]
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        for node in placeholders:
            value = node.meta.get("example_value")
            if isinstance(value, DTensor) and value.requires_grad:
                kept = gm.graph.call_function(_as_it_lies, ())
                node.replace_all_uses_with(kept)
                kept.args = (node,)
                kept.meta = {"example_value": value}
    gm.recompile()


def _as_it_lies(parameter: DTensor) -> DTensor:
    return parameter.redistribute(parameter.device_mesh, parameter.placements)


def check_samples(inputs: Mapping[str, Any], group_name: str | None) -> None:
    """Compares the private inputs among the ranks of a group that compute parts of the same samples.

    Raises:
        PrivacyError: on every rank, if they differ: what would be clipped as one sample's gradient would be several samples'.
    """
    group = _group(group_name)
    mine = {name: _digest(value) for name, value in inputs.items()}
    everybody: list[Any] = [None] * group.size()
    dist.all_gather_object(everybody, mine, group=group)
    differing = sorted({name for told in everybody for name in mine if told.get(name) != everybody[0].get(name)})
    if differing:
        raise PrivacyError(
            f"the ranks {dist.get_process_group_ranks(group)} compute parts of the same samples (tensor parallelism), and their "
            f"inputs differ: {', '.join(differing)}. Feed every rank of a tensor-parallel group the same batch; different samples "
            "belong to the ranks of another mesh dimension, which flashnorm_compile.fully_shard or replicate is given."
        )


def _digest(value: Any) -> bytes:
    if isinstance(value, DTensor):
        raise UnsupportedGraphError(
            "a private input is a DTensor. Pass each rank its samples as a plain tensor, the same to a whole tensor-parallel group."
        )
    if isinstance(value, Tensor):
        told = f"{value.dtype} {tuple(value.shape)}".encode()
        return hashlib.blake2b(told + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()
    return repr(value).encode()


def whole_norms(norms: Tensor, copied_sq: Tensor, group_name: str) -> tuple[Tensor, Tensor]:
    """Norms of whole gradients, the same on all ranks bit for bit, from those of this rank's parts: one all-reduce.

    Args:
        norms: float32 [B, K]: of this rank's share of each sample's gradient; copies that n ranks hold count 1/n in squares.
        copied_sq: float32 [B]: the squared norm of each sample's gradient for all parameters of which every rank holds a copy.

    Returns:
        float32 [B, K]: infinite for a sample for which the ranks do not agree on what they hold copies of, so that it is left out;
        and bool [B]: for which samples that is.
    """
    group = _group(group_name)
    copied = copied_sq.double().unsqueeze(1)
    sent = torch.cat((norms.double().square(), copied, copied.square()), 1)
    dist.all_reduce(sent, group=group)
    squares, total, total_of_squares = sent[:, :-2], sent[:, -2], sent[:, -1]
    # n times the sum of squares exceeds the square of the sum by n^2 times the variance.
    bound = RELATIVE * total + OF_WHOLE * group.size() * squares.sum(1)
    differ = group.size() * total_of_squares - total.square() > bound.square()
    return squares.sqrt().float().masked_fill(differ.unsqueeze(1), torch.inf), differ


def size(group_name: str) -> int:
    """How many ranks compute parts of the same samples."""
    return int(_group(group_name).size())


def _group(name: str | None) -> Any:
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
