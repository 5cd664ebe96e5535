"""What GPUs get instead of compositions: which operators a plan becomes, and that they release what the oracle does.

The operators run here through their ATen forms; their kernels are tested in tests/kernels. On a CUDA device the same comparisons
run through Inductor and the kernels themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
from flashnorm_compile.passes import _compat, fused_costs, kernels, memory, plan, private_pass, saved
from flashnorm_compile.passes.canonicalize import canonicalize_pass
from flashnorm_compile.passes.costs import Product
from flashnorm_compile.passes.factored import unwidened
from flashnorm_compile.passes.peaks import DATASHEETS
from flashnorm_compile.templates import sample_products
from models.case import Case, squared_error, weights_and_noise
from models.zoo import ZOO
from oracle import assert_agree, case_gradients, check, clip, gradients_of, halving_options
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from flashnorm_compile.backend import compile_private
from flashnorm_compile.options import Options

ALGORITHMS = ("auto", "materialize", "ghost", "flash")
# Products, a tied head (cross term), a convolution, many uses of one weight, sequence-first layout, a padded embedding.
NAMES = ("mlp_over_time", "gpt2", "tied_by_function", "resnet_groupnorm", "gru_cell", "bert_masked")


@pytest.fixture
def _operators() -> Iterator[None]:
    with mock.patch.object(kernels, "fused", return_value=True):
        yield


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", NAMES)
def test_oracle(name: str, algorithm: str) -> None:
    check(ZOO[name], norm_algorithm=algorithm)


class Added(nn.Module):
    """One product, of which both layers' weights get the gradient; only one layer has a bias, so that their norms differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, self.first.weight + self.second.weight, self.first.bias)).sum(1)


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_parameters_of_one_product_take_their_own_factors(algorithm: str) -> None:
    case = Case("added", Added, lambda batch: {"x": torch.randn(batch, 7, 6)}, squared_error, weights_and_noise("x", 5))
    check(case, clipping="per_layer", norm_algorithm=algorithm)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [(name, algorithm) for name in ZOO for algorithm in (ALGORITHMS if name in NAMES else ("auto",))],
)
def test_oracle_on_a_device(name: str, algorithm: str) -> None:
    case = ZOO[name]
    model, inputs, targets = case.make()
    samples = case_gradients(case, model, inputs, targets)
    options = halving_options(samples, "flat") | case.options | {"norm_algorithm": algorithm}
    if case.dims:
        options["batch_dims"] = case.dims
    on_device = [{name: value.cuda() for name, value in tensors.items()} for tensors in (inputs, targets)]
    compiled = torch.compile(model.cuda(), backend="flashnorm", options=options)
    case.loss(compiled(**on_device[0]), on_device[1]).backward()
    assert_agree({name: value.cpu() for name, value in gradients_of(model).items()}, clip(samples, options).released)


class Tied(nn.Module):
    """A language model of one table: embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.table(ids)) @ self.table.weight.t()


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.sin(self.table(ids))


class Twice(nn.Module):
    """One weight in two products."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def product() -> nn.Module:
    return nn.Linear(6, 5, bias=False)


def sequences(batch: int = 3) -> Tensor:
    return torch.randn(batch, 7, 6)


def long_sequences() -> Tensor:
    return torch.randn(3, sample_products.FROM_POSITIONS, 6)


def tokens() -> Tensor:
    return torch.randint(11, (3, 7))


def private_graph(model: nn.Module, x: Tensor, algorithm: str) -> fx.Graph:
    """The joint graph after the pass."""
    kept: list[fx.Graph] = []

    def observe(stage: str, graph: fx.Graph, outcome: Any) -> None:
        if stage == "after":
            kept.append(graph)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        options = Options.parse({"max_grad_norm": 1.0, "noise_multiplier": 1.0, "norm_algorithm": algorithm})
        return compile_private(gm, example_inputs, options, inner_compile=_compat.run_graph, observers=(observe,), protect=False)

    torch.compile(lambda x: model(x).square().sum(), backend=backend)(x).backward()
    return kept[0]


def ours(graph: fx.Graph) -> Counter[str]:
    """Operators of ``flashnorm::`` in a graph, ``release`` aside."""
    names = (str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith("flashnorm."))
    return Counter(name for name in names if name != "release")


