"""Classifiers against the physical batch size.

Timed is one physical step of a fixed size. Under Poisson sampling a logical batch is a sum over as many such steps as it
needs, the last one filled up with masked samples (Rodriguez Beltran et al. 2024), so its time is their number
times this one. The optimizer's part of it, which is counted in every physical step here, is then counted too often.

The class token and the positions of a ViT are parameters of no layer, so that methods with a rule for each layer cannot
train them. They are frozen for everybody, except in the cases named "raw".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.case import Case, Problem, Stack, Suite
from benchmarks.models.bert import BERT
from benchmarks.models.resnet import BiT
from benchmarks.models.vit import ViT
from benchmarks.suites.problems import EVERYBODY, HOOKS, ONE_OF_EACH, OURS, image_classes, text_classes

FROZEN = "class token and positions frozen"
TRAINED = "class token and positions trained"
BERT_TOKENS = 128


@dataclass(frozen=True)
class Architecture:
    """A model whose physical batch size is varied. `problem(layers, batch)` makes it with so many blocks."""

    description: str
    layers: int
    problem: Callable[[int, int], Problem]


def _vit(width: int, heads: int) -> Callable[[int, int], Problem]:
    return lambda layers, batch: image_classes(ViT(width, layers, heads), batch, 224, 1000)


def _bit(*stages: int) -> Callable[[int, int], Problem]:
    """All stages, or with less than their blocks two short ones, which hold every kind of block: a first one of a stage with and
    without a stride, and one of those that repeat."""

    def problem(layers: int, batch: int) -> Problem:
        return image_classes(BiT(stages if layers >= max(stages) else (2, 1)), batch, 224, 1000)

    return problem


def _bert(layers: int, batch: int) -> Problem:
    return text_classes(BERT(layers=layers), 30522, batch, BERT_TOKENS, 2)


ARCHITECTURES: Mapping[str, Architecture] = {
    "vit-ti": Architecture(f"ViT-Ti/16 at 224 px, {FROZEN}", 12, _vit(192, 3)),
    "vit-s": Architecture(f"ViT-S/16 at 224 px, {FROZEN}", 12, _vit(384, 6)),
    "vit-b": Architecture(f"ViT-B/16 at 224 px, {FROZEN}", 12, _vit(768, 12)),
    "vit-l": Architecture(f"ViT-L/16 at 224 px, {FROZEN}", 24, _vit(1024, 16)),
    "r50x1": Architecture("BiT R50x1 (GroupNorm, weight standardization) at 224 px", 6, _bit(3, 4, 6, 3)),
    "r101x1": Architecture("BiT R101x1 (GroupNorm, weight standardization) at 224 px", 23, _bit(3, 4, 23, 3)),
    "bert": Architecture(f"BERT-base, {BERT_TOKENS} tokens, 2 classes", 12, _bert),
}
"""What the paper sizes and the search for the largest physical batch run over."""


def _paper_case(
    name: str,
    batch: int,
    contenders: tuple[str, ...],
    *,
    precisions: tuple[str, ...] = ("bfloat16",),
    headline: bool = False,
    like: str | None = None,
) -> Case:
    architecture = ARCHITECTURES[name]
    return Case(
        name=f"{name}-b{batch}",
        description=f"{architecture.description}, B {batch}",
        build=Stack(architecture.layers, lambda layers: architecture.problem(layers, batch)),
        point={"B": batch},
        precisions=precisions,
        headline=headline,
        like=like,
        contenders=contenders,
    )


def _paper_raw() -> Case:
    return Case(
        name="vit-b-raw-b64",
        description=f"ViT-B/16 at 224 px, {TRAINED}, B 64",
        build=Stack(12, lambda layers: image_classes(ViT(768, layers, 12, train_raw=True), 64, 224, 1000)),
        point={"B": 64},
        precisions=("bfloat16",),
        contenders=(*OURS, "opacus"),
    )


def _small_vit(train_raw: bool) -> Problem:
    model = ViT(width=192, layers=3, heads=3, pixels=64, classes=100, train_raw=train_raw)
    return image_classes(model, 16, 64, 100)


def _small_resnet() -> Problem:
    model = BiT(stages=(1, 1), width=32, classes=10, standardized=False, groups=8)
    return image_classes(model, 16, 64, 10)


def _small_bert() -> Problem:
    model = BERT(vocabulary=1024, width=128, layers=2, heads=2, context=64)
    return text_classes(model, 1024, 8, 64, 2)


SUITE = Suite(
    name="vision",
    title="Classifiers against physical batch size",
    small=(
        Case(
            "vit",
            f"ViT-like, d 192, 3 layers, 3 heads, 17 tokens, 100 classes, {FROZEN}, B 16",
            lambda: _small_vit(train_raw=False),
            {"B": 16},
            contenders=EVERYBODY,
        ),
        Case(
            "vit-raw",
            f"the same ViT, {TRAINED}",
            lambda: _small_vit(train_raw=True),
            {"B": 16},
            contenders=ONE_OF_EACH,
        ),
        Case(
            "resnet-gn",
            "pre-activation bottleneck ResNet with GroupNorm, width 32, 2 stages of 1 block, 64 x 64 pixels, B 16",
            _small_resnet,
            {"B": 16},
            contenders=EVERYBODY,
        ),
        Case(
            "bert",
            "BERT-like, d 128, 2 layers, 2 heads, vocabulary 1024, 64 tokens, B 8",
            _small_bert,
            {"B": 8},
            contenders=EVERYBODY,
        ),
    ),
    paper=(
        _paper_case("vit-b", 64, (*HOOKS, "vmap", "loop", "loop compiled"), headline=True),
        _paper_case("r50x1", 64, (*OURS, "opacus", "opacus ghost", "vmap"), headline=True),
        _paper_case("bert", 64, (*OURS, "opacus", "opacus ghost", "two-pass ghost", "book-keeping"), headline=True),
        _paper_case("vit-b", 32, (*OURS, "opacus ghost"), precisions=("tf32", "float32")),
        _paper_case("vit-b", 256, (*OURS, "opacus ghost"), like="vit-b-b64"),
        _paper_case("vit-b", 16, (*OURS, "opacus ghost"), like="vit-b-b64"),
        _paper_case("vit-l", 64, OURS, like="vit-b-b64"),
        _paper_case("vit-s", 64, OURS, like="vit-b-b64"),
        _paper_case("vit-ti", 64, OURS, like="vit-b-b64"),
        _paper_case("r101x1", 64, OURS, like="r50x1-b64"),
        _paper_raw(),
    ),
)
