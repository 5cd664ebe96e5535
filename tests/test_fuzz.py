"""The one outcome that must not exist: a gradient that differs from the per-sample loop, and no refusal.

Random programs (``fuzz_programs``) are compiled and compared with a loop over samples in float64. Independent programs
must also be accepted. ``FLASHNORM_FUZZ_EXAMPLES=2000`` searches with new random programs; without it the suite replays
a few fixed ones. A failing example prints as a ``Program`` that can be pasted into ``INDEPENDENT`` or ``MIXING``.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import fuzz_programs
import pytest
import torch
from flashnorm_compile.passes.errors import PrivacyError
from fuzz_programs import B, Batch, Input, Param, Program, ProgramModule, loss_of, make_inputs, normal, programs, step
from hypothesis import HealthCheck, Phase, given, reject, settings
from torch import Tensor

BACKEND = os.environ.get("FLASHNORM_FUZZ_BACKEND", "flashnorm_eager")
EXAMPLES = os.environ.get("FLASHNORM_FUZZ_EXAMPLES", "")
RTOL = 1e-3  # of the whole gradient, float32
CONDITION = 1e-4  # programs whose float32 loop is further from the float64 loop say nothing about the product
JITTER = 1e-6
# What eager PyTorch says where it fails: a transposed convolution's weight gradient for a sample with some strides.
EAGER_FAILS = ("grad_weight needs to be contiguous",)

Gradients = dict[str, Tensor]
Tensors = dict[str, Tensor]

fuzzing = settings(
    max_examples=int(EXAMPLES or 25),
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    print_blob=True,
    phases=list(Phase) if EXAMPLES else [Phase.explicit, Phase.generate],  # shrinking takes minutes: for `make fuzz`
    suppress_health_check=list(HealthCheck),
)


class Unsuitable(Exception):  # noqa: N818 -- a verdict on the example, not an error
    """The program cannot tell right from wrong: not finite, or ill-conditioned."""


# --- the oracle: a loop over samples, sharing no code with the product ------------------------------------------------


def _alone(program: Program) -> Program:
    """What one sample is asked: all tokens count in a mean over counted tokens, as the specification has it."""
    if not program.counts:
        return program
    fixed = [replace(s, settings=(*s.settings, ("fixed", True))) if s.op == "cross_entropy" else s for s in program.losses]
    return replace(program, losses=tuple(fixed))


def _jittered(program: Program, dtype: torch.dtype, seed: int | None) -> tuple[ProgramModule, Tensors]:
    model, inputs = ProgramModule(program, dtype), make_inputs(program, dtype)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        floats = [v for v in (*model.parameters(), *inputs.values()) if v.is_floating_point()]
        with torch.no_grad():
            for value in floats:
                value.add_(JITTER * normal(value.shape, generator).to(value.dtype))
    return model, inputs


def gradients_of(model: ProgramModule) -> Gradients:
    """Trainable parameters' gradients by name, zeros where there is none."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in named}


def sample_gradients(program: Program, dtype: torch.dtype, jitter: int | None = None) -> list[Gradients]:
    """Gradient of each sample's own loss: the program on a batch of one, eagerly."""
    alone = _alone(program)
    found = []
    for b in range(program.batch):
        model, inputs = _jittered(alone, dtype, jitter)
        own = {i.name: inputs[i.name] if i.sample_dim is None else inputs[i.name].narrow(i.sample_dim, b, 1) for i in alone.inputs}
        loss = loss_of(alone, model, own, 1)
        if not loss.requires_grad:
            raise Unsuitable("no gradient")
        try:
            loss.backward()
        except RuntimeError as error:
            if not any(known in str(error) for known in EAGER_FAILS):
                raise
            raise Unsuitable("PyTorch has no backward for it") from error
        found.append(gradients_of(model))
    return found


def norm(gradients: Gradients) -> float:
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))


def _groups(program: Program, names: list[str], clip_norm: float) -> list[tuple[list[str], float]]:
    """Names that are clipped together, and to what norm."""
    if program.clipping not in ("per_layer", "group"):
        return [(names, clip_norm)]
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    if program.clipping == "per_layer":
        return [(layer, clip_norm / math.sqrt(len(layers))) for layer in layers.values()]
    first = layers.pop("layer0")
    rest = [name for layer in layers.values() for name in layer]
    return [(first, 0.6 * clip_norm), (rest, 0.8 * clip_norm)]


