"""What the backend knows about a captured graph before it is differentiated: the role of every input, and the settings
that are baked into the rewritten graph. Everything else (norms, noise, accumulation) is run-time state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

Algorithm = Literal["auto", "materialize", "ghost", "flash", "recompute"]


class Role(Enum):
    PARAMETER = "trainable parameter"
    PUBLIC = "public"
    PRIVATE = "private"
    SCALAR = "private number"
    HANDLE = "run-time state"


@dataclass(frozen=True)
class InputSpec:
    """One graph input, in the order of the captured graph. ``dim``: the sample dimension of a private one.

    ``gathered``: for a sharded parameter, whether the backward gathers it "again" or the forward has to "keep" the gathered one.
    ``split``: whether the ranks of the model group hold parts of it, instead of a copy each.
    """

    name: str
    role: Role
    dim: int = 0
    gathered: Literal["again", "keep"] | None = None
    split: bool = False


@dataclass(frozen=True)
class GraphSpec:
    """``norm_algorithm``: (glob, algorithm) pairs, first match wins. ``loss_normalizer``: counted elements per sample.
    ``memory_budget``: bytes (int), or a multiple of the non-private step's peak (float).

    ``data_meshes``: for each mesh whose ranks hold different samples, the process groups of its dimensions; every gradient has to
    be summed over all ranks of one of them. ``data_ranks``: how many ranks that is. ``parts``: whether a parameter may be a part
    of a larger tensor, so that its noise needs the place. ``sum_over``: a process group over which every gradient is still to be
    summed, since the graph does not do it by itself; None: it does. ``model_group``: the process group whose ranks compute parts of
    the same samples (tensor parallelism).
    """

    inputs: tuple[InputSpec, ...]
    norm_algorithm: tuple[tuple[str, Algorithm], ...] = (("*", "auto"),)
    loss_normalizer: float | None = None
    loss_reduction: Literal["mean", "sum"] = "mean"
    memory_budget: float | int = 1.1
    data_meshes: tuple[tuple[str, ...], ...] = ()
    data_ranks: int = 1
    parts: bool = False
    sum_over: str | None = None
    model_group: str | None = None

    @property
    def data_groups(self) -> frozenset[str]:
        """All process groups whose ranks hold different samples."""
        return frozenset(group for mesh in self.data_meshes for group in mesh)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the trainable parameters, in input order: the order of norms, factors and noise keys."""
        return tuple(spec.name for spec in self.inputs if spec.role is Role.PARAMETER)
