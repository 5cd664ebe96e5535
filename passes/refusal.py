"""Turns a ``Mixed`` type into an error that a user can act on: what, where, why, what to do."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from .errors import SampleMixingError
from .sample_types import Affine, Mixed, SampleType

# (pattern over "operator | module classes | reason", remedy); the first that matches is shown.
REMEDIES = (
    (
        r"BatchNorm|batch_norm",
        "Replace BatchNorm by GroupNorm, LayerNorm or InstanceNorm (no running statistics), or freeze it with .eval().",
    ),
    (
        r"no rule",
        "Register a rule with flashnorm_compile.register_rule, or write the operation with operators that have one.",
    ),
    (r"scale_grad_by_freq", "Use scale_grad_by_freq=False."),
    (r"belongs to no sample", "Take the term out of the loss: weight decay belongs into the optimizer."),
    (
        r"used outside the compiled part",
        "Return per-sample values or a scalar loss, or compile the loss together with the model.",
    ),
    (
        r"batch-dependent number|number '",
        "Normalise each sample's loss by its own number, set loss_normalizer, or declare a public number: batch_dims={name: None}.",
    ),
    (
        r"attention|softmax",
        "Keep the samples along a dimension of their own ([B, T, ...], not [B*T, ...]) so that none attends to another.",
    ),
    (
        r"matrix product",
        "A loss that compares samples (contrastive, in-batch) has no per-sample gradient; use the sample's own negatives.",
    ),
    (
        r"moves values|roll|flip|permut|index picks|picks",
        "Do not reorder, select or shift along the batch dimension; if the input has no samples there: batch_dims={name: None}.",
    ),
    (
        r"taken over the samples|runs over the samples|var_mean|sum over",
        "Compute the statistic within each sample, or pass a fixed value in as a buffer.",
    ),
)
DEFAULT_REMEDY = (
    "Keep the samples independent. If an input is public or has its samples elsewhere, say so with "
    "batch_dims={name: dimension or None}."
)


def mixing_error(what: str, mixed: SampleType) -> SampleMixingError:
    """The error for a released value ``what`` (such as "the gradient of 'fc.weight'")."""
    if not isinstance(mixed, Mixed):
        why = "a sum over samples is combined with public values" if isinstance(mixed, Affine) else f"its type is {mixed}"
        return SampleMixingError(f"{what} cannot be clipped per sample: {why}.\n{DEFAULT_REMEDY}")
    node = mixed.origin
    return SampleMixingError(
        f"{what} cannot be clipped per sample: samples are mixed on the way.\n"
        f"  operator: {operator_name(node)}\n"
        f"  module:   {module_path(node) or '(none)'}\n"
        f"  source:   {source_line(node) or '(unknown)'}\n"
        f"  why:      {mixed.why}\n"
        f"  remedy:   {remedy(mixed)}"
    )


def remedy(mixed: Mixed) -> str:
    classes = " ".join(name for name, _ in _modules(mixed.origin))
    text = f"{operator_name(mixed.origin)} | {classes} | {source_line(mixed.origin)} | {mixed.why}"
    return next((advice for pattern, advice in REMEDIES if re.search(pattern, text)), DEFAULT_REMEDY)


def operator_name(node: fx.Node) -> str:
    return str(node.target)


def _modules(node: fx.Node) -> list[tuple[str, str]]:
    """(class, path) of the modules around the node, outermost first."""
    stack: Any = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or _forward_twin(node, "nn_module_stack")
    found = []
    for path, cls in (stack or {}).values():
        name = cls if isinstance(cls, str) else getattr(cls, "__qualname__", str(cls))
        found.append((name.rsplit(".", 1)[-1], readable_path(path)))
    return found


def module_path(node: fx.Node) -> str:
    modules = _modules(node)
    return f"{modules[-1][1]} ({modules[-1][0]})" if modules else ""


def readable_path(path: str) -> str:
    """``L['self']._modules['layers']['0']`` as ``layers.0``."""
    path = re.sub(r"\._modules|\._parameters|\._buffers", "", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    return re.sub(r"^[LG]\.(self\b\.?)?", "", path) or "self"


def source_line(node: fx.Node) -> str:
    """The user's innermost line that produced the node, as ``file:line: code``."""
    trace = node.meta.get("stack_trace") or _forward_twin(node, "stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n([^\n]*)', trace)
    if not frames:
        return ""
    own = [frame for frame in frames if not re.search(r"/torch/(nn|_|utils|functional)", frame[0])] or frames
    file, line, code = own[-1]
    return f"{file}:{line}: {code.strip()}"


def _forward_twin(node: fx.Node, key: str) -> Any:
    """Backward nodes carry the sequence number of the forward operation they differentiate."""
    number = node.meta.get("seq_nr")
    if number is None:
        return None
    twins = (n for n in node.graph.nodes if n.meta.get("seq_nr") == number and n.meta.get(key))
    twin = next(twins, None)
    return twin.meta[key] if twin is not None else None
