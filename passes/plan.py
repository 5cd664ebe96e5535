"""Chooses, for every parameter, how its per-sample norms and its clipped sum are computed: the least time within a memory budget.

One decision over all parameters at once. Times are rooflines over the device's peaks; memory follows the backward pass, so that
what activations give back may be used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import sympy
import torch
from torch import fx

from . import choose, fused_costs, kernels
from .baseline import step_seconds
from .costs import Cost, release
from .crossovers import excess_bytes, guard_signs, is_dynamic, time_differences
from .errors import OptionsError
from .factored import Factor, use_kind
from .graph_spec import GraphSpec
from .match import ParameterGradient
from .memory import Timeline, owner_of, timeline
from .peaks import Peaks, peaks_of
from .rules import Context
from .sample_types import Expr
from .saved import Saved, saved_values
from .second_backward import SecondBackward, after_tangents, recipes, second_backward, value_of
from .ways import Way, ways_of

Chosen = Literal["materialize", "ghost", "flash", "recompute", "single", "empty", "constant", "unused"]


@dataclass(frozen=True)
class Alternative:
    """A way that was considered: predicted seconds that it adds to the step, and bytes of its own that it holds."""

    algorithm: str
    seconds: float
    held: float


@dataclass(frozen=True)
class ParameterPlan:
    """``cost``: what privacy adds for this parameter. ``seconds``: the prediction for it. ``norms``: what computes the norms.

    ``again``: operands of the clipped sum that a second backward computes. ``cost`` leaves that out, as parameters share it.
    """

    gradient: ParameterGradient
    chosen: Chosen
    why: str
    kind: str
    factors: tuple[Factor, ...] = field(default=(), repr=False)
    cost: Cost = field(default=Cost(), repr=False)
    seconds: float = 0.0
    considered: tuple[Alternative, ...] = field(default=(), repr=False)
    norms: str = ""
    again: tuple[fx.Node, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return self.gradient.name


@dataclass(frozen=True)
class Plan:
    """The decision for a graph. ``peak``, ``step``: predicted bytes and seconds of the non-private step; ``budget``: bytes that
    the private one may take, ``over``: bytes by which the best choice still exceeds it, ``private_peak``: what it is predicted to
    take. Zero where nothing had to be decided. ``second``: what runs a second time, and ``second_seconds`` what that takes.
    ``made_again``: saved values that the backward computes again, so that it fits."""

    parameters: tuple[ParameterPlan, ...]
    peaks: Peaks | None = None
    step: float = 0.0
    peak: float = 0.0
    budget: float = 0.0
    over: float = 0.0
    private_peak: float = 0.0
    second: SecondBackward = field(default_factory=SecondBackward)
    second_seconds: float = 0.0
    made_again: tuple[Saved, ...] = ()
    traffic: float = 0.0
    """Bytes to and from memory that the private step adds."""

    @property
    def ratio(self) -> float | None:
        """Predicted time of the private step over the non-private one."""
        added = sum(plan.seconds for plan in self.parameters) + self.second_seconds
        added += sum(value.seconds for value in self.made_again)
        return 1 + added / self.step if self.step else None


def plan_gradients(graph: fx.Graph, gradients: list[ParameterGradient], spec: GraphSpec, ctx: Context) -> Plan:
    """One plan for each gradient.

    Raises:
        OptionsError: ``norm_algorithm`` names an algorithm that does not fit a parameter.
    """
    fixed = {g.name: plan for g in gradients if (plan := _without_choice(g, ctx)) is not None}
    free = [g for g in gradients if g.name not in fixed]
    if not free:
        return _without_decision(graph, gradients, tuple(fixed[g.name] for g in gradients), spec)
    number = _Numbers(graph)
    peaks = peaks_of(_device(free[0]))
    backward = after_tangents(graph)
    ways = {g.name: _fastest_of_each(_allowed(g, ways_of(g, ctx, backward), spec), peaks, number) for g in free}
    found = _decide(graph, gradients, free, ways, spec, peaks, number)
    decided, line, budget = found.decision, found.line, found.budget
    _guard_crossovers(graph, gradients, [ways[g.name] for g in free], found, spec, peaks, number)
    plans = dict(fixed)
    for gradient, j in zip(free, decided.chosen, strict=True):
        own = ways[gradient.name]
        seconds = [way.cost.seconds(peaks, number) for way in own]
        considered = tuple(Alternative(way.algorithm, s, number(way.cost.held)) for way, s in zip(own, seconds, strict=True))
        why = _why(gradient, own, j, seconds, decided, spec)
        plans[gradient.name] = ParameterPlan(
            gradient,
            own[j].algorithm,
            why,
            _kind(gradient),
            own[j].factors,
            own[j].cost,
            seconds[j],
            considered,
            own[j].norms,
            own[j].again,
        )
    step = step_seconds(graph, peaks, number)
    parameters = tuple(plans[g.name] for g in gradients)
    traffic = sum(number(plan.cost.traffic) for plan in parameters) + sum(value.traffic for value in found.made_again)
    if line is None:
        return Plan(parameters, peaks, step, traffic=traffic)
    private_peak = max(budget + decided.excess, line.gradients)
    second = second_backward((node for plan in parameters for node in plan.again), decided, line)
    again = decided.seconds - sum(plan.seconds for plan in parameters) - sum(value.seconds for value in found.made_again)
    return Plan(parameters, peaks, step, line.peak, budget, decided.over, private_peak, second, again, found.made_again, traffic)


def _without_decision(
    graph: fx.Graph, gradients: list[ParameterGradient], plans: tuple[ParameterPlan, ...], spec: GraphSpec
) -> Plan:
    """One sample's gradient is its own, and holds nothing that the non-private step would not hold: only predicted."""
    single = [plan.gradient for plan in plans if plan.chosen == "single"]
    if not single or not kernels.fused(_device(single[0])):
        return Plan(plans)
    number, peaks = _Numbers(graph), peaks_of(_device(single[0]))
    line = timeline(graph, [g.leaving for g in gradients if g.leaving is not None], number)
    plans = tuple(replace(plan, seconds=plan.cost.seconds(peaks, number)) for plan in plans)
    traffic = sum(number(plan.cost.traffic) for plan in plans)
    return Plan(plans, peaks, step_seconds(graph, peaks, number), line.peak, _budget(spec, line), 0.0, line.peak, traffic=traffic)


