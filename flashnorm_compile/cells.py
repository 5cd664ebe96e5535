"""Recurrent cells as matrix products: a GPU has one kernel for a whole cell, behind which no sample can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear
from torch.utils import _pytree as pytree


def split_cells(gm: fx.GraphModule) -> None:
    """Replaces ``torch.gru_cell`` and ``torch.lstm_cell``, in place, by what they are defined as (torch.nn.GRUCell, LSTMCell)."""
    graph = gm.graph
    for node in list(graph.nodes):
        write = _CELLS.get(node.target) if node.op == "call_function" else None
        if write is None:
            continue
        last = node.prev
        with graph.inserting_before(node):
            traced = partial(fx.Proxy, tracer=fx.proxy.GraphAppendingTracer(graph))
            args, kwargs = fx.map_arg((node.args, node.kwargs), traced)
            result = pytree.tree_map(_alike, write(*args, **kwargs), node.meta["example_value"])
        while (last := last.next) is not node:
            last.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        _replace(node, result)
    gm.recompile()


def _gru(x: Tensor, state: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None) -> Tensor:
    x_reset, x_update, x_new = linear(x, w_x, b_x).chunk(3, -1)
    h_reset, h_update, h_new = linear(state, w_h, b_h).chunk(3, -1)
    reset, update = torch.sigmoid(x_reset + h_reset), torch.sigmoid(x_update + h_update)
    new = torch.tanh(x_new + reset * h_new)
    return new + update * (state - new)


def _lstm(
    x: Tensor, states: tuple[Tensor, Tensor], w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    state, cell = states
    take_in, forget, new, put_out = (linear(x, w_x, b_x) + linear(state, w_h, b_h)).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(take_in) * torch.tanh(new)
    return torch.sigmoid(put_out) * torch.tanh(cell), cell


_CELLS: Mapping[Any, Callable[..., Any]] = {torch.gru_cell: _gru, torch.lstm_cell: _lstm}


def _alike(result: fx.Proxy, example: Tensor) -> fx.Proxy:
    """In the type that the cell has given: under autocast a GPU computes all of it in the lower one."""
    return result.to(example.dtype)


def _replace(node: fx.Node, result: fx.Proxy | tuple[fx.Proxy, ...]) -> None:
    if isinstance(result, fx.Proxy):
        node.replace_all_uses_with(result.node)
    else:
        for user in list(node.users):  # getitem
            user.replace_all_uses_with(result[user.args[1]].node)
            node.graph.erase_node(user)
    node.graph.erase_node(node)
