"""What the ranks of test_many_devices.py do. Each function runs on every rank at once and raises where something is wrong."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from flashnorm_compile.passes import _compat, kernels
from flashnorm_compile.passes.errors import PrivacyError, SampleMixingError, UnprotectedGradientError, UnsupportedGraphError
from flashnorm_compile.templates import noise
from oracle import Gradients, assert_agree, clip, double_copy, halving_options, per_sample_gradients
from torch import Tensor, fx, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_reduce
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

import flashnorm_compile
from examples.sharded_llama import Training
from flashnorm_compile.backend import compile_private
from flashnorm_compile.options import Options
from flashnorm_compile.private_graph import PrivateGraph

LOCAL, TOKENS, WORDS = 3, 6, 11
BOTH = ("flat", "per_layer")
Layout = Callable[["Tied"], Any]
Compile = Callable[[nn.Module, dict[str, Any]], Callable[..., Tensor]]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Tied(nn.Module):
    """No size is a multiple of four; the head is tied to the embedding, and one layer is frozen."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.blocks = nn.ModuleList(Block(6) for _ in range(blocks))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.frozen(self.embedding(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.view(ids.shape).mean(1).mean()


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(WORDS, (2, size, TOKENS), generator=torch.Generator().manual_seed(step))
    return drawn[0], drawn[1]


def samples_of(twin: nn.Module, ids: Tensor, labels: Tensor) -> list[Gradients]:
    return per_sample_gradients(twin, lambda model, b: loss_of(model, ids[b : b + 1], labels[b : b + 1]), len(ids))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(model: nn.Module) -> Gradients:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def noise_of(state: Any, parameters: dict[str, nn.Parameter], std: float) -> Gradients:
    """What the last release must have added, drawn for whole parameters by plain PyTorch."""
    keys = dict(zip(state.names, state.noise_keys(state._releases), strict=True))
    return {
        name: std * noise.reference_normals(keys[name], 0, p.numel()).view(p.shape)
        for name, p in parameters.items()
        if p.requires_grad
    }


def compiled(model: nn.Module, options: dict[str, Any]) -> Callable[..., Tensor]:
    return torch.compile(lambda ids, labels: loss_of(model, ids, labels), backend="flashnorm_eager", options=options)


class OneGraph:
    """Compiles several models of one kind, each with options of its own, to one graph: how gradients are clipped enters at run
    time only. Whether it does is seen by comparing every model's gradients with the oracle."""

    def __init__(self) -> None:
        self.step = torch.compile(loss_of, backend=self._backend)
        self.options = Options.parse({"max_grad_norm": 1.0, "noise_multiplier": 1.0})

    def __call__(self, model: nn.Module, options: dict[str, Any]) -> Callable[..., Tensor]:
        parsed = Options.parse(options)

        def step(ids: Tensor, labels: Tensor) -> Tensor:
            self.options = parsed
            return self.step(model, ids, labels)

        return step

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        first = compile_private(gm, inputs, self.options, inner_compile=_compat.run_graph)
        assert isinstance(first, PrivateGraph)
        graphs = {str(self.options): first}

        def run(*args: Any) -> Any:
            if str(self.options) not in graphs:
                graphs[str(self.options)] = PrivateGraph(
                    first.compiled, first.specs, self.options, first.reason, first.ranks, first.group
                )
            return graphs[str(self.options)](*args)

        return run


def trains_as_one_process(shard: Layout, index: int, ranks: int, clippings: Sequence[str], compiled: Compile | None = None) -> None:
    """Three steps with each kind of clipping: gradients are the oracle's for all ranks' samples, plus the noise of whole
    parameters, in the very bits that one process draws, under any layout."""
    compiled = compiled or OneGraph()
    for clipping in clippings:
        _trains_as_one_process(shard, index, ranks, clipping, compiled)


