"""Rows of operands that begin at multiples of 16 bytes, where Inductor has not decided their strides yet.

A vocabulary of odd size gives rows that no TMA descriptor takes and that pointers load one element at a time. The kernel that
makes such a buffer writes it with padded rows instead: nothing is copied, and what reads it otherwise sees the same elements.

Inductor pads large strides itself, but not for operators that come from outside of it.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch._inductor import ir

# Bytes. Descriptors ask for the second, memory is read in pieces of the first: it is taken where it costs little.
_ALIGNMENTS = (128, 16)
# What padding may cost: this share of the buffer, so that plans of bytes and memory stay true.
_SHARE = 1 / 32


def align_rows(operand: Any) -> None:
    """Decides the strides of what ``operand`` shows if they are free: contiguous, but for rows (of the last dimension) that are
    padded. Nothing happens where the operand would have to be copied then, or where its producer was asked not to pad."""
    operand.realize()
    buffer = _undecided(operand)
    if buffer is None:
        return
    flexible = buffer.layout
    strides = padded_strides(flexible.size, flexible.dtype.itemsize)
    if strides is None:
        return
    buffer.freeze_layout_with_exact_strides(strides)
    if not _is_strided(operand):
        buffer.layout = flexible


def padded_strides(size: Any, itemsize: int) -> list[Any] | None:
    """Contiguous strides with aligned rows; ``None`` where they are aligned already, or padding would cost too much."""
    if not 2 <= len(size) <= 3 or not isinstance(size[-1], int | sympy.Integer):
        return None  # with four dimensions and more, Inductor may prefer the channels last
    row = int(size[-1]) * itemsize
    little = [padding for padding in (-row % alignment for alignment in _ALIGNMENTS) if padding <= _SHARE * row]
    if row % min(_ALIGNMENTS) == 0 or not little:
        return None
    strides: list[Any] = [1, (row + little[0]) // itemsize]
    for length in reversed(size[1:-1]):
        strides.append(strides[-1] * length)
    return strides[::-1]


def _undecided(operand: Any) -> Any:
    """The buffer behind a value or a view of one, if its strides are free."""
    while isinstance(operand, ir.MutableBox | ir.BaseView):
        operand = operand.data
    if not isinstance(operand, ir.ComputedBuffer) or not isinstance(operand.layout, ir.FlexibleLayout):
        return None
    origin = operand.get_origin_node()
    return None if origin is not None and origin.meta.get("dislike_padding") else operand


def _is_strided(operand: Any) -> bool:
    """Whether strides can say what the operand shows."""
    while isinstance(operand, ir.MutableBox):
        operand = operand.data
    if not isinstance(operand, ir.BaseView):
        return True
    try:
        ir.ExternKernel.convert_to_reinterpret_view(operand)
    except NotImplementedError:
        return False
    return True
