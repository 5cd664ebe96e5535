"""DP-SGD on LoRA adapters, PEFT under Hugging Face's Trainer, with gradient accumulation:  python -m examples.peft_lora"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer

from examples.hf_trainer import OPTIONS, TOKENS, Records, tiny_llama, train
from flashnorm_compile import privacy


def with_adapters(model: PreTrainedModel) -> PeftModel:
    """Rank-2 adapters on two projections; everything else is frozen and costs nothing."""
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))  # type: ignore[return-value]


def train_adapters(model: PeftModel, records: Records, options: dict[str, Any], **arguments: Any) -> Trainer:
    """The Trainer averages over ``gradient_accumulation_steps`` batches, and so must the options."""
    options = options | {"accumulation_steps": arguments["gradient_accumulation_steps"]}
    return train(model, records, options, trainer_class=Trainer, **arguments)  # type: ignore[arg-type]


def main() -> None:
    tokens = [torch.randint(64, (TOKENS,)) for _ in range(256)]
    model = with_adapters(tiny_llama())
    records = [{"input_ids": ids, "labels": ids} for ids in tokens]
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 10, "logging_steps": 5}
    train_adapters(model, records, OPTIONS, output_dir="examples/output", **sizes)
    print(privacy(model).spent(1e-5))


if __name__ == "__main__":
    main()