def _trains_as_one_process(shard: Layout, index: int, ranks: int, clipping: str, compiled: Compile) -> None:
    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    shard(model)
    options = halving_options(samples_of(double_copy(twin), *batch(0, LOCAL * ranks)), clipping)
    options |= {"noise_multiplier": 0.7, "seed": 1}
    state = flashnorm_compile.privacy(model)
    private = compiled(model, options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for m in (model, twin)]
    mine = slice(index * LOCAL, (index + 1) * LOCAL)
    for step in range(3):
        ids, labels = batch(step, LOCAL * ranks)
        private(ids[mine], labels[mine]).backward()
        want = clip(samples_of(double_copy(twin), ids, labels), options)
        std = options["noise_multiplier"] * options["max_grad_norm"] / len(ids)
        added = noise_of(state, dict(twin.named_parameters()), std)
        got = gradients(model)
        assert_agree({n: g - added[n] for n, g in got.items()}, want.released, rtol=1e-5)
        for name, parameter in twin.named_parameters():
            parameter.grad = got[name].clone() if parameter.requires_grad else None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter), twin.get_parameter(name), rtol=1e-6, atol=1e-6)
    assert state.steps == 3
    state.noise_multiplier = 1e20  # beside it gradients vanish: what is released are the bits of the noise
    private(ids[mine], labels[mine]).backward()
    drawn = drawn_by_one_process(state, dict(twin.named_parameters()), state.noise_multiplier * state.max_grad_norm / len(ids))
    assert all(torch.equal(got, drawn[name]) for name, got in gradients(model).items())


def drawn_by_one_process(state: Any, parameters: dict[str, nn.Parameter], std: float) -> Gradients:
    """The noise of the last release for whole parameters."""
    keys = dict(zip(state.names, state.noise_keys(state._releases), strict=True))
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    draw = torch.ops.flashnorm.add_noise
    return {name: draw(torch.zeros_like(p), keys[name].unsqueeze(0), torch.tensor(std), 0) for name, p in trained.items()}


def by_blocks(**settings: Any) -> Layout:
    def shard(model: Tied) -> None:
        for block in model.blocks:
            flashnorm_compile.fully_shard(block, **settings)
        flashnorm_compile.fully_shard(model, **settings)

    return shard


def fsdp() -> None:
    trains_as_one_process(by_blocks(), dist.get_rank(), 4, BOTH)


def fsdp_of_two_ranks() -> None:
    """Ranks 0 and 1, and ranks 2 and 3, are worlds of their own: nothing passes between them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("world", "data"))["data"]
    trains_as_one_process(by_blocks(mesh=mesh), dist.get_rank() % 2, 2, BOTH)


def hsdp() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    trains_as_one_process(by_blocks(mesh=mesh, reshard_after_forward=False), dist.get_rank(), 4, BOTH)


def replicated_in_pairs() -> None:
    """Ranks 0 and 1 train together, and so do ranks 2 and 3; nothing passes between the pairs. By the operators of a GPU."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "data"))["data"]
    with mock.patch.object(kernels, "fused", return_value=True):
        trains_as_one_process(lambda model: flashnorm_compile.replicate(model, mesh=mesh), dist.get_rank() % 2, 2, ["automatic"])


def mixed_precision() -> None:
    """Half-precision parameters, reduced in float32: no more than twice the error of plain PyTorch in that type."""
    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    flashnorm_compile.fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32))
    ids, labels = batch(0, 4 * LOCAL)
    samples = samples_of(double_copy(twin), ids, labels)
    options = halving_options(samples, "flat")
    exact = clip(samples, options).released
    plain = clip(samples_of(copy.deepcopy(twin).bfloat16(), ids, labels), options).released
    mine = slice(dist.get_rank() * LOCAL, (dist.get_rank() + 1) * LOCAL)
    compiled(model, options)(ids[mine], labels[mine]).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    got = gradients(model)

    def error(found: Gradients) -> float:
        return sum(float((found[n].double() - exact[n]).square().sum()) for n in exact) ** 0.5

    assert 0 < error(got) <= 2 * error(plain)


