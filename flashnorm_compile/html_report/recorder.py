"""Captures what the report page shows: the plan, and the joint graph at each stage of the backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..dump import plan_rows
from ..explain import Report, explain_observed
from ..options import Options
from ..passes.private_pass import Outcome
from .nodes import GraphNode, read_graph
from .rewriting import MarkedNode, compare, unchanged


@dataclass
class _Recorder:
    """An observer that keeps the graph of each stage as rows."""

    stages: dict[str, list[GraphNode]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    def __call__(self, stage: str, graph: fx.Graph, outcome: Outcome | None) -> None:
        self.stages[stage] = read_graph(graph, outcome)
        if outcome is not None:
            self.parameters = [row["name"] for row in plan_rows(outcome)]


def record(
    model: Any, inputs: Sequence[Any], keywords: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Report, list[MarkedNode]]:
    """Captures ``model(*inputs, **keywords)`` and returns the report of ``explain`` with the graph that it is about.

    A refused model gives the graph as far as it was typed. Raises as ``explain``.
    """
    recorder = _Recorder()
    report = explain_observed(model, inputs, keywords or {}, Options.parse(options), (recorder,))
    stages = recorder.stages
    if "after" not in stages:
        return report, unchanged(stages.get("typed") or stages.get("before") or [])
    return report, compare(stages["before"], stages["typed"], stages["after"], recorder.parameters)
