"""What a user can ask for: one frozen dataclass, checked when a graph is compiled."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from . import config
from .passes.errors import OptionsError

Clipping = Literal["flat", "per_layer", "group", "automatic"]
LossReduction = Literal["mean", "sum"]
NormAlgorithm = Literal["auto", "materialize", "ghost", "flash", "recompute"]

# Options that change the rewritten graph. All others are read at run time, so that changing them never recompiles.
_GRAPH_FIELDS = ("loss_reduction", "loss_normalizer", "batch_dims", "norm_algorithm", "memory_budget")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one private compilation. Make one with ``Options.parse``, which checks every field."""

    max_grad_norm: float
    """C > 0: the largest norm that one sample's gradient keeps. First value; ``privacy(model)`` can change it."""
    noise_multiplier: float
    """s >= 0: noise standard deviation over C. First value; ``privacy(model)`` can change it. 0.0 gives no privacy."""
    clipping: Clipping = "flat"
    """What one norm runs over: all parameters (flat, automatic), each module's own (per_layer), or ``groups``."""
    groups: dict[str, float] | None = None
    """For clipping="group": parameter-name glob -> norm, first match wins; the norms combine to ``max_grad_norm``."""
    stability_constant: float = 0.01
    """For clipping="automatic": gamma > 0 in the factor C / (norm + gamma)."""
    loss_reduction: LossReduction = "mean"
    """Whether the loss is the mean or the sum over samples. "mean" divides the released gradient by the batch size."""
    expected_batch_size: float | None = None
    """L, in samples, that "mean" divides by; None: the physical batch times ``accumulation_steps``."""
    accumulation_steps: int = 1
    """Noise is added on every k-th backward pass only; the passes before it add clipped sums."""
    loss_normalizer: float | None = None
    """Tokens per sample that replace a data-dependent token count; None: all tokens a sample has room for."""
    batch_dims: dict[str, int | None] | None = None
    """Input name -> dimension along which its samples lie; None declares the input public."""
    seed: int | None = None
    """Makes the noise repeatable, for tests; None: the key comes from the operating system. Never train with a seed."""
    norm_algorithm: NormAlgorithm | dict[str, NormAlgorithm] = "auto"
    """How per-sample norms are computed: one name for all parameters, or parameter-name glob -> name."""
    memory_budget: float | int = 1.1
    """The step's peak memory: a float is a multiple (>= 1) of the non-private step's predicted peak, an int is bytes."""
    inductor: dict[str, Any] | None = None
    """Settings handed to Inductor's config for this compilation."""

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None) -> Options:
        """Merges ``options`` over ``flashnorm_compile.config`` and checks the result.

        Raises:
            OptionsError: a key is unknown, a value has the wrong type or range, ``max_grad_norm`` or
                ``noise_multiplier`` is missing, or two options contradict each other.
        """
        given = dict(options or {})
        _refuse_unknown(given)
        merged = {name: given.get(name, getattr(config, name)) for name in _CHECKS}
        missing = [name for name in ("max_grad_norm", "noise_multiplier") if merged[name] is None]
        if missing:
            raise OptionsError(_missing_text(missing, given))
        values = {name: check(name, merged[name]) for name, check in _CHECKS.items()}
        _check_groups(values)
        return cls(**values)

    def graph_key(self) -> str:
        """A hash of the options that change the rewritten graph, for compile caches."""
        fields = [(name, getattr(self, name)) for name in _GRAPH_FIELDS]
        # Order is part of the key: in a mapping of globs the first match wins.
        text = repr([(name, list(value.items()) if isinstance(value, dict) else value) for name, value in fields])
        return hashlib.sha256(text.encode()).hexdigest()


def real(name: str, value: Any, *, allow_zero: bool = False) -> float:
    """Returns ``value`` as a finite float, > 0 (or >= 0); NaN, infinities, booleans and text are refused."""
    allowed = "a finite number >= 0" if allow_zero else "a finite number > 0"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, value, allowed)
    number = float(value)
    if not (number > 0 or (allow_zero and number == 0)) or math.isinf(number):
        raise _wrong(name, value, allowed)
    return number


def _nonnegative(name: str, value: Any) -> float:
    return real(name, value, allow_zero=True)


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise _wrong(name, value, "one of " + ", ".join(map(repr, allowed)) + _nearest(value, allowed))
        return value

    return check


