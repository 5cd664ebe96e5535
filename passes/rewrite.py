"""Writes the private gradients into the joint graph: norms, clip factors from the run-time state, clipped sums, noise.

The whole computation is a plain PyTorch function of values that the graph already holds; it is traced once and its nodes are
appended to the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd import descriptors as aot
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..templates import convolution, flash_norm, noise, release  # noqa: F401  (registers the operators)
from .factored import Factor, is_convolution
from .factors import Outer, Rows, convolution_factors, squared_norms, squared_products, wide
from .graph_spec import GraphSpec, Role
from .match import gradient_outputs, write_operands
from .plan import ParameterPlan
from .replay import Sizes, Values, clipped_use, run_tail, samples_first, tail_per_sample
from .rules import Context
from .sample_types import expression
from .type_samples import placeholder_specs

aten = torch.ops.aten


def rewrite_gradients(graph: fx.Graph, spec: GraphSpec, ctx: Context, plans: list[ParameterPlan]) -> None:
    """Replaces every trainable parameter's gradient output by the clipped and noised one, in place."""
    private = [plan for plan in plans if plan.gradient.private]
    if not private:
        return
    inputs = _inputs_of(graph, spec, private)
    batch_node, dim = next((n, g.dim) for n, g in placeholder_specs(graph, spec) if g.role is Role.PRIVATE)
    writer = _Writer(spec, private, inputs, batch_node, dim)
    released = _inline(graph, writer.trace(), inputs)
    output = graph.output_node()
    outputs = list(output.args[0])  # type: ignore[arg-type]
    for plan, node in zip(private, released, strict=True):
        outputs[plan.gradient.output] = node
    output.args = (type(output.args[0])(outputs) if isinstance(output.args[0], tuple) else outputs,)
    graph.eliminate_dead_code()
    _drop_unused_outputs(graph)
    graph.lint()
    _check_released(graph, spec, plans)