BECOMES = {
    ("product", "materialize"): {"weight_grads": 1, "weighted_sums_noise": 1},
    ("long product", "materialize"): {"sample_products": 1, "squared_norms": 1, "weighted_sums_noise": 1},
    ("product", "ghost"): {"ghost_norm": 1, "clipped_sum": 1, "weighted_sums_noise": 1},
    ("product", "flash"): {"flash_norm": 1, "clipped_sum": 1, "weighted_sums_noise": 1},
    ("twice", "materialize"): {"weight_grads": 1, "weighted_sums_noise": 1},
    ("twice", "ghost"): {"ghost_norm": 1, "clipped_sums": 1, "weighted_sums_noise": 1},
    ("lookup", "ghost"): {"embedding_norm": 1, "weighted_sums_noise": 1},
    ("tied", "ghost"): {"ghost_norm": 1, "embedding_norm": 1, "tied_cross_term": 1, "clipped_sum": 1, "weighted_sums_noise": 1},
}
MODELS = {
    "product": (product, sequences),
    "long product": (product, long_sequences),
    "twice": (Twice, sequences),
    "lookup": (Lookup, tokens),
    "tied": (Tied, tokens),
}


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize(("kind", "algorithm"), BECOMES)
def test_a_plan_becomes_these_operators_and_no_others(kind: str, algorithm: str) -> None:
    build, inputs = MODELS[kind]
    assert ours(private_graph(build(), inputs(), algorithm)) == BECOMES[kind, algorithm]


@pytest.mark.usefixtures("_operators")
def test_one_sample_reads_its_gradient_twice() -> None:
    assert ours(private_graph(product(), sequences(1), "auto")) == {"squared_norms": 1, "weighted_sums_noise": 1}


@pytest.mark.usefixtures("_operators")
def test_half_precision_is_not_widened_before_a_kernel() -> None:
    """Operands go to the kernels in their own type, and per-sample gradients are kept in it; the release is noised in float32."""
    x = sequences().bfloat16()
    for algorithm in ("materialize", "ghost", "flash"):
        graph = private_graph(product().bfloat16(), x, algorithm)
        for node in graph.nodes:
            name = str(node.target)
            if any(kernel in name for kernel in ("weight_grads", "ghost_norm", "flash_norm", "clipped_sum")):
                assert {arg.meta["val"].dtype for arg in node.all_input_nodes[:2]} == {torch.bfloat16}
            if "clipped_sum" in name:
                assert node.meta["val"].dtype == torch.float32
            if "weight_grads" in name:
                assert node.meta["val"][0].dtype == torch.bfloat16


@pytest.mark.usefixtures("_operators")
def test_a_tied_head_is_not_widened_for_its_embedding() -> None:
    graph = private_graph(Tied().bfloat16(), tokens(), "ghost")
    (cross,) = (node for node in graph.nodes if "tied_cross_term" in str(node.target))
    h, _, g, a = cross.all_input_nodes
    assert {operand.meta["val"].dtype for operand in (h, g, a)} == {torch.bfloat16}


def test_padding_is_taken_out_of_an_embeddings_gradient_before_it_is_widened() -> None:
    """The form that torch 2.11's decomposition gives, in which a widened operand would hide the narrow one."""

    def scatter(ids: Tensor, grad: Tensor) -> Tensor:
        zero = torch.scalar_tensor(0.0, dtype=torch.float32)
        rows = torch.where((ids == 1).unsqueeze(-1), zero, torch.ops.prims.convert_element_type(grad, torch.float32))
        return torch.zeros(11, 6).index_put((ids,), rows, accumulate=True)

    ids, grad = tokens(), sequences().bfloat16()
    traced = make_fx(scatter, tracing_mode="fake")(ids, grad)
    canonicalize_pass(traced.graph)
    traced.recompile()
    (put,) = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.index_put.default)
    assert unwidened(put.args[2]).meta["val"].dtype == torch.bfloat16
    assert put.args[2].meta["val"].dtype == torch.float32
    assert torch.equal(traced(ids, grad), scatter(ids, grad))


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.usefixtures("_operators")
def test_a_layer_gives_its_operands_back_before_the_backward_goes_on() -> None:
    """Gradients of the last layer are made first, each before the gradient of the layer below."""
    names = [str(node.target) for node in private_graph(Projections(), sequences(), "materialize").nodes]
    first_below = max(i for i, name in enumerate(names) if name == "aten.mm.default")
    made = [i for i, name in enumerate(names) if name == "flashnorm.weight_grads.default"]
    assert len(made) == 3
    assert made[1] < first_below < made[2]


@pytest.fixture
def made_again(monkeypatch: pytest.MonkeyPatch) -> list[saved.Saved]:
    """Every saved value that can be is made again, whether memory asks for it or not. Returns them."""
    found: list[saved.Saved] = []
    plan_gradients = private_pass.plan_gradients

    def all_again(graph: fx.Graph, gradients: list[Any], *rest: Any) -> Any:
        planned = plan_gradients(graph, gradients, *rest)
        number = plan._Numbers(graph)
        line = memory.timeline(graph, [g.leaving for g in gradients if g.leaving is not None], number)
        found.extend(saved.saved_values(graph, line, planned.peaks or DATASHEETS[0], number))
        return replace(planned, made_again=tuple(found))

    monkeypatch.setattr(private_pass, "plan_gradients", all_again)
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_values_that_are_made_again_leave_every_gradient_as_it_is(name: str, made_again: list[saved.Saved]) -> None:
    check(ZOO[name])
    assert made_again


