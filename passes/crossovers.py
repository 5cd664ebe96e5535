"""With dynamic sizes a plan holds on its side of a crossover only: where another choice would be the better one, a guard ends it.

What decides is written as expressions of the sizes whose signs must stay as they were for the sizes that were traced:

- for each parameter, the time of each way less that of the fastest one (parameters of one shape share these);
- the bytes by which the choice exceeds its budget, and those of the fastest choice where that was too large, each at the moment
  at which memory is shortest.

An expression in one size becomes two bounds on it, and none where it has no other sign within the range that the size may have;
one in several sizes is guarded as it is. PyTorch's shape environment keeps the guards, and so do its caches. A size without a value
while tracing (unbacked) cannot be guarded on, and a graph with a size whose whole range was promised to one graph must not be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence, Set
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import Max, Min

from . import _compat
from .choose import Decision
from .costs import Cost
from .memory import Timeline
from .peaks import Peaks
from .sample_types import Expr, expression
from .saved import Saved
from .ways import Way

# Times are compared in this unit, in whole numbers.
_FEMTOSECONDS = 1e15


def time_differences(ways: Sequence[Way], peaks: Peaks, fastest: Way) -> list[Expr]:
    """What each other way takes longer than the fastest one, in femtoseconds."""
    shortest = _femtoseconds(fastest.cost, peaks)
    return [_femtoseconds(way.cost, peaks) - shortest for way in ways if way is not fastest]


def _femtoseconds(cost: Cost, peaks: Peaks) -> Expr:
    """``Cost.seconds`` with whole coefficients."""

    def one(kernel: Any) -> Expr:
        flops = round(_FEMTOSECONDS / kernel.rate(peaks)) * kernel.flops
        traffic = round(_FEMTOSECONDS / peaks.bandwidth) * kernel.traffic
        return sympy.Max(flops, traffic) + round(_FEMTOSECONDS * peaks.launch) * kernel.launches

    return sympy.Add(*map(one, cost.kernels), *(-one(kernel) for kernel in cost.replaced))


def excess_bytes(
    graph: fx.Graph,
    chosen: Sequence[Way],
    moments: Sequence[int],
    decision: Decision,
    line: Timeline,
    budget: float | int,
    leaving: Set[str],
    made_again: Sequence[Saved] = (),
) -> Expr:
    """The bytes by which a decision exceeds its budget at its tightest moment; negative where it fits.

    ``budget``: as the option has it. ``leaving``: names of the gradients, which the budget counts and the room does not.
    ``made_again``: saved values that give their memory back until the backward needs them.
    """
    nodes = {node.name: node for node in graph.nodes}
    t = decision.moment

    def size(names: Iterable[str]) -> Expr:
        return sympy.Add(*(_bytes(nodes[name]) for name in names if name in nodes))

    def alive(at: int) -> list[str]:
        return [name for name, end in line.died.items() if line.order.get(name, 0) <= at <= end]

    held = sympy.Add(*(way.cost.held for way, moment in zip(chosen, moments, strict=True) if moment <= t))
    kept = size(value.name for value in decision.kept if value.moment <= t)
    given_back = [value for value in made_again if value.needed > t]
    taken = held + kept + size(name for name in alive(t) if name not in leaving)
    taken += sympy.Add(*(sympy.Add(*map(_bytes, value.instead)) - _bytes(value.node) for value in given_back))
    if isinstance(budget, int):
        return taken - budget
    share = sympy.Rational(str(budget)).limit_denominator(1000)
    peak = max(range(len(line.alive)), key=lambda at: sum(line.bytes_of[name] for name in alive(at)))
    return share.q * taken - share.p * size(alive(peak))


def _bytes(node: fx.Node) -> Expr:
    tensors = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    return sympy.Add(*(v.dtype.itemsize * sympy.Mul(*(expression(s) for s in v.shape)) for v in tensors[:1]))


def guard_signs(expressions: Iterable[Expr], graph: fx.Graph) -> None:
    """Makes the shape environment guard that each expression keeps the sign that it has for the traced sizes."""
    shape_env = _shape_env(graph)
    if shape_env is None or _compat.has_promised_ranges():
        return
    for expr in dict.fromkeys(map(sympy.expand, expressions)):
        expr = shape_env.simplify(expr)
        if not expr.free_symbols or free_unbacked_symbols(expr):
            continue
        if len(expr.free_symbols) == 1:
            _guard_range(expr, shape_env)
        else:
            in_torch = expr.replace(sympy.Max, Max).replace(sympy.Min, Min)
            shape_env.evaluate_expr(sympy.Le(in_torch, 0))


def _guard_range(expr: Expr, shape_env: Any) -> None:
    (symbol,) = expr.free_symbols
    bounds = shape_env.bound_sympy(symbol)
    now = _compat.traced_size(shape_env, symbol)
    below = now >= 0 and bool(expr.subs(symbol, now) <= 0)

    def differs(size: int) -> bool:
        return bool(expr.subs(symbol, size) <= 0) != below

    above = _first(differs, now, min(int(min(bounds.upper, sys.maxsize)), now << 20), up=True)
    under = _first(differs, now, max(int(bounds.lower), 1), up=False)
    if above is not None:
        shape_env.evaluate_expr(sympy.Lt(symbol, above))
    if under is not None:
        shape_env.evaluate_expr(sympy.Gt(symbol, under))


def _first(differs: Any, now: int, limit: int, up: bool) -> int | None:
    """The size nearest to ``now`` that differs, in steps of a quarter first, then exactly; None if none does up to ``limit``."""
    same, size = now, now
    while size != limit:
        size = min(size + size // 4 + 1, limit) if up else max(size - size // 5 - 1, limit)
        if differs(size):
            break
        same = size
    else:
        return None
    while abs(size - same) > 1:
        middle = (size + same) // 2
        size, same = (middle, same) if differs(middle) else (size, middle)
    return size


def is_dynamic(graph: fx.Graph) -> bool:
    """Whether a graph has symbolic sizes."""
    return _shape_env(graph) is not None


def _shape_env(graph: fx.Graph) -> Any:
    """The shape environment of a graph with symbolic sizes, or None."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in [value] if isinstance(value, torch.SymInt) else value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None
