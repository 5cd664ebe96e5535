"""How an operator of this folder becomes a kernel in Inductor's generated code.

A kernel file hands over a ``Kernel``: the text of a template, which imports the file's ``@triton.jit`` function and calls it, and
an ATen function of the same result. ``lower`` gives Inductor the tiles that the file's formula ranks first; under ``max_autotune``
it gives all of them and the ATen function, and Inductor measures. On a CPU the operator itself is called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import ExternKernelChoice, SymbolicGridFn, TritonTemplate
from torch._inductor.virtualized import V

from ._aligned import align_rows
from ._compat import select_choice, zeroed_workspace
from ._triton import HAS_TRITON, POINTERS, Device, device_of, tma_layout, with_layouts

aten = torch.ops.aten
T = TypeVar("T")


@SymbolicGridFn
def persistent_grid(*sizes_and_meta: Any, min: Any, max: Any) -> tuple[Any, Any, Any]:  # noqa: A002
    """As many programs as the output has elements, times SPLIT, but no more than run at once; one where there is nothing to do."""
    *sizes, meta = sizes_and_meta
    return (max(1, min(math.prod(sizes) * meta.get("SPLIT", 1), meta["PROGRAMS"])), 1, 1)


@dataclass(frozen=True)
class Candidate:
    """One way to run a template: its constants, how it is compiled, and a zeroed workspace of int32 ``words`` (0: none)."""

    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    words: Any = 0


class Kernel:
    """A Triton template and the ATen function that Inductor may choose instead.

    ``source`` calls ``{{store_output(...)}}`` for an output [B, slots] or [B, slots, k]. ``aten_form`` takes the template's inputs
    and the output's ``slots``, and returns that output.
    """

    def __init__(self, name: str, source: str, aten_form: Callable[..., torch.Tensor], grid: Any = persistent_grid) -> None:
        self.name = f"flashnorm_{name}"
        self._check_indices(source)
        self.template = TritonTemplate(name=self.name, grid=grid, source=source)
        self.aten = ExternKernelChoice(aten_form, name=self.name, has_out_variant=False)

    def _check_indices(self, source: str) -> None:
        """Inductor would take a name such as ``slot`` for a size of its own (they begin with s) and hand over another number."""
        indices = re.findall(r'"(\w+)"', re.findall(r"store_output\(\(([^)]*)\)", source)[0])
        assert all(name.startswith("idx_") for name in indices), f"{self.name}: indices {indices} have to begin with idx_"

    def lower(
        self,
        inputs: Sequence[Any],
        layout: Any,
        candidates: Sequence[Candidate],
        mutated: Sequence[Any] = (),
        **aten_settings: Any,
    ) -> Any:
        """A TensorBox of ``layout``. ``candidates``: best first. ``mutated``: inputs that the template uses as scratch."""
        measured = measures()
        choices: list[Any] = []
        for candidate in candidates:
            workspace = zeroed_workspace(candidate.words, layout.device, torch.int32) if candidate.words != 0 else None
            self.template.maybe_append_choice(
                choices,
                input_nodes=tuple(inputs),
                layout=layout,
                mutated_inputs=list(mutated) or None,
                workspace_arg=workspace,
                num_warps=candidate.num_warps,
                num_stages=candidate.num_stages,
                **candidate.constants,
            )
        if measured or not choices:
            choices.append(self.aten.bind(tuple(inputs), layout, **aten_settings))
        return select_choice(self.name, choices, inputs, layout)


def measures() -> bool:
    """Whether Inductor will time the candidates."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def register(op: Any, lower: Callable[..., Any]) -> None:
    """``lower(*args)`` on devices that Triton compiles for; the operator as it is elsewhere, and where ``lower`` gives ``None``."""
    as_it_is = fallback_handler(op)

    def lowering(*args: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, ir.IRNode)).get_device_or_error()
        found = lower(*args) if HAS_TRITON and device.type == "cuda" else None
        return as_it_is(*args) if found is None else found

    register_lowering(op, type_promotion_kind=None)(lowering)


def realized(*values: Any) -> list[Any]:
    """Operands as buffers or strided views of buffers, with aligned rows where their strides are still free; a view that strides
    cannot say is copied."""
    for value in values:
        align_rows(value)
    found = [ir.ExternKernel.realize_input(value) for value in values]
    for value in found:
        align_rows(value)
    return found


def hint(size: Any) -> int:
    """A size as a number, for choices that any size may use."""
    return int(V.graph.sizevars.optimization_hint(size))


def hints(*sizes: Any) -> list[int]:
    """Sizes as numbers of at least 1."""
    return [max(1, hint(size)) for size in sizes]


def is_zero(*sizes: Any) -> bool:
    """Whether one of them is known to be 0."""
    return any(V.graph.sizevars.statically_known_equals(size, 0) for size in sizes)


def is_at_most(size: Any, bound: int) -> bool:
    """Whether a size is known to be no larger."""
    return bool(V.graph.sizevars.statically_known_leq(size, bound))


def device_for_nodes(*operands: Any) -> tuple[Device, list[int]]:
    """The operands' device and their ``LAYOUT``; tiles for a device without TMA where one of them needs pointers."""
    device = device_of(operands[0].get_device())
    return with_layouts(device, [layout_of_node(operand, device) for operand in operands])


def considered(choices: Sequence[T]) -> Sequence[T]:
    """Choices, best first: all of them where Inductor will time them, else the best."""
    return choices if measures() else choices[:1]


def layout_of_node(node: Any, device: Device) -> int:
    """``LAYOUT`` of an operand: a descriptor only where its alignment is known while compiling."""
    strides, sizes = node.get_stride(), node.get_size()
    itemsize = node.get_dtype().itemsize
    offset = node.get_layout().offset * itemsize
    if not device.tma or V.graph.sizevars.statically_known_multiple_of(offset, 16) is False:
        return POINTERS
    numbers = [_multiple(stride, itemsize) for stride in strides]
    lengths = [1 if V.graph.sizevars.statically_known_equals(size, 1) else 2 for size in sizes]
    return tma_layout(lengths, numbers, itemsize, 0)


def _multiple(stride: Any, itemsize: int) -> int:
    """A number that stands for a stride: itself, or for a symbol one that is aligned where the symbol is known to be."""
    if isinstance(stride, int) or sympy.sympify(stride).is_number:
        return int(stride)
    return 16 if V.graph.sizevars.statically_known_multiple_of(stride * itemsize, 16) else -1


def scratch(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """An uninitialized buffer; allocating it launches nothing."""
    box = lowerings[aten.empty_strided.default](
        list(size), ir.FlexibleLayout.contiguous_strides(list(size)), dtype=dtype, device=device
    )
    box.realize()
    return box


def output_layout(size: Sequence[Any], device: torch.device) -> Any:
    """A contiguous float32 output."""
    return ir.FixedLayout(device, torch.float32, list(size))


def summed(slots: Any, dtype: torch.dtype = torch.float32) -> Any:
    """[B, slots] -> [B] float32: Inductor's own reduction in ``dtype``, in a fixed order, fused with what reads it."""
    wide = slots if dtype == torch.float32 else lowerings[torch.ops.prims.convert_element_type.default](slots, dtype)
    total = lowerings[aten.sum.dim_IntList](wide, [1])
    return total if dtype == torch.float32 else lowerings[torch.ops.prims.convert_element_type.default](total, torch.float32)


def zeros(size: Sequence[Any], device: torch.device) -> Any:
    return lowerings[aten.full.default](list(size), 0.0, dtype=torch.float32, device=device)
