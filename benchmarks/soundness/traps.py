"""The traps: each a tiny problem, with the batches on which a careless method gives itself away.

Losses are linear in the model's outputs, with the targets as coefficients: gradients then grow with a sample's targets and
never saturate, and a sample whose targets are zero has no gradient at all. B samples, T positions, D channels, V token ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Problem
from benchmarks.soundness import models
from benchmarks.soundness.models import CHANNELS, VOCABULARY

SAMPLES, POSITIONS, LONG, IGNORED = 4, 5, 64, -100

Loss = Callable[[Tensor, Tensor], Tensor]


def _no_attacks(_: Problem) -> list[Problem]:
    return []


@dataclass(frozen=True)
class Trap:
    """A problem, and how to hunt for a fault in it.

    `problem.loss` is given the whole batch where a contender has one loss for the batch, and a sample alone where it works
    by samples: a loss that depends on the batch mixes samples for the first and not for the second.
    """

    name: str
    description: str
    """What is unusual, in words for a table's legend."""
    build: Callable[[], Problem]
    """The ordinary batch, on the CPU in float32. Called after a fixed torch seed."""
    attacks: Callable[[Problem], list[Problem]] = _no_attacks
    """Further batches of the same shapes."""
    blank_target: float = 0.0
    """The target that gives a sample no gradient."""
    readings: Mapping[str, Loss] = field(default_factory=dict)
    """Other losses [B] that a private release may stand for, by name: each sample's loss depends on itself only."""
    random: bool = False
    """The model draws random numbers: there is no oracle, and the bound is tested with the generator reset. Samples are not
    removed, since the others would then meet other numbers."""
    resized: bool = False
    """Samples are removed for compiled contenders too, for whom another batch size is another compilation."""

    def batches(self, problem: Problem) -> list[Problem]:
        return [problem, *self.attacks(problem)]

    def blanked(self, batch: Problem, index: int) -> Problem:
        """The batch with sample `index` replaced by zeros that have no gradient."""
        inputs = tuple(_put(x, index, torch.zeros_like(x[index])) for x in batch.inputs)
        blank = torch.full_like(batch.targets[index], self.blank_target)
        return dataclasses.replace(batch, inputs=inputs, targets=_put(batch.targets, index, blank))


def removed(batch: Problem, index: int) -> Problem:
    """The batch without sample `index`."""
    others = [b for b in range(batch.batch_size) if b != index]
    return dataclasses.replace(batch, inputs=tuple(x[others] for x in batch.inputs), targets=batch.targets[others])


def replaced(batch: Problem, index: int) -> Problem:
    """The batch with sample `index` replaced by its own opposite, or by its neighbour where targets are classes."""
    neighbour = (index + 1) % batch.batch_size
    if batch.targets.is_floating_point():
        return dataclasses.replace(batch, targets=_put(batch.targets, index, -batch.targets[index]))
    inputs = tuple(_put(x, index, x[neighbour]) for x in batch.inputs)
    return dataclasses.replace(batch, inputs=inputs, targets=_put(batch.targets, index, batch.targets[neighbour]))


def _put(x: Tensor, index: int, row: Tensor) -> Tensor:
    changed = x.clone()
    changed[index] = row
    return changed


def weighted_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum of outputs times targets of each sample, [B]."""
    return (outputs * targets).flatten(1).sum(1)


def by_batch_token_count(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """[B], with the mean that `cross_entropy(ignore_index=-100)` gives for this batch: it counts the tokens of all samples."""
    counted = (targets_bt != IGNORED).sum().clamp(min=1)
    return _token_losses(logits_btv, targets_bt).sum(1) * (targets_bt.shape[0] / counted)


def by_fixed_token_count(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    """[B]: every sample's sum of token losses over T, whatever is ignored."""
    return _token_losses(logits_btv, targets_bt).mean(1)


def _token_losses(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    losses = F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets_bt)


def _floats(model: Callable[[], nn.Module], *middle: int, loss: Callable[[], Loss] = lambda: weighted_sum) -> Callable[[], Problem]:
    """Inputs and targets [B, *middle, D]."""

    def build() -> Problem:
        shape = (SAMPLES, *middle, CHANNELS)
        return Problem(model(), (torch.randn(shape),), torch.randn(shape), loss())

    return build


def _tokens(tied: str | None, **embedding: int) -> Callable[[], Problem]:
    """Ids [B, T], a coefficient for every logit, [B, T, V]."""

    def build() -> Problem:
        ids_bt = torch.randint(VOCABULARY, (SAMPLES, POSITIONS))
        ids_bt[:, 0] = 0
        return Problem(models.Language(tied, **embedding), (ids_bt,), torch.randn(SAMPLES, POSITIONS, VOCABULARY), weighted_sum)

    return build


def _counted_tokens() -> Problem:
    ids_bt, targets_bt = torch.randint(VOCABULARY, (2, SAMPLES, LONG))
    targets_bt[1, 2:] = targets_bt[3, :1] = IGNORED
    return Problem(models.Language(None), (ids_bt,), targets_bt, by_batch_token_count)


