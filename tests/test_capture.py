"""The ways into the backend: modules, functions, sizes that change, accumulation, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flashnorm_compile.passes import plan as planning
from models.algebra import Mlp
from models.case import Case, Tensors, own_loss, squared_error
from models.language import gpt2, labelled_tokens
from models.zoo import ZOO
from oracle import (
    Gradients,
    assert_agree,
    case_gradients,
    clip,
    disagreements,
    gradients_of,
    halving_options,
    private_gradients,
)
from torch import Tensor, nn

import flashnorm_compile

LOOSE: dict[str, Any] = {"max_grad_norm": 1.0, "noise_multiplier": 0.0}


def prepared(name: str, batch_size: int | None = None) -> tuple[Case, nn.Module, Tensors, Tensors, dict[str, Any], Gradients]:
    """A case with halving options and the oracle's release."""
    case = ZOO[name]
    model, inputs, targets = case.make(batch_size)
    samples = case_gradients(case, model, inputs, targets)
    options = halving_options(samples, "flat")
    return case, model, inputs, targets, options | case.options, clip(samples, options).released


def graphs_so_far() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _counters() -> None:
    torch._dynamo.utils.counters.clear()


def test_module_compile_in_place(backend: str) -> None:
    case, model, inputs, targets, options, want = prepared("attention")
    model.compile(backend=backend, options=options)
    case.loss(model(**inputs), targets).backward()
    assert_agree(gradients_of(model), want)


