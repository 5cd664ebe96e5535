"""Loops without a library's Trainer: plain PyTorch, and loops that can only name the backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_steps import assert_steps, clipping_options, recorded_steps
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples import compile_by_name, plain_loop, privacy_log
from flashnorm_compile import GraphBreakError, OptionsError, PrivacyError, UnprotectedGradientError, config, privacy
from flashnorm_compile.integrations import load_config
from flashnorm_compile.integrations.watch import Accounting, Watch, check_optimizer

ROOT = Path(__file__).resolve().parent.parent
N = 6


# Plain PyTorch.


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def records() -> TensorDataset:
    return TensorDataset(torch.randn(N, 5), torch.randint(3, (N,)))


def record_loss(data: TensorDataset) -> Any:
    x, y = data.tensors[0].double(), data.tensors[1]
    return lambda twin, b: F.cross_entropy(twin(x[b : b + 1]), y[b : b + 1])


def test_plain_loop(backend: str) -> None:
    """Every record in every draw (rate 1), in physical batches of 4, two of them padding."""
    model, data = classifier(), records()
    options = clipping_options(model, record_loss(data), N)
    with recorded_steps(model) as steps:
        plain_loop.train(model, data, options, backend, sample_rate=1.0, physical_batch_size=4, steps=3)
    assert_steps(steps, 3, record_loss(data), N, options)
    assert privacy(model).steps == 3
    assert privacy(model).account.history.micro_batches == 6


def test_plain_loop_with_its_own_clipping(backend: str) -> None:
    model = classifier()
    x, y = records().tensors
    loss = torch.compile(
        lambda x, y: F.cross_entropy(model(x), y, reduction="none").mean(), backend=backend, options=plain_loop.OPTIONS
    )
    loss(x, y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(
        UnprotectedGradientError, match=r"0\.weight: p\.grad was written or changed outside backward.*clip_grad_norm_"
    ):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_plain_loop_with_a_parameter_outside(backend: str) -> None:
    model, temperature = classifier(), nn.Parameter(torch.ones(()))
    x, y = records().tensors
    compiled = torch.compile(model, backend=backend, options=plain_loop.OPTIONS)
    (F.cross_entropy(compiled(x) * temperature, y)).backward()
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    with pytest.raises(UnprotectedGradientError, match=r"group 0, parameter 4, shape \(\): it belongs to no private graph"):
        optimizer.step()


def test_plain_loop_that_steps_within_a_draw(backend: str) -> None:
    """The loop forgets ``batch_complete``: half of the draw has no noise yet."""
    model, data = classifier(), records()
    loss = torch.compile(
        lambda x, y, mask: (F.cross_entropy(model(x), y, reduction="none") * mask).mean(),
        backend=backend,
        options=plain_loop.OPTIONS,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y, mask = next(iter(plain_loop.private_dataloader(data, privacy(model), sample_rate=1.0, physical_batch_size=4)))
    with privacy(model).accumulate():
        loss(x, y, mask).backward()
    with pytest.raises(UnprotectedGradientError, match="the last backward pass added no noise"):
        optimizer.step()


def test_epsilon_is_shown_while_it_is_spent(backend: str, tmp_path: Path) -> None:
    """In the progress line, which is a bound, and as scalars by PyTorch's own TensorBoard writer."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, data = classifier(), records()
    log = privacy_log.ScalarLog(tmp_path)
    shown = []
    for _ in range(2):
        plain_loop.train(model, data, plain_loop.OPTIONS, backend, sample_rate=0.5, physical_batch_size=N, steps=2, seed=1)
        log.add({"loss": 1.5}, privacy(model).steps)
        log.add_epsilon(privacy(model))
        shown.append(float(privacy_log.epsilon_text(privacy(model)).removeprefix("epsilon < ")))
    log.close()
    assert privacy(model).epsilon(1e-5) <= shown[1]
    assert shown[0] < shown[1]
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 1.5), (4, 1.5)]
    written = events.Scalars("privacy/epsilon")
    assert [event.step for event in written] == [2, 4]
    assert written[1].value == pytest.approx(privacy(model).epsilon(1e-5, accountant="rdp"), rel=1e-6)


# Loops that can only name the backend.


def token_loss(tokens: Tensor) -> Any:
    return lambda twin, b: F.cross_entropy(twin(tokens[b : b + 1, :-1]).transpose(1, 2), tokens[b : b + 1, 1:])


def token_problem(clipping: str, **changes: Any) -> tuple[compile_by_name.TokenModel, Tensor, dict[str, Any]]:
    model, tokens = compile_by_name.TokenModel(vocabulary=11, width=4), torch.randint(11, (N, 5))
    return model, tokens, clipping_options(model, token_loss(tokens), N, clipping, **changes)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_whole_model_by_name(clipping: str, backend: str) -> None:
    model, tokens, options = token_problem(clipping)
    with config.patch(**options), recorded_steps(model) as steps:
        model.compile(backend=backend)
        compile_by_name.train(model, tokens, steps=2)
    assert_steps(steps, 2, token_loss(tokens), N, options)


def test_blocks_by_name(backend: str) -> None:
    """The same gradients as from one graph: all blocks share one budget, and no block repeats another's."""
    model, tokens, options = token_problem("per_layer")
    with config.patch(**options), recorded_steps(model) as steps:
        state = privacy(model)
        compile_by_name.compile_blocks(model, backend)
        compile_by_name.train(model, tokens, steps=2)
    assert_steps(steps, 2, token_loss(tokens), N, options)
    assert state.steps == 2