def _integer(minimum: int | None = None) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        bad = isinstance(value, bool) or not isinstance(value, numbers.Integral)
        if bad or (minimum is not None and not value >= minimum):
            raise _wrong(name, value, "an integer" if minimum is None else f"an integer >= {minimum}")
        return int(value)

    return check


def _mapping(what: str, check: Callable[[str, Any], Any]) -> Callable[[str, Any], dict[str, Any]]:
    def check_all(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(name, value, f"a dict from {what}")
        return {key: check(f"{name}[{key!r}]", item) for key, item in value.items()}

    return check_all


def _anything(name: str, value: Any) -> Any:
    return value


def _check_algorithm(name: str, value: Any) -> str | dict[str, str]:
    one = _one_of(*get_args(NormAlgorithm))
    check = _mapping("parameter-name globs to names", one) if isinstance(value, Mapping) else one
    return check(name, value)


def _budget(name: str, value: Any) -> float | int:
    """Bytes as an integer, or a multiple of the non-private peak as a float."""
    whole = isinstance(value, numbers.Integral)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= 1 or (whole and value == 1):
        raise _wrong(name, value, "a float >= 1.0 (a multiple of the non-private step's peak) or an integer > 1 (bytes)")
    return int(float(value)) if whole else float(value)


# One check for each field of Options, in the same order; each returns the value in its final type or raises.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_grad_norm": real,
    "noise_multiplier": _nonnegative,
    "clipping": _one_of("flat", "per_layer", "group", "automatic"),
    "groups": _optional(_mapping("parameter-name globs to norms", real)),
    "stability_constant": real,
    "loss_reduction": _one_of("mean", "sum"),
    "expected_batch_size": _optional(real),
    "accumulation_steps": _integer(1),
    "loss_normalizer": _optional(real),
    "batch_dims": _optional(_mapping("input names to dimensions (None: public)", _optional(_integer()))),
    "seed": _optional(_integer()),
    "norm_algorithm": _check_algorithm,
    "memory_budget": _budget,
    "inductor": _optional(_mapping("names of Inductor settings to values", _anything)),
}


def _check_groups(values: Mapping[str, Any]) -> None:
    groups, clipping = values["groups"], values["clipping"]
    if (clipping == "group") != bool(groups):
        raise OptionsError(
            f"clipping={clipping!r} and groups={groups!r} contradict each other: groups belongs to clipping='group' "
            "and to nothing else. Set both, such as clipping='group', groups={'embed.*': 0.6, '*': 0.8}, or neither."
        )
    if not groups:
        return
    combined, norm = math.hypot(*groups.values()), values["max_grad_norm"]
    if not math.isclose(combined, norm, rel_tol=1e-3):
        raise OptionsError(
            f"The norms in groups combine to sqrt(sum of squares) = {combined:.6g}, but max_grad_norm is {norm:.6g}. "
            f"They must agree: set max_grad_norm to {combined:.6g}, or multiply every norm by {norm / combined:.6g}."
        )


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for key in given:
        if key not in _CHECKS:
            raise OptionsError(
                f"Unknown option {key!r}{_nearest(key, _CHECKS)}. Allowed: {', '.join(_CHECKS)}. "
                "Settings for Inductor itself go into options={'inductor': {...}}."
            )


def _nearest(word: Any, allowed: Any) -> str:
    near = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _wrong(name: str, value: Any, allowed: str) -> OptionsError:
    field = name.split("[")[0]
    return OptionsError(
        f"{name} must be {allowed}; got {value!r} of type {type(value).__name__}. "
        f"It was set in options={{{field!r}: ...}}, flashnorm_compile.config.{field} or FLASHNORM_{field.upper()}."
    )


def _missing_text(missing: list[str], given: Mapping[str, Any]) -> str:
    return (
        f"Missing: {' and '.join(missing)} (received options: {', '.join(given) or 'none'}). Both privacy options are "
        "required, there is no silent default: options={'max_grad_norm': 1.0, 'noise_multiplier': 0.8}, or "
        "flashnorm_compile.config, or FLASHNORM_MAX_GRAD_NORM and FLASHNORM_NOISE_MULTIPLIER. "
        "noise_multiplier=0.0 (clipping without privacy) is allowed, but it must be said."
    )
