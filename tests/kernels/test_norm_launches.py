"""The norm operators outside of generated code: what a call on a CUDA tensor launches, run by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from eager import interpreted_launches
from flashnorm_compile.templates import _triton, embedding_norm, flash_norm, ghost_norm, tied_cross_term
from flashnorm_compile.templates._triton import AMPERE, HOPPER, Device
from helpers import FORMS, operand
from torch import Tensor


@pytest.fixture(params=[HOPPER, AMPERE], ids=["Hopper", "Ampere"], autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[Device]:
    def device_of(_: torch.device) -> Device:
        return request.param

    with mock.patch.object(_triton, "device_of", device_of), mock.patch.object(embedding_norm, "device_of", device_of):
        yield request.param


def factors(sizes: tuple[int, int, int, int], dtype: torch.dtype, form: str) -> tuple[Tensor, Tensor]:
    batch, length, p, d = sizes
    return operand((batch, length, p), dtype, form), operand((batch, length, d), dtype, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 70, 33, 20), (1, 1, 1, 1)])
def test_norms_of_products(sizes: tuple[int, int, int, int], dtype: torch.dtype, form: str) -> None:
    g, a = factors(sizes, dtype, form)
    with interpreted_launches():
        flash, ghost = flash_norm._launch(g, a), ghost_norm._launch(g, a)
    exact = flash_norm.reference_flash_norm(g, a)
    torch.testing.assert_close(flash.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(ghost.double(), exact, rtol=1e-4, atol=0)


def test_long_samples_are_split() -> None:
    g, a = factors((1, 4096, 9, 16), torch.bfloat16, "contiguous")
    assert flash_norm.tile_choices(1, 4096, 9, 16, g.dtype, HOPPER, "ieee")[0].tiles.SPLIT > 1
    with interpreted_launches():
        norms = flash_norm._launch(g, a)
        again = flash_norm._launch(g, a)
    torch.testing.assert_close(norms.double(), flash_norm.reference_flash_norm(g, a), rtol=1e-5, atol=0)
    assert torch.equal(norms, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_embeddings(dtype: torch.dtype) -> None:
    g, index = operand((2, 300, 20), dtype, "padded"), torch.randint(-9, 9, (2, 300))
    with interpreted_launches():
        norms = embedding_norm._launch(g, index, 9, 4)
    torch.testing.assert_close(norms.double(), embedding_norm.reference_embedding_norm(g, index, 9, 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_terms(dtype: torch.dtype) -> None:
    h, index = operand((2, 70, 20), dtype, "padded"), torch.randint(-9, 9, (2, 70))
    g, a = factors((2, 40, 9, 20), dtype, "transposed")
    with interpreted_launches():
        cross, size = tied_cross_term._launch(h, index, g, a, 4)
    exact = tied_cross_term.reference_tied_cross_term(h, index, g, a, 4)
    assert ((cross.double() - exact).abs() <= 1e-5 * size.double()).all()


@pytest.mark.parametrize("sizes", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
def test_nothing_to_add_launches_nothing(sizes: tuple[int, int, int, int]) -> None:
    g, a = torch.zeros(sizes[:3]), torch.randn(*sizes[:2], sizes[3])
    index = torch.zeros(sizes[:2], dtype=torch.int64)
    # A table without rows has no index.
    cross = tied_cross_term._launch(a, index, g, a)[0] if sizes[2] else torch.zeros(sizes[0])
    rows = embedding_norm._launch(torch.zeros(*sizes[:2], 0), index, 1)
    for norms in (flash_norm._launch(g, a), ghost_norm._launch(g, a), rows, cross):
        torch.testing.assert_close(norms, torch.zeros(sizes[0]))
