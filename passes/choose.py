"""One decision over all parameters: the cheapest choice of algorithms that fits into memory.

Exact, by mixed-integer programming (scipy's HiGHS): with x_ij = 1 if gradient i uses way j, y_v = 1 if value v stays in memory and
r_v = 1 if it is computed a second time,

    minimise  sum_ij seconds_ij x_ij  +  sum_v seconds_v r_v
    subject to  sum_j x_ij = 1 for each i,
                y_v >= x_ij for each value v that way j of gradient i keeps alive,
                r_v >= x_ij for each value v that it needs again,
                y_u + r_u >= r_v for each value u that v is computed from,
                sum_{ij: moment_i <= t} held_ij x_ij + sum_{v: moment_v <= t} bytes_v y_v  <=  room_t + over  for each moment t,
                the same at the last moment with the largest work_v r_v on the left.

The moments are points of the backward pass: memory that activations have given back by then may be used by what is held. A value
that several gradients keep (an input that three projections share) counts once, and so does one that several need again: the
second backward pass is shared as far as it can be. (Jain et al. 2020, "Checkmate", choose in the same way what a forward keeps.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


@dataclass(frozen=True)
class Kept:
    """A value that stays in memory to the end, which nobody else needs from ``moment`` on."""

    name: str
    moment: int
    nbytes: float


@dataclass(frozen=True)
class Again:
    """How a value is computed a second time: predicted seconds, the values it is made from, bytes in use meanwhile.

    ``holdable``: whether it may be kept instead; what only exists inside a fused kernel cannot.
    """

    seconds: float
    inputs: tuple[Kept, ...]
    work: float = 0.0
    holdable: bool = True


Recipes = Mapping[Kept, Again]


@dataclass(frozen=True)
class Way:
    """One algorithm for one gradient: predicted seconds, bytes of its own held from the gradient's moment on, values kept, and
    values that are computed again once the clip factors are known."""

    seconds: float
    held: float
    kept: tuple[Kept, ...] = ()
    again: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class Decision:
    """``chosen[i]``: index of gradient i's way. ``over``: bytes by which the best choice still exceeds the budget. ``excess``: the
    same, negative where that many bytes are left, and ``moment`` when that is. ``again``: values that are computed a second time;
    ``held``: values that this starts from; ``kept``: these, and what the ways keep."""

    chosen: tuple[int, ...]
    seconds: float
    over: float
    excess: float = 0.0
    again: frozenset[Kept] = frozenset()
    held: frozenset[Kept] = frozenset()
    kept: frozenset[Kept] = frozenset()
    moment: int = 0


@dataclass(frozen=True)
class _Problem:
    ways: Sequence[Sequence[Way]]
    moments: Sequence[int]
    room: Sequence[float]
    recipes: Recipes = field(default_factory=dict)

    def decision(self, chosen: Sequence[int], held: Iterable[Kept] = ()) -> Decision:
        """What a choice of ways costs, where the second backward starts from the values ``held`` that it meets on its way."""
        picked = [own[j] for own, j in zip(self.ways, chosen, strict=True)]
        kept = {value for way in picked for value in way.kept}
        may_start = kept | set(held)
        again: set[Kept] = set()
        met: set[Kept] = set()
        pending = [value for way in picked for value in way.again]
        while pending:
            value = pending.pop()
            if value in again:
                continue
            again.add(value)
            for source in self.recipes[value].inputs:
                known = source not in self.recipes or source in may_start
                (met.add if known else pending.append)(source)
        seconds = sum(way.seconds for way in picked) + sum(self.recipes[value].seconds for value in again)
        work = max((self.recipes[value].work for value in again), default=0.0)
        excess, moment = self._excess(picked, kept | met, work)
        found = frozenset(again), frozenset(met), frozenset(kept | met)
        return Decision(tuple(chosen), seconds, max(0.0, excess), excess, *found, moment)

    def _excess(self, picked: Sequence[Way], kept: Iterable[Kept], work: float) -> tuple[float, int]:
        """The largest number of bytes by which a decision exceeds its room at any moment, and that moment."""
        if not len(self.room):
            return 0.0, 0
        arriving = np.zeros(len(self.room))
        for way, moment in zip(picked, self.moments, strict=True):
            arriving[moment] += way.held
        for value in kept:
            arriving[value.moment] += value.nbytes
        used = np.cumsum(arriving)
        used[-1] += work
        excess = used - np.asarray(self.room)
        return float(np.max(excess)), int(np.argmax(excess))


def choose(
    ways: Sequence[Sequence[Way]], moments: Sequence[int], room: Sequence[float], recipes: Recipes | None = None
) -> Decision:
    """The cheapest decision that fits; where none fits, the one that exceeds the budget least, and cheapest among those.

    Args:
        ways: for each gradient, its ways (at least one each).
        moments: for each gradient, the index into ``room`` from which on its memory is held.
        room: bytes that may be held at each moment; empty: as many as one likes.
        recipes: how values that ways need again are computed. What has no recipe there has to be kept.
    """
    problem = _Problem(ways, moments, room, recipes or {})
    fastest = choose_fastest(ways, moments, room, recipes)
    if fastest.excess <= 0 and not fastest.again:
        return fastest
    # Many equal layers of a second backward can take the solver minutes. Where the problem is large, it is looked at only if
    # nothing else fits, and for a few seconds.
    large = len(problem.recipes) > _FEW_RECIPES
    held = _without_again(problem)
    first = fastest if held is None else _best(held)
    if large and held is not None and not first.over:
        return first
    found = _best(problem, _SECONDS if large else np.inf, first)
    return min(first, found, key=lambda decision: (round(decision.over), decision.seconds))


_FEW_RECIPES, _SECONDS = 40, 4.0


def _without_again(problem: _Problem) -> _Problem | None:
    """The problem without a second backward; None where some gradient has no other way. Infinite seconds mark what is left out."""
    if any(all(way.again for way in own) for own in problem.ways):
        return None
    never = Way(np.inf, np.inf)
    return replace(problem, ways=[[never if way.again else way for way in own] for own in problem.ways], recipes={})


def _best(problem: _Problem, at_most_s: float = np.inf, known: Decision | None = None) -> Decision:
    """The least excess first, the least time among what exceeds no more; ``known`` where the solver finds nothing in its time."""
    least = _solve(problem, None, at_most_s) or known
    assert least is not None
    return _solve(problem, least.over, at_most_s) or known or least


def choose_fastest(
    ways: Sequence[Sequence[Way]], moments: Sequence[int], room: Sequence[float], recipes: Recipes | None = None
) -> Decision:
    """The fastest way for each gradient by itself, whatever memory that takes."""
    chosen = [min(range(len(own)), key=lambda j: (own[j].seconds, own[j].held)) for own in ways]
    return _Problem(ways, moments, room, recipes or {}).decision(chosen)


def _solve(problem: _Problem, over: float | None, at_most_s: float = np.inf) -> Decision | None:
    """Minimises seconds with the budget exceeded by ``over`` at most; with None, minimises the excess itself.

    Variables, in this order: x for each (gradient, way), y for each value that may be kept, r for each that may be computed again,
    the excess, the work.
    """
    ways, recipes = problem.ways, problem.recipes
    pairs = [(i, j) for i, own in enumerate(ways) for j, way in enumerate(own) if way.seconds < np.inf]
    values = {value for own in ways for way in own for value in way.kept}
    values |= {
        source for recipe in recipes.values() for source in recipe.inputs if source not in recipes or recipes[source].holdable
    }
    rows = _Rows(
        [*pairs, *(("y", v) for v in sorted(values, key=_order)), *(("r", v) for v in sorted(recipes, key=_order)), "over", "work"]
    )
    for i, own in enumerate(ways):
        rows.add({(i, j): 1.0 for j, way in enumerate(own) if way.seconds < np.inf}, 1.0, 1.0)
        for j, way in enumerate(own):
            for value in way.kept:
                rows.add({("y", value): 1.0, (i, j): -1.0}, 0.0)
            for value in way.again:
                rows.add({("r", value): 1.0, (i, j): -1.0}, 0.0)
    byte = max([ways[i][j].held for i, j in pairs] + [value.nbytes for value in values] + [1.0])
    for value, recipe in recipes.items():
        for source in recipe.inputs:
            row: dict[object, float] = {("r", value): -1.0}
            row |= {("y", source): 1.0} if source in values else {}
            rows.add(row | ({("r", source): 1.0} if source in recipes else {}), 0.0)
        rows.add({"work": 1.0, ("r", value): -recipe.work / byte}, 0.0)
    _add_memory(rows, problem, values, byte)

    seconds: dict[object, float] = {(i, j): ways[i][j].seconds for i, j in pairs}
    seconds |= {("r", value): recipe.seconds for value, recipe in recipes.items()}
    scale = max([abs(s) for s in seconds.values()] + [1e-30])
    cost: dict[object, float] = {"over": 1.0} if over is None else {name: s / scale for name, s in seconds.items()}
    upper = np.inf if over is None else over / byte * (1 + 1e-9) + 1e-9
    whole = {*pairs, *(("y", value) for value in values if value in recipes)}
    found = rows.minimise(cost, {"over": upper, "work": np.inf}, whole, at_most_s)
    if found is None:
        return None
    chosen = [max((found.get((i, j), -1.0), -j, j) for j in range(len(own)))[2] for i, own in enumerate(ways)]
    return problem.decision(chosen, [value for value in values if found[("y", value)] > 0.5])


def _order(value: Kept) -> tuple[int, str]:
    return value.moment, value.name


def _add_memory(rows: _Rows, problem: _Problem, values: Iterable[Kept], byte: float) -> None:
    """A row for each moment at which room can be short: what is held only grows, so a moment with more room than a later one does
    not count."""
    least = np.inf
    last = len(problem.room) - 1
    for t in range(last, -1, -1):
        if problem.room[t] >= least and t != last:
            continue
        least = problem.room[t]
        row: dict[object, float] = {
            (i, j): way.held / byte
            for i, own in enumerate(problem.ways)
            for j, way in enumerate(own)
            if problem.moments[i] <= t and way.held and way.seconds < np.inf
        }
        row |= {("y", value): value.nbytes / byte for value in values if value.moment <= t}
        rows.add({**row, "over": -1.0, **({"work": 1.0} if t == last else {})}, -np.inf, least / byte)


class _Rows:
    """A linear program under construction: variables between 0 and 1 by name, rows of coefficients between two limits."""

    def __init__(self, names: Sequence[object]) -> None:
        self._columns = {name: column for column, name in enumerate(names)}
        self._entries: list[tuple[int, int, float]] = []
        self._limits: list[tuple[float, float]] = []

    def add(self, row: Mapping[object, float], low: float, high: float = np.inf) -> None:
        """``low <= sum of coefficient * variable <= high``."""
        self._entries += [(len(self._limits), self._columns[name], coefficient) for name, coefficient in row.items()]
        self._limits.append((low, high))

    def minimise(
        self, cost: Mapping[object, float], upper: Mapping[object, float], whole: Iterable[object], at_most_s: float
    ) -> Mapping[object, float] | None:
        """The variables' values at an optimum, or the best that was found in that time, if anything was.

        ``upper``: bounds other than 1; ``whole``: variables that must be 0 or 1.
        """
        width = len(self._columns)
        costs, bounds, integrality = np.zeros(width), np.ones(width), np.zeros(width)
        for name, value in cost.items():
            costs[self._columns[name]] = value
        for name, value in upper.items():
            bounds[self._columns[name]] = value
        integrality[[self._columns[name] for name in whole]] = 1
        lines, columns, entries = zip(*self._entries, strict=True)
        matrix = csr_array((entries, (lines, columns)), shape=(len(self._limits), width))
        constraints = LinearConstraint(matrix, *np.array(self._limits).T)
        for presolve in (True, False):  # HiGHS 1.12 gives up on some problems ("Solve error") that it solves without its presolve
            options = {"mip_rel_gap": 0.0, "presolve": presolve, "time_limit": at_most_s}
            found = milp(costs, integrality=integrality, bounds=Bounds(0, bounds), constraints=constraints, options=options)
            if found.x is not None:
                break
        assert found.x is not None or at_most_s < np.inf, "some choice always exists: the excess is free, or one was found with it"
        if found.x is None:
            return None
        return {name: float(found.x[column]) for name, column in self._columns.items()}
