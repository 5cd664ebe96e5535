"""Floating-point operations of one operator: PyTorch's formulas, and ours for the operators of `flashnorm_compile`.

Only matrix products, convolutions and attention count, two for each multiplication with its addition. Everything else is bound
by the memory it moves.

Legend: B samples, T and S positions, d and p widths of a weight gradient's operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
OURS = "flashnorm::"


def _weight_gradient(g_btp: Tensor, a_btd: Tensor, *_: Any) -> int:
    batch, positions, rows = g_btp.shape
    return 2 * batch * positions * rows * a_btd.shape[2]


def _ghost(g_btp: Tensor, a_btd: Tensor, *_: Any) -> int:
    """Two products of T x T, of which the half with i <= j is computed."""
    batch, positions, rows = g_btp.shape
    return batch * positions**2 * (rows + a_btd.shape[2])


def _conv_weight_grads(grad: Tensor, source: Tensor, weight_shape: Any, stride: Any, padding: Any, dilation: Any,
                       transposed: bool, *_: Any) -> int:  # fmt: skip
    places = source if transposed else grad
    return 2 * places.numel() * math.prod(weight_shape[1:])


def _tied_cross_term(h_btd: Tensor, index_bt: Tensor, g_bsv: Tensor, a_bsd: Tensor, *_: Any) -> int:
    batch, positions, width = h_btd.shape
    return 2 * batch * positions * a_bsd.shape[1] * width


FLOPS_OF_OURS: Mapping[str, Callable[..., int]] = {
    "flash_norm": _weight_gradient,
    "ghost_norm": _ghost,
    "weight_grads": _weight_gradient,
    "clipped_sum": _weight_gradient,
    "per_layer": lambda *operands: 2 * _weight_gradient(*operands),  # in one launch it would be half as much
    "conv_weight_grads": _conv_weight_grads,
    "tied_cross_term": _tied_cross_term,
}
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
    name = target.name()
    if name.startswith(OURS):
        formula = FLOPS_OF_OURS.get(packet.__name__)
        return formula(*args) if formula else 0
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
    tensors = (value for value in args if isinstance(value, Tensor) and value.is_floating_point())
    return next((value.dtype for value in tensors), torch.float32)