def _factor(program: Program, size: float, limit: float) -> float:
    if not math.isfinite(size):
        return 0.0
    if program.clipping == "automatic":
        return limit / (size + 0.01)
    return min(1.0, limit / size) if size > 0 else 1.0


def released(program: Program, samples: list[Gradients], clip_norm: float) -> Gradients:
    """Clipped, summed and divided, as the specification says, without noise."""
    divisor = (program.expected_batch_size or program.batch) if program.loss_reduction == "mean" else 1.0
    result = {name: torch.zeros_like(g) for name, g in samples[0].items()}
    for names, limit in _groups(program, list(result), clip_norm):
        for sample in samples:
            factor = _factor(program, norm({name: sample[name] for name in names}), limit)
            for name in names if factor else []:
                result[name] += factor * sample[name] / divisor
    return result


def _distance(got: Gradients, want: Gradients) -> float:
    return norm({name: got[name].double() - want[name].double() for name in want})


def _differ(got: Gradients, want: Gradients, tolerance: float, clip_norm: float) -> bool:
    """Beyond ``tolerance`` of the whole gradient; a gradient far below the clip norm may be rounding, not signal."""
    return not _distance(got, want) <= tolerance * (norm(want) + 1e-2 * clip_norm)


# --- the property ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    loss: Tensor
    gradients: Gradients


Runner = Callable[[Program, float, Tensors], Result]


def options_for(program: Program, clip_norm: float) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_grad_norm": clip_norm,
        "noise_multiplier": 0.0,
        "clipping": program.clipping,
        "norm_algorithm": program.norm_algorithm,
        "loss_reduction": program.loss_reduction,
        "batch_dims": program.batch_dims,
    }
    if program.norm_algorithm == "recompute":
        options["memory_budget"] = 1.0  # nothing may be held that can be computed again
    if program.clipping == "group":
        options["groups"] = {"layer0.*": 0.6 * clip_norm, "*": 0.8 * clip_norm}
    if program.expected_batch_size is not None:
        options["expected_batch_size"] = program.expected_batch_size
    return options


