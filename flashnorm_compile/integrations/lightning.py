"""Private training under Lightning's ``Trainer``.

    compiled = torch.compile(module, backend="flashnorm", options={"max_grad_norm": 1.0, "noise_multiplier": 0.8})
    Trainer(callbacks=[PrivacyCallback(delta=1e-5)]).fit(compiled, loader)

``training_step`` is what is compiled then, loss included. Lightning's ``self.log`` cannot be traced: report from a callback.
Fabric needs no callback: its loops call ``backward`` and ``step`` themselves, see ``examples/fabric_loop.py``.
"""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..accounting.accountant import AccountantName, Relation
from ..state import privacy
from .watch import Accounting, Watch, check_optimizer, refuse_if


class PrivacyCallback(Callback):
    """Checks that Lightning leaves released gradients alone, and logs ``epsilon``, also in the progress bar.

    Args:
        delta: for the logged epsilon.
        accountant, relation: see ``PrivacyState.epsilon``.
        ledger: a file that each release is recorded in before its gradients can be used. A run that resumes needs it.
    """

    def __init__(
        self,
        delta: float,
        *,
        accountant: AccountantName = "pld",
        relation: Relation = "add_or_remove_one",
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        self._accounting = Accounting(delta, accountant, relation, ledger)
        self._watch: Watch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_settings(trainer)
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer)
        self._watch = Watch(privacy(pl_module), self._accounting)
        self._watch.begin(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert self._watch is not None
        if pl_module.automatic_optimization:
            self._watch.check_accumulation(1, "Trainer(accumulate_grad_batches=1)")
        self._watch.before_step()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        assert self._watch is not None
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0:
            for name, value in self._watch.logs().items():
                pl_module.log(name, float(value), prog_bar=name == "epsilon")


def _check_settings(trainer: Trainer) -> None:
    """Settings under which Lightning would change a released gradient, or the scale at which samples are clipped."""
    k = trainer.accumulate_grad_batches
    refuse_if(
        bool(trainer.gradient_clip_val),
        f"Trainer(gradient_clip_val={trainer.gradient_clip_val})",
        "Lightning would clip the released gradient as a whole, noise included. Samples are clipped already: leave it out, and "
        "set max_grad_norm in the options of torch.compile.",
    )
    refuse_if(
        k != 1,
        f"Trainer(accumulate_grad_batches={k})",
        f"Lightning divides each loss by {k}, so that samples would be clipped at another scale. Leave it out; with "
        "automatic_optimization = False, accumulation_steps in the options does it.",
    )
    refuse_if(
        trainer.precision.startswith("16"),
        f"Trainer(precision={trainer.precision!r})",
        "loss scaling changes gradients before and after their release. Use 'bf16-mixed'.",
    )
    refuse_if(
        trainer.world_size > 1,
        f"{trainer.world_size} devices",
        "training on several devices is not supported yet. Set devices=1.",
    )
