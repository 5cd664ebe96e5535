"""What Dynamo calls in the place of a captured graph: compiled private graphs, and what a rank does that has no samples."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import guard
from .binding import Binding, binding_for
from .distributed import ddp
from .distributed.groups import Ranks
from .distributed.tensor_parallel import check_samples
from .options import Options
from .passes.errors import UnsupportedGraphError
from .passes.graph_spec import InputSpec, Role

CompiledGraph = Callable[..., Any]


@dataclass(frozen=True)
class _Blank:
    """The form of a private input."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __call__(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class PrivateGraph:
    """A compiled private graph. Each call looks up the state of the parameters that it is called with."""

    def __init__(
        self,
        compiled: CompiledGraph,
        specs: Sequence[InputSpec],
        options: Options,
        reason: str | None,
        ranks: Ranks,
        group: Any,
    ) -> None:
        self.compiled = compiled
        self.specs = tuple(specs)
        self.positions = [i for i, given in enumerate(specs) if given.role is Role.PARAMETER]
        self.names = [specs[i].name for i in self.positions]
        self.options = options
        self.reason = reason
        self.ranks = ranks
        self.group = group
        self._compared = ranks.model_group is None
        # What the last call was given, private inputs blank, for a rank that has no samples some time.
        self._last: list[Any] | None = None
        if ranks.data_ranks > 1:
            _graphs.add(self)

    def __call__(self, *args: Any) -> Any:
        binding = self._binding(args)
        if not self._compared:
            samples = {g.name: x for g, x in zip(self.specs, args, strict=True) if g.role in (Role.PRIVATE, Role.SCALAR)}
            check_samples(samples, self.ranks.model_group)
            self._compared = True
        if self.ranks.data_ranks > 1:
            self._last = [_kept(given, value) for given, value in zip(self.specs, args, strict=True)]
        return self._run(args, binding, binding.handle)

    def without_samples(self) -> Any:
        """Runs as in the last call, but on blank samples that count for nothing: sums stay zero, and nothing is recorded of them.

        The rank sends and receives, in forward and backward, what the others wait for.
        """
        assert self._last is not None
        args = [kept() if isinstance(kept, (_Blank, weakref.ref)) else kept for kept in self._last]
        if any(value is None and isinstance(kept, weakref.ref) for value, kept in zip(args, self._last, strict=True)):
            raise UnsupportedGraphError(
                "this rank has no samples in its batch, and a public input of the batch before is gone, so the graph cannot be run "
                "again without any. Keep public inputs alive, or pad the batch under a mask, as private_dataloader does."
            )
        binding = self._binding(args)
        return self._run(args, binding, binding.blank_handle)

    def trains(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether the last call was for just these parameters."""
        given = [self._last[i] for i in self.positions] if self._last is not None else []
        return {id(ref()) for ref in given} == set(map(id, parameters))

    def _binding(self, args: Sequence[Any]) -> Binding:
        binding = binding_for([args[i] for i in self.positions], self.names, self.options, self.reason, self.ranks)
        binding.break_reason = self.reason
        return binding

    def _run(self, args: Sequence[Any], binding: Binding, handle: Tensor) -> Any:
        resting = ddp.rest(self.group)
        outputs = self.compiled(*args, handle)
        node = guard.watch(outputs, binding)
        if node is not None and resting is not None:
            node.register_prehook(resting)
        return outputs


_graphs: weakref.WeakSet[PrivateGraph] = weakref.WeakSet()


def _kept(given: InputSpec, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Blank(value.shape, value.dtype, value.device) if given.role in (Role.PRIVATE, Role.SCALAR) else weakref.ref(value)


class EmptyBatch:
    """Stands for a graph that was captured with no samples on this rank, while other ranks have some.

    Without samples, parts of a backward pass vanish, and with them collectives that the other ranks wait for. So the graph that
    this rank ran last on the same parameters runs once more, on blank samples that count for nothing.
    """

    def __init__(self, captured: fx.Graph, specs: Sequence[InputSpec], options: Options) -> None:
        self.outputs = [_example(output) for output in captured.output_node().args[0]]  # type: ignore[union-attr]
        self.positions = [i for i, given in enumerate(specs) if given.role is Role.PARAMETER]
        self.options = options

    def __call__(self, *args: Any) -> list[Any]:
        parameters = [args[i] for i in self.positions]
        known = next((graph for graph in _graphs if graph.options == self.options and graph.trains(parameters)), None)
        if known is None:
            raise UnsupportedGraphError(
                "this rank has no samples in its first batch, so it does not know yet what the other ranks will send. Give every "
                "rank at least one sample in the first step, or pad batches under a mask, as private_dataloader does."
            )
        results = known.without_samples()
        tied = sum(value.sum() for value in results if isinstance(value, Tensor) and value.requires_grad)
        return [_blank_output(output, tied) for output in self.outputs]


def _blank_output(output: Any, tied: Tensor | int) -> Any:
    """A zero of the output's form, from which the backward pass leads to ``tied``."""
    if not isinstance(output, Tensor):
        return output
    blank = torch.zeros(tuple(output.shape), dtype=output.dtype, device=output.device)
    return _Tied.apply(blank, tied) if output.requires_grad and isinstance(tied, Tensor) else blank


class _Tied(torch.autograd.Function):
    """The first argument; its gradient goes on to the second, a single number, as zero."""

    @staticmethod
    def forward(ctx: Any, blank: Tensor, tied: Tensor) -> Tensor:
        ctx.zero = torch.zeros_like(tied)
        return blank.view_as(blank)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.zero


def _example(output: Any) -> Any:
    return output.meta.get("example_value") if isinstance(output, fx.Node) else output
