"""The oracle: a loop over samples, plain eager autograd, float64. It shares no code with what it judges.

Norms, clip factors and clipped sums are separate results, so that a test can say which of them is wrong.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from models.case import Case, Tensors
from torch import Tensor, nn

Gradients = dict[str, Tensor]
SampleLoss = Callable[[nn.Module, int], Tensor]

FLOAT32_TOLERANCE = 1e-4
# A gradient that is zero on paper (a key's bias under softmax, a bias before a normalization) is a sum of terms as
# large as its neighbors' gradients, each of them rounded. With u = 2**-24 and a chain of about 16 roundings its
# absolute error is near 16 u times the whole gradient. Parameters with more than 1 % of the gradient do not feel it.
FLOAT32_FLOOR = 16 * 2.0**-24


def in_double(value: Tensor) -> Tensor:
    """Floats as float64, complex numbers as complex128, everything else as it is."""
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


def double_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float64. Shared parameters stay shared."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        return twin._apply(in_double)


def per_sample_gradients(model: nn.Module, sample_loss: SampleLoss, batch_size: int) -> list[Gradients]:
    """Gradient of ``sample_loss(model, b)`` for each b, by parameter name (trainable ones; zeros where unused)."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for index in range(batch_size):
        found = torch.autograd.grad(sample_loss(model, index), list(trainable.values()), allow_unused=True)
        pairs = zip(trainable.items(), found, strict=True)
        gradients.append({name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})
    return gradients


def case_gradients(case: Case, model: nn.Module, inputs: Tensors, targets: Tensors, double: bool = True) -> list[Gradients]:
    """Per-sample gradients of a zoo case: each sample as a batch of one, in float64 unless told otherwise."""
    cast = in_double if double else (lambda value: value)

    def sample_loss(twin: nn.Module, index: int) -> Tensor:
        sample = case.sample(inputs, index)
        output = twin(**{name: cast(value) for name, value in sample.items()})
        wanted = {name: cast(value[index : index + 1]) for name, value in targets.items()}
        return case.loss(output, wanted) * case.share(sample)

    batch_size = len(next(iter(targets.values()))) if targets else _batch_size(case, inputs)
    return per_sample_gradients(double_copy(model) if double else model, sample_loss, batch_size)


def _batch_size(case: Case, inputs: Tensors) -> int:
    private = ((name, value, case.dims.get(name, 0)) for name, value in inputs.items())
    return next(value.shape[dim] for _, value, dim in private if dim is not None)


def norm(gradients: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all entries of all gradients."""
    return math.sqrt(sum(g.abs().square().sum().item() for g in gradients.values()))


def group_of(name: str, options: Mapping[str, Any]) -> str:
    """The group that ``name`` is clipped with: everything, its layer, or the first glob that matches it."""
    clipping = options.get("clipping", "flat")
    if clipping == "per_layer":
        return name.rpartition(".")[0]
    if clipping == "group":
        return next(glob for glob in options["groups"] if fnmatch.fnmatchcase(name, glob))
    return ""


@dataclass(frozen=True)
class Clipped:
    """The oracle's word: ``norms`` and ``factors`` by group [B], ``sums`` (clipped) and ``released`` by parameter."""

    norms: dict[str, list[float]]
    factors: dict[str, list[float]]
    sums: Gradients
    released: Gradients

    @property
    def clipped_fraction(self) -> float:
        """How many of the (sample, group) factors are below one."""
        factors = [f for group in self.factors.values() for f in group]
        return sum(f < 1 for f in factors) / max(len(factors), 1)


def split_by_group(names: list[str], options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Parameter names by clipping group, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name, options), []).append(name)
    return groups


def group_norms(samples: list[Gradients], options: Mapping[str, Any]) -> dict[str, list[float]]:
    """Norm of each sample's gradient by group, [B] each."""
    groups = split_by_group(list(samples[0]) if samples else [], options)
    return {group: [norm({n: sample[n] for n in names}) for sample in samples] for group, names in groups.items()}


def _factor(size: float, budget: float, options: Mapping[str, Any]) -> float:
    if not math.isfinite(size):
        return 0.0
    if options.get("clipping") == "automatic":
        return budget / (size + options.get("stability_constant", 0.01))
    return min(1.0, budget / size) if size > 0 else 1.0


def _budget(group: str, groups: int, options: Mapping[str, Any]) -> float:
    clipping = options.get("clipping", "flat")
    if clipping == "group":
        return options["groups"][group]
    return options["max_grad_norm"] / (math.sqrt(groups) if clipping == "per_layer" else 1.0)


