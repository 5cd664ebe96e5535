"""Fail closed: an optimizer uses released gradients only, and every mistake is named."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from types import FrameType
from typing import Any

import pytest
import torch
from flashnorm_compile.passes.errors import UnprotectedGradientError
from stand_in import Private, weights
from torch import nn
from torch.optim import LBFGS, SGD

from flashnorm_compile.state import common_state

X = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]])


def refused(optimizer: torch.optim.Optimizer, match: str) -> None:
    before = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
    with pytest.raises(UnprotectedGradientError, match=match):
        optimizer.step()
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_released_gradients_step() -> None:
    parameters = weights()
    graph, optimizer = Private(*parameters), SGD(parameters, lr=1.0)
    for set_to_none in (True, False, False):
        graph(X).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    graph(X).backward()
    optimizer.step()
    assert all(parameter.abs().sum() > 0 for parameter in parameters)


def test_gradients_are_stolen_not_copied() -> None:
    (parameter,) = weights(1)
    graph = Private(parameter)
    seen: list[int] = []
    graph.layout = lambda gradient: (seen.append(gradient.data_ptr()), gradient)[1]
    graph(X).backward()
    assert parameter.grad is not None
    assert parameter.grad.data_ptr() == seen[0]


def test_a_copied_gradient_steps() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    graph.layout = lambda gradient: torch.stack([gradient, gradient], 1)[:, 0]  # strided: autograd copies it
    graph(X).backward()
    assert parameter.grad is not None
    assert parameter.grad.is_contiguous()
    optimizer.step()


def test_eager_fallback_is_refused() -> None:
    parameters = weights()
    Private(*parameters)
    optimizer = SGD(parameters, lr=1.0)
    (X @ parameters[0]).sum().backward()
    refused(optimizer, r"layer0\.weight: its gradient did not come from a private graph")


def test_parameter_outside_is_refused_unless_exempt() -> None:
    parameters, head = weights(), nn.Parameter(torch.zeros(3))
    graph, optimizer = Private(*parameters), SGD([*parameters, head], lr=1.0)
    (graph(X) + head.sum()).backward()
    refused(optimizer, r"group 0, parameter 2, shape \(3,\): it belongs to no private graph")
    common_state(parameters).exempt(head)
    optimizer.step()
    assert torch.equal(head.detach(), -torch.ones(3))


@pytest.mark.parametrize("eager_first", [True, False])
def test_second_use_in_one_pass_is_refused(eager_first: bool) -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    if eager_first:
        loss = (X @ parameter).sum() + graph(X)
    else:
        loss = graph(X)
        loss = loss + (X @ parameter).sum()
    loss.backward()
    refused(optimizer, "something was added to its private gradient during backward")


def test_second_pass_without_the_graph_is_refused() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    graph(X).backward()
    (X @ parameter).sum().backward()
    refused(optimizer, "did not come from a private graph")
    optimizer.zero_grad()
    (X @ parameter).sum().backward()
    graph(X).backward()  # onto an unprotected gradient
    refused(optimizer, "did not come from a private graph")


def test_accumulate_never_closed_is_refused() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    with graph.binding.state.accumulate():
        graph(X).backward()
        refused(optimizer, r"added no noise \(inside accumulate\(\)")
    refused(optimizer, "added no noise")
    graph(X).backward()
    optimizer.step()


def test_accumulation_steps() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter, accumulation_steps=2), SGD([parameter], lr=1.0)
    graph(X).backward()
    refused(optimizer, "before accumulation_steps passes were complete")
    graph(X).backward()
    optimizer.step()


@pytest.mark.parametrize("set_to_none", [None, False])
def test_gradient_used_twice_is_refused(set_to_none: bool | None) -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    graph(X).backward()
    optimizer.step()
    refused(optimizer, r"already used this gradient; call optimizer\.zero_grad\(\)")
    if set_to_none is None:
        graph(X).backward()
        refused(optimizer, "already used")
    else:
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()  # zeros say nothing about anybody


def test_writing_by_hand_is_refused() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    graph(X).backward()
    nn.utils.clip_grad_norm_([parameter], 0.01)
    refused(optimizer, r"p\.grad was written or changed outside backward .*max_grad_norm=0")
    optimizer.zero_grad()
    graph(X).backward()
    parameter.grad = None
    parameter.grad = torch.ones(3)  # often at the freed gradient's address
    refused(optimizer, "written or changed")
    graph(X).backward()
    refused(optimizer, "written or changed")


def test_capturing_gradients_does_not_disturb() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    graph(X).backward()
    (captured,) = torch.autograd.grad(graph(X), [parameter])
    optimizer.step()
    optimizer.zero_grad()
    parameter.grad = captured
    refused(optimizer, "written or changed")


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("kind", ["tensor", "post_accumulate", "optimizer"])
def test_hooks_that_change_gradients_are_refused(kind: str, early: bool) -> None:
    (parameter,) = weights(1)
    optimizer = SGD([parameter], lr=1.0)

    def scale(*_: object) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(2.0)

    def install() -> None:
        if kind == "tensor":
            parameter.register_hook(lambda gradient: gradient * 2)
        elif kind == "post_accumulate":
            parameter.register_post_accumulate_grad_hook(scale)
        else:
            optimizer.register_step_pre_hook(scale)

    if early:
        install()
    graph = Private(parameter)
    if not early:
        install()
    graph(X).backward()
    refused(optimizer, "a hook changed it|written or changed")


def test_removed_hooks_are_refused() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    assert parameter._backward_hooks is not None
    parameter._backward_hooks.clear()
    graph(X).backward()
    refused(optimizer, "did not come from a private graph")


def test_forgotten_watch_is_refused() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashnorm_compile.guard.watch", lambda outputs, binding: None)
        graph(X).backward()
    refused(optimizer, "did not come from a private graph")


def test_view_outputs_are_followed() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        from flashnorm_compile import guard

        watch = guard.watch
        patch.setattr(guard, "watch", lambda outputs, binding: watch([outputs[0].view(1, 1)], binding))
        graph(X).backward()
    optimizer.step()


def test_double_backward_pass_releases_twice() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)
    loss = graph(X)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert graph.binding.state.steps == 2


def test_sparse_gradient_is_refused() -> None:
    table = nn.Parameter(torch.zeros(4, 3))
    optimizer = SGD([table], lr=1.0)
    Private(table, names=["table.weight"])
    nn.functional.embedding(torch.tensor([1, 2]), table, sparse=True).sum().backward()
    refused(optimizer, r"table\.weight: its gradient did not come")


def test_closures() -> None:
    (parameter,) = weights(1)
    graph, optimizer = Private(parameter), SGD([parameter], lr=1.0)

    def closure(private: bool = True) -> torch.Tensor:
        optimizer.zero_grad()
        loss = graph(X) if private else (X @ parameter).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = parameter.detach().clone()
    assert moved.abs().sum() > 0
    optimizer.step(closure=closure)
    with pytest.raises(UnprotectedGradientError, match="did not come from a private graph"):
        optimizer.step(lambda: closure(private=False))
    with pytest.raises(UnprotectedGradientError, match="LBFGS cannot be used"):
        LBFGS([parameter]).step(closure)


def test_names_five_of_many() -> None:
    parameters = weights(7)
    Private(*parameters)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    refused(SGD(parameters, lr=1.0), r"(?s)use 7 gradient.*layer4\.weight.*\.\.\. and 2 more")


def test_other_optimizers_are_left_alone() -> None:
    Private(*weights())
    plain = nn.Parameter(torch.zeros(3))
    plain.sum().backward()
    optimizer = SGD([plain], lr=1.0)
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks


def test_copies_saving_and_freeing() -> None:
    model = nn.ParameterList(weights())
    Private(*model)(X).backward()
    twin = copy.deepcopy(model)
    twin[0].grad = torch.ones(3)
    SGD(twin.parameters(), lr=1.0).step()  # a copy has not been compiled
    torch.save(model, io.BytesIO())
    reference = weakref.ref(model[0])
    del model
    gc.collect()
    assert reference() is None


def calls_of_a_step(count: int) -> int:
    """Functions that a step calls, of Python or of C, with so many parameters."""
    parameters = weights(count)
    graph, optimizer = Private(*parameters), SGD(parameters, lr=0.0, foreach=True)
    graph(X).backward()
    calls = 0

    def count_calls(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count_calls)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return calls


def test_cost_per_step() -> None:
    """It grows no faster than the number of parameters."""
    few, many, more = (calls_of_a_step(count) for count in (50, 100, 200))
    assert more - many <= 2.1 * (many - few)
