"""Inductor's whole code for a Hopper GPU, generated on a machine that has none: graphs, wrappers, sources of every kernel.

    with hopper() as generated:
        torch.compile(model)(x)
    generated.graphs        forward and backward, in the order of code generation

How: models and inputs are on the CPU, real or (of any size, without memory) fake. The joint graph is traced as usual. Once it
is there, the metadata of every tensor moves to `cuda:0`, so that joint-graph passes, partitioning, lowerings and code
generation see a Hopper GPU. Attention, which picks its operator while it is traced, is told CUDA's choice (see `attention.py`).
Whatever else decides by device while tracing decides for a CPU; of the bench's models nothing does.

Nothing is launched. A compiled graph that is called ends the `with` block, or hands back fake results where inputs are fake and
`go_on` is set. Gradients' code is generated with the forward's.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, fx
from torch._inductor import async_compile, compile_fx, graph
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from benchmarks.hopper.attention import attention_of_cuda
from benchmarks.hopper.device import CUDA, pretended_device
from benchmarks.hopper.estimate import Work, peaks_named, scheduled_work
from benchmarks.hopper.memory import Storage, Walked, nbytes_in, walk


@dataclass
class GeneratedGraph:
    """What became of one graph. `kind` is "forward", "backward" or "inference"."""

    kind: str
    captured: fx.GraphModule
    """Before Inductor's post-grad passes."""
    saved_names: list[str]
    """Names of the outputs of `captured`, through which a backward graph finds what its forward graph saved."""
    module: fx.GraphModule | None = None
    """After them: what was lowered."""
    code: str = ""
    kernels: list[tuple[str, str]] = field(default_factory=list)
    """Name and source of each Triton kernel."""
    work: list[Work] = field(default_factory=list)
    walked: Walked | None = None
    working: Walked | None = None
    """The same without the memory of what the graph returns."""

    @property
    def library_calls(self) -> dict[str, int]:
        return dict(self.walked.library_calls) if self.walked else {}

    @property
    def peak_bytes(self) -> int:
        return self.walked.peak_bytes if self.walked else 0


@dataclass
class Generated:
    """All graphs, and their sums."""

    device: str
    graphs: list[GeneratedGraph] = field(default_factory=list)
    calls: list[GeneratedGraph] = field(default_factory=list)
    """Graphs in the order in which they would have run, as often as they would have; needs `go_on`."""

    @property
    def kernels(self) -> list[tuple[str, str]]:
        return [kernel for one in self.graphs for kernel in one.kernels]

    @property
    def library_calls(self) -> int:
        return sum(count for one in self.graphs for count in one.library_calls.values())

    @property
    def launches(self) -> int:
        """Launches of Triton kernels when each graph runs once."""
        return sum(one.walked.launches for one in self.graphs if one.walked)

    @property
    def nbytes(self) -> int:
        return sum(work.nbytes for one in self.graphs for work in one.work)

    @property
    def flops(self) -> int:
        return sum(work.flops for one in self.graphs for work in one.work)

    def seconds(self, ran: Sequence[GeneratedGraph] | None = None) -> float:
        """Roofline time of the graphs in `ran`; of each graph once if none are given."""
        peaks = peaks_named(self.device)
        return sum(work.seconds(peaks) for one in (self.graphs if ran is None else ran) for work in one.work)

    @property
    def peak_bytes(self) -> int:
        """Largest memory of a graph beyond parameters and inputs; a backward's holds what its forward saved."""
        return max((one.peak_bytes for one in self.graphs), default=0)


class WouldRunError(Exception):
    """Raised where generated code would have been launched; ends `hopper()` quietly."""


# Passes of Inductor that run something on the device: folding constants, and timing whether padded operands multiply faster.
_NO_DEVICE_NEEDED = {"joint_graph_constant_folding": False, "shape_padding": False}


@contextlib.contextmanager
def hopper(device: str = "H200", *, devices: int = 1, go_on: bool = False) -> Iterator[Generated]:
    """Within, `torch.compile` generates code for `device` ("H200" or "H100", `devices` in the machine) and launches nothing.

    With `go_on` compiled graphs return fake tensors, so that what follows them (a loop, an optimizer) goes on; every input has
    to be fake for that. Otherwise the block ends at the first launch. Errors of tracing, lowering and code generation pass
    through. Afterwards compiled code is forgotten (`torch._dynamo.reset`) and everything is as it was before.
    """
    generated = Generated(device)
    recorder = _Recorder(generated, go_on)
    settings = {**_NO_DEVICE_NEEDED, "force_disable_caches": True, "compile_threads": 1}
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(pretended_device(device, devices))
        stack.enter_context(attention_of_cuda())
        for owner, name, wrapped in _hooks(recorder):
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # it says that caches are off, as was asked for
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False))
        stack.enter_context(torch._inductor.config.patch(settings))
        stack.enter_context(contextlib.suppress(WouldRunError))
        stack.callback(torch._dynamo.reset)
        yield generated


