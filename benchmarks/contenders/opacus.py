"""Opacus, with each of its ways to a per-sample gradient norm, put together as its own PrivacyEngine does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, NotInstalledError, Prepared, Privacy
from benchmarks.contenders.release import package_version, refusals


class Opacus(Contender):
    """Opacus instantiates per-sample gradients ("hooks", "functorch") or runs two backward passes ("ghost", "fast gradient").

    "hooks" has a rule for each kind of layer, "functorch" uses vmap for all of them. "ghost" computes norms from layer inputs
    and output gradients where it has a rule, and "fast gradient" instantiates gradients layer by layer.
    What Opacus refuses becomes CannotRunError with its own words. Its validation of a model is part of `prepare`.
    """

    def __init__(self, name: str, mode: str) -> None:
        if mode not in _MODES:
            raise ValueError(f"mode = {mode!r}; expected one of {', '.join(_MODES)}")
        self.name, self.mode = name, mode

    def version(self) -> str | None:
        return package_version("opacus")

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        try:
            import opacus  # noqa: F401 - the classes below are imported where they are used
        except ImportError as error:
            raise NotInstalledError("opacus is not installed: pip install opacus") from error
        with refusals("opacus"):
            return _MODES[self.mode](problem, privacy, self.mode)


class _Opacus(Prepared):
    """What all modes share. `private` is Opacus's optimizer around the ordinary one."""

    private: Any
    wrapped: Any

    def __init__(self, problem: Problem, privacy: Privacy) -> None:
        from opacus.validators import ModuleValidator

        super().__init__(problem, privacy)
        ModuleValidator.validate(self.model, strict=True)

    def backward(self) -> None:
        with refusals("opacus"):
            self.private.expected_batch_size = self.problem.batch_size
            self._backward()
            self.private.pre_step()

    def _backward(self) -> None:
        raise NotImplementedError

    def set_privacy(self, privacy: Privacy) -> None:
        super().set_privacy(privacy)
        self.private.max_grad_norm, self.private.noise_multiplier = privacy.max_grad_norm, privacy.noise_multiplier

    def clear(self) -> None:
        self.private.zero_grad(set_to_none=True)

    def close(self) -> None:
        self.wrapped.to_standard_module()
        for parameter in self.private.params:
            del parameter.summed_grad

    def _optimizer_settings(self) -> dict[str, Any]:
        privacy = self.privacy
        return {
            "noise_multiplier": privacy.noise_multiplier,
            "max_grad_norm": privacy.max_grad_norm,
            "expected_batch_size": self.problem.batch_size,
        }


class _PerSampleGradients(_Opacus):
    """Modes "hooks" and "functorch"."""

    def __init__(self, problem: Problem, privacy: Privacy, mode: str) -> None:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        super().__init__(problem, privacy)
        self.wrapped = GradSampleModule(self.model, force_functorch=mode == "functorch")
        self.private = DPOptimizer(self.optimizer, **self._optimizer_settings())
        self.loss = problem.mean_loss(self.wrapped)

    def _backward(self) -> None:
        self.loss(*self.problem.inputs, self.problem.targets).backward()


class _FastGradientClipping(_Opacus):
    """Modes "ghost" and "fast gradient"."""

    def __init__(self, problem: Problem, privacy: Privacy, mode: str) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        super().__init__(problem, privacy)
        self.wrapped = GradSampleModuleFastGradientClipping(
            self.model, max_grad_norm=privacy.max_grad_norm, use_ghost_clipping=mode == "ghost"
        )
        self.private = DPOptimizerFastGradientClipping(self.optimizer, **self._optimizer_settings())
        self.loss = DPLossFastGradientClipping(self.wrapped, self.private, _Criterion(problem.loss))

    def _backward(self) -> None:
        self.loss(self.wrapped(*self.problem.inputs), self.problem.targets).backward()

    def set_privacy(self, privacy: Privacy) -> None:
        super().set_privacy(privacy)
        self.wrapped.max_grad_norm = privacy.max_grad_norm


class _Criterion:
    """A loss [B] with the attribute `reduction`, which Opacus switches to "none" while it calls."""

    def __init__(self, losses: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.losses, self.reduction = losses, "mean"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses_b = self.losses(outputs, targets)
        return losses_b if self.reduction == "none" else losses_b.mean()


_MODES: dict[str, Callable[[Problem, Privacy, str], Prepared]] = {
    "hooks": _PerSampleGradients,
    "functorch": _PerSampleGradients,
    "ghost": _FastGradientClipping,
    "fast gradient": _FastGradientClipping,
}
