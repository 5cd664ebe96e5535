"""Language models of Hugging Face's transformers, tiny and with random weights, and LoRA through PEFT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from models.case import Case, Tensors, own_loss, spread, tokens

VOCABULARY = 37
LENGTH = 9
# Wide initial weights: with the usual 0.02 every sample of an untrained model has nearly the same gradient norm.
_WIDE: dict[str, Any] = {"initializer_range": 0.3}
_SMALL: dict[str, Any] = _WIDE | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: dict[str, Any] = _SMALL | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
}


def gpt2(attention: str = "sdpa", dropout: float = 0.0) -> nn.Module:
    """GPT-2; its embedding is tied to its head. Naming the loss keeps a log call out of the graph."""
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        use_cache=False,
        attn_implementation=attention,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        **_SMALL,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model.train()


def gpt2_lora() -> nn.Module:
    """LoRA of rank 3 on GPT-2's attention; everything else is frozen. The second factor starts away from zero."""
    lora = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(gpt2(), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def llama() -> nn.Module:
    """Llama with grouped queries (4 heads, 2 key-value heads) and an untied head."""
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        use_cache=False,
        tie_word_embeddings=False,
        **_SMALL,
    )
    return transformers.LlamaForCausalLM(config).train()


def bert_masked() -> nn.Module:
    """BERT of one layer with its masked-language head (tied)."""
    return transformers.BertForMaskedLM(transformers.BertConfig(**_BERT | {"num_hidden_layers": 1})).train()


def bert_classifier(attention: str = "eager") -> nn.Module:
    """BERT of one layer with three classes."""
    narrow = {"initializer_range": 0.12, "num_hidden_layers": 1}  # the pooler's tanh saturates beyond
    config = transformers.BertConfig(**_BERT | narrow, num_labels=3, attn_implementation=attention)
    config.problem_type = "single_label_classification"
    return transformers.BertForSequenceClassification(config).train()


def albert() -> nn.Module:
    """ALBERT: two passes through one layer's parameters."""
    config = transformers.AlbertConfig(**_BERT, embedding_size=8, classifier_dropout_prob=0.0, num_labels=3)
    config.problem_type = "single_label_classification"
    return transformers.AlbertForSequenceClassification(config).train()


def t5() -> nn.Module:
    """T5: encoder and decoder share the embedding; the layers of each share one relative-position bias."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    return transformers.T5ForConditionalGeneration(config).train()


def mamba() -> nn.Module:
    """Mamba without its CUDA kernels: the slow path's loop over time, unrolled."""
    config = transformers.MambaConfig(
        hidden_size=8, state_size=4, num_hidden_layers=1, conv_kernel=3, expand=2, use_cache=False, **_SMALL
    )
    return transformers.MambaForCausalLM(config).train()


def vit() -> nn.Module:
    """ViT with 4 x 4 patches of 12 x 12 images, and three classes."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        **_WIDE,
    )
    config.problem_type = "single_label_classification"
    return transformers.ViTForImageClassification(config).train()


def labelled_tokens(batch_size: int, length: int = LENGTH) -> Tensors:
    """Token ids that are their own labels."""
    ids = tokens(batch_size, length, VOCABULARY)
    return {"input_ids": ids, "labels": ids.clone()}


def _ids_only(batch_size: int) -> Tensors:
    return {"input_ids": tokens(batch_size, LENGTH, VOCABULARY)}


def _next_tokens(inputs: Tensors) -> Tensors:
    ids = inputs["input_ids"]
    return {"labels": ids[:, 1:].clone(), "weight": spread(ids.shape[0])}


def _next_token_loss(output: Any, targets: Tensors) -> Tensor:
    logits = output.logits[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(logits, targets["labels"], reduction="none").mean(1)
    return (losses * targets["weight"]).mean()


def _lengths(batch_size: int, length: int) -> Tensor:
    return torch.tensor([length - b % (length - 2) for b in range(batch_size)])


def _padded(batch_size: int) -> Tensors:
    ids = tokens(batch_size, LENGTH, VOCABULARY)
    mask = (torch.arange(LENGTH) < _lengths(batch_size, LENGTH)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _masked_labels(batch_size: int) -> Tensors:
    inputs = _padded(batch_size)
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def _classified(batch_size: int) -> Tensors:
    return _padded(batch_size) | {"labels": torch.randint(0, 3, (batch_size,))}


def _translated(batch_size: int) -> Tensors:
    return _padded(batch_size) | {"labels": tokens(batch_size, 5, VOCABULARY)}


def _images(batch_size: int) -> Tensors:
    pixels = torch.randn(batch_size, 3, 12, 12) * spread(batch_size)[:, None, None, None]
    return {"pixel_values": pixels, "labels": torch.randint(0, 3, (batch_size,))}


def _valid_share(inputs: Tensors) -> float:
    labels = inputs["labels"]
    return (labels != -100).sum().item() / labels.shape[1]


def _causal(name: str, build: Any) -> Case:
    # The last position has no next token: T - 1 positions count.
    return Case(name, build, labelled_tokens, own_loss, options={"loss_normalizer": float(LENGTH - 1)})


CASES = [
    _causal("gpt2", gpt2),
    _causal("gpt2_eager_attention", lambda: gpt2("eager")),
    Case("gpt2_loss_outside", gpt2, _ids_only, _next_token_loss, targets=_next_tokens),
    _causal("gpt2_lora", gpt2_lora),
    _causal("llama", llama),
    Case(
        "bert_masked",
        bert_masked,
        _masked_labels,
        own_loss,
        options={"loss_normalizer": float(LENGTH)},
        share=_valid_share,
    ),
    Case("bert_classifier", bert_classifier, _classified, own_loss),
    Case("bert_classifier_sdpa", lambda: bert_classifier("sdpa"), _classified, own_loss),
    Case("albert", albert, _classified, own_loss),
    Case("t5", t5, _translated, own_loss, options={"loss_normalizer": 5.0}),
    _causal("mamba", mamba),
    Case("vit", vit, _images, own_loss),
]