def _without_choice(gradient: ParameterGradient, ctx: Context) -> ParameterPlan | None:
    if gradient.node is None:
        return ParameterPlan(gradient, "unused", "not reached by the loss", "-")
    if ctx.batch == 0:
        return ParameterPlan(gradient, "empty", "no sample: noise alone", "-")
    size, width = sympy.Mul(*ctx.shape(gradient.node)), gradient.node.meta["val"].dtype.itemsize
    cost = fused_costs.own(size, width) if kernels.fused(_device(gradient)) else Cost((release(size, width),))
    if gradient.constant:
        return ParameterPlan(gradient, "constant", "the same for every sample", "-", cost=cost)
    if not gradient.uses:
        return ParameterPlan(gradient, "single", "one sample: the gradient is its own", _kind(gradient), cost=cost)
    return None


def _kind(gradient: ParameterGradient) -> str:
    return " + ".join(dict.fromkeys(use_kind(use) for use in gradient.uses)) or "whole gradient"


def _device(gradient: ParameterGradient) -> torch.device:
    assert gradient.node is not None
    return gradient.node.meta["val"].device  # type: ignore[no-any-return]


def _asked(gradient: ParameterGradient, spec: GraphSpec) -> tuple[str, str]:
    return next(((g, a) for g, a in spec.norm_algorithm if fnmatchcase(gradient.name, g)), ("*", "auto"))


def _allowed(gradient: ParameterGradient, ways: list[Way], spec: GraphSpec) -> list[Way]:
    """The ways that the options leave. An algorithm that is asked for all parameters is used where it fits."""
    glob, wanted = _asked(gradient, spec)
    if wanted == "auto":
        return ways
    found = [way for way in ways if way.algorithm == wanted]
    if not found and glob != "*":
        raise OptionsError(
            f"norm_algorithm={{{glob!r}: {wanted!r}}} does not fit {gradient.name!r}: its gradient ({_kind(gradient)}) is not "
            f"{_FORM[wanted]}. Possible are 'auto', {', '.join(repr(way.algorithm) for way in ways)}."
        )
    return found or ways[:1]


_FORM = {
    "ghost": "a sum of plain matrix products and embedding rows",
    "flash": "a sum of plain matrix products over positions",
    "recompute": "a sum of plain matrix products and embedding rows whose operands the backward could compute a second time",
}


def _fastest_of_each(ways: Sequence[Way], peaks: Peaks, number: _Numbers) -> list[Way]:
    """One way for each algorithm: a second backward may follow norms of several kinds."""
    found: dict[str, Way] = {}
    for way in sorted(ways, key=lambda way: way.cost.seconds(peaks, number)):
        found.setdefault(way.algorithm, way)
    return [way for way in ways if found[way.algorithm] is way]


@dataclass(frozen=True)
class _Decided:
    """The choice for each gradient that has one, with the timeline and the bytes that it was made on; None and 0 where memory could
    not matter. ``fastest``: the choice without a budget; ``moments``: when each gradient's memory begins to be held."""

    decision: choose.Decision
    fastest: choose.Decision
    moments: tuple[int, ...]
    line: Timeline | None = None
    budget: float = 0.0
    made_again: tuple[Saved, ...] = ()


