"""Run-time state: clip norm, noise level, counters, and which state covers which parameter.

``privacy(model)`` gives the state to the user; ``binding.binding_for`` connects compiled graphs to it. Everything
refers to parameters weakly: no model lives longer because it was private.
"""

from __future__ import annotations

import difflib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .accounting.account import Batch
from .accounting.accounted import Accounted
from .clipping import Layout, layout_for
from .distributed.ddp import names_without_ddp
from .distributed.team import Team
from .noise_key import NoiseKey, streams_of
from .options import Options, real
from .passes.errors import OptionsError, PrivacyError

# What state_dict stores: public name -> attribute.
_COUNTERS = {
    "releases": "_releases",
    "micro_batches": "_micro_batches",
}
_SETTINGS = ("max_grad_norm", "noise_multiplier")

_ordinals = itertools.count()
# Parameter -> (its state, its index there), and parameters whose gradients an optimizer may use unprotected.
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
_exempt: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class StepStatistics:
    """What the last release saw. These are exact functions of the data: not private, for debugging only."""

    batch_size: int
    clipped_fraction: float
    """Fraction of the samples that exceeded the norm of at least one clipping group."""
    nonfinite: int
    """Samples that contributed nothing because a norm was not finite."""


class PrivacyState(Accounted):
    """Privacy settings, counters and account shared by all compiled graphs over one set of parameters."""

    def __init__(self, declared: bool = False) -> None:
        super().__init__()
        self.options: Options | None = None
        self.declared = declared
        self.expected_batch_size: float | None = None
        """L of the private data loader; the option of that name comes first."""
        self.names: list[str] = []
        self.revision = 0
        self._refs: list[weakref.ref[nn.Parameter]] = []
        self._trainable: list[bool] = []
        self._layout: Layout | None = None
        self._overrides: dict[str, float] = {}
        self._ordinal = next(_ordinals)
        self.noise_key = NoiseKey()
        self.team: Team | None = None
        """The ranks that train these parameters together; None on one device."""
        self._agreed: tuple[Any, ...] | None = None
        self._resumes = 0
        self._team_batch: int | None = None
        self._streams: Tensor | None = None
        self._releases = 0
        self._micro_batches = 0
        self._open_accumulations = 0
        self._backward = -1
        self._adds_noise = False
        self._pass_noise = 0.0
        self._unnoised: dict[int, float] = {}
        self._statistics: tuple[Tensor, Tensor | float] | None = None

    @property
    def max_grad_norm(self) -> float:
        """C > 0. Takes effect at the next backward pass, without a recompile."""
        return self._setting("max_grad_norm")

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._overrides["max_grad_norm"] = real("max_grad_norm", value)

    @property
    def noise_multiplier(self) -> float:
        """s >= 0: noise standard deviation over C. Takes effect at the next backward pass, without a recompile."""
        return self._setting("noise_multiplier")

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._overrides["noise_multiplier"] = real("noise_multiplier", value, allow_zero=True)

    def _setting(self, name: str) -> float:
        if name in self._overrides:
            return self._overrides[name]
        if self.options is None:
            raise PrivacyError(
                f"{name} is not known yet: the model has not been compiled with backend='flashnorm'. "
                f"Run one forward pass first, or set privacy(model).{name} = ..."
            )
        return float(getattr(self.options, name))

    def spending_notes(self) -> tuple[str, list[str]]:
        """For the statement: how records are clipped, and what the figures do not cover."""
        clipping = "norm at most C for each record"
        notes = []
        if self.options is not None:
            clipping = f"{self.options.clipping} clipping, {clipping}, now C = {self.max_grad_norm:g}"
            if self.options.seed is not None:
                notes.append(
                    "The noise was made with a seed: who knows it can remove the noise, and the figures do not hold for them."
                )
        exempt = [name for name, parameter in zip(self.names, self._alive(), strict=True) if parameter in _exempt]
        if exempt:
            notes.append(f"Not covered: {len(exempt)} parameters that were exempted from protection, such as {exempt[0]}.")
        return clipping, notes

    @contextmanager
    def using(self, batch: Batch) -> Iterator[None]:
        """Backward passes inside use the samples of this physical batch; only the last of a logical batch adds noise.

        ``private_dataloader`` does this around every batch that it hands out.
        """
        if batch.part == 0 and self.account.holds_sums and not any(p is not None and p.grad is not None for p in self._alive()):
            self.account.drop_sums()  # zero_grad() was called instead of a last, noised pass
            self._unnoised.clear()
        with self.account.on(batch), nullcontext() if batch.is_last else self.accumulate():
            yield

    def _alive(self) -> Iterator[nn.Parameter | None]:
        return (ref() for ref in self._refs)

    @property
    def last(self) -> StepStatistics | None:
        """Statistics of the last release, None before the first. Not private; reading them waits for the device."""
        if self._statistics is None:
            return None
        norms, bounds = self._statistics
        finite = norms.isfinite().all(1)
        clipped = ((norms > bounds).any(1) & finite).sum().item()
        samples = norms.shape[0]
        return StepStatistics(samples, clipped / max(samples, 1), samples - int(finite.sum().item()))

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside add clipped sums without noise; one outside must follow before the optimizer steps."""
        self._open_accumulations += 1
        try:
            yield
        finally:
            self._open_accumulations -= 1

    def exempt(self, *parameters: nn.Parameter | str) -> None:
        """Lets optimizers use gradients of these parameters although nothing clipped them: they are not protected.

        Takes parameters, or names as this state knows them.
        """
        for parameter in parameters:
            if isinstance(parameter, str):
                _exempt[self._by_name(parameter)] = True
            elif isinstance(parameter, nn.Parameter):
                _exempt[parameter] = True
            else:
                raise OptionsError(f"exempt takes parameters or their names; got {type(parameter).__name__}.")

    def _by_name(self, name: str) -> nn.Parameter:
        found = self._refs[self.names.index(name)]() if name in self.names else None
        if found is None:
            near = difflib.get_close_matches(name, self.names, n=1)
            raise OptionsError(
                f"This state covers no parameter named {name!r}"
                + (f" (did you mean {near[0]!r}?)" if near else "")
                + ". Pass the parameter itself, or call privacy(model) on the model that owns it."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Counters, settings and account as plain values. The noise key is not among them: it must never be stored."""
        settings = {name: self._overrides.get(name, getattr(self.options, name, None)) for name in _SETTINGS}
        counters = {name: getattr(self, attribute) for name, attribute in _COUNTERS.items()}
        return {**counters, **settings, "account": self.account.history.to_plain()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores counters, settings and account. The noise after it is fresh, even with a seed: none is used twice.

        A ledger that is open stays the record: releases that were made after the checkpoint have been spent.
        """
        expected = {*_COUNTERS, *_SETTINGS, "account"}
        if set(state) != expected:
            raise OptionsError(
                f"load_state_dict needs exactly the keys {sorted(expected)}; got {sorted(state)}. "
                "Pass what privacy(model).state_dict() returned."
            )
        self.account.restore(state["account"])
        for name, attribute in _COUNTERS.items():
            setattr(self, attribute, int(state[name]))
        for name in _SETTINGS:
            if state[name] is not None:
                setattr(self, name, state[name])
        self.noise_key.refresh()
        self._resumes += 1

    def attach(self, options: Options) -> None:
        """Takes over the options of the first graph; a later graph must have been compiled with the same ones."""
        if self.options is None:
            self.options = options
            self._trainable = [p is not None and p.requires_grad for p in (ref() for ref in self._refs)]
            if options.seed is not None:
                # The ordinal keeps two states of one process apart that were given one seed.
                self.noise_key.seed(f"flashnorm seed {options.seed}, state {self._ordinal}")
            self._changed()
        elif options != self.options:
            names = [name for name in vars(options) if getattr(options, name) != getattr(self.options, name)]
            changes = ", ".join(f"{n}: {getattr(self.options, n)!r} -> {getattr(options, n)!r}" for n in names)
            raise OptionsError(
                f"These parameters already train with other options ({changes}), and one model has one privacy state. "
                "Set privacy(model).max_grad_norm and .noise_multiplier to change those two at any time; for the "
                "others compile a fresh copy of the model (copy.deepcopy)."
            )

    def adopt(self, parameters: Sequence[nn.Parameter], names: Sequence[str], rename: bool = False) -> None:
        """Covers these parameters from now on. Names already known stay, unless ``rename``."""
        for parameter, name in zip(parameters, names, strict=True):
            owner = _owners.get(parameter)
            if owner is None or owner[0] is not self:
                _owners[parameter] = (self, len(self._refs))
                self._refs.append(weakref.ref(parameter))
                self.names.append(name)
                self._trainable.append(parameter.requires_grad)
                self._changed()
            elif rename and self.names[owner[1]] != name:
                self.names[owner[1]] = name
                self._changed()

    def absorb(self, other: PrivacyState) -> None:
        """Takes over the parameters of a state that has not released anything."""
        if other.options is not None:
            self.attach(other.options)
        pairs = [(ref(), name) for ref, name in zip(other._refs, other.names, strict=True)]
        alive = [(parameter, name) for parameter, name in pairs if parameter is not None]
        self.adopt([parameter for parameter, _ in alive], [name for _, name in alive])
        other._changed()

    def indices_of(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        """Indices of parameters that take part in a private graph, which makes them count as trainable."""
        indices = [_owners[parameter][1] for parameter in parameters]
        if not all(self._trainable[index] for index in indices):
            for index in indices:
                self._trainable[index] = True
            self._changed()
        return indices

    def _changed(self) -> None:
        self._layout = None
        self._streams = None
        self.revision += 1

    @property
    def released(self) -> bool:
        """Whether any gradient has been released, noised or not."""
        return self._releases > 0

    @property
    def layout(self) -> Layout:
        """The clipping groups over all parameters; computed anew when parameters were added."""
        if self._layout is None:
            assert self.options is not None
            self._layout = layout_for(self.names, self._trainable, self.options)
        return self._layout

    def agree(self, batch: int) -> None:
        """On several devices: makes sure, before the first release and after every change, that all ranks agree.

        ``batch``: samples on this rank.

        Raises:
            PrivacyError: they do not.
        """
        if self.team is None:
            return
        changeable = (self.max_grad_norm, self.noise_multiplier, self.expected_batch_size, self._resumes)
        if changeable != self._agreed:
            account = self.team.agree(self.noise_key, self._facts(batch), self.account.history.to_plain())
            if self.account.ledger_path is None:
                self.account.restore(account)
            if self._team_batch is None:
                self._team_batch = batch * self.team.data_ranks
            self._agreed = changeable

    def _facts(self, batch: int) -> dict[str, Any]:
        """What must be the same on all ranks."""
        assert self.options is not None
        facts = {f"options[{name!r}]": value for name, value in vars(self.options).items()}
        facts |= {name: getattr(self, name) for name in (*_SETTINGS, "expected_batch_size")}
        facts |= {name: getattr(self, attribute) for name, attribute in _COUNTERS.items()}
        facts["names of the parameters"] = self.names
        if self.options.loss_reduction == "mean" and not (self.options.expected_batch_size or self.expected_batch_size):
            facts["batch size (set expected_batch_size if it varies)"] = batch
        return facts

    def normalizer(self, batch: int) -> float:
        """L: the expected batch over all ranks. Without one set it is the physical batch; on several devices, that of the first
        step, so that all ranks have the same at every step."""
        assert self.options is not None
        expected = self.options.expected_batch_size or self.expected_batch_size
        return expected or (batch if self._team_batch is None else self._team_batch) * self.options.accumulation_steps

    def begin_release(self, backward: int, sensitivity: float, rows: Sequence[int]) -> tuple[int, float]:
        """Counts one release of the parameters ``rows``: (release number, noise standard deviation).

        All releases of one backward pass are noised or none is (``adds_noise``). The noise covers the largest
        sensitivity that any of the parameters has taken in since noise last reached it (``settle``), so that
        micro-batches of different sizes, or a norm changed between them, cannot weaken it.
        """
        assert self.options is not None
        self._releases += 1
        if backward < 0 or backward != self._backward:
            self._backward = backward
            self._adds_noise = self._open_accumulations == 0 and self._count_micro_batch(self.options)
            self._pass_noise = self.noise_multiplier
            self.account.count_pass(bool(self._unnoised))
            if self._adds_noise:
                self.account.release(self._pass_noise)
        if self._unnoised:
            sensitivity = max(sensitivity, *(self._unnoised.get(row, 0.0) for row in rows))
        if self._adds_noise:
            return self._releases, self._pass_noise * sensitivity
        self._unnoised.update(dict.fromkeys(rows, sensitivity))
        return self._releases, 0.0

    def settle(self, parameter: nn.Parameter) -> None:
        """Noise for everything that this parameter had taken in has arrived in its gradient."""
        if self._unnoised:
            self._unnoised.pop(_owners[parameter][1], None)

    def _count_micro_batch(self, options: Options) -> bool:
        if self.account.batch is not None and options.accumulation_steps != 1:
            raise OptionsError(
                f"accumulation_steps={options.accumulation_steps} with private_dataloader: the loader decides which backward "
                "pass adds the noise. Leave accumulation_steps out."
            )
        self._micro_batches += 1
        return self._micro_batches % options.accumulation_steps == 0

    @property
    def adds_noise(self) -> bool:
        """Whether the backward pass that released last adds noise."""
        return self._adds_noise

    @property
    def streams(self) -> Tensor:
        """int64 [P] on the CPU: what tells the parameters' noise apart; as of this ``revision``."""
        if self._streams is None:
            self._streams = streams_of(self.names)
        return self._streams

    def noise_keys(self, release: int, streams: Tensor | None = None) -> Tensor:
        """int64 [P, 2], generator key and stream of each parameter: never the same for two releases, states or processes.

        ``streams``: those of some parameters, on their device; None for all.
        """
        return self.noise_key.words(release, self.streams if streams is None else streams)

    def record(self, norms: Tensor, bounds: Tensor | float) -> None:
        """Keeps float32 norms [B, K] and bounds (a number or [K]) for ``last``."""
        self._statistics = (norms, bounds)


def privacy(model: nn.Module) -> PrivacyState:
    """The run-time privacy state of a model, compiled or about to be.

    Before the first compiled forward pass this declares that all of the model's parameters share one privacy budget
    even when they end up in several graphs (needed for clipping="per_layer" or "group" over several graphs).

    Raises:
        PrivacyError: parts of the model already train under separate states.
    """
    if not isinstance(model, nn.Module):
        raise OptionsError(
            f"privacy takes the nn.Module whose parameters train, compiled or not; got {type(model).__name__}. "
            "For a compiled function pass the module that the function calls."
        )
    named = names_without_ddp(model)
    names, parameters = [name for name, _ in named], [parameter for _, parameter in named]
    state = common_state(parameters)
    if not state.released:
        state.adopt(parameters, names, rename=not state.declared)
        state.declared = True
    return state


def common_state(parameters: Sequence[nn.Parameter]) -> PrivacyState:
    """The one state of these parameters: found, made of several that have not released anything, or new.

    Parameters without a state stay without one; ``PrivacyState.adopt`` takes them in.
    """
    states = list(dict.fromkeys(_owners[p][0] for p in parameters if p in _owners))
    if len(states) <= 1:
        return states[0] if states else PrivacyState()
    declared = [state for state in states if state.declared]
    if len(declared) > 1 or any(state.released for state in states):
        examples = "; ".join(", ".join(state.names[:3]) + ", ..." * (len(state.names) > 3) for state in states[:3])
        raise PrivacyError(
            f"These parameters already belong to {len(states)} privacy states ({examples}), each with its own "
            "counters, and at least one of them is in use. Call flashnorm_compile.privacy(model) once, on the "
            "outermost module, before the first training step."
        )
    target = declared[0] if declared else states[0]
    for other in states:
        if other is not target:
            target.absorb(other)
    return target


def is_exempt(parameter: Tensor) -> bool:
    """Whether the user said that this parameter may be trained unprotected."""
    return parameter in _exempt


def name_of(parameter: Tensor) -> str | None:
    """The parameter's name in its state, if it has one."""
    state, index = _owners.get(parameter, (None, 0))
    return None if state is None else state.names[index]
