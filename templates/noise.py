"""Gaussian noise as a pure function of (key, stream, element): ``flashnorm::add_noise`` and its in-place form.

    flashnorm::add_noise(Tensor value, Tensor keys, Tensor std, int row, ScalarType? dtype=None) -> Tensor
    flashnorm::add_noise_(Tensor(a!) value, Tensor keys, Tensor std, int row) -> Tensor(a!)

    out = cast(float32(value) + std * z, dtype or value.dtype),    z ~ N(0, 1) independent, float32

value: any shape and strides, floating point (complex: pass ``torch.view_as_real``); float64 is added to in float64.
keys:  int64 [P, 2] on the device of value; ``keys[row]`` holds a 64-bit generator key and a 64-bit stream. With [P, 5] the value
       is a part of a larger tensor, and three more words (first, width, pitch) say which: its element i in row-major order is
       element ``first + i // width * pitch + i % width`` of the whole. ``WHOLE`` are the words of a tensor that is no part.
std:   float32, 0-d, on the device of value. At std == 0 the value comes back bit for bit, without a draw on a CPU.
out:   contiguous (``add_noise``); value itself (``add_noise_``).

Element i in row-major order of the logical shape gets z[i] (of the whole tensor: parts of it together get exactly its noise),
which depends on ``keys[row]`` and i alone: not on strides, threads or what else is drawn. One (key, stream) must therefore serve
one released tensor once. Four elements
are one Philox4x32-10 block (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") at counter
(i // 4, stream), each two of its words one Box-Muller pair. Uniforms have 32 bits, so |z| < 6.77. Not defended against:
attacks on the rounding of floating-point sums (Mironov 2012), and prediction of the generator, which is fast but not
cryptographic.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
from flashnorm_compile.templates._cpu import TYPE_CODES, noise_kernels
from torch import Tensor
from torch._inductor import ir
from torch._inductor.fx_passes.reinplace import InplaceableOp, inplaceable_ops
from torch._inductor.lowering import empty, fallback_handler, register_lowering
from torch._prims_common import is_contiguous_or_false

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
WHOLE = (0, 1 << 62, 0)
_REFERENCE_CHUNK = 1 << 22  # elements; bounds the int64 temporaries of the reference


def philox(block: Tensor, key: Tensor, stream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: the four 32-bit words, as int64 in [0, 2**32), of each counter ``(block, stream)`` under ``key``.

    All arguments are int64 holding 64 bits: block [n], key and stream 0-d (or anything that broadcasts).
    """
    x0, x1 = block & _LOW, (block >> 32) & _LOW
    x2, x3 = (stream & _LOW).expand_as(x0), ((stream >> 32) & _LOW).expand_as(x0)
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    for _ in range(_ROUNDS):
        # Products wrap modulo 2**64, which keeps both halves; masking undoes the sign extension of the shift.
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = ((p1 >> 32) & _LOW) ^ x1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return x0, x1, x2, x3


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 standard normals from each pair of 32-bit words (int64 tensors of one shape)."""
    u = a.float() * 2.0**-32 + 2.0**-33
    # The top bit of b is half a turn, the other 31 an angle in [-pi/2, pi/2).
    quarter = (b << 1) & _LOW
    angle = (quarter - ((quarter >> 31) << 32)).float() * (math.pi * 2.0**-32)
    radius = torch.sqrt(-2.0 * torch.log(u)) * (1 - 2 * (b >> 31)).float()
    return radius * torch.cos(angle), radius * torch.sin(angle)


def reference_normals(key_stream: Tensor, start: int, stop: int) -> Tensor:
    """float32 [stop - start]: z[start:stop] of ``key_stream`` (int64 [2]: key, stream), in plain PyTorch on any device.

    Slow and clear; the C++ kernel draws the same 32-bit words and agrees to about 1e-6.
    """
    block = torch.arange(start // 4, (stop + 3) // 4, device=key_stream.device)
    words = philox(block, key_stream[0], key_stream[1])
    z = torch.stack((*box_muller(words[0], words[1]), *box_muller(words[2], words[3])), dim=-1).flatten()
    offset = start % 4
    return z[offset : offset + stop - start]


def part_normals(words: Tensor, start: int, stop: int) -> Tensor:
    """float32 [stop - start]: the noise of elements start .. stop of the part that ``words`` (int64 [5]) describe."""
    key, stream, first, width, pitch = words.unbind()
    element = torch.arange(start, stop, device=words.device)
    whole = first + element // width * pitch + element % width
    drawn = philox(whole // 4, key, stream)
    z = torch.stack((*box_muller(drawn[0], drawn[1]), *box_muller(drawn[2], drawn[3])), dim=-1)
    return z.gather(1, (whole % 4).unsqueeze(1)).squeeze(1)


def check_arguments(value: Tensor, keys: Tensor, std: Tensor, row: int) -> None:
    """Refuses what ``flashnorm::add_noise`` cannot take, with a TypeError or a ValueError that says why."""
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"flashnorm::add_noise got a value of dtype {value.dtype}; it needs a real floating-point one. "
            "For complex numbers pass torch.view_as_real(value)."
        )
    if keys.dtype is not torch.int64 or keys.dim() != 2 or keys.shape[1] not in (2, 5) or not 0 <= row < keys.shape[0]:
        raise ValueError(
            f"flashnorm::add_noise got keys of dtype {keys.dtype} and shape {tuple(keys.shape)} with row {row}; "
            "it needs int64 [P, 2], or [P, 5] for parts of tensors, and 0 <= row < P."
        )
    if std.dtype is not torch.float32 or std.dim() != 0:
        raise ValueError(f"flashnorm::add_noise got std of dtype {std.dtype} and shape {tuple(std.shape)}; it needs 0-d float32.")


def reference_add_noise(value: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None) -> Tensor:
    """``flashnorm::add_noise`` in plain PyTorch, for every device. Never waits for the device."""
    check_arguments(value, keys, std, row)
    flat = value.reshape(-1)
    out = torch.empty(flat.shape, dtype=dtype or value.dtype, device=value.device)
    accumulator = torch.promote_types(value.dtype, torch.float32)
    normals = reference_normals if keys.shape[1] == 2 else part_normals
    for start in range(0, flat.numel(), _REFERENCE_CHUNK):
        part = flat[start : start + _REFERENCE_CHUNK]
        z = normals(keys[row], start, start + part.numel())
        noisy = part.to(accumulator) + std * z.to(accumulator)
        out[start : start + _REFERENCE_CHUNK] = torch.where(std == 0, part.to(accumulator), noisy)
    return out.view(value.shape)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """noise_triton.py, or None without Triton: a CPU build of PyTorch does not come with it."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("flashnorm_compile.templates.noise_triton")


