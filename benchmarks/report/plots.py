"""Plots of a section: along sequence length, along batch size, and bars for cases that stand alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.report import grouping, tables
from benchmarks.report.grouping import BASELINE, EAGER, Section, Series
from benchmarks.row import Row

COLORS = {  # Okabe and Ito's palette, told apart with any colour vision; black and grey for steps without privacy
    BASELINE: "#000000",
    EAGER: "#777777",
    "flashnorm": "#0072B2",
    "opacus": "#D55E00",
    "vmap": "#009E73",
    "loop": "#E69F00",
    "two-pass ghost": "#CC79A7",
    "book-keeping": "#56B4E9",
    "jax_privacy": "#5D3A9B",
}
OTHER_COLOR = "#8B5A2B"
SHOWN_NAMES = {BASELINE: "inductor (compiled, not private)", EAGER: "eager (not private)"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
BARS_PER_FIGURE = 6
DOTS_PER_INCH = 130

Measure = Callable[[Row], "float | None"]


def draw(section: Section, folder: Path) -> list[Path]:
    """Writes every plot of a section as PNG and SVG into `folder`; the same rows give the same bytes."""
    lone = [case for series in section.series() if series.axis is None for case in series.cases]
    figures = {series.name: _lines(section, series) for series in section.series() if series.axis is not None}
    for start in range(0, len(lone), BARS_PER_FIGURE):
        figures[f"cases-{start // BARS_PER_FIGURE + 1}"] = _bars(section, lone[start : start + BARS_PER_FIGURE])
    folder.mkdir(parents=True, exist_ok=True)
    return [path for name, figure in figures.items() for path in _write(figure, folder / _file_stem(section, name))]


def _write(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": stem.name, "svg.fonttype": "none"}):
        figure.savefig(paths[0], dpi=DOTS_PER_INCH)
        figure.savefig(paths[1], metadata={"Date": None})
    plt.close(figure)
    return paths


def _file_stem(section: Section, name: str) -> str:
    words = "-".join((section.suite, section.sizes, section.precision, name))
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in words)


def _lines(section: Section, series: Series) -> Figure:
    """Four panels over one axis: above what was measured, below its ratio to the compiled non-private step."""
    figure, panels = plt.subplots(2, 2, figsize=(13, 8.5), sharex=True, layout="constrained", height_ratios=(1.25, 1))
    along_batch = series.axis == "B"
    _panel(panels[0][0], section, series, _throughput if along_batch else _milliseconds)
    _panel(panels[0][1], section, series, _megabytes)
    _panel(panels[1][0], section, series, grouping.time_ratio)
    _panel(panels[1][1], section, series, grouping.memory_ratio)
    for row, column, label in (
        (0, 0, "samples per second" if along_batch else "time of a step (ms)"),
        (0, 1, "peak memory of tensors (MB)"),
        (1, 0, "time / compiled non-private"),
        (1, 1, "memory / compiled non-private"),
    ):
        panels[row][column].set_ylabel(label)
        panels[row][column].set_yscale("log")
        _readable_ticks(panels[row][column], fine=row == 1)
        _size_ticks(panels[row][column], series)
    for panel in panels[1]:
        panel.set_xlabel("batch size B" if along_batch else "sequence length T (tokens)")
        panel.axhline(1.0, color=COLORS[BASELINE], linewidth=1)
    _legend(figure, panels, section, series)
    figure.suptitle(f"{series.name}: {section.title}\n{_origin(section)}", fontsize=11)
    return figure


def _panel(panel: Axes, section: Section, series: Series, measure: Measure) -> None:
    """One line for each contender; where it has no number the line stops, and goes on behind it."""
    for contender in section.contenders:
        rows = [section.row(case, contender) for case in series.cases]
        values = [None if row is None or grouping.failure(row) else measure(row) for row in rows]
        if any(value is not None for value in values):
            numbers = [float("nan") if value is None else value for value in values]
            panel.plot(series.values, numbers, label=contender, **_look(contender, section.contenders))
    panel.grid(which="major", color="#dddddd", linewidth=0.8)
    panel.grid(which="minor", color="#eeeeee", linewidth=0.5)


def _look(contender: str, contenders: Sequence[str]) -> dict[str, Any]:
    """A family shares a colour; its members differ in marker and dash. Ours lies on top and is thicker."""
    family = grouping.family(contender)
    variant = [name for name in contenders if grouping.family(name) == family].index(contender)
    families = list(dict.fromkeys(grouping.family(name) for name in contenders))
    marker = MARKERS[(variant + families.index(family)) % len(MARKERS)]
    return {
        "color": COLORS.get(family, OTHER_COLOR),
        "marker": marker,
        "linestyle": DASHES[variant % len(DASHES)],
        "linewidth": 2.6 if contender == grouping.OURS else 1.4,
        "markersize": 8.5 if contender == grouping.OURS or marker in "PX*" else 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        "zorder": 5 if contender == grouping.OURS else 4 if contender == BASELINE else 3,
    }


def _legend(figure: Figure, panels: Any, section: Section, series: Series) -> None:
    """Names from slow to fast at the largest size at which each ran, and how many sizes each failed at."""

    def order(contender: str) -> float:
        ratios = [grouping.time_ratio(row) for case in series.cases if (row := section.row(case, contender))]
        return -next((ratio for ratio in reversed(ratios) if ratio is not None), 0.0)

    handles, names = panels[0][0].get_legend_handles_labels()
    drawn = dict(zip(names, handles, strict=True))
    listed = sorted(drawn, key=order)
    labels = [SHOWN_NAMES.get(name, name) + _failed_at(section, series, name) for name in listed]
    never = [name for name in section.contenders if name not in drawn and any(section.row(case, name) for case in series.cases)]
    title = "slow to fast" + (
        f"\n(no result: {', '.join(never[:1])}" + "".join(f",\n {name}" for name in never[1:]) + ")" if never else ""
    )
    figure.legend(
        [drawn[name] for name in listed], labels, loc="outside right upper", title=title, frameon=False, handlelength=4, fontsize=9
    )


def _failed_at(section: Section, series: Series, contender: str) -> str:
    rows = [(value, section.row(case, contender)) for case, value in zip(series.cases, series.values, strict=True)]
    failed = [value for value, row in rows if row is not None and grouping.failure(row)]
    if len(failed) > 1 and tuple(failed) == series.values[-len(failed) :]:
        return f" (none from {_size(failed[0])} on)"
    return f" (none at {', '.join(map(_size, failed))})" if failed else ""


def _bars(section: Section, cases: Sequence[str]) -> Figure:
    """A panel for each case, a bar for each contender from 1 to its time ratio, a diamond at its memory ratio."""
    contenders = [name for name in section.contenders if name != BASELINE]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(3.6 + 3.6 * columns, 1.2 + rows * (1.0 + 0.27 * len(contenders))),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    limits = _ratio_limits(section, cases)
    for panel, case in zip(panels.flat, cases, strict=False):
        for place, contender in enumerate(contenders):
            _bar(panel, place, section.row(case, contender), limits)
        panel.set_xscale("log", base=2)
        panel.set_xlim(*limits)
        _ratio_ticks(panel, limits)
        panel.axvline(1.0, color=COLORS[BASELINE], linewidth=1.2)
        panel.set_title(case, fontsize=10)
        panel.grid(axis="x", color="#dddddd", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.set_yticks(range(len(contenders)), contenders)
        panel.set_ylim(len(contenders) - 0.4, -0.6)
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    figure.suptitle(
        f"{section.title}: over the compiled non-private step\nbar and number: time, diamond: memory\n{_origin(section)}",
        fontsize=11,
    )
    return figure


def _bar(panel: Axes, place: int, row: Row | None, limits: tuple[float, float]) -> None:
    failed = grouping.failure(row) if row is not None else None
    time = grouping.time_ratio(row) if row is not None else None
    if row is None or failed or time is None:
        panel.text(1.04, place, failed.kind if failed else "not measured", va="center", fontsize=8, color="#777777", style="italic")
        return
    memory = grouping.memory_ratio(row)
    color = COLORS.get(grouping.family(row.contender), OTHER_COLOR)
    panel.barh(place, time - 1, left=1, height=0.66, color=color)
    if memory is not None:
        panel.plot([memory], [place], marker="D", color="white", markeredgecolor="black", markersize=5, zorder=4)
    panel.text(limits[1] * 0.97, place, tables.ratio(time), va="center", ha="right", fontsize=8)


def _ratio_limits(section: Section, cases: Sequence[str]) -> tuple[float, float]:
    """One range for all panels that holds 1 and every ratio, with room for the numbers on its right."""
    rows = [row for case in cases for row in section.of(case)]
    ratios = [ratio for row in rows for ratio in (grouping.time_ratio(row), grouping.memory_ratio(row)) if ratio]
    low, high = min([0.9, *ratios]), max([1.5, *ratios])
    return low / (high / low) ** 0.04, high * (high / low) ** 0.22


def _ratio_ticks(panel: Axes, limits: tuple[float, float]) -> None:
    """Powers of two, or between them too where there would be hardly any."""
    low, high = limits
    steps = (1.0,) if high > 8 * low else (1.0, 1.5) if high > 3.5 * low else (1.0, 1.2, 1.4, 1.7)
    panel.xaxis.set_major_locator(LogLocator(base=2, subs=steps))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    panel.xaxis.set_minor_locator(NullLocator())


def _readable_ticks(panel: Axes, *, fine: bool) -> None:
    """Plain numbers on a log axis. A range of less than a decade gets more of them."""
    low, high = panel.dataLim.intervaly
    narrow = high < 30 * low
    steps = (
        (1, 1.2, 1.5, 2, 3, 4, 5, 7)
        if narrow and fine
        else (1, 1.5, 2, 3, 5, 7)
        if narrow
        else (1, 2, 5)
        if high < 300 * low
        else (1,)
    )
    panel.yaxis.set_major_locator(LogLocator(subs=steps, numticks=30))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())


def _size_ticks(panel: Axes, series: Series) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(list(dict.fromkeys(series.values))))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(round(value))))
    panel.xaxis.set_minor_locator(NullLocator())


def _size(value: int) -> str:
    return f"{value // 1024}k" if value >= 4096 and value % 1024 == 0 else str(value)


def _origin(section: Section) -> str:
    return grouping.provenance(section.rows).partition(";")[0]


def _milliseconds(row: Row) -> float | None:
    return row.median_ms


def _megabytes(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / 1e6


def _throughput(row: Row) -> float | None:
    return row.samples_per_s
