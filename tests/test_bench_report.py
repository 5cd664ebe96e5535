"""Reports of the benchmark: tables, verdicts, footnotes, trends and plots come from the rows."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from bench_rows import SIZES, TIMES, along, everybody, failed, make, only_section, replaced

from benchmarks import row as rows_file
from benchmarks.report import grouping, plots, report, tables
from benchmarks.report.trends import compare


class TestVerdicts:
    def test_ahead_of_every_peer(self) -> None:
        assert tables.verdicts(only_section(everybody())) == [
            "Time: ours is ahead of every peer that ran, in 1 case.",
            "Memory, loops over samples aside: ours is ahead of every peer that ran, in 1 case.",
        ]

    def test_a_faster_peer_is_named_with_both_ratios(self) -> None:
        time, memory = tables.verdicts(only_section([*everybody(), *replaced(everybody("gpt"), "loop", time=0.91)]))
        assert time == "Time: ours is **not ahead** in 1 of 2 cases: gpt (ours 1.07) behind loop 0.91."
        assert "ahead of every peer that ran, in 2 cases" in memory

    def test_a_tie_is_not_ahead(self) -> None:
        time, _ = tables.verdicts(only_section(replaced(everybody(), "opacus", time=TIMES["flashnorm"])))
        assert "**not ahead** in 1 of 1 case: mlp (ours 1.07) behind opacus 1.07 (within the quartiles)" in time

    def test_a_larger_memory_counts_against_all_but_loops(self) -> None:
        _, memory = tables.verdicts(only_section(replaced(everybody(), "opacus ghost", memory=1.01)))
        assert "**not ahead** in 1 of 1 case: mlp (ours 1.04) behind opacus ghost 1.01" in memory
        assert "loop 0.42" not in memory

    def test_ours_without_a_result_is_behind_every_peer_that_ran(self) -> None:
        rows = [row for row in everybody() if row.contender != "flashnorm"]
        time, _ = tables.verdicts(only_section([*rows, failed("flashnorm", "GraphBreakError: two graphs")]))
        assert "mlp (ours has no result) behind opacus 2.31, opacus ghost 1.83, vmap compiled 1.52, loop 1.13" in time
        assert "mlp (ours did not take part) behind opacus" in tables.verdicts(only_section(rows))[0]

    @pytest.mark.parametrize(
        "gate",
        [{"gradient_error": None}, {"gradient_error_allowed": None}, {"gradient_error": float("nan")}, {"gradient_error": 0.3}],
    )
    def test_a_peer_without_a_passed_gate_is_not_compared(self, gate: dict[str, float | None]) -> None:
        section = only_section(replaced(everybody(), "opacus", time=0.5, memory=0.1, **gate))
        assert all("not ahead" not in line for line in tables.verdicts(section))
        assert "opacus 0.50" not in tables.section_text(section)

    def test_nothing_to_compare_with_is_said(self) -> None:
        assert "no peer ran" in tables.verdicts(only_section([make("inductor"), make("flashnorm")]))[0]

    def test_a_missed_target_is_said(self) -> None:
        assert tables.verdicts(only_section(replaced(everybody(), "flashnorm", target=1.05)))[-1] == (
            "Target missed: mlp, flashnorm: 1.07, target 1.05."
        )
        assert len(tables.verdicts(only_section(replaced(everybody(), "flashnorm", target=1.1)))) == 2


class TestTables:
    def test_failures_stand_in_the_table_and_below_it(self) -> None:
        rows = [row for row in everybody() if not row.contender.startswith("opacus")]
        rows.append(failed("opacus", "CannotRunError: no hook\n  for this layer | or that"))
        rows = [row for row in rows if row.contender != "vmap compiled"]
        rows.append(failed("vmap compiled", "OutOfMemoryError: no memory left"))
        rows.append(failed("jax_privacy", "NotInstalledError: pip install jax jax_privacy"))
        rows.append(failed("opacus ghost", "GateError: off", gradient_error=0.25, gradient_error_allowed=1e-4))
        rows.append(make("vmap", time=1.9, memory=2.0, gradient_error=None))
        rows.append(failed("loop compiled", "not run: the time given to this run was over"))
        text = tables.section_text(only_section(rows))
        for shown, note in {
            "refused": "opacus: CannotRunError: no hook for this layer | or that",
            "failed": "vmap compiled: OutOfMemoryError: no memory left",
            "absent": "jax_privacy: NotInstalledError: pip install jax jax_privacy",
            "wrong": "opacus ghost: gradient error 2.5e-01, allowed 1.0e-04",
            "no gate": "vmap: the gradients were not compared with the oracle, so the time does not count",
            "not run": "loop compiled: not run: the time given to this run was over",
        }.items():
            number = re.search(rf"^- \((\d)\) {re.escape(note)}$", text, re.MULTILINE)
            assert number is not None, note
            assert text.count(f"{shown} ({number[1]})") == 2, "one in the table of times, one in the table of memory"

    def test_equal_failures_share_a_footnote(self) -> None:
        rows = [failed("opacus", "ImportError: no opacus", case) for case in ("a", "b")]
        assert tables.section_text(only_section(rows)).count("ImportError") == 1

    def test_both_ratios_are_shown(self) -> None:
        rows = replaced(replaced(everybody(), "eager", time=0.8), "flashnorm", time=1.07, ratio_to_eager=1.3375)
        lines = tables.section_text(only_section(rows)).splitlines()
        assert "| flashnorm     |  1.07 (1.34) |" in lines
        assert "| inductor      | 50 ms (1.25) |" in lines, "the compiled step over the faster eager one"

    @pytest.mark.parametrize("count", [1, 7, 30])
    def test_no_table_is_wider_than_the_limit(self, count: int) -> None:
        text = tables.section_text(only_section([row for n in range(count) for row in everybody(f"some-case-{n}")]))
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert max(map(len, lines)) <= tables.WIDTH
        assert all(any(f"some-case-{n} " in line for line in lines) for n in range(count))

    def test_cells_cannot_break_the_table(self) -> None:
        (header, rule, line) = tables.markdown(["case", "x"], [["a|b", "1"]]).splitlines()
        assert (header, rule, line) == ("| case |   x |", "| ---- | --: |", "| a\\|b |   1 |")

    def test_cases_of_one_line_stand_in_the_order_of_sizes(self) -> None:
        section = only_section(along("T", (1024, 256, 512), "gpt"))
        assert section.cases == ["net-t256", "net-t512", "net-t1024"]

    def test_lines_differ_in_one_coordinate_only(self) -> None:
        points = {"gpt2-b1-t4k": (1, 4096), "gpt2-b1-t8k": (1, 8192), "gpt2-b8-t4k": (8, 4096), "bert-t4k": (1, 4096)}
        rows = [make("flashnorm", case, point={"B": b, "T": t}) for case, (b, t) in points.items()]
        assert [(line.name, line.axis, line.values) for line in only_section(rows).series()] == [
            ("gpt2-b1", "T", (4096, 8192)),
            ("gpt2-b8-t4k", None, (0,)),
            ("bert-t4k", None, (0,)),
        ]


class TestTrends:
    def test_a_change_beyond_the_quartiles_is_reported(self) -> None:
        old, new = everybody(), replaced(replaced(everybody(), "flashnorm", time=1.2), "loop", time=1.0)
        text = compare(new, old)
        assert (
            "### Slower, by more than the spread\n\n- layers, mlp (float32, small), flashnorm: 1.07 (1.05-1.10) -> 1.20 (1.18-1.24)"
            in text
        )
        assert (
            "### Faster, by more than the spread\n\n- layers, mlp (float32, small), loop: 1.13 (1.11-1.16) -> 1.00 (0.98-1.03)"
            in text
        )

    def test_a_change_within_the_quartiles_is_not(self) -> None:
        assert "No change beyond the spread." in compare(replaced(everybody(), "flashnorm", time=1.1), everybody())

    def test_a_slower_machine_is_no_change(self) -> None:
        assert "No change beyond the spread." in compare(everybody(compiled_ms=80.0), everybody())

    def test_memory(self) -> None:
        text = compare(replaced(everybody(), "flashnorm", memory=1.1), everybody())
        assert "### More memory, by over 2%\n\n- layers, mlp (float32, small), flashnorm: 1.04 -> 1.10" in text

    def test_new_gone_and_failing(self) -> None:
        old = [make("inductor"), make("flashnorm"), failed("opacus", "ImportError: no opacus"), make("loop")]
        new = [make("inductor"), failed("flashnorm", "GraphBreakError: two"), make("opacus"), make("eager")]
        text = compare(new, old)
        assert "### Newly fails\n\n- layers, mlp (float32, small), flashnorm: failed, GraphBreakError: two" in text
        assert "### No longer fails\n\n- layers, mlp (float32, small), opacus: failed, ImportError: no opacus" in text
        assert "### New\n\n- layers, mlp (float32, small), eager: 1.21" in text
        assert "### Gone\n\n- layers, mlp (float32, small), loop" in text
        assert "lower" not in text
        assert "aster" not in text

    def test_another_machine_is_said(self) -> None:
        warning = "the device or the number of threads differs"
        assert warning in compare(everybody(), everybody(threads=8))
        assert warning not in compare(everybody(), everybody())


class TestPlots:
    def test_along_sequence_length(self, tmp_path: Path) -> None:
        rows = along("T", SIZES, "gpt")
        rows = [row for row in rows if (row.case, row.contender) != ("net-t1024", "opacus")]
        rows.append(failed("opacus", "OutOfMemoryError: no room", "net-t1024", suite="gpt", point={"B": 1, "T": 1024}))
        png, svg = plots.draw(only_section(rows), tmp_path)
        text = svg.read_text()
        assert (png.name, svg.name) == ("gpt-small-float32-net.png", "gpt-small-float32-net.svg")
        for label in ("sequence length T (tokens)", "time of a step (ms)", "peak memory of tensors (MB)", "256", "512", "1024"):
            assert f">{label}<" in text
        assert "opacus (none at 1024)" in text
        assert all(f">{plots.SHOWN_NAMES.get(name, name)}<" in text for name in TIMES if name != "opacus")

    def test_along_batch_size(self, tmp_path: Path) -> None:
        _, svg = plots.draw(only_section(along("B", (1, 2, 4), "vision")), tmp_path)
        assert ">samples per second<" in svg.read_text()
        assert ">batch size B<" in svg.read_text()

    def test_cases_that_stand_alone(self, tmp_path: Path) -> None:
        rows = [row for case in ("mlp", "conv") for row in everybody(case) if (case, row.contender) != ("conv", "opacus")]
        rows.append(failed("opacus", "NotImplementedError: no", "conv"))
        _, svg = plots.draw(only_section(rows), tmp_path)
        text = svg.read_text()
        assert all(f">{name}<" in text for name in (*TIMES, "mlp", "conv", "failed", "1.07") if name != "inductor")

    def test_the_same_rows_give_the_same_bytes(self, tmp_path: Path) -> None:
        written = [
            [path.read_bytes() for path in plots.draw(only_section(along("T", SIZES, "gpt")), tmp_path / name)] for name in "ab"
        ]
        assert written[0] == written[1]
        assert written[0][0].startswith(b"\x89PNG")

    def test_members_of_a_family_can_be_told_apart(self) -> None:
        names = [
            "opacus",
            "opacus functorch",
            "opacus ghost",
            "opacus fast gradient",
            "vmap",
            "vmap compiled",
            "loop",
            "loop compiled",
        ]
        looks = [plots._look(name, names) for name in names]
        assert len({(look["color"], look["marker"]) for look in looks}) == len(names)
        assert len({look["color"] for look in looks}) == 3


class TestReport:
    def test_writes_tables_and_plots(self, tmp_path: Path) -> None:
        rows_file.write(along("T", SIZES, "gpt"), tmp_path / "gpt.json")
        rows_file.write(everybody(), tmp_path / "layers.json")
        text = report(tmp_path)
        assert text.startswith("# Results: Test Processor, 2 threads, 2026-03-04; torch 2.13.0\n")
        written = (tmp_path / "report.md").read_text()
        assert text in written
        pictures = re.findall(r"\]\((plots/[^)]+)\)", written)
        assert len(pictures) == 2
        assert all((tmp_path / picture).exists() for picture in pictures)

    def test_against_older_results(self, tmp_path: Path) -> None:
        rows_file.write(everybody(), tmp_path / "old" / "layers.json")
        rows_file.write(replaced(everybody(), "flashnorm", time=1.5), tmp_path / "new" / "layers.json")
        assert "flashnorm: 1.07 (1.05-1.10) -> 1.50 (1.47-1.54)" in report(tmp_path / "new", tmp_path / "old")

    def test_no_results(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"holds no results; give a folder that `python -m benchmarks run SUITE --out FOLDER`"):
            report(tmp_path)


def test_every_contender_is_known_to_the_report() -> None:
    """A new non-private contender must not count as a peer."""
    from benchmarks.contenders import CONTENDERS

    kinds = {contender.name: contender.clipping for contender in CONTENDERS}
    assert {name for name, clipping in kinds.items() if clipping is None} == set(grouping.NON_PRIVATE)


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    """What the report reads is what was written, nothing rounded."""
    rows_file.write(everybody(), tmp_path / "layers.json")
    assert [dataclasses.asdict(row) for row in grouping.read_rows(tmp_path)] == [dataclasses.asdict(row) for row in everybody()]
