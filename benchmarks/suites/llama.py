"""Llama, with flat and per-layer clipping."""

import torch

from benchmarks.case import Case, Problem, Stack, Suite
from benchmarks.models.llama import Llama, LlamaBlocks
from benchmarks.suites.problems import EVERYBODY, OURS, next_token, regression

TOKENS = 2048
BOTH = (*OURS, "flashnorm per-layer")


def _small() -> Problem:
    model = Llama(vocabulary=1024, width=256, layers=2, heads=4, key_heads=2, mlp_width=704)
    return next_token(model, 1024, batch=2, tokens=96)


def _whole(batch: int, contenders: tuple[str, ...], *, headline: bool = False, like: str | None = None) -> Case:
    """The oracle is float32: in float64 the weights, logits and T x T attention matrices take some 80 GiB."""
    return Case(
        name=f"1b-b{batch}",
        description=f"Llama-3.2-1B, tied embeddings, vocabulary 128256, B {batch}, T {TOKENS}",
        build=Stack(16, lambda layers: next_token(Llama(layers=layers), 128256, batch, TOKENS)),
        point={"B": batch, "T": TOKENS},
        precisions=("bfloat16",),
        headline=headline,
        like=like,
        oracle_dtype=torch.float32,
        contenders=contenders,
    )


def _blocks(batch: int, contenders: tuple[str, ...], *, headline: bool = False, like: str | None = None) -> Case:
    """Hidden states in, hidden states out. The oracle is float32, which is exact enough for bfloat16 and fits."""

    def problem(layers: int) -> Problem:
        blocks = LlamaBlocks(5120, layers, heads=40, key_heads=40, mlp_width=13824, rotary_base=10000.0)
        return regression(blocks, torch.randn(batch, TOKENS, 5120))

    return Case(
        name=f"13b-2-blocks-b{batch}",
        description=f"2 blocks of Llama 13B, d 5120, 40 heads, MLP 13824, B {batch}, T {TOKENS}",
        build=Stack(2, problem),
        point={"B": batch, "T": TOKENS},
        precisions=("bfloat16",),
        headline=headline,
        like=like,
        oracle_dtype=torch.float32,
        contenders=contenders,
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
        _whole(4, (*BOTH, "opacus", "loop"), headline=True),
        _blocks(4, (*BOTH, "opacus", "two-pass ghost", "book-keeping", "loop compiled"), headline=True),
        _blocks(1, (*BOTH, "opacus", "two-pass ghost", "book-keeping"), headline=True),
        _whole(1, OURS),
        _whole(8, OURS, like="1b-b4"),
        _blocks(8, BOTH, like="13b-2-blocks-b4"),
        _whole(2, OURS, like="1b-b4"),
    ),
)
