"""The README's comparison section: rendered from results files, and checked against them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from benchmarks.report import grouping, tables
from benchmarks.report.grouping import Section
from benchmarks.row import Row

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HEADING = "## Benchmarks"
DEVICES = ("cpu", "cuda")
COMMAND = "python -m benchmarks report --readme"
MEASUREMENT = re.compile(r"(?<![A-Za-z]-)\d+(?:\.\d+)+|\d+(?=\s?(?:%|ms\b|[kMG]i?B\b)|x\b)")
"""Numbers that claim a measurement: decimals but those of names ("Llama-3.2"), and whole numbers with a unit or as a multiple
("3x", not "32 x 32")."""


def newest_folders(results: Path) -> dict[str, Path]:
    """The last dated folder of each device that holds results: `results/<device>/<date>/*.json`."""
    dated = sorted({file.parent for device in DEVICES for file in results.glob(f"{device}/*/*.json")})
    return {folder.parent.name: folder for folder in dated}


def predicted(results: Path) -> set[str]:
    """The numbers that `benchmarks.roofline` and `benchmarks.scale` have predicted, as the README's tables write them."""
    return _roofline(_newest(results, "roofline")) | _scale(_newest(results, "scale"))


def _newest(results: Path, kind: str) -> dict[str, Any]:
    """What the last `results/<kind>/<date>/<kind>.json` holds; no rows where there is none."""
    files = sorted(results.glob(f"{kind}/*/{kind}.json"))
    return json.loads(files[-1].read_text()) if files else {"torch": "", "rows": []}  # type: ignore[no-any-return]


def _scale(held: dict[str, Any]) -> set[str]:
    """Throughputs, targets and gigabytes: sent, saved by the forward, held at the clip."""
    numbers = {held["torch"].partition("+")[0]}
    for row in held["rows"]:
        numbers |= {f"{row['throughput']:.3f}"}
        numbers |= {f"{row[kind] / 1e9:.1f}" for kind in ("sent_bytes", "saved_bytes", "clip_bytes")}
        numbers |= {f"{row['target']:.2f}"} if row.get("target") else set()
    return numbers


def _roofline(held: dict[str, Any]) -> set[str]:
    numbers = {held["torch"].partition("+")[0]}
    for row in held["rows"]:
        numbers |= {f"{row['seconds'] / row['baseline_seconds']:.3f}", f"{row['peak_bytes'] / row['baseline_peak_bytes']:.2f}"}
        numbers |= {f"{row['target']:.2f}"} if row.get("target") else set()
    return numbers


def render(results: Path, readme: Path) -> str:
    """The text between the markers; links are relative to the README's folder."""
    folders = newest_folders(results)
    if not folders:
        return f"No results are stored in `{_relative(results, readme)}` yet."
    explained = (
        "Step time / peak memory, each over the compiled non-private step of the same run. `flashnorm` is this project; of each "
        "peer library or method, the variant that is fastest in that case stands here. Of cases that differ in size only, the "
        f"smallest and the largest. Every number comes from the results files (`{COMMAND}`)."
    )
    return "\n\n".join([explained, *(_device(name, folder, readme) for name, folder in sorted(folders.items()))])


def update_readme(readme: Path, results: Path) -> bool:
    """Renders the section between the markers anew; True if that changed the file. ValueError where a marker is missing."""
    text = readme.read_text()
    before, _, after = _split(text, readme)
    updated = f"{before}{BEGIN}\n\n{render(results, readme)}\n\n{END}{after}"
    if updated != text:
        readme.write_text(updated)
    return updated != text


def mistakes(readme: Path, results: Path) -> list[str]:
    """What in the README's benchmark section is not backed by results files; empty if all is.

    The part between the markers must be what the results render to, and every number that claims a measurement in the
    rest of the section must occur in it.
    """
    text = readme.read_text()
    section = re.search(rf"^{re.escape(HEADING)}$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None or BEGIN not in section[0] or END not in section[0]:
        return [f"{readme} has no section {HEADING!r} with the markers {BEGIN} and {END}; add them and run `{COMMAND}`"]
    before, shown, after = _split(section[0], readme)
    rendered = render(results, readme)
    found = []
    if shown.strip() != rendered:
        lines = sorted(set(shown.strip().splitlines()) ^ set(rendered.splitlines()))
        found.append(f"the rendered part is not what {results} gives; run `{COMMAND}`. Differing lines: {lines}")
    held = set(MEASUREMENT.findall(rendered)) | predicted(results)
    found += [
        f"{number} stands in {HEADING!r} and in no results file"
        for number in MEASUREMENT.findall(before + after)
        if number not in held
    ]
    return found


def _split(text: str, readme: Path) -> tuple[str, str, str]:
    before, begin, rest = text.partition(BEGIN)
    shown, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks {BEGIN if not begin else END}; put {BEGIN} and {END} around the place for the results")
    return before, shown, after


def _device(name: str, folder: Path, readme: Path) -> str:
    rows = grouping.read_rows(folder)
    parts = [
        f"### {name}: {folder.name}",
        f"{grouping.provenance(rows)}. [Results]({_relative(folder, readme)}).".removeprefix(". "),
    ]
    parts += [
        _suite(section) for section in grouping.sections(rows) if any(grouping.is_ours(row.contender) for row in section.rows)
    ]
    if table := soundness(folder):
        parts += ["**soundness**", table]
    return "\n\n".join(part for part in parts if part)


def soundness(folder: Path) -> str:
    """The table of the soundness suite where the folder holds its verdicts."""
    if not (folder / grouping.SOUNDNESS_FILE).exists():
        return ""
    from benchmarks.soundness import markdown_table, read  # slow: it loads every peer's library

    return markdown_table(read(folder / grouping.SOUNDNESS_FILE)).strip()


def _suite(section: Section) -> str:
    """Smallest and largest case of each line against the fastest contender of each family that ran in one of them."""
    shown = [case for series in section.series() for case in dict.fromkeys((series.cases[0], series.cases[-1]))]
    families = list(dict.fromkeys(grouping.family(name) for name in section.contenders if name not in grouping.NON_PRIVATE))
    ran = {grouping.family(row.contender) for row in section.rows if not grouping.failure(row)} | {grouping.OURS}
    columns = [name for name in families if name in ran]
    lines = [[case, *(_cell(section, case, name) for name in columns)] for case in shown]
    absent = [name for name in families if name not in ran]
    parts = [f"**{section.title}**", tables.markdown(["case", *columns], lines)]
    parts.append(" ".join([*tables.verdicts(section), f"No result in any case: {', '.join(absent)}." if absent else ""]).strip())
    return "\n\n".join(parts)


def _cell(section: Section, case: str, family: str) -> str:
    members = [row for row in section.of(case) if grouping.family(row.contender) == family]
    row: Row | None = section.ours(case) if family == grouping.OURS else grouping.best(members, grouping.time_ratio)
    if row is None:
        row = members[0] if members else None
    if row is None:
        return "-"
    if failure := grouping.failure(row):
        return failure.kind
    return f"{tables.ratio(row.ratio_to_compiled)} / {tables.ratio(row.memory_ratio)}"


def _relative(path: Path, readme: Path) -> str:
    return Path(os.path.relpath(path.resolve(), readme.resolve().parent)).as_posix()
