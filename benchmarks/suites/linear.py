"""Linear layers alone, against sequence length."""

import torch

from benchmarks.case import Case, Suite
from benchmarks.models.mlp import MLP
from benchmarks.suites.problems import SWEEP, regression

LAYERS = 8
HEADLINE_TOKENS = (4096, 32768, 262144)


def _case(
    batch: int,
    tokens: int,
    width: int,
    precisions: tuple[str, ...] = ("float32",),
    headline: bool = False,
    contenders: tuple[str, ...] | None = None,
) -> Case:
    return Case(
        name=f"b{batch}-t{tokens}",
        description=f"{LAYERS} x Linear({width}, {width}) without activation, B {batch}, T {tokens}",
        build=lambda: regression(MLP(width, LAYERS, activation=False), torch.randn(batch, tokens, width)),
        point={"B": batch, "T": tokens},
        precisions=precisions,
        headline=headline,
        contenders=contenders,
    )


def _paper_case(batch: int, tokens: int) -> Case:
    if batch == 1 and tokens in HEADLINE_TOKENS:
        return _case(batch, tokens, 1024, precisions=("bfloat16",), headline=True)
    return _case(batch, tokens, 1024, precisions=("tf32", "bfloat16"), contenders=SWEEP)


SUITE = Suite(
    name="linear",
    title="Linear layers against sequence length",
    small=(_case(1, 512, 512), _case(4, 128, 512)),
    paper=tuple(_paper_case(batch, 4096 * 2**power) for batch in (1, 4) for power in range(7)),
)
