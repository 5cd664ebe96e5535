"""Sharded training on real gloo ranks: gradients, noise and refusals. All scenarios run in one set of processes."""

from __future__ import annotations

import json
import os
from typing import Any

import gloo
import gloo_parallel
import gloo_scenarios
import pytest
from filelock import FileLock

SCENARIOS = [*gloo_scenarios.SCENARIOS, *gloo_parallel.SCENARIOS]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of one run, even where pytest-xdist has given the tests to several workers: each of them asks for it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return gloo.run(4, SCENARIOS)
    path = tmp_path_factory.getbasetemp().parent / f"four-ranks-{run}.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text(json.dumps(gloo.run(4, SCENARIOS)))
        return json.loads(path.read_text())  # type: ignore[no-any-return]


@pytest.mark.timeout(900)  # the first one starts the processes and waits for all scenarios
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_on_four_ranks(outcomes: dict[str, list[Any]], scenario: str) -> None:
    failures = {rank: told for rank, told in enumerate(outcomes[scenario]) if told is not None}
    assert not failures, "\n".join(f"rank {rank}:\n{told}" for rank, told in failures.items())
