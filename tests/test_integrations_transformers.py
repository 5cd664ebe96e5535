"""Hugging Face's Trainer, alone and with PEFT: gradients are the oracle's, and each setting that would spoil them is named."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_steps import assert_steps, clipping_options, recorded_steps
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from examples import hf_trainer, peft_lora
from flashnorm_compile import OptionsError, PrivacyError, UnprotectedGradientError, privacy, private_dataloader
from flashnorm_compile.integrations import transformers as integration
from flashnorm_compile.integrations.transformers import PrivacyCallback
from flashnorm_compile.options import Options

N, TOKENS, VOCABULARY = 6, 5, 11
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def records() -> list[dict[str, Tensor]]:
    """Records of one length; some of their labels are not counted."""
    found = []
    for number in range(N):
        ids = torch.randint(VOCABULARY, (TOKENS,))
        labels = ids.clone()
        labels[: number % 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def model_loss(data: list[dict[str, Tensor]], normalizer: float) -> Any:
    """A record's own loss: the sum over its labels, by the fixed number that replaces the count."""

    def loss(twin: nn.Module, b: int) -> Tensor:
        record = {name: value[None] for name, value in data[b].items()}
        return twin(**record, num_items_in_batch=torch.tensor(normalizer)).loss

    return loss


def problem(**changes: Any) -> tuple[Any, list[dict[str, Tensor]], dict[str, Any]]:
    model, data = hf_trainer.tiny_llama(VOCABULARY, layers=1), records()
    normalizer = TOKENS - 1.0
    return model, data, clipping_options(model, model_loss(data, normalizer), N, loss_normalizer=normalizer, **changes)


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {"output_dir": str(folder), "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "use_cpu": True}
    return settings | {"disable_tqdm": True, "per_device_train_batch_size": N, "max_steps": 2, "logging_steps": 1} | changes


class Listener(TrainerCallback):
    """Another callback, such as one that writes TensorBoard scalars."""

    def __init__(self) -> None:
        self.heard: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.heard.append(dict(logs))


def test_trainer(tmp_path: Path, backend: str) -> None:
    model, data, options = problem()
    with recorded_steps(model) as steps:
        hf_trainer.train(model, data, options, backend=backend, trainer_class=Trainer, **arguments(tmp_path))
    assert_steps(steps, 2, model_loss(data, TOKENS - 1), N, options)


def test_trainer_with_gradient_accumulation(tmp_path: Path, backend: str) -> None:
    """The count of labels runs over both micro-batches; so does the average."""
    model, data, options = problem(accumulation_steps=2)
    changes = {"per_device_train_batch_size": N // 2, "gradient_accumulation_steps": 2}
    with recorded_steps(model) as steps:
        hf_trainer.train(model, data, options, backend=backend, trainer_class=Trainer, **arguments(tmp_path, **changes))
    assert_steps(steps, 2, model_loss(data, TOKENS - 1), N, options)
    assert privacy(model).steps == 2


class EverythingTrainer(Trainer):
    """Draws every record each time, in a batch that has room for two more."""

    def get_train_dataloader(self) -> Any:
        padding = {"input_ids": torch.zeros(TOKENS, dtype=torch.int64), "labels": torch.full((TOKENS,), -100)}
        return private_dataloader(
            self.train_dataset,  # type: ignore[arg-type]
            privacy(self.model),
            sample_rate=1.0,
            physical_batch_size=N + 2,
            truncated_batch_size=N + 2,
            mask_name=None,
            padding_sample=padding,
            steps=2,
        )


def test_trainer_with_poisson_draws(tmp_path: Path, backend: str) -> None:
    """Padding without labels adds nothing, and the draws are credited."""
    model, data, options = problem()
    with recorded_steps(model) as steps:
        hf_trainer.train(model, data, options, backend=backend, trainer_class=EverythingTrainer, **arguments(tmp_path))
    assert_steps(steps, 2, model_loss(data, TOKENS - 1), N, options)
    (mechanism,) = privacy(model).account.history.mechanisms()
    assert mechanism.sampling is not None


def test_epsilon_is_in_the_logs_of_everybody(tmp_path: Path, backend: str) -> None:
    model, data, options = problem(noise_multiplier=2.0)
    listener = Listener()
    trainer = hf_trainer.train(
        model, data, options, backend=backend, callbacks=[listener], per_device_eval_batch_size=3,
        **{**arguments(tmp_path), "per_device_train_batch_size": 2},
    )  # fmt: skip
    heard = [logs["epsilon"] for logs in listener.heard if "loss" in logs]
    written = [logs["epsilon"] for logs in trainer.state.log_history if "loss" in logs]
    assert heard == written
    assert len(heard) == 2
    assert 0 < heard[0] < heard[1] < math.inf
    assert heard[1] == privacy(model).epsilon(1e-5)
    assert [logs["releases"] for logs in listener.heard if "loss" in logs] == [1, 2]


def test_peft_lora(tmp_path: Path, backend: str) -> None:
    """Two micro-batches for each step; only the adapters train. LoRA's B starts at zero, so that A has no gradient at first."""
    base, data, normalizer = hf_trainer.tiny_llama(VOCABULARY, layers=1), records(), TOKENS - 1.0
    model = peft_lora.with_adapters(base)
    loss = model_loss(data, normalizer)
    options = clipping_options(model, loss, N, loss_normalizer=normalizer)
    frozen = copy.deepcopy({name: p for name, p in model.named_parameters() if not p.requires_grad})
    changes = {"per_device_train_batch_size": N // 2, "gradient_accumulation_steps": 2, "learning_rate": 10.0}
    with recorded_steps(model) as steps:
        peft_lora.train_adapters(model, data, options, backend=backend, **arguments(tmp_path, **changes))
    assert_steps(steps, 2, loss, N, options)
    assert all("lora_" in name for name in steps[0][1])
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())


# Each mistake has its error, and no parameter moves.


def attempt(folder: Path, backend: str, **changes: Any) -> None:
    model, data, options = problem(**changes.pop("options", {}))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        hf_trainer.train(model, data, options, backend=backend, trainer_class=Trainer, **arguments(folder, **changes))
    finally:
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"max_grad_norm": 1.0},
            r"TrainingArguments\(max_grad_norm=1\.0\): the Trainer would clip the released gradient as a whole",
        ),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0\.1\): the loss is then computed outside the compiled model"),
        ({"optim": "galore_adamw_layerwise"}, r"optim='galore_adamw_layerwise'\): this optimizer updates parameters during the"),
        (
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            r"An epoch has 3 batches, which gradient_accumulation_steps=2 does not divide",
        ),
        (
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
            r"gradient_accumulation_steps=2\), but accumulation_steps=1 in the options.*Set options=\{'accumulation_steps': 2\}",
        ),
        (
            {"options": {"accumulation_steps": 2}},
            r"gradient_accumulation_steps=1\), but accumulation_steps=2 in the options: noise is added on every 2nd backward pass",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_are_refused(changes: dict[str, Any], match: str, tmp_path: Path, backend: str, monkeypatch: Any) -> None:
    # Where an optimizer's own package is missing, the Trainer would complain first.
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, *_: _sgd(self))
    with pytest.raises(OptionsError, match=match):
        attempt(tmp_path, backend, **changes)


