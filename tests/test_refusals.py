"""What must be refused, and what the error has to say: op, module, the user's line, why, and what to do instead."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flashnorm_compile.passes import errors
from models.algebra import Mlp
from torch import Tensor, nn

OPTIONS: dict[str, Any] = {"max_grad_norm": 1.0, "noise_multiplier": 0.0}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def refusal(kind: type[Exception], act: Callable[[], object]) -> str:
    """The text of the refusal that ``act`` must end in; ``kind`` may be the cause of what Dynamo raised."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the kind is looked for among the causes)
        act()
    causes = list(_causes(caught.value))
    assert any(isinstance(cause, kind) for cause in causes), f"{causes!r} instead of {kind.__name__}"
    return str(caught.value)


def train(model: Any, *inputs: Tensor, backend: str, **options: Any) -> None:
    """One forward and backward of the compiled model or function, with a loss outside if there is none inside."""
    output = torch.compile(model, backend=backend, options=OPTIONS | options)(*inputs)
    (output if output.ndim == 0 else output.square().sum()).backward()


def says(text: str, *words: str) -> None:
    """Every word (a regular expression, in any case) occurs."""
    missing = [word for word in words if not re.search(word, text, re.IGNORECASE)]
    assert not missing, f"{missing} not in:\n{text}"


def line_of(owner: Any, fragment: str) -> str:
    """Regular expression for the file and number of the one source line of ``owner`` that holds ``fragment``."""
    lines, first = inspect.getsourcelines(owner)
    (offset,) = (i for i, line in enumerate(lines) if fragment in line)
    return rf'test_refusals\.py(:|", line ){first + offset}\b'


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 8)
        self.normalize = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(self.project(x))


class Mixing(nn.Module):
    """A linear layer named ``trunk``, a mixing step in a submodule named ``mixer``, and a head."""

    def __init__(self, mixer: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.mixer = mixer
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixer(self.trunk(x)))


