"""What a compiled graph is connected to at run time: its parameters' places in a ``PrivacyState``.

``binding_for`` runs at every forward pass with the parameters of that call, because identical modules share one
compiled artifact. At every execution of the backward graph its ``flashnorm::release`` op reaches ``Binding.release``.

Dimensions: B samples, P parameters of the graph, K clipping groups of the state.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor, nn

from .clipping import clip_factors, group_norms
from .distributed.groups import data_meshes, place_of, team_of
from .distributed.team import Team
from .options import Options
from .passes.errors import GraphBreakError, UnsupportedGraphError
from .state import PrivacyState, common_state
from .templates import release as release_op
from .templates.noise import WHOLE

current_backward = torch._C._current_graph_task_id
"""Number of the backward pass that runs on this thread, -1 outside one; no two passes have the same."""


@dataclass(frozen=True)
class Release:
    """One execution of a graph's release op."""

    state: PrivacyState
    backward: int
    noised: bool


@dataclass(frozen=True)
class _Places:
    """Where a binding's parameters stand in their state, as of one revision of it."""

    state: PrivacyState
    revision: int
    rows: list[int]
    """Each parameter's index in the state."""
    row_index: Tensor
    """The same as int64 [P]."""
    groups: Tensor | None
    """int64 [P]: each parameter's clipping group; None when all share one."""
    fractions: Tensor | None
    """float32 [K]: each group's part of ``max_grad_norm``; None when there is one group."""
    group_names: frozenset[str]
    parts: Tensor | None
    """int64 [P, 3]: where this rank's parts of the parameters lie in the whole ones; None if all are whole."""