def _sgd(trainer: Trainer) -> torch.optim.Optimizer:
    if trainer.optimizer is None:
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    return trainer.optimizer


def test_a_loss_function_outside_the_model_is_refused(tmp_path: Path, backend: str) -> None:
    model, data, options = problem()
    model.compile(backend=backend, options=options)
    settings = TrainingArguments(**arguments(tmp_path, max_grad_norm=0, report_to="none"))
    trainer = Trainer(model, settings, train_dataset=data, compute_loss_func=lambda outputs, labels, **_: outputs.logits.mean())
    PrivacyCallback(1e-5).attach(trainer)
    with pytest.raises(OptionsError, match=r"Trainer\(compute_loss_func=\.\.\.\): the loss is then computed outside"):
        trainer.train()


def make_trainer(folder: Path, model: nn.Module, data: Any, **changes: Any) -> Trainer:
    return Trainer(model, TrainingArguments(**arguments(folder, max_grad_norm=0, report_to="none", **changes)), train_dataset=data)


def test_a_model_that_is_not_compiled_is_refused(tmp_path: Path) -> None:
    model, data, _ = problem()
    trainer = make_trainer(tmp_path, model, data)
    PrivacyCallback(1e-5).attach(trainer)
    with pytest.raises(OptionsError, match=r"The model is not compiled in place: call model\.compile\(backend='flashnorm'"):
        trainer.train()


def test_another_backend_is_refused(tmp_path: Path) -> None:
    model, data, _ = problem()
    model.compile(backend="eager")
    trainer = make_trainer(tmp_path, model, data)
    PrivacyCallback(1e-5).attach(trainer)
    with pytest.raises(UnprotectedGradientError, match="no private graph has released a gradient since the last step"):
        trainer.train()


def test_a_callback_that_was_not_attached_is_refused(tmp_path: Path) -> None:
    model, data, _ = problem()
    trainer = make_trainer(tmp_path, model, data)
    trainer.add_callback(PrivacyCallback(1e-5))
    with pytest.raises(OptionsError, match=r"PrivacyCallback\(\.\.\.\)\.attach\(trainer\)"):
        trainer.train()


def test_trainer_without_the_callback_and_with_clipping_is_refused(tmp_path: Path, backend: str) -> None:
    """The guard sees it as well."""
    model, data, options = problem()
    model.compile(backend=backend, options=options)
    trainer = make_trainer(tmp_path, model, data)
    trainer.args.max_grad_norm = 1.0
    with pytest.raises(
        UnprotectedGradientError, match=r"p\.grad was written or changed outside backward.*max_grad_norm=0.*PrivacyCallback"
    ):
        trainer.train()


