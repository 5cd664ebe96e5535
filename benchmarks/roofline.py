"""Predicted cost of privacy on an H200, from the code that Inductor generates for it: no GPU is needed.

    python -m benchmarks.roofline --out benchmarks/results/roofline/DATE

For each case the whole code of the non-private and of the private step is generated (`benchmarks.hopper`): forward and backward
with the noise, no optimizer. Times are rooflines of its kernels and calls, plus a launch each; memory is what the generated
wrapper holds at most. A row says what the private step adds, by term, so that a missed target names what is in the way.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import logging
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Privacy
from benchmarks.contenders.nonprivate import NonPrivate
from benchmarks.contenders.ours import Ours
from benchmarks.hopper import Generated, hopper, peaks_named
from benchmarks.hopper.estimate import Work
from benchmarks.hopper.fakes import fake_problem
from benchmarks.models.gpt import GPT
from benchmarks.models.llama import LlamaBlocks
from benchmarks.models.mlp import MLP
from benchmarks.models.vit import ViT
from benchmarks.suites.problems import image_classes, next_token, regression

DEVICE = "H200"
MEMORY_TARGET = 1.10


@dataclass(frozen=True)
class RooflineCase:
    """`target`: the largest ratio of predicted times that is accepted."""

    name: str
    build: Callable[[], Problem]
    target: float
    description: str = ""


def linear(tokens: int) -> Problem:
    return regression(MLP(1024, 8, activation=False), torch.randn(1, tokens, 1024))


def gpt2(batch: int, tokens: int, layers: int = 12) -> Problem:
    return next_token(GPT(context=max(1024, tokens), layers=layers), 50257, batch, tokens)


def vit(batch: int, layers: int = 12) -> Problem:
    return image_classes(ViT(768, layers, 12), batch, 224, 1000)


def llama_block(batch: int, tokens: int) -> Problem:
    blocks = LlamaBlocks(2048, 1, heads=32, key_heads=8, mlp_width=8192, rotary_base=500000.0)
    return regression(blocks, torch.randn(batch, tokens, 2048))


CASES = (
    *(RooflineCase(f"linear-b1-t{t}", partial(linear, t), 1.05, "8 x Linear(1024, 1024)") for t in (4096, 16384, 65536, 262144)),
    *(RooflineCase(f"gpt2-b1-t{t}", partial(gpt2, 1, t), 1.05, "GPT-2, 124 M") for t in (4096, 8192, 16384, 32768)),
    RooflineCase("gpt2-b8-t1024", partial(gpt2, 8, 1024), 1.20, "GPT-2, 124 M"),
    RooflineCase("vit-b64", partial(vit, 64), 1.15, "ViT-B/16, 224 pixels"),
    RooflineCase("llama-block-b4-t2048", partial(llama_block, 4, 2048), 1.10, "a block of Llama-3.2-1B"),
)


@dataclass(frozen=True)
class RooflineRow:
    """Seconds and bytes of both steps. `added`: microseconds by term, private minus non-private."""

    case: str
    description: str
    seconds: float
    baseline_seconds: float
    peak_bytes: int
    baseline_peak_bytes: int
    flops: int
    baseline_flops: int
    nbytes: int
    baseline_nbytes: int
    launches: int
    baseline_launches: int
    target: float
    memory_target: float
    added: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.seconds / self.baseline_seconds

    @property
    def memory_ratio(self) -> float:
        return self.peak_bytes / self.baseline_peak_bytes


def predict(case: RooflineCase, dtype: torch.dtype = torch.bfloat16) -> RooflineRow:
    """The row of one case. Takes seconds to minutes: it compiles both steps."""
    baseline, private = (_generated(case, c, dtype) for c in (NonPrivate("inductor", compiled=True), Ours("flashnorm")))
    before, after = _work(baseline), _work(private)
    return RooflineRow(
        case.name,
        case.description,
        private.seconds(private.calls),
        baseline.seconds(baseline.calls),
        private.peak_bytes,
        baseline.peak_bytes,
        sum(work.flops for work in after),
        sum(work.flops for work in before),
        sum(work.nbytes for work in after),
        sum(work.nbytes for work in before),
        len(after),
        len(before),
        case.target,
        MEMORY_TARGET,
        added_by_term(before, after),
    )


def _generated(case: RooflineCase, contender: Contender, dtype: torch.dtype) -> Generated:
    with fake_problem(case.build, dtype) as problem, hopper(DEVICE, go_on=True) as generated:
        contender.prepare(problem, Privacy()).backward()
    return generated


def _work(generated: Generated) -> list[Work]:
    return [work for one in generated.calls for work in one.work]


def added_by_term(before: Sequence[Work], after: Sequence[Work]) -> dict[str, float]:
    """Microseconds that the private step adds: launches of their own, then each kind of kernel without its launch."""
    launch = peaks_named(DEVICE).launch
    terms: collections.Counter[str] = collections.Counter()
    for sign, works in ((1, after), (-1, before)):
        terms["launches"] += sign * launch * len(works)  # type: ignore[assignment]
        for work in works:
            terms[_term(work)] += sign * (work.seconds(peaks_named(DEVICE)) - launch)  # type: ignore[assignment]
    return {term: round(1e6 * seconds, 1) for term, seconds in terms.most_common() if abs(seconds) > 1e-8}


def _term(work: Work) -> str:
    """What a kernel does: an operator of ours, matrix products and attention, or what Inductor fused."""
    if "flashnorm." in work.name:
        return work.name.split("flashnorm.")[-1].split(".")[0]
    return "products" if work.flops else "fused by Inductor"


def rows_of(names: Sequence[str], jobs: int) -> Iterator[RooflineRow]:
    """Rows in the order of CASES."""
    cases = [case for case in CASES if not names or case.name in names]
    if jobs == 1:
        yield from map(predict, cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_predict_named, [case.name for case in cases])


def _predict_named(name: str) -> RooflineRow:
    return predict(next(case for case in CASES if case.name == name))


def table(rows: Sequence[RooflineRow]) -> str:
    """Markdown."""
    lines = ["| case | time | target | memory | private ms | non-private ms | largest terms (us) |", "| --- " * 7 + "|"]
    for row in rows:
        missed = " **missed**" if row.ratio > row.target else ""
        over = " **over**" if row.memory_ratio > row.memory_target else ""
        terms = ", ".join(f"{term} {us:.0f}" for term, us in sorted(row.added.items(), key=lambda pair: -abs(pair[1]))[:4])
        lines.append(
            f"| {row.case} | {row.ratio:.3f}{missed} | {row.target:.2f} | {row.memory_ratio:.3f}{over} "
            f"| {1e3 * row.seconds:.3f} | {1e3 * row.baseline_seconds:.3f} | {terms} |"
        )
    return "\n".join(lines)


def write(rows: Sequence[RooflineRow], path: Path) -> None:
    """The rows as JSON; those of other cases that were written the same day under the same versions stay. The file is replaced
    whole: a kill loses nothing."""
    found: dict[str, Any] = {
        "device": dataclasses.asdict(peaks_named(DEVICE)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "precision": "bfloat16",
    }
    kept = json.loads(path.read_text()) if path.exists() else {}
    alike = all(kept.get(key) == value for key, value in found.items())
    by_case = {row["case"]: row for row in kept["rows"]} if alike else {}
    by_case |= {row.case: dataclasses.asdict(row) | {"ratio": row.ratio, "memory_ratio": row.memory_ratio} for row in rows}
    found["rows"] = [by_case[case.name] for case in CASES if case.name in by_case]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(partial_file, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all if none are given")
    parser.add_argument("--out", type=Path, help="folder for roofline.json")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("flashnorm_compile").setLevel(logging.ERROR)
    rows = []
    for row in rows_of(arguments.cases, arguments.jobs):
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.out:
        write(rows, arguments.out / "roofline.json")


if __name__ == "__main__":
    main()
