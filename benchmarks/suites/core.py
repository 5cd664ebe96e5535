"""What a change to the library is checked against: the private step beside the non-private ones, with a bound on the ratio."""

import torch

from benchmarks.case import Case, Problem, Suite
from benchmarks.models.gpt import GPT
from benchmarks.models.mlp import MLP
from benchmarks.models.resnet import ResNet18
from benchmarks.models.vit import ViT
from benchmarks.suites.problems import OURS, image_classes, next_token, regression


def _gpt(batch: int, tokens: int) -> Problem:
    model = GPT(vocabulary=256, width=256, layers=4, heads=4, context=tokens, positions_per_sample=False)
    return next_token(model, 256, batch, tokens)


def _vit(batch: int) -> Problem:
    return image_classes(ViT(width=384, layers=6, heads=6, classes=100, train_raw=True), batch, 224, 100)


CASES = (
    Case(
        name="gpt",
        description="GPT, tied head, d 256, 4 layers, 4 heads, vocabulary 256, B 8, T 256",
        build=lambda: _gpt(8, 256),
        point={"B": 8, "T": 256},
        target=1.12,
        contenders=OURS,
    ),
    Case(
        name="gpt-b1",
        description="the same GPT, B 1, T 1024",
        build=lambda: _gpt(1, 1024),
        point={"B": 1, "T": 1024},
        target=1.15,
        contenders=OURS,
    ),
    Case(
        name="vit",
        description="ViT-S-like, d 384, 6 layers, 6 heads, 197 tokens, 100 classes, B 8",
        build=lambda: _vit(8),
        point={"B": 8},
        target=1.2,
        contenders=OURS,
    ),
    Case(
        name="mlp",
        description="8 x Linear(1024, 1024) with ReLU, B 64",
        build=lambda: regression(MLP(1024, 8, activation=True), torch.randn(64, 1024)),
        point={"B": 64},
        target=1.25,
        contenders=OURS,
    ),
    Case(
        name="resnet-gn",
        description="ResNet-18 with GroupNorm, width 64, 32 x 32 pixels, 10 classes, B 16",
        build=lambda: image_classes(ResNet18(), 16, 32, 10),
        point={"B": 16},
        target=1.6,
        contenders=OURS,
    ),
    Case(
        name="linear-b4",
        description="8 x Linear(1024, 1024) without activation, B 4, T 1024",
        build=lambda: regression(MLP(1024, 8, activation=False), torch.randn(4, 1024, 1024)),
        point={"B": 4, "T": 1024},
        target=1.05,
        contenders=OURS,
    ),
)

SUITE = Suite(name="core", title="Private step over compiled non-private step", small=CASES, paper=CASES)
