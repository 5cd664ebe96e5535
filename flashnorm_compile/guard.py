"""Fail closed: no optimizer step uses a gradient that was not clipped and noised for that step.

Every gradient that a private graph releases is followed by its identity and version, from the graph's backward node into
``p.grad`` and up to the optimizer:

    watch           the node's post hook notes which tensor is the release of which parameter
    _Record.before  the parameter's hook sees the total gradient of the pass: is it the release, and nothing else?
    _Record.after   the post-accumulate hook sees p.grad: is it what accumulating that release must have given?
    _check_step     the optimizer's pre-step hook: is p.grad still the tensor that was noted, noised, and unused?

Anything that does not fit is remembered with a reason and refused at the step. Weak references identify tensors, because
an address can be reused by another tensor; tensors are never kept alive, so gradients are still stolen, not copied.
Not seen: writes through ``p.grad.data``, which have no version.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .binding import Binding, Release, current_backward
from .passes.errors import UnprotectedGradientError
from .state import is_exempt, name_of

_OUTSIDE = (
    "it belongs to no private graph; compile the part of the model that uses it with backend='flashnorm', or, if it "
    "may be trained without protection, call privacy(model).exempt(parameter)"
)
_EAGER = (
    "its gradient did not come from a private graph (an eager fallback, a graph that failed to compile, a use "
    "outside the compiled part); run every use of it inside the compiled module"
)
_MIXED = (
    "something was added to its private gradient during backward, or a hook changed it (a second use outside the "
    "compiled part, a weight tied across two parts); run every use of it inside one compiled part and remove the hook"
)
_WRITTEN = (
    "p.grad was written or changed outside backward (by hand, gradient clipping, loss scaling); samples are already "
    "clipped, so remove clip_grad_norm_ and the like (in transformers: TrainingArguments(max_grad_norm=0), and "
    "flashnorm_compile.integrations.transformers.PrivacyCallback, which keeps the Trainer from writing gradients to measure them)"
)
_NOISELESS = (
    "the last backward pass added no noise (inside accumulate(), or before accumulation_steps passes were complete); "
    "run the last backward pass before the step outside accumulate()"
)
_USED = "an earlier step already used this gradient; call optimizer.zero_grad() after every step"


class _Record:
    """What is known about the gradient of one parameter."""

    def __init__(self, parameter: nn.Parameter, name: str) -> None:
        self.ref = weakref.ref(parameter)
        self.name = name
        # The release that is on its way: the tensor, its version, and the release's facts.
        self.pending: tuple[weakref.ref[Tensor], int, Release] | None = None
        # Between the two hooks: a fault or None, what p.grad must be afterwards, whether it is fresh, and the release.
        self.arriving: tuple[str | None, tuple[int, int] | None, bool, Release | None] | None = None
        # p.grad as noted last, and what is known about it.
        self.grad: weakref.ref[Tensor] | None = None
        self.version = -1
        self.fault: str | None = None
        self.noised = False
        self.used = False
        self.before_id = parameter.register_hook(self.before).id
        self.after_id = parameter.register_post_accumulate_grad_hook(self.after).id

    def expect(self, grad: Tensor, release: Release) -> None:
        """Called when the graph's backward returns ``grad``."""
        self.pending = (weakref.ref(grad), _version(grad), release)
        parameter = self.ref()
        hooks = None if parameter is None else parameter._backward_hooks
        if hooks and self.before_id in hooks and next(reversed(hooks)) != self.before_id:
            hooks[self.before_id] = hooks.pop(self.before_id)  # a hook behind ours could replace the gradient unseen

    def before(self, total: Tensor | None) -> None:
        """Called with the sum of all gradients of this pass, before it is accumulated; with ``None`` if there is none."""
        pending, self.pending = self.pending, None
        parameter = self.ref()
        if parameter is None or total is None:
            return
        fault: str | None = None
        if pending is None or pending[2].backward != current_backward():
            fault = _EAGER
        elif pending[0]() is not total or pending[1] != _version(total):
            fault = _MIXED
        old = parameter.grad
        if old is None:
            expected = _place(total)  # autograd takes the tensor over
        else:
            fault = fault or self._fault_of_old(old)
            place = _place(old)  # autograd adds to it in place
            expected = place and (place[0], place[1] + 1)
        self.arriving = (fault, expected, old is None, pending and pending[2])

    def _fault_of_old(self, old: Tensor) -> str | None:
        """Why nothing may be accumulated onto this p.grad. Zeros, however they came there, are harmless."""
        if self._is_noted(old):
            return self.fault or (_USED if self.used else None)
        return _WRITTEN if _any_nonzero(old) else None

    def after(self, parameter: nn.Parameter) -> None:
        """Called when p.grad has been accumulated."""
        arriving, self.arriving = self.arriving, None
        grad = parameter.grad
        if grad is None or (arriving is None and self._is_noted(grad)):
            return  # nothing arrived
        fault, expected, fresh, release = arriving or (_EAGER, None, False, None)
        as_expected = expected is not None and _place(grad) == expected
        if fault is None and not as_expected and not (fresh and self._is_copy(parameter, grad)):
            fault = _MIXED
        self.grad, self.version = weakref.ref(grad), _version(grad)
        self.fault, self.noised, self.used = fault, release is not None and release.noised, False
        if fault is None and release is not None and release.noised:
            release.state.settle(parameter)

    def _is_copy(self, parameter: Tensor, grad: Tensor) -> bool:
        """Autograd copies a gradient of another layout; nobody else can have written it when our hook runs first."""
        hooks = parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        return _version(grad) <= 1 and bool(hooks) and next(iter(hooks)) == self.after_id

    def _is_noted(self, grad: Tensor) -> bool:
        return self.grad is not None and self.grad() is grad and _version(grad) == self.version

    def is_ready(self, grad: Tensor) -> bool:
        """Whether this p.grad is private, noised, and has not been used."""
        return self.noised and not self.used and self.fault is None and self._is_noted(grad)

    def reason_to_refuse(self, grad: Tensor) -> str | None:
        """Why an optimizer must not use this p.grad, or None."""
        if not self._is_noted(grad):
            return _WRITTEN if _any_nonzero(grad) else None
        return self.fault or (None if self.noised else _NOISELESS) or (_USED if self.used else None)


