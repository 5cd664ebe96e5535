"""Problems of any size without memory: the model and its batch are fake tensors on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.case import Problem


@contextlib.contextmanager
def fake_problem(build: Callable[[], Problem], dtype: torch.dtype = torch.float32) -> Iterator[Problem]:
    """Builds with fake tensors and casts to `dtype`. What the `with` block does with the problem is fake as well."""
    # torch 2.13 copies a fake tensor's storage, which it has not, and crashes where the copy is used.
    with FakeTensorMode(), mock.patch.object(FakeTensor, "__deepcopy__", _deepcopy, create=True):
        yield cast(build(), dtype)


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    """`Problem.to` for fake parameters, which `nn.Module.to` does not convert. Tied parameters stay tied."""
    converted: dict[nn.Parameter, nn.Parameter] = {}
    for module in problem.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in converted:
                    converted[parameter] = nn.Parameter(_cast(parameter.detach(), dtype), parameter.requires_grad)
                module._parameters[name] = converted[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _cast(buffer, dtype)
    inputs = tuple(_cast(x, dtype) for x in problem.inputs)
    return dataclasses.replace(problem, inputs=inputs, targets=_cast(problem.targets, dtype))


def _deepcopy(self: Tensor, memo: dict[int, object]) -> Tensor:
    copied = self.detach().clone()
    if isinstance(self, nn.Parameter):
        copied = nn.Parameter(copied, self.requires_grad)
    memo[id(self)] = copied
    return copied


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
