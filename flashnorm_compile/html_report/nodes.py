"""A joint graph as plain rows that outlive it: one ``GraphNode`` per node, read from FX or from a dumped text file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors as aot

from ..passes.private_pass import Outcome
from ..passes.refusal import module_path, source_line
from ..passes.type_samples import META_KEY

INPUT = "input"
_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}
_DUMPED = re.compile(r"^%(?P<name>\S+) (?P<value>\(.*?\))? ?: (?P<kind>.*?) ?= (?P<operator><.*?>|\S+) (?P<arguments>.*)$")


@dataclass(frozen=True)
class GraphNode:
    """One node. ``kind``: its sample type as text, "" before typing. ``arguments``: as FX prints them."""

    name: str
    value: str
    kind: str
    operator: str
    arguments: str
    module: str = ""
    module_class: str = ""
    source: str = ""
    backward: bool = False
    label: str = ""
    """What a placeholder is: the parameter's name."""

    def reads(self) -> list[str]:
        """Words of the arguments, in order, repeats included: among them the names of the nodes that it reads."""
        return re.findall(r"[A-Za-z_]\w*", self.arguments)


def read_graph(graph: fx.Graph, outcome: Outcome | None = None) -> list[GraphNode]:
    """The nodes of a joint graph in order, each with its module and the user's source line where they are known."""
    with_trace = _twins(graph, "stack_trace")
    with_module = _twins(graph, "nn_module_stack", "fwd_nn_module_stack")
    parameters = _parameter_names(graph, outcome)
    lines: dict[str, str] = {}
    rows = []
    for node in graph.nodes:
        owner = node if node.meta.get("nn_module_stack") else with_module.get(node.meta.get("seq_nr"), node)
        path, _, module_class = module_path(owner).partition(" (") if _has_module(owner) else ("", "", "")
        traced = node if node.meta.get("stack_trace") else with_trace.get(node.meta.get("seq_nr"))
        trace = traced.meta["stack_trace"] if traced is not None else ""
        if traced is not None and trace not in lines:
            lines[trace] = source_line(traced)
        rows.append(
            GraphNode(
                name=node.name,
                value=_value(node.meta.get("val")),
                kind=_kind(node.meta.get(META_KEY, "")),
                operator=INPUT if node.op == "placeholder" else _operator(str(node.target)),
                arguments=f"{node.args} {node.kwargs or ''}".rstrip(),
                module=path,
                module_class=module_class.rstrip(")"),
                source=lines.get(trace, ""),
                backward="backward" in str(node.meta.get("partitioner_tag", "")),
                label=parameters.get(node.name, ""),
            )
        )
    return rows


def parse_dump(text: str) -> list[GraphNode]:
    """The nodes of a graph that ``FLASHNORM_DUMP`` wrote.

    Raises:
        ValueError: a line is not of that form.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        found = _DUMPED.match(line)
        if found is None:
            raise ValueError(f"line {number} is not a node as FLASHNORM_DUMP writes it: {line[:80]!r}")
        name, value, kind, operator, arguments = (part or "" for part in found.groups())
        rows.append(GraphNode(name, value, kind, _operator(operator), arguments))
    return rows


def _operator(target: str) -> str:
    """Python's own functions by their name alone: ``getitem``."""
    return target.removeprefix("<built-in function ").removesuffix(">") if target.startswith("<built-in") else target


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return ", ".join(_value(part) for part in value)
    return "" if value is None else str(value)


def _kind(kind: str | tuple[str, ...]) -> str:
    """A node with several results has a type for each."""
    return kind if isinstance(kind, str) else ", ".join(dict.fromkeys(kind))


def _twins(graph: fx.Graph, *keys: str) -> dict[Any, fx.Node]:
    """By sequence number, the first node that carries one of these meta entries: a backward node has its forward one's."""
    found: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        number = node.meta.get("seq_nr")
        if number is not None and any(node.meta.get(key) for key in keys):
            found.setdefault(number, node)
    return found


def _has_module(node: fx.Node) -> bool:
    return bool(node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack"))


def _parameter_names(graph: fx.Graph, outcome: Outcome | None) -> dict[str, str]:
    """Placeholder -> the name of the parameter that it stands for, by way of the gradient that the graph returns for it."""
    if outcome is None:
        return {}
    descriptors = graph.output_node().meta.get("desc") or ()
    inputs = {}
    for plan in outcome.plan.parameters:
        desc = descriptors[plan.gradient.output] if plan.gradient.output < len(descriptors) else None
        if isinstance(desc, aot.GradAOTOutput):
            inputs[desc.grad_of] = plan.name
    return {node.name: inputs.get(node.meta.get("desc"), "") for node in graph.find_nodes(op="placeholder")}
