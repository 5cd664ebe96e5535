"""``diff``: the joint graph before and after, from a folder that ``FLASHNORM_DUMP`` filled."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..html_report.nodes import GraphNode, parse_dump
from ..html_report.rewriting import MarkedNode, compare
from .errors import UsageError

DESCRIPTION = """\
Shows what was rewritten, as a unified diff of the graphs that a training with FLASHNORM_DUMP=FOLDER wrote. Lines with #
say what the lines below compute: a per-sample norm, clip factors, a clipped sum or noise, and for which parameter.
"""
_SIGNS = {"kept": " ", "added": "+", "removed": "-"}
_STYLES = {"+": "green", "-": "red", "@": "cyan", "!": "bold red", "#": "bold"}


def add_parser(commands: Any) -> None:
    """Adds the command to the ``COMMAND`` list of the argument parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "diff",
        help="a dumped graph before and after",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DUMPDIR")
    parser.add_argument("--graph", type=int, metavar="K", help="only graph K of the folder")
    parser.add_argument("--context", type=int, default=3, metavar="N", help="unchanged lines around a change (%(default)s)")
    parser.add_argument("--full", action="store_true", help="do not shorten long arguments")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the diff of every graph. Returns 1 if one of them was refused."""
    if arguments.context < 0:
        raise UsageError(f"--context must be >= 0; got {arguments.context}.")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    refused = False
    for number in _numbers(arguments.folder, arguments.graph):
        if not _path(arguments.folder, number, "after").exists():
            refused = True
            lines = _refused(arguments.folder, number)
        else:
            lines = _rewritten(arguments.folder, number, arguments.context, None if arguments.full else 100)
        for line in lines:
            console.print(Text(line, style=_STYLES.get(line[:1], "")))
    return int(refused)


def _path(folder: Path, number: int, stage: str) -> Path:
    return folder / f"joint_{number}_{stage}.txt"


def _numbers(folder: Path, wanted: int | None) -> list[int]:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}. Run the training with FLASHNORM_DUMP={folder} to fill one.")
    names = (re.fullmatch(r"joint_(\d+)_before\.txt", path.name) for path in folder.iterdir())
    numbers = sorted(int(name[1]) for name in names if name)
    if not numbers:
        raise UsageError(
            f"{folder} holds no graph (no joint_*_before.txt). Graphs are written when a model is compiled with "
            f"backend='flashnorm' and FLASHNORM_DUMP={folder} is set."
        )
    if wanted is not None and wanted not in numbers:
        raise UsageError(f"--graph {wanted}: {folder} holds the graphs {', '.join(map(str, numbers))}.")
    return numbers if wanted is None else [wanted]


def _read(folder: Path, number: int, stage: str) -> list[GraphNode]:
    path = _path(folder, number, stage)
    if not path.exists():
        return []
    try:
        return parse_dump(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: {error}. Dump the graph again with this version.") from error


def _plan(folder: Path, number: int) -> tuple[str, list[str]]:
    """The batch size, and the parameters in the order of their gradients."""
    path = folder / f"plan_{number}.json"
    if not path.exists():
        return "?", []
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return str(plan["batch"]), [row["name"] for row in plan["parameters"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a plan as FLASHNORM_DUMP writes it. Dump the graph again with this version.") from error


def _refused(folder: Path, number: int) -> Iterator[str]:
    """The nodes that mix samples, first the one that all others come from."""
    yield f"graph {number}: refused, nothing was rewritten"
    nodes = _read(folder, number, "typed")
    mixed = [node for node in nodes if "Mixed(" in node.kind]
    if not nodes:
        yield "  It was not typed either. The error of the compilation says why."
    elif not mixed:
        yield "  No node mixes samples. The error of the compilation says why."
    for node in mixed:
        yield f"! {_line(node, 100)}"


def _rewritten(folder: Path, number: int, context: int, longest: int | None) -> Iterator[str]:
    batch, parameters = _plan(folder, number)
    before, typed, after = (_read(folder, number, stage) for stage in ("before", "typed", "after"))
    marked = compare(before, typed, after, parameters)
    counts = Counter(entry.status for entry in marked)
    yield (
        f"graph {number}: batch size {batch}, {len(before)} nodes captured; "
        f"{counts['removed']} removed, {counts['changed']} changed, {counts['added']} added"
    )
    yield f"--- {_path(folder, number, 'before')}"
    yield f"+++ {_path(folder, number, 'after')}"
    yield from _hunks(marked, context, longest)


def _hunks(marked: Sequence[MarkedNode], context: int, longest: int | None) -> Iterator[str]:
    touched = [index for index, entry in enumerate(marked) if entry.status != "kept"]
    shown = sorted({near for index in touched for near in range(index - context, index + context + 1) if 0 <= near < len(marked)})
    starts = [index for position, index in enumerate(shown) if position == 0 or shown[position - 1] != index - 1]
    for position, start in enumerate(starts):
        after_last = starts[position + 1] if position + 1 < len(starts) else len(marked)
        hunk = [marked[index] for index in shown if start <= index < after_last]
        before = sum(entry.status != "added" for entry in marked[:start]) + 1
        after = sum(entry.status != "removed" for entry in marked[:start]) + 1
        old, new = (sum(entry.status != left_out for entry in hunk) for left_out in ("added", "removed"))
        parts = ", ".join(dict.fromkeys(entry.part for entry in hunk if entry.part))
        yield f"@@ -{before},{old} +{after},{new} @@ {parts}".rstrip()
        heading = ""
        for entry in hunk:
            purpose = entry.part + (f" of {entry.parameter}" if entry.parameter else "")
            if purpose and purpose != heading:
                yield f"# {purpose}"
            heading = purpose
            yield from _lines(entry, longest)


def _lines(entry: MarkedNode, longest: int | None) -> Iterator[str]:
    if entry.status == "changed" and entry.before is not None:
        yield f"- {_line(entry.before, longest)}"
        yield f"+ {_line(entry.node, longest)}"
        return
    yield f"{_SIGNS[entry.status]} {_line(entry.node, longest)}"


def _line(node: GraphNode, longest: int | None) -> str:
    arguments = node.arguments if longest is None or len(node.arguments) <= longest else node.arguments[:longest] + " ..."
    kind = f": {node.kind} " if node.kind else ""
    return f"%{node.name} {node.value} {kind}= {node.operator} {arguments}".replace("  ", " ")
