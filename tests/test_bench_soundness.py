"""The judge of `benchmarks.soundness` finds planted faults and clears an honest loop; this project is exact or refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from one_graph import compiled_once
from torch import Tensor, nn

import flashnorm_compile
from benchmarks.case import Problem
from benchmarks.contenders.base import CannotRunError, Contender, NotInstalledError, Prepared, Privacy
from benchmarks.contenders.nonprivate import NonPrivate
from benchmarks.soundness import TRAPS, SoundnessRow, Trap, judge, markdown_table, read, run, write
from benchmarks.soundness.oracle import Oracle
from benchmarks.soundness.traps import removed, replaced

BY_NAME = {trap.name: trap for trap in TRAPS}
Sums = dict[str, Tensor]
Backward = Callable[[Prepared], Sums]


class Planted(Contender):
    """A contender whose clipped sums a function computes: honest, or with one fault."""

    compiled = False

    def __init__(self, backward: Backward, clipping: str | None = "flat") -> None:
        self.name, self.sums, self.clipping = "planted", backward, clipping

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Planted(problem, privacy, self.sums)


class _Planted(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy, sums: Backward) -> None:
        super().__init__(problem, privacy)
        self.sums = sums

    def backward(self) -> None:
        sums = self.sums(self)
        for name, parameter in self.model.named_parameters():
            if name in sums:
                parameter.grad = sums[name] / self.problem.batch_size


def sample_gradients(prepared: Prepared, loss_of: Callable[[Problem], Tensor] | None = None) -> list[Sums]:
    """Of each sample alone; the model's parameters only."""
    named = {name: p for name, p in prepared.model.named_parameters() if p.requires_grad}
    found = []
    for b in range(prepared.problem.batch_size):
        sample = dataclasses.replace(prepared.problem.sample(b), model=prepared.model)
        loss = loss_of(sample) if loss_of else sample.loss(sample.model(*sample.inputs), sample.targets).sum()
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        found.append(dict(zip(named, gradients, strict=True)))
    return found


def size(gradients: Sums) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


def clipped(gradients: list[Sums], norms: list[float], max_grad_norm: float) -> Sums:
    factors = [(min(1.0, max_grad_norm / n) if n else 1.0) if math.isfinite(n) else 0.0 for n in norms]
    kept = [(f, g) for f, g in zip(factors, gradients, strict=True) if f]
    return {name: sum((f * g[name] for f, g in kept), torch.zeros_like(zero)) for name, zero in gradients[0].items()}


def honest(prepared: Prepared) -> Sums:
    gradients = sample_gradients(prepared)
    return clipped(gradients, [size(g) for g in gradients], prepared.privacy.max_grad_norm)


def uses_apart(prepared: Prepared) -> Sums:
    """Takes the norm of a tied weight's two uses as if they were two parameters."""
    model = prepared.model
    whole = sample_gradients(prepared)

    def head_alone(sample: Problem) -> Tensor:
        embedded = model.emb(*sample.inputs).detach()
        hidden = embedded + 0.1 * torch.tanh(model.mix(embedded))
        return sample.loss(model.head(hidden), sample.targets).sum()

    heads = [g["emb.weight"] for g in sample_gradients(prepared, head_alone)]
    norms = [size(g | {"emb.weight": g["emb.weight"] - h, "head": h}) for g, h in zip(whole, heads, strict=True)]
    return clipped(whole, norms, prepared.privacy.max_grad_norm)


def last_bias_skipped(prepared: Prepared) -> Sums:
    gradients = [{name: g for name, g in sample.items() if name != "last.bias"} for sample in sample_gradients(prepared)]
    return clipped(gradients, [size(g) for g in gradients], prepared.privacy.max_grad_norm)


def nan_passed_on(prepared: Prepared) -> Sums:
    gradients = sample_gradients(prepared)
    factors = [(prepared.privacy.max_grad_norm / torch.tensor(size(g))).clamp(max=1.0) for g in gradients]
    return {name: sum(f * g[name] for f, g in zip(factors, gradients, strict=True)) for name in gradients[0]}


def mixing(prepared: Prepared) -> Sums:
    """Divides every sample's gradient by the largest norm in the batch: each is at most C, and depends on the others."""
    gradients = sample_gradients(prepared)
    largest = max(size(g) for g in gradients)
    return clipped(gradients, [largest] * len(gradients), prepared.privacy.max_grad_norm)


def slightly_wrong(prepared: Prepared) -> Sums:
    """One gradient 0.1 percent too small: far too little to break the bound."""
    sums = honest(prepared)
    return sums | {"last.bias": sums["last.bias"] * 0.999}


def twice_the_bound(prepared: Prepared) -> Sums:
    gradients = sample_gradients(prepared)
    return clipped(gradients, [size(g) for g in gradients], 2 * prepared.privacy.max_grad_norm)


def stale(prepared: Prepared) -> Sums:
    """Answers with the first batch's gradients for ever."""
    if not hasattr(prepared, "first"):
        prepared.first = honest(prepared)  # type: ignore[attr-defined]
    return prepared.first


