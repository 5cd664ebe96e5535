"""One finding, the files that hold them, and the table."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TOLERANCE = 1e-4
"""Largest relative error of float32 gradients against the float64 oracle."""
SLACK = 1e-3
"""How far rounding may carry a contribution over C, as a part of C."""

EXACT = "exact"
WITHIN = "within the bound"
OVER = "over the bound"
WRONG = "wrong gradient"
UNTRAINED = "does not train"
POISONED = "poisoned by NaN"
REFUSES = "refuses"
NO_BOUND = "no bound"
ABSENT = "not installed"
NEEDS_CUDA = "needs CUDA"
NOT_JUDGED = "not judged: the time given to this run was over"


@dataclass(frozen=True)
class SoundnessRow:
    """What one contender does in one trap, without noise. `verdict` is one of this module's constants."""

    trap: str
    description: str
    contender: str
    verdict: str
    contribution: float | None = None
    """Largest part of a released sum that is one sample's, over what C allows; above 1 the noise does not cover it."""
    relation: str | None = None
    """How that sample was taken away: "blanked" or "removed" (C allowed), or "replaced" (2 C allowed)."""
    gradient_error: float | None = None
    """Largest relative distance of a parameter's gradient to the oracle's; None where there is no oracle, or no finite distance."""
    reading: str | None = None
    """Which of the trap's other losses the release stands for, if it is not the first."""
    untrained: tuple[str, ...] = ()
    """Parameters that got no gradient, or nothing but zeros."""
    refusal: str | None = None
    """First line of the text of the refusal. Beside another verdict: it was said to a batch with one sample less only."""
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def words(self) -> str:
        """The verdict with its number or its names."""
        if self.verdict in (OVER, NO_BOUND) and self.contribution is not None:
            return f"{self.verdict} ({_short(self.contribution)} C)"
        if self.verdict == UNTRAINED:
            return f"{self.verdict} {', '.join(self.untrained)}"
        if self.verdict == WRONG and self.gradient_error is not None:
            return f"{self.verdict} (by {self.gradient_error:.0%})"
        return f"{self.verdict} ({self.reading})" if self.verdict == EXACT and self.reading else self.verdict

    @property
    def key(self) -> tuple[str, str]:
        return self.trap, self.contender


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0e}"


def write(rows: Iterable[SoundnessRow], path: Path) -> None:
    """Adds rows to a JSON file, replacing those of the same trap and contender. The file is replaced whole."""
    kept = {row.key: row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([dataclasses.asdict(row) for row in kept.values()], indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def read(path: Path) -> list[SoundnessRow]:
    """The rows of a file that `write` wrote; empty where there is none."""
    rows = json.loads(path.read_text()) if path.exists() else []
    return [SoundnessRow(**{**row, "untrained": tuple(row["untrained"])}) for row in rows]


def markdown_table(rows: Iterable[SoundnessRow]) -> str:
    """Traps down, contenders across, in the order of the rows. Bold is what must not be: silent and not as promised."""
    by_key = {row.key: row for row in rows}
    contenders = list(dict.fromkeys(row.contender for row in by_key.values()))
    traps = {row.trap: row.description for row in by_key.values()}
    lines = [f"| trap | {' | '.join(contenders)} |", f"| --- {'| --- ' * len(contenders)}|"]
    for trap, description in traps.items():
        cells = [_cell(by_key.get((trap, contender))) for contender in contenders]
        lines.append(f"| {trap}: {description} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: SoundnessRow | None) -> str:
    if row is None:
        return ""
    return f"**{row.words}**" if row.verdict in (OVER, WRONG, UNTRAINED, POISONED) else row.words
