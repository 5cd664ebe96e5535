"""One layer of each kind, after the layers and sizes of the Opacus benchmark (its benchmarks/config.json).

Dimensions: B samples, T and S tokens, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Problem, Stack, Suite
from benchmarks.suites.problems import ONE_OF_EACH, OURS, regression


class Attention(nn.Module):
    """`nn.MultiheadAttention` from one sequence to another, [B, T, D] and [B, S, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, queries_btd: Tensor, keys_bsd: Tensor) -> Tensor:
        return self.attention(queries_btd, keys_bsd, keys_bsd, need_weights=False)[0]


class LSTM(nn.Module):
    """A long short-term memory of linear layers, [B, T, D] -> [B, T, D], unrolled over time.

    `nn.LSTM` cannot be compiled with its gradient: Dynamo leaves it out of the graph, and where told not to
    (`torch._dynamo.config.allow_rnn`), Inductor fails on the fused CPU kernel (torch 2.13).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_input, self.from_state = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        state_bd = cell_bd = torch.zeros_like(x_btd[:, 0])
        states = []
        for gates in self.from_input(x_btd).unbind(1):
            enter, forget, new, leave = (gates + self.from_state(state_bd)).chunk(4, dim=-1)
            cell_bd = forget.sigmoid() * cell_bd + enter.sigmoid() * new.tanh()
            state_bd = leave.sigmoid() * cell_bd.tanh()
            states.append(state_bd)
        return torch.stack(states, dim=1)


class GRU(nn.Module):
    """A gated recurrent unit of linear layers, [B, T, D] -> [B, T, D], unrolled over time as LSTM is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_input, self.from_state = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x_btd: Tensor) -> Tensor:
        state_bd = torch.zeros_like(x_btd[:, 0])
        states = []
        for from_input in self.from_input(x_btd).unbind(1):
            reset_in, update_in, new_in = from_input.chunk(3, dim=-1)
            reset_state, update_state, new_state = self.from_state(state_bd).chunk(3, dim=-1)
            update = (update_in + update_state).sigmoid()
            new = (new_in + (reset_in + reset_state).sigmoid() * new_state).tanh()
            state_bd = update * state_bd + (1 - update) * new
            states.append(state_bd)
        return torch.stack(states, dim=1)


def _conv(conv: type[nn.Conv1d | nn.Conv2d | nn.Conv3d], batch: int, channels: int, kernel: int, *sizes: int) -> Problem:
    module = conv(channels, channels, kernel)
    output_shape = (batch, channels, *(size - kernel + 1 for size in sizes))
    return regression(module, torch.randn(batch, channels, *sizes), output_shape=output_shape)


def _embedding(batch: int, tokens: int, rows: int, width: int) -> Problem:
    indices_bt = torch.randint(rows, (batch, tokens))
    return regression(nn.Embedding(rows, width), indices_bt, output_shape=(batch, tokens, width))


def _attention(batch: int, tokens: int, keys: int, width: int) -> Problem:
    return regression(Attention(width, heads=4), torch.randn(batch, tokens, width), torch.randn(batch, keys, width))


def _case(
    name: str,
    description: str,
    batch: int,
    build: Callable[[], Problem],
    precisions: tuple[str, ...] = ("float32",),
    contenders: tuple[str, ...] = ONE_OF_EACH,
) -> Case:
    return Case(name, f"{description}, B {batch}", build, {"B": batch}, precisions, contenders=contenders)


SMALL = (
    _case("linear", "Linear(512, 512), T 4", 64, lambda: regression(nn.Linear(512, 512), torch.randn(64, 4, 512))),
    _case("conv1d", "Conv1d, 64 channels, kernel 8, length 100", 16, lambda: _conv(nn.Conv1d, 16, 64, 8, 100)),
    _case("conv2d", "Conv2d, 32 channels, kernel 4, 24 x 24", 8, lambda: _conv(nn.Conv2d, 8, 32, 4, 24, 24)),
    _case("conv3d", "Conv3d, 16 channels, kernel 3, 12 x 12 x 12", 8, lambda: _conv(nn.Conv3d, 8, 16, 3, 12, 12, 12)),
    _case("embedding", "Embedding(2000, 100), T 64", 32, lambda: _embedding(32, 64, 2000, 100)),
    _case("layernorm", "LayerNorm(64), T 512", 32, lambda: regression(nn.LayerNorm(64), torch.randn(32, 512, 64))),
    _case("groupnorm", "GroupNorm(16, 256), T 128", 32, lambda: regression(nn.GroupNorm(16, 256), torch.randn(32, 256, 128))),
    _case(
        "instancenorm",
        "InstanceNorm1d(256, affine=True), T 128",
        32,
        lambda: regression(nn.InstanceNorm1d(256, affine=True), torch.randn(32, 256, 128)),
    ),
    _case("mha", "MultiheadAttention(64, 4), T 32 to S 64", 16, lambda: _attention(16, 32, 64, 64)),
    _case("lstm", "LSTM, d 128, T 6", 32, lambda: regression(LSTM(128), torch.randn(32, 6, 128))),
)

# torch.compile unrolls the recurrent layers over time, so T is 16 here and not the 128 of the Opacus benchmark, and the small
# sizes have one recurrent layer only: compiling it takes longer than all other layers together.
UNROLLED = 16


def _recurrent(kind: Callable[[int], nn.Module]) -> Stack:
    """Equal steps over time are a stack: a first one from the state 0, middle ones, a last one."""
    return Stack(UNROLLED, lambda steps: regression(kind(100), torch.randn(256, steps, 100)), shallow=3)


PAPER = tuple(
    _case(name, description, batch, build, precisions=("tf32",), contenders=(*OURS, "opacus", "vmap"))
    for name, description, batch, build in (
        ("linear", "Linear(512, 512)", 512, lambda: regression(nn.Linear(512, 512), torch.randn(512, 512))),
        ("conv1d", "Conv1d, 64 channels, kernel 8, length 5000", 64, lambda: _conv(nn.Conv1d, 64, 64, 8, 5000)),
        ("conv2d", "Conv2d, 64 channels, kernel 8, 50 x 100", 64, lambda: _conv(nn.Conv2d, 64, 64, 8, 50, 100)),
        ("conv3d", "Conv3d, 64 channels, kernel 4, 16 x 16 x 16", 64, lambda: _conv(nn.Conv3d, 64, 64, 4, 16, 16, 16)),
        ("embedding", "Embedding(20000, 100), T 1", 512, lambda: _embedding(512, 1, 20000, 100)),
        ("layernorm", "LayerNorm(64)", 512, lambda: regression(nn.LayerNorm(64), torch.randn(512, 64))),
        ("groupnorm", "GroupNorm(16, 256)", 512, lambda: regression(nn.GroupNorm(16, 256), torch.randn(512, 256))),
        (
            "instancenorm",
            "InstanceNorm1d(256, affine=True), T 64",
            512,
            lambda: regression(nn.InstanceNorm1d(256, affine=True), torch.randn(512, 256, 64)),
        ),
        ("mha", "MultiheadAttention(100, 4), T 64 to S 128", 256, lambda: _attention(256, 64, 128, 100)),
        ("lstm", f"LSTM, d 100, T {UNROLLED}", 256, _recurrent(LSTM)),
        ("gru", f"GRU, d 100, T {UNROLLED}", 256, _recurrent(GRU)),
    )
)

SUITE = Suite(name="layers", title="One layer of each kind", small=SMALL, paper=PAPER)
