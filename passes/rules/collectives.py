"""Functional collectives. What the ranks on the other side hold is a property of the process group, and the spec says it.

``ctx.data_groups``: groups whose ranks hold different samples (data parallelism). A value of single samples must not meet the other
ranks' there: only sums over samples, and public values, may pass.

``ctx.model_group``: the group whose ranks compute parts of the same samples (tensor parallelism), all by the same program. What
they join or reduce is of one sample as long as its place in the batch is the same.
"""

from __future__ import annotations

import torch
from torch import fx

from ..sample_types import PUBLIC, Mixed, PerSample, Public, SampleSum, SampleType, divides
from .registry import Context, Result, present, rule

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
# Operators of these namespaces talk to other ranks; what has no rule here mixes, even with one sample on each rank.
NAMESPACES = ("c10d", "symm_mem", "fsdp", "_dtensor", "dtensor")
GATHERS = {c10d.all_gather_into_tensor.default}
ALL_REDUCE = c10d.all_reduce.default
REDUCTIONS = {c10d.reduce_scatter_tensor.default, ALL_REDUCE}
WAIT = c10d.wait_tensor.default
RESHARDS = set(present(torch.ops._dtensor, "shard_dim_alltoall"))
LINEAR_REDUCTIONS = ("sum", "avg")

UNKNOWN_GROUP = "values of samples pass to other ranks through a process group of which nothing is known"
OTHER_RANKS = "values of single samples are combined with those of the samples of other ranks"
NOT_LINEAR = "sums over the samples of several ranks are combined in a way that is not linear"
CUT = "ranks that compute parts of the same samples would get some of the samples each"
JOINED = "the batches of ranks that compute parts of the same samples are joined to one, as if they held different samples"
OWN_ZERO = "a value that is zero on this rank, and may be anything on others, is combined with theirs"


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
    if group_of(node) == ctx.model_group:
        return _joined(ctx, node, type_)
    if isinstance(type_, Public) and not type_.scale:
        return PUBLIC
    return type_ if isinstance(type_, Mixed) else ctx.mixed(node, _why(ctx, node))


@rule(*REDUCTIONS)
def reduce(ctx: Context, node: fx.Node) -> Result:
    type_ = ctx.type(node.args[0])
    if group_of(node) == ctx.model_group:
        return _reduced(ctx, node, type_)
    if isinstance(type_, Mixed):
        return type_
    if isinstance(type_, Public) and not type_.scale:
        return PUBLIC
    if not isinstance(type_, SampleSum) or group_of(node) not in ctx.data_groups:
        return ctx.mixed(node, _why(ctx, node))
    return type_ if node.args[1] in LINEAR_REDUCTIONS else ctx.mixed(node, NOT_LINEAR)


@rule(*RESHARDS)
def reshard(ctx: Context, node: fx.Node) -> Result:
    """Each rank gives a piece of dimension ``shard`` for pieces of dimension ``gather``."""
    value, gathered, shard = node.args[:3]
    type_ = ctx.type(value)
    if group_of(node) != ctx.model_group:
        return PUBLIC if isinstance(type_, Public) and not type_.scale else ctx.mixed(node, _why(ctx, node))
    if isinstance(type_, PerSample) and type_.axis.dim in (ctx.dim(gathered, value), ctx.dim(shard, value)):
        return ctx.mixed(node, CUT)
    return _alike(ctx, node, type_)


def _joined(ctx: Context, node: fx.Node, type_: SampleType) -> Result:
    """The ranks' values one after the other along dimension 0. Where that is the samples' own dimension, it holds the batch several
    times, and must be cut into batches again: to join batches of different samples looks the same up to there."""
    if isinstance(type_, PerSample) and type_.axis.dim == 0 and ctx.batch != 1 and not _cut_again(node):
        return ctx.mixed(node, JOINED)
    return _alike(ctx, node, type_)


def _cut_again(node: fx.Node) -> bool:
    """Whether all that reads a gathered value takes the ranks' parts one by one and joins them along another dimension."""
    size = node.args[0].meta["val"].shape[0]  # type: ignore[union-attr]
    for cut in (user for wait in node.users for user in wait.users):
        along = cut.args[2] if len(cut.args) > 2 else 0
        if cut.target is not aten.split.Tensor or along != 0 or cut.args[1] != size:
            return False
        joins = [user for part in cut.users for user in part.users]
        if any(join.target is not aten.cat.default or len(join.args) < 2 or join.args[1] == 0 for join in joins):
            return False
    return True


def _reduced(ctx: Context, node: fx.Node, type_: SampleType) -> Result:
    cut = isinstance(type_, PerSample) and node.target is not ALL_REDUCE and type_.axis.dim == 0
    if cut and not divides(ctx.batch * type_.axis.inner, ctx.shape(node)[0]):  # type: ignore[union-attr]
        return ctx.mixed(node, CUT)
    if node.args[1] not in LINEAR_REDUCTIONS and (type_.scale or not isinstance(type_, (Public, PerSample))):
        return type_ if isinstance(type_, Mixed) else ctx.mixed(node, NOT_LINEAR)
    return _alike(ctx, node, type_)


def _alike(ctx: Context, node: fx.Node, type_: SampleType) -> Result:
    """The other ranks' values have the type of this rank's, by the same program. A zero may be one on this rank alone."""
    if not isinstance(type_, Public):
        return type_
    return ctx.mixed(node, OWN_ZERO) if type_.zero else Public(scale=type_.scale)


def _why(ctx: Context, node: fx.Node) -> str:
    return OTHER_RANKS if group_of(node) in ctx.data_groups else UNKNOWN_GROUP
