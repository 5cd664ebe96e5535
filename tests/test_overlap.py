"""Inductor's passes for sharded training recognise our collectives: they bucket them, and move them beside what is computed.

Code is generated for a pretended Hopper GPU and pretended ranks; that buckets leave gradients right is seen on real gloo ranks.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="Inductor's code for a GPU needs the triton package")
if torch.cuda.is_available():
    pytest.skip("code is generated for a pretended GPU", allow_module_level=True)

import bucketing_ranks
import gloo
from torch._inductor.fx_passes.overlap_scheduling import is_compute_node
from torch.distributed.fsdp import MixedPrecisionPolicy

import flashnorm_compile
from benchmarks.hopper import Generated
from benchmarks.hopper.fakes import fake_problem
from benchmarks.hopper.sharded import generated_step, pretended_ranks
from benchmarks.suites.problems import regression

WIDTH, TOKENS, LAYERS = 4096, 2048, 4
OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "norm_algorithm": "ghost"}
OVERLAP = {
    "aten_distributed_optimizations.enable_overlap_scheduling": True,
    "aten_distributed_optimizations.collective_bucketing": True,
    "aten_distributed_optimizations.compute_estimator": "analytical",  # "benchmark" would run on the device
}


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


def generated(inductor: dict[str, Any]) -> Generated:
    with pretended_ranks((4,)) as mesh:
        with fake_problem(lambda: regression(Stack(), torch.randn(2, TOKENS, WIDTH))) as problem:
            pass
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
        flashnorm_compile.fully_shard(problem.model, mesh=mesh, mp_policy=policy)
        return generated_step(problem, "H200", OPTIONS | {"inductor": inductor})


def collectives(module: fx.GraphModule) -> Counter[str]:
    names = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
    return Counter(name.split(".")[1] for name in names if name.startswith("_c10d_functional."))


def test_bucketing() -> None:
    forward, backward = generated(bucketing_ranks.BUCKETS).graphs
    assert forward.module is not None
    assert backward.module is not None
    assert collectives(forward.module) == {"all_gather_into_tensor_out": 1, "wait_tensor": 1}
    # The first layer's weight is not needed again.
    assert collectives(backward.module) == {"all_gather_into_tensor_out": 1, "reduce_scatter_tensor": 1, "wait_tensor": 2}
    scatter = next(node for node in backward.module.graph.nodes if "reduce_scatter" in str(node.target))
    assert scatter.args[0].meta["val"].numel() == LAYERS * WIDTH**2
    order = list(backward.module.graph.nodes)
    released = next(node for node in order if node.target is torch.ops.flashnorm.release.default)
    noises = [node for node in order if "add_noise" in str(node.target)]
    assert len(noises) == LAYERS
    assert order.index(released) < order.index(scatter) < min(map(order.index, noises))


def steps_of(code: str) -> list[tuple[str, str]]:
    """Kind and result of every call that computes a product or sends, in the order of the code."""
    body = code[code.rindex("def call(") :]
    found = []
    for line in body.splitlines():
        sent = re.search(r"(\w+) = torch\.ops\._c10d_functional\.(all_gather|reduce_scatter)", line)
        bucket = re.search(r"_c10d_functional\.(all_gather)_into_tensor_out.*out=(\w+)\)", line)
        waited = re.search(r"_c10d_functional\.wait_tensor\.default\((\w+)\)", line)
        if sent:
            found.append((sent[2], sent[1]))
        elif bucket:
            found.append((bucket[1], bucket[2]))
        elif waited:
            found.append(("wait", waited[1]))
        elif "extern_kernels.mm(" in line or re.search(r"triton_tem_\w+\.run\(", line):
            found.append(("product", ""))
        elif "flashnorm.release" in line:
            found.append(("release", ""))
    return found


def beside(steps: list[tuple[str, str]], kind: str) -> list[int]:
    """For each collective of a kind: how many products run between its start and its end."""
    counts = []
    for place, (what, name) in enumerate(steps):
        if what == kind:
            end = steps.index(("wait", name), place)
            counts.append(sum(step == "product" for step, _ in steps[place:end]))
    return counts


@pytest.fixture(scope="module")
def scheduled() -> Generated:
    return generated(OVERLAP)


def test_gathers_run_ahead(scheduled: Generated) -> None:
    for one in scheduled.graphs:
        products = beside(steps_of(one.code), "all_gather")
        assert len(products) >= 2
        assert any(products), steps_of(one.code)


def test_reductions_of_flat_clipping_run_beside_the_clipped_sums(scheduled: Generated) -> None:
    steps = steps_of(scheduled.graphs[1].code)
    products = beside(steps, "reduce_scatter")
    # Behind the clip follow a clipped sum and its reduction in turn: the first reduction has the other three sums beside it.
    clip = steps.index(("release", ""))
    assert [kind for kind, _ in steps[clip:] if kind in ("product", "reduce_scatter")] == ["product", "reduce_scatter"] * LAYERS
    assert products == [3, 2, 1, 0]


def test_clipped_sums_count_as_work_that_hides_messages(scheduled: Generated) -> None:
    graph = fx.Graph()
    for name in ("clipped_sum", "ghost_norm", "flash_norm", "weight_grads", "per_layer"):
        assert is_compute_node(graph.call_function(getattr(torch.ops.flashnorm, name).default))
    assert not is_compute_node(graph.call_function(torch.ops.flashnorm.release.default))


@pytest.mark.timeout(600)
def test_buckets_on_real_ranks() -> None:
    told = gloo.run(2, [bucketing_ranks.trains_in_buckets])["trains_in_buckets"]
    assert told == [None, None], "\n".join(map(str, told))
