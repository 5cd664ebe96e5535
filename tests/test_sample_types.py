"""The arithmetic of sample axes: views move an axis by structure, never by comparing sizes."""

from __future__ import annotations

import pytest
import sympy
from flashnorm_compile.passes.sample_types import (
    ANY_SCALE,
    Axis,
    _divided,
    common_scale,
    divides,
    locate,
    scale_inverse,
    scale_product,
    stride_of,
)
from torch.utils._sympy.functions import FloorDiv

S, T = sympy.symbols("s t", positive=True, integer=True)


def sizes(*values: object) -> tuple[sympy.Expr, ...]:
    return tuple(sympy.sympify(value) for value in values)


@pytest.mark.parametrize(
    ("batch", "axis", "old", "new", "found"),
    [
        (4, Axis(0), (4, 6, 5), (24, 5), Axis(0, sympy.Integer(6))),
        (4, Axis(0, sympy.Integer(6)), (24, 5), (4, 6, 5), Axis(0)),
        (4, Axis(1), (6, 4, 5), (24, 5), Axis(0)),
        (4, Axis(0), (4, 4, 4), (16, 4), Axis(0, sympy.Integer(4))),
        (4, Axis(1), (4, 4, 4), (16, 4), Axis(0)),
        (4, Axis(0), (4, 6), (2, 12), None),
        (4, Axis(0, sympy.Integer(6)), (24, 5), (8, 15), Axis(0, sympy.Integer(2))),
        (4, Axis(0, sympy.Integer(6)), (24, 5), (3, 40), None),
        (S, Axis(0), (S, T, 5), (S * T, 5), Axis(0, T)),
        (S, Axis(0), (S, S, 5), (S * S, 5), Axis(0, S)),
        (S, Axis(1), (T, S, 5), (S * T, 5), Axis(0)),
    ],
)
def test_views_move_the_axis(batch: object, axis: Axis, old: tuple, new: tuple, found: Axis | None) -> None:
    stride = stride_of(axis, sizes(*old))
    assert locate(stride, sympy.sympify(batch), sizes(*new)) == found


def test_one_sample_has_a_place_in_every_view() -> None:
    for new in [(6, 5), (30,), (1, 6, 5), (6, 1, 5)]:
        assert locate(stride_of(Axis(0), sizes(1, 6, 5)), sympy.S.One, sizes(*new)) is not None


def test_division_is_exact_or_unknown() -> None:
    assert divides(S, S * T)
    assert not divides(S + 1, S * T)
    assert divides(sympy.Integer(3), sympy.Integer(12))
    assert not divides(sympy.Integer(0), sympy.Integer(12))
    assert not divides(sympy.Integer(2), S + 1)  # (S + 1)/2 is a sum of fractions
    assert divides(S + 1, S * T + T)
    assert _divided(FloorDiv(S**2, S)) == S
    assert _divided(FloorDiv(S + 1, sympy.Integer(2))) == FloorDiv(S + 1, sympy.Integer(2))
    assert not divides(sympy.Integer(2), S + 1)  # (S + 1)/2 is a sum of fractions
    assert divides(S + 1, S * T + T)
    assert _divided(FloorDiv(S**2, S)) == S
    assert _divided(FloorDiv(S + 1, sympy.Integer(2))) == FloorDiv(S + 1, sympy.Integer(2))


def test_scales_multiply_and_add() -> None:
    count = (("count", 1),)
    assert scale_product(count, scale_inverse(count)) == ()
    assert common_scale([count, count]) == count
    assert common_scale([count, ()]) is None
    assert common_scale([count, ANY_SCALE]) == count
    assert common_scale([(), ANY_SCALE]) == ()
    assert common_scale([ANY_SCALE, ANY_SCALE]) == ANY_SCALE