@pytest.mark.parametrize("name", ["mlp", "attention", "tied_by_function", "resnet_groupnorm"])
def test_function_with_the_loss_inside(name: str, backend: str) -> None:
    """A compiled function closes over the model and computes the loss: nothing is left outside the check."""
    _, model, inputs, targets, options, want = prepared(name)
    (argument,) = inputs

    def step(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return squared_error(model(**{argument: x}), {"y": y, "weight": weight})

    compiled = torch.compile(step, backend=backend, options=options)
    compiled(inputs[argument], **targets).backward()
    assert_agree(gradients_of(model), want)


def test_function_that_also_returns_outputs(backend: str) -> None:
    """A loss and its logits: the metrics that a loop reads must not disturb the gradients."""
    _, model, inputs, targets, options, want = prepared("mlp")

    def step(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        return squared_error(output, {"y": y, "weight": weight}), output.detach()

    loss, output = torch.compile(step, backend=backend, options=options)(inputs["x"], **targets)
    loss.backward()
    torch.testing.assert_close(output, model(inputs["x"]))
    assert_agree(gradients_of(model), want)


def test_two_outputs_both_used(backend: str) -> None:
    """Two outputs with tangents of their own; each sample's gradient is the sum of both."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.trunk(x))
            return self.left(hidden), self.right(hidden)

    def loss(output: tuple[Tensor, Tensor], targets: Tensors) -> Tensor:
        return squared_error(output[0], targets) + output[1].exp().sum(1).mean()

    case = Case("heads", Heads, ZOO["mlp"].inputs, loss, targets=ZOO["mlp"].targets)
    model, inputs, targets = case.make(5)
    samples = case_gradients(case, model, inputs, targets)
    options = halving_options(samples, "flat")
    got = private_gradients(case, model, inputs, targets, options, backend)
    assert_agree(got, clip(samples, options).released)


def _release(case: Case, compiled: Any, model: nn.Module, options: dict[str, Any], inputs: Tensors, targets: Tensors) -> list[str]:
    model.zero_grad(set_to_none=True)
    case.loss(compiled(**inputs), targets).backward()
    want = clip(case_gradients(case, model, inputs, targets), options).released
    return list(disagreements(gradients_of(model), want, 1e-4))


@pytest.fixture
def _no_crossovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without the guards that compile once more where another plan would be faster: test_crossovers.py has those."""
    monkeypatch.setattr(planning, "guard_signs", lambda expressions, graph: None)


@pytest.mark.usefixtures("_no_crossovers")
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", ["mlp_over_time", "attention", "resnet_groupnorm", "tied_by_function", "gpt2"])
def test_batch_size_changes(name: str, dynamic: bool | None, backend: str) -> None:
    """Right at every size, and no compile after the second size (with ``dynamic=True``: after the first)."""
    case, model, _, _, options, _ = prepared(name)
    compiled = torch.compile(model, backend=backend, options=options, dynamic=dynamic)
    seen = []
    for batch_size in (4, 6, 5, 3):
        torch.manual_seed(batch_size)
        inputs = case.inputs(batch_size)
        assert not _release(case, compiled, model, options, inputs, case.targets(inputs))
        seen.append(graphs_so_far())
    assert seen[1] == seen[-1], f"compiled graphs after each size: {seen}"
    assert dynamic is None or seen[0] == seen[-1]


@pytest.mark.usefixtures("_no_crossovers")
def test_sequence_length_changes(backend: str) -> None:
    """Batch and length both change; the algorithm chosen for one length must not be wrong for another."""
    torch.manual_seed(0)
    model = gpt2()
    case = Case("gpt2", gpt2, labelled_tokens, own_loss)
    compiled = torch.compile(model, backend=backend, options=LOOSE | {"max_grad_norm": 5.0}, dynamic=True)
    seen = []
    for batch_size, length in ((4, 9), (3, 7), (5, 12)):
        inputs = labelled_tokens(batch_size, length)
        options = LOOSE | {"max_grad_norm": 5.0}
        model.zero_grad()
        compiled(**inputs).loss.backward()
        # No loss_normalizer: it would fix one length. The default counts all T positions, of which T - 1 have a label.
        samples = case_gradients(case, model, inputs, {})
        samples = [{n: g * (length - 1) / length for n, g in sample.items()} for sample in samples]
        assert_agree(gradients_of(model), clip(samples, options).released)
        seen.append(graphs_so_far())
    assert seen[1] == seen[-1]


@pytest.mark.parametrize("known", [False, True], ids=["ignore_index", "num_items_in_batch"])
def test_token_count_is_replaced(known: bool, backend: str) -> None:
    """Whether the model counts its labels or is told their number, the fixed normalizer stands in its place."""
    torch.manual_seed(0)
    model, inputs = gpt2(), labelled_tokens(4)
    inputs["labels"][torch.arange(9) >= torch.tensor([[9], [4], [7], [5]])] = -100
    valid = (inputs["labels"][:, 1:] != -100).sum(1)
    case = Case("gpt2", gpt2, labelled_tokens, own_loss, share=lambda sample: (sample["labels"][:, 1:] != -100).sum().item() / 8)
    samples = case_gradients(case, model, inputs, {})
    options = halving_options(samples, "flat")
    compiled = torch.compile(model, backend=backend, options=options | {"loss_normalizer": 8.0})
    extra = {"num_items_in_batch": valid.sum()} if known else {}
    compiled(**inputs, **extra).loss.backward()
    assert_agree(gradients_of(model), clip(samples, options).released)


def test_equal_sizes_stay_apart_when_dynamic(backend: str) -> None:
    """Dynamo gives equal sizes one symbol: with B == T == d even symbols do not tell the axes apart."""
    case, model, inputs, targets, options, want = prepared("square")
    assert_agree(private_gradients(case, model, inputs, targets, options, backend, dynamic=True), want)
    case, model, inputs, targets, options, want = prepared("attention", 5)
    assert inputs["x"].shape[0] == inputs["x"].shape[1]
    assert_agree(private_gradients(case, model, inputs, targets, options, backend, dynamic=True), want)


def test_as_many_samples_as_classes_when_dynamic(backend: str) -> None:
    """Tracing with B = K gives both sizes one symbol; the next batch size compiles once more, with symbols of its own."""
    torch.manual_seed(0)
    model = nn.Conv1d(1, 2, 1)
    options = LOOSE | {"max_grad_norm": 1e6}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    compiled = torch.compile(loss, backend=backend, options=options, dynamic=True)
    for batch_size in (2, 3, 5):
        x, y = torch.randn(batch_size, 1, 4), torch.randint(4, (batch_size, 2))
        model.zero_grad()
        loss(x, y).backward()
        want = gradients_of(model)
        model.zero_grad()
        compiled(x, y).backward()
        assert_agree(gradients_of(model), want)
    assert graphs_so_far() <= 2


@pytest.mark.usefixtures("_no_crossovers")
def test_marked_dynamic(backend: str) -> None:
    case, model, _, _, options, _ = prepared("attention")
    compiled = torch.compile(model, backend=backend, options=options)
    for batch_size in (4, 7):
        inputs = case.inputs(batch_size)
        torch._dynamo.mark_dynamic(inputs["x"], 0)
        assert not _release(case, compiled, model, options, inputs, case.targets(inputs))
    assert graphs_so_far() == 1


def _summed(output: Tensor, targets: Tensors) -> Tensor:
    return ((output - targets["y"]).square().flatten(1).sum(1) * targets["weight"]).sum()


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_unbacked_batch(name: str, backend: str) -> None:
    """Poisson batches: one graph for 8, 5, 1, 0 and 7 samples. An empty batch releases zeros (and noise, if any)."""
    case = ZOO[name]
    model, _, _ = case.make()
    options = LOOSE | {"loss_reduction": "sum"}
    compiled = torch.compile(model, backend=backend, options=options)
    case = Case(name, case.build, case.inputs, _summed, targets=case.targets)
    for batch_size in (8, 5, 1, 0, 7):
        inputs = case.inputs(batch_size)
        torch._dynamo.decorators.mark_unbacked(inputs["x"], 0)
        model.zero_grad(set_to_none=True)
        targets = case.targets(inputs)
        case.loss(compiled(**inputs), targets).backward()
        got = gradients_of(model)
        if batch_size == 0:
            assert all(not value.any() for value in got.values())
        else:
            assert_agree(got, clip(case_gradients(case, model, inputs, targets), options).released)
    assert graphs_so_far() == 1


@pytest.mark.parametrize(
    "name", ["mlp", "attention", "gpt2", "resnet_groupnorm", "tied_by_function", "gru_cell", "siamese", "unet"]
)
def test_batch_of_one(name: str, backend: str) -> None:
    """B = 1 on its own: sizes are specialized, the batch vanishes from views, but there is still a sample to clip."""
    case = ZOO[name]
    model, inputs, targets = case.make(1)
    samples = case_gradients(case, model, inputs, targets)
    options: dict[str, Any] = halving_options(samples, "flat")
    options["max_grad_norm"] /= 3
    got = private_gradients(case, model, inputs, targets, options, backend)
    assert_agree(got, clip(samples, options).released)


def test_larger_after_one(backend: str) -> None:
    """A batch of one must not leave a graph behind that takes its size-1 dimension for something else."""
    case, model, _, _, options, _ = prepared("attention")
    compiled = torch.compile(model, backend=backend, options=options)
    for batch_size in (1, 4, 1, 6):
        inputs = case.inputs(batch_size)
        assert not _release(case, compiled, model, options, inputs, case.targets(inputs))


def test_empty_batch(backend: str) -> None:
    """B = 0, static: zeros without noise, and noise of the right size with it."""
    for sigma in (0.0, 2.0):
        torch._dynamo.reset()
        model = Mlp(width=64)
        options = LOOSE | {"noise_multiplier": sigma, "loss_reduction": "sum"}
        torch.compile(model, backend=backend, options=options)(torch.zeros(0, 6)).sum().backward()
        released = torch.cat([value.flatten() for value in gradients_of(model).values()])
        assert released.std().item() == pytest.approx(sigma, rel=0.2)


def test_accumulation_into_grad(backend: str) -> None:
    """A second backward adds its release to the first."""
    case, model, inputs, targets, options, want = prepared("attention")
    compiled = torch.compile(model, backend=backend, options=options)
    for _ in range(2):
        case.loss(compiled(**inputs), targets).backward()
    assert_agree(gradients_of(model), {name: 2 * value for name, value in want.items()})


def test_accumulation_over_micro_batches(backend: str) -> None:
    """Two micro-batches with ``accumulation_steps=2`` are one batch of twice the size."""
    case, model, inputs, targets, options, want = prepared("attention", 6)
    compiled = torch.compile(model, backend=backend, options=options | {"accumulation_steps": 2})
    for part in (slice(0, 3), slice(3, 6)):
        output = compiled(**{name: value[part] for name, value in inputs.items()})
        case.loss(output, {name: value[part] for name, value in targets.items()}).backward()
    assert_agree(gradients_of(model), want)
    assert flashnorm_compile.privacy(model).steps == 1


def test_accumulate_context_adds_no_noise(backend: str) -> None:
    """Inside ``accumulate()`` backward adds clipped sums only; the noise comes with the backward outside it."""
    case, model, inputs, targets, options, want = prepared("mlp")
    options |= {"noise_multiplier": 1.0}
    compiled = torch.compile(model, backend=backend, options=options)
    output = compiled(**inputs)
    state = flashnorm_compile.privacy(model)
    with state.accumulate():
        case.loss(output, targets).backward()
    assert_agree(gradients_of(model), want)
    assert state.steps == 0
    case.loss(compiled(**inputs), targets).backward()
    assert state.steps == 1
    assert list(disagreements(gradients_of(model), {name: 2 * value for name, value in want.items()}, 1e-2))


def test_no_grad_and_eval(backend: str) -> None:
    """Inference through the same compiled module equals eager, draws no noise and counts no step; training goes on."""
    case, model, inputs, targets, options, want = prepared("transformer_encoder")
    compiled = torch.compile(model, backend=backend, options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), model(**inputs))
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(**inputs), model(**inputs))
    model.train()
    case.loss(compiled(**inputs), targets).backward()
    assert_agree(gradients_of(model), want)
    assert flashnorm_compile.privacy(model).steps == 1


