"""Markdown tables of results, with what failed and where ours is not ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.report import grouping
from benchmarks.report.grouping import BASELINE, EAGER, Behind, Failure, Section, Value
from benchmarks.row import Row

WIDTH = 120
"""Characters that a table may take; cases that do not fit go into a further table."""

LONGEST_ERROR = 240

Cell = Callable[[Row], str]


def section_text(section: Section) -> str:
    """Everything the report says about one section."""
    notes = Footnotes()
    parts = [
        f"## {section.title}",
        "\n".join(f"- {case}: {section.of(case)[0].description}" for case in section.cases),
        "Step time over the compiled non-private step's (in brackets: over the faster of eager and compiled).",
        *_contender_tables(section, lambda row: _time(row, section, notes)),
        "Peak memory over the compiled non-private step's.",
        *_contender_tables(section, lambda row: _memory(row, notes)),
        notes.text(),
        _best_peers(section),
        "\n".join(f"- {line}" for line in verdicts(section)),
    ]
    return "\n\n".join(part for part in parts if part)


class Footnotes:
    """Numbered texts under a table; equal texts share one number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, row: Row, failure: Failure) -> str:
        """What stands in the place of a number, such as "failed (2)"."""
        reason = failure.reason if len(failure.reason) <= LONGEST_ERROR else failure.reason[: LONGEST_ERROR - 3] + "..."
        number = self._numbers.setdefault(f"{row.contender}: {reason}", len(self._numbers) + 1)
        return f"{failure.kind} ({number})"

    def text(self) -> str:
        return "\n".join(f"- ({number}) {text}" for text, number in self._numbers.items())


def verdicts(section: Section) -> list[str]:
    """Sentences computed from the rows: is ours ahead of every peer on time, and on memory; which targets are missed."""
    lines = [
        _verdict(section, "Time", grouping.time_ratio, grouping.is_peer),
        _verdict(section, "Memory, loops over samples aside", grouping.memory_ratio, grouping.peers_but_loops),
    ]
    missed = [
        f"{row.case}, {row.contender}: {ratio(measured)}, target {ratio(row.target)}"
        for row in section.rows
        if row.target is not None and (measured := grouping.time_ratio(row)) is not None and measured > row.target
    ]
    return [line for line in (*lines, f"Target missed: {'; '.join(missed)}." if missed else "") if line]


def _verdict(section: Section, what: str, value: Value, peers: Callable[[str], bool]) -> str:
    cases = grouping.compared(section, value, peers)
    if not cases:
        return f"{what}: no peer ran, nothing to compare with."
    found = grouping.behind(section, value, peers)
    if not found:
        return f"{what}: ours is ahead of every peer that ran, in {_count(cases)}."
    by_case: dict[str, list[str]] = {}
    for each in found:
        by_case.setdefault(f"{each.case} ({_ours(each, value)})", []).append(_peer(each, value))
    places = "; ".join(f"{case} behind {', '.join(names)}" for case, names in by_case.items())
    return f"{what}: ours is **not ahead** in {len({each.case for each in found})} of {_count(cases)}: {places}."


def _ours(found: Behind, value: Value) -> str:
    if found.ours is None:
        return "ours did not take part"
    mine = value(found.ours)
    return "ours has no result" if mine is None else f"ours {ratio(mine)}"


def _peer(found: Behind, value: Value) -> str:
    mine, theirs = found.ours and grouping.quartile_ratios(found.ours), grouping.quartile_ratios(found.peer)
    within = value is grouping.time_ratio and mine and theirs and mine[0] <= theirs[1]
    return f"{found.peer.contender} {ratio(value(found.peer))}{' (within the quartiles)' if within else ''}"


def _count(cases: int) -> str:
    return f"{cases} case{'s' if cases > 1 else ''}"


def _best_peers(section: Section) -> str:
    """Ours, the fastest peer and the peer with the least memory, one line for each case."""
    header = ["case", "ours: time", "fastest peer", "ours: memory", "least memory of a peer, loops aside"]
    lines = []
    for case in section.cases:
        ours, peers = section.ours(case), [row for row in section.of(case) if grouping.is_peer(row.contender)]
        fastest = grouping.best(peers, grouping.time_ratio)
        smallest = grouping.best([row for row in peers if not grouping.is_loop(row.contender)], grouping.memory_ratio)
        lines.append(
            [
                case,
                ratio(grouping.time_ratio(ours) if ours else None),
                f"{fastest.contender} {ratio(fastest.ratio_to_compiled)}" if fastest else "-",
                ratio(grouping.memory_ratio(ours) if ours else None),
                f"{smallest.contender} {ratio(smallest.memory_ratio)}" if smallest else "-",
            ]
        )
    return markdown(header, lines)


def _contender_tables(section: Section, cell: Cell) -> list[str]:
    """Contenders down, cases across, split so that no table is wider than `WIDTH`."""
    contenders = section.contenders
    columns = [
        [case, *(cell(row) if (row := section.row(case, contender)) else "-" for contender in contenders)] for case in section.cases
    ]
    names = ["contender", *contenders]
    tables, taken = [], [names]
    for column in columns:
        if len(taken) > 1 and _width([*taken, column]) > WIDTH:
            tables.append(taken)
            taken = [names]
        taken.append(column)
    transposed = [[list(line) for line in zip(*table, strict=True)] for table in [*tables, taken]]
    return [markdown(lines[0], lines[1:]) for lines in transposed]


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 3 for column in columns) + 1


def _time(row: Row, section: Section, notes: Footnotes) -> str:
    if failure := grouping.failure(row):
        return notes.mark(row, failure)
    if row.contender == BASELINE:  # it is measured before the eager step, so its row cannot hold this ratio
        eager = section.row(row.case, EAGER)
        eager_ratio = grouping.time_ratio(eager) if eager else None
        return f"{milliseconds(row.median_ms)} ({ratio(1 / min(1.0, eager_ratio or 1.0))})"
    return f"{ratio(row.ratio_to_compiled)} ({ratio(row.ratio_to_fastest)})"


def _memory(row: Row, notes: Footnotes) -> str:
    if failure := grouping.failure(row):
        return notes.mark(row, failure)
    return megabytes(row.peak_bytes) if row.contender == BASELINE else ratio(row.memory_ratio)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose source is aligned too: the first column to the left, all others to the right."""
    cells = [[text.replace("|", "\\|") for text in line] for line in (header, *lines)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = "| " + " | ".join("-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)) + " |"
    padded = [
        "| "
        + " | ".join(text.ljust(width) if index == 0 else text.rjust(width) for index, (text, width) in enumerate(zipped))
        + " |"
        for zipped in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    return "\n".join([padded[0], rule, *padded[1:]])


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def megabytes(size: int | None) -> str:
    """Bytes in units of 1e6, or of 1e9 from 10 of them on."""
    return "-" if size is None else f"{size / 1e9:.1f} GB" if size >= 1e10 else f"{size / 1e6:.0f} MB"
