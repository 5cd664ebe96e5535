"""The HTML report: complete, self-contained, small, and drawn by a real browser where one is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flashnorm_compile.passes import kernels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.models.gpt import GPT
from flashnorm_compile.cli import main
from flashnorm_compile.html_report import record, report_page
from flashnorm_compile.html_report.nodes import GraphNode
from flashnorm_compile.html_report.page import module_paths
from flashnorm_compile.html_report.plan_table import plan_table, short, total
from flashnorm_compile.html_report.rewriting import MarkedNode, compare

OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 0.8}
VOID = {"meta", "input", "br", "link", "img"}
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


class Page(HTMLParser):
    """The elements of a page with their attributes, the text by element, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.ids: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        for tag, name in self._open:
            self.texts.setdefault(tag, []).append(data)
            if name:
                self.ids[name] = self.ids.get(name, "") + data

    def data(self) -> dict[str, Any]:
        return json.loads(self.ids["data"])


class Tagger(nn.Module):
    """Two blocks of an embedding's width; the head is tied, the loss divides by a count of labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        logits = F.linear(x, self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


def page_of(model: Any, *inputs: Any, title: str = "a model", **options: Any) -> tuple[str, Page]:
    text = report_page(*record(model, inputs, options=OPTIONS | options), title)
    return text, Page(text)


@pytest.fixture(scope="module")
def tagged() -> tuple[str, Page]:
    return page_of(Tagger(), torch.randint(50, (4, 6)), torch.randint(50, (4, 6)), title="Tagger </script><b>")


def test_page_asks_nothing_of_the_network(tagged: tuple[str, Page]) -> None:
    text, page = tagged
    assert not [attrs for _, attrs in page.elements if {"src", "data", "action", "poster", "srcset"} & set(attrs)]
    links = [attrs["href"] for tag, attrs in page.elements if "href" in attrs]
    assert links
    assert all(link is not None and link.startswith("#") for link in links)
    assert not {"link", "iframe", "img", "object", "embed"} & {tag for tag, _ in page.elements}
    assert "url(" not in text
    assert "@import" not in text
    policy = [attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_text_from_the_model_stays_text(tagged: tuple[str, Page]) -> None:
    text, page = tagged
    assert page.texts["h1"] == ["Tagger </script><b>"]
    assert "Tagger </script>" not in text
    assert page.ids["data"].count("<") == 0


def test_plan_has_every_parameter_with_bars(tagged: tuple[str, Page]) -> None:
    _, page = tagged
    plan = page.ids["plan"]
    for name in ("embed.weight", "blocks.*.weight x 2", "blocks.0.weight", "blocks.1.bias", "total of 5 parameters"):
        assert name in plan
    widths = [float(str(attrs["style"])[6:-1]) for tag, attrs in page.elements if tag == "i"]
    assert max(widths) == 100
    assert min(widths) < 100


def test_replacement_is_shown_with_its_line(tagged: tuple[str, Page]) -> None:
    findings = tagged[1].ids["findings"]
    assert "replaced" in findings
    assert "test_html_report.py" in findings
    assert "F.cross_entropy" in findings


def test_graph_holds_every_node_with_type_module_and_mark(tagged: tuple[str, Page]) -> None:
    data = tagged[1].data()
    rows = {row[0]: row for row in data["nodes"]}
    assert len(rows) == len(data["nodes"])

    def where(operator: str, status: int) -> set[str]:
        wanted = [row for row in rows.values() if data["operators"][row[3]].startswith(operator) and row[7] == status]
        return {data["modules"][row[5]] for row in wanted}

    added, removed = 2, 3
    assert where("flashnorm.weighted_sum_noise", added) | where("flashnorm.add_noise", added) == {"embed", "blocks.0", "blocks.1"}
    assert {"blocks.0", "blocks.1"} <= where("aten.mm", removed), "the summed weight gradients are gone"
    assert data["classes"]["blocks.1"] == "Linear"
    assert {"PerSample(dim=0)", "SampleSum", "Public"} <= set(data["kinds"])
    assert any("test_html_report.py" in source and "F.linear" in source for source in data["sources"])
    labels = {row[4] for row in rows.values() if data["operators"][row[3]] == "input"}
    assert {"embed.weight", "blocks.0.bias"} <= labels
    parts = {(data["parts"][row[8]], data["parameters"][row[9]]) for row in rows.values() if row[8] >= 0}
    names = ("embed.weight", *(f"blocks.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")))
    assert {("per-sample norm", name) for name in names} <= parts
    assert {name for part, name in parts if part in ("noise", "clipped sum and noise")} == set(names)
    assert ("clip factors", "") in parts


def test_operators_of_a_gpu_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, stored gradients are summed and noised at once; each part still has its parameter."""
    monkeypatch.setattr(kernels, "fused", lambda *_: True)
    _, page = page_of(Tagger(), torch.randint(50, (4, 6)), torch.randint(50, (4, 6)), norm_algorithm="materialize")
    data = page.data()
    rows = [row for row in data["nodes"] if row[8] >= 0]
    parts = [(data["operators"][row[3]], data["parts"][row[8]], data["parameters"][row[9]]) for row in rows]
    names = {"embed.weight", *(f"blocks.{i}.{kind}" for i in range(2) for kind in ("weight", "bias"))}
    assert {name for operator, part, name in parts if (operator, part) == ("getitem", "clipped sum and noise")} == names
    assert {name for _, part, name in parts if part == "per-sample norm"} == names | {""}
    assert {name for operator, _, name in parts if operator == "flashnorm.weight_grads.default"} == {
        "blocks.0.weight",
        "blocks.1.weight",
    }


