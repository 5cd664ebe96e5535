"""Llama-13B on 4 GPUs, Llama-70B on 64 and on 1024, on paper: memory, messages and time of a step, with and without privacy.

    python -m benchmarks.scale --out benchmarks/results/scale/DATE

One rank's code is generated for models of few blocks (`benchmarks.hopper`): fake ranks, fake tensors, nothing runs or is sent.
Blocks are alike, so two depths give the cost of a block and of the ends, and with them any depth; a third depth is generated to
check that. All of it is exact but the highest memory: in a deeper model another moment may be the highest one, so what is shown is
the least that it can be. Times are rooflines of the generated kernels and of NCCL's rings (`benchmarks.network`), on two queues
(`benchmarks.overlap`), with AdamW over the shards. Parameters and reductions are mixed precision: bfloat16 and float32.

The private step takes ghost norms everywhere, whatever the planner would choose at a depth: they hold the least, and the code of
a block then does not depend on how many there are. Kinds of clipping differ at run time only: they have one graph, in which all
clip factors are made at once, so flat and per-layer clipping cost the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import flashnorm_compile
from benchmarks.case import Problem
from benchmarks.hopper.device import PROPERTIES
from benchmarks.hopper.estimate import peaks_named
from benchmarks.hopper.sharded import StepAmounts, pretended_ranks, step_amounts
from benchmarks.machine import today, versions
from benchmarks.models.llama import Llama
from benchmarks.network import NETWORKS, wire_bytes
from benchmarks.overlap import Block, Overlapped, overlapped
from benchmarks.suites.problems import next_token

DEPTHS = (2, 3, 4)
"""Two that are extrapolated, and one to check it."""
NON_PRIVATE, FLAT, PER_LAYER = "non-private", "flat", "per-layer"
CLIPPINGS = (NON_PRIVATE, FLAT, PER_LAYER)
OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "norm_algorithm": "ghost"}
FLOAT32 = 4


@dataclass(frozen=True)
class ScaleCase:
    """`mesh`: (shards,), or (copies, shards). `targets`: least throughput, of the non-private step's, by kind of clipping."""

    name: str
    description: str
    device: str
    mesh: tuple[int, ...]
    layers: int
    build: Callable[[int], Problem]
    targets: dict[str, float]

    @property
    def shard_ranks(self) -> range:
        """Those that share rank 0's parameters: neighbours."""
        return range(self.mesh[-1])

    @property
    def copy_ranks(self) -> range:
        """Those that hold what rank 0 holds."""
        return range(0, math.prod(self.mesh), self.mesh[-1])


def llama(width: int, heads: int, key_heads: int, mlp_width: int, batch: int, tokens: int, layers: int) -> Problem:
    """Llama 2 (Touvron et al. 2023, table 1 and its models' configurations), untied, 32000 words."""
    return next_token(Llama(32000, width, layers, heads, key_heads, mlp_width, 10000.0, tied=False), 32000, batch, tokens)


_70B = partial(llama, 8192, 64, 8, 28672, 3, 1024)
CASES = (
    ScaleCase("llama-13b-4", "13B, FSDP 4, B 2, T 1024", "A100", (4,), 40, partial(llama, 5120, 40, 40, 13824, 2, 1024),
              {FLAT: 0.92, PER_LAYER: 0.95}),
    ScaleCase("llama-70b-64", "70B, FSDP 64, B 3, T 1024", "H200", (64,), 80, _70B, {}),
    ScaleCase("llama-70b-1024", "70B, HSDP 16 x 64, B 3, T 1024", "H200", (16, 64), 80, _70B, {}),
)  # fmt: skip


