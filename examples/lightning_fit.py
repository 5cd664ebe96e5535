"""DP-SGD under Lightning's Trainer, on made-up data:  python -m examples.lightning_fit"""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flashnorm_compile import privacy, private_dataloader
from flashnorm_compile.integrations.lightning import PrivacyCallback

OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, mask = batch
        return (F.cross_entropy(self.network(x), y, reduction="none") * mask).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: LightningModule, loader: Any, options: dict[str, Any], *, backend: str = "flashnorm", **settings: Any) -> Trainer:
    compiled: Any = torch.compile(module, backend=backend, options=options)
    trainer = Trainer(callbacks=[PrivacyCallback(delta=1e-5)], **settings)
    trainer.fit(compiled, loader)
    return trainer


def main() -> None:
    records = TensorDataset(torch.randn(512, 16), torch.randint(4, (512,)))
    module = Classifier()
    # Lightning steps after every batch, so each draw has to be one batch; the loader's length is then known, and Lightning
    # fetches no batch ahead.
    loader = private_dataloader(records, privacy(module), expected_batch_size=32, physical_batch_size=64, truncated_batch_size=64)
    fit(module, loader, OPTIONS, max_steps=20, logger=False, enable_checkpointing=False, accelerator="cpu")
    print(privacy(module).spent(1e-5))


if __name__ == "__main__":
    main()
