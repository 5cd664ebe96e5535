"""FastDP (github.com/awslabs/fast-differential-privacy), from a checkout: it is in no package index."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from types import ModuleType
from typing import Any

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, NotInstalledError, Prepared, Privacy
from benchmarks.contenders.release import refusals

PATH = "FASTDP_PATH"


class FastDP(Contender):
    """Its hook-based PrivacyEngine: book-keeping with mixed ghost norms, flat clipping with Abadi's factor, one GPU.

    Ghost differentiation ("origin parameters") is off, as it is by default: which parameters come first, a user has to say.
    A layer that FastDP does not know is not trained, and says so on its standard output only: the gate finds no gradient.
    """

    name = "fastdp"

    def version(self) -> str | None:
        try:
            return f"fastdp {_package().__version__}"
        except NotInstalledError:
            return None

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Prepared(problem, privacy, _package())


class _Prepared(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy, package: ModuleType) -> None:
        super().__init__(problem, privacy)
        self.package = package
        self.loss = problem.mean_loss(self.model)
        self.engine: Any = None
        self._attach()

    def backward(self) -> None:
        with refusals("fastdp"), contextlib.redirect_stdout(io.StringIO()):
            self.loss(*self.problem.inputs, self.problem.targets).backward()
            # What the engine's own `optimizer.step` does before the ordinary step.
            self.optimizer.zero_grad()
            self.engine._create_noisy_clipped_gradient()
            self.engine.unlock()

    def set_privacy(self, privacy: Privacy) -> None:
        """New hooks: FastDP binds the clipping norm to them."""
        super().set_privacy(privacy)
        self.close()
        self._attach()

    def close(self) -> None:
        if self.engine is not None:
            self.package.autograd_grad_sample.remove_hooks(self.model)
            self.engine = None

    def _attach(self) -> None:
        problem, privacy = self.problem, self.privacy
        with refusals("fastdp"), contextlib.redirect_stdout(io.StringIO()):
            self.engine = self.package.PrivacyEngine(
                self.model,
                batch_size=problem.batch_size,
                sample_size=1000 * problem.batch_size,
                epochs=1,
                max_grad_norm=privacy.max_grad_norm,
                noise_multiplier=privacy.noise_multiplier,
                clipping_fn="Abadi",
                clipping_mode="MixOpt",
                clipping_style="all-layer",
            )


def _package() -> ModuleType:
    path = os.environ.get(PATH)
    if not path:
        raise NotInstalledError(
            f"FastDP is in no package index: set {PATH} to a checkout of github.com/awslabs/fast-differential-privacy"
        )
    if not os.path.isdir(os.path.join(path, "fastDP")):
        raise NotInstalledError(f"{PATH} is {path}, which holds no folder fastDP: set it to a checkout of FastDP")
    sys.path.insert(0, path)
    try:
        return importlib.import_module("fastDP")
    except ImportError as error:
        raise NotInstalledError(f"FastDP in {path} cannot be imported: {error}") from error
    finally:
        sys.path.remove(path)
