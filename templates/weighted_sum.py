"""Sums over materialised gradients: ``flashnorm::weighted_sum``, and the same with the noise in one pass.

    flashnorm::weighted_sum(Tensor w_bn, Tensor factors_b) -> Tensor
    flashnorm::weighted_sum_noise(Tensor w_bn, Tensor factors_b, Tensor keys, Tensor std, int row, ScalarType? dtype=None) -> Tensor

    w_bn       [B, ...]  per-sample gradients in any real floating-point type and any strides; n elements for each sample
    factors_b  [B]       float32; a sample with factor 0.0 adds exactly 0, whatever it holds (NaN and Inf too)
    keys, std, row       as for ``flashnorm::add_noise``: the same stream, element i in row-major order of the result
    returns    [...]     ``sum_b c_b W_b``; float32 (float64 for float64), or what ``add_noise`` makes of that in ``dtype``

1 / L has no argument: ``flashnorm::release`` hands out factors and a noise level that hold it already.

Both move the least bytes possible: W once, the result once. Against a sum and an ``add_noise`` after it, the fused form saves the
write and the read of the float32 sum, 8 * n bytes. ``weighted_sum`` is Inductor's own reduction, on every device, so that it fuses
with what surrounds it. ``weighted_sum_noise`` is one kernel on a GPU (persistent grid; tile: 4 * COUNTERS neighbouring elements,
over all samples; float32 sums, in the samples' order), and one on a CPU (noise_cpu.cpp; tiles of 4096 elements). It is called
for one parameter after another, so that the gradients of one are free before the sum of the next is allocated: Inductor would put
all sums into one loop nest, with every operand and every result alive.

Legend: B samples, n elements of the parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering

from . import _lowering as lowering
from . import noise
from ._clip_factor import check_factors
from ._cpu import TYPE_CODES, noise_kernels
from ._triton import HAS_TRITON, KERNEL_DTYPES

aten, prims = torch.ops.aten, torch.ops.prims
_CPU_COLUMNS = 1 << 16  # elements of the sum that stay in a core's cache while the samples pass by


def weighted_sum_aten(w_bn: Tensor, factors_b: Tensor) -> Tensor:
    """In plain PyTorch, for every device. On a CPU it reads W once and holds nothing but the sum."""
    _check(w_bn, factors_b)
    wide = torch.promote_types(w_bn.dtype, torch.float32)
    if w_bn.device.type != "cpu":
        factors = factors_b.to(wide).view(-1, *[1] * (w_bn.dim() - 1))
        return torch.where(factors != 0, w_bn * factors, 0).sum(0, dtype=wide)
    total = torch.zeros(w_bn.shape[1:], dtype=wide, device="cpu")
    # A view where strides allow it; else one copy of a sample at a time.
    pairs = [(w.reshape(-1), factor) for w, factor in zip(w_bn, factors_b.tolist(), strict=True) if factor != 0]
    flat = total.view(-1)
    for start in range(0, flat.numel(), _CPU_COLUMNS):
        part = flat[start : start + _CPU_COLUMNS]
        for w_n, factor in pairs:
            part.add_(w_n[start : start + _CPU_COLUMNS], alpha=factor)
    return total


def weighted_sum_noise_aten(
    w_bn: Tensor, factors_b: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None
) -> Tensor:
    """The sum, noised where it lies, then cast."""
    total = weighted_sum_aten(w_bn, factors_b)
    if dtype in (None, total.dtype):
        return torch.ops.flashnorm.add_noise_(total, keys, std, row)
    return torch.ops.flashnorm.add_noise(total, keys, std, row, dtype)


def weighted_sum_noise_cpu(
    w_bn: Tensor, factors_b: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None
) -> Tensor:
    """One C++ kernel where each sample's elements are contiguous; else the sum, and noise after it."""
    _check(w_bn, factors_b)
    noise.check_arguments(w_bn, keys, std, row)
    kernels = noise_kernels()
    dtype = dtype or torch.promote_types(w_bn.dtype, torch.float32)
    out = torch.empty(w_bn.shape[1:], dtype=dtype if dtype in TYPE_CODES else torch.float32, device="cpu")
    if kernels is None or w_bn.dtype not in TYPE_CODES or keys.stride(1) != 1 or w_bn.stride()[1:] != out.stride():
        return weighted_sum_noise_aten(w_bn, factors_b, keys, std, row, dtype)
    words, factors = noise.words_of(keys, row), factors_b.contiguous()
    kernels.weighted_sum_noise(
        out.data_ptr(), w_bn.data_ptr(), w_bn.shape[0], w_bn.stride(0), factors.data_ptr(), out.numel(), *words,
        std.item(), TYPE_CODES[w_bn.dtype], TYPE_CODES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out.to(dtype)


def weighted_sum_noise_cuda(
    w_bn: Tensor, factors_b: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None
) -> Tensor:
    """One kernel; other types than the kernel's by ATen and ``add_noise``."""
    _check(w_bn, factors_b)
    kernels = noise.triton_kernels()
    if not kernels or w_bn.dtype not in KERNEL_DTYPES:
        return weighted_sum_noise_aten(w_bn, factors_b, keys, std, row, dtype)
    noise.check_arguments(w_bn, keys, std, row)
    return kernels.weighted_sum_noise_triton(w_bn, factors_b, keys, std, row, dtype)


def reference(w_bn: Tensor, factors_b: Tensor) -> Tensor:
    """float64 [...]: element by element, sample by sample."""
    total = torch.zeros(w_bn.shape[1:], dtype=torch.float64)
    for w, factor in zip(w_bn.double(), factors_b.tolist(), strict=True):
        if factor != 0:
            total += factor * w
    return total


def check_gradients(*gradients: Tensor) -> None:
    """Refuses per-sample gradients that are not real floating-point numbers with samples in dimension 0."""
    for w_bn in gradients:
        if w_bn.dim() == 0 or not w_bn.dtype.is_floating_point:
            raise ValueError(
                f"flashnorm::weighted_sum got gradients of dtype {w_bn.dtype} and shape {tuple(w_bn.shape)}; it needs real "
                "floating-point ones with samples in dimension 0. For complex numbers pass torch.view_as_real(w)."
            )


def _check(w_bn: Tensor, factors_b: Tensor) -> None:
    check_gradients(w_bn)
    check_factors("weighted_sum", factors_b, w_bn.shape[0])


def _fake_weighted_sum(w_bn: Tensor, factors_b: Tensor) -> Tensor:
    _check(w_bn, factors_b)
    return w_bn.new_empty(w_bn.shape[1:], dtype=torch.promote_types(w_bn.dtype, torch.float32))


def _fake_weighted_sum_noise(
    w_bn: Tensor, factors_b: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None
) -> Tensor:
    _check(w_bn, factors_b)
    noise.check_arguments(w_bn, keys, std, row)
    return w_bn.new_empty(w_bn.shape[1:], dtype=dtype or torch.promote_types(w_bn.dtype, torch.float32))


_library = torch.library.Library("flashnorm", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_library.define("weighted_sum(Tensor w_bn, Tensor factors_b) -> Tensor", tags=_PT2)
_library.define(
    "weighted_sum_noise(Tensor w_bn, Tensor factors_b, Tensor keys, Tensor std, int row, ScalarType? dtype=None) -> Tensor",
    tags=_PT2,
)
_library.impl("weighted_sum", weighted_sum_aten, "CompositeExplicitAutograd")
_library.impl("weighted_sum_noise", weighted_sum_noise_aten, "CompositeExplicitAutograd")
_library.impl("weighted_sum_noise", weighted_sum_noise_cpu, "CPU")
if HAS_TRITON:
    _library.impl("weighted_sum_noise", weighted_sum_noise_cuda, "CUDA")
torch.library.register_fake("flashnorm::weighted_sum", _fake_weighted_sum, lib=_library)
torch.library.register_fake("flashnorm::weighted_sum_noise", _fake_weighted_sum_noise, lib=_library)


def _lower_weighted_sum(w: Any, factors: Any) -> Any:
    """Inductor's own reduction; a sample that is dropped is selected away, not multiplied by 0."""
    wide = torch.promote_types(w.get_dtype(), torch.float32)
    cast, select = lowerings[prims.convert_element_type.default], lowerings[aten.where.self]
    w = cast(w, wide)
    factors = lowerings[aten.view.default](factors, [w.get_size()[0], *[1] * (len(w.get_size()) - 1)])
    weighted = lowerings[aten.mul.Tensor](w, cast(factors, wide))
    zero = lowerings[aten.full.default]([], 0.0, dtype=wide, device=w.get_device())
    return lowerings[aten.sum.dim_IntList](select(lowerings[aten.ne.Scalar](factors, 0), weighted, zero), [0])


_by_call = fallback_handler(torch.ops.flashnorm.weighted_sum_noise.default, add_to_fallback_set=False)


def _lower_weighted_sum_noise(w: Any, factors: Any, keys: Any, std: Any, row: int, dtype: torch.dtype | None = None) -> Any:
    if w.get_device().type == "cpu":
        w = ir.ExternKernel.realize_input(w)
        w.freeze_layout()
        if ir.is_contiguous_strides_for_shape(w.get_stride()[1:], w.get_size()[1:]):
            return _by_call(w, factors, keys, std, row, dtype)
    kernels = noise.triton_kernels() if w.get_device().type == "cuda" else None
    if not kernels or w.get_dtype() not in KERNEL_DTYPES:
        total = _lower_weighted_sum(w, factors)
        if dtype in (None, total.get_dtype()):
            return lowerings[torch.ops.flashnorm.add_noise_.default](total, keys, std, row)
        return lowerings[torch.ops.flashnorm.add_noise.default](total, keys, std, row, dtype)
    w = ir.ExternKernel.require_contiguous(w)
    factors, keys, std = lowering.realized(factors, keys, std)
    out = lowering.scratch(w.get_size()[1:], dtype or torch.float32, w.get_device())
    kernels.lower_weighted_sum_noise(out, w, factors, keys, std, row)
    return out


register_lowering(torch.ops.flashnorm.weighted_sum.default, type_promotion_kind=None)(_lower_weighted_sum)
register_lowering(torch.ops.flashnorm.weighted_sum_noise.default, type_promotion_kind=None)(_lower_weighted_sum_noise)
