"""Two-pass ghost clipping: a backward pass for the norms, another of the reweighted loss.

A stand-in on plain autograd for Li et al. 2021 ("Large Language Models Can Be Strong Differentially Private Learners",
section 4) and for the method of FlashNorm, with the mixed norms of Bu et al. 2022. The first pass computes no gradient of a
weight. Where a model uses a weight outside its module, the hooks do not see it and the norms are too small.
"""

from __future__ import annotations

import torch

from benchmarks.case import Problem
from benchmarks.contenders.base import Contender, Prepared, Privacy
from benchmarks.contenders.probes import Probes
from benchmarks.contenders.release import add_noise_, clip_factors, noise_std


class TwoPass(Contender):
    """Needs a rule for every layer with trainable parameters; refuses shared parameters and layers that are called twice."""

    name = "two-pass ghost"

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Prepared(problem, privacy)


class _Prepared(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy) -> None:
        super().__init__(problem, privacy)
        self.probes = Probes(self.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def backward(self) -> None:
        problem = self.problem
        losses_b, probe_b = self.probes.losses(
            lambda: problem.loss(self.model(*problem.inputs), problem.targets), problem.batch_size
        )
        norms_b = self.probes.norms(losses_b, probe_b, retain_graph=True)
        factors_b = clip_factors(norms_b, self.privacy.max_grad_norm) / problem.batch_size
        torch.autograd.backward((factors_b.to(losses_b.dtype) * losses_b).sum(), inputs=self.parameters)
        add_noise_((p.grad for p in self.parameters if p.grad is not None), noise_std(problem, self.privacy))

    def close(self) -> None:
        self.probes.remove()
