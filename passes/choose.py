"""One decision over all parameters: the cheapest choice of algorithms that fits into memory.

Exact, by mixed-integer programming (scipy's HiGHS): with x_ij = 1 if gradient i uses way j,

    minimise  sum_ij seconds_ij x_ij  +  penalty * over
    subject to  sum_j x_ij = 1 for each i,
                y_n >= x_ij for each value n that way j of gradient i keeps alive,
                sum_{ij: moment_i <= t} held_ij x_ij + sum_{n: moment_n <= t} bytes_n y_n  <=  room_t + over  for each moment t.

The moments are points of the backward pass: memory that activations have given back by then may be used by what is held. A
value that several gradients keep (an input that three projections share) counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


@dataclass(frozen=True)
class Kept:
    """A value that stays in memory to the end, which nobody else needs from ``moment`` on."""

    name: str
    moment: int
    nbytes: float


@dataclass(frozen=True)
class Way:
    """One algorithm for one gradient: predicted seconds, bytes of its own held from the gradient's moment on, values kept."""

    seconds: float
    held: float
    kept: tuple[Kept, ...] = ()


@dataclass(frozen=True)
class Decision:
    """``chosen[i]``: index of gradient i's way. ``over``: bytes by which the best choice still exceeds the budget. ``excess``: the
    same, negative where that many bytes are left."""

    chosen: tuple[int, ...]
    seconds: float
    over: float
    excess: float = 0.0


def choose(ways: Sequence[Sequence[Way]], moments: Sequence[int], room: Sequence[float]) -> Decision:
    """The cheapest decision that fits; where none fits, the one that exceeds the budget least, and cheapest among those.

    Args:
        ways: for each gradient, its ways (at least one each).
        moments: for each gradient, the index into ``room`` from which on its memory is held.
        room: bytes that may be held at each moment; empty: as many as one likes.
    """
    fastest = tuple(min(range(len(own)), key=lambda j: (own[j].seconds, own[j].held)) for own in ways)
    if (excess := _excess(ways, fastest, moments, room)) <= 0:
        return Decision(fastest, _seconds(ways, fastest), 0.0, excess)
    least = _solve(ways, moments, room, over=None)
    chosen = _solve(ways, moments, room, over=max(0.0, _excess(ways, least, moments, room)))
    excess = _excess(ways, chosen, moments, room)
    return Decision(chosen, _seconds(ways, chosen), max(0.0, excess), excess)


def _seconds(ways: Sequence[Sequence[Way]], chosen: Sequence[int]) -> float:
    return sum(own[j].seconds for own, j in zip(ways, chosen, strict=True))


def _excess(ways: Sequence[Sequence[Way]], chosen: Sequence[int], moments: Sequence[int], room: Sequence[float]) -> float:
    """The largest number of bytes by which a decision exceeds its room at any moment."""
    if not len(room):
        return 0.0
    arriving = np.zeros(len(room))
    for own, j, moment in zip(ways, chosen, moments, strict=True):
        arriving[moment] += own[j].held
    for kept in {kept for own, j in zip(ways, chosen, strict=True) for kept in own[j].kept}:
        arriving[kept.moment] += kept.nbytes
    return float(np.max(np.cumsum(arriving) - np.asarray(room)))


def _solve(ways: Sequence[Sequence[Way]], moments: Sequence[int], room: Sequence[float], over: float | None) -> tuple[int, ...]:
    """Minimises seconds with the budget exceeded by ``over`` at most; with None, minimises the excess itself.

    Variables, in this order: x for each (gradient, way), y for each kept value, the excess.
    """
    pairs = [(i, j) for i, own in enumerate(ways) for j in range(len(own))]
    values = sorted({kept for own in ways for way in own for kept in way.kept}, key=lambda kept: (kept.moment, kept.name))
    columns = {kept: len(pairs) + k for k, kept in enumerate(values)}
    width = len(pairs) + len(values) + 1
    seconds = np.array([ways[i][j].seconds for i, j in pairs])
    byte = max([ways[i][j].held for i, j in pairs] + [kept.nbytes for kept in values] + [1.0])

    one_each = np.zeros((len(ways), width))
    memory = np.zeros((len(room), width))
    implied = []
    for column, (i, j) in enumerate(pairs):
        one_each[i, column] = 1
        memory[moments[i] :, column] = ways[i][j].held / byte
        for kept in ways[i][j].kept:
            row = np.zeros(width)
            row[columns[kept]], row[column] = 1, -1
            implied.append(row)
    for kept, column in columns.items():
        memory[kept.moment :, column] = kept.nbytes / byte
    memory[:, -1] = -1

    cost, upper = np.zeros(width), np.ones(width)
    if over is None:
        cost[-1], upper[-1] = 1, np.inf
    else:
        cost[: len(pairs)] = seconds / max(np.abs(seconds).max(), 1e-30)
        upper[-1] = over / byte * (1 + 1e-9) + 1e-9
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(memory, -np.inf, np.asarray(room) / byte)]
    if implied:
        constraints.append(LinearConstraint(np.array(implied), 0, np.inf))
    integrality = np.append(np.ones(len(pairs)), np.zeros(len(values) + 1))
    for presolve in (True, False):  # HiGHS 1.12 gives up on some problems ("Solve error") that it solves without its presolve
        options = {"mip_rel_gap": 0.0, "presolve": presolve}
        found = milp(cost, integrality=integrality, bounds=Bounds(0, upper), constraints=constraints, options=options)
        if found.x is not None:
            break
    assert found.x is not None, "some choice always exists: the excess is free, or one was found that has this excess"
    return tuple(max((found.x[c], -j, j) for c, (k, j) in enumerate(pairs) if k == i)[2] for i in range(len(ways)))
