"""What Inductor generates for the norm operators on a Hopper GPU: which kernels, that they compile, and what they compute.

The generated kernel's own source is compiled for sm_90 and run by Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from flashnorm_compile.templates import _lowering, embedding_norm, flash_norm, ghost_norm, tied_cross_term
from flashnorm_compile.templates._aligned import padded_strides
from flashnorm_compile.templates._triton import device_of
from helpers import compile_source, interpret
from hopper import Output, hopper
from torch import Tensor
from torch._inductor.runtime import triton_heuristics
from triton.compiler import ASTSource

ops = torch.ops.flashnorm


def randn(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(sizes, dtype=dtype)


def generate(
    function: Callable[..., Any], *args: Any, choice: int | None = None, dynamic: bool = False
) -> tuple[Output, list[Any]]:
    """The code, and the choices that Inductor was given. ``choice``: take this one of all that max_autotune would time."""
    offered: list[Any] = []

    def select(name: str, choices: list[Any], inputs: Any, layout: Any) -> Any:
        offered.extend(choices)
        return choices[choice or 0].output_node()

    device_of.cache_clear()
    measure = torch._inductor.config.patch(max_autotune=choice is not None)
    with mock.patch.object(_lowering, "select_choice", select), measure, torch.no_grad(), hopper() as out:
        torch.compile(function, dynamic=dynamic)(*args)
    device_of.cache_clear()
    return out, offered


def template(out: Output, folder: Path) -> SimpleNamespace:
    """The generated template kernel as a function that Triton can compile: ``kernel``, ``meta``, ``num_warps``, ``num_stages``."""
    ((name, source),) = [(name, source) for name, source in out.kernels if "triton_tem" in name]
    found = SimpleNamespace()

    def keep(num_stages: int, num_warps: int, triton_meta: dict[str, Any], **_: Any) -> Callable[[Any], Any]:
        found.num_stages, found.num_warps, found.meta = num_stages, num_warps, triton_meta
        return lambda kernel: kernel

    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(triton_heuristics, "template", keep):
        spec.loader.exec_module(module)
    found.kernel = getattr(module, name)
    return found


def buffer(code: str, name: str) -> Tensor:
    """A buffer as the wrapper allocates it, holding NaN (zeros where the wrapper clears it)."""
    sizes, dtype = re.search(rf"{name} = empty_strided_cuda\(\(([\d, ]*)\), .*?, (torch\.\w+)\)", code).groups()  # type: ignore[union-attr]
    shape = [int(size) for size in re.findall(r"\d+", sizes)]
    return torch.zeros(shape, dtype=getattr(torch, dtype[6:])) if f"{name}.zero_()" in code else torch.full(shape, float("nan"))


def run_template(out: Output, found: SimpleNamespace, *inputs: Tensor) -> Tensor:
    """The template's output for real inputs, in the buffers and on the grid that the generated wrapper gives it."""
    call = re.search(r"triton_tem\w+\.run\((.*), (\d+), 1, 1, stream", out.codes[0])
    assert call is not None
    names, programs = call[1].split(", "), int(call[2])
    given = dict(zip(re.findall(r"\barg\d+_1\b", out.codes[0].split("= args")[0].split("def call")[-1]), inputs, strict=True))
    values = [given[name] if name in given else buffer(out.codes[0], name) for name in names]
    interpret(found.kernel, list(reversed(range(min(programs, 40)))), *values)
    return values[next(i for i, name in enumerate(found.meta["signature"]) if name.startswith("out_ptr"))]


FLASH = [(torch.bfloat16, (1, 4096, 16, 24)), (torch.bfloat16, (2, 70, 40, 136)), (torch.float32, (2, 33, 20, 17))]


@pytest.mark.parametrize(("dtype", "sizes"), FLASH)
def test_flash_norm(dtype: torch.dtype, sizes: tuple[int, int, int, int], tmp_path: Path) -> None:
    batch, length, p, d = sizes
    g, a = randn(batch, length, p, dtype=dtype), randn(batch, length, d, dtype=dtype)
    exact = flash_norm.reference_flash_norm(g, a)
    for factor in (1, 2):
        out, offered = generate(lambda g, a, factor=factor: ops.flash_norm(g, a) * factor, g, a)
        assert len(offered) == 1
        found = template(out, tmp_path)
        assert _compiled(found).stack == 0
        result = run_template(out, found, g, a).double()
        # Where there is one slot, there is nothing to add, and Inductor fuses what follows into the template.
        fused = result.dim() == 1
        torch.testing.assert_close(result if fused else result.sum(1), exact * factor if fused else exact, rtol=1e-5, atol=0)


