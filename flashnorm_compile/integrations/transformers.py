"""Private training under Hugging Face's ``Trainer``.

    model.compile(backend="flashnorm", options={"max_grad_norm": 1.0, "noise_multiplier": 0.8, "loss_normalizer": 128})
    trainer = Trainer(model, TrainingArguments(max_grad_norm=0, ...), train_dataset=records)
    PrivacyCallback(delta=1e-5).attach(trainer)
    trainer.train()

The model is compiled in place and beforehand, because accelerate, which compiles for the Trainer, accepts only the backends
that it lists: ``TrainingArguments(torch_compile_backend="flashnorm")`` and ``Accelerator(dynamo_backend="flashnorm")`` end with
``ValueError: 'FLASHNORM' is not a valid DynamoBackend``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..accounting.accountant import AccountantName, Relation
from ..data import PrivateDataLoader
from ..passes.errors import OptionsError
from ..state import PrivacyState, privacy
from .watch import Accounting, Watch, check_optimizer, refuse_if


class PrivacyCallback(TrainerCallback):
    """Checks that a ``Trainer`` leaves released gradients alone, and reports epsilon in its logs.

    Refused are settings that would scale a loss or change a gradient, and a step without a release. ``epsilon`` in the logs
    credits sampling only for batches of ``private_dataloader``; for the Trainer's own shuffled batches it is the figure without
    amplification.

    Args:
        delta: for the reported epsilon.
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
        self._trainer: Trainer | None = None
        self._watch: Watch | None = None

    def attach(self, trainer: Trainer) -> PrivacyCallback:
        """Adds the callback in front of all others, so that each of them sees epsilon in the logs it is given.

        The loss is followed to see that nothing scales it, and the Trainer's measuring of gradient norms, which multiplies
        every gradient by one, is replaced by one that only reads.
        """
        self._trainer = trainer
        trainer.callback_handler.callbacks.insert(0, self)
        compute_loss = trainer.compute_loss

        def followed_loss(*args: Any, **kwargs: Any) -> Any:
            _check_count(kwargs.get("num_items_in_batch"))
            result = compute_loss(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if loss.requires_grad:
                loss.register_hook(_check_scale)
            return result

        trainer.compute_loss = followed_loss  # type: ignore[method-assign]
        trainer.accelerator.clip_grad_norm_ = _reading_norms(trainer.accelerator.clip_grad_norm_)
        return self

    @property
    def state(self) -> PrivacyState:
        """The privacy state of the Trainer's model."""
        assert self._trainer is not None
        assert self._trainer.model is not None
        return privacy(self._trainer.model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer is None:
            raise OptionsError(
                "Trainer(callbacks=[PrivacyCallback(...)]) is not enough: a callback cannot see how the Trainer computes its loss. "
                "Make the Trainer first, then call PrivacyCallback(...).attach(trainer)."
            )
        _check_settings(self._trainer, args)
        _check_batches(kwargs.get("train_dataloader"), args)
        check_optimizer(kwargs.get("optimizer"))
        self._watch = Watch(self.state, self._accounting)
        self._watch.begin(state.global_step)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check_pace(args)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._watch is not None
        self._check_pace(args)
        self._watch.before_step()

    def _check_pace(self, args: TrainingArguments) -> None:
        assert self._watch is not None
        steps = args.gradient_accumulation_steps
        self._watch.check_accumulation(steps, f"TrainingArguments(gradient_accumulation_steps={steps})")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._watch is None or logs is None:
            return
        logs.update(self._watch.logs())
        state.log_history[-1].update(self._watch.logs())


def _check_settings(trainer: Trainer, args: TrainingArguments) -> None:
    """Settings under which released gradients would be changed, or a loss computed where nobody checks it."""
    outside = "the loss is then computed outside the compiled model, where nothing checks that it keeps samples apart."
    refuse_if(
        bool(args.max_grad_norm),
        f"TrainingArguments(max_grad_norm={args.max_grad_norm})",
        "the Trainer would clip the released gradient as a whole, noise included. Samples are clipped already: set "
        "max_grad_norm=0 there, and keep max_grad_norm in the options of model.compile.",
    )
    refuse_if(
        bool(args.torch_compile),
        "TrainingArguments(torch_compile=True)",
        "accelerate would compile the model once more, with a backend that knows no privacy. Leave it out; "
        "model.compile(backend='flashnorm', ...) before Trainer(...) is all.",
    )
    refuse_if(
        getattr(trainer.model, "_compiled_call_impl", None) is None,
        "The model is not compiled in place",
        "call model.compile(backend='flashnorm', options={...}) on the model that is handed to Trainer(...), for PEFT on the "
        "one that get_peft_model returned.",
    )
    refuse_if(
        args.fp16, "TrainingArguments(fp16=True)", "loss scaling changes gradients before and after their release. Use bf16=True."
    )
    refuse_if(
        bool(args.label_smoothing_factor),
        f"TrainingArguments(label_smoothing_factor={args.label_smoothing_factor})",
        f"{outside} Smooth the labels in the model's own loss.",
    )
    refuse_if(
        trainer.compute_loss_func is not None,
        "Trainer(compute_loss_func=...)",
        f"{outside} Compute it in the model's forward, and return it as 'loss'.",
    )
    refuse_if(
        _steps_in_backward(args),
        f"TrainingArguments(optim={getattr(args.optim, 'value', args.optim)!r})",
        "this optimizer updates parameters during the backward pass, before their gradients can be checked. Use another one.",
    )
    refuse_if(
        args.n_gpu > 1 or args.world_size > 1,
        f"{max(args.n_gpu, args.world_size)} devices",
        "training on several devices is not supported yet. Set CUDA_VISIBLE_DEVICES to one of them.",
    )


def _steps_in_backward(args: TrainingArguments) -> bool:
    name = str(getattr(args.optim, "value", args.optim))
    return name in ("lomo", "adalomo") or name.endswith("_layerwise")


def _check_batches(loader: Any, args: TrainingArguments) -> None:
    """The Trainer steps after every k batches, and after fewer at the end of an epoch."""
    k = args.gradient_accumulation_steps
    if isinstance(loader, PrivateDataLoader):
        if k > 1 or not loader.one_part:
            raise OptionsError(
                f"private_dataloader under gradient_accumulation_steps={k}: the Trainer steps at its own pace, so each draw "
                "must be one batch. Set truncated_batch_size <= physical_batch_size in the loader, and "
                "gradient_accumulation_steps=1."
            )
    elif k > 1 and hasattr(loader, "__len__") and len(loader) % k:
        raise OptionsError(
            f"An epoch has {len(loader)} batches, which gradient_accumulation_steps={k} does not divide: the Trainer would end "
            f"each epoch with a step after {len(loader) % k}, before the noise is added. Choose a batch size or a part of the data "
            "for which it does."
        )


def _check_count(count: Any) -> None:
    if isinstance(count, (int, float)):
        raise OptionsError(
            f"num_items_in_batch={count} is a Python number, which the compiled graph takes as public, but it was counted in the "
            "batch. Pass it as a tensor; it is then seen and replaced by loss_normalizer."
        )


def _check_scale(gradient: Tensor) -> None:
    scale = gradient.item()
    if scale != 1:
        raise OptionsError(
            f"The Trainer multiplied the loss by {scale:g} before the backward pass, so that samples would be clipped at another "
            "scale. If gradient_accumulation_steps does it, set trainer.loss_is_scaled_for_ga = True: accumulation_steps in the "
            "options divides by the number of samples already."
        )


def _reading_norms(clip_grad_norm: Any) -> Any:
    """``Accelerator.clip_grad_norm_`` that writes no gradient if the norm is unlimited, which is how Trainer measures norms."""

    def clip_or_read(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        if max_norm != math.inf:
            return clip_grad_norm(parameters, max_norm, norm_type)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, norm_type)

    return clip_or_read
