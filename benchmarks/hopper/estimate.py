"""Bytes, FLOPs and time of generated code: a roofline over the kernels that Inductor scheduled.

Bytes are Inductor's own count: what each kernel reads and writes of buffers that leave it; a template's operands count once.
The time of a kernel is the longer of its arithmetic and its traffic, plus its launch (Williams et al. 2009, "Roofline"), at the
rates in `flashnorm_compile.passes.peaks`, which cites the datasheets and the share of them that well-tuned kernels reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flashnorm_compile.passes.peaks import DATASHEETS, Peaks
from torch import fx
from torch._inductor import ir
from torch._inductor.dependencies import WeakDep
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch.utils import _pytree as pytree

from benchmarks.hopper.flops import flops_of, product_dtype
from benchmarks.hopper.memory import nbytes_in

_SECTOR = 32  # bytes that a single element costs


@dataclass(frozen=True)
class Work:
    """One kernel or library call. `dtype` is that of a product's operands."""

    name: str
    nbytes: int
    flops: int
    dtype: torch.dtype
    is_library: bool = False

    def seconds(self, peaks: Peaks) -> float:
        """Its roofline time, with float32 products at the matmul precision that is set now."""
        return roofline(peaks, self.flops, self.nbytes, self.dtype)


def peaks_named(name: str) -> Peaks:
    """Rates of the first datasheet whose device is part of `name`."""
    return next(peaks for peaks in DATASHEETS if peaks.name in name)


def roofline(peaks: Peaks, flops: float, nbytes: float, dtype: torch.dtype) -> float:
    """Seconds of one kernel."""
    return max(flops / peaks.flops(dtype), nbytes / peaks.bandwidth) + peaks.launch


def scheduled_work(lowering: Any) -> list[Work]:
    """The kernels of a graph whose code was generated (a GraphLowering).

    A product belongs to the library call or template that computes it, or to the first kernel that it was fused into.
    """
    kernels = [node for node in lowering.scheduler.nodes if not _launches_nothing(node)]
    origins = [_origins(node) for node in kernels]
    computes = [node.is_extern() or node.is_template() for node in kernels]
    flops, dtypes = [0] * len(kernels), [torch.float32] * len(kernels)
    left_over: list[Work] = []
    for node in lowering.module.graph.nodes:
        count, dtype = node_flops(node)
        if not count:
            continue
        places = [i for i in range(len(kernels)) if node in origins[i]]
        if not places:
            left_over.append(Work(node.name, 0, count, dtype))
            continue
        place = next((i for i in places if computes[i]), places[0])
        flops[place] += count
        dtypes[place] = dtype
    found = [
        Work(_name(node, made_of), _nbytes(node, lowering), count, dtype, node.is_extern())
        for node, made_of, count, dtype in zip(kernels, origins, flops, dtypes, strict=True)
    ]
    return found + left_over


def node_flops(node: fx.Node) -> tuple[int, torch.dtype]:
    """FLOPs of a node of an FX graph whose values are in its meta, and the type of its operands."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0, torch.float32
    args, kwargs = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), (node.args, node.kwargs))
    return flops_of(node.target, args, kwargs, node.meta.get("val")), product_dtype(args)


def _origins(node: Any) -> set[fx.Node]:
    return {origin for part in node.get_nodes() if part.node is not None for origin in part.node.get_origins()}


def _launches_nothing(node: Any) -> bool:
    """Buffers without a kernel, and the results that a call of several results left behind."""
    return isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput)


def _nbytes(node: Any, lowering: Any) -> int:
    """Inductor's count; for templates and Triton kernels of ours, whose accesses Inductor does not see, each operand once."""
    first = node.get_nodes()[0].node
    if isinstance(first, ir.UserDefinedTritonKernel):
        tensors = [value.get_name() for value in first.kwargs.values() if isinstance(value, ir.IRNode)]
        return sum(_bytes_of(lowering, name) for name in tensors)  # one that is worked on in place is named twice
    parts = node.get_nodes()
    if not node.is_template():
        return int(node.get_read_write_buffers_sizes()) - sum(_bytes_of(lowering, name) for name in _only_ordered_behind(parts))
    inside = {name for part in parts for name in part.get_buffer_names()}
    leaving = {name for name in inside if {user.node for user in lowering.scheduler.name_to_buf[name].users} - {node, *parts}}
    read = {dep.name for part in parts for dep in part.read_writes.reads} - inside - _only_ordered_behind(parts)
    return sum(_bytes_of(lowering, name) for name in read | leaving) - sum(_not_gathered(origin) for origin in _origins(node))


def _only_ordered_behind(parts: Sequence[Any]) -> set[str]:
    """Buffers that a kernel is ordered behind and does not read; Inductor counts them as read."""
    reads = [dep for part in parts for dep in part.read_writes.reads]
    return {dep.name for dep in reads if _orders(dep)} - {dep.name for dep in reads if not _orders(dep)}


def _orders(dep: Any) -> bool:
    return isinstance(dep, WeakDep) and dep.is_fake


def _not_gathered(node: fx.Node) -> int:
    """Bytes of the head's gradient [B, S, V] that a cross term leaves unread: it gathers T elements of each row, a sector each."""
    if str(node.target) != "flashnorm.tied_cross_term.default":
        return 0
    index_bt, g_bsv = (node.args[i].meta["val"] for i in (1, 2))  # type: ignore[union-attr]
    return max(0, g_bsv.nbytes - _SECTOR * index_bt.numel() * g_bsv.shape[1])


def _bytes_of(lowering: Any, name: str) -> int:
    return nbytes_in(lowering)(name) or 0


def _name(node: Any, origins: set[fx.Node]) -> str:
    """Its own name, and the operator that it calls or that its kernel was written for."""
    inner = node.node if node.is_extern() else None
    called = getattr(inner, "python_kernel_name", None) or getattr(inner, "op_overload", None)
    ours = sorted({str(origin.target) for origin in origins if str(origin.target).startswith("flashnorm.")})
    computed = called or (" + ".join(ours) if node.is_template() or node.is_extern() else "")
    return f"{node.get_name()}: {computed}" if computed else node.get_name()