def _launch(out: Tensor, value: Tensor, keys: Tensor, std: float, row: int) -> None:
    """Run the C++ kernel from ``value`` into ``out``: contiguous, of TYPE_CODES, one buffer or disjoint ones."""
    kernels = noise_kernels()
    assert kernels is not None
    types = TYPE_CODES[value.dtype], TYPE_CODES[out.dtype]
    words = words_of(keys, row)
    kernels.add_noise(out.data_ptr(), value.data_ptr(), value.numel(), *words, std, *types, torch.get_num_threads())


def words_of(keys: Tensor, row: int) -> tuple[int, int]:
    """Address and number of a row's words, for the C++ kernels. The words of a row are contiguous."""
    assert keys.stride(1) == 1
    return keys.data_ptr() + row * keys.stride(0) * keys.element_size(), keys.shape[1]


def _add_noise_cpu(value: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None) -> Tensor:
    check_arguments(value, keys, std, row)
    dtype = dtype or value.dtype
    scale = std.item()
    if scale == 0:
        return value.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if noise_kernels() is None:
        return reference_add_noise(value, keys, std, row, dtype)
    if value.dtype not in TYPE_CODES:
        value = value.float()
    out = torch.empty(value.shape, dtype=dtype if dtype in TYPE_CODES else torch.float32, device="cpu")
    _launch(out, value.contiguous(), keys if keys.stride(1) == 1 else keys.contiguous(), scale, row)
    return out.to(dtype)


def _add_noise_cpu_(value: Tensor, keys: Tensor, std: Tensor, row: int) -> Tensor:
    check_arguments(value, keys, std, row)
    scale = std.item()
    if scale == 0:
        return value
    if value.dtype in TYPE_CODES and value.is_contiguous() and keys.stride(1) == 1 and noise_kernels() is not None:
        _launch(value, value, keys, scale, row)
        return value
    return value.copy_(_add_noise_cpu(value, keys, std, row))


def _reference_add_noise_(value: Tensor, keys: Tensor, std: Tensor, row: int) -> Tensor:
    return value.copy_(reference_add_noise(value, keys, std, row))


def _add_noise_cuda(value: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None) -> Tensor:
    check_arguments(value, keys, std, row)
    kernels = triton_kernels()
    return kernels.add_noise_triton(value, keys, std, row, dtype) if kernels else reference_add_noise(value, keys, std, row, dtype)


def _add_noise_cuda_(value: Tensor, keys: Tensor, std: Tensor, row: int) -> Tensor:
    check_arguments(value, keys, std, row)
    kernels = triton_kernels()
    return kernels.add_noise_triton_(value, keys, std, row) if kernels else _reference_add_noise_(value, keys, std, row)


def _add_noise_into_cuda(value: Tensor, keys: Tensor, std: Tensor, row: int) -> None:
    _add_noise_cuda_(value, keys, std, row)