def _hooks(recorder: _Recorder) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Private functions of Inductor (torch 2.13) that are wrapped: owner, name, what stands in."""
    joint_passes, compile_inner, codegen = (
        compile_fx._recursive_joint_graph_passes,
        compile_fx._compile_fx_inner,
        graph.GraphLowering.codegen,
    )

    def on_joint(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        Retarget().graph(gm)
        return joint_passes(gm, *args, **kwargs)

    def on_compile_inner(gm: fx.GraphModule, example_inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        move = Retarget()
        move.graph(gm)
        started = recorder.start(gm, kwargs)
        compile_inner(gm, [move.tensor(p.meta["val"]) for p in gm.graph.find_nodes(op="placeholder")], *args, **kwargs)
        return recorder.stand_in(started)

    def on_codegen(self: Any) -> Any:
        result = codegen(self)
        wrapper: Any = result[0]  # with a map of its lines, or text alone
        recorder.finish(self, getattr(wrapper, "value", wrapper))
        return result

    def on_kernel(self: Any, name: str, source: str, **kwargs: Any) -> Any:
        recorder.generated.graphs[-1].kernels.append((name, source))
        return types.SimpleNamespace(run=_never)

    return [
        (compile_fx, "_recursive_joint_graph_passes", on_joint),
        (compile_fx, "_compile_fx_inner", on_compile_inner),
        (graph.GraphLowering, "codegen", on_codegen),
        (async_compile.AsyncCompile, "triton", on_kernel),
    ]


def _never(*args: Any, **kwargs: Any) -> None:
    raise WouldRunError


class _Recorder:
    """Fills `Generated` while graphs pass by."""

    def __init__(self, generated: Generated, go_on: bool) -> None:
        self.generated, self.go_on = generated, go_on
        self.saved: dict[str, Storage] = {}

    def start(self, gm: fx.GraphModule, settings: dict[str, Any]) -> GeneratedGraph:
        kind = "backward" if settings.get("is_backward") else "inference" if settings.get("is_inference") else "forward"
        names = [getattr(value, "name", "") for value in pytree.tree_leaves(gm.graph.output_node().args[0])]
        self.generated.graphs.append(GeneratedGraph(kind, gm, names))
        return self.generated.graphs[-1]

    def finish(self, lowering: Any, code: str) -> None:
        one = self.generated.graphs[-1]
        one.module, one.code = lowering.module, code
        one.work = scheduled_work(lowering)
        inputs = {node.name for node in one.captured.graph.find_nodes(op="placeholder")} | set(lowering.graph_inputs)
        held = {name: storage for name, storage in self.saved.items() if one.kind == "backward" and name in inputs}
        one.walked = walk(code, nbytes_in(lowering), held)
        returned = {storage.name for storage in one.walked.outputs if storage is not None}
        one.working = walk(code, nbytes_in(lowering), held, returned)
        named = zip(one.saved_names, one.walked.outputs, strict=False)
        self.saved = {name: storage for name, storage in named if storage is not None}

    def stand_in(self, one: GeneratedGraph) -> Callable[[list[Any]], Any]:
        """What is called instead of the generated code."""
        outputs = pytree.tree_map_only(fx.Node, lambda node: node.meta["val"], one.captured.graph.output_node().args[0])

        def run(args: list[Any]) -> Any:
            if not (self.go_on and any(isinstance(arg, FakeTensor) for arg in args)):
                raise WouldRunError
            args.clear()
            self.generated.calls.append(one)
            return pytree.tree_map_only(Tensor, _fake_on_cpu, outputs)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _fake_on_cpu(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


class Retarget:
    """Moves fake tensors to `cuda:0`; tensors that shared storage still do."""

    def __init__(self) -> None:
        self.storages: dict[Any, tuple[Any, Tensor]] = {}

    def tensor(self, value: Any) -> Any:
        """The same tensor on the GPU; anything else, and what is there already, as it is."""
        if not isinstance(value, FakeTensor) or value.device.type == "cuda":
            return value
        storage = value.untyped_storage()
        key = storage._cdata, value.dtype
        with value.fake_mode:
            if key not in self.storages:
                elements = storage.nbytes() // value.element_size()
                # The old storage is kept, so that its address is not given to another one.
                self.storages[key] = storage, torch.empty_strided((elements,), (1,), dtype=value.dtype, device=CUDA)
            base = self.storages[key][1]
            if value.is_contiguous() and value.storage_offset() == 0 and value.numel() == base.numel():
                return base if value.dim() == 1 else base.view(value.shape)
            return torch.as_strided(base, value.shape, value.stride(), value.storage_offset())

    def graph(self, gm: fx.GraphModule) -> None:
        """Every node's value, and every `device` that a node names."""
        for node in gm.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(self.tensor, node.meta["val"])
