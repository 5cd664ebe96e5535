"""Attention as CUDA would choose it, for a trace on fake CPU tensors.

`F.scaled_dot_product_attention` picks its kernel by device while it is traced, so a CPU trace would hold the CPU's. Here the
rules of CUDA's choice (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, in the default order of backends) are written
down as far as the bench needs them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
_FLASH_MULTIPLE, _FLASH_LARGEST = 8, 256
_ALIGNMENT = 16  # bytes of a head's row, for the memory-efficient kernels on tensor cores


@contextlib.contextmanager
def attention_of_cuda() -> Iterator[None]:
    """Within, `F.scaled_dot_product_attention` calls the operator that CUDA would choose. For fake tensors only."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
    # Dispatch in Python remembers where a call went, even when that is no longer there.
    remembered = aten.scaled_dot_product_attention.default._dispatch_cache
    remembered.clear()
    try:
        yield
    finally:
        library._destroy()
        remembered.clear()


def backend_on_cuda(dtype: torch.dtype, head_width: int, value_width: int, masked: bool) -> str:
    """ "flash", "efficient" or "math": what Hopper runs for these operands, all of one type."""
    half = dtype in (torch.bfloat16, torch.float16)
    if half and not masked and head_width == value_width <= _FLASH_LARGEST:
        return "flash"
    aligned = all(width * dtype.itemsize % _ALIGNMENT == 0 for width in (head_width, value_width))
    return "efficient" if aligned and (half or dtype == torch.float32) else "math"


def _attention(
    q_bhtk: Tensor,
    k_bhsk: Tensor,
    v_bhsk: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Batch, heads, positions, width of a head; grouped queries are repeated, as the efficient kernel needs them."""
    if q_bhtk.dim() != 4:
        return aten._scaled_dot_product_attention_math(
            q_bhtk, k_bhsk, v_bhsk, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    width = q_bhtk.shape[-1]
    scale = width**-0.5 if scale is None else scale
    backend = backend_on_cuda(q_bhtk.dtype, width, v_bhsk.shape[-1], attn_mask is not None)
    if backend == "math":
        return aten._scaled_dot_product_attention_math(
            q_bhtk, k_bhsk, v_bhsk, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if backend == "flash":
        padded = [F.pad(x, (0, -width % _FLASH_MULTIPLE)) if width % _FLASH_MULTIPLE else x for x in (q_bhtk, k_bhsk, v_bhsk)]
        out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width] if width % _FLASH_MULTIPLE else out
    if enable_gqa:
        groups = q_bhtk.shape[1] // k_bhsk.shape[1]
        k_bhsk, v_bhsk = k_bhsk.repeat_interleave(groups, 1), v_bhsk.repeat_interleave(groups, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q_bhtk.dtype).masked_fill(attn_mask.logical_not(), float("-inf"))
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q_bhtk, k_bhsk, v_bhsk))
    return aten._scaled_dot_product_efficient_attention(
        q_bhtk, k_bhsk, v_bhsk, attn_mask, trains, dropout_p, is_causal, scale=scale
    )[0]
