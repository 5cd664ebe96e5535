"""``DistributedDataParallel``: what its reducer does behind the backward pass, a private graph does inside it.

DDP averages ``p.grad`` over the ranks in hooks that run after the gradient was released, clipped and noised for one rank alone.
A private graph that runs inside DDP's forward pass sums the clipped gradients of all ranks itself, adds the noise behind that,
and lets DDP's reducer rest for this backward pass, as ``no_sync()`` would.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..passes.errors import UnsupportedGraphError
from .groups import register_data_group


def active() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass runs now."""
    return DistributedDataParallel._get_active_ddp_module()


def data_group(ddp: DistributedDataParallel, parameters: Iterable[Any]) -> ProcessGroup:
    """The process group over which the gradients of ``parameters``, those of one graph, are to be summed.

    Raises:
        UnsupportedGraphError: DDP was asked for something that its reducer would do and a private graph does not, or it does not
            keep these parameters equal on all ranks.
    """
    asked = {
        "static_graph=True": ddp.static_graph,
        "mixed_precision": ddp.mixed_precision is not None,
        "register_comm_hook()": bool(ddp._comm_hooks),
        "join()": ddp._join_config.enable,
    }
    found = [name for name, given in asked.items() if given]
    if found:
        raise UnsupportedGraphError(
            f"DistributedDataParallel was given {', '.join(found)}, which concerns how its reducer sums gradients. Under private "
            "training the compiled graph sums them, before the noise is added. Leave it out; to pad uneven inputs use "
            "private_dataloader, for types of reduction flashnorm_compile.replicate(model, mp_policy=...)."
        )
    equal = {id(parameter) for parameter in ddp.parameters() if not getattr(parameter, "_ddp_ignored", False)}
    if any(id(parameter) not in equal or isinstance(parameter, DTensor) for parameter in parameters):
        raise UnsupportedGraphError(
            "a graph that DistributedDataParallel runs has trainable parameters that it does not keep equal on all ranks (ignored "
            "ones, those of other modules, or distributed ones). Freeze them, put them into the wrapped module, or shard the model "
            "with flashnorm_compile.fully_shard instead."
        )
    register_data_group(ddp.process_group)
    return ddp.process_group


def rest(group: ProcessGroup | None) -> Callable[..., None] | None:
    """Makes the reducer leave the gradients of this pass as they are; buffers go on being broadcast by DDP.

    Called in every forward pass. ``group``: what ``data_group`` said when the graph was compiled, None if DDP did not run it then.

    Returns:
        What has to be called when the backward pass begins; None without DDP.

    Raises:
        UnsupportedGraphError: DDP runs this graph now and did not when it was compiled, or the other way round.
    """
    ddp = active()
    if (None if ddp is None else ddp.process_group) is not group:
        was = "outside of DistributedDataParallel" if group is None else "inside DistributedDataParallel"
        raise UnsupportedGraphError(
            f"a graph that was compiled {was} runs {'inside' if group is None else 'outside of'} it, or in another one. Wrap the "
            "model before its first step, call only the wrapped model while it trains, and torch._dynamo.reset() after a change."
        )
    if ddp is None:
        return None
    ddp.require_backward_grad_sync = False  # read at the end of DDP's forward pass: the reducer's hooks then wait for nothing
    owner = weakref.ref(ddp)

    def go_on(*_: Any) -> None:
        if (ddp := owner()) is not None:
            ddp.require_forward_param_sync = True

    return go_on


def names_without_ddp(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """``named_parameters()`` with the names that the parameters have without DistributedDataParallel and torch.compile."""
    wrapped = [f"{path}." if path else "" for path, child in model.named_modules() if isinstance(child, DistributedDataParallel)]
    found = []
    for name, parameter in model.named_parameters():
        for path in sorted(wrapped, key=len, reverse=True):
            if name.startswith(f"{path}module."):
                name = path + name.removeprefix(f"{path}module.")
        found.append((name.replace("_orig_mod.", ""), parameter))
    return found
