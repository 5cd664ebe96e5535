"""Puts the page together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ..explain import BREAK, LOSS_OUTSIDE, Report
from .nodes import INPUT
from .plan_table import plan_table, short
from .rewriting import PARTS, MarkedNode

_LONGEST_ARGUMENTS = 400


def report_page(report: Report, graph: Sequence[MarkedNode], title: str) -> str:
    """The page as text. ``report`` and ``graph`` come from ``record``; ``title`` names the model."""
    parts = {
        "title": escape(title),
        "style": _file("style.css"),
        "script": _file("script.js"),
        "verdict": _verdict(report),
        "facts": _facts(report, graph),
        "findings": _findings(report),
        "plan": plan_table(report.parameters) if report.parameters else "<p>No plan: nothing is compiled.</p>",
        # A "<" inside the script element could end it.
        "graph": json.dumps(graph_data(graph), separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = _file("page.html")
    head, *rest = page.split("{{")
    return head + "".join(parts[name] + text for name, text in (part.split("}}", 1) for part in rest))


def graph_data(graph: Sequence[MarkedNode]) -> dict[str, Any]:
    """The graph for the page's script: strings that repeat are stored once and cited by number."""
    tables: dict[str, dict[str, int]] = {"kinds": {}, "operators": {}, "modules": {}, "sources": {}, "parameters": {}}
    classes: dict[str, str] = {}

    def cite(table: str, text: str) -> int:
        return tables[table].setdefault(text, len(tables[table]))

    paths = module_paths(graph)
    rows = []
    for marked, module in zip(graph, paths, strict=True):
        node = marked.node
        if node.module_class:
            classes.setdefault(module, node.module_class)
        before = marked.before
        rows.append(
            [
                node.name,
                node.value,
                cite("kinds", node.kind),
                cite("operators", node.operator),
                node.label if node.operator == INPUT else _cut(node.arguments),
                cite("modules", module),
                cite("sources", re.sub(r"^\S*/site-packages/", "", node.source)),
                ("kept", "changed", "added", "removed").index(marked.status),
                PARTS.index(marked.part) if marked.part else -1,
                cite("parameters", marked.parameter),
                int(node.backward),
                _cut(before.arguments) if marked.status == "changed" and before is not None else "",
            ]
        )
    lists = {name: list(table) for name, table in tables.items()}
    return {**lists, "parts": list(PARTS), "classes": classes, "nodes": rows}


def module_paths(graph: Sequence[MarkedNode]) -> list[str]:
    """For each node the path of its module, "" outside modules. What was added for a parameter is with its module.

    Capturing names the outermost module by its variable, which parameters' names leave out; so it is left out here.
    """
    seen = {marked.node.module for marked in graph} - {"", "self"}
    owners = {marked.parameter.rpartition(".")[0] for marked in graph} - {""}
    outermost = {path.partition(".")[0] for path in seen}
    prefix = next(iter(outermost)) if len(outermost) == 1 else ""
    if not prefix or prefix in {owner.partition(".")[0] for owner in owners}:
        prefix = ""

    def path(marked: MarkedNode) -> str:
        own = marked.node.module
        if not own:
            return marked.parameter.rpartition(".")[0]
        if own in ("self", prefix):
            return ""
        return own.removeprefix(f"{prefix}.") if prefix else own

    return [path(marked) for marked in graph]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_ARGUMENTS else text[:_LONGEST_ARGUMENTS] + " ..."


def _verdict(report: Report) -> str:
    if report.refused is not None:
        return '<div class="verdict refused"><b>Refused.</b> Compilation fails with the error below, and nothing runs.</div>'
    text = f"Each sample is clipped, the sum is noised: {report.sensitivity}."
    return f'<div class="verdict private"><b>Private.</b> {escape(text)}</div>'


def _facts(report: Report, graph: Sequence[MarkedNode]) -> str:
    options, totals = report.options, report.totals()
    statuses = Counter(marked.status for marked in graph)
    facts: list[tuple[str, str]] = [
        ("max_grad_norm", f"{options.max_grad_norm:g}"),
        ("noise_multiplier", f"{options.noise_multiplier:g}"),
        ("clipping", escape(options.clipping)),
        ("loss", "inside the graph" if report.loss_inside else "outside, unchecked"),
        ("graph nodes", f"{len(graph) - statuses['added']:,} captured"),
    ]
    if report.refused is None:
        facts[3:3] = [("batch size", escape(report.batch))]
        facts += [
            ("rewritten", f"{statuses['added']:,} added, {statuses['removed']:,} removed, {statuses['changed']:,} changed"),
            ("privacy adds", f"{short(totals['flops'])} FLOPs, {short(totals['bytes_moved'], 'B')} moved"),
            ("held until clipped", short(totals["bytes_held"], "B")),
        ]
        if report.predicted_ratio is not None:
            facts.append(("predicted step time", f"{report.predicted_ratio:.2f} x non-private"))
    else:
        facts = [fact for fact in facts if fact[0] != "loss"]
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)


def _findings(report: Report) -> str:
    """Refusal, replacements and what could not be checked, each with the source line that its text names."""
    found: list[tuple[str, str]] = []
    if report.refused is not None:
        found.append(("refused", report.refused))
    found += [("replaced", text) for text in report.replaced]
    if report.graph_break is not None:
        found.append(("graph break", f"Only the first graph is shown: {BREAK} {report.graph_break}"))
    if not report.loss_inside and report.refused is None:
        found.append(("not checked", LOSS_OUTSIDE[0].upper() + LOSS_OUTSIDE[1:]))
    return _listed(found) or "<p>Nothing was refused or replaced, and nothing was left unchecked.</p>"


def _listed(found: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<li class="{label.replace(" ", "-")}"><b>{label}</b><pre>{escape(text[:1].upper() + text[1:])}</pre></li>'
        for label, text in found
    )
    return f'<ul class="findings">{items}</ul>' if items else ""


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
