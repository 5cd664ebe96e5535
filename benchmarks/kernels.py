"""Each kernel of `templates` against the composition of cuBLAS and ATen operators that it stands for. Only on a CUDA device.

    python -m benchmarks.kernels --out benchmarks/results/kernels/DATE

Time is the median over repeated launches, with a cold L2 cache. FLOPs and bytes are those that the operation needs (each operand
and result once), for the kernel and the composition alike; the share of peak is the roofline's time over the measured one. Kernels
are compiled beforehand, in several processes at once. A contest that fails is a row with its error, and rows are written as they
come.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flashnorm_compile.passes.peaks import Peaks, peaks_of
from flashnorm_compile.templates import (  # noqa: F401  (registers the operators)
    clipped_sum,
    clipped_sums,
    embedding_norm,
    flash_norm,
    ghost_norm,
    many_gradients,
    noise,
    per_layer,
    tied_cross_term,
    weight_grads,
    weighted_sum,
)
from flashnorm_compile.templates.flops import FORMULAS
from torch import Tensor

from benchmarks.hopper.estimate import roofline
from benchmarks.machine import device_name, today, versions
from benchmarks.runner import first_line

ops = torch.ops.flashnorm
# B, T, p, d of GPT-2 (B 1 and 8), ViT-B/16 (B 64), a Llama-3.2-1B block (B 4) and 8 x Linear(1024, 1024).
SHAPES = (
    (1, 1024, 2304, 768), (1, 4096, 3072, 768), (8, 1024, 2304, 768), (8, 1024, 768, 3072), (8, 4096, 768, 768),
    (64, 197, 768, 768), (64, 197, 3072, 768), (4, 2048, 8192, 2048), (4, 2048, 512, 2048), (1, 4096, 1024, 1024),
    (1, 65536, 1024, 1024),
)  # fmt: skip
# B, T, V, d of embeddings and tied heads.
TABLES = ((1, 1024, 50257, 768), (8, 1024, 50257, 768))


@dataclass(frozen=True)
class Contest:
    """One operation: `kernel` and `composition` compute the same from the same operands."""

    name: str
    shape: tuple[int, ...]
    kernel: Callable[[], Any]
    composition: Callable[[], Any]
    flops: float
    nbytes: float


@dataclass(frozen=True)
class KernelRow:
    """Milliseconds, TFLOP/s and GB/s of the kernel; `share_of_peak`: the roofline's time over the measured one. With an `error`
    what was not measured is None."""

    kernel: str
    shape: tuple[int, ...]
    dtype: str
    ms: float | None = None
    composition_ms: float | None = None
    tflops_per_s: float | None = None
    gbytes_per_s: float | None = None
    share_of_peak: float | None = None
    error: str | None = None


_BLOCKS = 8  # of a model, whose sums share a launch


def contests(dtype: torch.dtype, device: str) -> Iterator[Contest]:
    """Every kernel at its shapes; operands are made when a contest's turn comes."""
    for shape in SHAPES:
        yield from _products(shape, dtype, device)
    for table in TABLES:
        yield from _tables(table, dtype, device)