def divisor(batch_size: int, options: Mapping[str, Any]) -> float:
    """L: what the clipped sum is divided by."""
    if options.get("loss_reduction", "mean") == "sum":
        return 1.0
    return options.get("expected_batch_size") or batch_size * options.get("accumulation_steps", 1)


def clip(samples: list[Gradients], options: Mapping[str, Any]) -> Clipped:
    """Clips each sample's gradient as ``options`` say and adds them up; a sample whose norm is not finite adds zero."""
    norms = group_norms(samples, options)
    factors = {g: [_factor(n, _budget(g, len(norms), options), options) for n in sizes] for g, sizes in norms.items()}
    sums: Gradients = {}
    for name in samples[0] if samples else []:
        group = factors[group_of(name, options)]
        terms = [f * sample[name] for f, sample in zip(group, samples, strict=True) if f != 0]
        sums[name] = torch.stack(terms).sum(0) if terms else torch.zeros_like(samples[0][name])
    length = divisor(len(samples), options)
    return Clipped(norms, factors, sums, {name: value / length for name, value in sums.items()})


def median(values: list[float]) -> float:
    """Halfway between the two values in the middle, so that no sample sits at the clipping norm."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def halving_options(samples: list[Gradients], clipping: str, groups: tuple[str, ...] = ()) -> dict[str, Any]:
    """Noiseless options whose clipping norm (each group's, if there are several) cuts about half of the samples."""
    options: dict[str, Any] = {"noise_multiplier": 0.0, "clipping": clipping, "groups": dict.fromkeys(groups, 1.0)}
    norms = group_norms(samples, options)
    if clipping == "group":
        options["groups"] = {group: median(norms[group]) if group in norms else 1e-3 for group in groups}
        return options | {"max_grad_norm": math.sqrt(sum(v**2 for v in options["groups"].values()))}
    del options["groups"]
    everything = [size for sizes in norms.values() for size in sizes]
    return options | {"max_grad_norm": median(everything) * math.sqrt(len(norms))}


def gradients_of(model: nn.Module) -> Gradients:
    """``p.grad`` of the trainable parameters, by name (tied ones once); zeros where there is none."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in named}


def disagreements(got: Gradients, want: Gradients, rtol: float, floor: float = FLOAT32_FLOOR) -> Iterator[str]:
    """One line for each parameter with ``||got - want|| > rtol ||want|| + floor ||all of want||``."""
    total = norm(want)
    for name in want:
        error = norm({name: in_double(got[name]) - in_double(want[name])})
        size = norm({name: want[name]})
        if not error <= rtol * size + floor * total:
            yield f"{name}: error {error:.3e}, gradient {size:.3e}, whole gradient {total:.3e}"


def assert_agree(got: Gradients, want: Gradients, rtol: float = FLOAT32_TOLERANCE, floor: float = FLOAT32_FLOOR) -> None:
    """Fails with every parameter whose gradient is off."""
    assert got.keys() == want.keys()
    wrong = list(disagreements(got, want, rtol, floor))
    assert not wrong, "gradients that differ from the oracle:\n" + "\n".join(wrong)


def private_gradients(
    case: Case,
    model: nn.Module,
    inputs: Tensors,
    targets: Tensors,
    options: dict[str, Any],
    backend: str,
    **compile_options: Any,
) -> Gradients:
    """One compiled forward and backward; returns ``p.grad``."""
    batch_dims = {"batch_dims": case.dims} if case.dims else {}
    compiled = torch.compile(model, backend=backend, options=options | case.options | batch_dims, **compile_options)
    loss = case.loss(compiled(**inputs), targets)
    if options.get("loss_reduction") == "sum":
        loss = loss * _batch_size(case, inputs)
    loss.backward()
    return gradients_of(model)


def check(
    case: Case,
    *,
    backend: str = "flashnorm_eager",
    clipping: str = "flat",
    groups: tuple[str, ...] = (),
    rtol: float = FLOAT32_TOLERANCE,
    batch_size: int | None = None,
    compile_options: dict[str, Any] | None = None,
    **options: Any,
) -> Clipped:
    """Compares the compiled private gradients (float32, no noise) with the float64 oracle, parameter by parameter.

    The clipping norm is the median of the oracle's norms; about half of the factors must come out below one.
    """
    model, inputs, targets = case.make(batch_size)
    samples = case_gradients(case, model, inputs, targets)
    options = halving_options(samples, clipping, groups) | options
    want = clip(samples, options)
    if clipping != "automatic":
        assert 0.3 <= want.clipped_fraction <= 0.7 or len(samples) < 2, f"{want.clipped_fraction:.0%} clipped"
    got = private_gradients(case, model, inputs, targets, options, backend, **(compile_options or {}))
    assert_agree(got, want.released, rtol)
    return want
