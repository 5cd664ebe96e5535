"""DP-SGD in loops that can only name a backend; every option comes from a TOML file or from FLASHNORM_*.

    FLASHNORM_MAX_GRAD_NORM=1 FLASHNORM_NOISE_MULTIPLIER=1 python -m examples.compile_by_name --torchcompile flashnorm
    python -m examples.compile_by_name --torchcompile flashnorm --per-block --config examples/compile_by_name.toml

Whole model, as timm's ``--torchcompile`` does it; or block by block, as torchtitan and torchtune do. No graph then sees the
whole gradient of a sample: use clipping = "per_layer" or "group", and call ``privacy(model)`` before the first step.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashnorm_compile import privacy
from flashnorm_compile.integrations import load_config


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_btd: Tensor) -> Tensor:
        return x_btd + self.down(F.gelu(self.up(self.norm(x_btd))))


class TokenModel(nn.Module):
    """Scores for the next token from the token before it."""

    def __init__(self, vocabulary: int = 32, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        x_btd = self.embedding(tokens_bt)
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(x_btd)


def compile_blocks(model: TokenModel, backend: str) -> None:
    """Compiles every part that owns parameters; one that is left out is refused at the first step."""
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    # Dynamo does not trace torch's own modules when they are compiled in place, so these two are wrapped.
    model.embedding = torch.compile(model.embedding, backend=backend)  # type: ignore[assignment]
    model.head = torch.compile(model.head, backend=backend)  # type: ignore[assignment]


def train(model: nn.Module, tokens_bt: Tensor, steps: int) -> None:
    """A loop that knows nothing about privacy, with one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        scores_btv = model(tokens_bt[:, :-1])
        F.cross_entropy(scores_btv.transpose(1, 2), tokens_bt[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torchcompile", default="flashnorm", metavar="BACKEND")
    parser.add_argument("--per-block", action="store_true")
    parser.add_argument("--config", help="a TOML file with a table [flashnorm]")
    arguments = parser.parse_args()
    if arguments.config:
        load_config(arguments.config)
    model = TokenModel()
    state = privacy(model)
    if arguments.per_block:
        compile_blocks(model, arguments.torchcompile)
    else:
        model.compile(backend=arguments.torchcompile)
    train(model, torch.randint(32, (16, 12)), steps=5)
    print(state.spent(1e-5))


if __name__ == "__main__":
    main()
