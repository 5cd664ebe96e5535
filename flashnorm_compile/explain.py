"""What the backend would do with a model: a table per parameter, or the refusal, without compiling or running anything."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from .backend import break_reason, compile_private
from .dump import plan_rows
from .options import Options
from .passes import _compat
from .passes.errors import PrivacyError
from .passes.private_pass import Observer, Outcome

LOSS_OUTSIDE = (
    "the loss is computed outside the compiled part, where nothing can check whether it mixes samples. "
    "Compile model and loss together: step = torch.compile(lambda x, y: loss_fn(model(x), y), backend='flashnorm', options=...)."
)

BREAK = (
    "a graph break ends it, and under flat or automatic clipping a second graph with trainable parameters is refused when it "
    "runs. The break:"
)


class _Explained(BaseException):
    """Stops a compilation once its plan is known. Not an ``Exception``: nothing may swallow it or fall back."""


@dataclass(frozen=True)
class Report:
    """The plan of one captured graph, or why it is refused.

    ``parameters``: a dict per trainable parameter: name, shape, frontier, uses, algorithm, why, flops, bytes_moved, bytes_held
    (what privacy adds to the step; expressions in the graph's symbols when sizes are dynamic).
    """

    options: Options
    batch: str = ""
    parameters: list[dict[str, Any]] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    refused: str | None = None
    predicted_ratio: float | None = None
    """Time of the private step over the non-private one, by the planner's model; None where nothing had to be chosen."""
    predicted_peak_bytes: float = 0.0
    """Of the non-private step, which the memory budget refers to."""
    predicted_private_peak_bytes: float = 0.0
    loss_inside: bool = True
    graph_break: str | None = None

    @property
    def sensitivity(self) -> str:
        """How far one sample can move the released sum, and the noise on it."""
        norm, noise = self.options.max_grad_norm, self.options.noise_multiplier
        scale = "" if self.options.loss_reduction == "sum" else ", then divided by the expected batch size"
        bound = f"adding or removing one sample moves the sum by at most {norm:g} (L2)"
        return f"{bound}; noise N(0, {norm * noise:g}^2) per coordinate{scale}"

    def totals(self) -> dict[str, int | str]:
        """Sums over the parameters of what privacy adds."""
        return _totals(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "batch": self.batch,
            "parameters": self.parameters,
            "totals": self.totals(),
            "sensitivity": self.sensitivity,
            "predicted_ratio": self.predicted_ratio,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "predicted_private_peak_bytes": self.predicted_private_peak_bytes,
            "replaced": self.replaced,
            "refused": self.refused,
            "loss_inside": self.loss_inside,
            "graph_break": self.graph_break,
        }

    def __str__(self) -> str:
        console = Console(width=150, record=True, file=io.StringIO())
        for part in self._parts():
            console.print(part, highlight=False, markup=False) if isinstance(part, str) else console.print(part)
        return console.export_text().rstrip()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from self._parts()

    def _parts(self) -> list[Any]:
        if self.refused is not None:
            return ["REFUSED", self.refused]
        parts: list[Any] = [self._table(), *(f"({number}) {why}" for why, number in self._reasons().items())]
        parts += ["bytes: moved to and from memory; held: until the clip factors are known"]
        parts += [f"clipping: {self.options.clipping}; {self.sensitivity}"]
        if self.predicted_ratio is not None:
            peaks = [f"{_short(round(n))}B" for n in (self.predicted_private_peak_bytes, self.predicted_peak_bytes) if n]
            memory = f"; its tensors take {' where that one takes '.join(peaks)}" if peaks else ""
            parts.append(f"predicted: {self.predicted_ratio:.2f} times the time of the non-private step{memory}")
        parts += [f"replaced: {text}" for text in self.replaced]
        if self.graph_break is not None:
            parts.append(f"only the first graph: {BREAK} {self.graph_break}")
        return parts if self.loss_inside else [*parts, f"not checked: {LOSS_OUTSIDE}"]

    def _table(self) -> Table:
        """A row for each parameter; those of numbered blocks that are treated alike share one. Reasons stand below."""
        title = f"private gradients of {len(self.parameters)} parameters, batch size {self.batch}"
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("parameter", overflow="fold")
        for column in ("shape", "frontier", "algorithm"):
            table.add_column(column, overflow="fold")
        for column in ("FLOPs", "bytes", "held"):
            table.add_column(column, justify="right", no_wrap=True)
        marks = self._reasons()
        for (name, shape, frontier, algorithm, why), rows in self._alike().items():
            count = f" x{len(rows)}" if len(rows) > 1 else ""
            costs = [_short(value) for value in _totals(rows).values()]
            table.add_row(name + count, shape, frontier, f"{algorithm} ({marks[why]})", *costs)
        table.add_section()
        table.add_row("total", "", "", "", *[_short(value) for value in self.totals().values()])
        return table

    def _reasons(self) -> dict[str, int]:
        """The reasons for the algorithms, numbered as the table cites them."""
        return {why: number for number, why in enumerate(dict.fromkeys(row["why"] for row in self.parameters), start=1)}

    def _alike(self) -> dict[tuple[str, ...], list[dict[str, Any]]]:
        """Rows by what the table shows of them; the first number in a name becomes a star."""
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in self.parameters:
            name = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", row["name"], count=1)
            shape = "x".join(map(str, row["shape"])) if row["shape"] is not None else "-"
            uses = f" ({row['uses']} uses)" if row["uses"] > 1 else ""
            groups.setdefault((name, shape, row["frontier"] + uses, row["algorithm"], row["why"]), []).append(row)
        return {(rows[0]["name"] if len(rows) == 1 else key[0], *key[1:]): rows for key, rows in groups.items()}


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, int | str]:
    """Sums of the costs; a sum with a symbolic size in it is text."""
    result: dict[str, int | str] = {}
    for key in ("flops", "bytes_moved", "bytes_held"):
        values = [row[key] for row in rows]
        numbers = [value for value in values if isinstance(value, int)]
        result[key] = sum(numbers) if len(numbers) == len(values) else " + ".join(map(str, values))
    return result


