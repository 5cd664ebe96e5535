"""Tables, plots and trends from results files.

Takes `benchmarks/results/<device>/<date>/*.json`, gives Markdown, `plots/*.png` and `plots/*.svg`.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import max_batch
from benchmarks.report import grouping, plots, readme, tables
from benchmarks.report.readme import update_readme
from benchmarks.report.trends import compare

__all__ = ["report", "update_readme"]

FILE_NAME = "report.md"


def report(directory: Path, against: Path | None = None) -> str:
    """Writes `report.md` and `plots/` into a results folder; returns the tables, and behind them what changed since `against`.

    ValueError where either folder holds no results.
    """
    rows = grouping.read_rows(directory)
    older = grouping.read_rows(against) if against is not None else None
    sections = grouping.sections(rows)
    text = "\n\n".join([f"# Results: {grouping.provenance(rows) or directory.name}", *map(tables.section_text, sections)])
    if found := readme.soundness(directory):
        text += f"\n\n## soundness\n\n{found}"
    if largest := max_batch.read(directory / max_batch.FILE_NAME):
        text += f"\n\n## largest physical batch\n\n{max_batch.markdown_table(largest)}"
    pictures = [path for section in sections for path in plots.draw(section, directory / "plots")]
    shown = "\n\n".join(f"![{path.stem}](plots/{path.name})" for path in pictures if path.suffix == ".png")
    (directory / FILE_NAME).write_text(f"{text}\n\n## Plots\n\n{shown}\n")
    return text if older is None else f"{text}\n\n{compare(rows, older)}"
