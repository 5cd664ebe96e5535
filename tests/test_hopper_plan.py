"""Inductor's code for a Hopper GPU against the plan: exactly its kernels, no large buffer that it does not account for, and the
memory and the traffic that it predicts.

Models of the papers' sizes with one block of each kind, one with two: the others are the same.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Inductor's code for a GPU needs the triton package")
if torch.cuda.is_available():
    pytest.skip("hopper() is for machines without a GPU", allow_module_level=True)

from flashnorm_compile.passes import private_pass
from flashnorm_compile.passes.factored import is_convolution
from flashnorm_compile.passes.kernels import BYTES_AT_ONCE, by_library
from flashnorm_compile.passes.plan import ParameterPlan, Plan

from benchmarks.case import Problem
from benchmarks.contenders.base import Privacy
from benchmarks.contenders.nonprivate import NonPrivate
from benchmarks.contenders.ours import Ours
from benchmarks.hopper import Generated, hopper
from benchmarks.hopper.calls import calls_of_ours
from benchmarks.hopper.fakes import fake_problem
from benchmarks.roofline import gpt2, llama_block, vit

MIB = 2**20
_BRACKETS = re.compile(r"\((?:[^()]|\([^()]*\))*\)")
LIBRARY = "extern_kernels.bmm"
CASES: dict[str, Callable[[], Problem]] = {
    "gpt2-b1-t1024": partial(gpt2, 1, 1024, layers=1),
    "gpt2-b1-t4096": partial(gpt2, 1, 4096, layers=1),
    "gpt2-b8-t1024": partial(gpt2, 8, 1024, layers=1),
    "gpt2-b8-t4096": partial(gpt2, 8, 4096, layers=1),
    "vit-b64": partial(vit, 64, layers=2),  # sums of one shape share a launch
    "llama-block": partial(llama_block, 4, 2048),
}


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """Of the module's scope: all tests of one case come one after the other, and share what is generated for it."""
    return str(request.param)


@dataclass(frozen=True)
class Step:
    """The generated code of one step; the plan, and the kernels that it names, counted before the rewrite takes the graph apart."""

    code: Generated
    plan: Plan | None
    planned: Counter[str]


@functools.cache
def step(name: str, *, private: bool) -> Step:
    """Generated once for all tests."""
    plans: list[tuple[Plan, Counter[str]]] = []
    plan_gradients = private_pass.plan_gradients
    contender = Ours("flashnorm") if private else NonPrivate("inductor", compiled=True)

    def keep(*args: Any) -> Plan:
        plan = plan_gradients(*args)
        plans.append((plan, planned_calls(plan)))
        return plan

    with (
        mock.patch.object(private_pass, "plan_gradients", keep),
        fake_problem(CASES[name], torch.bfloat16) as problem,
        hopper(go_on=True) as found,
    ):
        contender.prepare(problem, Privacy()).backward()
    return Step(found, *(plans[0] if plans else (None, Counter())))


def both(name: str) -> tuple[Generated, Generated, Plan]:
    """The private step, the non-private one, and the plan."""
    private = step(name, private=True)
    assert private.plan is not None
    return private.code, step(name, private=False).code, private.plan


def planned_calls(plan: Plan) -> Counter[str]:
    """Kernels of single parameters, as their algorithms name them."""
    calls: Counter[str] = Counter()
    for parameter in plan.parameters:
        calls.update(_calls(parameter))
    return calls


def _calls(parameter: ParameterPlan) -> list[str]:
    products = [factor for factor in parameter.factors if factor.kind == "outer"]
    rows = len(products) < len(parameter.factors)
    if parameter.chosen == "materialize":
        if not products or any(map(is_convolution, products)):
            return []
        if rows:  # the gradient of a tied table, replayed for each sample
            return [LIBRARY] * len(products)
        return [LIBRARY if by_library(sum(map(_positions, products))) else "weight_grads"]
    if parameter.norms == "flash":
        return ["flash_norm", *["clipped_sum"] * len(products)]
    if parameter.norms != "ghost":
        return []
    outer_product = not rows and _positions(products[0]) == 1
    norms = ["ghost_norm"] * (bool(products) and not outer_product) + ["embedding_norm", "sort_indices"] * rows
    return norms + ["clipped_sum"] * len(products) + ["tied_cross_term"] * (rows and bool(products))


