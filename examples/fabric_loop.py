"""DP-SGD in a Lightning Fabric loop, on made-up data:  python -m examples.fabric_loop

Fabric takes the compiled module and compiles it again with the same settings. The loader is used as it is:
``fabric.setup_dataloaders`` takes nothing but PyTorch's own ``DataLoader``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from flashnorm_compile import privacy, private_dataloader

OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}


class Classifier(nn.Module):
    """Computes its own loss, since Fabric compiles modules only."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return (F.cross_entropy(self.network(x), y, reduction="none") * mask).mean()


def train(model: nn.Module, records: Dataset[Any], options: dict[str, Any], backend: str = "flashnorm", **loading: Any) -> None:
    """One pass over ``loading["steps"]`` Poisson draws of (x, y) records."""
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = private_dataloader(records, privacy(model), **loading)
    compiled: Any = torch.compile(model, backend=backend, options=options)
    compiled, optimizer = fabric.setup(compiled, torch.optim.SGD(model.parameters(), lr=0.1))
    for batch in loader:
        fabric.backward(compiled(*fabric.to_device(batch)))
        if loader.batch_complete:
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    records = TensorDataset(torch.randn(512, 16), torch.randint(4, (512,)))
    model = Classifier()
    train(model, records, OPTIONS, expected_batch_size=32, physical_batch_size=16, steps=20)
    print(privacy(model).spent(1e-5))


if __name__ == "__main__":
    main()
