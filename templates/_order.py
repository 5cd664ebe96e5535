"""The order of kernels in Inductor's code, where it decides how much memory a backward holds.

Per-sample gradients of a layer take the place of their operands, which nobody else may need: made late, they hold the operands of
every layer. Inductor orders kernels by an estimate of the peak in which no kernel works in place, so that the peak may seem to lie
elsewhere and all orders to be equally good. A kernel that was lowered under ``before_later_layers`` runs before the first kernel
that leads from its operands to those of the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch._inductor import ir
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree

from ._compat import run_after


@dataclass(frozen=True)
class _Waiting:
    """A kernel before which later layers must not run: its buffer's name, and those of its operands that this graph makes."""

    made: str
    operands: frozenset[str]
    position: int
    """Of the oldest operand among the graph's operations."""


_waiting: weakref.WeakKeyDictionary[Any, list[_Waiting]] = weakref.WeakKeyDictionary()


def before_later_layers(operands: Sequence[Any], lower: Callable[[], Any]) -> Any:
    """What ``lower`` gives for realized operands; its kernel runs before those of layers that are lowered after it."""
    waiting = _waiting.setdefault(V.graph, [])
    own = [op for op in (_maker(operand.get_name()) for operand in operands) if op is not None]
    for maker in own:
        held = [one for one in waiting if _position(maker) > _position(_maker(one.made))]
        for one in _above(maker, held):
            run_after(maker, one.made)
            waiting.remove(one)
    result = lower()
    if own:
        names = frozenset(name for op in own for name in (buffer.get_name() for buffer in op.get_outputs()))
        waiting.append(_Waiting(result.get_name(), names, min(map(_position, own))))
    return result


def _above(maker: Any, waiting: list[_Waiting]) -> list[_Waiting]:
    """Those whose operands ``maker`` was computed from."""
    if not waiting:
        return []
    oldest = min(one.position for one in waiting)
    read = {name for op in _ancestors(maker, oldest) for name in _reads(op)}
    return [one for one in waiting if one.operands & read]


def _ancestors(maker: Any, oldest: int) -> Iterator[Any]:
    """``maker`` and what it was computed from, back to an operation's position."""
    seen, todo = {maker.get_operation_name()}, [maker]
    while todo:
        op = todo.pop()
        yield op
        for above in (_maker(name) for name in _reads(op)):
            if above is not None and above.get_operation_name() not in seen and _position(above) >= oldest:
                seen.add(above.get_operation_name())
                todo.append(above)


def _reads(op: Any) -> list[str]:
    """Names of the buffers that an operation reads: a call's are its inputs."""
    inputs = getattr(op, "inputs", None)
    return list(op.get_read_names()) if inputs is None else [one.get_name() for one in pytree.tree_leaves(inputs)]


def _maker(name: str) -> Any:
    """The operation that makes a buffer, for results of a call that call; None for an input of the graph."""
    buffer = V.graph.name_to_buffer.get(name)
    op: Any = None if buffer is None else buffer.get_defining_op()
    while isinstance(op, ir.MultiOutput):
        op = _maker(_reads(op)[0])
    return op


def _position(op: Any) -> int:
    return int(op.get_operation_name().rsplit("op", 1)[1])