class Binding:
    """One tuple of parameters, as one compiled graph sees them. Make it with ``binding_for``."""

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str], options: Options) -> None:
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        self.names = list(names)
        self.options = options
        self.break_reason: str | None = None
        self.forward_backward = -1
        self.last_release: Release | None = None
        self.guarded = False
        self._places: _Places | None = None
        self.handle = torch.tensor(release_op.register(self), dtype=torch.int64)
        self._place(parameters)

    def matches(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are the very parameters of this binding, in its order."""
        refs = self.parameters
        return len(refs) == len(parameters) and all(map(is_, [ref() for ref in refs], parameters))

    @property
    def state(self) -> PrivacyState:
        """The state that covers the parameters now; declaring or merging states can change it before the first step."""
        return self._current_places().state

    def _current_places(self) -> _Places:
        places = self._places
        if places is None or places.state.revision != places.revision:
            parameters = [ref() for ref in self.parameters]
            places = self._place([parameter for parameter in parameters if parameter is not None])
        return places

    def _place(self, parameters: Sequence[nn.Parameter]) -> _Places:
        state = common_state(parameters)
        state.adopt(parameters, self.names)
        state.attach(self.options)
        rows = state.indices_of(parameters)
        layout, device = state.layout, parameters[0].device
        groups = [layout.group_of[row] for row in rows]
        several = len(layout.group_names) > 1
        self._places = _Places(
            state=state,
            revision=state.revision,
            rows=rows,
            row_index=torch.tensor(rows),
            groups=torch.tensor(groups, device=device) if several else None,
            fractions=torch.tensor(layout.fractions, dtype=torch.float32, device=device) if several else None,
            group_names=frozenset(layout.group_names[group] for group in groups),
            parts=self._join_team(state, parameters),
        )
        return self._places

    def _join_team(self, state: PrivacyState, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        ranks = team_of(parameters)
        if not ranks:
            return None
        if state.team is None or state.team.ranks != ranks:
            state.team = Team(ranks, data_meshes(parameters)[1])
        return torch.tensor([place_of(parameter) for parameter in parameters])

    def describe(self) -> str:
        """Names the graph for an error: its modules, and why the graph before it ended."""
        modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in self.names))
        text = "the graph over " + ", ".join(modules[:4]) + (f" and {len(modules) - 4} more" if len(modules) > 4 else "")
        return text + (f" (graph break: {self.break_reason.strip()})" if self.break_reason else "")

    @torch.no_grad()
    def release(self, norms_sq: Tensor, parts: bool = False) -> release_op.ReleaseResult:
        """Clip factors [P, B], noise keys [P, 2] ([P, 5] with ``parts``: and places) and noise level [] for squared norms float32
        [B, P] of contributions.

        Under loss_reduction="mean" a contribution is the sample's gradient divided by B; its factor holds B / L, so
        that sum_b factor_b * contribution_b = (1/L) * sum_b c_b * g_b and the noise level is s * C / L.

        Raises:
            GraphBreakError: this backward pass has already released one of the clipping groups, or another state.
        """
        places, backward = self._current_places(), current_backward()
        self._refuse_nested(backward)
        _admit(backward, self, places)
        state, options = places.state, self.options
        mean, batch, clip = options.loss_reduction == "mean", max(norms_sq.shape[0], 1), state.max_grad_norm
        state.agree(batch)
        size = state.normalizer(batch) if mean else 1
        number, noise_std = state.begin_release(backward, clip / size, places.rows)
        self.last_release = Release(state, backward, state.adds_noise)
        # Everything is in units of the contributions, which are 1/B of the gradients under "mean".
        unit = batch if mean else 1
        norms = group_norms(norms_sq, places.groups, 1 if places.fractions is None else len(places.fractions))
        bounds = clip / unit if places.fractions is None else places.fractions * (clip / unit)
        constant = options.stability_constant / unit if options.clipping == "automatic" else None
        factors = clip_factors(norms, bounds, constant)
        if unit != size:
            factors.mul_(unit / size)
        state.record(norms, bounds)
        keys = state.noise_keys(number).index_select(0, places.row_index)
        if parts:
            where = torch.tensor([WHOLE]).expand(len(keys), 3) if places.parts is None else places.parts
            keys = torch.cat((keys, where), 1)
        return self._spread(factors, places), keys.to(norms_sq.device), norms_sq.new_full((), noise_std, dtype=torch.float32)

    def _spread(self, factors: Tensor, places: _Places) -> Tensor:
        """[B, K] -> [P, B], contiguous: compiled code relies on the strides that the op's fake promised."""
        if places.groups is None:
            return factors.t().expand(len(self.parameters), -1).contiguous()
        return factors.t().index_select(0, places.groups)

    def _refuse_nested(self, backward: int) -> None:
        if self.forward_backward not in (-1, backward):
            raise UnsupportedGraphError(
                f"{self.describe()} ran its forward inside one backward pass and its backward inside another "
                "(reentrant activation checkpointing). Nothing then sees which graphs belong to one step. "
                "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )


# First parameter's id -> bindings; an entry goes when that parameter does, so an id cannot be mistaken.
_bindings: dict[int, list[Binding]] = {}
# Backward pass -> who released in it. Bounded: only passes that still run matter, and few run at a time.
_admitted: OrderedDict[int, list[tuple[Binding, _Places]]] = OrderedDict()
_ADMITTED_LIMIT = 256


def binding_for(
    parameters: Sequence[nn.Parameter], names: Sequence[str], options: Options, break_reason: str | None = None
) -> Binding:
    """The binding of these trainable parameters, in the order of the graph's norms; made at their first call.

    Called at every forward pass. ``names`` are used for parameters that no declared state has named yet;
    ``break_reason`` says why Dynamo ended the graph before this one, for error messages.
    """
    first = parameters[0]
    known = _bindings.get(id(first))
    if known is None:
        known = _bindings[id(first)] = []
        weakref.finalize(first, _bindings.pop, id(first), None)
    for binding in known:
        if binding.matches(parameters) and (binding.options is options or binding.options == options):
            break
    else:
        binding = Binding(parameters, names, options)
        binding.break_reason = break_reason
        known.append(binding)
    binding.forward_backward = current_backward()
    return binding


def _admit(backward: int, binding: Binding, places: _Places) -> None:
    """Lets each clipping group be released once in one backward pass, all of them under one state."""
    if backward < 0:
        return
    earlier = _admitted.setdefault(backward, [])
    for other, taken in earlier:
        if taken.state is not places.state or not taken.group_names.isdisjoint(places.group_names):
            raise GraphBreakError(_two_graphs_text(other, binding))
    earlier.append((binding, places))
    if len(_admitted) > _ADMITTED_LIMIT:
        _admitted.popitem(last=False)


def _two_graphs_text(first: Binding, second: Binding) -> str:
    same = first is second
    what = f"{first.describe()}, twice" if same else f"{first.describe()}; and {second.describe()}"
    return (
        f"One backward pass reached two private graphs (or one graph twice): {what}. Each clips on its own to "
        f"max_grad_norm={first.state.max_grad_norm:g}, so together a sample could exceed it. Ways out: remove the "
        "graph break, or compile the model and its loss together, so that there is one graph; or use "
        "clipping='per_layer' or 'group' and call flashnorm_compile.privacy(model) before the first step, so that "
        "all graphs share one budget."
    )
