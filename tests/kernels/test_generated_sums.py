"""What Inductor generates for the sum and noise operators on a Hopper GPU: which kernels, that they compile, what they compute."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from flashnorm_compile.templates import clipped_sum, noise, per_layer, weight_grads, weighted_sum
from helpers import interpret
from test_generated_code import _compiled, buffer, generate, randn, run_template, template
from torch import Tensor

ops = torch.ops.flashnorm
KEYS = torch.tensor([[0x0123456789ABCDEF, 7], [-3, -(1 << 40)]])
RTOL = 1e-5


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=RTOL, atol=RTOL * float(expected.abs().max()))


def launches(code: str) -> list[str]:
    return re.findall(r"(\w+)\.run\(", code.split("def call")[1].split("def get_args")[0])


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.bfloat16, (2, 70, 40, 24)),
        (torch.float32, (3, 33, 20, 17)),
        (torch.bfloat16, (9, 2, 40, 24)),
        (torch.bfloat16, (1, 4096, 16, 24)),
    ],
)
def test_clipped_sum(dtype: torch.dtype, sizes: tuple[int, int, int, int], tmp_path: Path) -> None:
    batch, length, p, d = sizes
    g, a, factors = randn(batch, length, p, dtype=dtype), randn(batch, d, length, dtype=dtype).mT, torch.rand(batch) + 0.1
    if batch > 1:
        g[1], factors[1] = float("nan"), 0
    out, _ = generate(lambda g, a, factors: ops.clipped_sum(g, a, factors) * 2, g, a, factors)
    found = template(out, tmp_path)
    assert _compiled(found).stack == 0
    result = run_template(out, found, g, a, factors)
    # A sum of one segment is the template's own output, into which Inductor fuses what follows.
    exact = clipped_sum.reference(g, a, factors)
    assert_near(result.sum(0) if result.dim() == 3 else result, exact if result.dim() == 3 and result.shape[0] > 1 else 2 * exact)


def test_every_offered_form_of_the_clipped_sum_fills_the_same_segments(tmp_path: Path) -> None:
    g, a, factors = randn(2, 70, 72), randn(2, 70, 140), torch.rand(2)
    _, offered = generate(lambda g, a, f: ops.clipped_sum(g, a, f), g, a, factors, choice=0)
    assert len(offered) >= 3
    assert "extern" in str(offered[-1]).lower()
    for choice in range(len(offered) - 1):
        out, _ = generate(lambda g, a, f: ops.clipped_sum(g, a, f), g, a, factors, choice=choice)
        segments = run_template(out, template(out, tmp_path), g, a, factors)
        assert_near(segments.sum(0) if segments.dim() == 3 else segments, clipped_sum.reference(g, a, factors))


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16])
def test_weight_grads(store: torch.dtype, tmp_path: Path) -> None:
    g, a = randn(2, 70, 40), randn(2, 70, 24)
    out, _ = generate(lambda g, a: ops.weight_grads(g, a, store), g, a)
    found = template(out, tmp_path)
    assert _compiled(found).stack == 0
    exact = weight_grads.reference(g, a)
    grads = run_template(out, found, g, a)
    assert f"empty_strided_cuda((2, 40, 24), (960, 24, 1), {store})" in out.codes[0]
    torch.testing.assert_close(grads.double(), exact, rtol=RTOL if store == torch.float32 else 8e-3, atol=1e-3)
    assert len(launches(out.codes[0])) <= 2
    assert "extern_kernels" not in out.codes[0].split("def call")[1]


def test_per_layer_in_one_launch(tmp_path: Path) -> None:
    # The same tensor twice: the template must read both roles of it.
    g, a, bound = randn(5, 40, 20), randn(5, 40, 24), torch.tensor(0.5)
    out, _ = generate(lambda g, a, bound: ops.per_layer(g, a, bound, bound), g, a, bound)
    found = template(out, tmp_path)
    assert _compiled(found).stack == 0
    totals = run_template(out, found, g, a, bound)
    assert_near(totals.sum(0) if totals.dim() == 3 else totals, per_layer.reference(g, a, 0.5, 0.5)[0])


def test_per_layer_in_two_launches() -> None:
    g, a, one = randn(4, 256, 512), randn(4, 256, 512), torch.tensor(1.0)
    for constant in (None, 0.01):
        out, _ = generate(lambda g, a, one, constant=constant: ops.per_layer(g, a, one, one, constant), g, a, one)
        assert sum(name.startswith("triton_tem") for name in launches(out.codes[0])) == 2


def test_noise_is_one_kernel_in_the_graph_and_in_place_where_it_may() -> None:
    def step(x: Tensor, keys: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_noise(x * 2, keys, std, 1), ops.add_noise(x, keys, std, 0, torch.bfloat16)

    out, _ = generate(step, randn(33, 18, dtype=torch.float32), KEYS, torch.tensor(0.5))
    code = out.codes[0].split("def call")[1]
    calls = re.findall(r"add_noise_kernel_\d+\.run\((\w+), (\w+),", code)
    assert len(calls) == 2
    assert sum(result == value for result, value in calls) == 1
    assert "ops.flashnorm" not in code


def test_weighted_sum_and_noise_are_one_launch() -> None:
    w, factors = torch.randn(4, 9, 11), torch.rand(4)
    out, _ = generate(lambda *args: ops.weighted_sum_noise(*args, 1, torch.bfloat16), w, factors, KEYS, torch.tensor(0.5))
    assert [name.startswith("weighted_sum_noise_kernel") for name in launches(out.codes[0])] == [True]
    # The launch's own arguments, run on real tensors.
    call = re.search(r"weighted_sum_noise_kernel_\d+\.run\((.*), (\d+), 1, 1, stream", out.codes[0])
    assert call is not None
    arguments = [int(word) if word.isdigit() else word for word in call[1].split(", ")]
    result = buffer(out.codes[0], str(arguments[0]))
    values = [result, w, factors, KEYS, torch.tensor(0.5), *arguments[5:]]
    interpret(weighted_sum_kernel(), range(int(call[2])), *values, False, 256, "philox4x32-10")
    expected = noise.reference_add_noise(weighted_sum.reference(w, factors), KEYS, torch.tensor(0.5), 1)
    torch.testing.assert_close(result.double(), expected, rtol=8e-3, atol=1e-5)


def weighted_sum_kernel() -> object:
    kernels = noise.triton_kernels()
    assert kernels is not None
    return kernels.weighted_sum_noise_kernel
