"""What the ranks of test_overlap.py do: train with Inductor's buckets, and compare with the oracle."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
from gloo_scenarios import LOCAL, Tied, batch, by_blocks, gradients, loss_of, samples_of
from oracle import assert_agree, clip, double_copy, halving_options
from torch._inductor.fx_passes import bucketing, fsdp

import flashnorm_compile

BUCKETS = {"bucket_all_gathers_fx": "only_fsdp", "bucket_reduce_scatters_fx": "all"}


def _counted(merged: list[int], merge: Any) -> Any:
    def count(gm: Any, buckets: Any, *args: Any) -> Any:
        merged.append(sum(len(bucket) for bucket in buckets))
        return merge(gm, buckets, *args)

    return count


def trains_in_buckets() -> None:
    """Two releases of the oracle's gradients; the second behind an optimizer step, with values that the first has changed."""
    torch.manual_seed(0)
    model = Tied(blocks=0)
    twin = copy.deepcopy(model)
    by_blocks()(model)
    options = halving_options(samples_of(double_copy(twin), *batch(0, LOCAL * dist.get_world_size())), "flat")
    options |= {"noise_multiplier": 0.0, "inductor": BUCKETS}
    step = torch.compile(lambda ids, labels: loss_of(model, ids, labels), backend="flashnorm", options=options)
    gathers: list[int] = []
    scatters: list[int] = []
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(fsdp, "merge_all_gather", _counted(gathers, fsdp.merge_all_gather)),
        mock.patch.object(bucketing, "merge_reduce_scatter", _counted(scatters, bucketing.merge_reduce_scatter)),
    ):
        for number in range(2):
            ids, labels = batch(number, LOCAL * dist.get_world_size())
            mine = slice(dist.get_rank() * LOCAL, (dist.get_rank() + 1) * LOCAL)
            step(ids[mine], labels[mine]).backward()
            got = gradients(model)
            assert_agree(got, clip(samples_of(double_copy(twin), ids, labels), options).released, rtol=1e-5)
            with torch.no_grad():
                for name, gradient in got.items():
                    twin.get_parameter(name).sub_(0.3 * gradient)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            optimizer.step()
            optimizer.zero_grad()
    assert flashnorm_compile.privacy(model).steps == 2
    assert len(gathers) == 2  # forward and backward
    assert scatters == [len(got)]
