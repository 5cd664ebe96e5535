"""What an eager step would cost on a GPU: its operators, counted while they run on fake tensors.

Each operator is one kernel by itself: it reads its arguments and writes its results. The time is a floor, since Python and the
dispatcher are often slower than a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from flashnorm_compile.passes.peaks import Peaks
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.hopper.estimate import roofline
from benchmarks.hopper.flops import flops_of, product_dtype


class CountedStep(TorchDispatchMode):
    """Within, operators are counted. `peak_bytes`: most memory held at once of what was made within."""

    def __init__(self, peaks: Peaks) -> None:
        super().__init__()
        self.peaks = peaks
        self.nbytes = self.flops = self.launches = self.live_bytes = self.peak_bytes = 0
        self.seconds = 0.0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not _shares(func) and func.namespace != "prim":
            given = {id(t): t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            made = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
            self._count(func, args, kwargs, out, [*given.values(), *made])
            for tensor in made:
                if id(tensor) not in given:
                    self._track(tensor)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, touched: list[Tensor]) -> None:
        flops = flops_of(func, args, kwargs, out)
        nbytes = 0 if _only_allocates(func) else sum(_bytes(tensor) for tensor in touched)
        if nbytes:
            self.launches += 1
            self.seconds += roofline(self.peaks, flops, nbytes, product_dtype(pytree.tree_leaves(args)))
        self.flops += flops
        self.nbytes += nbytes

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            if self._storages.pop(key, None) is not None:
                self.live_bytes -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _shares(func: Any) -> bool:
    """Whether an operator returns a view, which costs nothing."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _only_allocates(func: Any) -> bool:
    return func._schema.name in (
        "aten::empty",
        "aten::empty_strided",
        "aten::empty_like",
        "aten::new_empty",
        "aten::new_empty_strided",
    )


def _bytes(tensor: Tensor) -> int:
    """What an operator reads or writes of a tensor: an expanded one once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


__all__ = ["CountedStep"]