def test_report_of_a_refused_model_shows_where_samples_mix() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    _, page = page_of(lambda x: model(x).square().mean(), torch.randn(4, 6))
    assert "Refused." in "".join(page.texts["b"])
    assert "GroupNorm" in page.ids["findings"]
    assert "test_html_report.py" in page.ids["findings"]
    data = page.data()
    mixed = [row for row in data["nodes"] if "Mixed(" in data["kinds"][row[2]]]
    assert {"1"} <= {data["modules"][row[5]] for row in mixed}
    assert not [row for row in data["nodes"] if row[7] != 0], "nothing was rewritten"


def test_report_says_what_was_not_checked() -> None:
    _, page = page_of(nn.Linear(3, 2), torch.randn(4, 3))
    assert "not checked" in page.ids["findings"]
    assert "Compile model and loss together" in page.ids["findings"]


def node(name: str, operator: str, arguments: str = "()") -> GraphNode:
    return GraphNode(name, "", "", operator, arguments)


def test_comparing_graphs_keeps_the_order_of_both() -> None:
    before = [node("a", "input"), node("b", "mm", "(a,)"), node("c", "sum", "(b,)"), node("output", "output", "(c,)")]
    after = [before[0], node("n", "mul", "(a,)"), node("c", "sum", "(n,)"), before[3]]
    marked = compare(before, before, after)
    assert [(entry.node.name, entry.status) for entry in marked] == [
        ("a", "kept"), ("n", "added"), ("b", "removed"), ("c", "changed"), ("output", "kept"),
    ]  # fmt: skip
    assert marked[3].before == before[2]


def test_module_paths_leave_the_outermost_variable_out() -> None:
    def at(module: str, parameter: str = "") -> MarkedNode:
        return MarkedNode(GraphNode("x", "", "", "mm", "()", module=module), "kept", parameter=parameter)

    assert module_paths([at("model"), at("model.a.0"), at("", "a.0.weight"), at("")]) == ["", "a.0", "a.0", ""]
    assert module_paths([at("a.0"), at("", "a.0.weight")]) == ["a.0", "a.0"], "it is part of the parameters' names"
    assert module_paths([at("left.a"), at("right.a")]) == ["left.a", "right.a"]


def test_plan_table_takes_rows_of_other_versions() -> None:
    """Unknown keys are listed, costs that nobody has get no column, sizes may be symbolic."""
    rows = [
        {
            "name": "a.0.w",
            "shape": ["s0", 3],
            "algorithm": "ghost",
            "flops": "2*s0",
            "considered": {"ghost": 1.5, "flash": 2},
            "bytes_held": 0,
        },
        {"name": "a.1.w", "shape": ["s0", 3], "algorithm": "ghost", "flops": 4, "note": "<b>"},
    ]
    text = plan_table(rows)
    page = Page(text)
    assert "a.*.w" in text
    assert "ghost 1.5 us, flash 2 us" in text
    assert "&lt;b&gt;" in text
    assert "held" not in page.texts["th"]
    assert total(rows, "flops") == "2*s0 + 4"
    assert total(rows, "bytes_moved") is None


def test_numbers_are_short() -> None:
    assert [short(value) for value in (0, 999, 12_345, 1.5e9, None)] == ["0", "999", "12.3 k", "1.5 G", "-"]
    assert short(2.5e12, "B") == "2.5 TB"
    assert short(12_345.0, "us") == "12.3 ms"


