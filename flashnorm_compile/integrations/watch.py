"""What every loop is checked for, whatever its library: the optimizer, that each step has its release, and resumed runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from ..accounting.accountant import AccountantName, Relation
from ..passes.errors import OptionsError, PrivacyError, UnprotectedGradientError
from ..state import PrivacyState


@dataclass(frozen=True)
class Accounting:
    """How epsilon is computed for the logs, and where releases are recorded."""

    delta: float
    accountant: AccountantName = "pld"
    relation: Relation = "add_or_remove_one"
    ledger: str | os.PathLike[str] | None = None


class Watch:
    """Follows one training loop from its first to its last step."""

    def __init__(self, state: PrivacyState, accounting: Accounting) -> None:
        self.state = state
        self._accounting = accounting
        self._known_epsilon: tuple[int, float] | None = None
        self._releases = 0

    def begin(self, step: int) -> None:
        """Opens the ledger. ``step``: the optimizer steps that the loop says it has behind it.

        Raises:
            PrivacyError: the loop resumes, and what was spent before is not known.
        """
        if self._accounting.ledger is not None and self.state.account.ledger_path is None:
            self.state.record_to(self._accounting.ledger)
        if self.state.steps < step:
            raise PrivacyError(
                f"The loop resumes behind step {step}, but only {self.state.steps} releases are recorded: the epsilon of the steps "
                "before would be left out. Give the callback the ledger of the first run (ledger='ledger.jsonl'), or call "
                "privacy(model).load_state_dict(...) with what was saved beside the checkpoint."
            )
        self.epsilon()  # a missing accountant shows itself now, not at the first log
        self._releases = self.state.steps

    def before_step(self) -> None:
        """Called before each optimizer step, with its gradients in place.

        Raises:
            UnprotectedGradientError: nothing was released since the last step: the model does not train with this backend.
        """
        if self.state.steps <= self._releases:
            if self.state.released and not self.state.adds_noise:
                return  # the guard refuses the step, and names the parameters
            raise UnprotectedGradientError(
                "The optimizer is about to step, but no private graph has released a gradient since the last step. The model does "
                "not train with this backend: compile it with backend='flashnorm' before it is handed to the loop, and with no "
                "other backend around it."
            )
        self._releases = self.state.steps

    def check_accumulation(self, steps: int, setting: str) -> None:
        """``steps``: backward passes that the loop makes for one optimizer step; ``setting``: what says so.

        Raises:
            OptionsError: the graph adds its noise at another pace.
        """
        options = self.state.options
        if options is not None and options.accumulation_steps != steps:
            raise OptionsError(
                f"{setting}, but accumulation_steps={options.accumulation_steps} in the options: noise is added on every "
                f"{_ordinal(options.accumulation_steps)} backward pass, and the optimizer steps after every {_ordinal(steps)}. Set "
                f"options={{'accumulation_steps': {steps}}}."
            )

    def epsilon(self) -> float:
        """Epsilon spent so far; computed anew only after a release."""
        if self._known_epsilon is None or self._known_epsilon[0] != self.state.steps:
            chosen = self._accounting
            value = self.state.epsilon(chosen.delta, accountant=chosen.accountant, relation=chosen.relation)
            self._known_epsilon = (self.state.steps, value)
        return self._known_epsilon[1]

    def logs(self) -> dict[str, float]:
        """What a log line gets."""
        return {"epsilon": self.epsilon(), "delta": self._accounting.delta, "releases": self.state.steps}


def refuse_if(is_so: bool, setting: str, reason: str) -> None:
    """Raises ``OptionsError`` about a setting of the loop that does not go with private training."""
    if is_so:
        raise OptionsError(f"{setting}: {reason}")


def check_optimizer(optimizer: Any) -> None:
    """The guard against unprotected gradients hangs on ``torch.optim``'s hooks of ``step``.

    Raises:
        OptionsError: this optimizer does not call them.
    """
    while not isinstance(optimizer, Optimizer) or type(optimizer).__module__.startswith("accelerate."):
        if not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer) or not getattr(type(optimizer).step, "hooked", False):
        raise OptionsError(
            f"{type(optimizer).__name__} does not run the hooks of torch.optim.Optimizer.step, so that nothing could refuse an "
            "unprotected gradient. Use an optimizer that derives from torch.optim.Optimizer."
        )


def _ordinal(number: int) -> str:
    if number == 1:
        return "single"
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
