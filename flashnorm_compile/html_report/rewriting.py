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
SUM_AND_NOISE = "clipped sum and noise"
PARTS = (PREPARED, NORM, FACTORS, SUM, NOISE, SUM_AND_NOISE)
_OPERATORS = {
    "flashnorm.release": FACTORS,
    "flashnorm.add_noise": NOISE,
    "flashnorm.weighted_sum_noise": SUM_AND_NOISE,
    "flashnorm.weighted_sums_noise": SUM_AND_NOISE,
}


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
    constants: set[str] = set()
    for node in after:
        if node.name in known:
            continue
        sources = [parts[name] for name in node.reads() if name in parts]
        operator = node.operator.rpartition(".")[0]
        if operator in _OPERATORS:
            parts[node.name] = _OPERATORS[operator]
        elif node.operator == "getitem" and sources:
            parts[node.name] = sources[0]
        else:
            last = next((part for part in (SUM_AND_NOISE, NOISE) if part in sources), None)
            parts[node.name] = last or (SUM if {FACTORS, SUM} & set(sources) else NORM)
        for name in constants & set(node.reads()):  # what reads nothing belongs to its first reader
            parts[name] = parts[node.name]
            constants.remove(name)
        if not sources and not any(name in known for name in node.reads()):
            constants.add(node.name)
    return parts


def _owners(after: Sequence[GraphNode], parts: dict[str, str], parameters: Sequence[str]) -> dict[str, str]:
    """Added node -> the parameter whose gradient alone it serves.

    A parameter is known by its row: an argument of the noise, and of the release for each column of the norms.
    """
    nodes = {node.name: node for node in after}
    reached: dict[str, set[int]] = {}

    def spread(start: str, row: int) -> None:
        stack = [start]
        while stack:
            name = stack.pop()
            if parts.get(name) not in (None, FACTORS) and row not in reached.setdefault(name, set()):
                reached[name].add(row)
                stack += [read for read in nodes[name].reads() if read in nodes]

    def spread_columns(name: str, rows: Sequence[int]) -> None:
        """``name``: a tensor of as many columns as ``rows``, put together from one or several for each parameter."""
        pieces = next((listed for listed in _lists(nodes[name]) if all(piece in parts for piece in listed)), [])
        if not pieces:
            before = next((read for read in nodes[name].reads() if parts.get(read) == NORM), None)
            if before is not None:
                spread_columns(before, rows)
            return
        widths = [_columns(nodes[piece]) if "cat" in nodes[name].operator else 1 for piece in pieces]
        if sum(widths) == len(rows):
            for piece, width in zip(pieces, widths, strict=True):
                mine, rows = rows[:width], rows[width:]
                if width == 1:
                    spread(piece, mine[0])
                else:
                    spread_columns(piece, mine)

    for node in after:
        lists, part = _lists(node), parts.get(node.name)
        if part in (NOISE, SUM_AND_NOISE) and (row := re.match(r"\((?:\w+, ){3,4}(\d+)", node.arguments)):
            spread(node.name, int(row[1]))
        elif part == SUM_AND_NOISE and len(lists) == 2:
            for gradient, row_number in zip(lists[0], lists[1], strict=True):
                spread(gradient, int(row_number))
        elif part == SUM_AND_NOISE and (item := re.match(r"\((\w+), (\d+)\)", node.arguments)):
            reached[node.name] = {int(_lists(nodes[item[1]])[1][int(item[2])])}
        elif node.operator.startswith("flashnorm.release") and node.name in parts:
            rows = list(map(int, lists[0])) if lists else list(range(len(parameters)))
            spread_columns(node.reads()[1], rows)
    only = {name: next(iter(rows)) for name, rows in reached.items() if len(rows) == 1}
    return {name: parameters[row] for name, row in only.items() if row < len(parameters)}


def _lists(node: GraphNode) -> list[list[str]]:
    """The lists among the arguments, item by item as text."""
    return [found.split(", ") for found in re.findall(r"\[([^\[\]]+)\]", node.arguments)]


def _columns(node: GraphNode) -> int:
    """How many parameters' norms a tensor holds, [B] or [columns, B]."""
    sizes = re.findall(r"\w+", node.value.partition("[")[2] or node.value)
    return int(sizes[0]) if len(sizes) == 2 and sizes[0].isdigit() else 1
