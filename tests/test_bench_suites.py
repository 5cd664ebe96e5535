"""The benchmark's cases: they build, their samples are independent, and the paper sizes have the published parameter counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_rows
import pytest
import torch
from torch import Tensor, nn

from benchmarks import row
from benchmarks.__main__ import unmeasured_first
from benchmarks.case import Case, Suite, in_order
from benchmarks.contenders import CONTENDERS
from benchmarks.models.bert import BERT
from benchmarks.models.gpt import GPT
from benchmarks.models.llama import Llama
from benchmarks.models.resnet import StandardizedConv2d
from benchmarks.suites import core, gpt2, layers, linear, llama, vision

SUITES: tuple[Suite, ...] = (core.SUITE, linear.SUITE, gpt2.SUITE, vision.SUITE, llama.SUITE, layers.SUITE)


def _params(sizes: str) -> list[Any]:
    return [pytest.param(case, id=f"{suite.name}-{case.name}") for suite in SUITES for case in suite.cases(sizes)]


def _case(suite: Suite, name: str, sizes: str = "small") -> Case:
    return next(case for case in suite.cases(sizes) if case.name == name)


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", _params("small"))
def test_small_case_has_a_loss_of_its_own_for_each_sample(case: Case) -> None:
    problem = case.build()
    with torch.no_grad():
        losses_b = problem.loss(problem.model(*problem.inputs), problem.targets)
        last = problem.sample(problem.batch_size - 1)
        alone_b = last.loss(last.model(*last.inputs), last.targets)
    assert losses_b.shape == (problem.batch_size,)
    assert losses_b.isfinite().all()
    torch.testing.assert_close(alone_b, losses_b[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("suite", "name"),
    [(layers.SUITE, "mha"), (layers.SUITE, "lstm"), (vision.SUITE, "vit"), (vision.SUITE, "vit-raw"), (vision.SUITE, "bert")],
)
def test_every_trainable_parameter_gets_a_private_gradient(suite: Suite, name: str) -> None:
    problem = _case(suite, name).build()
    whole = problem.mean_loss(problem.model)
    options = {"max_grad_norm": 1e6, "noise_multiplier": 0.0}
    torch.compile(whole, backend="flashnorm_eager", options=options)(*problem.inputs, problem.targets).backward()
    released = {name: parameter.grad for name, parameter in problem.model.named_parameters()}
    problem.model.zero_grad(set_to_none=True)
    whole(*problem.inputs, problem.targets).backward()
    for name, parameter in problem.model.named_parameters():
        if not parameter.requires_grad:
            assert released[name] is None, name
            continue
        assert released[name] is not None, name
        # Nothing is clipped at this norm, so the released gradient is the plain one. It may be zero up to rounding (the
        # bias of attention keys), hence the absolute tolerance.
        torch.testing.assert_close(
            released[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_class_token_and_positions_are_trained_in_raw_cases_only() -> None:
    for name, trained in (("vit", False), ("vit-raw", True)):
        model = _case(vision.SUITE, name).build().model
        assert model.get_parameter("class_token").requires_grad is trained
        assert model.get_parameter("positions").requires_grad is trained
        assert model.get_parameter("head.weight").requires_grad


@pytest.mark.parametrize("case", _params("paper"))
def test_paper_case_builds_and_runs_without_memory(case: Case) -> None:
    with torch.device("meta"), torch.no_grad():
        problem = case.build()
        first = problem.sample(0)
        losses_b = first.loss(first.model(*first.inputs), first.targets)
    tensors = [*problem.model.parameters(), *problem.model.buffers(), *problem.inputs, problem.targets]
    assert all(tensor.is_meta for tensor in tensors)
    assert problem.batch_size == case.point["B"]
    assert all(x.shape[0] == problem.batch_size for x in problem.inputs)
    assert losses_b.shape == (1,)


@pytest.mark.parametrize(
    ("suite", "name", "count"),
    [
        (gpt2.SUITE, "b8-t1024", 124_439_808),
        (gpt2.SUITE, "b8-t1024-untied", 124_439_808 + 50257 * 768),
        (vision.SUITE, "vit-ti-b64", 5_717_416),
        (vision.SUITE, "vit-s-b64", 22_050_664),
        (vision.SUITE, "vit-b-b64", 86_567_656),
        (vision.SUITE, "vit-l-b64", 304_326_632),
        (vision.SUITE, "r50x1-b64", 25_549_352),
        (vision.SUITE, "r101x1-b64", 44_541_480),
        (vision.SUITE, "bert-b64", 109_483_778),
        (llama.SUITE, "1b-b1", 1_235_814_400),
    ],
)
def test_paper_models_have_the_published_parameter_counts(suite: Suite, name: str, count: int) -> None:
    with torch.device("meta"):
        assert _parameter_count(_case(suite, name, "paper").build().model) == count


def test_gpt_matches_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = GPT(vocabulary=61, width=24, layers=2, heads=3, context=16)
    config = transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=16)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    names = {
        "wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm", "h": "blocks", "ln_1": "attention_norm",
        "ln_2": "mlp_norm", "attn.c_attn": "qkv", "attn.c_proj": "attention_out", "mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2",
    }  # fmt: skip
    _copy_weights(ours, dict(theirs.transformer.named_parameters()), names, transposed="c_")
    tokens_bt = torch.randint(61, (3, 11))
    torch.testing.assert_close(ours(tokens_bt), theirs(tokens_bt).logits, rtol=1e-4, atol=1e-5)


def test_llama_matches_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = Llama(vocabulary=61, width=24, layers=2, heads=6, key_heads=2, mlp_width=40, rotary_base=10000.0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=40,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    names = {
        "embed_tokens": "embedding", "layers": "decoder.layers", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm", "self_attn.q_proj": "query", "self_attn.k_proj": "key",
        "self_attn.v_proj": "value", "self_attn.o_proj": "attention_out", "mlp.gate_proj": "gate", "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }  # fmt: skip
    _copy_weights(ours, dict(theirs.model.named_parameters()), names)
    tokens_bt = torch.randint(61, (3, 11))
    torch.testing.assert_close(ours(tokens_bt), theirs(tokens_bt).logits, rtol=1e-4, atol=1e-5)


def test_bert_matches_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = BERT(vocabulary=61, width=24, layers=2, heads=3, context=16, classes=4)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=16, num_labels=4,
    )  # fmt: skip
    theirs = transformers.BertForSequenceClassification(config).eval()
    names = {
        "bert.embeddings.word_embeddings": "token_embedding", "bert.embeddings.position_embeddings": "position_embedding",
        "bert.embeddings.token_type_embeddings": "segment_embedding", "bert.embeddings.LayerNorm": "embedding_norm",
        "bert.encoder.layer": "blocks", "attention.self.qkv": "qkv", "attention.output.dense": "attention_out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp.0", "output.LayerNorm": "mlp_norm", "output.dense": "mlp.2", "bert.pooler.dense": "pooler",
        "classifier": "head",
    }  # fmt: skip
    _copy_weights(ours, _join_projections(dict(theirs.named_parameters())), names)
    tokens_bt = torch.randint(61, (3, 11))
    torch.testing.assert_close(ours(tokens_bt), theirs(tokens_bt).logits, rtol=1e-4, atol=1e-5)


def _copy_weights(ours: nn.Module, theirs: dict[str, Tensor], names: dict[str, str], transposed: str | None = None) -> None:
    """Gives `ours` the tensors of `theirs`, which `names` renames, and fails where one has no place or is missing."""
    filled = set()
    with torch.no_grad():
        for name, value in theirs.items():
            turned = value.T if transposed is not None and transposed in name and value.dim() == 2 else value
            for before, after in names.items():
                name = f".{name}".replace(f".{before}.", f".{after}.").removeprefix(".")
            ours.get_parameter(name).copy_(turned)
            filled.add(name)
    assert filled == {name for name, _ in ours.named_parameters()}


def _join_projections(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as one layer, in this order."""
    joined = dict(weights)
    for name in weights:
        if ".query." in name:
            parts = [joined.pop(name.replace("query", part)) for part in ("query", "key", "value")]
            joined[name.replace("query", "qkv")] = torch.cat(parts)
    return joined