def shard_by_block(model: nn.Module, mesh: DeviceMesh) -> None:
    """Computes in bfloat16, reduces in float32; logits in float32."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.decoder.layers:  # type: ignore[union-attr]
        flashnorm_compile.fully_shard(block, mesh=mesh, mp_policy=policy)
    flashnorm_compile.fully_shard(model, mesh=mesh, mp_policy=dataclasses.replace(policy, output_dtype=torch.float32))


def traced(case: ScaleCase, private: bool, layers: int) -> StepAmounts:
    """What the case costs with so many blocks. Takes a fraction of a minute."""
    options = OPTIONS if private else None
    with pretended_ranks(case.mesh) as mesh:
        return step_amounts(partial(case.build, layers), partial(shard_by_block, mesh=mesh), case.device, options)


@dataclass(frozen=True)
class Traces:
    """A step at two depths that differ by one block, and at one more."""

    two: StepAmounts
    three: StepAmounts
    four: StepAmounts | None = None

    def at(self, layers: int) -> StepAmounts:
        return self.two.extrapolated(self.three, layers - DEPTHS[0])

    @property
    def block(self) -> StepAmounts:
        return self.at(1).minus(self.at(0))

    @property
    def error(self) -> float | None:
        """The largest relative difference of the step at the third depth from its extrapolation."""
        if self.four is None:
            return None
        predicted, found = vars(self.at(DEPTHS[2])), vars(self.four)
        return max(abs(found[name] - predicted[name]) / max(abs(found[name]), 1e-30) for name in found if predicted[name])


@dataclass(frozen=True)
class ScaleRow:
    """One rank, one step. Bytes and seconds. `saved_bytes`: kept by the forward. `clip_bytes`: held when the clip factors are made,
    which is what the clipped sums read: A and G of every layer. `peak_bytes`: the least that the peak can be, with the shards of
    parameters, all gradients and optimizer state, and the next block's parameters in the message and in the place that they are
    copied to. `gather_bytes`, `scatter_bytes`, `reduce_bytes`: what the rank sends, by kind of collective. `waiting_...`:
    seconds of the step in which nothing is computed. `throughput`: of the non-private step's.
    `extrapolation_error`: relative, of all amounts at the third depth."""

    case: str
    description: str
    clipping: str
    device: str
    ranks: int
    parameter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    saved_bytes: float
    clip_bytes: float
    peak_bytes: float
    device_bytes: float
    gather_bytes: float
    scatter_bytes: float
    reduce_bytes: float
    collectives: float
    compute_seconds: float
    waiting_for_gathers: float
    waiting_for_reductions: float
    seconds: float
    throughput: float
    target: float | None
    extrapolation_error: float | None

    @property
    def sent_bytes(self) -> float:
        return self.gather_bytes + self.scatter_bytes + self.reduce_bytes

    @property
    def missed(self) -> bool:
        return self.target is not None and self.throughput < self.target


def blocks_of(case: ScaleCase, traces: Traces) -> list[Block]:
    """The embedding, the blocks, the head. The ends' parameters are halved between the two, all that they compute is the head's."""
    ends, block = traces.at(0), traces.block
    embedding = Block(gather=_ring(case, ends.gathered_bytes / 2), reduce=_reduction(case, ends, 0.5))
    head = dataclasses.replace(_block(case, ends), gather=embedding.gather, reduce=embedding.reduce)
    return [embedding, *[_block(case, block)] * case.layers, head]


def _block(case: ScaleCase, amounts: StepAmounts) -> Block:
    return Block(
        gather=_ring(case, amounts.gathered_bytes),
        forward=amounts.forward_seconds,
        again=_ring(case, amounts.gathered_again_bytes),
        backward=amounts.backward_seconds,
        clipped=amounts.clipped_seconds,
        reduce=_reduction(case, amounts),
    )


def _ring(case: ScaleCase, nbytes: float) -> float:
    return NETWORKS[case.device].seconds(nbytes, case.shard_ranks)


def _reduction(case: ScaleCase, amounts: StepAmounts, share: float = 1.0) -> float:
    """A shard's reduce-scatter, and its all-reduce over the copies."""
    copies = NETWORKS[case.device].seconds(share * amounts.reduced_bytes, case.copy_ranks)
    return _ring(case, share * amounts.scattered_bytes) + 2 * copies


def adamw_seconds(shard_elements: float, device: str) -> float:
    """Fused, all in float32: parameter, gradient and two moments are read, all but the gradient are written."""
    return 7 * FLOAT32 * shard_elements / peaks_named(device).bandwidth


def step_of(case: ScaleCase, private: bool, traces: Traces) -> Overlapped:
    """The step with its optimizer."""
    step = overlapped(blocks_of(case, traces), one_norm=private)
    update = adamw_seconds(traces.at(case.layers).parameters / len(case.shard_ranks), case.device)
    return dataclasses.replace(step, seconds=step.seconds + update)


def rows_of(case: ScaleCase, found: dict[bool, Traces]) -> list[ScaleRow]:
    """The non-private row first. `found`: by whether the step is private."""
    plain = step_of(case, False, found[False])
    return [_row(case, clipping, found[clipping != NON_PRIVATE], plain) for clipping in CLIPPINGS]


