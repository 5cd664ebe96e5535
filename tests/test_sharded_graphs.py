"""Where collectives stand in the private graph, on four pretended ranks: nothing is sent, so only graphs are looked at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from flashnorm_compile.passes import _compat
from flashnorm_compile.passes.errors import OptionsError, SampleMixingError, UnsupportedGraphError
from torch import Tensor, fx, nn
from torch._inductor.fx_passes.bucketing import bucket_reduce_scatter
from torch._inductor.fx_passes.fsdp import bucket_fsdp_all_gather
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import flashnorm_compile
from flashnorm_compile.distributed import team, tensor_parallel
from flashnorm_compile.noise_key import NoiseKey

c10d = torch.ops._c10d_functional
GATHER, SCATTER, REDUCE = (
    c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default, c10d.all_reduce.default
)  # fmt: skip
OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}


def _alone(self: team.Team, key: NoiseKey, facts: dict[str, Any], account: Any) -> Any:
    key.take(key.share())
    return account


def pretend(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)


@pytest.fixture(autouse=True)
def _pretended_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pretend(rank=1)
    monkeypatch.setattr(team.Team, "agree", _alone)
    yield
    dist.destroy_process_group()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The forward and the backward graph of what is compiled from here on."""
    found: list[fx.GraphModule] = []
    run = _compat.run_graph

    def keep(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        found.append(gm)
        return run(gm, *args, **kwargs)

    monkeypatch.setattr(_compat, "run_graph", keep)
    return found


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(self.embedding(ids))))


def step(model: nn.Module, graphs: list[fx.GraphModule]) -> tuple[fx.Graph, fx.Graph]:
    ids = torch.randint(12, (3, 5))
    loss = torch.compile(lambda ids: model(ids).float().square().mean(), backend="flashnorm_eager", options=OPTIONS)(ids)
    loss.backward()
    forward, backward = graphs
    return forward.graph, backward.graph


def count(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes if node.target in (GATHER, SCATTER, REDUCE))


def descends(node: fx.Node, target: Any) -> bool:
    """Whether a node's value is computed from the result of an operator."""
    return node.target is target or any(descends(arg, target) for arg in node.all_input_nodes)


def test_one_gather_and_one_reduction_for_each_parameter(graphs: list[fx.GraphModule]) -> None:
    model = flashnorm_compile.fully_shard(Tied())
    forward, backward = step(model, graphs)
    assert count(forward) == {GATHER: 3}  # the tied weight once
    # Two weights are needed again, the bias and the table of the embedding are not; the tied weight is the head's.
    assert count(backward) == {GATHER: 2, SCATTER: 3}
    saved = forward.output_node().args[0]
    gathered = {node for node in forward.nodes if node.op == "call_function" and _only_parameters(node)}
    assert not gathered & set(saved)


def _only_parameters(node: fx.Node) -> bool:
    """Whether a value is a gathered parameter, or made of one alone."""
    found, pending = False, [node]
    while pending:
        current = pending.pop()
        found = found or current.target is GATHER
        if current.op == "placeholder" and current.meta["val"].dtype == torch.int64:
            return False
        pending += current.all_input_nodes
    return found


@pytest.mark.parametrize("reshard", [True, False])
def test_all_ranks_send_the_same_in_the_same_order(reshard: bool, graphs: list[fx.GraphModule]) -> None:
    """The last ranks hold smaller shards, or none: their graphs pad and trim, and must not differ in anything else."""
    sent = []
    for rank in (0, 2, 3):
        dist.destroy_process_group()
        torch._dynamo.reset()
        graphs.clear()
        pretend(rank)
        model = nn.Sequential(Tied(), nn.Linear(12, 2))
        assert model[1].bias.shape == (2,)
        step(flashnorm_compile.fully_shard(model, reshard_after_forward=reshard), graphs)
        sent.append([_message(node) for gm in graphs for node in gm.graph.nodes if node.target in (GATHER, SCATTER)])
    assert len(sent[0]) >= 10
    assert sent[0] == sent[1] == sent[2]


def _message(node: fx.Node) -> tuple[Any, ...]:
    value = node.args[0].meta["val"]
    return node.target, tuple(value.shape), value.dtype, node.args[1:]


def test_kept_parameters_are_gathered_once(graphs: list[fx.GraphModule]) -> None:
    model = flashnorm_compile.fully_shard(Tied(), reshard_after_forward=False)
    forward, backward = step(model, graphs)
    assert count(forward) == {GATHER: 3}
    assert count(backward) == {SCATTER: 3}


