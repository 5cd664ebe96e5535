"""GPT-2 against sequence length."""

import torch

from benchmarks.case import Case, Problem, Suite
from benchmarks.models.gpt import GPT
from benchmarks.suites.problems import SWEEP, next_token


def _small_problem(batch: int, tokens: int, tied: bool) -> Problem:
    model = GPT(vocabulary=2048, width=256, layers=2, heads=4, context=tokens, tied=tied)
    return next_token(model, 2048, batch, tokens)


def _small_case(batch: int, tokens: int, tied: bool = True) -> Case:
    head = "head tied to the token embedding" if tied else "head with weights of its own"
    return Case(
        name=f"b{batch}-t{tokens}" + ("" if tied else "-untied"),
        description=f"GPT-2-like, d 256, 2 layers, 4 heads, vocabulary 2048, {head}, B {batch}, T {tokens}",
        build=lambda: _small_problem(batch, tokens, tied),
        point={"B": batch, "T": tokens},
    )


def _paper_case(batch: int, tokens: int, tied: bool = True, headline: bool = False) -> Case:
    """GPT-2's position table has 1024 rows; longer sequences get as many as they need.

    The oracle is float32: in float64, attention of this length keeps matrices of T x T, which do not fit into memory.
    """
    head = "head tied to the token embedding" if tied else "head with weights of its own"
    return Case(
        name=f"b{batch}-t{tokens}" + ("" if tied else "-untied"),
        description=f"GPT-2 small, d 768, 12 layers, 12 heads, vocabulary 50257, {head}, B {batch}, T {tokens}",
        build=lambda: next_token(GPT(context=max(1024, tokens), tied=tied), 50257, batch, tokens),
        point={"B": batch, "T": tokens},
        precisions=("bfloat16",) if headline else ("tf32", "bfloat16"),
        headline=headline,
        oracle_dtype=torch.float32,
        contenders=None if headline else SWEEP,
    )


SUITE = Suite(
    name="gpt2",
    title="GPT-2 against sequence length",
    small=(_small_case(1, 256), _small_case(8, 32), _small_case(8, 32, tied=False)),
    paper=(
        _paper_case(1, 4096, headline=True),
        _paper_case(1, 8192),
        _paper_case(1, 16384, headline=True),
        _paper_case(1, 32768),
        _paper_case(8, 1024, headline=True),
        _paper_case(8, 1024, tied=False),
    ),
)
