"""jax_privacy on mirrors of the models that `jax_models.py` has, with the same weights and the same batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, NotInstalledError, Prepared, Privacy
from benchmarks.contenders.release import noise_std, package_version


class JaxPrivacy(Contender):
    """`clipped_grad` and `gaussian_privatizer` with optax's AdamW, all of a step in one `jax.jit`.

    JAX allocates its own memory, which neither PyTorch's profiler nor its CUDA allocator counts, and takes as many threads as
    XLA decides. Weights that a step has changed stay in JAX.
    """

    name = "jax_privacy"
    mirrors = True

    def version(self) -> str | None:
        return package_version("jax_privacy")

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        try:
            import jax_privacy  # noqa: F401 - imported where they are used
            import optax  # noqa: F401
        except ImportError as error:
            raise NotInstalledError(f"jax_privacy cannot be imported ({error}): pip install jax jax_privacy optax") from error
        return _Prepared(problem, privacy)


class _Prepared(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy) -> None:
        import jax
        import optax

        from benchmarks.contenders.jax_models import mirror

        super().__init__(problem, privacy)
        self.jax, self.mean_loss = jax, mirror(problem)
        self._require_same_device(problem.targets.device.type)
        values = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        self.trainable = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        # Copies: the step gives its arguments' memory to its results.
        self.weights = {name: jax.numpy.array(_to_jax(values[name])) for name in self.trainable}
        self.frozen = {name: jax.numpy.array(_to_jax(x)) for name, x in values.items() if name not in self.trainable}
        settings = self.optimizer.defaults
        self.adamw = optax.adamw(settings["lr"], *settings["betas"], eps=settings["eps"], weight_decay=settings["weight_decay"])
        self.optimizer_state = self.adamw.init(self.weights)
        self.noise_state = self._privatizer(0.0).init(self.weights)
        self.jitted_release = jax.jit(self._release)
        self.jitted_step = jax.jit(self._step, donate_argnums=(0, 1, 2))

    def backward(self) -> None:
        gradients, self.noise_state = self.jitted_release(self.weights, self.noise_state, *self._arguments())
        self.jax.block_until_ready(gradients)
        for name, parameter in self.trainable.items():
            parameter.grad = torch.from_dlpack(gradients[name])

    def step(self) -> None:
        state = (self.weights, self.optimizer_state, self.noise_state)
        self.weights, self.optimizer_state, self.noise_state = self.jitted_step(*state, *self._arguments())
        self.jax.block_until_ready(self.weights)

    def _arguments(self) -> tuple[Any, ...]:
        """Clipping norm and noise, which may change without a new compilation, and the batch."""
        problem = self.problem
        batch = tuple(_to_jax(x) for x in (*problem.inputs, problem.targets))
        return self.privacy.max_grad_norm, noise_std(problem, self.privacy), batch

    def _release(self, weights: Any, noise_state: Any, max_grad_norm: Any, std: Any, batch: Any) -> Any:
        import jax_privacy

        clipped = jax_privacy.clipped_grad(
            lambda trainable, *sample: self.mean_loss({**self.frozen, **trainable}, *sample),
            l2_clip_norm=max_grad_norm,
            normalize_by=float(len(batch[-1])),
            batch_argnums=tuple(range(1, len(batch) + 1)),
        )
        return self._privatizer(std).update(clipped(weights, *batch), noise_state)

    def _step(self, weights: Any, optimizer_state: Any, noise_state: Any, *arguments: Any) -> Any:
        import optax

        gradients, noise_state = self._release(weights, noise_state, *arguments)
        updates, optimizer_state = self.adamw.update(gradients, optimizer_state, weights)
        return optax.apply_updates(weights, updates), optimizer_state, noise_state

    @staticmethod
    def _privatizer(std: Any) -> Any:
        """Its key counts at `init` only: later ones come from the state."""
        from jax_privacy import noise_addition

        return noise_addition.gaussian_privatizer(stddev=std, prng_key=0)

    def _require_same_device(self, device: str) -> None:
        backend = self.jax.default_backend()
        if (backend == "gpu") != (device == "cuda"):
            raise NotInstalledError(f"the batch is on {device} and JAX runs on {backend}: install JAX for {device}")


def _to_jax(x: Tensor) -> Any:
    """The same memory where JAX has the type (not int64)."""
    import jax

    return jax.dlpack.from_dlpack(x.detach().contiguous())
