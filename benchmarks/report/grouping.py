"""Which rows belong together, what counts as measured, and who is ahead of whom."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import max_batch
from benchmarks import row as rows_file
from benchmarks.contenders.base import CannotRunError, NotInstalledError
from benchmarks.row import LATE, Row

BASELINE, EAGER = "inductor", "eager"
NON_PRIVATE = (BASELINE, EAGER)
OURS = "flashnorm"
SOUNDNESS_FILE = "soundness.json"
OTHER_FILES = (SOUNDNESS_FILE, max_batch.FILE_NAME)
AXES = ("T", "B")
"""Coordinates of `Row.point` that a plot can run along; a case that could go on several goes on the first."""

Value = Callable[[Row], "float | None"]


def read_rows(path: Path) -> list[Row]:
    """The timed rows of a results folder or of one file. Files with other rows (`OTHER_FILES`) are left out.

    Raises ValueError where there are neither rows nor such files.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    rows = [row for file in files if file.name not in OTHER_FILES for row in rows_file.read(file)]
    if not rows and not any((path / name).exists() for name in OTHER_FILES):
        raise ValueError(f"{path} holds no results; give a folder that `python -m benchmarks run SUITE --out FOLDER` has written")
    return rows


def family(contender: str) -> str:
    """The method or library that a contender is a variant of: "opacus ghost" -> "opacus"."""
    return contender if contender in ("two-pass ghost", "book-keeping") else contender.split()[0]


def is_ours(contender: str) -> bool:
    return family(contender) == OURS


def is_peer(contender: str) -> bool:
    return not is_ours(contender) and contender not in NON_PRIVATE


def is_loop(contender: str) -> bool:
    return family(contender) == "loop"


@dataclass(frozen=True)
class Failure:
    """Why a row's numbers do not count. `kind` is the word that stands in their place, `reason` is one line."""

    kind: str
    reason: str


_KINDS = {"not run": LATE.strip(), "absent": NotInstalledError.__name__, "refused": CannotRunError.__name__}
"""How the errors begin of what is no fault."""


def failure(row: Row) -> Failure | None:
    """None for a row with a time whose gradient error was measured and is at most the allowed one."""
    error, allowed = row.gradient_error, row.gradient_error_allowed
    if error is not None and allowed is not None and not error <= allowed:
        return Failure("wrong", f"gradient error {error:.1e}, allowed {allowed:.1e}")
    if row.error is not None:
        reason = " ".join(row.error.split()) or "no message"
        return Failure(next((kind for kind, start in _KINDS.items() if reason.startswith(start)), "failed"), reason)
    if row.median_ms is None:
        return Failure("failed", "no time was taken")
    if error is None or allowed is None:
        return Failure("no gate", "the gradients were not compared with the oracle, so the time does not count")
    return None


def time_ratio(row: Row) -> float | None:
    """Step time over the compiled non-private step's, None unless it counts."""
    return row.ratio_to_compiled if failure(row) is None else None


def memory_ratio(row: Row) -> float | None:
    """Peak memory over the compiled non-private step's, None unless it counts."""
    return row.memory_ratio if failure(row) is None else None


def quartile_ratios(row: Row) -> tuple[float, float] | None:
    """The quartiles of a step time over the median of the compiled non-private step in the same run."""
    ratio = time_ratio(row)
    if ratio is None or row.median_ms is None or row.low_quartile_ms is None or row.high_quartile_ms is None:
        return None
    compiled_ms = row.median_ms / ratio
    return row.low_quartile_ms / compiled_ms, row.high_quartile_ms / compiled_ms