def _row(case: ScaleCase, clipping: str, traces: Traces, plain: Overlapped) -> ScaleRow:
    amounts, step = traces.at(case.layers), step_of(case, clipping != NON_PRIVATE, traces)
    shard = FLOAT32 * amounts.parameters / len(case.shard_ranks)
    shards, copies = len(case.shard_ranks), len(case.copy_ranks)
    return ScaleRow(
        case=case.name,
        description=case.description,
        clipping=clipping,
        device=case.device,
        ranks=math.prod(case.mesh),
        parameter_bytes=shard,
        gradient_bytes=shard,
        optimizer_bytes=2 * shard,
        saved_bytes=amounts.saved_bytes,
        clip_bytes=amounts.clip_bytes,
        peak_bytes=4 * shard + amounts.working_bytes + 2 * traces.block.gathered_bytes,
        device_bytes=PROPERTIES[case.device].total_memory,
        gather_bytes=wire_bytes(amounts.gathered_bytes + amounts.gathered_again_bytes, shards),
        scatter_bytes=wire_bytes(amounts.scattered_bytes, shards),
        reduce_bytes=2 * wire_bytes(amounts.reduced_bytes, copies),
        collectives=amounts.gathers + amounts.gathers_again + amounts.reductions,
        compute_seconds=amounts.seconds,
        waiting_for_gathers=step.waiting_for_gathers,
        waiting_for_reductions=step.waiting_for_reductions,
        seconds=step.seconds,
        throughput=plain.seconds / step.seconds,
        target=case.targets.get(clipping),
        extrapolation_error=traces.error,
    )


def traces_of(cases: Sequence[ScaleCase], jobs: int) -> dict[str, dict[bool, Traces]]:
    """By case, and whether the step is private. The third depth is generated for the first case. What takes longest comes first."""
    wanted = [(case, private, layers) for case in cases for private in (False, True) for layers in DEPTHS[:2]]
    wanted += [(cases[0], private, DEPTHS[2]) for private in (False, True)]
    wanted.sort(key=lambda one: (one[1], one[2]), reverse=True)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        amounts = dict(zip([(c.name, private, layers) for c, private, layers in wanted], pool.map(_traced, wanted), strict=True))

    def traces(name: str, private: bool) -> Traces:
        two, three = (amounts[name, private, layers] for layers in DEPTHS[:2])
        return Traces(two, three, amounts.get((name, private, DEPTHS[2])))

    return {case.name: {private: traces(case.name, private) for private in (False, True)} for case in cases}


def _traced(wanted: tuple[ScaleCase, bool, int]) -> StepAmounts:
    return traced(*wanted)


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def table(rows: Sequence[ScaleRow]) -> str:
    """Markdown: memory in GB, bytes sent in GB, times in ms."""
    names = ["case", "step", "throughput", "target", "ms", "computing", "waiting: gathers", "reductions", "GB sent: gathers",
             "reduce-scatters", "all-reduces", "GB held: shards", "saved", "at the clip", "peak, at least"]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for row in rows:
        target = "" if row.target is None else f"{row.target:.2f}"
        missed = " **missed**" if row.missed else ""
        over = " **over**" if row.peak_bytes > row.device_bytes else ""
        shards = row.parameter_bytes + row.gradient_bytes + row.optimizer_bytes
        times = (row.seconds, row.compute_seconds, row.waiting_for_gathers, row.waiting_for_reductions)
        sizes = (row.gather_bytes, row.scatter_bytes, row.reduce_bytes, shards, row.saved_bytes, row.clip_bytes, row.peak_bytes)
        cells = [f"{row.description} ({row.device})", row.clipping, f"{row.throughput:.3f}{missed}", target]
        cells += [f"{1e3 * seconds:.1f}" for seconds in times] + [f"{nbytes / 1e9:.1f}" for nbytes in sizes]
        lines.append(f"| {' | '.join(cells)}{over} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases; all if none are given")
    parser.add_argument("--out", type=Path, help="folder for scale.json")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.cases or case.name in arguments.cases]
    found = traces_of(cases, arguments.jobs)
    rows = [row for case in cases for row in rows_of(case, found[case.name])]
    print(table(rows))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "scale.json").write_text(json.dumps(results(cases, rows), indent=1) + "\n")


def results(cases: Sequence[ScaleCase], rows: Sequence[ScaleRow]) -> dict[str, Any]:
    """What the file holds: rows, and the figures that they were computed with."""
    devices = {case.device for case in cases}
    return {
        "date": today(),
        **versions(),
        "devices": {name: dataclasses.asdict(peaks_named(name)) for name in sorted(devices)},
        "networks": {name: dataclasses.asdict(NETWORKS[name]) for name in sorted(devices)},
        "depths": DEPTHS,
        "rows": [dataclasses.asdict(row) | {"sent_bytes": row.sent_bytes} for row in rows],
    }


if __name__ == "__main__":
    main()