def refusing(prepared: Prepared) -> Sums:
    raise CannotRunError("this model has a layer that is not known\nand a second line")


@pytest.mark.parametrize("trap", [t for t in TRAPS if t.name not in ("outside", "dropout", "shared dropout")], ids=lambda t: t.name)
def test_an_honest_loop_is_exact(trap: Trap) -> None:
    row = judge(Planted(honest), trap)
    assert (row.verdict, row.untrained, row.refusal, row.reading) == ("exact", (), None, None), row
    assert row.contribution is not None
    assert 0.3 < row.contribution <= 1.001, "no batch of this trap brings a sample near the bound"
    assert row.gradient_error is not None
    assert row.gradient_error < 1e-5


@pytest.mark.parametrize("name", ["dropout", "shared dropout"])
def test_random_models_are_held_to_the_bound_alone(name: str) -> None:
    row = judge(Planted(honest), BY_NAME[name])
    assert (row.verdict, row.gradient_error) == ("within the bound", None)
    assert row.contribution == pytest.approx(1.0, abs=1e-3)
    assert judge(Planted(twice_the_bound), BY_NAME[name]).words == "over the bound (2.00 C)"


@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: t.name)
def test_the_control_without_privacy_exceeds_every_bound(trap: Trap) -> None:
    row = judge(NonPrivate("eager", compiled=False), trap)
    assert row.verdict == ("poisoned by NaN" if trap.name == "not finite" else "no bound")
    assert row.contribution is not None
    assert row.contribution > 1.1


@pytest.mark.parametrize(
    ("fault", "trap", "words"),
    [
        (uses_apart, "tied module", "over the bound (1.4"),
        (last_bias_skipped, "none", "does not train last.bias"),
        (nan_passed_on, "not finite", "poisoned by NaN"),
        (mixing, "none", "over the bound ("),
        (slightly_wrong, "none", "wrong gradient (by "),
        (twice_the_bound, "none", "over the bound (2.00 C)"),
        (stale, "none", "wrong gradient (by "),
        (refusing, "none", "refuses"),
    ],
)
def test_planted_faults_are_found(fault: Backward, trap: str, words: str) -> None:
    assert judge(Planted(fault), BY_NAME[trap]).words.startswith(words)


def test_a_criterion_that_is_left_out_is_named() -> None:
    assert judge(Planted(honest), BY_NAME["outside"]).words == "does not train criterion.weight"


def test_a_loss_divided_by_the_tokens_of_the_batch_breaks_the_bound_of_whoever_clips_its_parts() -> None:
    def by_batch(prepared: Prepared) -> Sums:
        problem, model = prepared.problem, prepared.model
        losses = problem.loss(model(*problem.inputs), problem.targets)
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        gradients = [dict(zip(names, each, strict=True)) for each in found]
        return clipped(gradients, [size(g) for g in gradients], prepared.privacy.max_grad_norm)

    row = judge(Planted(by_batch), BY_NAME["token count"])
    assert row.verdict == "over the bound"
    assert row.contribution is not None
    assert row.contribution > 2


def test_a_refusal_keeps_the_first_line_of_its_text() -> None:
    row = judge(Planted(refusing), BY_NAME["none"])
    assert row.refusal == "CannotRunError: this model has a layer that is not known"
    assert (row.contribution, row.gradient_error) == (None, None)


def test_a_refusal_at_the_optimizer_step_counts() -> None:
    class Late(Planted):
        def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
            prepared = _Planted(problem, privacy, honest)

            def refuse(*_: object) -> None:
                raise RuntimeError("this gradient was not noised")

            prepared.optimizer.register_step_pre_hook(refuse)
            return prepared

    row = judge(Late(honest), BY_NAME["none"])
    assert (row.verdict, row.refusal) == ("refuses", "RuntimeError: this gradient was not noised")


def test_absent_peers_and_missing_gpus_are_told_from_refusals() -> None:
    def absent(*_: object) -> None:
        raise NotInstalledError("no such package")

    class OnGpu(Planted):
        on_cuda_only = True

    assert judge(Planted(absent), BY_NAME["none"]).verdict == "not installed"
    assert judge(OnGpu(honest), BY_NAME["none"]).verdict == "needs CUDA"


def test_neighbours_differ_in_one_sample_which_has_no_gradient_when_blanked() -> None:
    for trap in TRAPS:
        torch.manual_seed(0)
        problem = trap.build()
        for batch in trap.batches(problem):
            for neighbour in (trap.blanked(batch, 2), replaced(batch, 2)):
                pairs = zip((*batch.inputs, batch.targets), (*neighbour.inputs, neighbour.targets), strict=True)
                for before, after in pairs:
                    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
            assert all(len(x) == 3 for x in removed(batch, 2).inputs)
            blank = dataclasses.replace(trap.blanked(batch, 2).sample(2), model=problem.model)
            assert not any(bool(g.any()) for g in Oracle(problem, None).clipped_sum(blank, 1.0).values())


