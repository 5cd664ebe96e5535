"""The README shows no measurement that no results file holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bench_rows import SIZES, along, everybody, failed, make

from benchmarks import row as rows_file
from benchmarks import soundness
from benchmarks.report import readme, report, update_readme
from benchmarks.row import RESULTS
from benchmarks.soundness import verdict

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, Path]:
    """A README with markers, and results of two dates."""
    path, results = tmp_path / "README.md", tmp_path / "benchmarks" / "results"
    parts = ["# Name", "Version 9.87.", "## Benchmarks", "Run `make bench`.", readme.BEGIN, readme.END, "More below."]
    path.write_text("\n\n".join([*parts, "## Develop", "3.21 is not about speed.\n"]))
    rows_file.write(everybody(date="2026-01-01", time=7.77), results / "cpu" / "2026-01-01" / "layers.json")
    rows_file.write([*everybody(), *along("T", SIZES, "gpt")], results / "cpu" / "2026-03-04" / "layers.json")
    return path, results


class TestReadme:
    def test_renders_the_newest_results_of_a_device(self, project: tuple[Path, Path]) -> None:
        path, results = project
        assert update_readme(path, results)
        text = path.read_text()
        assert "### cpu: 2026-03-04\n\nTest Processor, 2 threads, 2026-03-04; torch 2.13.0." in text
        assert "[Results](benchmarks/results/cpu/2026-03-04)." in text
        assert re.search(r"\| mlp +\| 1\.07 / 1\.04 \| 1\.83 / 1\.37 \| 1\.52 / 3\.90 \| 1\.13 / 0\.42 \|", text)
        assert "net-t256" in text
        assert "net-t1024" in text
        assert "7.77" not in text
        assert text.startswith("# Name\n\nVersion 9.87.")
        assert text.endswith("## Develop\n\n3.21 is not about speed.\n")
        assert readme.mistakes(path, results) == []
        assert not update_readme(path, results), "a second time changes nothing"

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("1.07 / 1.04", "1.06 / 1.04"),
            ("2 threads", "4 threads"),
            ("ours is ahead of every peer", "ours is far ahead of every peer"),
        ],
    )
    def test_a_changed_rendering_is_found(self, project: tuple[Path, Path], before: str, after: str) -> None:
        path, results = project
        update_readme(path, results)
        path.write_text(path.read_text().replace(before, after, 1))
        (mistake,) = readme.mistakes(path, results)
        assert "run `python -m benchmarks report --readme`" in mistake
        assert after in mistake

    @pytest.mark.parametrize("place", ["Run `make bench`.", "More below."])
    @pytest.mark.parametrize(
        ("claim", "number"), [("1.09 times the time", "1.09"), ("90 % of it", "90"), ("3x faster", "3"), ("412 ms", "412")]
    )
    def test_a_planted_number_is_found(self, project: tuple[Path, Path], place: str, claim: str, number: str) -> None:
        path, results = project
        update_readme(path, results)
        path.write_text(path.read_text().replace(place, f"{place} It takes {claim}."))
        assert readme.mistakes(path, results) == [f"{number} stands in '## Benchmarks' and in no results file"]

    def test_a_number_of_the_results_may_be_repeated(self, project: tuple[Path, Path]) -> None:
        path, results = project
        update_readme(path, results)
        path.write_text(path.read_text().replace("More below.", "The case mlp costs 1.07, with 8 x Linear(1024, 1024)."))
        assert readme.mistakes(path, results) == []

    def test_newer_results_make_the_readme_stale(self, project: tuple[Path, Path]) -> None:
        path, results = project
        update_readme(path, results)
        rows_file.write(everybody(date="2026-05-06"), results / "cpu" / "2026-05-06" / "layers.json")
        assert len(readme.mistakes(path, results)) == 1

    def test_failures_are_shown(self, project: tuple[Path, Path]) -> None:
        path, results = project
        rows = [
            failed("flashnorm", "ValueError: no"),
            make("inductor"),
            make("loop"),
            failed("opacus", "x", gradient_error=1.0, gradient_error_allowed=0.1),
        ]
        rows_file.write(rows, results / "cuda" / "2026-02-02" / "layers.json")
        update_readme(path, results)
        text = path.read_text()
        assert re.search(r"\| mlp +\| +failed \| 1\.13 / 0\.42 \|$", text, re.MULTILINE)
        assert "No result in any case: opacus." in text
        assert "ours is **not ahead** in 1 of 1 case: mlp (ours has no result) behind loop 1.13" in text

    def test_verdicts_of_soundness_stand_beside_the_times(self, project: tuple[Path, Path]) -> None:
        path, results = project
        tied = soundness.SoundnessRow("tied", "one weight used twice", "opacus", verdict.OVER, contribution=1.375)
        for folder in ("cpu/2026-03-04", "cuda/2026-04-05"):
            soundness.write([tied], results / folder / "soundness.json")
        update_readme(path, results)
        assert path.read_text().count("| tied: one weight used twice | **over the bound (1.38 C)** |") == 2, "with times, and alone"
        assert "### cuda: 2026-04-05\n\n[Results](benchmarks/results/cuda/2026-04-05).\n\n**soundness**\n" in path.read_text()
        assert readme.mistakes(path, results) == []
        assert "over the bound (1.38 C)" in report(results / "cuda" / "2026-04-05")

    def test_a_number_that_the_roofline_predicts_may_be_shown(self, project: tuple[Path, Path]) -> None:
        path, results = project
        update_readme(path, results)
        folder = results / "roofline" / "2026-03-04"
        folder.mkdir(parents=True)
        row = {"seconds": 1.077, "baseline_seconds": 1.0, "peak_bytes": 3, "baseline_peak_bytes": 2, "target": 1.05}
        (folder / "roofline.json").write_text(json.dumps({"torch": "2.13.0+cpu", "rows": [row]}))
        shown = "Llama-3.2-1B: predicted 1.077, target 1.05, memory 1.50, torch 2.13.0"
        path.write_text(path.read_text().replace(readme.BEGIN, f"{shown}\n\n{readme.BEGIN}"))
        assert readme.mistakes(path, results) == []
        path.write_text(path.read_text().replace("1.077", "1.078"))
        assert readme.mistakes(path, results) == ["1.078 stands in '## Benchmarks' and in no results file"]

    def test_a_number_that_scale_predicts_may_be_shown(self, project: tuple[Path, Path]) -> None:
        path, results = project
        update_readme(path, results)
        folder = results / "scale" / "2026-03-05"
        folder.mkdir(parents=True)
        row = {"throughput": 0.9871, "target": 0.92, "sent_bytes": 77.84e9, "saved_bytes": 13.71e9, "clip_bytes": 12.06e9}
        (folder / "scale.json").write_text(json.dumps({"torch": "2.13.0+cpu", "rows": [row, row | {"target": None}]}))
        shown = "predicted 0.987, target 0.92, sent 77.8, saved 13.7, held 12.1, torch 2.13.0"
        path.write_text(path.read_text().replace(readme.BEGIN, f"{shown}\n\n{readme.BEGIN}"))
        assert readme.mistakes(path, results) == []
        path.write_text(path.read_text().replace("77.8", "77.9"))
        assert readme.mistakes(path, results) == ["77.9 stands in '## Benchmarks' and in no results file"]

    def test_missing_markers(self, project: tuple[Path, Path]) -> None:
        path, results = project
        path.write_text("## Benchmarks\n\n1.5\n")
        with pytest.raises(ValueError, match="lacks <!-- benchmarks:begin -->; put"):
            update_readme(path, results)
        assert "add them and run" in readme.mistakes(path, results)[0]

    def test_the_readme_of_this_project(self) -> None:
        assert readme.mistakes(README, RESULTS) == []

    def test_its_links_to_results_exist(self) -> None:
        links = re.findall(r"\]\((benchmarks/results/[^)]+)\)", README.read_text())
        assert all((README.parent / link).exists() for link in links)
