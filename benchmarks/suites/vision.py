"""Classifiers against the physical batch size.

Timed is one physical step of a fixed size. Under Poisson sampling a logical batch is a sum over as many such steps as it
needs, the last one filled up with masked samples (Rodriguez Beltran et al. 2024), so its time is their number
times this one. The optimizer's part of it, which is counted in every physical step here, is then counted too often.

The class token and the positions of a ViT are parameters of no layer, so that methods with a rule for each layer cannot
train them. They are frozen for everybody, except in the cases named "raw".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.case import Case, Problem, Suite
from benchmarks.models.bert import BERT
from benchmarks.models.resnet import BiT
from benchmarks.models.vit import ViT
from benchmarks.suites.problems import EVERYBODY, ONE_OF_EACH, image_classes, text_classes

FROZEN = "class token and positions frozen"
TRAINED = "class token and positions trained"
BERT_TOKENS = 128


@dataclass(frozen=True)
class Architecture:
    """A model whose physical batch size is varied."""

    description: str
    problem: Callable[[int], Problem]
    """The problem for a physical batch size."""


def _vit(width: int, layers: int, heads: int) -> Callable[[int], Problem]:
    return lambda batch: image_classes(ViT(width, layers, heads), batch, 224, 1000)


def _bit(*stages: int) -> Callable[[int], Problem]:
    return lambda batch: image_classes(BiT(stages), batch, 224, 1000)


ARCHITECTURES: Mapping[str, Architecture] = {
    "vit-ti": Architecture(f"ViT-Ti/16 at 224 px, {FROZEN}", _vit(192, 12, 3)),
    "vit-s": Architecture(f"ViT-S/16 at 224 px, {FROZEN}", _vit(384, 12, 6)),
    "vit-b": Architecture(f"ViT-B/16 at 224 px, {FROZEN}", _vit(768, 12, 12)),
    "vit-l": Architecture(f"ViT-L/16 at 224 px, {FROZEN}", _vit(1024, 24, 16)),
    "r50x1": Architecture("BiT R50x1 (GroupNorm, weight standardization) at 224 px", _bit(3, 4, 6, 3)),
    "r101x1": Architecture("BiT R101x1 (GroupNorm, weight standardization) at 224 px", _bit(3, 4, 23, 3)),
    "bert": Architecture(
        f"BERT-base, {BERT_TOKENS} tokens, 2 classes", lambda batch: text_classes(BERT(), 30522, batch, BERT_TOKENS, 2)
    ),
}
"""What the paper sizes and the search for the largest physical batch run over."""

HEADLINES = {("vit-b", 64): ("bfloat16", "tf32", "float32"), ("r50x1", 64): ("bfloat16",), ("bert", 64): ("bfloat16",)}
"""Precisions of the cases that run first."""

BATCHES = (16, 64, 256)


def _paper_case(name: str, batch: int) -> Case:
    architecture = ARCHITECTURES[name]
    headline = (name, batch) in HEADLINES
    return Case(
        name=f"{name}-b{batch}",
        description=f"{architecture.description}, B {batch}",
        build=lambda: architecture.problem(batch),
        point={"B": batch},
        precisions=HEADLINES.get((name, batch), ("float32", "tf32", "bfloat16")),
        headline=headline,
        contenders=None if headline else ONE_OF_EACH,
    )


def _paper_raw() -> Case:
    return Case(
        name="vit-b-raw-b64",
        description=f"ViT-B/16 at 224 px, {TRAINED}, B 64",
        build=lambda: image_classes(ViT(768, 12, 12, train_raw=True), 64, 224, 1000),
        point={"B": 64},
        precisions=("tf32", "bfloat16"),
        contenders=ONE_OF_EACH,
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
    paper=(*(_paper_case(name, batch) for name in ARCHITECTURES for batch in BATCHES), _paper_raw()),
)
