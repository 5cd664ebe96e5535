"""The table of rules: one function per operator or family, from the types of the operands to the type of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ..sample_types import (
    PUBLIC,
    Axis,
    Expr,
    Mixed,
    PerSample,
    Public,
    SampleSum,
    SampleType,
    Scale,
    expression,
    locate,
    product,
    quotient,
    stride_of,
)

Result = SampleType | tuple[SampleType, ...]
Rule = Callable[["Context", fx.Node], Result]
RULES: dict[Any, Rule] = {}
# What users registered, for the compile caches: a graph accepted under one rule must not be found under another.
USER_RULES: list[str] = []


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers a rule for operators (all overloads of a packet). A second rule for one operator is an error."""

    def register(function: Rule) -> Rule:
        for target in targets:
            overloads = (
                [getattr(target, name) for name in target.overloads()]
                if isinstance(target, torch._ops.OpOverloadPacket)
                else [target]
            )
            for overload in overloads:
                if overload in RULES:
                    raise ValueError(f"{overload} already has a rule ({RULES[overload].__name__})")
                RULES[overload] = function
        return function

    return register


def present(namespace: Any, *names: str) -> list[Any]:
    """Those of the operators that this version of torch has."""
    return [getattr(namespace, name) for name in names if hasattr(namespace, name)]


class Context:
    """What a rule may ask: the types, shapes and values of a node's arguments."""

    def __init__(
        self,
        batch: Expr,
        types: dict[fx.Node, Result],
        data_groups: frozenset[str] = frozenset(),
        model_group: str | None = None,
    ) -> None:
        self.batch = batch
        self.types = types
        self.data_groups = data_groups
        self.model_group = model_group
        self._keys: dict[Any, int] = {}
        self._node_keys: dict[fx.Node, int] = {}
        self.scalars: dict[str, fx.Node] = {}

    def type(self, arg: Any) -> SampleType:
        """The type of an argument; literals are public."""
        if isinstance(arg, fx.Node):
            found = self.types[arg]
            if isinstance(found, tuple):
                return next((t for t in found if isinstance(t, Mixed)), found[0] if found else PUBLIC)
            return found
        return PUBLIC

    def shape(self, arg: Any) -> tuple[Expr, ...]:
        """Sizes as expressions; a Python number has none."""
        value = arg.meta.get("val") if isinstance(arg, fx.Node) else arg
        return tuple(expression(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()

    def is_tensor(self, arg: Any) -> bool:
        return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), (torch.Tensor, FakeTensor))

    def dim(self, dim: int, arg: Any, extra: int = 0) -> int:
        """A dimension counted from the front."""
        return dim if dim >= 0 else dim + len(self.shape(arg)) + extra

    def mixed(self, node: fx.Node, why: str) -> Mixed:
        return Mixed(node, why)

    def scale_mixed(self, node: fx.Node, scales: Sequence[Scale], why: str) -> Mixed:
        """The refusal of a batch-dependent factor, pointing at the number itself where it is in the graph."""
        keys = [key for scale in scales for key, _ in scale if key in self.scalars]
        if not keys:
            return Mixed(node, why)
        scalar = self.scalars[keys[0]]
        type_ = self.type(scalar)
        return type_ if isinstance(type_, Mixed) else Mixed(scalar, why)

    def first_mixed(self, args: Sequence[Any]) -> Mixed | None:
        for arg in args:
            found = self.type(arg)
            if isinstance(found, Mixed):
                return found
        return None

    def view(self, type_: SampleType, node: fx.Node, old: Sequence[Expr], new: Sequence[Expr]) -> SampleType:
        """The type after the elements, in row-major order, are given another shape."""
        if isinstance(type_, Public) and type_.iota is not None:
            moved = self.move(type_.iota, old, new)
            return Public(type_.zero, moved, type_.scale)
        if not isinstance(type_, PerSample):
            return type_
        axis = self.move(type_.axis, old, new)
        if axis is None:
            return self.mixed(node, f"a view from {_sizes(old)} to {_sizes(new)} puts elements of different samples into one row")
        return PerSample(axis, type_.scale)

    def move(self, axis: Axis, old: Sequence[Expr], new: Sequence[Expr]) -> Axis | None:
        if any(size == 0 for size in old):
            return None
        return locate(stride_of(axis, old), self.batch, new)

    def same_layout(self, one: Any, first: Axis, other: Any, second: Axis) -> bool:
        """Whether two dimensions that the operator requires to be of one size hold the samples in the same order.

        Equal inner sizes or equal outer sizes prove it: what is left of the common size is the other one.
        """
        if first.inner == second.inner:
            return True
        outers = [quotient(self.shape(arg)[axis.dim], self.batch * axis.inner) for arg, axis in ((one, first), (other, second))]
        return outers[0] == outers[1]

    # Batch-dependent scalars -----------------------------------------------------------------------------------------

    def batch_scalar(self, arg: Any) -> Scale | None:
        """``((key, 1),)`` if the argument is one batch-dependent number, perhaps broadcast or cast to another float type."""
        node = arg
        while isinstance(node, fx.Node) and node.op == "call_function":
            if self._is_single(node) and not _passes_value(node):
                break
            if not _passes_value(node):
                return None
            node = node.args[0]
        if not isinstance(node, fx.Node) or not self._is_single(node):
            return None
        if not isinstance(self.type(node), (SampleSum, Mixed)):
            return None
        if self.batch == 1 and node.op != "placeholder" and self.counted_per_sample(node) is None:
            return None  # a number of the one sample's own; only counts of a batch would be replaced in a larger one
        key = f"{node.name}" if node.op == "placeholder" else f"value{self._value_number(node)}"
        self.scalars.setdefault(key, node)
        return ((key, 1),)

    def counted_per_sample(self, scalar: fx.Node) -> Expr | None:
        """How many elements of one sample a count can reach: the size of what is summed, over the batch size."""
        sums = (torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList)
        node: Any = scalar
        while isinstance(node, fx.Node) and node.op == "call_function":
            source: Any = node.args[0] if node.args else None
            if node.target in sums and isinstance(self.type(source), PerSample):
                counts = not source.meta["val"].is_floating_point()
                return quotient(product(self.shape(source)), self.batch) if counts else None
            if not isinstance(self.type(node), (SampleSum, Mixed)):
                return None
            node = source
        return None

    def _is_single(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, int, float)):
            return True
        return isinstance(value, torch.Tensor) and all(size == 1 for size in self.shape(node))

    def _value_number(self, node: fx.Node) -> int:
        """Equal for nodes that compute the same value by the same operators from the same inputs."""
        if node not in self._node_keys:
            if node.op == "call_function" and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
                leaves = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{self._value_number(n)}")
                key: Any = (node.target, repr(leaves))
            else:
                key = node
            self._node_keys[node] = self._keys.setdefault(key, len(self._keys))
        return self._node_keys[node]