def _decide(
    graph: fx.Graph,
    gradients: Sequence[ParameterGradient],
    free: Sequence[ParameterGradient],
    ways: Mapping[str, Sequence[Way]],
    spec: GraphSpec,
    peaks: Peaks,
    number: _Numbers,
) -> _Decided:
    options = [[choose.Way(w.cost.seconds(peaks, number), number(w.cost.held)) for w in ways[g.name]] for g in free]
    every = [way for g in free for way in ways[g.name]]
    if all(len(own) == 1 for own in options) and not any(way.again for way in every):
        moments = [0] * len(free)
        only = choose.choose(options, moments, [])
        return _Decided(only, only, tuple(moments))
    line = timeline(graph, [g.leaving for g in gradients if g.leaving is not None], number)
    budget = _budget(spec, line)
    values = [[(_kept(w.kept, line, number), _kept(w.again, line, number)) for w in ways[g.name]] for g in free]
    with_kept = [
        [choose.Way(o.seconds, o.held, *own_values) for o, own_values in zip(own, nodes, strict=True)]
        for own, nodes in zip(options, values, strict=True)
    ]
    again = recipes(graph, dict.fromkeys(node for way in every for node in way.again), line, peaks, number)
    moments = [line.made(g.uses[-1].operation) for g in free]
    saved = saved_values(graph, line, peaks, number) if kernels.fused(_device(free[0])) else []
    problem = (
        [*with_kept, *(value.ways() for value in saved)],
        [*moments, *[0] * len(saved)],
        [budget - alive for alive in line.alive],
    )
    decided, fastest = choose.choose(*problem, again), choose.choose_fastest(*problem, again)
    made_again = tuple(value for value, j in zip(saved, decided.chosen[len(free) :], strict=True) if j)
    decided, fastest = (replace(decision, chosen=decision.chosen[: len(free)]) for decision in (decided, fastest))
    return _Decided(decided, fastest, tuple(moments), line, budget, made_again)


def _budget(spec: GraphSpec, line: Timeline) -> float:
    """In bytes."""
    return spec.memory_budget * line.peak if isinstance(spec.memory_budget, float) else float(spec.memory_budget)


def _guard_crossovers(
    graph: fx.Graph,
    gradients: Sequence[ParameterGradient],
    ways: Sequence[Sequence[Way]],
    found: _Decided,
    spec: GraphSpec,
    peaks: Peaks,
    number: _Numbers,
) -> None:
    """With dynamic sizes, what was decided holds for sizes at which it would be decided alike."""
    if not is_dynamic(graph):
        return
    signs: list[Expr] = []
    for own in ways:
        held = [way for way in own if not way.again]
        if len(held) > 1:
            signs += time_differences(held, peaks, min(held, key=lambda way: way.cost.seconds(peaks, number)))
    leaving = {owner_of(g.leaving).name for g in gradients if g.leaving is not None}
    for decision in dict.fromkeys((found.decision, found.fastest)):
        if found.line is None:
            break
        picked = [own[j] for own, j in zip(ways, decision.chosen, strict=True)]
        again = found.made_again if decision is found.decision else ()
        signs.append(excess_bytes(graph, picked, found.moments, decision, found.line, spec.memory_budget, leaving, again))
    guard_signs(signs, graph)


def _kept(nodes: Sequence[fx.Node], line: Timeline, number: _Numbers) -> tuple[choose.Kept, ...]:
    values = dict.fromkeys(value_of(node, line, number) for node in nodes)
    return tuple(value for value in values if value is not None)


def _why(
    gradient: ParameterGradient, own: Sequence[Way], j: int, seconds: Sequence[float], decided: choose.Decision, spec: GraphSpec
) -> str:
    glob, wanted = _asked(gradient, spec)
    if wanted == own[j].algorithm:
        return f"asked for by norm_algorithm ({glob!r})"
    if len(own) == 1:
        return "the only form that fits"
    fastest = min((i for i in range(len(own)) if not own[i].again), key=seconds.__getitem__)
    if j != fastest:
        return f"{own[fastest].algorithm} would be faster and does not fit the memory budget"
    return f"least time ({', '.join(f'{way.algorithm} {1e6 * s:.0f} us' for way, s in zip(own, seconds, strict=True))})"


class _Numbers:
    """Sizes as numbers: symbols take the value that they had while tracing, without guarding on it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph

    def __call__(self, expr: Expr) -> float:
        expr = sympy.sympify(expr)
        return float(expr.subs({symbol: self._hint(symbol) for symbol in expr.free_symbols}))

    @functools.cache  # noqa: B019 - lives as long as one compilation
    def _hint(self, symbol: Any) -> int:
        return symbol_hint(symbol, self._graph)


def symbol_hint(symbol: Any, graph: fx.Graph) -> int:
    """The value that a size symbol had while tracing, without guarding on it."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = [value] if isinstance(value, torch.SymInt) else list(value.shape) if isinstance(value, torch.Tensor) else []
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr == symbol and size.node.has_hint():
                return int(size.node.hint)
    return 32
