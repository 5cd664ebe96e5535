"""GPT-2 against sequence length."""

import torch

from benchmarks.case import Case, Problem, Stack, Suite
from benchmarks.models.gpt import GPT
from benchmarks.suites.problems import EVERYBODY, HOOKS, OURS, next_token

LAYERS = 12


def _small_problem(batch: int, tokens: int, tied: bool) -> Problem:
    model = GPT(vocabulary=2048, width=256, layers=2, heads=4, context=tokens, tied=tied)
    return next_token(model, 2048, batch, tokens)


def _small_case(batch: int, tokens: int, tied: bool = True, contenders: tuple[str, ...] | None = EVERYBODY) -> Case:
    head = "head tied to the token embedding" if tied else "head with weights of its own"
    return Case(
        name=f"b{batch}-t{tokens}" + ("" if tied else "-untied"),
        description=f"GPT-2-like, d 256, 2 layers, 4 heads, vocabulary 2048, {head}, B {batch}, T {tokens}",
        build=lambda: _small_problem(batch, tokens, tied),
        point={"B": batch, "T": tokens},
        contenders=contenders,
    )


def _paper_case(
    batch: int, tokens: int, contenders: tuple[str, ...], *, tied: bool = True, headline: bool = False, like: str | None = None
) -> Case:
    """GPT-2's position table has 1024 rows; longer sequences get as many as they need.

    The oracle is float32: in float64, attention of this length keeps matrices of T x T, which do not fit into memory.
    """
    head = "head tied to the token embedding" if tied else "head with weights of its own"
    return Case(
        name=f"b{batch}-t{tokens}" + ("" if tied else "-untied"),
        description=f"GPT-2 small, d 768, 12 layers, 12 heads, vocabulary 50257, {head}, B {batch}, T {tokens}",
        build=Stack(
            LAYERS, lambda layers: next_token(GPT(context=max(1024, tokens), layers=layers, tied=tied), 50257, batch, tokens)
        ),
        point={"B": batch, "T": tokens},
        precisions=("bfloat16",),
        headline=headline,
        like=like,
        oracle_dtype=torch.float32,
        contenders=contenders,
    )


SUITE = Suite(
    name="gpt2",
    title="GPT-2 against sequence length",
    small=(_small_case(8, 32, contenders=None), _small_case(1, 256), _small_case(8, 32, tied=False)),
    paper=(
        _paper_case(1, 4096, (*OURS, "opacus", "opacus fast gradient", "vmap", "jax_privacy"), headline=True),
        _paper_case(8, 1024, (*OURS, "flashnorm per-layer", "opacus", "vmap", "loop", "loop compiled"), headline=True),
        _paper_case(1, 16384, (*OURS, "opacus"), headline=True),
        _paper_case(8, 1024, HOOKS, tied=False),
        _paper_case(1, 32768, OURS, like="b1-t4096"),
        _paper_case(1, 8192, OURS, like="b1-t4096"),
    ),
)
