"""Finds the role of every input of a captured graph: parameter, public, or private with its sample dimension."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from .passes.errors import BatchDimensionError, OptionsError, UnsupportedGraphError
from .passes.graph_spec import InputSpec, Role
from .passes.sample_types import expression


def source_name(node: fx.Node) -> str:
    """Dynamo's name for where the input comes from, such as ``L['self']._modules['fc']._parameters['weight']``."""
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(node, "_dynamo_source", None)
    if source is None:
        return node.name
    name = source.name
    return name() if callable(name) else name


_PLUMBING = {"_modules", "_parameters", "_buffers", "__dict__", "_orig_mod"}


def readable_name(source: str) -> str:
    """``fc.weight`` for ``L['self']._modules['fc']._parameters['weight']``; an argument keeps its own name."""
    parts = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", source).split(".")
    kept = [part for part in parts[1:] if part not in _PLUMBING] if parts[0] in ("L", "G") else parts
    return ".".join(kept)


def example_of(node: fx.Node) -> Any:
    argument = node.meta.get("grapharg")
    example = getattr(argument, "example", None)
    return example if example is not None else node.meta.get("example_value")


def traced(node: fx.Node) -> torch.Tensor:
    """The tensor that tracing saw: its sizes may be symbols."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else example_of(node)


def classify(gm: fx.GraphModule, batch_dims: Mapping[str, int | None] | None) -> list[InputSpec]:
    """The roles of the graph's placeholders, in order.

    Private is every tensor input that is neither parameter nor module buffer, unless ``batch_dims`` says it is public.

    Raises:
        BatchDimensionError: sizes along the sample dimensions disagree, or a dimension does not exist.
        OptionsError: ``batch_dims`` names an input that the graph does not have.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    sources = [source_name(node) for node in nodes]
    roots = _parameter_root(nodes, sources)
    dims = _Dimensions(batch_dims or {})
    specs: list[InputSpec] = []
    for node, source in zip(nodes, sources, strict=True):
        name = readable_name(source)
        short = name.removeprefix(roots) if roots else name
        specs.append(_classify_one(node, source, short, name, dims))
    specs = _with_unique_parameters(specs)
    dims.check_all_used([spec.name for spec in specs if spec.role in (Role.PRIVATE, Role.SCALAR, Role.PUBLIC)])
    _check_sizes(nodes, specs)
    return specs


def _parameter_root(nodes: list[fx.Node], sources: list[str]) -> str:
    """The name of the variable that holds the module, if all parameters hang on one."""
    names = [readable_name(s) for n, s in zip(nodes, sources, strict=True) if isinstance(example_of(n), nn.Parameter)]
    roots = {name.split(".", 1)[0] for name in names if "." in name}
    return f"{roots.pop()}." if len(roots) == 1 and all("." in name for name in names) else ""


class _Dimensions:
    """``batch_dims`` with its keys matched to inputs by full name or by last component."""

    def __init__(self, given: Mapping[str, int | None]) -> None:
        self.given = given
        self.used: set[str] = set()

    def find(self, *names: str) -> tuple[bool, int | None]:
        for name in (*names, *(name.rsplit(".", 1)[-1] for name in names)):
            if name in self.given:
                self.used.add(name)
                return True, self.given[name]
        return False, 0

    def check_all_used(self, names: list[str]) -> None:
        for key in self.given:
            if key not in self.used:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise OptionsError(
                    f"batch_dims names {key!r}, which is not an input of the compiled part{hint}. "
                    f"Its inputs: {', '.join(names) or 'none'}."
                )


def _classify_one(node: fx.Node, source: str, short: str, full: str, dims: _Dimensions) -> InputSpec:
    example = example_of(node)
    if not isinstance(example, torch.Tensor) or getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False):
        return InputSpec(full, Role.PUBLIC)  # sizes and Python numbers
    if isinstance(example, nn.Parameter):
        return InputSpec(short, Role.PARAMETER if example.requires_grad else Role.PUBLIC)
    declared, dim = dims.find(full, short)
    if declared and dim is None:
        if example.requires_grad:
            raise UnsupportedGraphError(
                f"the input {full!r} is declared public but requires a gradient, which would leave the graph unclipped.\n"
                "Make it an nn.Parameter of the compiled module, or pass it detached."
            )
        return InputSpec(full, Role.PUBLIC)
    if re.search(r"\b_buffers\b", source) and not declared:
        return InputSpec(short, Role.PUBLIC)
    if example.dim() == 0:
        return InputSpec(full, Role.SCALAR)
    assert dim is not None
    if not -example.dim() <= dim < example.dim():
        raise BatchDimensionError(f"batch_dims={{{full!r}: {dim}}}: the input has {example.dim()} dimensions ({_shape(example)}).")
    return InputSpec(full, Role.PRIVATE, dim % example.dim())


def _with_unique_parameters(specs: list[InputSpec]) -> list[InputSpec]:
    """Two modules may hold parameters of one name; a number keeps them apart."""
    seen: dict[str, int] = {}
    result = []
    for spec in specs:
        if spec.role is Role.PARAMETER:
            count = seen[spec.name] = seen.get(spec.name, 0) + 1
            if count > 1:
                spec = InputSpec(f"{spec.name}#{count}", spec.role, spec.dim)
        result.append(spec)
    return result


def _check_sizes(nodes: list[fx.Node], specs: list[InputSpec]) -> None:
    sizes = {spec.name: traced(n).shape[spec.dim] for n, spec in zip(nodes, specs, strict=True) if spec.role is Role.PRIVATE}
    if len({_comparable(size) for size in sizes.values()}) <= 1:
        return
    first = next(iter(sizes.values()))
    if all(_agree(first, size) for size in sizes.values()):
        return
    shown = "\n".join(
        f"  {spec.name}: {_shape(traced(n))}, samples along dimension {spec.dim}"
        for n, spec in zip(nodes, specs, strict=True)
        if spec.role is Role.PRIVATE
    )
    raise BatchDimensionError(
        "the private inputs do not have the same number of samples:\n"
        f"{shown}\n"
        "Every tensor input that is neither a parameter nor a buffer holds one sample per index of dimension 0, unless you say "
        'otherwise: batch_dims={"name": dimension} for samples elsewhere, {"name": None} for an input that is public (the same for '
        "all samples, computed from none)."
    )


def _comparable(size: int | torch.SymInt) -> Any:
    return expression(size)


def _agree(one: Any, other: Any) -> bool:
    """Equal, or not decidable now (unbacked sizes, which the typed graph compares again)."""
    for size in (one, other):
        if isinstance(size, torch.SymInt) and not size.node.has_hint():
            return True
    return bool(one == other)


def _shape(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"
