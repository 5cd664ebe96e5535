"""``flashnorm::release``: where the compiled backward meets the run-time state.

The op turns squared norms into clip factors, noise keys and a noise level. What it returns is decided at run time by
the handler behind ``handle``, so clip norm, noise level, batch size and the parameters' identity never enter a graph.

    flashnorm::release(handle, norms_sq, after, rows=None, parameters=0, parts=False) -> (factors, keys, noise_std)

    handle     int64 []      CPU; what ``register`` returned, as a tensor
    norms_sq   float32 [B, P]  squared norm of sample b's contribution to the gradient of parameter p
    rows, parameters         column j of ``norms_sq`` [B, N] belongs to parameter ``rows[j]`` of P = ``parameters``, and the
                             contribution of a parameter without a column is zero; None: all P of them, in their order
    after      any           ignored; a tensor of the backward, so that the op cannot be moved into the forward
    factors    float32 [P, B]  multiplies each contribution; exactly 0.0 for a sample that must not contribute
    parts      whether parameters may be parts of larger tensors, as shards are; keys then say where they lie
    keys       int64 [P, 2]  generator key and stream of each parameter's noise; fresh at every execution. With parts [P, 5]:
                             and the part's place in the whole tensor (noise.py)
    noise_std  float32 []    standard deviation of the noise; 0.0 for a micro-batch that adds none

Results are on the device of ``norms_sq``. B and P may be symbolic, and B may be 0.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, fx

ReleaseResult = tuple[Tensor, Tensor, Tensor]


class Handler(Protocol):
    """What a handle stands for."""

    def release(self, norms_sq: Tensor, parts: bool) -> ReleaseResult:
        """Called once for every execution of the backward graph, with gradients disabled."""
        ...


# Weak: the owner of a handler decides how long it lives. Numbers are never used twice.
_handlers: weakref.WeakValueDictionary[int, Handler] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(handler: Handler) -> int:
    """Returns the number that reaches ``handler`` for as long as somebody else keeps it alive."""
    number = next(_numbers)
    _handlers[number] = handler
    return number


def _release(
    handle: Tensor, norms_sq: Tensor, after: Tensor, rows: Sequence[int] | None = None, parameters: int = 0, parts: bool = False
) -> ReleaseResult:
    number = int(handle.item())
    handler = _handlers.get(number)
    if handler is None:
        raise RuntimeError(
            f"flashnorm::release: no handler has the number {number}. Its parameters are gone, or a compiled "
            "graph was called by hand instead of through torch.compile."
        )
    return handler.release(norms_sq if rows is None else _placed(norms_sq, rows, parameters), parts)


def _placed(norms_sq: Tensor, rows: Sequence[int], parameters: int) -> Tensor:
    """Columns where they belong."""
    placed = norms_sq.new_zeros((norms_sq.shape[0], parameters))
    return placed.index_copy_(1, _index(tuple(rows), norms_sq.device), norms_sq)


@functools.cache
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: another copy to a GPU in every step would be one to wait for."""
    return torch.tensor(rows, device=device)


def _release_fake(
    handle: Tensor, norms_sq: Tensor, after: Tensor, rows: Sequence[int] | None = None, parameters: int = 0, parts: bool = False
) -> ReleaseResult:
    samples, columns = norms_sq.shape
    count = columns if rows is None else parameters
    return (
        norms_sq.new_empty((count, samples), dtype=torch.float32),
        norms_sq.new_empty((count, 5 if parts else 2), dtype=torch.int64),
        norms_sq.new_empty((), dtype=torch.float32),
    )


_library = torch.library.Library("flashnorm", "FRAGMENT")
_library.define(
    "release(Tensor handle, Tensor norms_sq, Tensor after, int[]? rows=None, int parameters=0, bool parts=False)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe, torch.Tag.pt2_compliant_tag),
)
# One kernel for every backend; it never needs a gradient, because it only runs inside a compiled backward.
_library.impl("release", _release, "CompositeExplicitAutograd")
torch.library.register_fake("flashnorm::release", _release_fake, lib=_library)

release = torch.ops.flashnorm.release.default
# Two executions give different keys: the op must be neither merged, nor dropped, nor recomputed.
fx.node.has_side_effect(release)