def _fake_add_noise(value: Tensor, keys: Tensor, std: Tensor, row: int, dtype: torch.dtype | None = None) -> Tensor:
    check_arguments(value, keys, std, row)
    return value.new_empty(value.shape, dtype=dtype or value.dtype)


def _fake_add_noise_(value: Tensor, keys: Tensor, std: Tensor, row: int) -> Tensor:
    check_arguments(value, keys, std, row)
    return value


def _fake_add_noise_into(value: Tensor, keys: Tensor, std: Tensor, row: int) -> None:
    check_arguments(value, keys, std, row)


def _add_noise_into_cpu(value: Tensor, keys: Tensor, std: Tensor, row: int) -> None:
    _add_noise_cpu_(value, keys, std, row)


def _reference_add_noise_into(value: Tensor, keys: Tensor, std: Tensor, row: int) -> None:
    _reference_add_noise_(value, keys, std, row)


_library = torch.library.Library("flashnorm", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_library.define("add_noise(Tensor value, Tensor keys, Tensor std, int row, ScalarType? dtype=None) -> Tensor", tags=_PT2)
_library.define("add_noise_(Tensor(a!) value, Tensor keys, Tensor std, int row) -> Tensor(a!)", tags=_PT2)
# What generated code calls: outside ATen, Inductor accepts a mutating operator only if it returns nothing.
_library.define("_add_noise_into(Tensor(a!) value, Tensor keys, Tensor std, int row) -> ()", tags=_PT2)
_library.impl("add_noise", _add_noise_cpu, "CPU")
_library.impl("add_noise_", _add_noise_cpu_, "CPU")
_library.impl("_add_noise_into", _add_noise_into_cpu, "CPU")
_library.impl("add_noise", _add_noise_cuda, "CUDA")
_library.impl("add_noise_", _add_noise_cuda_, "CUDA")
_library.impl("_add_noise_into", _add_noise_into_cuda, "CUDA")
_library.impl("add_noise", reference_add_noise, "CompositeExplicitAutograd")
_library.impl("add_noise_", _reference_add_noise_, "CompositeExplicitAutograd")
_library.impl("_add_noise_into", _reference_add_noise_into, "CompositeExplicitAutograd")
torch.library.register_fake("flashnorm::add_noise", _fake_add_noise, lib=_library)
torch.library.register_fake("flashnorm::add_noise_", _fake_add_noise_, lib=_library)
torch.library.register_fake("flashnorm::_add_noise_into", _fake_add_noise_into, lib=_library)

_ops = torch.ops.flashnorm


def _may_work_in_place(node: torch.fx.Node) -> bool:
    """Whether the in-place form gives what the functional one promises: the same dtype and contiguous strides."""
    value = node.args[0]
    return (
        len(node.args) == 4 and not node.kwargs and isinstance(value, torch.fx.Node) and is_contiguous_or_false(value.meta["val"])
    )


def _lower_in_place(value: Any, keys: Any, std: Any, row: int) -> Any:
    """Noise ``value``'s own buffer, and hand on what was noised.

    Where Inductor laid the buffer out so that no strides express the view ``value``, it copies. The copy then takes the
    noise, so later reads must see the copy: returning ``value`` would drop the noise without a word.
    """
    kernels = triton_kernels() if value.get_device().type == "cuda" else None
    if kernels:
        noised = ir.ExternKernel.require_contiguous(value)
        kernels.lower_add_noise(noised, noised, keys, std, row)
        return noised
    noised = ir.ExternKernel.realize_input(value)
    noised = noised if isinstance(noised, ir.TensorBox) else ir.TensorBox(noised)
    ir.FallbackKernel.create(_ops._add_noise_into.default, noised, keys, std, row)
    return noised


_add_noise_by_call = fallback_handler(_ops.add_noise.default, add_to_fallback_set=False)


def _lower(value: Any, keys: Any, std: Any, row: int, dtype: torch.dtype | None = None) -> Any:
    """Where ``value`` lives on: a result of its own."""
    kernels = triton_kernels() if value.get_device().type == "cuda" else None
    if not kernels:
        return _add_noise_by_call(value, keys, std, row, dtype)
    value = ir.ExternKernel.require_contiguous(value)
    out = empty(value.get_size(), dtype=dtype or value.get_dtype(), device=value.get_device())
    out.realize()
    kernels.lower_add_noise(out, value, keys, std, row)
    return out


# Inductor's reinplacing pass turns add_noise into add_noise_ where nothing else needs the value afterwards.
inplaceable_ops[_ops.add_noise.default] = InplaceableOp(_ops.add_noise_.default, 0, extra_check=_may_work_in_place)
register_lowering(_ops.add_noise_.default, type_promotion_kind=None)(_lower_in_place)
register_lowering(_ops.add_noise.default, type_promotion_kind=None)(_lower)