def _positions(factor: Any) -> int:
    """T, where the factor is a product over [B * T]."""
    use = factor.use
    return 0 if is_convolution(factor) else int(use.axes[0].inner)


def planned_sizes(plan: Plan) -> set[int]:
    """Bytes of what an algorithm makes for a parameter: gradients of all samples, the sum in float32, the released gradient."""
    sizes: set[int] = set()
    for parameter in plan.parameters:
        value = parameter.gradient.node.meta["val"]  # type: ignore[union-attr]
        batch = 64 if value.numel() else 1
        sizes |= {value.nbytes, 4 * value.numel(), *(b * value.nbytes for b in range(1, batch + 1))}
    return sizes


def test_generated_code_is_the_plan(name: str) -> None:
    private = step(name, private=True)
    assert private.plan is not None
    calls = calls_of_ours(private.code)
    together = {
        key: calls.pop(key, 0) for key in ("release", "squared_norms", "weighted_sums_noise", "add_noise", "_add_noise_into")
    }
    in_groups = _grouped_sums(private.code)
    assert len(in_groups) == calls.pop("clipped_sums", 0)
    calls["clipped_sum"] += sum(in_groups)
    calls[LIBRARY] += _batched_products(private.code) - _batched_products(step(name, private=False).code)
    assert calls == private.planned
    assert together["release"] == 1
    stored, sums = _released(private.plan, summed=False), _released(private.plan, summed=True)
    shared = [4 * value.numel() for value in sums if 16 * value.numel() <= BYTES_AT_ONCE]
    alone = together["add_noise"] + together["_add_noise_into"]
    assert alone == len(sums) - len(shared), "only large sums, where they lie"
    assert any("philox" in source for _, source in private.code.kernels) == bool(alone)
    # Two groups in a row fill a launch.
    full = 2 * (sum(value.nbytes for value in stored) + sum(shared)) / BYTES_AT_ONCE
    assert together["weighted_sums_noise"] <= 4 + full + len(private.plan.parameters) / 64


def _grouped_sums(code: Generated) -> list[int]:
    """How many products each call of ``clipped_sums`` takes."""
    found = [re.findall(r"flashnorm\.clipped_sums\.default\(\[([^\]]*)\]", one.code) for one in code.graphs]
    return [_BRACKETS.sub("", operands).count(",") + 1 for calls in found for operands in calls]


def _batched_products(code: Generated) -> int:
    return sum(one.library_calls.get(LIBRARY, 0) for one in code.graphs)


def _released(plan: Plan, summed: bool) -> list[Any]:
    """Gradients of those whose clipped sum is a product of operands, or of the others."""
    parts = [
        parameter for parameter in plan.parameters if (parameter.norms in ("ghost", "flash") and not parameter.again) == summed
    ]
    return [parameter.gradient.node.meta["val"] for parameter in parts]  # type: ignore[union-attr]


def test_no_large_buffer_is_unaccounted_for(name: str) -> None:
    private, plain, plan = both(name)
    known = planned_sizes(plan) | {storage.nbytes for one in plain.graphs for storage in one.walked.allocations}  # type: ignore[union-attr]
    made = [storage.nbytes for one in private.graphs for storage in one.walked.allocations]  # type: ignore[union-attr]
    assert [nbytes for nbytes in made if nbytes >= MIB and nbytes not in known] == []


def test_peak_memory_is_what_the_plan_says_and_within_the_budget(name: str) -> None:
    private, plain, plan = both(name)
    assert private.peak_bytes <= 1.1 * plain.peak_bytes
    assert plan.peak == pytest.approx(plain.peak_bytes, rel=0.1)
    assert plan.private_peak == pytest.approx(private.peak_bytes, rel=0.1)


def test_bytes_moved_are_what_the_plan_says(name: str) -> None:
    private, plain, plan = both(name)
    assert plain.nbytes + plan.traffic == pytest.approx(private.nbytes, rel=0.1)