def test_clip_then_reduction_then_noise(graphs: list[fx.GraphModule]) -> None:
    model = flashnorm_compile.fully_shard(Tied(), mesh=init_device_mesh("cpu", (2, 2)))
    _, backward = step(model, graphs)
    assert count(backward) == {GATHER: 2, SCATTER: 3, REDUCE: 3}
    noised = [node for node in backward.nodes if node.target is torch.ops.flashnorm.add_noise.default]
    assert len(noised) == 3
    for node in noised:
        assert descends(node.args[0], SCATTER)
        assert descends(node.args[0], REDUCE)
        assert node in backward.output_node().args[0]
    for node in backward.nodes:
        if node.target in (SCATTER, REDUCE):
            assert descends(node, torch.ops.flashnorm.release.default)
            assert node.args[1] == "sum"
    # A shard is reduced over the copies, not the whole gradient.
    reduced = [node.meta["val"].shape for node in backward.nodes if node.target is REDUCE]
    assert sorted(map(tuple, reduced)) == [(3,), (3, 6), (6, 6)]


def test_mixed_precision_moves_what_fsdp2_moves(graphs: list[fx.GraphModule]) -> None:
    model = flashnorm_compile.fully_shard(Tied(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    forward, backward = step(model, graphs)

    def moved(graph: fx.Graph, target: Any) -> set[torch.dtype]:
        return {node.args[0].meta["val"].dtype for node in graph.nodes if node.target is target}

    assert moved(forward, GATHER) == moved(backward, GATHER) == {torch.bfloat16}
    assert moved(backward, SCATTER) == {torch.float32}
    graphs.clear()
    torch._dynamo.reset()
    half = flashnorm_compile.fully_shard(Tied(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    _, backward = step(half, graphs)
    assert moved(backward, SCATTER) == {torch.bfloat16}
    assert all(p.grad.dtype == torch.float32 for p in half.parameters())


def test_inductor_buckets_our_collectives(graphs: list[fx.GraphModule]) -> None:
    step(flashnorm_compile.fully_shard(Tied()), graphs)
    forward, backward = graphs
    bucket_fsdp_all_gather(forward)
    assert count(forward.graph)[GATHER] + _buckets(forward.graph, "all_gather") == 1
    bucket_reduce_scatter(backward)
    assert count(backward.graph)[SCATTER] + _buckets(backward.graph, "reduce_scatter") == 1


def _buckets(graph: fx.Graph, name: str) -> int:
    return sum(f"{name}_into_tensor_out" in str(node.target) for node in graph.nodes)


def test_replicas_are_reduced_whole(graphs: list[fx.GraphModule]) -> None:
    forward, backward = step(flashnorm_compile.replicate(Tied()), graphs)
    assert count(forward) == {}
    assert count(backward) == {REDUCE: 3}


@pytest.mark.parametrize("algorithm", ["auto", "recompute"])
def test_any_number_of_samples_sends_the_same(algorithm: str, graphs: list[fx.GraphModule]) -> None:
    """Poisson draws may leave a rank with one sample, or none, while others have more and compute some of it twice."""
    sent, options = [], OPTIONS | {"norm_algorithm": algorithm}

    def run(size: int) -> None:
        torch._dynamo.reset()
        graphs.clear()
        model, ids = flashnorm_compile.fully_shard(Tied()), torch.zeros(size, 5, dtype=torch.int64)
        loss = torch.compile(lambda ids: model(ids).square().sum(), backend="flashnorm_eager", options=options, dynamic=False)
        loss(ids).backward()
        sent.append([_message(node) for gm in graphs for node in gm.graph.nodes if node.target in (GATHER, SCATTER)])

    run(3)
    run(1)
    assert len(sent[0]) == 8
    assert sent[0] == sent[1]
    with pytest.raises(UnsupportedGraphError, match=r"this rank has no samples in its first batch.*pad batches under a mask"):
        run(0)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 4), (4, 1)])
def test_nothing_is_sent_along_a_dimension_of_one_rank(shape: tuple[int, ...], graphs: list[fx.GraphModule]) -> None:
    mesh = init_device_mesh(
        "cpu", (4 // math.prod(shape), *shape), mesh_dim_names=("world", "replicate", "shard")[: 1 + len(shape)]
    )
    names = mesh.mesh_dim_names[1:]
    forward, backward = step(flashnorm_compile.fully_shard(Tied(), mesh=mesh[names]), graphs)
    sharded, copied = shape[-1] > 1, len(shape) == 2 and shape[0] > 1
    assert count(forward) == ({GATHER: 3} if sharded else {})
    assert count(backward) == ({GATHER: 2, SCATTER: 3} if sharded else {}) | ({REDUCE: 3} if copied else {})


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(OptionsError, match=r"reshard_after_forward=2: allowed are True, False and None"):
        flashnorm_compile.fully_shard(Tied(), reshard_after_forward=2)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="leave shard_placement_fn and offload_policy out"):
        flashnorm_compile.fully_shard(Tied(), shard_placement_fn=lambda p: None)
    with pytest.raises(OptionsError, match="mesh of one dimension, or of two"):
        flashnorm_compile.fully_shard(Tied(), mesh=init_device_mesh("cpu", (2, 2, 1)))
    with pytest.raises(OptionsError, match="replicate needs a mesh of one dimension; got 2"):
        flashnorm_compile.replicate(Tied(), mesh=init_device_mesh("cpu", (2, 2)))


def test_different_meshes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    flashnorm_compile.fully_shard(model[0])
    flashnorm_compile.fully_shard(model[1], mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"])
    with pytest.raises(ValueError, match=r"different numbers of data-parallel ranks \(\[2, 4\]\)"):
        torch.compile(lambda x: model(x).sum(), backend="flashnorm_eager", options=OPTIONS)(torch.ones(2, 4))


def parallel(*layers: nn.Module, **settings: Any) -> nn.Module:
    """The last layer by columns over four ranks."""
    model = nn.Sequential(*layers, nn.Linear(4, 8))
    return parallelize_module(model, init_device_mesh("cpu", (4,)), {str(len(layers)): ColwiseParallel(**settings)})


def backward(model: nn.Module) -> None:
    torch.compile(lambda x: model(x).square().sum(), backend="flashnorm_eager", options=OPTIONS)(torch.ones(2, 4)).backward()


def test_copies_with_different_gradients_are_refused() -> None:
    """Tensor parallelism: a norm of a rank's own features, and one whose gradient each rank drops out in its own way."""
    model = parallel()
    own = nn.Sequential(model, nn.LayerNorm(2))
    with pytest.raises(UnsupportedGraphError, match=r"(?s)holds a copy of '1\.weight'; its gradient may differ.*SequenceParallel"):
        backward(own)
    with pytest.raises(UnsupportedGraphError, match=r"(?s)holds a copy of '0\.weight'; its gradient may differ.*bernoulli|dropout"):
        backward(parallel(nn.LayerNorm(4), nn.Dropout(0.5)))


def test_tensor_parallelism_does_not_join_batches() -> None:
    with pytest.raises(SampleMixingError, match="joined to one, as if they held different samples"):
        backward(parallel(input_layouts=Shard(0)))


def test_two_kinds_of_tensor_parallelism_are_refused() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer, name in zip(model, mesh.mesh_dim_names or (), strict=True):
        parallelize_module(layer, mesh[name], ColwiseParallel(output_layouts=Replicate()))
    with pytest.raises(UnsupportedGraphError, match=r"over 2 process groups .* There can be one, that of tensor parallelism"):
        backward(model)


def test_fully_shard_takes_one_dimension_beside_tensor_parallelism() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "parts"))
    model = parallelize_module(nn.Linear(4, 8), mesh["parts"], ColwiseParallel())
    with pytest.raises(OptionsError, match="goes together with one data-parallel dimension"):
        flashnorm_compile.fully_shard(model, mesh=init_device_mesh("cpu", (2, 2)))
    with pytest.raises(OptionsError, match="are not dimensions of one mesh"):
        flashnorm_compile.fully_shard(model, mesh=init_device_mesh("cpu", (4,), mesh_dim_names=("all",)))


def test_tensor_parallelism_sums_norms_outside_of_the_graph(graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    """One message of [B, 3] numbers more than without privacy, whatever the number of parameters."""
    sent: list[tuple[int, ...]] = []
    reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x, **settings: (sent.append(tuple(x.shape)), reduce(x, **settings)))
    monkeypatch.setattr(tensor_parallel, "check_samples", lambda *_: None)
    backward(parallel(nn.LayerNorm(4), nn.Linear(4, 4), output_layouts=Replicate()))
    assert sent == [(2, 3)]
    assert sum(map(count, (gm.graph for gm in graphs)), Counter()) == {GATHER: 1, REDUCE: 1}
