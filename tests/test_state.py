"""Clip factors, noise levels, keys, counters, and which state covers which parameter."""

from __future__ import annotations

import gc
import math
import os
import pickle
import weakref
from typing import Any

import pytest
import torch
from flashnorm_compile.passes.errors import GraphBreakError, OptionsError, PrivacyError, UnsupportedGraphError
from flashnorm_compile.templates import release as release_op
from stand_in import Private, options, weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashnorm_compile import binding as binding_module
from flashnorm_compile.binding import Binding, binding_for
from flashnorm_compile.distributed.groups import Ranks
from flashnorm_compile.noise_key import NoiseKey, streams_of
from flashnorm_compile.state import PrivacyState, privacy

NORMS = torch.tensor([[9.0, 16.0], [0.01, 0.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
X = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]])


def bind(parameters: list[nn.Parameter] | None = None, **changes: Any) -> tuple[Binding, list[nn.Parameter]]:
    parameters = parameters or weights()
    names = [f"layer{index}.weight" for index in range(len(parameters))]
    return binding_for(parameters, names, options(**changes)), parameters


def release(binding: Binding, norms_sq: Tensor = NORMS) -> tuple[Tensor, Tensor, Tensor]:
    return release_op.release(binding.handle, norms_sq, norms_sq)


