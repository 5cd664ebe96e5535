"""The joint-graph pass that Inductor runs: type -> normalize -> match -> plan -> rewrite, each step a function of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx
from torch._dynamo.utils import dynamo_timed
from torch._inductor.custom_graph_pass import CustomGraphPass

from .canonicalize import canonicalize_pass
from .collectives import mark_recomputed_pass, merge_collectives_pass, reduced, sum_over_ranks_pass
from .graph_spec import GraphSpec
from .match import ParameterGradient, check_reduced, gradient_outputs, match_gradients
from .normalize_loss import Replacement, normalize_loss_pass
from .peaks import peaks_key
from .plan import Plan, plan_gradients
from .rewrite import rewrite_gradients
from .rules import Context
from .rules.registry import USER_RULES
from .sample_types import Mixed
from .saved import make_again_pass
from .type_samples import annotate, batch_size, fix_other_sizes, fix_shared_batch_size, type_samples

# Called with a stage ("before", "typed", "after"), the graph, and what is known by then.
Observer = Callable[[str, fx.Graph, "Outcome | None"], None]


@dataclass(frozen=True)
class Outcome:
    """What the pass decided, for reports."""

    batch: Any
    plan: Plan
    replacements: list[Replacement]


class PrivateGradientsPass(CustomGraphPass):
    """Makes the parameter gradients of a joint graph private.

    Guarantee: after the pass every trainable parameter's gradient output is a clipped sum plus noise, or depends on no sample;
    otherwise the pass raises and nothing is compiled.
    """

    def __init__(self, spec: GraphSpec, observers: tuple[Observer, ...] = ()) -> None:
        self.spec = spec
        self.observers = observers

    def __call__(self, graph: fx.Graph) -> None:
        with dynamo_timed("flashnorm.private_gradients_pass"):
            self._show("before", graph, None)
            ctx, replacements = self._typed(graph)
            annotate(graph, ctx)
            self._show("typed", graph, None)
            with dynamo_timed("flashnorm.match_and_plan"):
                gradients = match_gradients(graph, self.spec, ctx) if ctx.types else _empty_batch(graph, self.spec)
                plan = plan_gradients(graph, gradients, self.spec, ctx)
            with dynamo_timed("flashnorm.rewrite"):
                rewrite_gradients(graph, self.spec, ctx, plan)
                mark_recomputed_pass(graph, self.spec)
                make_again_pass(plan.made_again)
            self._show("after", graph, Outcome(ctx.batch, plan, replacements))

    def _typed(self, graph: fx.Graph) -> tuple[Context, list[Replacement]]:
        batch = batch_size(graph, self.spec)
        outputs = [(i, node) for i, _, node in gradient_outputs(graph, self.spec) if node is not None]
        if self.spec.sum_over is not None:
            sum_over_ranks_pass(graph, outputs, self.spec.sum_over)
        else:
            merge_collectives_pass(graph, outputs, self.spec.data_groups)
        if batch == 0:
            return Context(batch, {}), []
        with dynamo_timed("flashnorm.type_samples"):
            canonicalize_pass(graph)
            ctx = type_samples(graph, self.spec)
            for fix in (fix_shared_batch_size, fix_other_sizes):
                if _mixes(graph, self.spec, ctx) and fix(graph, self.spec):
                    ctx = type_samples(graph, self.spec)
            replacements = normalize_loss_pass(graph, self.spec, ctx)
            if replacements:
                ctx = type_samples(graph, self.spec)
        return ctx, replacements

    def _show(self, stage: str, graph: fx.Graph, outcome: Outcome | None) -> None:
        for observer in self.observers:
            observer(stage, graph, outcome)

    def uuid(self) -> bytes:
        """Covers our sources, the spec, users' rules and the device's figures: all that changes the rewritten graph."""
        return hashlib.sha256(source_digest() + repr((self.spec, sorted(USER_RULES), peaks_key())).encode()).digest()


def _mixes(graph: fx.Graph, spec: GraphSpec, ctx: Context) -> bool:
    return any(node is not None and isinstance(ctx.type(node), Mixed) for _, _, node in gradient_outputs(graph, spec))


def _empty_batch(graph: fx.Graph, spec: GraphSpec) -> list[ParameterGradient]:
    """No sample, so no share of any: every gradient is noise alone."""
    rows = {name: row for row, name in enumerate(spec.parameters)}
    found = []
    for position, name, value in gradient_outputs(graph, spec):
        way = None if value is None else reduced(value, spec.data_groups)
        found.append(ParameterGradient(name, rows[name], position, None if way is None else way.own, reduced=way))
    check_reduced(found, spec)
    return found


@cache
def source_digest() -> bytes:
    """A hash of the sources that decide what is compiled: the passes and the templates."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    from .. import templates

    for folder in (here, Path(templates.__file__).parent):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()
