"""What people see: the report, the dumped graphs, the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashnorm_compile

OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 0.8}


class Tagger(nn.Module):
    """Embedding, layer, head tied to the embedding; token loss with ignored labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(torch.tanh(self.layer(self.embed(ids))), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(50, (4, 6)), torch.randint(50, (4, 6))


def test_report_names_every_parameter() -> None:
    report = flashnorm_compile.explain(Tagger(), *batch(), options=OPTIONS).to_dict()
    rows = {row["name"]: row for row in report["parameters"]}
    assert set(rows) == {"embed.weight", "layer.weight", "layer.bias"}
    assert rows["embed.weight"]["uses"] == 2
    assert rows["embed.weight"]["frontier"] == "matmul + rows"
    assert all(row["algorithm"] in ("ghost", "materialize", "flash") and row["why"] for row in rows.values())
    assert report["refused"] is None
    assert report["loss_inside"]
    assert "cross_entropy" in report["replaced"][0]
    assert report["totals"]["bytes_moved"] == sum(row["bytes_moved"] for row in report["parameters"]) > 0
    json.dumps(report)


def test_report_prints_as_a_table() -> None:
    text = str(flashnorm_compile.explain(Tagger(), *batch(), options=OPTIONS))
    for word in ("embed.weight", "layer.bias", "total", "at most 1 (L2)", "N(0, 0.8^2)", "replaced"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 150 or "replaced" in text


def test_report_says_what_a_loss_outside_means() -> None:
    report = flashnorm_compile.explain(nn.Linear(3, 2), torch.randn(4, 3), options=OPTIONS)
    assert not report.loss_inside
    assert "Compile model and loss together" in str(report)


def test_report_of_a_refused_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    report = flashnorm_compile.explain(model, torch.randn(4, 3), options=OPTIONS)
    assert report.refused is not None
    assert "GroupNorm" in str(report)
    assert "BatchNorm1d" in report.to_dict()["refused"]


def test_report_of_a_graph_break() -> None:
    def broken(model: nn.Module, x: Tensor) -> Tensor:
        hidden = model(x)
        torch._dynamo.graph_break()
        return hidden.square().mean()

    model = nn.Linear(3, 2)
    report = flashnorm_compile.explain(lambda x: broken(model, x), torch.randn(4, 3), options=OPTIONS)
    assert "test_explain.py" in report.to_dict()["graph_break"]
    assert "only the first graph" in str(report)


def test_explaining_changes_nothing() -> None:
    """Neither compiled nor protected: an ordinary training step still works afterwards."""
    model = nn.Linear(3, 2)
    flashnorm_compile.explain(model, torch.randn(4, 3), options=OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


def test_dynamic_sizes_are_shown_as_symbols() -> None:
    ids, labels = batch()
    torch._dynamo.mark_dynamic(ids, 0)
    torch._dynamo.mark_dynamic(labels, 0)
    report = flashnorm_compile.explain(Tagger(), ids, labels, options=OPTIONS).to_dict()
    assert not report["batch"].isdigit()
    assert any(isinstance(row["bytes_held"], str) for row in report["parameters"])


def test_nothing_to_explain() -> None:
    with pytest.raises(ValueError, match="nothing to explain"):
        flashnorm_compile.explain(lambda x: x * 2, torch.randn(3), options=OPTIONS)


def test_dump_writes_graphs_and_plan(tmp_path: Path, backend: str) -> None:
    with flashnorm_compile.config.patch(dump=str(tmp_path)):
        torch.compile(Tagger(), backend=backend, options=OPTIONS)(*batch()).backward()
    kinds = {path.name.split("_", 2)[-1] for path in tmp_path.glob("joint_*.txt")}
    assert kinds == {"before.txt", "typed.txt", "after.txt"}
    typed = next(tmp_path.glob("joint_*_typed.txt")).read_text()
    assert "PerSample(dim=0)" in typed
    assert "SampleSum" in typed
    assert "flashnorm.add_noise" in next(tmp_path.glob("joint_*_after.txt")).read_text()
    plan = json.loads(next(tmp_path.glob("plan_*.json")).read_text())
    assert len(plan["parameters"]) == 3
