"""Functional collectives. Whether ranks on the other side hold other samples is a property of the group, and the spec says it.

``ctx.data_groups``: groups whose ranks hold different samples (data parallelism). A value of single samples must not meet the other
ranks' there: only sums over samples, and public values, may pass.
"""

from __future__ import annotations

import torch
from torch import fx

from ..sample_types import PUBLIC, Mixed, Public, SampleSum
from .registry import Context, Result, rule

c10d = torch.ops._c10d_functional
# Operators of these namespaces talk to other ranks; what has no rule here mixes, even with one sample on each rank.
NAMESPACES = ("c10d", "symm_mem", "fsdp", "_dtensor", "dtensor")
GATHERS = {c10d.all_gather_into_tensor.default}
REDUCTIONS = {c10d.reduce_scatter_tensor.default, c10d.all_reduce.default}
WAIT = c10d.wait_tensor.default
LINEAR_REDUCTIONS = ("sum", "avg")

UNKNOWN_GROUP = "values of samples pass to other ranks through a process group of which nothing is known"
OTHER_RANKS = "values of single samples are combined with those of the samples of other ranks"
NOT_LINEAR = "sums over the samples of several ranks are combined in a way that is not linear"


def is_collective(target: object) -> bool:
    """Whether an operator talks to other ranks."""
    namespace = getattr(target, "namespace", "")
    return any(part in namespace for part in NAMESPACES)


def group_of(node: fx.Node) -> str:
    """The name of the process group, the last argument of every functional collective."""
    return str(node.args[-1])


@rule(WAIT)
def wait(ctx: Context, node: fx.Node) -> Result:
    return ctx.type(node.args[0])


@rule(*GATHERS)
def gather(ctx: Context, node: fx.Node) -> Result:
    type_ = ctx.type(node.args[0])
    if isinstance(type_, Public) and not type_.scale:
        return PUBLIC
    return type_ if isinstance(type_, Mixed) else ctx.mixed(node, _why(ctx, node))


@rule(*REDUCTIONS)
def reduce(ctx: Context, node: fx.Node) -> Result:
    type_ = ctx.type(node.args[0])
    if isinstance(type_, Mixed):
        return type_
    if isinstance(type_, Public) and not type_.scale:
        return PUBLIC
    if not isinstance(type_, SampleSum) or group_of(node) not in ctx.data_groups:
        return ctx.mixed(node, _why(ctx, node))
    return type_ if node.args[1] in LINEAR_REDUCTIONS else ctx.mixed(node, NOT_LINEAR)


def _why(ctx: Context, node: fx.Node) -> str:
    return OTHER_RANKS if group_of(node) in ctx.data_groups else UNKNOWN_GROUP