_Slots = list[tuple[int, _Record]]
# By the parameter's id; an entry goes when its parameter does.
_records: dict[int, _Record] = {}
_step_hook: Any = None
_STEP_KEY: Any = "flashnorm_compile"


def protect(parameters: Sequence[nn.Parameter], names: Sequence[str]) -> None:
    """Makes parameters private: from now on an optimizer refuses gradients of theirs that no private graph released.

    Called before a graph is compiled, so that an eager fallback after a failed compilation is refused as well.
    """
    global _step_hook
    if _step_hook is None:
        _step_hook = register_optimizer_step_pre_hook(_route_step)
    for parameter, name in zip(parameters, names, strict=True):
        if id(parameter) not in _records and parameter.requires_grad:
            _records[id(parameter)] = _Record(parameter, name)
            weakref.finalize(parameter, _records.pop, id(parameter), None)


def watch(outputs: Any, binding: Binding) -> Node | None:
    """Follows the gradients of one forward pass of a private graph; ``outputs`` is what its forward returned. Gives the autograd
    node of the graph's backward."""
    node = _backward_node(outputs)
    if node is None:
        return None
    parameters = [parameter for parameter in (ref() for ref in binding.parameters) if parameter is not None]
    if not binding.guarded:
        protect(parameters, binding.names)
        binding.guarded = True
    # The class belongs to one compiled graph, whose inputs have fixed places.
    places = _slots.setdefault(type(node), {})
    if id(binding) not in places:
        places[id(binding)] = _slots_of(node, parameters)
        weakref.finalize(binding, places.pop, id(binding), None)
    node.register_hook(partial(_note, binding, places[id(binding)]))
    return node


# Class of a compiled graph's backward node -> id of a binding -> which of the node's results is the gradient of which parameter.
_slots: weakref.WeakKeyDictionary[type, dict[int, _Slots]] = weakref.WeakKeyDictionary()


def _slots_of(node: Node, parameters: Sequence[nn.Parameter]) -> _Slots:
    own = set(map(id, parameters))
    variables = ((position, getattr(source, "variable", None)) for position, (source, _) in enumerate(node.next_functions))
    return [(position, _records[id(one)]) for position, one in variables if id(one) in own and id(one) in _records]


def _note(binding: Binding, slots: _Slots, grad_inputs: Sequence[Tensor | None], grad_outputs: Any) -> None:
    release, binding.last_release = binding.last_release, None
    if release is None or release.backward < 0 or release.backward != current_backward():
        return
    for position, record in slots:
        grad = grad_inputs[position]
        if grad is not None:
            record.expect(grad, release)


