"""The plan as HTML: a row for each kind of parameter, with a bar for each cost, and its members and alternatives inside."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeGuard

Row = Mapping[str, Any]
# Key of a plan row -> heading and unit. A column is shown if any row has something in it.
COSTS = {
    "predicted_us": ("predicted", "us"),
    "flops": ("FLOPs", ""),
    "bytes_moved": ("moved", "B"),
    "bytes_held": ("held", "B"),
}
_SHOWN = {"name", "shape", "frontier", "uses", "algorithm", "why", *COSTS}


def plan_table(rows: Sequence[Row]) -> str:
    """An HTML table of ``Report.parameters``. Keys that it does not know are listed with each parameter."""
    columns = [key for key in COSTS if any(row.get(key) for row in rows)]
    groups = [(name, members, {key: total(members, key) for key in columns}) for name, members in _alike(rows)]
    largest = {key: max((float(cost[key] or 0) for *_, cost in groups if _is_number(cost[key])), default=0.0) for key in columns}
    head = "".join(f'<th class="cost">{escape(COSTS[key][0])}</th>' for key in columns)
    body = "".join(_group(name, members, costs, largest) for name, members, costs in groups)
    sums = "".join(f'<td class="cost">{short(total(rows, key), COSTS[key][1])}</td>' for key in columns)
    return (
        f'<table class="plan"><thead><tr><th>parameter</th><th>shape</th><th>gradient</th><th>algorithm</th>{head}</tr></thead>'
        f'<tbody>{body}</tbody><tfoot><tr><th colspan="4">total of {len(rows)} parameters</th>{sums}</tr></tfoot></table>'
    )


def total(rows: Sequence[Row], key: str) -> float | str | None:
    """The sum of a cost; text if a size is symbolic, None if no row has it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        return None
    return sum(values) if all(map(_is_number, values)) else " + ".join(dict.fromkeys(map(str, values)))


def short(value: float | str | None, unit: str = "") -> str:
    """A number with three digits and a prefix; HTML."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return f'<span title="{escape(value)}">{escape(value) if len(value) < 24 else "symbolic"}</span>'
    if unit == "us":
        return f"{value / 1e3:.3g} ms" if value >= 1e3 else f"{value:.3g} us"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def _alike(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Parameters of numbered blocks that are treated alike, under one name with a star for the number."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        name = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", str(row["name"]), count=1)
        groups.setdefault((name, *(str(row.get(key)) for key in ("shape", "frontier", "uses", "algorithm"))), []).append(row)
    return [(key[0] if len(members) > 1 else str(members[0]["name"]), members) for key, members in groups.items()]


def _group(name: str, members: Sequence[Row], costs: Mapping[str, Any], largest: Mapping[str, float]) -> str:
    first = members[0]
    shape = " x ".join(map(str, first["shape"])) if first.get("shape") else "-"
    uses = f" ({first['uses']} uses)" if isinstance(first.get("uses"), int) and first["uses"] > 1 else ""
    count = f' <span class="count">x {len(members)}</span>' if len(members) > 1 else ""
    bars = "".join(_bar(costs[key], largest[key], COSTS[key][1]) for key in costs)
    same: dict[str, list[str]] = {}
    for row in members:
        same.setdefault(_reason(row), []).append(str(row["name"]))
    inside = "".join(f"<li>{escape(_listed(names))}: {reason}</li>" for reason, names in same.items())
    return (
        f'<tr><td class="name"><details><summary>{escape(name)}{count}</summary><ul>{inside}</ul></details></td>'
        f"<td>{escape(shape)}</td><td>{escape(str(first.get('frontier', '-')) + uses)}</td>"
        f'<td><span class="algorithm">{escape(str(first.get("algorithm", "-")))}</span></td>{bars}</tr>'
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} to {names[-1]} ({len(names)})"


def _bar(value: Any, largest: float, unit: str) -> str:
    share = 100 * value / largest if largest and _is_number(value) else 0
    return f'<td class="cost">{short(value, unit)}<span class="bar"><i style="width:{share:.1f}%"></i></span></td>'


def _reason(row: Row) -> str:
    why = str(row.get("why", ""))
    told = {"considered"} if all(name in why for name in row.get("considered") or ()) else set()
    extra = "".join(
        f'<div class="extra"><b>{escape(key)}</b> {escape(_plain(value))}</div>'
        for key, value in row.items()
        if key not in _SHOWN | told and value not in (None, [], {}, "")
    )
    return escape(why) + extra


def _plain(value: Any) -> str:
    if isinstance(value, Mapping) and value and all(map(_is_number, value.values())):  # algorithm -> microseconds
        return ", ".join(f"{name} {short(number, 'us')}" for name, number in value.items())
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