def test_blocks_with_groups(backend: str) -> None:
    """A group for each graph; the norms combine to ``max_grad_norm``."""
    model, tokens, options = token_problem("group", groups=("embedding.*", "blocks.0.*", "blocks.1.*", "head.*"))
    with config.patch(**options), recorded_steps(model) as steps:
        privacy(model)
        compile_by_name.compile_blocks(model, backend)
        compile_by_name.train(model, tokens, steps=2)
    assert_steps(steps, 2, token_loss(tokens), N, options)


def test_blocks_with_a_group_over_two_graphs_are_refused(backend: str) -> None:
    model, tokens, _ = token_problem("flat")
    groups = {"blocks.*": 0.3, "*": 0.4}
    with config.patch(max_grad_norm=0.5, noise_multiplier=0.0, clipping="group", groups=groups):
        privacy(model)
        compile_by_name.compile_blocks(model, backend)
        with pytest.raises(GraphBreakError, match="One backward pass reached two private graphs"):
            compile_by_name.train(model, tokens, steps=1)


def test_blocks_with_flat_clipping_are_refused(backend: str) -> None:
    model, tokens, options = token_problem("flat")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with config.patch(**options):
        privacy(model)
        compile_by_name.compile_blocks(model, backend)
        with pytest.raises(GraphBreakError, match=r"(?s)reached two private graphs.*use clipping='per_layer' or 'group' and call "):
            compile_by_name.train(model, tokens, steps=1)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_blocks_without_a_common_state_are_refused(backend: str) -> None:
    model, tokens, options = token_problem("per_layer")
    with config.patch(**options):
        compile_by_name.compile_blocks(model, backend)
        with pytest.raises(GraphBreakError, match=r"call flashnorm_compile\.privacy\(model\) before the first step"):
            compile_by_name.train(model, tokens, steps=1)


def test_a_part_that_was_not_compiled_is_refused(backend: str) -> None:
    """torchtitan compiles its blocks only: embedding and head stay outside."""
    model, tokens, options = token_problem("per_layer")
    with config.patch(**options):
        privacy(model)
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
        with pytest.raises(UnprotectedGradientError, match=r"embedding\.weight: it belongs to no private graph(?s:.*)head\.weight"):
            compile_by_name.train(model, tokens, steps=1)


def test_a_name_without_options_is_refused(backend: str) -> None:
    model, tokens, _ = token_problem("flat")
    model.compile(backend=backend)
    with pytest.raises(OptionsError, match="FLASHNORM_MAX_GRAD_NORM and FLASHNORM_NOISE_MULTIPLIER"):
        compile_by_name.train(model, tokens, steps=1)


def test_example_runs_on_environment_variables() -> None:
    environment = {
        **os.environ,
        "FLASHNORM_MAX_GRAD_NORM": "1",
        "FLASHNORM_NOISE_MULTIPLIER": "1.25",
        "FLASHNORM_CLIPPING": "per_layer",
    }
    command = [sys.executable, "-m", "examples.compile_by_name", "--torchcompile", "flashnorm_eager", "--per-block"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "5 releases of clipped gradient sums (per_layer clipping" in done.stdout
    assert "noise multiplier 1.25." in done.stdout


# TOML.


@pytest.fixture
def _config_restored() -> Any:
    with config.patch(max_grad_norm=None):
        yield


@pytest.mark.usefixtures("_config_restored")
def test_options_from_toml(tmp_path: Path) -> None:
    names = ("max_grad_norm", "noise_multiplier", "clipping", "groups", "dump")
    with config.patch({name: getattr(config, name) for name in names}):
        path = tmp_path / "train.toml"
        path.write_text(
            '[model]\nlayers = 2\n[flashnorm]\nmax_grad_norm = 5\nnoise_multiplier = 0.8\nclipping = "group"\ndump = "graphs"\n'
            'groups = {"embed.*" = 3.0, "*" = 4.0}\n'
        )
        values = load_config(path)
        assert values == {
            "max_grad_norm": 5.0,
            "noise_multiplier": 0.8,
            "clipping": "group",
            "groups": {"embed.*": 3.0, "*": 4.0},
            "dump": "graphs",
        }
        assert {name: getattr(config, name) for name in names} == values


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[training]\nsteps = 3", r"train\.toml has no table \[flashnorm\]\. Its tables: training\."),
        (
            "[flashnorm]\nmax_gradnorm = 1.0",
            r"\[flashnorm\] of .*train\.toml: Unknown option 'max_gradnorm' \(did you mean 'max_grad_norm'",
        ),
        ("[flashnorm]\nmax_grad_norm = 1.0\nnoise_multiplier = -1", r"noise_multiplier must be a finite number >= 0; got -1"),
        ("[flashnorm]\nmax_grad_norm = 1.0", r"Missing: noise_multiplier"),
        ("[flashnorm]\nmax_grad_norm = nan\nnoise_multiplier = 1", r"max_grad_norm must be a finite number > 0; got nan"),
        ("[flashnorm\nmax_grad_norm = 1.0", r"train\.toml is not a TOML file: "),
    ],
)
def test_wrong_toml_is_refused_and_sets_nothing(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(OptionsError, match=match):
        load_config(path)
    assert config.max_grad_norm is None


def test_the_example_file_is_valid() -> None:
    with config.patch(max_grad_norm=None, noise_multiplier=None, clipping="flat"):
        assert load_config(ROOT / "examples/compile_by_name.toml")["clipping"] == "per_layer"


# What the callbacks share.


class Unhooked:
    """An optimizer that is none of torch's."""


def test_an_optimizer_without_hooks_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"Unhooked does not run the hooks of torch\.optim\.Optimizer\.step"):
        check_optimizer(Unhooked())
    check_optimizer(torch.optim.AdamW(classifier().parameters()))


def test_a_resumed_run_without_its_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="resumes behind step 3, but only 0 releases are recorded"):
        Watch(privacy(classifier()), Accounting(1e-5, ledger=tmp_path / "new.jsonl")).begin(3)