def gpt2() -> tuple[Any, Tensor, Tensor]:
    """GPT-2 with 124 million parameters: their sizes, without values."""
    model = GPT()
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

    return loss, torch.randint(50257, (8, 1024)), torch.randint(50257, (8, 1024))


@pytest.fixture(scope="module")
def gpt2_page() -> tuple[str, Page]:
    with FakeTensorMode():
        model, *inputs = gpt2()
        return page_of(model, *inputs, title="GPT-2 124M")


def test_page_of_gpt2_is_small_and_lazy(gpt2_page: tuple[str, Page]) -> None:
    """Thousands of nodes are data, not elements: a browser parses a megabyte of text and draws a few hundred elements."""
    text, page = gpt2_page
    assert len(page.data()["nodes"]) > 2000
    assert len(text.encode()) < 1.5e6
    assert len(page.elements) < 2000
    assert "total of 148 parameters" in page.ids["plan"]


def in_browser(text: str, folder: Path, script: str, until: str = "--virtual-time-budget=2000") -> str:
    """The page's elements after ``script`` ran in it, as Chromium writes them out.

    ``until``: when that is. Virtual time ends as soon as all timers have run, but stands still while the browser works.
    """
    path = folder / "report.html"
    path.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", until, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt install chromium")
OPEN = """
const opened = (label) => {
  const all = [...document.querySelectorAll("#tree details")];
  all.find((box) => box.querySelector("summary").textContent.startsWith(label + " ")).open = true;
};
setTimeout(() => { opened("blocks"); setTimeout(() => { opened("3"); setTimeout(() => opened("qkv"), 50); }, 50); }, 50);
"""


@needs_browser
def test_browser_draws_a_module_when_it_is_opened(gpt2_page: tuple[str, Page], tmp_path: Path) -> None:
    text, _ = gpt2_page
    closed = Page(in_browser(text, tmp_path, ""))
    assert "blocks" in closed.ids["tree"]
    assert "aten." not in closed.ids["tree"], "no node is drawn before its module is opened"
    tree = Page(in_browser(text, tmp_path, OPEN)).ids["tree"]
    for shown in (
        "qkv Linear",
        "aten.addmm.default",
        "PerSample(dim=0, inner=1024)",
        "added: clipped sum and noise of blocks.3.qkv.weight",
    ):
        assert shown in tree
    assert tree.count("flashnorm.weighted_sum_noise") == 2, "weight and bias of this one layer"


@needs_browser
def test_browser_loads_gpt2_in_two_seconds(gpt2_page: tuple[str, Page], tmp_path: Path) -> None:
    """By the clock, from the start of the navigation until the tree of modules is drawn and laid out."""
    loaded = """
    addEventListener("load", () => {
      const height = document.body.getBoundingClientRect().height;
      document.getElementById("found").textContent = height > 500 ? performance.now() : "not laid out";
    });
    """
    milliseconds = float(Page(in_browser(gpt2_page[0], tmp_path, loaded, "--timeout=10000")).ids["found"])
    assert 0 < milliseconds < 2000


@needs_browser
def test_browser_finds_nodes(gpt2_page: tuple[str, Page], tmp_path: Path) -> None:
    script = """
    const field = document.getElementById("search");
    field.value = "FLASHNORM.RELEASE"; field.dispatchEvent(new Event("input"));
    """
    found = Page(in_browser(gpt2_page[0], tmp_path, script)).ids["found"]
    assert "found 1" in found
    assert "flashnorm.release.default" in found


@needs_browser
def test_browser_opens_the_way_to_mixed_samples(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    text, _ = page_of(lambda x: model(x).square().mean(), torch.randn(4, 6))
    tree = Page(in_browser(text, tmp_path, "")).ids["tree"]
    assert tree.count("Mixed(by var_mean: var_mean is taken over the samples)") == 1, "told once"
    assert tree.count("Mixed(by var_mean)") > 5


def test_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "factory_of_the_report_test.py").write_text(
        "import torch\n\ndef make():\n    m = torch.nn.Linear(4, 3)\n    return lambda x: m(x).square().mean(), torch.randn(5, 4)\n"
    )
    target = tmp_path / "report.html"
    options = [argument for name, value in OPTIONS.items() for argument in ("-o", f"{name}={value}")]
    assert main(["explain", f"{tmp_path / 'factory_of_the_report_test.py'}:make", "--html", str(target), *options]) == 0
    assert str(target) in capsys.readouterr().out
    assert len(Page(target.read_text()).data()["nodes"]) > 10