def test_about_half_of_the_samples_are_clipped() -> None:
    for trap in TRAPS:
        torch.manual_seed(0)
        problem = trap.build()
        oracle = Oracle(problem, "flat")
        max_grad_norm = oracle.clipping_norm(problem)
        sums = [oracle.clipped_sum(problem.sample(b), max_grad_norm) for b in range(problem.batch_size)]
        at_the_bound = [size(each) == pytest.approx(max_grad_norm) for each in sums]
        assert sum(at_the_bound) == 2, trap.name


def test_per_layer_clipping_is_compared_with_its_own_oracle() -> None:
    def by_module(prepared: Prepared) -> Sums:
        gradients = sample_gradients(prepared)
        modules = sorted({name.rpartition(".")[0] for name in gradients[0]})
        bound = prepared.privacy.max_grad_norm / math.sqrt(len(modules))
        total: Sums = {}
        for module in modules:
            part = [{name: g for name, g in sample.items() if name.rpartition(".")[0] == module} for sample in gradients]
            total |= clipped(part, [size(g) for g in part], bound)
        return total

    assert judge(Planted(by_module, "per_layer"), BY_NAME["none"]).verdict == "exact"
    assert judge(Planted(by_module, "flat"), BY_NAME["none"]).verdict == "wrong gradient"


def test_rows_survive_a_file_and_a_new_run_replaces_them(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "today" / "soundness.json"
    contenders = [Planted(last_bias_skipped), NonPrivate("eager", compiled=False)]
    rows = list(run(contenders, "cpu", [BY_NAME["none"], BY_NAME["not finite"]]))
    write(rows, path)
    assert read(path) == rows
    write([dataclasses.replace(rows[0], verdict="exact")], path)
    assert [row.verdict for row in read(path)] == ["exact", *(row.verdict for row in rows[1:])]
    assert rows[0].versions["torch"] == torch.__version__
    assert rows[0].date
    assert rows[0].device


def test_the_table_names_what_is_wrong_in_bold() -> None:
    rows = [
        SoundnessRow("tied", "one weight", "a", "over the bound", contribution=1.4142),
        SoundnessRow("tied", "one weight", "b", "refuses", refusal="no"),
        SoundnessRow("plain", "a control", "a", "exact"),
        SoundnessRow("plain", "a control", "c", "exact", reading="fixed token count"),
    ]
    assert markdown_table(rows).splitlines() == [
        "| trap | a | b | c |",
        "| --- | --- | --- | --- |",
        "| tied: one weight | **over the bound (1.41 C)** | refuses |  |",
        "| plain: a control | exact |  | exact (fixed token count) |",
    ]


class Backend(Contender):
    """This project, with capture, checks and rewriting, and without Inductor's code generation."""

    def __init__(self, clipping: str) -> None:
        self.name, self.clipping = f"ours, {clipping}", clipping

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _Backend(problem, privacy, self.clipping or "flat")


class _Backend(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy, clipping: str) -> None:
        super().__init__(problem, privacy)
        options = {"max_grad_norm": privacy.max_grad_norm, "noise_multiplier": privacy.noise_multiplier, "clipping": clipping}
        self.loss = torch.compile(problem.mean_loss(self.model), backend="flashnorm_eager", options=options, dynamic=False)

    def backward(self) -> None:
        self.loss(*self.problem.inputs, self.problem.targets).backward()


@pytest.mark.parametrize("trap", TRAPS, ids=lambda t: t.name)
@pytest.mark.filterwarnings("ignore::flashnorm_compile.LossNormalizerWarning")
def test_this_project_is_exact_or_refuses(trap: Trap) -> None:
    with compiled_once():
        rows = [judge(Backend(clipping), trap) for clipping in ("flat", "per_layer")]
    refused = {"batch norm": "SampleMixingError", "centering": "SampleMixingError"}
    for row in rows:
        if trap.name in refused:
            assert row.verdict == "refuses"
            assert row.refusal is not None
            assert row.refusal.startswith(refused[trap.name])
        else:
            assert row.verdict == ("within the bound" if trap.random else "exact"), row
            assert row.reading == ("fixed token count" if trap.name == "token count" else None)


def test_a_loss_outside_the_compiled_part_with_a_weight_of_its_own_is_refused_at_the_step() -> None:
    """The guard, not the judge: the criterion's gradient was never clipped."""
    torch.manual_seed(0)
    problem = BY_NAME["outside"].build()
    options = {"max_grad_norm": 1.0, "noise_multiplier": 0.0}
    compiled = torch.compile(problem.model, backend="flashnorm_eager", options=options)
    assert isinstance(problem.loss, nn.Module)
    problem.loss(compiled(*problem.inputs), problem.targets).mean().backward()
    optimizer = torch.optim.SGD([*problem.model.parameters(), *problem.loss.parameters()], lr=0.1)
    with pytest.raises(flashnorm_compile.UnprotectedGradientError, match="belongs to no private graph"):
        optimizer.step()