def looks_like_fsdp2() -> None:
    """Names, classes, shards, meta initialisation, eager forward passes, copies of the state."""
    torch.manual_seed(0)
    plain = Tied()
    with torch.device("meta"):
        model = Tied()
    by_blocks()(model)
    assert all(isinstance(p, DTensor) and p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    assert isinstance(model.norm, nn.LayerNorm)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert model.head.weight is model.embedding.weight
    assert not model.frozen.weight.requires_grad
    model.norm.reset_parameters()  # outside a forward pass the attribute is the parameter itself
    assert bool((model.norm.weight.full_tensor() == 1).all())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            mesh, placements = model.get_parameter(name).device_mesh, model.get_parameter(name).placements
            model.get_parameter(name).copy_(distribute_tensor(parameter, mesh, placements))
    rows = [3, 3, 3, 2][dist.get_rank()]
    assert model.head.weight.to_local().shape == (rows, 6)
    ids, labels = batch(0, LOCAL)
    torch.testing.assert_close(model(ids), plain(ids))
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in plain.state_dict().items()}
    options = {"max_grad_norm": 1e-2, "noise_multiplier": 0.0}
    compiled(model, options)(ids, labels).backward()
    want = clip(samples_of(double_copy(plain), ids, labels) * 4, options)
    assert_agree(gradients(model), want.released, rtol=1e-5)
    twice = copy.deepcopy(model)
    assert torch.equal(whole(twice.head.weight), plain.head.weight)


def accumulates_and_guards() -> None:
    """Micro-batches add up to one noised release; a changed gradient, or one without noise, is refused."""
    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    flashnorm_compile.fully_shard(model)
    options = {"max_grad_norm": 0.05, "noise_multiplier": 0.0, "expected_batch_size": 24.0}
    private, optimizer = compiled(model, options), torch.optim.SGD(model.parameters(), lr=0.1)
    samples = []
    with flashnorm_compile.privacy(model).accumulate():
        ids, labels = batch(0, 4 * LOCAL)
        mine = slice(dist.get_rank() * LOCAL, (dist.get_rank() + 1) * LOCAL)
        private(ids[mine], labels[mine]).backward()
        samples += samples_of(double_copy(twin), ids, labels)
    with pytest.raises(UnprotectedGradientError, match="added no noise"):
        optimizer.step()
    ids, labels = batch(1, 4 * LOCAL)
    private(ids[mine], labels[mine]).backward()
    samples += samples_of(double_copy(twin), ids, labels)
    assert_agree(gradients(model), clip(samples, options).released, rtol=1e-5)
    optimizer.step()
    with pytest.raises(UnprotectedGradientError, match="already used"):
        optimizer.step()
    optimizer.zero_grad()
    private(ids[mine], labels[mine]).backward()
    model.blocks[0].up.weight.grad.mul_(2.0)
    with pytest.raises(UnprotectedGradientError, match="written or changed"):
        optimizer.step()


def ranks_with_few_samples() -> None:
    """Under Poisson sampling ranks get different numbers of samples, and sometimes none: a step where one rank has none, and one
    where no rank has any. All take part in every reduction, and in the noise."""
    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    flashnorm_compile.fully_shard(model)
    ids, labels = batch(0, 7)
    options = halving_options(samples_of(double_copy(twin), ids, labels), "flat") | {"noise_multiplier": 0.7}
    options["loss_reduction"] = "sum"

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(ids.shape).mean(1).sum()

    step = torch.compile(loss, backend="flashnorm_eager", options=options, dynamic=False)
    state = flashnorm_compile.privacy(model)
    for ends in ((3, 4, 6, 7), (3, 3, 6, 7), (0, 0, 0, 0)):
        mine = slice((0, *ends)[dist.get_rank()], ends[dist.get_rank()])
        step(ids[mine], labels[mine]).backward()
        samples = samples_of(double_copy(twin), ids[: ends[-1]], labels[: ends[-1]])
        added = noise_of(state, dict(twin.named_parameters()), options["noise_multiplier"] * options["max_grad_norm"])
        got = gradients(model)
        if samples:
            assert_agree({n: g - added[n] for n, g in got.items()}, clip(samples, options).released, rtol=1e-5)
        else:
            torch.testing.assert_close(got, added, rtol=1e-6, atol=1e-6)
        assert state.last is not None
        assert state.last.batch_size == mine.stop - mine.start
        model.zero_grad()
    assert state.steps == 3