@dataclass(frozen=True)
class Section:
    """All rows of one suite at one set of sizes and one precision."""

    suite: str
    sizes: str
    precision: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.suite} ({self.sizes} sizes, {self.precision})"

    @property
    def cases(self) -> list[str]:
        """Names of the cases; those that differ in one coordinate only stand together, in its order."""
        return [case for line in self.series() for case in line.cases]

    @property
    def contenders(self) -> list[str]:
        """Names in the order of the rows: non-private ones, ours, peers."""
        names = dict.fromkeys(row.contender for row in self.rows)
        return sorted(names, key=lambda name: (name not in NON_PRIVATE, name != BASELINE, not is_ours(name)))

    def row(self, case: str, contender: str) -> Row | None:
        return next((row for row in self.rows if (row.case, row.contender) == (case, contender)), None)

    def of(self, case: str) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def ours(self, case: str) -> Row | None:
        """The row that is compared with the peers: the default one, or the only kind of ours that took part."""
        ours = [row for row in self.of(case) if is_ours(row.contender)]
        return next((row for row in ours if row.contender == OURS), ours[0] if ours else None)

    def point(self, case: str) -> dict[str, int]:
        return dict(self.of(case)[0].point)

    def series(self) -> list[Series]:
        """The cases as lines along T, else along B; a case that is alone is a line of one point with no axis."""
        names = list(dict.fromkeys(row.case for row in self.rows))
        lines: dict[str, Series] = {}
        for axis in AXES:
            groups: dict[tuple[object, ...], list[str]] = {}
            for case in names:
                point = self.point(case)
                if case not in lines and axis in point:
                    others = tuple(sorted((name, size) for name, size in point.items() if name != axis))
                    groups.setdefault((_without(case, axis, point[axis]), *others), []).append(case)
            for (stem, *_), cases in groups.items():
                if len({self.point(case)[axis] for case in cases}) > 1:
                    ordered = sorted(cases, key=lambda case: self.point(case)[axis])
                    line = Series(str(stem), axis, tuple(ordered), tuple(self.point(case)[axis] for case in ordered))
                    lines |= dict.fromkeys(cases, line)
        return list(dict.fromkeys(lines.get(case, Series(case, None, (case,), (0,))) for case in names))


@dataclass(frozen=True)
class Series:
    """Cases that differ in one coordinate only, in its order."""

    name: str
    axis: str | None
    cases: tuple[str, ...]
    values: tuple[int, ...]


def _without(case: str, axis: str, value: int) -> str:
    """The case's name less the word that says where it is on the axis: "gpt2-b1-t4k" -> "gpt2-b1"."""
    sizes = {str(value), f"{value // 1024}k", f"{value // 1000}k"}
    words = re.split(r"([-_ ,]+)", case)
    kept = [word for word in words if word.lower().removeprefix(axis.lower()).removeprefix("=") not in sizes]
    return re.sub(r"[-_ ,]{2,}", "-", "".join(kept)).strip("-_ ,") or case


def sections(rows: Iterable[Row]) -> list[Section]:
    """Rows by suite, sizes and precision, in the order of their first row."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.sizes, row.precision), []).append(row)
    return [Section(*names, tuple(members)) for names, members in groups.items()]


def best(rows: Iterable[Row], value: Value) -> Row | None:
    """The row with the smallest value; None where no row counts."""
    counted = [(number, row) for row in rows if (number := value(row)) is not None]
    return min(counted, key=lambda pair: pair[0])[1] if counted else None


@dataclass(frozen=True)
class Behind:
    """A case in which ours is not ahead of a peer. `ours` is None where ours did not take part."""

    case: str
    ours: Row | None
    peer: Row


def behind(section: Section, value: Value, peers: Callable[[str], bool] = is_peer) -> list[Behind]:
    """Every case and peer in which ours is not strictly smaller; a failure of ours is behind every peer that ran."""
    found = []
    for case in section.cases:
        ours = section.ours(case)
        mine = None if ours is None else value(ours)
        for peer in section.of(case):
            theirs = value(peer) if peers(peer.contender) else None
            if theirs is not None and (mine is None or mine >= theirs):
                found.append(Behind(case, ours, peer))
    return found


def compared(section: Section, value: Value, peers: Callable[[str], bool] = is_peer) -> int:
    """The number of cases in which at least one peer ran."""
    return sum(any(peers(row.contender) and value(row) is not None for row in section.of(case)) for case in section.cases)


def peers_but_loops(contender: str) -> bool:
    """A loop over samples holds one sample's activations at a time: less memory than any method that runs the batch at once."""
    return is_peer(contender) and not is_loop(contender)


def provenance(rows: Sequence[Row]) -> str:
    """Device, threads and date, then versions, as one line; several values are all named."""
    devices = _joined(row.device for row in rows)
    threads = _joined(str(row.threads) for row in rows if row.threads is not None)
    versions: dict[str, set[str]] = {}
    for row in rows:
        for package, version in row.versions.items():
            name, _, number = version.rpartition(" ") if package == "peer" else (package, "", version)
            versions.setdefault(name, set()).add(number)
    parts = [devices, f"{threads} threads" if threads else "", _joined(row.date for row in rows)]
    packages = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in sorted(versions.items()))
    return "; ".join(part for part in (", ".join(part for part in parts if part), packages) if part)


def _joined(values: Iterable[str]) -> str:
    return " and ".join(sorted({value for value in values if value}))
