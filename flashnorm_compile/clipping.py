"""Which parameters share a norm, and the factor that each sample's contribution gets.

Dimensions: B samples, P parameters of a graph, K clipping groups.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import Options
from .passes.errors import OptionsError

EVERYTHING = "all parameters"


@dataclass(frozen=True)
class Layout:
    """The clipping groups over all parameters of a state.

    Guarantee: the fractions' squares sum to at most 1, so the groups' norms combine to at most ``max_grad_norm``.
    """

    group_names: tuple[str, ...]
    fractions: tuple[float, ...]
    """Of ``max_grad_norm``, one for each group."""
    group_of: tuple[int, ...]
    """Group of each parameter, by its index in the state; -1 for a frozen one."""


def layout_for(names: Sequence[str], trainable: Sequence[bool], options: Options) -> Layout:
    """Groups parameters by their names as ``options.clipping`` says. Frozen parameters take no share of the norm.

    Raises:
        OptionsError: clipping="group" and a trainable parameter matches none of the globs.
    """
    if options.clipping == "per_layer":
        labels = [name.rpartition(".")[0] for name in names]
        used = tuple(dict.fromkeys(label for label, trains in zip(labels, trainable, strict=True) if trains))
        fractions = (1 / math.sqrt(len(used)),) * len(used) if used else ()
    elif options.clipping == "group":
        assert options.groups is not None
        combined = math.hypot(*options.groups.values())
        used = tuple(options.groups)
        fractions = tuple(norm / combined for norm in options.groups.values())
        labels = [_first_match(name, used) if trains else "" for name, trains in zip(names, trainable, strict=True)]
    else:
        used, fractions, labels = (EVERYTHING,), (1.0,), [EVERYTHING] * len(names)
    number = {label: index for index, label in enumerate(used)}
    group_of = tuple(number[label] if trains else -1 for label, trains in zip(labels, trainable, strict=True))
    return Layout(used, fractions, group_of)


def _first_match(name: str, globs: Sequence[str]) -> str:
    for glob in globs:
        if fnmatch.fnmatchcase(name, glob):
            return glob
    raise OptionsError(
        f"Parameter {name!r} matches none of the globs in groups: {', '.join(map(repr, globs))}. Every trainable "
        "parameter must belong to a group: add a glob for it (a last '*' catches the rest), or freeze it."
    )


def group_norms(norms_sq: Tensor, groups: Tensor | None, group_count: int) -> Tensor:
    """Norms float32 [B, K] from squared norms [B, P]; ``groups`` int64 [P], or None when there is one group.

    Squared norms that rounding made negative count as 0. NaN and Inf stay what they are.
    """
    squares = norms_sq.clamp(min=0.0)
    if groups is None:
        return squares.sum(1, keepdim=True).sqrt_()
    return squares.new_zeros((squares.shape[0], group_count)).index_add_(1, groups, squares).sqrt_()


def clip_factors(norms: Tensor, bounds: Tensor | float, stability_constant: float | None) -> Tensor:
    """Factors [B, K]: min(1, bound / norm), or bound / (norm + stability_constant) for automatic clipping.

    ``bounds``: a number, or float32 [K]. Guarantee: 0 <= factor and factor * norm <= bound up to float32 rounding;
    exactly 0.0 where the norm is not finite.
    """
    if stability_constant is None:
        factors = torch.reciprocal(norms).mul_(bounds).clamp_(max=1.0)
    else:
        factors = torch.reciprocal(norms + stability_constant).mul_(bounds)
    return factors.nan_to_num_(nan=0.0)