def test_model_without_trainable_parameters(backend: str) -> None:
    """Everything frozen: there is nothing to protect, the backend only compiles."""
    model = Mlp().requires_grad_(False)
    x = torch.randn(4, 6)
    torch.testing.assert_close(torch.compile(model, backend=backend, options=LOOSE)(x), model(x))


def test_frozen_parameters_get_no_gradient(backend: str) -> None:
    case, model, inputs, targets, options, _ = prepared("frozen")
    private_gradients(case, model, inputs, targets, options, backend)
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())


def test_unused_parameter(backend: str) -> None:
    """A parameter that the loss does not reach keeps ``grad`` None or gets zeros; it must not disturb the others."""

    class Spare(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.randn(3))

    case = Case("spare", Spare, ZOO["mlp"].inputs, squared_error, targets=ZOO["mlp"].targets)
    model, inputs, targets = case.make(4)
    samples = case_gradients(case, model, inputs, targets)
    options = halving_options(samples, "flat")
    got = private_gradients(case, model, inputs, targets, options, backend)
    assert_agree(got, clip(samples, options).released)


def test_inputs_that_are_not_contiguous(backend: str) -> None:
    case, model, inputs, targets, options, want = prepared("attention")
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_agree(private_gradients(case, model, inputs, targets, options, backend), want)


def test_training_lowers_the_loss(backend: str) -> None:
    """The whole loop: a hundred noisy steps with an optimizer, which the pre-step hook lets through."""
    torch.manual_seed(0)
    model, truth = Mlp(), torch.randn(6, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    compiled = torch.compile(model, backend=backend, options={"max_grad_norm": 1.0, "noise_multiplier": 0.5})
    losses = []
    for _ in range(100):
        x = torch.randn(32, 6)
        loss = (compiled(x) - x @ truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert flashnorm_compile.privacy(model).steps == 100


@pytest.mark.slow
def test_batch_size_changes_through_inductor() -> None:
    """The generated code, too, serves every batch size after the second."""
    test_batch_size_changes("mlp_over_time", None, "flashnorm")