def _products(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[Contest]:
    batch, length, p, d = shape
    g, a = torch.randn(batch, length, p, dtype=dtype, device=device), torch.randn(batch, length, d, dtype=dtype, device=device)
    factors = torch.rand(batch, device=device) + 0.1
    keys, std = torch.arange(2 * 2, device=device).view(2, 2), torch.tensor(0.5, device=device)
    operands, weight = _nbytes(g, a), p * d
    flops = float(FORMULAS["weight_grads"](g.shape, a.shape))
    c = factors[:, None, None].to(dtype)

    def dense() -> Tensor:
        return torch.bmm(g.mT, a)

    yield Contest("flash_norm", shape, lambda: ops.flash_norm(g, a), lambda: _squares(dense()), flops, operands)
    ghost = float(FORMULAS["ghost_norm"](g.shape, a.shape))
    if batch * length**2 * 4 < 2**33:
        yield Contest(
            "ghost_norm", shape, lambda: ops.ghost_norm(g, a),
            lambda: (torch.bmm(g, g.mT).float() * torch.bmm(a, a.mT).float()).sum((1, 2)), ghost, operands,
        )  # fmt: skip
    yield Contest(
        "weight_grads", shape, lambda: ops.weight_grads(g, a, dtype), lambda: _squares(dense()), flops,
        operands + batch * weight * dtype.itemsize,
    )  # fmt: skip
    yield Contest(
        "clipped_sum", shape, lambda: ops.clipped_sum(g, a, factors), lambda: (g * c).flatten(0, 1).T @ a.flatten(0, 1), flops,
        operands + 4 * weight,
    )  # fmt: skip
    yield _sums_of_blocks(g, a, factors, flops)
    w = dense()
    stored = _nbytes(w)
    yield Contest(
        "weighted_sum_noise", shape, lambda: ops.weighted_sum_noise(w, factors, keys, std, 0, dtype),
        lambda: (w * c).sum(0, dtype=torch.float32).add_(torch.randn(p, d, device=device), alpha=0.5).to(dtype), 0.0,
        stored + weight * dtype.itemsize,
    )  # fmt: skip
    yield Contest("squared_norms", shape, lambda: ops.squared_norms([w]), lambda: _squares(w), 0.0, stored)
    total = torch.randn(p, d, device=device)
    yield Contest(
        "add_noise", shape, lambda: ops.add_noise(total, keys, std, 0, dtype),
        lambda: total.add(torch.randn_like(total), alpha=0.5).to(dtype), 0.0, weight * (4 + dtype.itemsize),
    )  # fmt: skip
    limit, scale = torch.ones((), device=device), torch.ones((), device=device)
    yield Contest(
        "per_layer", shape, lambda: ops.per_layer(g, a, limit, scale), lambda: _per_layer(dense()), flops, operands + 4 * weight
    )


def _sums_of_blocks(g: Tensor, a: Tensor, factors: Tensor, flops: float) -> Contest:
    """The same layer of several blocks."""
    gs, a_s, c = [g.clone() for _ in range(_BLOCKS)], [a.clone() for _ in range(_BLOCKS)], factors[:, None, None].to(g.dtype)
    shape = (*g.shape, a.shape[2])
    return Contest(
        "clipped_sums", shape, lambda: list(ops.clipped_sums(gs, a_s, factors[None], [0] * _BLOCKS)),
        lambda: [(g * c).flatten(0, 1).T @ a.flatten(0, 1) for g, a in zip(gs, a_s, strict=True)], _BLOCKS * flops,
        _BLOCKS * (_nbytes(g, a) + 4 * g.shape[2] * a.shape[2]),
    )  # fmt: skip


def _tables(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[Contest]:
    batch, length, vocabulary, d = shape
    h = torch.randn(batch, length, d, dtype=dtype, device=device)
    index = torch.randint(vocabulary, (batch, length), device=device)

    def scattered() -> Tensor:
        table = torch.zeros(batch, vocabulary, d, dtype=dtype, device=device)
        return _squares(table.scatter_add_(1, index[:, :, None].expand(-1, -1, d), h))

    yield Contest("embedding_norm", shape, lambda: ops.embedding_norm(h, index, vocabulary), scattered, 0.0, _nbytes(h, index))
    g = torch.randn(batch, length, vocabulary, dtype=dtype, device=device)
    a = torch.randn(batch, length, d, dtype=dtype, device=device)

    def cross() -> Tensor:
        rows = index[:, :, None].expand(-1, -1, length)
        return 2 * (torch.bmm(h, a.mT) * torch.gather(g.mT, 1, rows)).float().sum((1, 2))

    flops = float(FORMULAS["tied_cross_term"](h.shape, index.shape, g.shape, a.shape))
    gathered = 32 * batch * length**2  # a sector for each element of G
    yield Contest(
        "tied_cross_term", shape, lambda: ops.tied_cross_term(h, index, g, a), cross, flops, _nbytes(h, a, index) + gathered
    )


def _nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _squares(dense: Tensor) -> Tensor:
    return torch.linalg.vector_norm(dense.flatten(1), dim=1, dtype=torch.float32).square()


def _per_layer(dense: Tensor) -> Tensor:
    factors = (1 / _squares(dense).sqrt()).clamp(max=1.0)
    return (dense * factors[:, None, None].to(dense.dtype)).sum(0, dtype=torch.float32)


_SLEEP_CLOCKS = 4_000_000  # about 2 ms


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median time on the device of a call that finds nothing of its operands in L2.

    The device sleeps first, so that everything is queued before it begins: what Python takes to launch is not in the time.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    taken = []
    for number in range(-3, repeats):
        flush.zero_()
        torch.cuda._sleep(_SLEEP_CLOCKS)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 0:
            taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def row_of(contest: Contest, dtype: torch.dtype, peaks: Peaks, ms: float, composition_ms: float) -> KernelRow:
    """Rates from counted FLOPs and bytes."""
    seconds = ms / 1e3
    floor = roofline(peaks, contest.flops, contest.nbytes, dtype)
    return KernelRow(
        contest.name, contest.shape, str(dtype).removeprefix("torch."), ms, composition_ms, contest.flops / seconds / 1e12,
        contest.nbytes / seconds / 1e9, floor / seconds,
    )  # fmt: skip


def measure(contest: Contest, dtype: torch.dtype, peaks: Peaks, repeats: int) -> KernelRow:
    """The contest's row. Whatever one of its sides raises becomes the row's error."""
    try:
        return row_of(contest, dtype, peaks, median_ms(contest.kernel, repeats), median_ms(contest.composition, repeats))
    except Exception as error:  # the row tells it
        text = f"{type(error).__name__}: {first_line(error)}"
        return KernelRow(contest.name, contest.shape, str(dtype).removeprefix("torch."), error=text)


def compile_ahead(dtype: torch.dtype, processes: int) -> None:
    """Calls every kernel once, so that Triton's cache holds its code. What fails here fails again where it is measured."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_call_some, args=(dtype, number, processes)) for number in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _call_some(dtype: torch.dtype, number: int, processes: int) -> None:
    for place, contest in enumerate(contests(dtype, "cuda")):
        if place % processes == number:
            with contextlib.suppress(Exception):
                contest.kernel()
                torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for kernels.json")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile (%(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels runs on a CUDA device only: torch.cuda.is_available() is False.")
    dtype, peaks = getattr(torch, arguments.dtype), peaks_of(torch.device("cuda", torch.cuda.current_device()))
    compile_ahead(dtype, arguments.jobs)
    rows = []
    print(f"{'kernel':<20} {'shape':<24} {'ms':>8} {'ATen ms':>8} {'TFLOP/s':>8} {'GB/s':>7} share of peak")
    for contest in contests(dtype, "cuda"):
        rows.append(measure(contest, dtype, peaks, arguments.repeats))
        print(_line(rows[-1]), flush=True)
        if arguments.out:
            _write(rows, arguments.out)


def _line(row: KernelRow) -> str:
    name = f"{row.kernel:<20} {row.shape!s:<24}"
    if row.error:
        return f"{name} {row.error}"
    return f"{name} {row.ms:8.3f} {row.composition_ms:8.3f} {row.tflops_per_s:8.1f} {row.gbytes_per_s:7.0f} {row.share_of_peak:.0%}"


def _write(rows: list[KernelRow], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = {"device": device_name("cuda"), "versions": versions(), "date": today(), "rows": [dataclasses.asdict(r) for r in rows]}
    (folder / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