def _backward_node(outputs: Any) -> Node | None:
    """The autograd node of the compiled graph. Outputs that are views of others hang a few nodes in front of it."""
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs if isinstance(outputs, (tuple, list)) else []
    level: list[Node] = [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
    for _ in range(4):
        for node in level:
            if node.name() == "CompiledFunctionBackward":
                return node
        level = [source for node in level for source, _ in node.next_functions if source is not None]
    return None


def _route_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Global pre-step hook: puts the check behind the optimizer's own pre-step hooks, which may change gradients."""
    if any(id(parameter) in _records for _, parameter in _parameters(optimizer)):
        hooks = optimizer._optimizer_step_pre_hooks
        hooks.pop(_STEP_KEY, None)
        hooks[_STEP_KEY] = _check_step


@torch._dynamo.disable
def _check_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-step hook of one optimizer. A closure is checked each time that it has computed gradients."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _check_gradients(optimizer)
        return None
    if isinstance(optimizer, LBFGS) or not type(optimizer).__module__.startswith("torch.optim"):
        raise UnprotectedGradientError(
            f"{type(optimizer).__name__}.step(closure) holds private parameters. A closure hands the optimizer the "
            "loss, which is not private, and gradients that cannot be checked before they are used. "
            "Call loss.backward() and then step() without a closure; LBFGS cannot be used."
        )
    checked = partial(_checked_closure, optimizer, closure)
    if len(args) > 1:
        return (args[0], checked, *args[2:]), kwargs
    return args, {**kwargs, "closure": checked}


def _checked_closure(optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
    result = closure()
    _check_gradients(optimizer)
    return result


def _check_gradients(optimizer: Optimizer) -> None:
    refused: list[tuple[str, str]] = []
    valid: list[_Record] = []
    for label, parameter in _parameters(optimizer):
        grad = parameter.grad
        if grad is None:
            continue
        record = _records.get(id(parameter))
        if record is not None and record.is_ready(grad):
            valid.append(record)
            continue
        reason = _OUTSIDE if record is None else record.reason_to_refuse(grad)
        if reason is None:
            valid.append(record)  # type: ignore[arg-type]
        elif not is_exempt(parameter):
            group, position = label
            name = f"group {group}, parameter {position}, shape {tuple(parameter.shape)}"
            refused.append((name_of(parameter) or (record.name if record else name), reason))
    if refused:
        raise UnprotectedGradientError(_refusal(optimizer, refused))
    for record in valid:
        record.used = True


def _parameters(optimizer: Optimizer) -> Iterator[tuple[tuple[int, int], Tensor]]:
    for group, settings in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(settings["params"]):
            yield (group, position), parameter


def _refusal(optimizer: Optimizer, refused: list[tuple[str, str]]) -> str:
    lines = [f"  {name}: {reason}." for name, reason in refused[:5]]
    if len(refused) > 5:
        lines.append(f"  ... and {len(refused) - 5} more.")
    head = f"{type(optimizer).__name__}.step() would use {len(refused)} gradient(s) that were not clipped and noised"
    return "\n".join([f"{head} for this step. Nothing was updated.", *lines])


def _version(tensor: Tensor) -> int:
    """Counts the writes to a tensor; those to this rank's part of a DTensor too."""
    if type(tensor) is Tensor:
        return tensor._version
    return tensor._version + (tensor._local_tensor._version if isinstance(tensor, DTensor) else 0)


def _place(tensor: Tensor) -> tuple[int, int] | None:
    """Where a dense tensor (of a DTensor, this rank's part) lies, and its version. None for sparse and other wrapper tensors."""
    local = tensor._local_tensor if type(tensor) is not Tensor and isinstance(tensor, DTensor) else tensor
    try:
        address = local.data_ptr()
    except RuntimeError:  # sparse
        return None
    return (address, _version(tensor)) if address or not local.numel() else None


def _any_nonzero(grad: Tensor) -> bool:
    """Reads values, and so waits for the device; only needed for a p.grad that is not the one that was noted."""
    values = grad._local_tensor if isinstance(grad, DTensor) else grad
    values = values.coalesce().values() if values.layout is torch.sparse_coo else values
    return bool(values.detach().any())
