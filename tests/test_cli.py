"""``python -m flashnorm_compile``: each command from its arguments to its output, and what it says about mistakes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashnorm_compile
from flashnorm_compile.cli import main

OPTIONS = ["-o", "max_grad_norm=1", "-o", "noise_multiplier=0.8"]
FACTORIES = """
import torch
from torch import nn

def linear():
    model = nn.Linear(6, 3)
    return lambda x: model(x).square().mean(), torch.randn(4, 6)

def by_keyword():
    model = nn.Linear(6, 3)
    return lambda x, *, scale: (model(x) * scale).square().mean(), torch.randn(4, 6), {"scale": torch.ones(4, 3)}

def batch_norm():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    return lambda x: model(x).square().mean(), torch.randn(4, 6)

def huge():
    model = nn.Linear(2**20, 2**20)  # 4 TiB of weights
    return lambda x: model(x).square().mean(), torch.randn(4, 2**20)

def reads_values():
    model = nn.Linear(6, 3)
    x = torch.randn(4, 6)
    return lambda x: model(x).square().mean(), x * x.sum().item()

def no_parameters():
    return lambda x: x.square().mean(), torch.randn(4, 6)

def only_a_model():
    return nn.Linear(6, 3)

number = 3
"""


class Tagger(nn.Module):
    """Token loss with ignored labels: the count of labels is replaced, the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(torch.tanh(self.layer(self.embed(ids))), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    path = tmp_path / "factories_of_the_cli_test.py"
    path.write_text(FACTORIES)
    return path


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    return code, *capsys.readouterr()


def number_in(text: str, name: str) -> float:
    found = re.search(rf"^{name} = (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def test_runs_as_a_module(factories: Path) -> None:
    """One call of the real command, from another folder."""
    command = [sys.executable, "-m", "flashnorm_compile", "explain", f"{factories.stem}:linear", *OPTIONS]
    environment = {**os.environ, "PYTHONPATH": str(factories.parent)}
    done = subprocess.run(command, cwd=factories.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "private gradients of 2 parameters" in done.stdout
    assert "N(0, 0.8^2)" in done.stdout


@pytest.mark.parametrize("command", [[], ["budget"], ["explain"], ["diff"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "python -m flashnorm_compile" in capsys.readouterr().out


SETTING = ("--delta", "1e-5", "--batch-size", "64", "--dataset-size", "8000")


def test_budget_computes_whichever_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """The three questions about one training agree with each other; by RDP, which answers at once."""
    setting = (*SETTING, "--accountant", "rdp")
    _, text, _ = call(capsys, "budget", "--epsilon", 2, "--steps", 300, *setting)
    noise = number_in(text, "noise_multiplier")
    assert "Poisson draws at rate 0.008" in text
    assert "RDP of dp-accounting" in text
    _, text, _ = call(capsys, "budget", "--noise-multiplier", noise, "--steps", 300, *setting)
    epsilon = number_in(text, "epsilon")
    assert 1.9 < epsilon <= 2
    _, text, _ = call(capsys, "budget", "--noise-multiplier", noise, "--epsilon", epsilon, *setting)
    assert number_in(text, "steps") >= 300
    _, text, _ = call(capsys, "budget", "--noise-multiplier", noise, "--steps", 300, *SETTING)
    assert "PLD of dp-accounting" in text
    assert 1 < number_in(text, "epsilon") < epsilon


def test_budget_credits_an_unknown_sampler_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = call(capsys, "budget", "--noise-multiplier", 5, "--steps", 10, "--delta", "1e-5", "--unknown-sampler")
    unamplified = number_in(text, "epsilon")
    assert unamplified == pytest.approx(
        flashnorm_compile.accounting.planned_epsilon(noise_multiplier=5, steps=10, delta=1e-5, sample_rate=None)
    )
    assert "unknown sampler" in text


def test_budget_never_prints_less_than_is_spent(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = call(capsys, "budget", "--noise-multiplier", 5, "--steps", 10, "--delta", "1e-5", "--unknown-sampler")
    shown = re.search(r"spend epsilon = (\S+)", text)
    assert shown is not None
    assert float(shown[1]) >= number_in(text, "epsilon")


@pytest.mark.parametrize(("noise", "delta"), [("1e-300", "1e-5"), ("1", "1e-300")])
def test_budget_of_next_to_no_noise_is_infinite(noise: str, delta: str, capsys: pytest.CaptureFixture[str]) -> None:
    call_text = ("budget", "--noise-multiplier", noise, "--delta", delta, "--steps", 10, "--sample-rate", 0.1)
    code, text, _ = call(capsys, *call_text)
    assert code == 0
    assert number_in(text, "epsilon") == float("inf")
    assert "spend epsilon = infinite (no privacy) at" in text


def test_budget_with_any_amount_of_noise(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = call(capsys, "budget", "--noise-multiplier", "1e300", "--delta", "1e-5", "--steps", 10, "--sample-rate", 0.1)
    assert 0 <= number_in(text, "epsilon") < 1e-4


def test_a_pipe_that_closes_is_no_error(dumped: Path) -> None:
    command = [sys.executable, "-m", "flashnorm_compile", "diff", str(dumped), "--full", "--context", "999"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""


def test_budget_warns_of_a_large_delta(capsys: pytest.CaptureFixture[str]) -> None:
    setting = ("--delta", 0.01, "--batch-size", 64, "--dataset-size", 8000)
    _, text, _ = call(capsys, "budget", "--noise-multiplier", 2, "--steps", 10, *setting)
    assert "Warning: delta is above 1 / dataset_size" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epsilon", "2"], "give exactly two of --epsilon, --noise-multiplier, --steps; got --epsilon"),
        (["--epsilon", "2", "--steps", "3", "--noise-multiplier", "1"], "give exactly two"),
        (["--epsilon", "2", "--steps", "3"], "say how batches are drawn, in exactly one way"),
        (["--epsilon", "2", "--steps", "3", "--unknown-sampler", "--sample-rate", "0.1"], "in exactly one way"),
        (["--epsilon", "2", "--steps", "3", "--batch-size", "8"], "needs --dataset-size N with 0 < L <= N; got none"),
        (["--epsilon", "2", "--steps", "3", "--batch-size", "8", "--dataset-size", "4"], "0 < L <= N; got 4"),
        (["--epsilon", "nan", "--steps", "3", "--unknown-sampler"], "--epsilon must be a number > 0; got nan"),
        (["--epsilon", "2", "--steps", "0", "--unknown-sampler"], "--steps must be an integer >= 1"),
        (["--epsilon", "2", "--steps", "10000001", "--unknown-sampler"], "--steps must be an integer >= 1 and <= 10,000,000"),
        (["--epsilon", "2", "--steps", "3", "--batch-size", "nan", "--dataset-size", "9"], "0 < L <= N; got 9"),
        (
            ["--epsilon", "1", "--noise-multiplier", "1e5", "--sample-rate", "1e-6", "--accountant", "rdp"],
            "More than 10,000,000 steps fit",
        ),
        (["--noise-multiplier", "0", "--steps", "3", "--unknown-sampler"], "without noise epsilon is infinite"),
        (["--epsilon", "2", "--steps", "3", "--sample-rate", "1.5"], "--sample-rate must be a probability, > 0 and <= 1; got 1.5"),
        (["--epsilon", "2", "--steps", "3", "--sample-rate", "0.1", "--truncated-batch-size", "9"], "dataset_size"),
    ],
)
def test_budget_says_what_is_wrong(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = call(capsys, "budget", "--delta", "1e-5", *argv)
    assert code == 2
    assert message in error
    assert not out


def test_explain_takes_a_file_and_keywords(factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = call(capsys, "explain", f"{factories}:by_keyword", *OPTIONS, "-o", "clipping=per_layer")
    assert code == 0
    assert "clipping: per_layer" in text
    assert "weight" in text


def test_explain_takes_no_memory_for_the_model(factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = call(capsys, "explain", f"{factories}:huge", *OPTIONS)
    assert code == 0
    assert "1048576x1048576" in text


def test_explain_with_values(factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="_local_scalar_dense"):
        main(["explain", f"{factories}:reads_values", *OPTIONS])
    assert "run this again with --real" in capsys.readouterr().err
    assert call(capsys, "explain", f"{factories}:reads_values", "--real", *OPTIONS)[0] == 0


def test_explain_of_a_refused_model(factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = call(capsys, "explain", f"{factories}:batch_norm", *OPTIONS)
    assert code == 1
    assert "REFUSED" in text
    assert "GroupNorm" in text
    assert "TORCHDYNAMO_VERBOSE" not in text


def test_explain_takes_options_from_the_config(factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with flashnorm_compile.config.patch(max_grad_norm=3.0, noise_multiplier=2.0):
        code, text, _ = call(capsys, "explain", f"{factories}:linear")
    assert code == 0
    assert "at most 3 (L2)" in text


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "the model is given as MODULE:FACTORY"),
        ("no_such_module:linear", "there is no module 'no_such_module'"),
        ("no/such/file.py:linear", "there is no file no/such/file.py"),
        ("FILE:liner", "has no function 'liner'; did you mean 'linear'?"),
        ("FILE:number", "is a int. Name a function without arguments"),
        ("FILE:only_a_model", "must return (model, *inputs)"),
        ("FILE:no_parameters", "parameters that require gradients"),
    ],
)
def test_explain_says_what_is_wrong(target: str, message: str, factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = call(capsys, "explain", target.replace("FILE", str(factories)), *OPTIONS)
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Missing: max_grad_norm and noise_multiplier"),
        (["-o", "max_grad_norm"], "--option takes NAME=VALUE"),
        ([*OPTIONS, "-o", "cliping=flat"], "did you mean 'clipping'"),
        ([*OPTIONS, "--html", "/no/such/folder/report.html"], "cannot be written: No such file or directory"),
    ],
)
def test_explain_says_which_option_is_wrong(
    argv: list[str], message: str, factories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = call(capsys, "explain", f"{factories}:linear", *argv)
    assert code == 2
    assert message in error


def test_an_error_inside_the_module_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "imports_what_is_not_there.py").write_text("import no_such_package_of_the_cli_test")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_the_cli_test"):
        main(["explain", f"{tmp_path / 'imports_what_is_not_there.py'}:f", *OPTIONS])


@pytest.fixture
def dumped(tmp_path: Path, backend: str) -> Path:
    """Two graphs: one that was rewritten, one that was refused."""
    folder = tmp_path / "dump"
    options = {"max_grad_norm": 1.0, "noise_multiplier": 0.8}
    with flashnorm_compile.config.patch(dump=str(folder)):
        torch.compile(Tagger(), backend=backend, options=options)(torch.randint(50, (4, 6)), torch.randint(50, (4, 6)))
        model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
        with pytest.raises(flashnorm_compile.SampleMixingError):
            torch.compile(model, backend=backend, options=options)(torch.randn(4, 6))
    return folder


def graph_numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in folder.glob("joint_*_before.txt"))


def test_diff_marks_what_was_rewritten(dumped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, _ = graph_numbers(dumped)
    code, text, _ = call(capsys, "diff", dumped, "--graph", private)
    assert code == 0
    lines = text.splitlines()
    assert f"graph {private}: batch size 4" in lines[0]
    for name in ("embed.weight", "layer.weight", "layer.bias"):
        assert f"# per-sample norm of {name}" in lines
        apart = {f"# clipped sum of {name}", f"# noise of {name}"} <= set(lines)
        assert apart != (f"# clipped sum and noise of {name}" in lines)
    added = [line for line in lines if line.startswith("+ ")]
    removed = [line for line in lines if line.startswith("- ")]
    assert sum("flashnorm.add_noise" in line or "flashnorm.weighted_sum_noise" in line for line in added) == 3
    assert sum("flashnorm.release" in line for line in added) == 1
    assert any("SampleSum = aten.mm" in line for line in removed), "the summed gradient is gone"
    after = (dumped / f"joint_{private}_after.txt").read_text().splitlines()
    before = (dumped / f"joint_{private}_before.txt").read_text().splitlines()
    assert len(before) - len(removed) + len(added) == len(after)


def test_diff_hunks_count_their_lines(dumped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers of each hunk's head fit its lines and the files."""
    private, _ = graph_numbers(dumped)
    _, text, _ = call(capsys, "diff", dumped, "--graph", private, "--context", 1, "--full")
    names = [line.split()[0] for line in (dumped / f"joint_{private}_after.txt").read_text().splitlines()]
    hunks = re.split(r"^@@ -(\d+),(\d+) \+(\d+),(\d+) @@.*\n", text, flags=re.MULTILINE)[1:]
    assert len(hunks) % 5 == 0
    for position in range(0, len(hunks), 5):
        _, old, start, new = map(int, hunks[position : position + 4])
        lines = [line for line in hunks[position + 4].splitlines() if not line.startswith("#")]
        assert sum(line[0] in " -" for line in lines) == old
        shown = [line[2:].split()[0] for line in lines if line[0] in " +"]
        assert shown == names[start - 1 : start - 1 + new]


def test_diff_of_a_refused_graph(dumped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, refused = graph_numbers(dumped)
    code, text, _ = call(capsys, "diff", dumped)
    assert code == 1
    assert f"graph {refused}: refused, nothing was rewritten" in text
    assert "var_mean is taken over the samples" in text


def test_diff_says_what_is_wrong(dumped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    for stage in ("before", "typed", "after"):
        (broken / f"joint_0_{stage}.txt").write_text("nonsense\n")
    torn, number = tmp_path / "torn", graph_numbers(dumped)[0]
    shutil.copytree(dumped, torn)
    (torn / f"plan_{number}.json").write_text('{"batch": "4", "para')
    for argv, message in (
        ([tmp_path / "missing"], "there is no folder"),
        ([tmp_path / "empty"], "holds no graph"),
        ([dumped, "--graph", 99999], "--graph 99999:"),
        ([dumped, "--context", -1], "--context must be >= 0; got -1"),
        ([broken], "line 1 is not a node as FLASHNORM_DUMP writes it: 'nonsense'"),
        ([torn], f"plan_{number}.json is not a plan as FLASHNORM_DUMP writes it"),
    ):
        code, _, error = call(capsys, "diff", *argv)
        assert code == 2
        assert message in error