def _short(value: int | str) -> str:
    if isinstance(value, str):
        return value if len(value) < 20 else "symbolic"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return str(value)


def explain(model: Any, *inputs: Any, options: Mapping[str, Any] | None = None, **keywords: Any) -> Report:
    """Captures ``model(*inputs, **keywords)`` as the backend would and reports what would be done.

    Args:
        model: a module or function; one that is already compiled is explained as it was before.
        inputs: one batch, as in training.
        options: as for the backend.

    Returns:
        A ``Report``. A model that would be refused gives a report with the refusal's text, not an exception.

    Raises:
        OptionsError: the options themselves are wrong.
        ValueError: nothing in the call trains a parameter.
    """
    return explain_observed(model, inputs, keywords, Options.parse(options))


def explain_observed(
    model: Any, inputs: Sequence[Any], keywords: Mapping[str, Any], options: Options, observers: tuple[Observer, ...] = ()
) -> Report:
    """``explain``; ``observers`` see each stage of the graph on the way."""
    outcomes: list[tuple[Outcome, bool, str | None]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        reason = break_reason(gm)

        def stop(stage: str, graph: fx.Graph, outcome: Outcome | None) -> None:
            if outcome is not None:
                outcomes.append((outcome, _has_scalar_output(graph), reason))
                raise _Explained

        return compile_private(
            gm, example_inputs, options, inner_compile=_compat.run_graph, observers=(*observers, stop), protect=False
        )

    target = getattr(model, "_orig_mod", model)
    if isinstance(target, nn.Module):
        module = target
        target = lambda *a, **k: module.forward(*a, **k)  # noqa: E731  (a compiled module's own call would use its own backend)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(target, backend=backend)(*inputs, **keywords)
    except _Explained:
        pass
    except Exception as error:
        refusal = _refusal_in(error)
        if refusal is None:
            raise
        return Report(options, refused=str(refusal).partition("\n\nSet TORCHDYNAMO_VERBOSE")[0])
    if not outcomes:
        raise ValueError("nothing to explain: the call captured no graph with a trainable parameter.")
    outcome, inside, reason = outcomes[0]
    replaced = [replacement.text for replacement in outcome.replacements]
    plan = outcome.plan
    return Report(
        options,
        batch=str(outcome.batch),
        parameters=plan_rows(outcome),
        replaced=replaced,
        predicted_ratio=plan.ratio,
        predicted_peak_bytes=plan.peak,
        predicted_private_peak_bytes=plan.private_peak,
        loss_inside=inside,
        graph_break=reason,
    )


def _has_scalar_output(graph: fx.Graph) -> bool:
    """Whether a differentiable output is one number, which is then taken for the loss."""
    from torch._functorch._aot_autograd import descriptors as aot

    tangents = [n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("desc"), aot.TangentAOTInput)]
    return any(node.meta["val"].numel() == 1 for node in tangents)


def _refusal_in(error: BaseException | None) -> PrivacyError | None:
    while error is not None:
        if isinstance(error, PrivacyError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None
