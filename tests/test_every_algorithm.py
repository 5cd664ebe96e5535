"""What must hold for the planner's choice must hold for every choice that it could have made: each algorithm is forced in turn.

Random programs against the loop, the noise's law, and compile caches. ``FLASHNORM_FUZZ_EXAMPLES=2000`` searches with that many
programs for each algorithm; with ``FLASHNORM_TEST_KERNELS=1`` all of it runs through the operators that GPUs get.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_fuzz
import torch
from fuzz_programs import Program, programs
from hypothesis import given, settings
from models.zoo import ZOO
from oracle import assert_agree, case_gradients, clip, gradients_of, halving_options
from test_statistics import NORM, SIGMA, Repeated, _flat, ks_bound, ks_distance, releases, uncorrelated
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

ALGORITHMS = ("materialize", "ghost", "flash", "recompute")


def forced(algorithm: str) -> dict[str, Any]:
    """Options that leave no other; a second backward begins as far up as it can where there is no memory to spare."""
    return {"norm_algorithm": algorithm} | ({"memory_budget": 1.0} if algorithm == "recompute" else {})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(test_fuzz.fuzzing, max_examples=int(test_fuzz.EXAMPLES or 5))
@given(program=programs())
def test_random_programs(algorithm: str, program: Program) -> None:
    test_fuzz._check_or_reject(replace(program, norm_algorithm=algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_noise_is_the_same(algorithm: str, backend: str) -> None:
    """Its scale, and none shared between blocks or steps."""
    found = releases(Repeated(), torch.randn(4, 3, 16), 12, backend, **forced(algorithm))
    everything = torch.stack([_flat(one) for one in found])
    assert ks_distance(everything.flatten(), SIGMA * NORM) < ks_bound(everything.numel())
    assert ks_distance(everything.flatten(), 1.2 * SIGMA * NORM) > ks_bound(everything.numel())
    assert ks_distance(everything.flatten(), 0.8 * SIGMA * NORM) > ks_bound(everything.numel())
    assert uncorrelated(everything[1:], everything[:-1])
    blocks = [torch.stack([one[f"blocks.{i}.weight"] for one in found]) for i in range(3)]
    assert uncorrelated(blocks[0], blocks[1])
    assert uncorrelated(blocks[1], blocks[2])


@pytest.mark.slow
def test_compile_caches_keep_them_apart() -> None:
    """Each is compiled for itself, found again, and then gives what it gave before; all agree with the oracle."""
    case = ZOO["mlp_over_time"]
    samples = case_gradients(case, *case.make())
    options = halving_options(samples, "flat")
    want = clip(samples, options).released

    def hits() -> int:
        return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]

    def compiled(algorithm: str) -> tuple[dict[str, torch.Tensor], int]:
        torch._dynamo.reset()
        before = hits()
        model, inputs, targets = case.make()
        case.loss(torch.compile(model, backend="flashnorm", options=options | forced(algorithm))(**inputs), targets).backward()
        return gradients_of(model), hits() - before

    with fresh_cache():
        cold = {algorithm: compiled(algorithm) for algorithm in ALGORITHMS}
        warm = {algorithm: compiled(algorithm) for algorithm in ALGORITHMS}
    for algorithm in ALGORITHMS:
        gradients, found = cold[algorithm]
        assert_agree(gradients, want)
        assert not found, f"{algorithm} was taken from another one's artifact"
        again, found = warm[algorithm]
        assert found, f"{algorithm} was compiled again"
        assert all(torch.equal(again[name], gradients[name]) for name in gradients)
