"""The norm operators on a CUDA device, called and compiled, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from flashnorm_compile.templates import embedding_norm, tied_cross_term
from flashnorm_compile.templates import flash_norm as _flash  # noqa: F401  (registers the operator)
from flashnorm_compile.templates import ghost_norm as _ghost  # noqa: F401  (registers the operator)
from helpers import FORMS, on_device, operand

pytestmark = pytest.mark.cuda
ops = torch.ops.flashnorm
SHAPES = [(1, 4096, 136, 72), (3, 101, 77, 55), (2, 300, 129, 1)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_of_products(shape: tuple[int, int, int, int], dtype: torch.dtype, form: str, compiled: bool) -> None:
    batch, length, p, d = shape
    g, a = operand((batch, length, p), dtype, form), operand((batch, length, d), dtype, form)
    exact = torch.einsum("btp,btd->bpd", g.double(), a.double()).square().sum((1, 2))
    operands = on_device(g), on_device(a)
    for operator in (ops.flash_norm, ops.ghost_norm):
        norms = (torch.compile(operator) if compiled else operator)(*operands)
        torch.testing.assert_close(norms.cpu().double(), exact, rtol=1e-3 if operator is ops.ghost_norm else 1e-4, atol=0)
        assert torch.equal(norms, (torch.compile(operator) if compiled else operator)(*operands)), "the same twice"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_of_embeddings_and_tied_weights(dtype: torch.dtype) -> None:
    h, index = torch.randn(3, 333, 72, dtype=dtype), torch.randint(-50, 50, (3, 333))
    g, a = torch.randn(3, 301, 50, dtype=dtype), torch.randn(3, 301, 72, dtype=dtype)
    norms = ops.embedding_norm(h.cuda(), index.cuda(), 50, 4).cpu().double()
    torch.testing.assert_close(norms, embedding_norm.reference_embedding_norm(h, index, 50, 4), rtol=1e-4, atol=0)
    cross, size = (x.cpu().double() for x in ops.tied_cross_term(h.cuda(), index.cuda(), g.cuda(), a.cuda(), 4))
    assert ((cross - tied_cross_term.reference_tied_cross_term(h, index, g, a, 4)).abs() <= 1e-4 * size).all()