def test_flash_norm_of_one_long_sample_is_split() -> None:
    g, a = randn(1, 4096, 16), randn(1, 4096, 24)
    out, _ = generate(lambda g, a: ops.flash_norm(g, a), g, a)
    split = int(re.search(r"SPLIT : tl.constexpr = (\d+)", out.kernels[0][1])[1])  # type: ignore[index]
    assert split > 1
    # Partial tiles, slots, cleared counters, and the norm itself (which the slots are, where there is one).
    kinds = re.findall(r"= empty_strided_cuda\(.*(torch\.\w+)\)", out.codes[0])
    assert sorted(kinds) in (["torch.float32"] * 2 + ["torch.int32"], ["torch.float32"] * 3 + ["torch.int32"])
    assert out.codes[0].count(".zero_()") == 1


def test_large_products_are_loaded_in_bulk(tmp_path: Path) -> None:
    for kind, operator in (("flash", ops.flash_norm), ("ghost", ops.ghost_norm)):
        for a in (randn(8, 1024, 768), randn(8, 768, 1024).mT):
            out, _ = generate(lambda g, a, operator=operator: operator(g, a), randn(8, 1024, 2304), a)
            made = _compiled(template(out, tmp_path))
            assert made.bulk_copies > 0, kind
            assert made.wgmma > 0, kind
            assert made.stack == 0, kind
            assert len(out.kernels) <= 3, "the template, and one or two fused reductions of its slots"
            assert "extern_kernels" not in out.codes[0].split("def call")[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ghost_norm(dtype: torch.dtype, tmp_path: Path) -> None:
    g, a = randn(2, 70, 40, dtype=dtype), randn(2, 24, 70, dtype=dtype).mT
    out, _ = generate(lambda g, a: ops.ghost_norm(g, a) * 2, g, a)
    found = template(out, tmp_path)
    assert _compiled(found).stack == 0
    norms = ghost_norm._bounded(run_template(out, found, g, a))
    torch.testing.assert_close(norms.double(), ghost_norm.reference_ghost_norm(g, a), rtol=1e-4, atol=0)


def test_embedding_norm(tmp_path: Path) -> None:
    g, index = randn(2, 300, 40), torch.randint(0, 50, (2, 300))
    out, _ = generate(lambda g, index: ops.embedding_norm(g, index, 50, 3), g, index)
    found = template(out, tmp_path)
    assert _compiled(found).stack == 0
    sorted_ids = ops.sort_indices(index, 50)
    code = out.codes[0]
    call = re.search(r"triton_tem\w+\.run\((\w+), (\w+), (\w+), (\w+), (\d+), 1, 1", code)
    assert call is not None
    slots = buffer(code, call[4])
    interpret(found.kernel, range(int(call[5])), g, *sorted_ids, slots)
    torch.testing.assert_close(
        embedding_norm._bounded(slots).double(), embedding_norm.reference_embedding_norm(g, index, 50, 3), rtol=1e-5, atol=0
    )


def test_tied_cross_term(tmp_path: Path) -> None:
    h, index, g, a = randn(2, 70, 40), torch.randint(0, 50, (2, 70)), randn(2, 66, 50), randn(2, 66, 40)
    out, _ = generate(lambda h, index, g, a: ops.tied_cross_term(h, index, g, a, 3), h, index, g, a)
    found = template(out, tmp_path)
    assert _compiled(found).stack == 0
    cross, size = run_template(out, found, h, index, g, a).double().sum((1, 2)).unbind(1)
    assert ((cross - tied_cross_term.reference_tied_cross_term(h, index, g, a, 3)).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize(
    ("operator", "reference"),
    [(ops.flash_norm, flash_norm.reference_flash_norm), (ops.ghost_norm, ghost_norm.reference_ghost_norm)],
)
def test_max_autotune_is_offered_all_tiles_and_aten(operator: Any, reference: Any, tmp_path: Path) -> None:
    g, a = randn(1, 150, 136), randn(1, 150, 140)
    _, offered = generate(lambda g, a: operator(g, a), g, a, choice=0)
    assert len(offered) >= 3
    assert "extern" in str(offered[-1]).lower()
    for choice in range(len(offered) - 1):
        out, _ = generate(lambda g, a: operator(g, a), g, a, choice=choice)
        slots = run_template(out, template(out, tmp_path), g, a)
        total = slots.sum(1) if slots.dim() == 2 else slots[:, :, 0].sum(1)
        torch.testing.assert_close(total.double(), reference(g, a), rtol=1e-4, atol=0)
    out, _ = generate(lambda g, a: operator(g, a), g, a, choice=len(offered) - 1)
    assert "extern_kernels.flashnorm_" in out.codes[0]


def test_a_dynamic_batch_and_length_keep_bulk_copies(tmp_path: Path) -> None:
    g, a = randn(8, 1024, 768), randn(8, 1024, 768)
    for tensor in (g, a):
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    out, _ = generate(lambda g, a: ops.flash_norm(g, a), g, a)
    found = template(out, tmp_path)
    assert any(name.startswith("ks") for name in found.meta["signature"])
    assert _compiled(found).bulk_copies > 0


ODD = {
    "flash_norm": lambda g, a, f: ops.flash_norm(g, a),
    "ghost_norm": lambda g, a, f: ops.ghost_norm(g, a),
    "clipped_sum": lambda g, a, f: ops.clipped_sum(g, a, f),
    "weight_grads": lambda g, a, f: ops.weight_grads(g, a, torch.bfloat16),
}


@pytest.mark.parametrize("operator", ODD.values(), ids=ODD)
def test_rows_of_an_odd_width_are_written_where_bulk_copies_can_read_them(operator: Any, tmp_path: Path) -> None:
    out, _ = generate(
        lambda x, a, f: operator((x * 2).view(2, 70, 513), a, f),
        randn(140, 513),
        randn(2, 70, 40),
        torch.rand(2, dtype=torch.float32),
    )
    assert len(re.findall(r"empty_strided_cuda\(\(140, 513\), \(520, 1\), torch.bfloat16\)", out.codes[0])) == 1
    assert not re.search(r"empty_strided_cuda\(\(2, 70, 513\)", out.codes[0]), "a copy"
    found = template(out, tmp_path)
    assert "G_LAYOUT : tl.constexpr = 1" in dict(out.kernels)[found.kernel.__name__]
    assert _compiled(found).bulk_copies > 0
    assert "extern_kernels" not in out.codes[0].split("def call")[1]


def test_padded_rows_are_read_as_they_lie(tmp_path: Path) -> None:
    x, a = randn(140, 513), randn(2, 70, 40)
    out, _ = generate(lambda x, a: ops.flash_norm((x * 2).view(2, 70, 513), a), x, a)
    g = torch.full((140, 520), float("nan"), dtype=torch.bfloat16)[:, :513].copy_(x * 2)
    found = template(out, tmp_path)
    call = re.search(r"triton_tem\w+\.run\((\w+), (\w+), (.*), (\d+), 1, 1, stream", out.codes[0])
    assert call is not None
    values = [g, a, *(buffer(out.codes[0], name) for name in call[3].split(", "))]
    interpret(found.kernel, range(int(call[4])), *values)
    slots = values[next(i for i, name in enumerate(found.meta["signature"]) if name.startswith("out_ptr"))]
    exact = flash_norm.reference_flash_norm(g.view(2, 70, 513), a)
    torch.testing.assert_close(slots.double().sum(1), exact, rtol=1e-5, atol=0)


def test_rows_are_not_padded_where_the_operand_would_be_copied() -> None:
    x, a = randn(140, 3, 301), randn(2, 70, 40)
    out, _ = generate(lambda x, a: ops.flash_norm((x * 2).view(2, 70, 903), a), x, a)
    made = re.findall(r"empty_strided_cuda\((.*), torch.bfloat16\)", out.codes[0])
    assert made == ["(140, 3, 301), (903, 301, 1)"]


def test_padding_costs_little_and_aligned_rows_get_none() -> None:
    assert padded_strides([8192, 50257], 2) == [50304, 1], "128 bytes"
    assert padded_strides([2, 70, 513], 2) == [36400, 520, 1], "16 bytes"
    assert padded_strides([2, 70, 512], 2) is None
    assert padded_strides([8192, 50256], 2) is None
    for width in (1, 17, 100):
        assert padded_strides([64, width], 2) is None, "too much of the whole"
    assert padded_strides([513], 2) is None
    assert padded_strides([2, 3, 5, 513], 2) is None


@pytest.mark.parametrize("sizes", [(2, 0, 3, 4), (2, 3, 0, 4), (0, 3, 4, 5)])
def test_nothing_to_add_launches_no_template(sizes: tuple[int, int, int, int]) -> None:
    batch, length, p, d = sizes
    for operator in (ops.flash_norm, ops.ghost_norm):
        out, offered = generate(lambda g, a, operator=operator: operator(g, a), randn(batch, length, p), randn(batch, length, d))
        assert not offered
        assert not any("triton_tem" in name for name, _ in out.kernels)


def test_on_a_cpu_the_operator_itself_is_called() -> None:
    g, a = randn(2, 5, 3), randn(2, 5, 4)
    compiled = torch.compile(lambda g, a: ops.flash_norm(g, a) + ops.ghost_norm(g, a))
    torch.testing.assert_close(compiled(g, a), ops.flash_norm(g, a) + ops.ghost_norm(g, a))


def _compiled(found: SimpleNamespace) -> Any:
    meta = found.meta
    source = ASTSource(found.kernel, meta["signature"], dict(meta["constants"]), dict(meta["configs"][0]))
    return compile_source(source, 90, found.num_warps, found.num_stages)