def ranks_that_differ() -> None:
    """Every rank hears which rank differs in what; nothing is released."""
    rank = dist.get_rank()

    def fails(match: str, size: int = LOCAL, **options: Any) -> None:
        torch.manual_seed(0)
        model = Block(6)
        flashnorm_compile.fully_shard(model)
        loss = torch.compile(
            lambda x: model(x).square().mean(),
            backend="flashnorm_eager",
            options={"max_grad_norm": 1.0, "noise_multiplier": 1.0, **options},
            dynamic=False,
        )
        with pytest.raises(PrivacyError, match=match):
            loss(torch.ones(size, 6)).backward()
        assert all(p.grad is None for p in model.parameters())

    fails(r"options\['clipping'\]: rank 2 has 'per_layer', rank 0 has 'flat'", clipping="per_layer" if rank == 2 else "flat")
    fails(r"batch size .set expected_batch_size if it varies.: rank 3 has 2, rank 0 has 3", size=2 if rank == 3 else LOCAL)


def ranks_with_other_groups_of_their_own() -> None:
    """A rank may have made process groups that the others know nothing of, and another number of them."""
    if dist.get_rank() == 1:
        dist.new_group([1], use_local_synchronization=True)
    model = nn.Linear(6, 6)
    flashnorm_compile.fully_shard(model)
    options = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
    torch.compile(lambda x: model(x).square().mean(), backend="flashnorm_eager", options=options)(torch.ones(3, 6)).backward()
    keys = flashnorm_compile.privacy(model).noise_keys(1)
    everybody = [torch.empty_like(keys) for _ in range(4)]
    dist.all_gather(everybody, keys)
    assert all(torch.equal(keys, theirs) for theirs in everybody)