def test_unrolled_layers_match_those_of_pytorch() -> None:
    for ours, theirs in ((layers.LSTM(6), nn.LSTM(6, 6, batch_first=True)), (layers.GRU(6), nn.GRU(6, 6, batch_first=True))):
        with torch.no_grad():
            ours.from_input.weight.copy_(theirs.weight_ih_l0)
            ours.from_input.bias.copy_(theirs.bias_ih_l0)
            ours.from_state.weight.copy_(theirs.weight_hh_l0)
            if ours.from_state.bias is None:
                theirs.bias_hh_l0.zero_()
            else:
                ours.from_state.bias.copy_(theirs.bias_hh_l0)
        x_btd = torch.randn(3, 5, 6)
        torch.testing.assert_close(ours(x_btd), theirs(x_btd)[0])


def test_standardized_filters_have_mean_zero_and_variance_one() -> None:
    conv = StandardizedConv2d(3, 5, 4, bias=False)
    filters = torch.stack([conv(basis.view(1, 3, 4, 4)).flatten() for basis in torch.eye(48)], dim=1)
    torch.testing.assert_close(filters.mean(1), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(filters.var(1, correction=0), torch.ones(5), rtol=1e-4, atol=0)


def test_case_names_are_unique_and_say_what_they_are() -> None:
    for suite in SUITES:
        for sizes in ("small", "paper"):
            cases = suite.cases(sizes)
            assert len({case.name for case in cases}) == len(cases), suite.name
            assert all(case.description and "B" in case.point for case in cases), suite.name


def test_headlines_run_first_and_suites_take_turns() -> None:
    """So that a run that its time ends early has something of everything."""
    order = in_order(SUITES, "paper")
    assert len(order) == sum(len(suite.paper) for suite in SUITES)
    headlines = [case.headline for _, case in order]
    assert headlines == sorted(headlines, reverse=True)
    assert [suite.name for suite, case in order if case.headline][:4] == ["linear", "gpt2", "vision", "llama"]
    rest = [suite.name for suite, case in order if not case.headline]
    assert set(rest[: len(SUITES)]) == {suite.name for suite in SUITES}


def test_every_named_contender_is_registered() -> None:
    """The runner leaves out whom it does not know, so a misspelt name would go unnoticed."""
    registered = {contender.name for contender in CONTENDERS}
    for suite in SUITES:
        for case in (*suite.small, *suite.paper):
            assert set(case.contenders or ()) <= registered, f"{suite.name}: {case.name}"


def test_a_second_run_begins_with_what_the_first_left_out(tmp_path: Path) -> None:
    plan = in_order([layers.SUITE], "small")
    names = [case.name for _, case in plan]
    measured = [bench_rows.make("flashnorm", name) for name in names[:3]]
    late = [bench_rows.make("vmap", names[1], error="not run: the time given to this run was over")]
    row.write(measured + late, tmp_path / "layers.json")
    (tmp_path / "soundness.json").write_text('[{"trap": "judged by the first run as well"}]')
    assert [case.name for _, case in unmeasured_first(plan, tmp_path)] == [names[1], *names[3:], names[0], names[2]]
    assert unmeasured_first(plan, tmp_path / "nothing") == plan
