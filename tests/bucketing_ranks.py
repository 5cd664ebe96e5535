"""What the ranks of test_overlap.py do: train with Inductor's buckets, and compare with the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from flashnorm_compile.passes import _compat
from gloo_scenarios import LOCAL, Tied, batch, by_blocks, gradients, loss_of, samples_of
from oracle import assert_agree, clip, double_copy, halving_options
from torch import fx
from torch._inductor.fx_passes.bucketing import bucket_reduce_scatter
from torch._inductor.fx_passes.fsdp import bucket_fsdp_all_gather
from torch._inductor.pattern_matcher import stable_topological_sort

import flashnorm_compile

BUCKETS = {"bucket_all_gathers_fx": "only_fsdp", "bucket_reduce_scatters_fx": "all"}
_run_graph = _compat.run_graph


def _run_in_buckets(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """What Inductor does with a graph under BUCKETS, without its code generation."""
    bucket_reduce_scatter(gm)
    bucket_fsdp_all_gather(gm)
    stable_topological_sort(gm.graph)
    assert sum("all_gather_into_tensor_out" in str(node.target) for node in gm.graph.nodes) == 1
    assert sum("all_gather_into_tensor.default" in str(node.target) for node in gm.graph.nodes) == 0
    assert sum("reduce_scatter_tensor.default" in str(node.target) for node in gm.graph.nodes) == bool(settings.get("is_backward"))
    return _run_graph(gm, inputs, **settings)


def trains_in_buckets() -> None:
    """Two releases of the oracle's gradients, with a step of the optimizer between them."""
    torch.manual_seed(0)
    model = Tied(blocks=2)
    twin = copy.deepcopy(model)
    by_blocks()(model)
    ranks = dist.get_world_size()
    options = halving_options(samples_of(double_copy(twin), *batch(0, LOCAL * ranks)), "flat") | {"noise_multiplier": 0.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    step = torch.compile(lambda ids, labels: loss_of(model, ids, labels), backend="flashnorm_eager", options=options)
    mine = slice(dist.get_rank() * LOCAL, (dist.get_rank() + 1) * LOCAL)
    with mock.patch.object(_compat, "run_graph", _run_in_buckets):
        for number in range(2):
            ids, labels = batch(number, LOCAL * ranks)
            step(ids[mine], labels[mine]).backward()
            got = gradients(model)
            assert_agree(got, clip(samples_of(double_copy(twin), ids, labels), options).released, rtol=1e-5)
            with torch.no_grad():
                for name, gradient in got.items():
                    twin.get_parameter(name).sub_(0.3 * gradient)
            optimizer.step()
            optimizer.zero_grad()
    assert flashnorm_compile.privacy(model).steps == 2