def samples_that_meet_across_ranks() -> None:
    """Values of single samples in a collective, and a parameter that ranks would train apart, are refused; one sample each, too."""

    def refused(match: str, size: int, change: Callable[[Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        model = nn.Linear(6, 6)
        flashnorm_compile.fully_shard(model)
        loss = torch.compile(
            lambda x: change(model(x)).square().mean(),
            backend="flashnorm_eager",
            options={"max_grad_norm": 1.0, "noise_multiplier": 1.0},
        )
        with pytest.raises(SampleMixingError, match=match):
            loss(torch.ones(size, 6)).backward()

    group = dist.group.WORLD
    assert group is not None
    for size in (1, 3):
        refused(r"cannot be clipped per sample[\s\S]*samples", size, lambda h: all_gather_tensor_autograd(h, 0, group))
        refused(r"cannot be clipped per sample[\s\S]*samples", size, lambda h: h - all_reduce(h.mean(0), "sum", group) / 4)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    flashnorm_compile.fully_shard(model[0])
    loss = torch.compile(
        lambda x: model(x).square().mean(),
        backend="flashnorm_eager",
        options={"max_grad_norm": 1.0, "noise_multiplier": 1.0},
    )
    with pytest.raises(UnsupportedGraphError, match=r"spread over 4 ranks, and the gradient of '1\.weight' is not summed over all"):
        loss(torch.ones(3, 6)).backward()


def checkpoint_folder() -> str:
    """A folder that all ranks know."""
    told: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    return str(told[0])


def tensors_of(training: Training) -> dict[str, Tensor]:
    """Parameters and optimizer state, whole."""
    model, optimizer = get_state_dict(training.model, training.optimizer)
    state = {f"{n} {k}": v for n, entry in optimizer["state"].items() for k, v in entry.items()}
    return {name: whole(value).clone() for name, value in (model | state).items()}


def one_step(training: Training, private: Callable[..., Tensor], size: int, index: int) -> Gradients:
    """Training on this rank's part of the same twelve samples; whole gradients."""
    ids, labels = batch(9, 12)
    private(ids[index * size : (index + 1) * size], labels[index * size : (index + 1) * size]).backward()
    got = gradients(training.model)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return got


def checkpoints_on_other_numbers_of_ranks() -> None:
    """Saved on four ranks; loaded on two, on one, and into FSDP2 and back: the same tensors and account, the next step the same
    (on ranks 0 and 1, and on rank 3), its noise new and one for all ranks."""
    folder, rank = checkpoint_folder(), dist.get_rank()
    options = {"max_grad_norm": 0.05, "noise_multiplier": 1.0, "expected_batch_size": 12.0}
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "data"))["data"]

    def trained(shard: Callable[[nn.Module], Any], seed: int) -> Training:
        torch.manual_seed(seed)
        model = Tied(blocks=0)
        shard(model)
        return Training(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    four = trained(by_blocks(), 0)
    flashnorm_compile.privacy(four.model).noise_multiplier = 1.0
    private = compiled(four.model, options)
    one_step(four, private, 3, rank)
    dcp.save({"training": four}, checkpoint_id=folder)
    saved, state = tensors_of(four), flashnorm_compile.privacy(four.model)
    assert "noise_key" not in repr(state.state_dict())
    state.noise_multiplier = 0.0
    following = one_step(four, private, 3, rank)

    two = trained(lambda model: flashnorm_compile.fully_shard(model, mesh=pairs), 1)
    dcp.load({"training": two}, checkpoint_id=folder, process_group=pairs.get_group())
    one = trained(lambda model: None, 2)
    dcp.load({"training": one}, checkpoint_id=folder, no_dist=True)
    fsdp2 = trained(torch.distributed.fsdp.fully_shard, 3)
    load_plain(fsdp2, folder)
    plain = {"training": dict(zip(("model", "optimizer"), get_state_dict(fsdp2.model, fsdp2.optimizer), strict=True))}
    dcp.save(plain, checkpoint_id=f"{folder}/plain")
    back = trained(by_blocks(), 4)
    load_plain(back, f"{folder}/plain")
    for training in (two, one, fsdp2, back):
        loaded = tensors_of(training)
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)

    goes_on = {0: [(two, 6, 0)], 1: [(two, 6, 1)], 3: [(one, 12, 0)]}
    for training, size, index in goes_on.get(rank, []):
        restored = flashnorm_compile.privacy(training.model)
        assert (restored.steps, restored.noise_multiplier) == (1, 1.0)
        restored.noise_multiplier = 0.0
        private = compiled(training.model, options)
        assert_agree(one_step(training, private, size, index), following, rtol=1e-5)
        assert restored.steps == state.steps == 2
        restored.noise_multiplier = 1.0
        keys = restored.noise_keys(3)
        assert not torch.equal(keys, state.noise_keys(3))
        if training is two:
            everybody = [torch.empty_like(keys) for _ in range(2)]
            dist.all_gather(everybody, keys, group=pairs.get_group())
            assert torch.equal(everybody[0], everybody[1])


def load_plain(training: Training, folder: str) -> None:
    """Model and optimizer, as a script without privacy loads them."""
    plain = dict(zip(("model", "optimizer"), get_state_dict(training.model, training.optimizer), strict=True))
    dcp.load({"training": plain}, checkpoint_id=folder)
    set_state_dict(training.model, training.optimizer, model_state_dict=plain["model"], optim_state_dict=plain["optimizer"])


def without_privacy() -> None:
    """Any backend, and eager mode: the average over ranks, as FSDP2 gives it."""
    torch.manual_seed(0)
    plain = Tied()
    ids, labels = batch(0, 4 * LOCAL)
    loss_of(plain, ids, labels).backward()
    mine = slice(dist.get_rank() * LOCAL, (dist.get_rank() + 1) * LOCAL)
    for backend in (None, "aot_eager"):
        model = Tied()
        model.load_state_dict(plain.state_dict())
        by_blocks()(model)
        step = loss_of if backend is None else torch.compile(loss_of, backend=backend)
        step(model, ids[mine], labels[mine]).backward()
        want = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
        assert_agree(gradients(model), want, rtol=1e-5)


SCENARIOS = [
    fsdp, fsdp_of_two_ranks, hsdp, replicated_in_pairs, mixed_precision, looks_like_fsdp2, accumulates_and_guards,
    ranks_that_differ, ranks_with_other_groups_of_their_own, samples_that_meet_across_ranks, checkpoints_on_other_numbers_of_ranks,
    without_privacy, ranks_with_few_samples,
]  # fmt: skip