def _scales(problem: Problem) -> list[Problem]:
    """One sample far larger than the others, all large, and large inputs where they are floats."""
    single = torch.ones(SAMPLES)
    single[1] = 1e4
    factors = single.view(-1, *[1] * (problem.targets.dim() - 1))
    batches = [dataclasses.replace(problem, targets=problem.targets * scale) for scale in (factors, 1e3)]
    if problem.inputs[0].is_floating_point():
        batches.append(dataclasses.replace(problem, inputs=tuple(10 * x for x in problem.inputs)))
    return batches


def _copies(problem: Problem) -> list[Problem]:
    """Two attacks on tied weights. Samples of one token each that ask for that token: both uses get the same gradient, and it
    adds up. Targets in the null space of the embedding's transpose: the use as an embedding gets none, that as a head does."""
    ids_bt = torch.arange(1, SAMPLES + 1).to(problem.targets.device).view(-1, 1).expand(SAMPLES, POSITIONS)
    targets_btv = F.one_hot(ids_bt, VOCABULARY).to(problem.targets) * 10
    copies = dataclasses.replace(problem, inputs=(ids_bt,), targets=targets_btv)
    assert isinstance(problem.model, models.Language)
    unseen_v = torch.linalg.svd(problem.model.emb.weight.detach()).U[:, -1]
    unseen = dataclasses.replace(problem, targets=(100 * unseen_v).expand_as(problem.targets).contiguous())
    return [*_scales(problem), copies, unseen]


def _constant_rows(problem: Problem) -> list[Problem]:
    """Inputs that equal the targets: both uses of a weight then see nearly the same product."""
    return [*_scales(problem), dataclasses.replace(problem, targets=problem.inputs[0] * 10)]


def _uneven_counts(problem: Problem) -> list[Problem]:
    """One sample counts all its tokens, the others are alike and count one each: without it, their shares grow 22-fold."""
    ids_bt = torch.full_like(problem.inputs[0], 1)
    targets_bt = torch.full_like(problem.targets, 2)
    targets_bt[0] = 3
    targets_bt[1:, 1:] = IGNORED
    return [dataclasses.replace(problem, inputs=(ids_bt,), targets=targets_bt)]


def _not_finite(problem: Problem) -> list[Problem]:
    return [dataclasses.replace(problem, inputs=(_put_value(problem.inputs[0], value),)) for value in (math.nan, math.inf)]


def _put_value(x_btd: Tensor, value: float) -> Tensor:
    changed = x_btd.clone()
    changed[2, 3, 1] = value
    return changed


TRAPS: tuple[Trap, ...] = (
    Trap(
        "none",
        "two linear layers and a LayerNorm: a control that all must pass",
        _floats(models.Plain, POSITIONS),
        _scales,
        resized=True,
    ),
    Trap("tied module", "`head.weight = emb.weight`", _tokens("module"), _copies),
    Trap("tied function", "`F.linear(h, emb.weight)`", _tokens("function"), _copies),
    Trap("shared weight", "two linear layers with one weight", _floats(models.SharedWeight, POSITIONS), _constant_rows),
    Trap("called twice", "one layer in two places", _floats(models.CalledTwice, POSITIONS), _constant_rows),
    Trap(
        "raw parameters",
        "parameters in an einsum, an addition and a product, owned by no layer",
        _floats(lambda: models.RawParameters(POSITIONS), POSITIONS),
        _scales,
    ),
    Trap("positions", "`pos_emb(arange(T))`", _floats(lambda: models.Positions(POSITIONS), POSITIONS), _scales),
    Trap(
        "positions, T = B",
        "the same, with as many positions as samples",
        _floats(lambda: models.Positions(SAMPLES), SAMPLES),
        _scales,
    ),
    Trap(
        "token count",
        "the loss is divided by the number of tokens of the batch that are not ignored",
        _counted_tokens,
        _uneven_counts,
        blank_target=IGNORED,
        readings={"fixed token count": by_fixed_token_count},
        resized=True,
    ),
    Trap("batch norm", "`F.batch_norm(training=True)`", _floats(lambda: models.BatchStatistics("batch_norm"), POSITIONS), _scales),
    Trap("centering", "`h - h.mean((0, 1))`", _floats(lambda: models.BatchStatistics("centering"), POSITIONS), _scales),
    Trap("outside", "the criterion has a weight of its own", _floats(models.Plain, POSITIONS, loss=models.LearnedWeights), _scales),
    Trap("not finite", "one sample holds NaN, or inf", _floats(models.Plain, POSITIONS), _not_finite),
    Trap("dropout", "a mask for each sample", _floats(lambda: models.Dropped(shared=False), POSITIONS), _scales, random=True),
    Trap("shared dropout", "one mask for the batch", _floats(lambda: models.Dropped(shared=True), POSITIONS), _scales, random=True),
    Trap("convolution", "groups, stride, dilation, transposed", _floats(models.GroupedConvolution, POSITIONS), _scales),
    Trap(
        "partly frozen",
        "a frozen layer, and one of which only the bias is trained",
        _floats(models.PartlyFrozen, POSITIONS),
        _scales,
    ),
    Trap("padding", "`Embedding(padding_idx=0)`: one row gets no gradient", _tokens(None, padding_idx=0), _scales),
    Trap("four axes", "linear layers on [B, 2, T, D]", _floats(models.Plain, 2, POSITIONS), _scales),
)