@pytest.mark.usefixtures("_operators")
def test_dynamic_sizes_with_values_that_the_plan_makes_again() -> None:
    """A plan guards the sizes at which it fits, with what it makes again taken off."""
    with mock.patch.object(plan, "excess_bytes", wraps=plan.excess_bytes) as guarded:
        check(ZOO["llama"], compile_options={"dynamic": True})
    assert any(call.args[-1] for call in guarded.call_args_list)


class Annealed(nn.Module):
    """A product's input is scaled by a buffer, which the step changes afterwards if it is ``annealed``."""

    def __init__(self, annealed: bool) -> None:
        super().__init__()
        self.layer, self.annealed = nn.Linear(6, 6, bias=False), annealed
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x * self.scale)
        if self.annealed:
            self.scale.mul_(2)
        return y


@pytest.mark.parametrize("annealed", [False, True])
def test_what_was_made_from_an_overwritten_buffer_is_kept(annealed: bool, made_again: list[saved.Saved]) -> None:
    model, x = Annealed(annealed), sequences()
    step = torch.compile(model, backend="flashnorm_eager", options={"max_grad_norm": 1e9, "noise_multiplier": 0.0})
    step(x).square().sum().backward()
    y = 0.5 * x @ model.layer.weight.detach().T
    torch.testing.assert_close(model.layer.weight.grad, torch.einsum("btp,btd->pd", 2 * y, 0.5 * x))
    assert bool(made_again) != annealed


def test_a_cpu_gets_only_the_operators_that_have_a_cpu_form_of_their_own() -> None:
    for (kind, algorithm), _ in BECOMES.items():
        build, inputs = MODELS[kind]
        found = ours(private_graph(build(), inputs(), algorithm))
        assert set(found) <= {"add_noise", "clipped_sum", "flash_norm", "ghost_norm", "weighted_sum_noise"}, (kind, algorithm)


def seconds_on_h200(batch: int, length: int, p: int, d: int) -> dict[str, float]:
    """Predicted microseconds that each way adds for a product in bf16."""
    product = Product(*map(sympy.Integer, (batch, length, p, d)), torch.bfloat16)
    target = fused_costs.Target(sympy.Integer(batch), sympy.Integer(p * d), 2)
    peaks = next(peaks for peaks in DATASHEETS if peaks.name == "H200")
    ways = {
        "materialize": fused_costs.materialized_product(product, target),
        "ghost": fused_costs.ghost(product, None, False, target),
        "flash": fused_costs.flash(product, target),
    }
    return {name: 1e6 * cost.seconds(peaks, float) for name, cost in ways.items()}


def test_costs_of_stored_gradients_are_counted_by_hand() -> None:
    """A Llama projection: making the gradients is as fast as the product that they replace; then they are read twice, for their
    norms and for their sum."""
    product = Product(*map(sympy.Integer, (4, 2048, 8192, 2048)), torch.bfloat16)
    target = fused_costs.Target(sympy.Integer(4), sympy.Integer(8192 * 2048), 2)
    cost = fused_costs.materialized_product(product, target)
    weight = 8192 * 2048 * 2
    assert cost.flops == 0
    assert cost.held == 4 * weight
    # Written, read for the norms, read and released, less what the plain product writes.
    assert cost.traffic == 4 * weight + 4 * weight + 5 * weight - weight
    read = 1e6 * 9 * weight / (4.8e12 * 0.85)
    assert seconds_on_h200(4, 2048, 8192, 2048)["materialize"] == pytest.approx(read, rel=0.01)


def test_short_samples_are_squared_by_the_kernel_that_makes_them() -> None:
    product = Product(*map(sympy.Integer, (64, 197, 768, 768)), torch.bfloat16)
    target = fused_costs.Target(sympy.Integer(64), sympy.Integer(768 * 768), 2)
    weight = 768 * 768 * 2
    assert fused_costs.materialized_product(product, target).traffic == 64 * weight + 65 * weight - weight


@pytest.mark.parametrize(
    ("shape", "fastest"),
    [((4, 2048, 8192, 2048), "materialize"), ((8, 1024, 768, 768), "materialize"), ((64, 197, 3072, 768), "ghost")],
)
def test_the_fastest_way_depends_on_the_shape(shape: tuple[int, int, int, int], fastest: str) -> None:
    """Many positions of few samples are stored, few positions of many samples multiplied with each other."""
    found = seconds_on_h200(*shape)
    assert min(found, key=found.__getitem__) == fastest, found
