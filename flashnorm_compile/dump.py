"""What a compilation leaves behind for people: files under ``FLASHNORM_DUMP``, log records, and tlparse artifacts."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._logging import trace_structured

from . import config
from .passes.graph_spec import GraphSpec
from .passes.private_pass import Observer, Outcome
from .passes.type_samples import META_KEY

log = logging.getLogger(__name__)
_numbers = itertools.count()


def wanted() -> bool:
    """Whether graphs are written to a directory; compiled graphs are not taken from a cache then."""
    return bool(config.dump)


def observers(spec: GraphSpec) -> tuple[Observer, ...]:
    """One observer that writes, logs and traces each stage of one compilation."""
    number = next(_numbers)

    def show(stage: str, graph: fx.Graph, outcome: Outcome | None) -> None:
        if outcome is not None:
            rows = plan_rows(outcome)
            for row in rows:
                log.info("%s: %s (%s): %s", row["name"], row["algorithm"], row["frontier"], row["why"])
            _emit(
                f"plan_{number}",
                "json",
                lambda: json.dumps({"batch": str(outcome.batch), "parameters": rows}, indent=1),
            )
        _emit(f"joint_{number}_{stage}", "txt", lambda: graph_text(graph))

    return (show,)


def _emit(name: str, suffix: str, text: Any) -> None:
    made = ""
    if config.dump:
        made = text()
        folder = Path(config.dump)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{name}.{suffix}"  # a run that is killed leaves no half of a graph
        draft.write_text(made)
        draft.replace(folder / f"{name}.{suffix}")
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", name, made or text())
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"flashnorm_{name}", "encoding": "json" if suffix == "json" else "string"},
        payload_fn=lambda: made or text(),
    )


def graph_text(graph: fx.Graph) -> str:
    """One line per node: name, shape, sample type, operator, arguments."""
    lines = []
    for node in graph.nodes:
        value = node.meta.get("val")
        shape = str(tuple(value.shape)) if isinstance(value, torch.Tensor) else ""
        kind = node.meta.get(META_KEY, "")
        lines.append(f"%{node.name} {shape} : {kind} = {node.target} {node.args} {node.kwargs or ''}".rstrip())
    return "\n".join(lines) + "\n"


def plan_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """The plan as plain values, a row per trainable parameter."""
    rows = []
    for plan in outcome.plan.parameters:
        node = plan.gradient.node
        rows.append(
            {
                "name": plan.name,
                "shape": [str(s) if not isinstance(s, int) else s for s in node.meta["val"].shape] if node is not None else None,
                "frontier": plan.kind,
                "uses": len(plan.gradient.uses),
                "algorithm": plan.chosen,
                "why": plan.why,
                "flops": _number(plan.cost.flops),
                "bytes_moved": _number(plan.cost.traffic),
                "bytes_held": _number(plan.cost.held),
                "predicted_us": 1e6 * plan.seconds,
                "considered": {other.algorithm: 1e6 * other.seconds for other in plan.considered},
            }
        )
    return rows


def _number(value: Any) -> int | str:
    return round(float(value)) if value.is_number else str(value)