_VALUE_PASSING = {
    torch.ops.aten.expand.default,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.permute.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten._to_copy.default,
    torch.ops.prims.device_put.default,
}


def _passes_value(node: fx.Node) -> bool:
    if node.target in (torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default):
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return node.target in _VALUE_PASSING


def _sizes(shape: Sequence[Expr]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def is_one(expr: Expr) -> bool:
    return expr == sympy.S.One


def register_rule(target: Any, treatment: str | Rule) -> None:
    """Says how an operator of one's own treats samples, so that models which use it are not refused.

    Args:
        target: an operator overload, such as ``torch.ops.mylib.myop.default`` (register its backward operator as well).
        treatment: ``"pointwise"``: elementwise with broadcasting; ``"batched"``: works on each index of dimension 0 of every
            tensor operand independently; or a rule: a function of ``(Context, node)`` that returns the result's type.

    The claim is taken as given: a wrong one breaks the privacy guarantee.

    Raises:
        ValueError: the operator already has a rule, or the treatment is not known.
    """
    from .blocks import independent
    from .pointwise import elementwise

    if callable(treatment):
        rule(target)(treatment)
        USER_RULES.append(f"{target} {treatment.__module__}.{treatment.__qualname__} {treatment.__code__.co_code.hex()}")
        return
    if treatment == "pointwise":
        rule(target)(elementwise)
    elif treatment == "batched":
        rule(target)(lambda ctx, node: independent(ctx, node, list(node.args), leading=1))
    else:
        raise ValueError(f'treatment must be "pointwise", "batched" or a function; got {treatment!r}')
    USER_RULES.append(f"{target} {treatment}")
