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
from .distributed import tensor_parallel
from .distributed.groups import Ranks, is_split, place_of
from .distributed.team import Team
from .options import Options
from .passes.errors import GraphBreakError, PrivacyError, UnsupportedGraphError
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
    streams: Tensor
    """int64 [P], on the parameters' device: what tells their noise apart."""
    groups: Tensor | None
    """int64 [P]: each parameter's clipping group; None when all share one."""
    fractions: Tensor | None
    """float32 [K]: each group's part of ``max_grad_norm``; None when there is one group."""
    group_names: frozenset[str]
    parts: Tensor
    """int64 [P, 3], on the parameters' device: where this rank's parts of the parameters lie in the whole ones."""
    copied: Tensor | None
    """bool [P]: of which parameters each rank of the tensor-parallel group holds a copy; None without one."""


class Binding:
    """One tuple of parameters, as one compiled graph sees them. Make it with ``binding_for``."""

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str], options: Options, ranks: Ranks) -> None:
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        self.names = list(names)
        self.options = options
        self.ranks = ranks
        self.break_reason: str | None = None
        self.forward_backward = -1
        self.last_release: Release | None = None
        self.guarded = False
        self._looked = False
        self._places: _Places | None = None
        self.handle = torch.tensor(release_op.register(self), dtype=torch.int64, device="cpu")
        self._blank = BlankBatch(self)
        self.blank_handle = torch.tensor(release_op.register(self._blank), dtype=torch.int64, device="cpu")
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
            streams=state.streams[torch.tensor(rows, device="cpu")].to(device),
            groups=torch.tensor(groups, device=device) if several else None,
            fractions=torch.tensor(layout.fractions, dtype=torch.float32, device=device) if several else None,
            group_names=frozenset(layout.group_names[group] for group in groups),
            parts=self._join_team(state, parameters).to(device),
            copied=self._copied(parameters),
        )
        return self._places

    def _copied(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        group = self.ranks.model_group
        if group is None:
            return None
        return torch.tensor([not is_split(parameter, group) for parameter in parameters], device=parameters[0].device)

    def _join_team(self, state: PrivacyState, parameters: Sequence[nn.Parameter]) -> Tensor:
        team = self.ranks.team
        if state.team is None and team:
            state.team = Team(team, self.ranks.data_ranks)
        self._check_team(state)
        return torch.tensor([place_of(parameter) if team else WHOLE for parameter in parameters], device="cpu")

    def _check_team(self, state: PrivacyState) -> None:
        """Also at each release: a graph that trains on one device may have been called before any that trains on several.

        Raises:
            UnsupportedGraphError: other graphs of the state train on other ranks. Copies that each rank trains by itself, under
                the noise that all ranks share, would tell their samples by their difference.
        """
        team, theirs = self.ranks.team, () if state.team is None else state.team.ranks
        if team != theirs:
            raise UnsupportedGraphError(
                f"{self.describe()} trains on the ranks {list(team) or 'of this process alone'}, and other parameters of the model "
                f"on {list(theirs)}. The graphs of one model share their noise, so they need the same ranks: give every call of "
                "fully_shard and replicate, or DistributedDataParallel, the whole model and one mesh."
            )

    def describe(self) -> str:
        """Names the graph for an error: its modules, and why the graph before it ended."""
        modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in self.names))
        text = "the graph over " + ", ".join(modules[:4]) + (f" and {len(modules) - 4} more" if len(modules) > 4 else "")
        return text + (f" (graph break: {self.break_reason.strip()})" if self.break_reason else "")

    @torch.no_grad()
    def release(self, norms_sq: Tensor, parts: bool = False, blank: bool = False) -> release_op.ReleaseResult:
        """Clip factors [P, B], noise keys [P, 2] ([P, 5] with ``parts``: and places) and noise level [] for squared norms float32
        [B, P] of contributions.

        Under loss_reduction="mean" a contribution is the sample's gradient divided by B; its factor holds B / L, so
        that sum_b factor_b * contribution_b = (1/L) * sum_b c_b * g_b and the noise level is s * C / L. With ``blank`` the samples
        are none, and all factors are zero.

        Raises:
            GraphBreakError: this backward pass has already released one of the clipping groups, or another state.
            UnsupportedGraphError: a CUDA graph is being captured.
        """
        self._refuse_capture(norms_sq.device)
        places, backward = self._current_places(), current_backward()
        self._refuse_nested(backward)
        _admit(backward, self, places)
        state, options = places.state, self.options
        self._check_team(state)
        mean, batch, clip = options.loss_reduction == "mean", max(norms_sq.shape[0], 1), state.max_grad_norm
        state.agree(0 if blank else batch)
        size = state.normalizer(batch) if mean else 1
        number, noise_std = state.begin_release(backward, clip / size, places.rows)
        self.last_release = Release(state, backward, state.adds_noise)
        # Everything is in units of the contributions, which are 1/B of the gradients under "mean".
        unit = batch if mean else 1
        norms = self._norms(norms_sq, places)
        bounds = clip / unit if places.fractions is None else places.fractions * (clip / unit)
        constant = options.stability_constant / unit if options.clipping == "automatic" else None
        factors = clip_factors(norms, bounds, constant)
        if unit != size:
            factors.mul_(unit / size)
        if blank:
            norms, factors = norms[:0], torch.zeros_like(factors)
        state.record(norms, bounds)
        keys = state.noise_keys(number, places.streams)
        if parts:
            keys = torch.cat((keys, places.parts), 1)
        return self._spread(factors, places), keys.to(norms_sq.device), norms_sq.new_full((), noise_std, dtype=torch.float32)

    def _norms(self, norms_sq: Tensor, places: _Places) -> Tensor:
        """Norms [B, K] of whole gradients, also where this rank holds parts of them.

        Raises:
            PrivacyError: ranks that compute parts of the same samples disagree on the gradients that all of them compute.
        """
        count = 1 if places.fractions is None else len(places.fractions)
        if places.copied is None or self.ranks.model_group is None:
            return group_norms(norms_sq, places.groups, count)
        shares = norms_sq / torch.where(places.copied, tensor_parallel.size(self.ranks.model_group), 1)
        norms = group_norms(shares, places.groups, count)
        norms, differ = tensor_parallel.whole_norms(norms, (norms_sq * places.copied).sum(1), self.ranks.model_group)
        # On a GPU one look is enough to find a mistake, and each costs a wait; samples that differ are left out all the same.
        if (norms.is_cpu or not self._looked) and bool(differ.any()):
            raise PrivacyError(
                f"{self.describe()}: the ranks of its tensor-parallel group disagree on the gradients of parameters of which each "
                "holds a copy. They must start from equal copies, and see the same samples and the same random numbers."
            )
        self._looked = True
        return norms

    def _spread(self, factors: Tensor, places: _Places) -> Tensor:
        """[B, K] -> [P, B], contiguous: compiled code relies on the strides that the op's fake promised."""
        if places.groups is None:
            return factors.t().expand(len(self.parameters), -1).contiguous()
        return factors.t().index_select(0, places.groups)

    def _refuse_capture(self, device: torch.device) -> None:
        """Noise keys and level are arguments of the kernels that are launched now; a replay would launch them again."""
        if _is_captured(device):
            raise UnsupportedGraphError(
                f"{self.describe()} ran its backward while a CUDA graph was being captured. Every replay would add the noise of "
                "this step again, and count no step. Keep the backward pass of a private model out of torch.cuda.graph and "
                "torch.cuda.make_graphed_callables."
            )

    def _refuse_nested(self, backward: int) -> None:
        if self.forward_backward not in (-1, backward):
            raise UnsupportedGraphError(
                f"{self.describe()} ran its forward inside one backward pass and its backward inside another "
                "(reentrant activation checkpointing). Nothing then sees which graphs belong to one step. "
                "Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class BlankBatch:
    """The handle of passes in which this rank has no samples and takes part all the same."""

    def __init__(self, binding: Binding) -> None:
        self._binding = weakref.ref(binding)

    def release(self, norms_sq: Tensor, parts: bool = False) -> release_op.ReleaseResult:
        binding = self._binding()
        assert binding is not None
        return binding.release(norms_sq, parts, blank=True)


# First parameter's id -> bindings; an entry goes when that parameter does, so an id cannot be mistaken.
_bindings: dict[int, list[Binding]] = {}
# Backward pass -> who released in it. Bounded: only passes that still run matter, and few run at a time.
_admitted: OrderedDict[int, list[tuple[Binding, _Places]]] = OrderedDict()
_ADMITTED_LIMIT = 256


_ONE_DEVICE = Ranks()


def binding_for(
    parameters: Sequence[nn.Parameter],
    names: Sequence[str],
    options: Options,
    break_reason: str | None = None,
    ranks: Ranks = _ONE_DEVICE,
) -> Binding:
    """The binding of these trainable parameters, in the order of the graph's norms; made at their first call.

    Called at every forward pass. ``names`` are used for parameters that no declared state has named yet;
    ``break_reason`` says why Dynamo ended the graph before this one, for error messages. ``ranks`` train them together.
    """
    first = parameters[0]
    known = _bindings.get(id(first))
    if known is None:
        known = _bindings[id(first)] = []
        weakref.finalize(first, _bindings.pop, id(first), None)
    for binding in known:
        alike = binding.options is options or binding.options == options
        if alike and binding.ranks == ranks and binding.matches(parameters):
            break
    else:
        binding = Binding(parameters, names, options, ranks)
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
