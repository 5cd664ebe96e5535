"""DP-SGD in a plain PyTorch loop, on made-up data:  python -m examples.plain_loop"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from flashnorm_compile import privacy, private_dataloader

OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}


def train(model: nn.Module, records: Dataset[Any], options: dict[str, Any], backend: str = "flashnorm", **loading: Any) -> None:
    """One pass over ``loading["steps"]`` Poisson draws of (x, y) records."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = privacy(model)
    loader = private_dataloader(records, state, **loading)

    def loss(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return (F.cross_entropy(model(x), y, reduction="none") * mask).mean()

    private_loss = torch.compile(loss, backend=backend, options=options)
    for x, y, mask in loader:
        private_loss(x, y, mask).backward()
        if loader.batch_complete:
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    records = TensorDataset(torch.randn(512, 16), torch.randint(4, (512,)))
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    train(model, records, OPTIONS, expected_batch_size=32, physical_batch_size=16, steps=20)
    print(privacy(model).spent(1e-5))


if __name__ == "__main__":
    main()
