"""Lightning and Fabric: a compiled module gives the oracle's gradients; what would spoil them is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from loop_steps import assert_steps, clipping_options, recorded_steps
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples import fabric_loop, lightning_fit
from flashnorm_compile import OptionsError, UnprotectedGradientError, privacy, private_dataloader

N = 6
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def records() -> TensorDataset:
    return TensorDataset(torch.randn(N, 16), torch.randint(4, (N,)))


def record_loss(data: TensorDataset) -> Any:
    x, y = data.tensors[0].double(), data.tensors[1]
    return lambda twin, b: F.cross_entropy(twin.network(x[b : b + 1]), y[b : b + 1])


def fit(module: LightningModule, data: TensorDataset, options: dict[str, Any], backend: str, **settings: Any) -> Any:
    loader = private_dataloader(
        data, privacy(module), sample_rate=1.0, physical_batch_size=N + 2, truncated_batch_size=N + 2, steps=2
    )
    settings = {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1} | QUIET | settings
    return lightning_fit.fit(module, loader, options, backend=backend, **settings)


def test_lightning(backend: str) -> None:
    module, data = lightning_fit.Classifier(), records()
    options = clipping_options(module, record_loss(data), N)
    with recorded_steps(module) as steps:
        fit(module, data, options, backend)
    assert_steps(steps, 2, record_loss(data), N, options)


def test_epsilon_is_logged_and_every_draw_is_credited(backend: str) -> None:
    module = lightning_fit.Classifier()
    trainer = fit(module, records(), lightning_fit.OPTIONS, backend)
    assert trainer.logged_metrics["releases"] == 2
    assert trainer.logged_metrics["epsilon"].item() == pytest.approx(privacy(module).epsilon(1e-5), rel=1e-6)
    assert trainer.progress_bar_metrics["epsilon"] == pytest.approx(privacy(module).epsilon(1e-5), rel=1e-6)
    (mechanism,) = privacy(module).account.history.mechanisms()
    assert mechanism.sampling is not None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"gradient_clip_val": 1.0}, r"Trainer\(gradient_clip_val=1\.0\): Lightning would clip the released gradient as a whole"),
        (
            {"accumulate_grad_batches": 2},
            r"Trainer\(accumulate_grad_batches=2\): Lightning divides each loss by 2, so that samples",
        ),
    ],
)
def test_settings_are_refused(settings: dict[str, Any], match: str, backend: str) -> None:
    with pytest.raises(OptionsError, match=match):
        fit(lightning_fit.Classifier(), records(), lightning_fit.OPTIONS, backend, **settings)


def test_accumulation_at_another_pace_is_refused(backend: str) -> None:
    """The loader decides which pass adds the noise, so the option is refused."""
    with pytest.raises(OptionsError, match="accumulation_steps=2 with private_dataloader: the loader decides"):
        fit(lightning_fit.Classifier(), records(), {**lightning_fit.OPTIONS, "accumulation_steps": 2}, backend)


class WithOutsider(lightning_fit.Classifier):
    """Trains a parameter that the compiled step does not own, from a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = nn.Parameter(torch.zeros(3))

    def on_after_backward(self) -> None:
        self.outside.grad = torch.ones(3)


def test_a_parameter_outside_is_refused(backend: str) -> None:
    with pytest.raises(UnprotectedGradientError, match=r"outside: it belongs to no private graph"):
        fit(WithOutsider(), records(), lightning_fit.OPTIONS, backend)


def test_another_backend_is_refused() -> None:
    with pytest.raises(UnprotectedGradientError, match="no private graph has released a gradient since the last step"):
        fit(lightning_fit.Classifier(), records(), {}, "eager")


def test_fabric(backend: str) -> None:
    """Every record in every draw, in physical batches of 4, two of them padding."""
    model, data = fabric_loop.Classifier(), records()
    options = clipping_options(model, record_loss(data), N)
    with recorded_steps(model) as steps:
        fabric_loop.train(model, data, options, backend, sample_rate=1.0, physical_batch_size=4, steps=3)
    assert_steps(steps, 3, record_loss(data), N, options)
    assert privacy(model).steps == 3


def test_fabric_with_its_own_clipping_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that calls ``fabric.clip_gradients`` before it steps."""
    backward = Fabric.backward

    def and_clip(fabric: Fabric, loss: Tensor) -> None:
        backward(fabric, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    monkeypatch.setattr(Fabric, "backward", and_clip)
    model = fabric_loop.Classifier()
    with pytest.raises(UnprotectedGradientError, match=r"network\.0\.weight: p\.grad was written or changed outside backward"):
        fabric_loop.train(model, records(), fabric_loop.OPTIONS, backend, sample_rate=1.0, physical_batch_size=N, steps=1)
