"""Linear layers alone, against sequence length."""

from typing import Any

import torch

from benchmarks.case import Case, Stack, Suite
from benchmarks.models.mlp import MLP
from benchmarks.suites.problems import HOOKS, OURS, regression

LAYERS = 8
TOKENS = tuple(4096 * 2**power for power in range(7))
HEADLINE_TOKENS = (TOKENS[0], TOKENS[-1])
SWEEP = (*OURS, "opacus ghost", "two-pass ghost", "book-keeping")


def _case(batch: int, tokens: int, width: int, **settings: Any) -> Case:
    return Case(
        name=f"b{batch}-t{tokens}",
        description=f"{LAYERS} x Linear({width}, {width}) without activation, B {batch}, T {tokens}",
        build=Stack(LAYERS, lambda layers: regression(MLP(width, layers, activation=False), torch.randn(batch, tokens, width))),
        point={"B": batch, "T": tokens},
        **settings,
    )


def _paper_case(batch: int, tokens: int) -> Case:
    if (batch, tokens) == (1, TOKENS[0]):  # the algorithms forced one by one, and everybody
        return _case(batch, tokens, 1024, precisions=("bfloat16",), headline=True)
    if batch == 1 and tokens in HEADLINE_TOKENS:
        return _case(batch, tokens, 1024, precisions=("bfloat16",), headline=True, contenders=(*HOOKS, "flashnorm ghost"))
    return _case(batch, tokens, 1024, precisions=("bfloat16",), contenders=SWEEP)


SUITE = Suite(
    name="linear",
    title="Linear layers against sequence length",
    small=(_case(1, 512, 512), _case(4, 128, 512)),
    paper=(
        *(_paper_case(1, tokens) for tokens in TOKENS),
        *(_paper_case(4, tokens) for tokens in (TOKENS[0], TOKENS[3], TOKENS[6])),
    ),
)