def test_a_parameter_outside_the_model_is_refused(tmp_path: Path, backend: str) -> None:
    model, data, options = problem()
    model.compile(backend=backend, options=options)
    scale = nn.Parameter(torch.ones(()))

    class Scaled(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + scale * 0.5

    settings = TrainingArguments(**arguments(tmp_path, max_grad_norm=0, report_to="none"))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    trainer = Scaled(model, settings, train_dataset=data, optimizers=(optimizer, None))
    PrivacyCallback(1e-5).attach(trainer)
    with pytest.raises(UnprotectedGradientError, match=r"group 0, parameter \d+, shape \(\): it belongs to no private graph"):
        trainer.train()


class OwnLoss(nn.Module):
    """A model that takes no ``num_items_in_batch``: the Trainer divides its loss by the accumulation steps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(x).squeeze(1) - labels).square().mean()}


def own_loss_problem() -> tuple[OwnLoss, list[dict[str, Tensor]], Any, dict[str, Any]]:
    data = [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(N)]
    model = OwnLoss()

    def loss(twin: nn.Module, b: int) -> Tensor:
        return twin(data[b]["x"][None].double(), data[b]["labels"][None].double())["loss"]

    return model, data, loss, clipping_options(model, loss, N, accumulation_steps=2)


@pytest.mark.parametrize("declared", [False, True])
def test_a_loss_that_the_trainer_scales(declared: bool, tmp_path: Path, backend: str) -> None:
    model, data, loss, options = own_loss_problem()
    model.compile(backend=backend, options=options)
    trainer = make_trainer(tmp_path, model, data, per_device_train_batch_size=N // 2, gradient_accumulation_steps=2)
    PrivacyCallback(1e-5).attach(trainer)
    if not declared:
        with pytest.raises(OptionsError, match=r"multiplied the loss by 0\.5 .*set trainer\.loss_is_scaled_for_ga = True"):
            trainer.train()
        return
    trainer.loss_is_scaled_for_ga = True
    with recorded_steps(model) as steps:
        trainer.train()
    assert_steps(steps, 2, loss, N, options)


def test_a_count_that_is_a_python_number_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"num_items_in_batch=37 is a Python number, which the compiled graph takes as public"):
        integration._check_count(37)
    integration._check_count(torch.tensor(37))


def test_a_private_loader_whose_draws_have_several_parts_is_refused(tmp_path: Path, backend: str) -> None:
    class Parts(Trainer):
        def get_train_dataloader(self) -> Any:
            padding = {"input_ids": torch.zeros(TOKENS, dtype=torch.int64), "labels": torch.full((TOKENS,), -100)}
            sizes = {"sample_rate": 0.5, "physical_batch_size": 2, "mask_name": None, "padding_sample": padding}
            return private_dataloader(self.train_dataset, privacy(self.model), **sizes)  # type: ignore[arg-type]

    model, data, options = problem()
    with pytest.raises(OptionsError, match=r"Set truncated_batch_size <= physical_batch_size in the loader"):
        hf_trainer.train(model, data, options, backend=backend, trainer_class=Parts, **arguments(tmp_path))


def test_a_resumed_run_needs_its_ledger(tmp_path: Path, backend: str) -> None:
    model, data, options = problem(noise_multiplier=1.0)
    ledger = tmp_path / "ledger.jsonl"
    model.compile(backend=backend, options=options)

    def run(callback: PrivacyCallback, **resume: Any) -> None:
        trainer = make_trainer(tmp_path, model, data, max_steps=2 if not resume else 3, save_strategy="steps", save_steps=2)
        callback.attach(trainer)
        trainer.train(**resume)

    run(PrivacyCallback(1e-5, ledger=ledger))
    assert privacy(model).steps == 2
    privacy(model).account.close()
    model = problem()[0]
    model.compile(backend=backend, options=options)
    with pytest.raises(PrivacyError, match="resumes behind step 2, but only 0 releases are recorded"):
        run(PrivacyCallback(1e-5), resume_from_checkpoint=True)
    run(PrivacyCallback(1e-5, ledger=ledger), resume_from_checkpoint=True)
    assert privacy(model).steps == 3


def test_accelerate_refuses_the_name(tmp_path: Path, monkeypatch: Any) -> None:
    """Where a user meets it first; the module's documentation says what to do instead."""
    from accelerate import Accelerator

    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    message = "'FLASHNORM' is not a valid DynamoBackend"
    with pytest.raises(ValueError, match=message):
        Accelerator(dynamo_backend="flashnorm", cpu=True)
    model, data, _ = problem()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, data, torch_compile_backend="flashnorm")
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    assert integration.__doc__ is not None
    assert message in integration.__doc__


def test_options_of_the_examples_are_complete() -> None:
    assert Options.parse(hf_trainer.OPTIONS).noise_multiplier > 0
