"""Book-keeping: one backward pass, then the clipped sums from what it kept.

A stand-in on plain autograd for Bu et al. 2022 ("Differentially Private Optimization on Large Model at Small Cost",
BK-MixOpt), which is FastDP's method: layer inputs and output gradients stay in memory until all norms are known; where
instantiating was cheaper, the per-sample gradients stay. As with ghost differentiation (section 3 there), autograd computes no
gradient of a weight. Where a model uses a weight outside its module, the hooks do not see it and its part is missing.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Prepared, Privacy
from benchmarks.contenders.layer_rules import Contribution
from benchmarks.contenders.probes import Probes
from benchmarks.contenders.release import add_noise_, clip_factors, noise_std


class BookKeeping(Contender):
    """Needs a rule for every layer with trainable parameters; refuses shared parameters and layers that are called twice."""

    name = "book-keeping"

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Prepared(problem, privacy)


class _Prepared(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy) -> None:
        super().__init__(problem, privacy)
        self.kept: list[tuple[Tensor, Contribution]] = []
        self.probes = Probes(self.model, keep=lambda parameter, contribution: self.kept.append((parameter, contribution)))

    def backward(self) -> None:
        factors_b = clip_factors(self._norms(), self.privacy.max_grad_norm) / self.problem.batch_size
        while self.kept:  # what a sum was made of is given back before the next one
            parameter, contribution = self.kept.pop()
            parameter.grad = contribution.weighted_sum(factors_b)
            add_noise_((parameter.grad,), noise_std(self.problem, self.privacy))

    def _norms(self) -> Tensor:
        problem = self.problem
        self.kept.clear()
        losses_b, probe_b = self.probes.losses(
            lambda: problem.loss(self.model(*problem.inputs), problem.targets), problem.batch_size
        )
        return self.probes.norms(losses_b, probe_b, retain_graph=False)

    def close(self) -> None:
        self.kept.clear()
        self.probes.remove()
