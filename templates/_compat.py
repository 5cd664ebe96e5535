"""What differs between torch 2.11 and 2.15 in the parts of Inductor that lowerings use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.common import WorkspaceArg, WorkspaceZeroMode
from torch._inductor.kernel.bmm import aten_bmm
from torch._inductor.select_algorithm import autotune_select_algorithm
from torch._inductor.virtualized import V


def select_choice(name: str, choices: list[Any], inputs: Sequence[Any], layout: Any) -> Any:
    """The node of the chosen kernel. Newer versions return the choice beside it."""
    found = autotune_select_algorithm(name, choices, list(inputs), layout)
    return found[0] if isinstance(found, tuple) else found


def library_bmm(left: Any, right: Any, layout: Any) -> Any:
    """The node of the library's batched product of two nodes, of which neither is copied for it where its strides will do."""
    inputs = [ir.ExternKernel.realize_input(operand) for operand in (left, right)]
    return aten_bmm.bind(tuple(inputs), layout).output_node()


def zeroed_workspace(words: Any, device: Any, dtype: Any) -> WorkspaceArg:
    """``words`` elements that are zero when the kernel starts; the template sees them as ``ws_ptr``."""
    return WorkspaceArg(
        count=words,
        zero_mode=WorkspaceZeroMode.ZERO_ON_CALL,
        device=device,
        outer_name=WorkspaceArg.unique_name(),
        dtype=dtype,
    )


def run_after(operation: Any, buffer: str) -> None:
    """Orders an operation behind the one that makes ``buffer``, without keeping it alive. Only a matter of memory: where Inductor
    has no such dependencies, nothing happens."""
    dependencies = getattr(V.graph, "additional_buffer_deps", None)
    if dependencies is not None:
        dependencies[operation.get_operation_name()].add(buffer)


def many_empty(shapes: Sequence[Any], strides: Sequence[Any], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Uninitialized tensors. On a GPU by the function that Inductor's code calls: the device may wait, and ``torch.empty`` takes
    four times as long."""
    make = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
    if make is None or device.type != "cuda" or device.index != torch.cuda.current_device():
        return [
            torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride in zip(shapes, strides, strict=True)
        ]
    return [make(shape, stride, dtype) for shape, stride in zip(shapes, strides, strict=True)]