def _drop_unused_outputs(graph: fx.Graph) -> None:
    """Convolutions compute the summed weight gradient only where somebody still reads it."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        read = {user.args[1] for user in node.users}
        node.update_arg(10, [bool(wanted) and i in read for i, wanted in enumerate(node.args[10])])


def _check_released(graph: fx.Graph, spec: GraphSpec, plans: list[ParameterPlan]) -> None:
    """Looks once more at what leaves the graph: noise comes last on every private gradient."""
    open_ = {plan.name for plan in plans if not plan.gradient.private}
    for _, name, node in gradient_outputs(graph, spec):
        if node is not None and node.target is aten.view_as_complex.default:
            node = node.args[0]  # type: ignore[assignment]
        if name not in open_ and (node is None or node.target is not torch.ops.flashnorm.add_noise.default):
            raise AssertionError(f"the gradient of {name!r} would leave the graph without noise")


def _inputs_of(graph: fx.Graph, spec: GraphSpec, plans: list[ParameterPlan]) -> list[fx.Node]:
    """The nodes whose values the private computation reads, in graph order."""
    needed: set[fx.Node] = set()
    for plan in plans:
        gradient = plan.gradient
        inside = {use.node for use in gradient.uses} | set(gradient.tail)
        for node in [*(use.operation for use in gradient.uses), *gradient.tail]:
            needed.update(arg for arg in node.all_input_nodes if arg not in inside)
        if not gradient.uses:
            needed.add(gradient.node)  # type: ignore[arg-type]
    for node, given in placeholder_specs(graph, spec):
        if given.role in (Role.HANDLE, Role.PRIVATE):
            needed.add(node)
    needed.add(next(n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("desc"), aot.TangentAOTInput)))
    return [node for node in graph.nodes if node in needed]


class _Writer:
    """Builds the private gradients from values of existing nodes."""

    def __init__(self, spec: GraphSpec, plans: list[ParameterPlan], inputs: list[fx.Node], batch_node: fx.Node, dim: int) -> None:
        self.spec, self.plans, self.inputs = spec, plans, inputs
        self.batch_node, self.dim = batch_node, dim

    def trace(self) -> fx.GraphModule:
        values = [node.meta["val"] for node in self.inputs]
        mode = next(v.fake_mode for v in values if isinstance(v, torch.Tensor) and hasattr(v, "fake_mode"))
        with mode, enable_python_dispatcher(), torch.no_grad():
            traced = make_fx(self.build, select_decomp_table(), tracing_mode="real", _allow_non_fake_inputs=True)(*values)
            _own_destinations(traced.graph)
        return traced

    def build(self, *given: Any) -> list[Tensor]:
        values: Values = dict(zip(self.inputs, given, strict=True))
        sizes = Sizes(values[self.batch_node].shape[self.dim], given)
        per_sample = [self._materialized(plan, values, sizes) for plan in self.plans]
        norms = [self._norms(plan, dense, values, sizes) for plan, dense in zip(self.plans, per_sample, strict=True)]
        rows = {plan.gradient.row: norm for plan, norm in zip(self.plans, norms, strict=True)}
        zero = torch.zeros_like(norms[0])
        norms_sq = torch.stack([rows.get(row, zero) for row in range(len(self.spec.parameters))], 1)
        handle, after = self._state(values)
        factors, keys, std = torch.ops.flashnorm.release(handle, norms_sq, after)
        return [
            self._released(plan, dense, values, factors[plan.gradient.row], keys, std, sizes)
            for plan, dense in zip(self.plans, per_sample, strict=True)
        ]

    def _state(self, values: Values) -> tuple[Tensor, Tensor]:
        position = next(i for i, given in enumerate(self.spec.inputs) if given.role is Role.HANDLE)
        handle = after = None
        for node, value in values.items():
            desc = node.meta.get("desc")
            if isinstance(desc, aot.PlainAOTInput) and desc.idx == position:
                handle = value
            if after is None and isinstance(desc, aot.TangentAOTInput):
                after = value
        assert handle is not None
        assert after is not None
        return handle, after

    def _materialized(self, plan: ParameterPlan, values: Values, sizes: Sizes) -> Tensor | None:
        """[B, *parameter], or ``None`` where norms come from factors."""
        gradient = plan.gradient
        if plan.chosen == "single":
            return values[gradient.node].unsqueeze(0)  # type: ignore[index]
        if plan.chosen == "constant":
            value = wide_or_complex(values[gradient.node])  # type: ignore[index]
            return (value / sizes.batch).unsqueeze(0).expand(sizes.batch, *value.shape)
        if plan.chosen == "empty":
            node = gradient.node.meta["val"]  # type: ignore[union-attr]
            return torch.zeros((0, *node.shape), dtype=node.dtype, device=node.device)
        if plan.chosen in ("ghost", "flash"):
            return None
        return tail_per_sample(gradient.tail, gradient.uses, values, sizes, gradient.node)  # type: ignore[arg-type]

    def _norms(self, plan: ParameterPlan, dense: Tensor | None, values: Values, sizes: Sizes) -> Tensor:
        """float32 [B]."""
        if plan.chosen == "ghost":
            return squared_norms([_factor_values(factor, values, sizes) for factor in plan.factors]).float()
        if plan.chosen == "flash":
            return squared_products([_factor_values(factor, values, sizes) for factor in plan.factors])  # type: ignore[misc]
        assert dense is not None
        squares = wide(_real(dense)).square()
        return (squares.sum(list(range(1, squares.dim()))) if squares.dim() > 1 else squares).float()

    def _released(
        self,
        plan: ParameterPlan,
        dense: Tensor | None,
        values: Values,
        factors: Tensor,
        keys: Tensor,
        std: Tensor,
        sizes: Sizes,
    ) -> Tensor:
        gradient = plan.gradient
        assert gradient.node is not None
        original = gradient.node.meta["val"]
        if dense is not None:
            total = _weighted_sum(dense, factors)
        else:
            parts = [clipped_use(use, values, factors, sizes) for use in gradient.uses]
            total = run_tail(gradient.tail, gradient.uses, parts, values, gradient.node, factors.sum() / sizes.batch, narrow=False)
        total = _real(total.reshape([sizes(expression(size)) for size in original.shape]))
        dtype = _real_dtype(original.dtype)
        cast = () if total.dtype == dtype else (dtype,)
        noised = torch.ops.flashnorm.add_noise(total, keys, std, gradient.row, *cast)
        return torch.view_as_complex(noised) if original.is_complex() else noised


def _own_destinations(graph: fx.Graph) -> None:
    """Gives every write a destination of its own memory: Inductor may write in place, and vmap expands with stride 0."""
    for node in list(graph.nodes):
        if node.op == "call_function" and (
            "put" in str(node.target) or "scatter" in str(node.target) or "index_add" in str(node.target)
        ):
            base = node.args[0]
            if isinstance(base, fx.Node) and base.target is aten.expand.default:
                with graph.inserting_before(node):
                    copy = graph.call_function(aten.clone.default, (base,), {"memory_format": torch.contiguous_format})
                copy.meta["val"] = aten.clone.default(base.meta["val"], memory_format=torch.contiguous_format)
                node.replace_input_with(base, copy)


def _known(size: Any, value: int) -> bool:
    return isinstance(size, int) and size == value


def wide_or_complex(x: Tensor) -> Tensor:
    return x if x.is_complex() else wide(x)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def _weighted_sum(dense: Tensor, factors: Tensor) -> Tensor:
    """``sum_b c_b W_b`` in float32 or better; a sample with factor 0 adds exactly 0, whatever it holds."""
    w = wide(_real(dense))
    c = factors.to(w.dtype).view(-1, *[1] * (w.dim() - 1))
    weighted = torch.where(c != 0, w * c, 0)
    total = weighted[0] if _known(dense.shape[0], 1) else weighted.sum(0)
    return torch.view_as_complex(total) if dense.is_complex() else total


def _factor_values(factor: Factor, values: Values, sizes: Sizes) -> Outer | Rows:
    use = factor.use
    if factor.kind == "rows":
        return _row_values(factor, values, sizes)
    if is_convolution(factor):
        grad, source, weight = use.operation.args[:3]
        settings = [use.operation.args[i] for i in (4, 5, 6, 7)]
        grads, sources = (samples_first(values[leaf], use.axes[i], sizes) for i, leaf in enumerate((grad, source)))
        return convolution_factors(grads, sources, values[weight].shape[2:], settings)
    left, right = (samples_first(values[use.leaves[i]], use.axes[i], sizes) for i in (0, 1))
    # left [B, m, T] and right [B, T, n]: the gradient is left @ right, or its transpose
    g, a = left.mT, right
    return Outer(a, g) if factor.swapped else Outer(g, a)


def _row_values(factor: Factor, values: Values, sizes: Sizes) -> Rows:
    use = factor.use
    _, indices, grads, mask = write_operands_of(use.operation)
    position = {id(leaf): i for i, leaf in enumerate(use.leaves) if isinstance(leaf, fx.Node)}

    def own(node: fx.Node) -> Tensor:
        value = values[node]
        axis = use.axes.get(position[id(node)])
        return value.unsqueeze(0).expand(sizes.batch, *value.shape) if axis is None else samples_first(value, axis, sizes)

    count = sizes(expression(use.operation.meta["val"].shape[0]))
    ids, g = own(indices[0]), own(grads)
    ids = torch.where(ids < 0, ids + count, ids)  # weight[-1] is the last row, and the norm has to add both names of it
    shape = torch.broadcast_shapes(ids.shape, g.shape[:-1])
    ids, g = ids.expand(shape), g.expand(*shape, g.shape[-1])
    if mask is not None:
        keep = own(mask).expand(*shape, 1) if values[mask].dim() == values[grads].dim() else own(mask).expand(shape).unsqueeze(-1)
        g = torch.where(keep, g, 0)
        ids = torch.where(keep.squeeze(-1), ids, 0)
    return Rows(ids.flatten(1), g.flatten(1, -2))


def write_operands_of(node: fx.Node) -> Any:
    return write_operands(Context(None, {}), node)  # type: ignore[arg-type]


def _inline(graph: fx.Graph, traced: fx.GraphModule, inputs: list[fx.Node]) -> list[fx.Node]:
    """Copies the traced nodes in front of the output; returns the copies of its results."""
    env: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    owner = graph.owning_module
    with graph.inserting_before(graph.output_node()):
        for node in traced.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                name = f"_flashnorm_{node.target}"
                setattr(owner, name, getattr(traced, node.target))
                copy = graph.get_attr(name)
            else:
                copy = graph.node_copy(node, env.__getitem__)
            copy.meta = {"val": node.meta.get("val"), "partitioner_tag": "is_backward"}
            if "tensor_meta" in node.meta:
                copy.meta["tensor_meta"] = node.meta["tensor_meta"]
            env[node] = copy
    results = pytree.tree_leaves(traced.graph.output_node().args[0])
    return [env[result] for result in results]
