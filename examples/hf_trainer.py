"""DP-SGD under Hugging Face's Trainer, a random Llama on made-up tokens:  python -m examples.hf_trainer

The Trainer's own batches train privately as well, but only Poisson draws earn amplification by sampling. Hence the loader.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from flashnorm_compile import privacy, private_dataloader
from flashnorm_compile.integrations.transformers import PrivacyCallback

TOKENS = 16
# A Hugging Face loss divides by the number of labels in the batch; loss_normalizer is the fixed number that replaces it.
OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "loss_normalizer": TOKENS - 1}
Records = Sequence[dict[str, Tensor]]


class PoissonTrainer(Trainer):
    """A Trainer whose batches are Poisson draws. Padding has no labels, so it needs no mask."""

    def get_train_dataloader(self) -> Any:
        first: dict[str, Tensor] = self.train_dataset[0]  # type: ignore[index, assignment]
        return private_dataloader(
            self.train_dataset,  # type: ignore[arg-type]
            privacy(self.model),  # type: ignore[arg-type]
            expected_batch_size=self.args.per_device_train_batch_size,
            physical_batch_size=2 * self.args.per_device_train_batch_size,
            truncated_batch_size=2 * self.args.per_device_train_batch_size,
            mask_name=None,
            padding_sample={"input_ids": first["input_ids"] * 0, "labels": torch.full_like(first["labels"], -100)},
        )


def train(
    model: PreTrainedModel,
    records: Records,
    options: dict[str, Any],
    *,
    backend: str = "flashnorm",
    trainer_class: type[Trainer] = PoissonTrainer,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Trainer:
    model.compile(backend=backend, options=options)
    arguments = {"max_grad_norm": 0, "report_to": "none", "save_strategy": "no", "remove_unused_columns": False} | arguments
    trainer = trainer_class(model, TrainingArguments(**arguments), train_dataset=records, callbacks=list(callbacks))  # type: ignore[arg-type]
    PrivacyCallback(delta=1e-5).attach(trainer)
    trainer.train()
    return trainer


def tiny_llama(vocabulary: int = 64, layers: int = 2) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=TOKENS, **sizes))


def main() -> None:
    tokens = [torch.randint(64, (TOKENS,)) for _ in range(256)]
    model = tiny_llama()
    records = [{"input_ids": ids, "labels": ids} for ids in tokens]
    train(model, records, OPTIONS, output_dir="examples/output", per_device_train_batch_size=16, max_steps=20, logging_steps=5)
    print(privacy(model).spent(1e-5))


if __name__ == "__main__":
    main()
