"""Floating-point operations of one operator: PyTorch's formulas, among which are those of `flashnorm_compile.templates.flops`.

Only matrix products, convolutions and attention count, two for each multiplication with its addition. Everything else is bound
by the memory it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from flashnorm_compile.templates import flops  # noqa: F401 - the formulas of our operators
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
# They read and write, and multiply no matrices.
MOVES_DATA = frozenset(
    (
        "add_noise",
        "add_noise_",
        "_add_noise_into",
        "embedding_norm",
        "squared_norms",
        "release",
        "sort_indices",
        "weighted_sum",
        "weighted_sum_noise",
        "weighted_sums_noise",
    )
)

_CPU_ATTENTION: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_: sdpa_backward_flop_count(
        grad.shape, q.shape, k.shape, v.shape
    ),
}


def flops_of(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of a call with tensors (fake ones will do) for arguments; 0 for what is no product.

    Causal attention counts half of the full one: its kernels leave out the tiles above the diagonal.
    """
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return 0
    if packet in _CPU_ATTENTION:
        return _causal_share(target, args, kwargs, _CPU_ATTENTION[packet](*args))
    if packet not in flop_registry:
        return 0
    return _causal_share(target, args, kwargs, int(flop_registry[packet](*args, **kwargs, out_val=out)))


def _causal_share(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], full: int) -> int:
    names = [argument.name for argument in target._schema.arguments]
    if "is_causal" not in names:
        return full
    position = names.index("is_causal")
    causal = kwargs.get("is_causal", args[position] if position < len(args) else False)
    return full // 2 if causal else full


def product_dtype(args: Any) -> torch.dtype:
    """The type of the operands of a product: that of the first floating-point tensor."""
    tensors = (value for value in pytree.tree_leaves(args) if isinstance(value, Tensor) and value.is_floating_point())
    return next((value.dtype for value in tensors), torch.float32)