class Centered(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class Rolled(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h + torch.roll(h, 1, 0)


class FoldedAttention(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        folded = h.reshape(1, -1, h.shape[-1])
        return F.scaled_dot_product_attention(folded, folded, folded).reshape(h.shape)


class BatchSoftmax(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * h.softmax(0)


class Cumulated(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.cumsum(0)


class Sorted(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.sort(0).values


class Permuted(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h[torch.randperm(h.shape[0])]


class Flipped(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * h.flip(0)


class WrongReshape(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.reshape(2, -1).softmax(1).reshape(h.shape)


class GlobalMaximum(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h / h.detach().abs().max()


class RunningMean(nn.Module):
    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(8))

    def forward(self, h: Tensor) -> Tensor:
        self.running.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h * 2


MIXERS = {
    Centered: "h - h.mean(0)",
    Rolled: "torch.roll",
    BatchSoftmax: "softmax",
    Cumulated: "cumsum",
    Sorted: "sort",
    Flipped: "flip",
    GlobalMaximum: "max()",
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixing_module(mixer: type[nn.Module], backend: str) -> None:
    """The error names the module that mixes and its line, and that two samples meet there."""
    text = refusal(errors.SampleMixingError, lambda: train(Mixing(mixer()), torch.randn(4, 6), backend=backend))
    says(text, "mixer", line_of(mixer, MIXERS[mixer]), "sample")


def test_batch_norm(backend: str) -> None:
    model = BatchNormed()
    text = refusal(errors.SampleMixingError, lambda: train(model, torch.randn(4, 6), backend=backend))
    says(text, r"batch_?norm", "normalize", line_of(BatchNormed, "self.normalize(self"), "GroupNorm")


def test_batch_mean_subtraction(backend: str) -> None:
    """The op and the remedy, beside what every mixing module's error says."""
    text = refusal(errors.SampleMixingError, lambda: train(Mixing(Centered()), torch.randn(4, 6), backend=backend))
    says(text, "mean|sum", "per-sample|each sample")


def test_roll_along_the_batch(backend: str) -> None:
    text = refusal(errors.SampleMixingError, lambda: train(Mixing(Rolled()), torch.randn(4, 6), backend=backend))
    says(text, r"roll|slice|cat|index", "mixer")


def test_attention_over_the_folded_batch(backend: str) -> None:
    x = torch.randn(4, 5, 6)
    text = refusal(errors.SampleMixingError, lambda: train(Mixing(FoldedAttention()), x, backend=backend))
    says(text, "mixer", line_of(FoldedAttention, "scaled_dot_product"), "attention|bmm|softmax", "fold|batch")


@pytest.mark.parametrize("mixer", [Permuted, WrongReshape])
def test_scrambled_samples(mixer: type[nn.Module], backend: str) -> None:
    text = refusal(errors.PrivacyError, lambda: train(Mixing(mixer()), torch.randn(4, 6), backend=backend))
    says(text, "mixer", r"test_refusals\.py")


class Contrastive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        similarity = F.normalize(self.left(x), dim=1) @ F.normalize(self.right(y), dim=1).T
        return F.cross_entropy(similarity, torch.arange(x.shape[0]))


class Halved(nn.Module):
    """An odd number of frames, [n + 1, B, L], laid out as two rows: the second begins amid the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        frames, batch, width = x.shape
        h = torch.cat([x * self.weight, x[:1]])
        return h.reshape(2, (frames + 1) * batch * width // 2).sum(0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_that_begin_amid_the_samples(dynamic: bool, backend: str) -> None:
    options = OPTIONS | {"batch_dims": {"x": 1}}
    compiled = torch.compile(Halved(), backend=backend, options=options, dynamic=dynamic)
    text = refusal(errors.SampleMixingError, lambda: compiled(torch.randn(6, 4, 3)).square().sum().backward())
    says(text, "weight", "aten.view", "elements of different samples into one row")


def test_contrastive_loss(backend: str) -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    text = refusal(errors.SampleMixingError, lambda: train(Contrastive(), x, y, backend=backend))
    says(text, r"\bmm\b|matmul|@", line_of(Contrastive, "similarity ="), "contrastive|pairs|every other sample|both")


class LossOfTheMean(nn.Module):
    """A loss that bends the batch's mean: its slope depends on everybody."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        return self.bend(self.layer(x).square().sum(1).mean())


@pytest.mark.parametrize("bend", [torch.log, torch.square, torch.sqrt, lambda loss: loss / loss.detach()])
def test_bent_mean(bend: Callable[[Tensor], Tensor], backend: str) -> None:
    """The slope is a number common to all gradients, but no count: nobody can guess what to put in its place."""
    text = refusal(errors.PrivacyError, lambda: train(LossOfTheMean(bend), torch.randn(4, 6), backend=backend))
    says(text, line_of(LossOfTheMean, "self.bend(self"), "loss_normalizer", "batch")


class TwoNormalizers(nn.Module):
    """Only one of two loss terms is divided by the number of valid samples: the count is no common factor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        per_sample = self.layer(x).square().sum(1)
        return (per_sample * valid).sum() / valid.sum() + per_sample.mean()


def test_normalizer_that_is_not_uniform(backend: str) -> None:
    valid = torch.tensor([1.0, 0.0, 1.0, 1.0])
    text = refusal(errors.SampleMixingError, lambda: train(TwoNormalizers(), torch.randn(4, 6), valid, backend=backend))
    says(text, line_of(TwoNormalizers, "valid.sum()"), "normali[sz]er|loss_normalizer|count|scale")


def test_buffer_updated_from_the_batch(backend: str) -> None:
    model = Mixing(RunningMean())
    text = refusal(errors.PrivacyError, lambda: train(model, torch.randn(4, 6), backend=backend))
    says(text, "buffer", "running")


def test_input_updated_from_the_batch(backend: str) -> None:
    class Overwrites(Mlp):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y.copy_(y + x.detach().mean(0))
            return super().forward(x)

    x, y = torch.randn(4, 6), torch.randn(4, 6)
    says(refusal(errors.PrivacyError, lambda: train(Overwrites(), x, y, backend=backend)), r"\by\b", "sample|batch")


class Queried(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.layer(x) @ table.T


@pytest.mark.parametrize("rows", [7, 1], ids=["other_size", "one_beside_larger"])
def test_undeclared_public_input(rows: int, backend: str) -> None:
    """Sizes that disagree, or one beside larger ones, ask for ``batch_dims`` and name the input and the sizes."""
    x, table = torch.randn(4, 6), torch.randn(rows, 6)
    text = refusal(errors.BatchDimensionError, lambda: train(Queried(), x, table, backend=backend))
    says(text, "batch_dims", "table", rf"\b{rows}\b", r"\b4\b", "None")


def test_scalar_tensor_input(backend: str) -> None:
    """A tensor without dimensions may hold a batch statistic: unless declared public, it must not shift samples."""
    model = Mlp()

    def shifted(x: Tensor, shift: Tensor) -> Tensor:
        return model(x + shift)

    text = refusal(errors.PrivacyError, lambda: train(shifted, torch.randn(4, 6), torch.tensor(2.0), backend=backend))
    says(text, "batch_dims", "shift")


@pytest.mark.parametrize("dims", [{"tabel": None}, {"table": 2}, {"table": "all"}, {"x": 0, "table": -3}], ids=str)
def test_wrong_batch_dims(dims: dict[str, Any], backend: str) -> None:
    x, table = torch.randn(4, 6), torch.randn(7, 6)
    text = refusal(errors.PrivacyError, lambda: train(Queried(), x, table, backend=backend, batch_dims=dims))
    says(text, "batch_dims", "tabel|table")


def test_everything_public(backend: str) -> None:
    """Nobody to protect is more likely a mistake than a wish."""
    dims = {"x": None}
    text = refusal(errors.PrivacyError, lambda: train(Mlp(), torch.randn(4, 6), backend=backend, batch_dims=dims))
    says(text, "batch_dims|private")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        torch._dynamo.graph_break()
        return self.after(hidden)


def test_graph_break(backend: str) -> None:
    """The break's place and reason, the remedy, and the way out by groups."""
    text = refusal(errors.GraphBreakError, lambda: train(Broken(), torch.randn(4, 6), backend=backend))
    says(text, line_of(Broken, "graph_break()"), "graph.break", "group")


def test_break_by_data_dependence(backend: str) -> None:
    class Branches(Broken):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.before(x)
            if hidden.sum() > 0:
                hidden = -hidden
            return self.after(hidden)

    text = refusal(errors.GraphBreakError, lambda: train(Branches(), torch.randn(4, 6), backend=backend))
    says(text, line_of(Branches, "if hidden.sum"), "generic_jump|data.dependent|branch")


class BrokenAtOnce(nn.Module):
    """Breaks before its first operator, so no graph ends at the break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.linear(x)


def test_break_before_any_operator(backend: str) -> None:
    model = Mixing(BrokenAtOnce())
    text = refusal(errors.GraphBreakError, lambda: train(model, torch.randn(4, 6), backend=backend))
    says(text, line_of(BrokenAtOnce, "graph_break()"), "graph_break", "group")


def test_recompile_limit(backend: str) -> None:
    """Past the limit Dynamo quietly runs eager code: the optimizer must refuse what that leaves in ``grad``."""
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=backend, options=OPTIONS, dynamic=False)

    def steps() -> None:
        for batch_size in (4, 5, 6):
            optimizer.zero_grad()
            compiled(torch.randn(batch_size, 6)).square().sum().backward()
            optimizer.step()

    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=False):
        says(refusal(errors.UnprotectedGradientError, steps), "first.weight", "eager|not clipped|unprotected")


def test_unknown_operator(backend: str) -> None:
    """An op without a rule may mix; the error names it and how to give it a rule."""

    @torch.library.custom_op("flashnorm_tests::mystery", mutates_args=())
    def mystery(h: Tensor) -> Tensor:
        return h.clone()

    mystery.register_fake(torch.empty_like)
    mystery.register_autograd(lambda ctx, grad: grad)
    model = Mlp()
    text = refusal(errors.PrivacyError, lambda: train(lambda x: mystery(model(x)), torch.randn(4, 6), backend=backend))
    says(text, "mystery", "register_rule", r"test_refusals\.py")


def _compile(backend: str, options: dict[str, Any] | None) -> None:
    torch.compile(Mlp(), backend=backend, options=options)(torch.randn(4, 6)).sum().backward()


@pytest.mark.parametrize("missing", ["max_grad_norm", "noise_multiplier"])
def test_missing_option(missing: str, backend: str) -> None:
    options = {name: value for name, value in OPTIONS.items() if name != missing}
    text = refusal(errors.OptionsError, lambda: _compile(backend, options))
    says(text, missing, f"FLASHNORM_{missing.upper()}|config|options")


@pytest.mark.parametrize("options", [None, {}], ids=str)
def test_no_options(options: dict[str, Any] | None, backend: str) -> None:
    says(refusal(errors.OptionsError, lambda: _compile(backend, options)), "max_grad_norm", "noise_multiplier")


BAD_VALUES: list[tuple[str, Any]] = [
    *[("max_grad_norm", value) for value in (math.nan, math.inf, -1.0, 0.0, "one", None, True)],
    *[("noise_multiplier", value) for value in (math.nan, math.inf, -0.1, "a little", None)],
    *[("expected_batch_size", value) for value in (0, -4, math.nan, "many")],
    *[("accumulation_steps", value) for value in (0, -1, 1.5)],
    *[("loss_normalizer", value) for value in (0.0, -2.0, math.nan)],
    *[("stability_constant", value) for value in (-0.01, math.nan)],
    *[("clipping", value) for value in ("falt", 3)],
    *[("loss_reduction", value) for value in ("none", "avg")],
    *[("norm_algorithm", value) for value in ("flash gordon", {"*": "ghots"}, 3)],
    *[("batch_dims", value) for value in ("x", {"x": 1.5})],
    *[("seed", value) for value in (0.5, "seed")],
    ("inductor", {"no_such_setting": 1}),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=str)
def test_bad_value(name: str, value: Any, backend: str) -> None:
    """Names the option and what it received; None is the same as not set."""
    text = refusal(errors.OptionsError, lambda: _compile(backend, OPTIONS | {name: value}))
    received = next(iter(value.values())) if isinstance(value, dict) and name != "inductor" else value
    says(text, name, *([] if value is None else ["no_such_setting" if name == "inductor" else re.escape(str(received))]))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("max_grad_norms", "max_grad_norm"), ("noise_multipler", "noise_multiplier"), ("cliping", "clipping")],
)
def test_unknown_option(wrong: str, meant: str, backend: str) -> None:
    """Suggests the nearest known option."""
    says(refusal(errors.OptionsError, lambda: _compile(backend, OPTIONS | {wrong: 1.0})), wrong, rf"\b{meant}\b")


@pytest.mark.parametrize(
    ("wrong", "option", "meant"),
    [("flatt", "clipping", "flat"), ("means", "loss_reduction", "mean"), ("gost", "norm_algorithm", "ghost")],
)
def test_nearest_choice(wrong: str, option: str, meant: str, backend: str) -> None:
    text = refusal(errors.OptionsError, lambda: _compile(backend, OPTIONS | {option: wrong}))
    says(text, option, rf"\b{wrong}\b", rf"\b{meant}\b")


@pytest.mark.parametrize(
    ("groups", "word"),
    [
        ({"first.*": 1.0}, "second"),
        ({"*": 0.5}, r"0\.5|combine"),
        ({"first.*": 0.6, "second.*": -0.8}, r"-0\.8"),
        ({"first.*": 0.6, "second.*": math.nan}, "nan"),
        ({}, "groups"),
        (None, "groups"),
    ],
    ids=str,
)
def test_bad_groups(groups: dict[str, float] | None, word: str, backend: str) -> None:
    """A parameter that no glob matches, norms that do not combine, norms that are no norms."""
    options = OPTIONS | {"clipping": "group"} | ({} if groups is None else {"groups": groups})
    says(refusal(errors.OptionsError, lambda: _compile(backend, options)), "group", word)


def test_groups_without_group_clipping(backend: str) -> None:
    """Group norms that nothing would read are a misunderstanding."""
    says(refusal(errors.OptionsError, lambda: _compile(backend, OPTIONS | {"groups": {"*": 1.0}})), "groups", "clipping")