def compiled_result(program: Program, inputs: Tensors, **compile_options: Any) -> Result:
    torch._dynamo.reset()
    model = ProgramModule(program)
    compiled = torch.compile(model, dynamic=program.dynamic or None, **compile_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = loss_of(program, compiled, inputs, program.batch)
        loss.backward()
    return Result(loss.detach(), gradients_of(model))


def private(program: Program, clip_norm: float, inputs: Tensors) -> Result:
    """The product."""
    return compiled_result(program, inputs, backend=BACKEND, options=options_for(program, clip_norm))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def _may_refuse(program: Program) -> bool:
    """Refusing is right, or at least allowed."""
    uneven = program.counts and len(program.losses) > 1  # a token count that scales a part of the loss only
    return bool(program.effects) or uneven or program.norm_algorithm in ("ghost", "flash")


def _suitable(program: Program) -> Program:
    """The program with settings that mean something for it."""
    trainable = [p for p in program.params if not p.frozen]
    if not trainable:
        raise Unsuitable("no trainable parameter")
    layers = {p.layer for p in trainable}
    if program.poisoned or (program.clipping == "group" and (0 not in layers or len(layers) == 1)):
        return replace(program, clipping="flat")
    return program


def _clip_norm(samples: list[Gradients]) -> float:
    """The median norm, so that about half of the samples are clipped."""
    sizes = sorted(size for size in map(norm, samples) if math.isfinite(size)) or [0.0]
    middle = (sizes[(len(sizes) - 1) // 2] + sizes[len(sizes) // 2]) / 2
    return middle or sizes[-1] or 1.0


def check(program: Program, run: Runner = private) -> str:
    """Asserts the property for one program; returns ``refused`` or ``equal``.

    Raises ``Unsuitable`` where the oracle itself is not to be trusted, and ``AssertionError`` where the product is not.
    """
    program = _suitable(program)
    if "leaks" in program.effects:
        return _must_refuse(program, run)
    exact = sample_gradients(program, torch.float64)
    clip_norm = _clip_norm(exact)
    want = released(program, exact, clip_norm)
    if not program.poisoned and not all(math.isfinite(norm(sample)) for sample in exact):
        raise Unsuitable("not finite")
    near = released(program, sample_gradients(program, torch.float32), clip_norm)
    if _differ(near, want, CONDITION, clip_norm):
        raise Unsuitable("ill-conditioned")
    result = _run(program, clip_norm, run)
    if result is None:
        return "refused"
    if "scales" in program.effects:
        return _bounded(program, clip_norm, run, result)
    if _differ(result.gradients, want, RTOL, clip_norm):
        _reject_if_shaky(program, want, clip_norm)
        _reject_if_pytorch_is_wrong(program)
        raise AssertionError(_difference(program, result.gradients, want, clip_norm))
    if not program.effects:
        _same_loss(program, result.loss)
    return "equal"


def _run(program: Program, clip_norm: float, run: Runner) -> Result | None:
    """``None``: refused, and rightly."""
    try:
        return run(program, clip_norm, make_inputs(program))
    except Exception as error:
        refusal = next((cause for cause in _causes(error) if isinstance(cause, PrivacyError)), None)
        if refusal is None:
            _reject_if_pytorch_fails(program)
            raise
        assert _may_refuse(program), f"an independent program was refused: {type(refusal).__name__}: {refusal}"
        return None


def _reject_if_pytorch_fails(program: Program) -> None:
    """Capture itself has bugs: what plain PyTorch cannot run, with Inductor's decompositions, is nobody's fault here."""
    try:
        compiled_result(program, make_inputs(program), backend="aot_eager_decomp_partition")
    except Exception as error:
        raise Unsuitable("PyTorch cannot compile it either") from error


def _reject_if_pytorch_is_wrong(program: Program) -> None:
    """Without privacy, does compiling alone change the gradient? (An output that is an overlapping ``unfold`` does, in 2.13.)"""
    inputs = make_inputs(program)
    plain = compiled_result(program, inputs, backend="aot_eager_decomp_partition").gradients
    model = ProgramModule(program)
    loss_of(program, model, inputs, program.batch).backward()
    eager = gradients_of(model)
    size = norm(eager)
    if any(float((plain[name] - eager[name]).norm()) > RTOL * size for name in eager):
        raise Unsuitable("torch.compile alone gives another gradient than eager PyTorch")


def _must_refuse(program: Program, run: Runner) -> str:
    if _run(program, 1.0, run) is not None:
        _reject_if_constant(program)
        raise AssertionError(f"accepted, although it {program.effects}")
    return "refused"


def _reject_if_constant(program: Program) -> None:
    """Samples that met on the way to a gradient that depends on none of them have told nothing. (A buffer would.)"""
    if any(step.op == "remember" for step in program.steps):
        return
    found = []
    for seed in (None, 0):
        model, inputs = _jittered(program, torch.float64, seed)
        loss_of(program, model, inputs, program.batch).backward()
        found.append(gradients_of(model))
    if all(torch.equal(found[0][name], found[1][name]) for name in found[0]):
        raise Unsuitable("no gradient depends on the samples")


def _difference(program: Program, got: Gradients, want: Gradients, clip_norm: float) -> str:
    lines = [f"{name}: off by {(got[name].double() - want[name]).norm():.3e} of {want[name].norm():.3e}" for name in want]
    kind = f"a program that {program.effects} was accepted, and its" if program.effects else "the"
    return f"{kind} gradient differs from the per-sample loop (clip norm {clip_norm:.3e})\n" + "\n".join(lines)


def _reject_if_shaky(program: Program, want: Gradients, clip_norm: float) -> None:
    """A tie that rounding breaks (in a sort, a maximum, a comparison) shows when the numbers move a little."""
    for seed in range(3):
        moved = released(program, sample_gradients(program, torch.float64, jitter=seed), clip_norm)
        if _differ(moved, want, CONDITION, clip_norm):
            raise Unsuitable("decided by rounding")


def _same_loss(program: Program, loss: Tensor) -> None:
    """Privacy changes gradients, never the value of the loss (a replaced token count apart)."""
    want = loss_of(program, ProgramModule(program), make_inputs(program), program.batch)
    if not program.counts:
        torch.testing.assert_close(loss, want.detach(), rtol=1e-3, atol=1e-3, equal_nan=True)


def _bounded(program: Program, clip_norm: float, run: Runner, result: Result) -> str:
    """Another first sample moves the clipped sum by no more than twice the clip norm."""
    inputs, others = make_inputs(program), make_inputs(program, seed=77)
    for spec in program.inputs:
        if spec.sample_dim is not None:
            inputs[spec.name].select(spec.sample_dim, 0).copy_(others[spec.name].select(spec.sample_dim, 0))
    neighbor = run(program, clip_norm, inputs)
    divisor = (program.expected_batch_size or program.batch) if program.loss_reduction == "mean" else 1.0
    moved = divisor * _distance(result.gradients, neighbor.gradients)
    assert moved <= 2 * clip_norm * (1 + 1e-3), f"sensitivity {moved:.3e} for the clip norm {clip_norm:.3e}"
    return "bounded"


def _check_or_reject(program: Program) -> None:
    try:
        check(program)
    except Unsuitable:
        reject()


@fuzzing
@given(programs())
def test_independent_programs_equal_the_loop(program: Program) -> None:
    _check_or_reject(program)


# --- programs worth remembering ---------------------------------------------------------------------------------------

TOKENS = Input("ids", (B, 3), bound=4)


def program(batch: int, inputs: list[Input], params: list[Param], *steps: Any, **settings: Any) -> Program:
    """A program whose loss is the last step's mean square, unless ``losses`` say otherwise."""
    default = (step("l0", "loss_all", steps[-1].name, style="square", reduction="mean"),)
    losses = settings.pop("losses", default)
    return Program(batch, tuple(inputs), tuple(params), steps, losses, **settings)


INDEPENDENT: dict[str, Program] = {
    "batch, time and width of one size, turned and merged": program(
        3,
        [Input("x", (B, 3, 3))],
        [Param("w0", (3, 3)), Param("w1", (3, 1))],
        step("v0", "permute", "x", order=(2, 0, 1)),
        step("v1", "linear", "v0", "w0"),
        step("v2", "reshape", "v1", sizes=(Batch(3, 1), 3)),
        step("v3", "matmul", "v2", "w0"),
        step("v4", "reshape", "v3", sizes=(3, B, 3, 1)),
        step("v5", "mul", "v4", "w1"),
    ),
    "one sample of which a view hides the axis, the loss outside": program(
        1,
        [Input("x", (2, B, 2))],
        [Param("w0", (2, 2, 2))],
        step("v0", "bilinear", "x", "x", "w0"),
        loss_outside=True,
        clipping="automatic",
    ),
    "a size that a guard knows to be one, the sum over it left out": program(
        3,
        [Input("x", (B, 5, 4, 1))],
        [Param("w0", (1, 1, 1, 3))],
        step("v0", "permute", "x", order=(0, 3, 1, 2)),
        step("v1", "conv", "v0", "w0", stride=2, padding=1, dilation=2, groups=1),
        step("v2", "cat", "v1", "v1", dim=0),
        step("v3", "mean", "v2", dim=(1, 2, 3)),
        step("v4", "reshape", "v3", sizes=(Batch(2, 1), 1, 1, 1)),
        step("v5", "lerp", "v2", "v4"),
        dynamic=True,
    ),
    "targets of a size that only the loss ties to the batch's, which a guard has fixed": program(
        2,
        [Input("ids", (B, 2), bound=4), Input("targets", (4, B), bound=2)],
        [Param("w0", (4, 2))],
        step("v0", "permute", "ids", order=(1, 0)),
        step("v1", "one_hot", "v0", "w0"),
        step("v2", "repeat_interleave", "v1", repeats=2, dim=0),
        losses=(step("l0", "cross_entropy", "v2", "targets", style="flat", reduction="mean"),),
        dynamic=True,
    ),
    "rows of a table plus its transpose": program(
        4,
        [Input("ids", (B,), bound=4)],
        [Param("w0", (4, 4)), Param("w1", (4, 2))],
        step("v0", "symmetric", "w0"),
        step("v1", "rows", "ids", "v0"),
        step("v2", "matmul", "v1", "w1"),
    ),
    "head tied by a transpose": program(
        4,
        [TOKENS, Input("targets", (B, 3), bound=4, ignored=True)],
        [Param("w0", (4, 5))],
        step("v0", "embedding", "ids", "w0", padding_idx=0),
        step("v1", "gelu", "v0"),
        step("v2", "transpose", "w0"),
        step("v3", "matmul", "v1", "v2"),
        losses=(step("l0", "cross_entropy", "v3", "targets", style="flat", reduction="mean"),),
    ),
    "siamese towers along the batch": program(
        3,
        [Input("x", (B, 2))],
        [Param("w0", (3, 2)), Param("w1", (3,), layer=1)],
        step("v0", "sin", "x"),
        step("v1", "cat", "x", "v0", dim=0),
        step("v2", "linear", "v1", "w0", "w1"),
        step("v3", "split", "v2", dim=0, length=B, which=0),
        step("v4", "narrow", "v2", dim=0, start=B, length=B),
        step("v5", "squash_mul", "v3", "v4"),
        clipping="per_layer",
    ),
    "time first, a position for each step, T == B": program(
        3,
        [Input("x", (3, B, 2))],
        [Param("w0", (3, 2)), Param("w1", (3, 2, 2))],
        step("v0", "bmm", "x", "w1"),
        step("v1", "permute", "v0", order=(1, 0, 2)),
        step("v2", "positions", "w0", length=3, style="expanded"),
        step("v3", "add", "v1", "v2"),
    ),
    "one parameter used three ways": program(
        4,
        [Input("x", (B, 2))],
        [Param("w0", (2, 2))],
        step("v0", "linear", "x", "w0"),
        step("v1", "tanh", "v0"),
        step("v2", "matmul", "v1", "w0"),
        step("v3", "matmul", "w0", "w0"),
        step("v4", "addmm", "v2", "v1", "v3"),
        loss_reduction="sum",
        losses=(step("l0", "loss_all", "v4", style="square", reduction="sum"),),
    ),
    "a table row chosen by the sample's own values": program(
        3,
        [Input("x", (B, 3, 2))],
        [Param("w0", (3, 2)), Param("w1", (2, 2))],
        step("v0", "argmax", "x", dim=1),
        step("v1", "rows", "v0", "w0"),
        step("v2", "amax", "v0", dim=(1,)),
        step("v3", "pick", "x", "v2"),
        step("v4", "linear", "v3", "w1"),
        step("v5", "mean", "v1", dim=1),
        step("v6", "mul", "v4", "v5"),
    ),
    "a public input with as many rows as the batch": program(
        3,
        [Input("x", (B, 3)), Input("pub", (3, 3))],
        [Param("w0", (3, 3)), Param("w1", (), layer=1)],
        step("v0", "matmul", "x", "pub"),
        step("v1", "mul", "w1", "v0"),
        step("v2", "matmul_t", "v1", "w0"),
        clipping="automatic",
    ),
    "a convolution over batch and time merged": program(
        2,
        [Input("x", (B, 2, 4, 3))],
        [Param("w0", (4, 2, 2)), Param("w1", (4,))],
        step("v0", "flatten", "x", start_dim=0, end_dim=1),
        step("v1", "conv", "v0", "w0", "w1", stride=1, padding=1, dilation=2, groups=2),
        step("v2", "reshape", "v1", sizes=(B, 2, 4, 3)),
        step("v3", "softmax", "v2", dim=1),
    ),
    "rows of the batch repeated": program(
        3,
        [Input("x", (B, 3))],
        [Param("w0", (3, 3)), Param("w1", (2, 1, 3))],
        step("v0", "repeat", "x", times=(2, 1)),
        step("v1", "repeat_interleave", "v0", repeats=2, dim=0),
        step("v2", "linear", "v1", "w0"),
        step("v3", "reshape", "v2", sizes=(2, Batch(1, 2), 3)),
        step("v4", "mul", "v3", "w1"),
    ),
    "a length that tracing fixes after its first use": program(
        4,
        [Input("ids", (B, 2), bound=4)],
        [Param("w0", (4, 3))],
        step("v0", "flatten", "ids"),
        step("v1", "rows", "v0", "w0"),
        step("v2", "permute", "v1", order=(1, 0)),
        step("v3", "mask", "v2"),
        losses=(step("l0", "loss_by_hand", "v3", reduction="mean"),),
        expected_batch_size=4.0,
        dynamic=True,
        seed=7,
    ),
    "as many samples as channels, dynamic": program(
        2,
        [Input("x", (B, 1, 5, 4)), Input("targets", (B, 2, 5), bound=3)],
        [Param("w0", (4, 3)), Param("w1", (2, 1, 1, 1), layer=1)],
        step("v0", "matmul", "x", "w0"),
        step("v1", "conv", "v0", "w1", stride=1, padding=0, dilation=1, groups=1),
        losses=(step("l0", "cross_entropy", "v1", "targets", style="flat", reduction="mean"),),
        dynamic=True,
    ),
    "an outer product of merged samples, dynamic": program(
        4,
        [Input("ids", (B, 2), bound=4)],
        [Param("w0", (4, 3)), Param("w1", (3, 4), layer=1), Param("w2", (1, 2), layer=2)],
        step("v0", "flatten", "ids"),
        step("v1", "rows", "v0", "w0"),
        step("v2", "matmul", "v1", "w1"),
        step("v3", "select", "v2", dim=1, index=-1),
        step("v4", "unsqueeze", "v3", dim=-1),
        step("v5", "einsum", "v4", "w2", equation="ab,bz->az"),
        step("v6", "sum", "v5", dim=1, keepdim=True),
        step("v7", "repeat_interleave", "v6", repeats=2, dim=1),
        losses=(step("l0", "loss_sample", "v7", others=(1,), style="mean", reduction="mean"),),
        dynamic=True,
    ),
    "strides that tracing did not foresee": program(
        2,
        [Input("ids", (B, 2), bound=4)],
        [Param("w0", (4, 5)), Param("w1", (2,), layer=1), Param("w2", (1,), layer=2), Param("w3", (1, 2, 2))],
        step("v0", "one_hot", "ids", "w0"),
        step("v1", "permute", "v0", order=(2, 0, 1)),
        step("v2", "weight_norm", "w1", "w2"),
        step("v3", "sub", "v2", "v1"),
        step("v4", "add", "w3", "w1"),
        step("v5", "bilinear", "v3", "v1", "v4"),
        step("v6", "mean", "v5", dim=2, keepdim=False),
        step("v7", "repeat", "v6", times=(1, 2)),
        step("v8", "matmul", "w0", "v7"),
        losses=(step("l0", "loss_all", "v8", style="tanh", reduction="sum"),),
        loss_reduction="sum",
        dynamic=True,
        seed=2,
    ),
    "a constant gradient": program(
        3,
        [Input("x", (B, 2))],
        [Param("w0", (2, 2)), Param("w1", (2,), layer=1)],
        step("v0", "linear", "x", "w0", "w1"),
        losses=(step("l0", "loss_all", "v0", style="plain", reduction="mean"),),
    ),
    "scalars, two losses, batch last": program(
        4,
        [Input("x", (2, B)), Input("y", (2, B))],
        [Param("w0", ()), Param("w1", (2, 2))],
        step("v0", "matmul", "w1", "x"),
        step("v1", "lerp", "v0", "w0"),
        losses=(
            step("l0", "mse", "v1", "y", reduction="mean"),
            step("l1", "loss_sample", "v0", others=(0,), style="logsumexp", reduction="mean"),
        ),
        expected_batch_size=6.0,
    ),
    "a function of a matrix under a mean over tokens": program(
        2,
        [Input("x", (B, 2, 2, 3)), Input("targets", (B, 2, 2), bound=3)],
        [Param("w0", (3, 3))],
        step("v0", "matrix_exp", "w0"),
        step("v1", "positions", "v0", length=2, style="embedding"),
        step("v2", "add", "v1", "x"),
        losses=(step("l0", "cross_entropy", "v2", "targets", style="flat", reduction="mean"),),
    ),
    "one sample, put in the order of its own values, under a mean over tokens": program(
        1,
        [Input("x", (B, 1, 4)), Input("targets", (B,), bound=2)],
        [Param("w0", (2, 4, 4))],
        step("v0", "sdpa", "x", "x", style="full"),
        step("v1", "bilinear", "v0", "x", "w0"),
        step("v2", "reorder", "v1", "v1", dim=1),
        step("v3", "mean", "v2", dim=1),
        losses=(step("l0", "cross_entropy", "v3", "targets", style="flat", reduction="mean"),),
        clipping="automatic",
        dynamic=True,
    ),
    "a mask is the smallest value that a second backward starts from": program(
        2,
        [Input("ids", (B, 2), bound=4)],
        [Param("w0", (4, 2)), Param("w1", (2,), layer=1)],
        step("v0", "add", "w0", "w1"),
        step("v1", "rows", "ids", "v0"),
        step("v2", "sin", "v1"),
        step("v3", "cat", "v1", "v2", dim=0),
        step("v4", "sum", "v3", dim=1, keepdim=False),
        step("v5", "unsqueeze", "v4", dim=1),
        step("v6", "avg_pool", "v5", size=2),
        step("v7", "index", "v6", dim=2, index=(0, 0)),
        step("v8", "sdpa", "v7", "v5", style="causal"),
        losses=(step("l0", "loss_all", "v8", style="square", reduction="mean"),),
        norm_algorithm="recompute",
    ),
    "targets in dynamic sizes of their own": program(
        3,
        [Input("ids", (B, 5), bound=4), Input("targets", (4, B, 2), bound=2)],
        [Param("w0", (4, 1)), Param("w1", (1,), layer=1), Param("w2", (1, 1, 1, 2), layer=2)],
        step("v0", "permute", "ids", order=(1, 0)),
        step("v1", "add", "w0", "w1"),
        step("v2", "embedding", "v0", "v1"),
        step("v3", "unfold", "v2", dim=0, size=2),
        step("v4", "maximum", "w2", "v3"),
        step("v5", "cat", "v4", "v3", dim=2),
        losses=(step("l0", "cross_entropy", "v5", "targets", style="flat", reduction="sum"),),
        clipping="group",
        loss_reduction="sum",
        dynamic=True,
    ),
}


def _mixing(batch: int, dims: tuple[Any, ...], *steps: Any, **settings: Any) -> Program:
    """``steps`` on ``x``, between two linear layers of its width."""
    width = [Param("w0", (dims[-1], dims[-1])), Param("w1", (dims[-1],))]
    before = step("a", "linear", "x", "w0")
    after = step("z", "mul", steps[-1].name, "w1")
    return program(batch, [Input("x", dims)], width, before, *steps, after, **settings)


MIXING: dict[str, Program] = {
    "a view that swaps batch and time, T == B": _mixing(
        3, (B, 3, 2), step("m", "reshape", "a", sizes=(3, B, 2), effect="mixes"), step("n", "cumsum", "m", dim=0)
    ),
    "the first sample for all": _mixing(
        3, (B, 2), step("m", "one_for_all", "a", dim=0, which=0, effect="mixes"), step("n", "mul", "m", "a")
    ),
    "the first sample added to all under a linear loss": program(
        2,
        [Input("x", (B,)), Input("pub", (2, 1))],
        [Param("w0", (1,)), Param("w1", (2,), layer=1)],
        step("v0", "mul", "x", "w0"),
        step("v1", "one_for_all", "v0", dim=0, which=0, effect="mixes"),
        step("v2", "cat", "v1", "v0", dim=0),
        step("v3", "unsqueeze", "v2", dim=-1),
        step("v4", "linear", "v3", "pub", "w1"),
        losses=(step("l0", "loss_all", "v4", style="plain", reduction="sum"),),
        loss_reduction="sum",
    ),
    "a batch mean without its gradient": _mixing(4, (B, 2), step("m", "sub_mean_detached", "a", dim=0, effect="mixes")),
    "a comparison with the batch mean": _mixing(4, (B, 2), step("m", "above_mean", "a", dim=0, effect="mixes")),
    "the index of the largest sample": _mixing(
        2,
        (B, 2),
        step("i", "argmax", "a", dim=0, effect="mixes"),
        step("j", "rows", "i", "w0"),
        step("m", "mul", "a", "w1"),
        step("n", "matmul", "m", "j"),
    ),
    "samples turned by one across merged time": _mixing(
        3,
        (B, 2, 2),
        step("f", "flatten", "a", start_dim=0, end_dim=1),
        step("m", "roll", "f", shift=1, dim=0, effect="mixes"),
        step("n", "squash_mul", "m", "f"),
    ),
    "a square block and its transpose": _mixing(3, (B, 3), step("m", "neighbor", "a", effect="leaks")),
    "a buffer that remembers the batch": _mixing(3, (B, 2), step("m", "remember", "a", "stat", effect="leaks")),
    "attention over the samples": _mixing(3, (B, 2), step("m", "gram", "a", dim=0, effect="mixes")),
    "batch normalization": _mixing(3, (B, 2, 2), step("m", "batch_norm", "a", effect="mixes")),
    "towers cut at the wrong place": _mixing(
        3,
        (B, 2),
        step("t", "cat", "a", "x", dim=0),
        step("m", "reshape", "t", sizes=(B, 2, 2), effect="mixes"),
        step("n", "softmax", "m", dim=1),
    ),
    "samples sorted by content": _mixing(
        4,
        (B, 2),
        step("k", "mean", "a", dim=(1,)),
        step("m", "permuted", "a", "k", dim=0, effect="mixes"),
        step("n", "mul", "m", "a"),
    ),
    "a view of an output shows one sample to all, the losses outside": program(
        3,
        [Input("ids", (B, 1), bound=4), Input("y", (B, 1, 3))],
        [Param("w0", (4, 3))],
        step("v0", "one_hot", "ids", "w0"),
        step("v1", "one_for_all", "v0", dim=0, which=-1, effect="mixes"),
        losses=(step("l0", "loss_by_hand", "v1", reduction="mean"), step("l1", "mse", "v0", "y", reduction="mean")),
        loss_outside=True,
    ),
    "normalized by the largest number of all": _mixing(3, (B, 2), step("m", "global_scale", "a", effect="mixes")),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_known_independent_program(name: str) -> None:
    assert check(INDEPENDENT[name]) == "equal"


@pytest.mark.parametrize("name", MIXING)
def test_known_mixing_program(name: str) -> None:
    assert check(MIXING[name]) == "refused"


# --- the harness itself -----------------------------------------------------------------------------------------------


def unclipped(program: Program, clip_norm: float, inputs: Tensors) -> Result:
    """A backend that knows nothing of privacy."""
    return compiled_result(program, inputs, backend="aot_eager")


def honest(program: Program, clip_norm: float, inputs: Tensors) -> Result:
    """A product that is right."""
    gradients = released(program, sample_gradients(program, torch.float32), clip_norm)
    loss = loss_of(program, ProgramModule(program), inputs, program.batch)
    return Result(loss.detach(), gradients)


def off_by_one_percent(program: Program, clip_norm: float, inputs: Tensors) -> Result:
    result = honest(program, clip_norm, inputs)
    return replace(result, gradients={name: 1.01 * g for name, g in result.gradients.items()})


def timid(program: Program, clip_norm: float, inputs: Tensors) -> Result:
    raise PrivacyError("no")


@pytest.mark.parametrize("name", INDEPENDENT)
def test_the_harness_accepts_what_is_right(name: str) -> None:
    assert check(INDEPENDENT[name], honest) == "equal"


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("wrong", [unclipped, off_by_one_percent])
def test_the_harness_catches_a_wrong_gradient(name: str, wrong: Runner) -> None:
    with pytest.raises(AssertionError, match="differs from the per-sample loop"):
        check(INDEPENDENT[name], wrong)


@pytest.mark.parametrize("name", MIXING)
def test_the_harness_catches_a_missing_refusal(name: str) -> None:
    with pytest.raises(AssertionError, match="accepted"):
        check(MIXING[name], unclipped)


def test_the_harness_catches_a_needless_refusal() -> None:
    with pytest.raises(AssertionError, match="an independent program was refused: PrivacyError: no"):
        check(INDEPENDENT["a constant gradient"], timid)
    assert check(MIXING["batch normalization"], timid) == "refused"


def test_a_program_prints_as_its_own_source() -> None:
    for known in (*INDEPENDENT.values(), *MIXING.values()):
        assert eval(repr(known), vars(fuzz_programs).copy()) == known


# Far from the other long one, so that two processes get one each.
@fuzzing
@given(programs(mixing=True))
def test_mixing_programs_are_refused(program: Program) -> None:
    _check_or_reject(program)


@settings(fuzzing, max_examples=60, phases=[Phase.generate])
@given(programs())
def test_the_generator_knows_independence(program: Program) -> None:
    """A batch's gradient is the mean (sum) of its samples' gradients, in float64: the labels are true."""
    try:
        program = _alone(replace(_suitable(program), poisoned=False))
    except Unsuitable:
        reject()
    model, inputs = _jittered(program, torch.float64, None)
    loss = loss_of(program, model, inputs, program.batch)
    try:
        samples = sample_gradients(program, torch.float64)
    except Unsuitable:
        reject()
    loss.backward()
    size = program.batch if program.loss_reduction == "mean" else 1
    want = {name: torch.stack([s[name] for s in samples]).sum(0) / size for name in samples[0]}
    if not math.isfinite(norm(want)):
        reject()
    if _distance(gradients_of(model), want) > 1e-8 * (1e-3 + norm(want)):
        _reject_if_shaky(program, released(program, samples, 1.0), 1.0)
        raise AssertionError("the generator calls this program independent, and it is not")
