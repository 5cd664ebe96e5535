"""Writes operators that hide their reduction over the samples out of simpler ones, before the graph is typed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

aten, prims = torch.ops.aten, torch.ops.prims
SUM, MEAN = 0, 1


def canonicalize_pass(graph: fx.Graph) -> None:
    """Replaces embedding-bag gradients by a gather of the bags' gradients and an indexed addition, bilinear forms by matrix
    products, and ``x[mask] = number`` by a choice for each element; rows of an embedding's gradient are widened after padding is
    taken out of them, so that kernels may read the narrow ones."""
    for node in graph.find_nodes(op="call_function", target=aten._embedding_bag_backward.default):
        by_frequency, mode, sparse = node.args[7:10]
        regular = getattr(node.args[2], "target", None) is prims.iota.default
        if regular and mode in (SUM, MEAN) and not by_frequency and not sparse:
            _replace(graph, node, _embedding_bag_backward)
    for node in graph.find_nodes(op="call_function", target=aten._trilinear.default):
        _replace(graph, node, _trilinear)
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        if _is_masked_fill(node):
            _choose_by_mask(graph, node)
    for target in (aten.index_put.default, aten._unsafe_index_put.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if _widened_before_masking(node.args[2]):
                _mask_before_widening(graph, node.args[2])
    graph.lint()


def _is_masked_fill(node: fx.Node) -> bool:
    indices, value = node.args[1:3]
    mask = indices[0]  # type: ignore[index]
    alone = len(indices) == 1 and mask is not None and mask.meta["val"].dtype is torch.bool  # type: ignore[arg-type, union-attr]
    return alone and value.meta["val"].dim() == 0 and not (len(node.args) > 3 and node.args[3])  # type: ignore[union-attr]


def _choose_by_mask(graph: fx.Graph, node: fx.Node) -> None:
    x, (mask,), value = node.args[:3]  # type: ignore[misc]
    with graph.inserting_before(node):
        for _ in range(x.meta["val"].dim() - mask.meta["val"].dim()):  # type: ignore[union-attr]
            wider = graph.call_function(aten.unsqueeze.default, (mask, -1))
            wider.meta = {**node.meta, "val": mask.meta["val"].unsqueeze(-1)}
            mask = wider
        chosen = graph.call_function(aten.where.self, (mask, value, x))
    chosen.meta = {**node.meta}
    node.replace_all_uses_with(chosen)
    graph.erase_node(node)


def _widened_before_masking(values: Any) -> bool:
    """``where(mask, 0, wide(x))``, as the gradient of an embedding is written by torch 2.11."""
    if values.target is not aten.where.self:
        return False
    zero, wide = values.args[1:]
    if zero.target is not aten.scalar_tensor.default or zero.args[0] != 0 or wide.target is not prims.convert_element_type.default:
        return False
    old, new, whole = (value.meta["val"].dtype for value in (wide.args[0], wide, values))
    return bool(old.is_floating_point and new.is_floating_point and old.itemsize < new.itemsize and whole == new)


def _mask_before_widening(graph: fx.Graph, values: fx.Node) -> None:
    """``wide(where(mask, 0, x))``: the same values."""
    mask, zero, wide = values.args
    x, dtype = wide.args[0], values.meta["val"].dtype  # type: ignore[union-attr]
    narrow: torch.dtype = x.meta["val"].dtype  # type: ignore[union-attr]
    with graph.inserting_before(values):
        small = graph.call_function(zero.target, zero.args, {**zero.kwargs, "dtype": narrow})  # type: ignore[union-attr]
        masked = graph.call_function(aten.where.self, (mask, small, x))
        widened = graph.call_function(prims.convert_element_type.default, (masked, dtype))
    small.meta = {**zero.meta, "val": zero.meta["val"].to(narrow)}  # type: ignore[union-attr]
    masked.meta = {**values.meta, "val": values.meta["val"].to(narrow)}
    widened.meta = {**values.meta}
    values.replace_all_uses_with(widened)
    graph.erase_node(values)


def _embedding_bag_backward(
    grad: Tensor,
    ids: Tensor,
    offsets: Tensor,
    bag_of: Tensor,
    bag_size: Tensor,
    largest: Tensor,
    rows: int,
    by_frequency: bool,
    mode: int,
    sparse: bool,
    weights: Tensor | None,
    padding: int = -1,
) -> Tensor:
    """Bags of equal size T, as 2-D ids give: grad [bags, d], ids [bags * T] -> [rows, d]."""
    bags = grad.shape[0]
    bag_of = torch.arange(bags, device=ids.device).unsqueeze(1).expand(bags, ids.shape[0] // bags).reshape(-1)
    values = grad[bag_of]
    if mode == MEAN:
        counted = (ids != padding).view(bags, -1).sum(1) if padding >= 0 else torch.full_like(grad[:, 0], ids.shape[0] // bags)
        values = values / counted.clamp(min=1)[bag_of].unsqueeze(1)
    if weights is not None:
        values = values * weights.unsqueeze(1)
    if padding >= 0:
        values = torch.where((ids != padding).unsqueeze(1), values, 0)
    return values.new_zeros(rows, grad.shape[1]).index_put((ids,), values, accumulate=True)


def _trilinear(
    one: Tensor,
    two: Tensor,
    three: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    summed: list[int],
    _: int = 1,
) -> Tensor:
    """The product of three tensors over named dimensions: each lacks those it is expanded along; ``summed`` ones vanish."""
    rank = one.dim() + len(expand1)
    letters = "abcdefghijklmnopqrstuvwxyz"[:rank]
    names = ["".join(c for d, c in enumerate(letters) if d not in expand) for expand in (expand1, expand2, expand3)]
    out = "".join(c for d, c in enumerate(letters) if d not in summed)
    return torch.einsum(f"{','.join(names)}->{out}", one, two, three)


def _replace(graph: fx.Graph, node: fx.Node, function: Any) -> None:
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]

    def of_tensors(*values: Any) -> Any:
        given = iter(values)
        return function(*[next(given) if isinstance(arg, fx.Node) else arg for arg in node.args])

    examples = [arg.meta["val"] for arg in tensors]
    with examples[0].fake_mode, enable_python_dispatcher():
        traced = make_fx(of_tensors, select_decomp_table(), tracing_mode="real", _allow_non_fake_inputs=True)(*examples)
    env: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), tensors, strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            env[inner] = graph.node_copy(inner, env.__getitem__)
            env[inner].meta = {**node.meta, "val": inner.meta["val"]}
    node.replace_all_uses_with(env[traced.graph.output_node().args[0]])  # type: ignore[index]
    graph.erase_node(node)
