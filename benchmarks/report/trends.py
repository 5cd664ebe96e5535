"""What has changed between two results folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.report import grouping
from benchmarks.report.tables import ratio
from benchmarks.row import Row

MEMORY_CHANGE = 0.02
"""Peak memory hardly varies between runs; a relative change beyond this is one of the code."""


def compare(new: Sequence[Row], old: Sequence[Row]) -> str:
    """Markdown that names what got slower, faster, larger or smaller, what is new or gone, and what newly fails or works.

    Rule for time: `ratio_to_compiled` is compared, and the change counts if it is larger than the spread of both runs,
    that is, if the two ranges from the lower to the upper quartile have no point in common. A range is the row's
    quartiles over the compiled non-private step's median of its own run, so that a faster machine alone changes nothing.
    The compiled non-private step itself has the ratio 1 by definition and no trend. Rule for memory: `memory_ratio`
    has changed by more than `MEMORY_CHANGE`.
    """
    now, before = ({row.key: row for row in rows if row.contender != grouping.BASELINE} for rows in (new, old))
    both = [(row, before[key]) for key, row in now.items() if key in before]
    ran = [(row, past) for row, past in both if grouping.failure(row) is None and grouping.failure(past) is None]
    blocks = [
        ("Slower, by more than the spread", [_time(*pair) for pair in ran if _time_change(*pair) > 0]),
        ("Faster, by more than the spread", [_time(*pair) for pair in ran if _time_change(*pair) < 0]),
        (f"More memory, by over {MEMORY_CHANGE:.0%}", [_memory(*pair) for pair in ran if _memory_change(*pair) > MEMORY_CHANGE]),
        (f"Less memory, by over {MEMORY_CHANGE:.0%}", [_memory(*pair) for pair in ran if _memory_change(*pair) < -MEMORY_CHANGE]),
        ("Newly fails", _changed_state(both, fails_now=True)),
        ("No longer fails", _changed_state(both, fails_now=False)),
        ("New", [_name(row) + _state(row) for key, row in now.items() if key not in before]),
        ("Gone", [_name(row) for key, row in before.items() if key not in now]),
    ]
    text = "\n\n".join(f"### {title}\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in blocks if lines)
    return "\n\n".join(["## Against the older results", _machines(new, old), text or "No change beyond the spread."])


def _time_change(new: Row, old: Row) -> float:
    """The gap between the two quartile ranges, positive where the new one is slower; 0.0 where they touch."""
    now, before = grouping.quartile_ratios(new), grouping.quartile_ratios(old)
    if now is None or before is None:
        return 0.0
    (new_low, new_high), (old_low, old_high) = now, before
    return max(0.0, new_low - old_high) - max(0.0, old_low - new_high)


def _memory_change(new: Row, old: Row) -> float:
    return new.memory_ratio / old.memory_ratio - 1 if new.memory_ratio and old.memory_ratio else 0.0


def _time(new: Row, old: Row) -> str:
    return f"{_name(new)}: {_with_range(old)} -> {_with_range(new)}"


def _with_range(row: Row) -> str:
    quartiles = grouping.quartile_ratios(row)
    assert quartiles is not None, "rows without quartiles have no trend in time"
    return f"{ratio(row.ratio_to_compiled)} ({ratio(quartiles[0])}-{ratio(quartiles[1])})"


def _memory(new: Row, old: Row) -> str:
    return f"{_name(new)}: {ratio(old.memory_ratio)} -> {ratio(new.memory_ratio)}"


def _changed_state(pairs: Iterable[tuple[Row, Row]], *, fails_now: bool) -> list[str]:
    fails: Callable[[Row], bool] = lambda row: grouping.failure(row) is not None  # noqa: E731
    chosen = [(new, old) for new, old in pairs if fails(new) is fails_now and fails(old) is not fails_now]
    return [f"{_name(new)}{_state(new if fails_now else old)}" for new, old in chosen]


def _state(row: Row) -> str:
    failed = grouping.failure(row)
    return f": {failed.kind}, {failed.reason}" if failed else f": {ratio(row.ratio_to_compiled)}"


def _name(row: Row) -> str:
    return f"{row.suite}, {row.case} ({row.precision}, {row.sizes}), {row.contender}"


def _machines(new: Sequence[Row], old: Sequence[Row]) -> str:
    """Both origins, and a warning where the machine is another one: then ratios may move with no change of the code."""
    lines = [f"- now: {grouping.provenance(new)}", f"- before: {grouping.provenance(old)}"]
    if {(row.device, row.threads) for row in new} != {(row.device, row.threads) for row in old}:
        lines.append("- the device or the number of threads differs: a change of a ratio need not come from the code")
    return "\n".join(lines)
