"""Scale on paper: what a rank sends, holds and waits for, from generated code of pretended ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="Inductor's code for a GPU needs the triton package")
if torch.cuda.is_available():
    pytest.skip("code is generated for a pretended GPU", allow_module_level=True)

from benchmarks.case import Problem
from benchmarks.network import ATTAINED, NETWORKS, START, STEP_BETWEEN_NODES, STEP_IN_NODE
from benchmarks.overlap import Block, Overlapped, overlapped
from benchmarks.scale import CASES, FLAT, PER_LAYER, ScaleCase, StepAmounts, Traces, rows_of, table, traced
from benchmarks.suites.problems import regression

WIDTH, TOKENS, SHARDS, COPIES = 64, 32, 4, 2


class Stack(nn.Module):
    """A first and a last layer, and equal ones between."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.decoder.layers:
            x = F.gelu(layer(x))
        return self.last(x)


def stack(layers: int) -> Problem:
    return regression(Stack(layers), torch.randn(2, TOKENS, WIDTH))


CASE = ScaleCase("stack", "a stack", "H200", (COPIES, SHARDS), 10, stack, {FLAT: 0.5})


@pytest.fixture(scope="module")
def found() -> dict[bool, Traces]:
    private = [traced(CASE, True, layers) for layers in (2, 3, 4)]
    plain = [traced(CASE, False, layers) for layers in (2, 3)]
    return {False: Traces(*plain), True: Traces(*private)}


def test_two_depths_give_every_other(found: dict[bool, Traces]) -> None:
    """Blocks are alike: nothing of the code depends on how many there are, but the table of noise keys that every draw reads."""
    exact = ("gathers", "reductions", "gathered_bytes", "scattered_bytes", "reduced_bytes", "flops", "saved_bytes", "clip_bytes")
    predicted, four = found[True].at(4), found[True].four
    assert [getattr(predicted, name) for name in exact] == [getattr(four, name) for name in exact]
    assert all(getattr(four, name) for name in exact)
    for name in ("forward_seconds", "backward_seconds", "clipped_seconds", "working_bytes"):
        assert getattr(predicted, name) == pytest.approx(getattr(four, name), rel=1e-3), name


def test_privacy_sends_what_training_sends(found: dict[bool, Traces]) -> None:
    plain, private = (found[clipped].at(10) for clipped in (False, True))
    for name in (
        "gathers",
        "gathers_again",
        "reductions",
        "gathered_bytes",
        "gathered_again_bytes",
        "scattered_bytes",
        "reduced_bytes",
    ):
        assert getattr(plain, name) == getattr(private, name), name
    elements = 12 * (WIDTH * WIDTH + WIDTH)
    assert private.parameters == elements
    # One gather in bfloat16 for each parameter and direction (biases, and the first weight, are not needed again), one reduction
    # in float32, of which a shard goes over the copies.
    assert (private.gathers, private.gathers_again, private.reductions) == (24, 11, 24)
    assert private.gathered_bytes == 2 * elements
    assert private.gathered_again_bytes == 2 * 11 * WIDTH * WIDTH
    assert private.scattered_bytes == 4 * elements
    assert private.reduced_bytes == 4 * elements / SHARDS
    rows = rows_of(CASE, found)
    assert [row.gather_bytes for row in rows] == [(SHARDS - 1) / SHARDS * (2 * elements + 22 * WIDTH * WIDTH)] * 3
    assert [row.scatter_bytes for row in rows] == [(SHARDS - 1) / SHARDS * 4 * elements] * 3
    assert [row.reduce_bytes for row in rows] == [2 * (COPIES - 1) / COPIES * elements] * 3


def test_memory_beside_the_non_private_step(found: dict[bool, Traces]) -> None:
    plain, private, _ = rows_of(CASE, found)
    assert plain.clip_bytes == 0
    # A and G of twelve layers, bfloat16, at least.
    assert private.clip_bytes >= 2 * 12 * (2 * TOKENS * WIDTH) * 2
    assert plain.parameter_bytes == private.parameter_bytes == plain.optimizer_bytes / 2 == 12 * (WIDTH**2 + WIDTH)
    assert plain.peak_bytes > 4 * plain.parameter_bytes + plain.saved_bytes


def test_the_table_says_what_is_missed(found: dict[bool, Traces]) -> None:
    rows = rows_of(CASE, found)
    missed = dataclasses.replace(rows[1], throughput=0.4, peak_bytes=1e15)
    assert "| 0.400 **missed** | 0.50 |" in table([missed])
    assert "**over**" in table([missed])
    assert "**" not in table(rows)
    assert rows[0].throughput == 1.0


def test_overlap_by_hand() -> None:
    """Gathers of 2 hide behind forwards of 3 but the first; a reduction of 5 behind a backward of 4 does not quite."""
    blocks = [Block(gather=2, forward=3, again=1, backward=4, reduce=5)] * 2
    # Forward 2..5..8; backward 8..12..16, its gathers are there at 6 and 9; reductions 12..17..22.
    assert overlapped(blocks, one_norm=False) == Overlapped(22, 2, 6)
    late = [dataclasses.replace(block, clipped=3) for block in blocks]
    # Backward 8..16 as before, clipped sums 16..19..22, reductions 19..24..29.
    assert overlapped(late, one_norm=True) == Overlapped(29, 2, 7)
    at_once = overlapped(late, one_norm=False)
    assert at_once.seconds < 29
    assert overlapped([Block(forward=1, backward=2)], one_norm=False) == Overlapped(3, 0, 0)


def test_rings() -> None:
    network = NETWORKS["H200"]
    inside = network.seconds(8e9, range(8))
    assert inside == pytest.approx(START + 7 * STEP_IN_NODE + 7e9 / (ATTAINED * 450e9))
    # 64 neighbours fill eight nodes, whose adapters are all used; copies that lie 64 apart have one each.
    assert network.ring(range(64)) == (ATTAINED * 400e9, pytest.approx(56 * STEP_IN_NODE + 7 * STEP_BETWEEN_NODES))
    assert network.ring(range(0, 1024, 64))[0] == ATTAINED * 50e9
    assert network.seconds(1e9, range(1)) == network.seconds(0.0, range(8)) == 0.0


def test_the_cases_are_those_of_the_targets() -> None:
    assert [(case.name, case.mesh, case.layers) for case in CASES] == [
        ("llama-13b-4", (4,), 40),
        ("llama-70b-64", (64,), 80),
        ("llama-70b-1024", (16, 64), 80),
    ]
    assert CASES[0].targets == {FLAT: 0.92, PER_LAYER: 0.95}
    assert CASES[2].copy_ranks == range(0, 1024, 64)


def test_amounts_are_linear_in_depth() -> None:
    def amounts(*numbers: float) -> StepAmounts:
        fields = [field.name for field in dataclasses.fields(StepAmounts)]
        return StepAmounts(**dict.fromkeys(fields, 0.0) | dict(zip(("flops", "saved_bytes"), numbers, strict=True)))

    traces = Traces(amounts(10, 7), amounts(13, 9), amounts(16, 12))
    assert (traces.at(40).flops, traces.at(40).saved_bytes) == (10 + 38 * 3, 7 + 38 * 2)
    assert (traces.block.flops, traces.at(0).flops) == (3, 4)
    assert traces.error == pytest.approx(1 / 12)