def test_flat_factors() -> None:
    binding, _kept = bind(noise_multiplier=2.0)
    factors, keys, noise_std = release(binding)
    expected = torch.tensor([0.2, 1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(factors, expected.expand(2, 5))
    assert factors.is_contiguous()
    assert (keys.shape, keys.dtype) == ((2, 2), torch.int64)
    assert (noise_std.shape, noise_std.item()) == ((), 2.0)
    last = binding.state.last
    assert last is not None
    assert (last.batch_size, last.clipped_fraction, last.nonfinite) == (5, 0.2, 2)


def test_rounding_below_zero_counts_as_zero() -> None:
    binding, _kept = bind()
    factors, _, _ = release(binding, torch.tensor([[-1e-7, 0.0]]))
    assert factors.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(("changes", "size"), [({}, 5), ({"expected_batch_size": 8}, 8), ({"accumulation_steps": 3}, 15)])
def test_mean_divides_by_the_batch(changes: dict[str, Any], size: int) -> None:
    """Contributions are g / B; factor * contribution must be c * g / L."""
    binding, _kept = bind(loss_reduction="mean", noise_multiplier=2.0, **changes)
    outcomes = [release(binding, NORMS / 25) for _ in range(changes.get("accumulation_steps", 1))]
    torch.testing.assert_close(outcomes[-1][0][0], torch.tensor([0.2, 1.0, 1.0, 0.0, 0.0]) * 5 / size)
    assert outcomes[-1][2].item() == pytest.approx(2.0 / size)


def test_automatic_factors() -> None:
    binding, _kept = bind(clipping="automatic", stability_constant=0.5)
    torch.testing.assert_close(release(binding)[0][1], torch.tensor([1 / 5.5, 1 / 0.6, 2.0, 0.0, 0.0]))
    mean, _kept2 = bind(clipping="automatic", stability_constant=0.5, loss_reduction="mean")
    torch.testing.assert_close(release(mean, NORMS / 25)[0][1], torch.tensor([1 / 5.5, 1 / 0.6, 2.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("changes", "norms"),
    [
        ({"clipping": "per_layer"}, [1 / math.sqrt(2)] * 2),
        ({"clipping": "group", "groups": {"layer0.*": 0.6, "*": 0.8}}, [0.6, 0.8]),
    ],
)
def test_group_factors(changes: dict[str, Any], norms: list[float]) -> None:
    binding, _kept = bind(**changes)
    factors, _, _ = release(binding)
    expected = torch.tensor([[norms[0] / 3, 1, 1, 0, 0], [norms[1] / 4, 1, 1, norms[1], norms[1]]])
    torch.testing.assert_close(factors, expected)
    assert factors.is_contiguous()
    binding.state.max_grad_norm = 2.0
    assert release(binding)[0][0, 0].item() == pytest.approx(2 * norms[0] / 3)


def test_parameters_of_one_module_share_a_layer() -> None:
    parameters = weights(3)
    binding = binding_for(parameters, ["a.weight", "a.bias", "b.weight"], options(clipping="per_layer"))
    factors, _, _ = release(binding, torch.tensor([[9.0, 16.0, 1.0]]))
    torch.testing.assert_close(factors[:, 0], torch.tensor([0.2, 0.2, 1.0]) / math.sqrt(2))


def test_unmatched_group_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"'layer1\.weight' matches none of the globs in groups: 'layer0\.\*'"):
        bind(clipping="group", groups={"layer0.*": 1.0})


def test_empty_batch() -> None:
    binding, _kept = bind(loss_reduction="mean", noise_multiplier=1.0)
    factors, _, noise_std = release(binding, torch.zeros(0, 2))
    assert factors.shape == (2, 0)
    assert noise_std.item() == 1.0
    last = binding.state.last
    assert last is not None
    assert (last.batch_size, last.clipped_fraction) == (0, 0.0)


def test_keys_never_repeat() -> None:
    first, _kept = bind(seed=7)
    second, _kept2 = bind(seed=7)  # the same seed in another state
    keys = torch.cat([release(binding)[1] for binding in (first, second) for _ in range(20)])
    assert len(set(keys[:, 0].tolist())) == 40  # one generator key for each release
    assert len(set(keys[:, 1].tolist())) == 80  # one stream for each parameter in it


def test_noise_follows_the_name_of_a_parameter() -> None:
    """Not its place among the others, nor the process; two parameters of one name are two."""
    streams = dict(zip("abc", streams_of(["a", "b", "c"]), strict=True))
    assert streams_of(["c", "a"]).tolist() == [streams["c"], streams["a"]]
    assert len(set(streams_of(["a", "a", "b", "a"]).tolist())) == 4
    one, other = NoiseKey(), NoiseKey()
    assert not torch.equal(one.words(1, streams_of("a")), other.words(1, streams_of("a")))
    other.take(one.share())
    one.take(one.share())
    assert torch.equal(one.words(1, streams_of("ab"))[1:], other.words(1, streams_of("b")))
    assert not torch.equal(one.words(1, streams_of("a")), one.words(2, streams_of("a")))
    before = one.words(1, streams_of("a"))
    one.refresh()
    assert not torch.equal(one.words(1, streams_of("a")), before)


def words_in_a_fork(key: NoiseKey, streams: torch.Tensor) -> bytes:
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, key.words(1, streams).numpy().tobytes())
        os._exit(0)
    os.wait()
    return os.read(read, 64)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("one_number", [False, True])
def test_forks_draw_other_noise(shared: bool, one_number: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than the process that they come from and than each other, also where all are process 1 of a container of their own."""
    if one_number:
        monkeypatch.setattr(os, "getpid", lambda: 1)
    key, streams = NoiseKey(), streams_of(["a"])
    if shared:
        key.take(key.share())
    mine = key.words(1, streams).numpy().tobytes()
    assert len({mine, words_in_a_fork(key, streams), words_in_a_fork(key, streams)}) == 3
    assert key.words(1, streams).numpy().tobytes() == mine


def test_identical_blocks_have_their_own_rows() -> None:
    """Blocks that share an artifact look the same to it; a declared state tells them apart."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = privacy(model)
    blocks = [binding_for(list(block.parameters()), ["weight", "bias"], options(clipping="per_layer")) for block in model]
    assert [block.state for block in blocks] == [state, state]
    assert state.layout.group_names == ("0", "1")
    assert state.layout.group_of == (0, 0, 1, 1)


def test_settings_change_between_releases() -> None:
    model = nn.Linear(2, 2)
    state = privacy(model)
    with pytest.raises(PrivacyError, match="max_grad_norm is not known yet"):
        state.max_grad_norm
    state.noise_multiplier = 3.0
    binding = binding_for(list(model.parameters()), ["w", "b"], options(noise_multiplier=1.0))
    assert (state.max_grad_norm, state.noise_multiplier) == (1.0, 3.0)
    state.max_grad_norm = 0.5
    factors, _, noise_std = release(binding, torch.tensor([[9.0, 16.0]]))
    assert factors[0, 0].item() == pytest.approx(0.1)
    assert noise_std.item() == 1.5
    with pytest.raises(OptionsError, match="max_grad_norm must be a finite number > 0; got nan"):
        state.max_grad_norm = math.nan


def test_accumulate_adds_no_noise() -> None:
    binding, _kept = bind(noise_multiplier=1.0)
    with binding.state.accumulate():
        assert release(binding)[2].item() == 0.0
    assert binding.state.steps == 0
    assert release(binding)[2].item() == 1.0
    assert binding.state.steps == 1


def noise_levels(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The noise level of every release from now on."""
    levels: list[float] = []
    begin = PrivacyState.begin_release

    def record(self: PrivacyState, *arguments: Any) -> tuple[int, float]:
        outcome = begin(self, *arguments)
        levels.append(outcome[1])
        return outcome

    monkeypatch.setattr(PrivacyState, "begin_release", record)
    return levels


def test_noise_covers_the_smallest_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "mean" a sample of a small micro-batch weighs more; the noise at the end must be for that one."""
    graph, levels = Private(*weights(), noise_multiplier=1.0, loss_reduction="mean"), noise_levels(monkeypatch)
    with graph.binding.state.accumulate():
        graph(X[:1]).backward()
    torch.autograd.grad(graph(X), graph.parameters)  # its noise is not in p.grad
    graph(X).backward()
    graph(X).backward()
    assert levels == [0.0, 1.0, 1.0, 0.5]


def test_noise_covers_sums_that_a_noised_pass_did_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that the noised pass left out still holds the sum of the small micro-batch."""
    model = nn.ParameterList(weights(2))
    state, levels = privacy(model), noise_levels(monkeypatch)
    one, two = (Private(p, noise_multiplier=1.0, loss_reduction="mean") for p in model)
    with state.accumulate():
        one(X[:1]).backward()
        two(X[:1]).backward()
    for graph in (one, one, two, two):
        graph(X).backward()
    assert levels == [0.0, 0.0, 1.0, 0.5, 1.0, 0.5]


def test_checkpointing_without_reentry() -> None:
    graph = Private(*weights(1))
    checkpoint(graph, X.clone().requires_grad_(True), use_reentrant=False).backward()
    assert graph.binding.state.steps == 1


def test_state_dict_round_trip() -> None:
    binding, _kept = bind(noise_multiplier=1.0, seed=1)
    release(binding)
    saved = pickle.loads(pickle.dumps(binding.state.state_dict()))
    _, next_keys, _ = release(binding)
    fresh = PrivacyState()
    fresh.load_state_dict(saved)
    assert (fresh.steps, fresh.max_grad_norm, fresh.noise_multiplier) == (1, 1.0, 1.0)
    binding.state.load_state_dict(saved)
    assert binding.state.steps == 1
    assert not torch.equal(release(binding)[1], next_keys)
    with pytest.raises(OptionsError, match="needs exactly the keys"):
        fresh.load_state_dict({"steps": 1})


def test_flat_refuses_two_graphs_in_one_pass() -> None:
    first, second = weights(1), weights(1)
    graphs = Private(*first, names=["body.weight"]), Private(*second, names=["head.weight"])
    graphs[1].binding.break_reason = "call to print"
    with pytest.raises(
        GraphBreakError,
        match=r"graph over head .graph break: call to print.; and the graph over body.*compile the model and",
    ):
        (graphs[0](X) + graphs[1](X)).backward()
    graphs[0](X).backward()
    graphs[1](X).backward()


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_one_graph_twice_in_one_pass_is_refused(clipping: str) -> None:
    graph = Private(*weights(), clipping=clipping)
    with pytest.raises(GraphBreakError, match="twice"):
        (graph(X) + graph(X)).backward()


def test_declared_groups_may_be_released_one_by_one() -> None:
    model = nn.ParameterDict({"a": torch.zeros(3), "b": torch.zeros(3)})
    undeclared = [Private(p, names=[f"{n}.w"], clipping="per_layer") for n, p in zip("ab", weights(), strict=True)]
    with pytest.raises(GraphBreakError, match=r"call flashnorm_compile\.privacy\(model\) before the first step"):
        (undeclared[0](X) + undeclared[1](X)).backward()
    state = privacy(model)
    groups = {"a": 0.6, "b": 0.8}
    one, two = (Private(model[n], names=[n], clipping="group", groups=groups) for n in "ab")
    (one(X[:1]) + two(X[:1])).backward()
    assert state.steps == 1  # one backward pass
    assert [model[n].grad.norm().item() for n in "ab"] == pytest.approx([0.6, 0.8])


def test_frozen_parameters_take_no_share() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    state = privacy(model)
    model[1].requires_grad_(True)
    binding = binding_for(list(model[1].parameters()), ["weight", "bias"], options(clipping="per_layer"))
    assert state.layout.group_names == ("1",)
    assert release(binding, torch.tensor([[1.0, 0.0]]))[0][0, 0].item() == 1.0
    model[0].requires_grad_(True)
    binding_for(list(model.parameters()), list("abcd"), options(clipping="per_layer"))
    assert release(binding, torch.tensor([[1.0, 0.0]]))[0][0, 0].item() == pytest.approx(1 / math.sqrt(2))


def test_reentrant_checkpointing_is_refused() -> None:
    """Each block's backward would be a pass of its own, and the flat norm would be spent once for each."""
    graph = Private(*weights(1))
    x = X.clone().requires_grad_(True)
    with pytest.raises(UnsupportedGraphError, match="use_reentrant=False"):
        checkpoint(graph, x, use_reentrant=True).backward()


def test_privacy_finds_or_merges() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    blocks = [binding_for(list(block.parameters()), ["weight", "bias"], options()) for block in model]
    assert blocks[0].state is not blocks[1].state
    state = privacy(model)
    assert privacy(model[0]) is state
    assert [block.state for block in blocks] == [state, state]
    assert state.names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert privacy(torch.compile(model)) is state


def test_privacy_refuses_states_in_use() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for block in model:
        release(binding_for(list(block.parameters()), ["weight", "bias"], options()))
    with pytest.raises(PrivacyError, match="already belong to 2 privacy states"):
        privacy(model)
    with pytest.raises(OptionsError, match=r"privacy takes the nn\.Module"):
        privacy(lambda x: x)  # type: ignore[arg-type]


def test_other_options_for_the_same_parameters_are_refused() -> None:
    _binding, parameters = bind()
    with pytest.raises(OptionsError, match=r"clipping: 'flat' -> 'per_layer'"):
        bind(parameters, clipping="per_layer")


def test_exempt_names() -> None:
    state = privacy(nn.Linear(2, 2))
    with pytest.raises(OptionsError, match="did you mean 'weight'"):
        state.exempt("wieght")


def test_parameters_are_held_weakly() -> None:
    model = nn.Linear(2, 2)
    state = privacy(model)
    binding = binding_for(list(model.parameters()), ["weight", "bias"], options())
    assert binding_for(list(model.parameters()), ["weight", "bias"], options()) is binding
    reference, holder = weakref.ref(model.weight), weakref.ref(binding)
    del model, binding
    gc.collect()
    assert reference() is None
    assert holder() is None
    assert state.names == ["weight", "bias"]
    with pytest.raises(RuntimeError, match="no handler has the number"):
        release_op.release(torch.tensor(10**9), NORMS, NORMS)


ALONE, TOGETHER = Ranks(), Ranks(team=(0, 1), data_ranks=2)
APART = r"trains on the ranks of this process alone, and other .* on \[0, 1\]"


def _two_blocks() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    privacy(model)
    return model


def _bound(block: nn.Module, ranks: Ranks) -> Binding:
    return binding_for(list(block.parameters()), ["weight", "bias"], options(clipping="per_layer"), ranks=ranks)


def test_a_graph_that_each_rank_trains_alone_is_refused_beside_one_that_ranks_train_together() -> None:
    """Both would draw the noise that the ranks share, and one would put it on sums that differ among them."""
    model = _two_blocks()
    _bound(model[1], TOGETHER)
    with pytest.raises(UnsupportedGraphError, match=APART):
        _bound(model[0], ALONE)


def test_so_is_one_that_was_called_before_the_other_was_known() -> None:
    model = _two_blocks()
    first = _bound(model[0], ALONE)
    _bound(model[1], TOGETHER)
    with pytest.raises(UnsupportedGraphError, match=APART):
        release(first)


def test_a_captured_backward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph would replay the noise of the step in which it was captured."""
    model = nn.Linear(3, 2)
    step = torch.compile(model, backend="flashnorm_eager", options={"max_grad_norm": 1.0, "noise_multiplier": 1.0})
    loss = step(torch.randn(4, 3)).sum()
    monkeypatch.setattr(binding_module, "_is_captured", lambda device: True)
    with pytest.raises(UnsupportedGraphError, match=r"(?s)CUDA graph was being captured.*out of torch\.cuda\.graph"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert not privacy(model).released


def test_capture_is_asked_for_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert binding_module._is_captured(torch.device("cuda", 0)) is capturing
        assert not binding_module._is_captured(torch.device("cpu"))


@pytest.mark.cuda
def test_a_backward_in_a_cuda_graph_is_refused() -> None:
    model, x = nn.Linear(3, 2).cuda(), torch.randn(4, 3, device="cuda")
    step = torch.compile(model, backend="flashnorm_eager", options={"max_grad_norm": 1.0, "noise_multiplier": 1.0})
    step(x).sum().backward()
    with pytest.raises(UnsupportedGraphError, match="CUDA graph was being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(x).sum().backward()
