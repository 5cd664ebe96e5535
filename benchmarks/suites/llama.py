"""Llama, with flat and per-layer clipping."""

import torch

from benchmarks.case import Case, Problem, Suite
from benchmarks.models.llama import Llama, LlamaBlocks
from benchmarks.suites.problems import EVERYBODY, SWEEP, next_token, regression

TOKENS = 2048
HEADLINE_BATCH = 4


def _small() -> Problem:
    model = Llama(vocabulary=1024, width=256, layers=2, heads=4, key_heads=2, mlp_width=704)
    return next_token(model, 1024, batch=2, tokens=96)


def _whole(batch: int) -> Case:
    """The oracle is float32: in float64 the weights, logits and T x T attention matrices take some 80 GiB."""
    headline = batch == HEADLINE_BATCH
    return Case(
        name=f"1b-b{batch}",
        description=f"Llama-3.2-1B, tied embeddings, vocabulary 128256, B {batch}, T {TOKENS}",
        build=lambda: next_token(Llama(), 128256, batch, TOKENS),
        point={"B": batch, "T": TOKENS},
        precisions=("bfloat16",),
        headline=headline,
        oracle_dtype=torch.float32,
        contenders=None if headline else SWEEP,
    )


def _blocks_problem(layers: int, batch: int) -> Problem:
    blocks = LlamaBlocks(5120, layers, heads=40, key_heads=40, mlp_width=13824, rotary_base=10000.0)
    return regression(blocks, torch.randn(batch, TOKENS, 5120))


def _blocks(layers: int, batch: int, headline: bool = False) -> Case:
    """Hidden states in, hidden states out. The oracle is float32, which is exact enough for bfloat16 and fits."""
    return Case(
        name=f"13b-{layers}-blocks-b{batch}",
        description=f"{layers} blocks of Llama 13B, d 5120, 40 heads, MLP 13824, B {batch}, T {TOKENS}",
        build=lambda: _blocks_problem(layers, batch),
        point={"B": batch, "T": TOKENS},
        precisions=("bfloat16",),
        headline=headline,
        oracle_dtype=torch.float32,
        contenders=None if headline else SWEEP,
    )


SUITE = Suite(
    name="llama",
    title="Llama, flat and per-layer clipping",
    small=(
        Case(
            name="b2-t96",
            description="Llama-like, d 256, 2 layers, 4 heads, 2 key heads, MLP 704, vocabulary 1024, tied, B 2, T 96",
            build=_small,
            point={"B": 2, "T": 96},
            contenders=EVERYBODY,
        ),
    ),
    paper=(
        *(_whole(batch) for batch in (1, 2, 4, 8)),
        _blocks(2, 1, headline=True),
        _blocks(2, 4, headline=True),
        _blocks(2, 8),
        _blocks(4, 1),
    ),
)
