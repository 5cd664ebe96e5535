"""Square linear layers.

Dimensions: B samples, T tokens, D width.
"""

from torch import Tensor, nn


class MLP(nn.Module):
    """`layers` linear layers of `width`, with ReLU between them where `activation` is set.

    [B, D] or [B, T, D] -> the same shape.
    """

    def __init__(self, width: int, layers: int, activation: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.between: nn.Module = nn.ReLU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.between(layer(x))
        return self.layers[-1](x)
