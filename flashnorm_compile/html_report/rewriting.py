"""What the backend did to a joint graph: every node of the graph before and after, with a mark on what changed and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .nodes import GraphNode

Status = Literal["kept", "changed", "added", "removed"]

PREPARED = "fixed normalizer or normal form"
NORM = "per-sample norm"
FACTORS = "clip factors"
SUM = "clipped sum"
NOISE = "noise"
PARTS = (PREPARED, NORM, FACTORS, SUM, NOISE)


@dataclass(frozen=True)
class MarkedNode:
    """A node of the rewritten graph, or one that the rewriting removed.

    ``part``: what an added node computes, one of ``PARTS``. ``parameter``: for whose gradient, "" if for several.
    ``before``: the node as captured, where it was there.
    """

    node: GraphNode
    status: Status
    part: str = ""
    parameter: str = ""
    before: GraphNode | None = None


def compare(
    before: Sequence[GraphNode], typed: Sequence[GraphNode], after: Sequence[GraphNode], parameters: Sequence[str] = ()
) -> list[MarkedNode]:
    """Both graphs as one list in the order of execution; removed nodes stand where they were.

    Args:
        before, typed, after: the graph as captured, as typed, and as rewritten.
        parameters: the trainable parameters' names, in the order of the graph's gradients.
    """
    kinds = {node.name: node for node in typed}
    old = {node.name: node for node in before}
    new = {node.name for node in after}
    parts = _parts(after, {node.name for node in typed} | set(old))
    owners = _owners(after, parts, parameters)
    pending = [node for node in before if node.name not in new]
    position = {node.name: index for index, node in enumerate(before)}
    marked: list[MarkedNode] = []

    def removed(until: int) -> None:
        while pending and position[pending[0].name] < until:
            gone = pending.pop(0)
            marked.append(MarkedNode(_typed(gone, kinds), "removed", before=gone))

    for node in after:
        was = old.get(node.name)
        if was is None:
            part = parts.get(node.name, PREPARED)
            marked.append(MarkedNode(node, "added", part, owners.get(node.name, "")))
            continue
        removed(position[node.name])
        same = (was.operator, was.arguments) == (node.operator, node.arguments)
        marked.append(MarkedNode(_typed(node, kinds), "kept" if same else "changed", before=was))
    removed(len(before))
    return marked


def unchanged(nodes: Sequence[GraphNode]) -> list[MarkedNode]:
    """A graph that was refused: nothing was rewritten."""
    return [MarkedNode(node, "kept", before=node) for node in nodes]


def _typed(node: GraphNode, kinds: dict[str, GraphNode]) -> GraphNode:
    return node if node.kind or node.name not in kinds else replace(node, kind=kinds[node.name].kind)


def _parts(after: Sequence[GraphNode], known: set[str]) -> dict[str, str]:
    """What each added node computes: norms come before the clip factors, clipped sums are computed from them."""
    parts: dict[str, str] = {}
    for node in after:
        if node.name in known:
            continue
        if node.operator.startswith("flashnorm.add_noise"):
            parts[node.name] = NOISE
        elif node.operator.startswith("flashnorm.release"):
            parts[node.name] = FACTORS
        else:
            sources = {parts.get(name) for name in node.reads()}
            of_release = "getitem" in node.operator and FACTORS in sources
            parts[node.name] = FACTORS if of_release else SUM if sources & {FACTORS, SUM} else NORM
    return parts


def _owners(after: Sequence[GraphNode], parts: dict[str, str], parameters: Sequence[str]) -> dict[str, str]:
    """Added node -> the parameter whose gradient alone it serves.

    A parameter is known by its row: an argument of the noise, and its position where the norms are put together.
    """
    nodes = {node.name: node for node in after}
    reached: dict[str, set[int]] = {}

    def spread(start: str, row: int) -> None:
        stack = [start]
        while stack:
            name = stack.pop()
            if parts.get(name) in (NORM, SUM, NOISE) and row not in reached.setdefault(name, set()):
                reached[name].add(row)
                stack += [read for read in nodes[name].reads() if read in nodes]

    for node in after:
        if parts.get(node.name) == NOISE:
            row = re.match(r"\(\w+, \w+, \w+, (\d+)", node.arguments)
            if row is not None:
                spread(node.name, int(row[1]))
        elif parts.get(node.name) == FACTORS:
            for stacked in (nodes[read] for read in node.reads() if parts.get(read) == NORM):
                columns = [read for read in stacked.reads() if read in nodes]
                if len(columns) == len(parameters):
                    for row_number, column in enumerate(columns):
                        spread(column, row_number)
    only = {name: next(iter(rows)) for name, rows in reached.items() if len(rows) == 1}
    return {name: parameters[row] for name, row in only.items() if row < len(parameters)}
