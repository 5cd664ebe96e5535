"""Sharded training on real gloo ranks: gradients, noise and refusals. All scenarios run in one set of processes."""

from __future__ import annotations

from typing import Any

import gloo
import gloo_parallel
import gloo_scenarios
import pytest

SCENARIOS = [*gloo_scenarios.SCENARIOS, *gloo_parallel.SCENARIOS]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Any]]:
    return gloo.run(4, SCENARIOS)


@pytest.mark.timeout(900)  # the first one starts the processes and waits for all scenarios
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_on_four_ranks(outcomes: dict[str, list[Any]], scenario: str) -> None:
    failures = {rank: told for rank, told in enumerate(outcomes[scenario]) if told is not None}
    assert not failures, "\n".join(f"rank {rank}:\n{told}" for rank, told in failures.items())
