"""Random programs for the fuzz test: a language of tensor steps, its interpreter, and a Hypothesis generator.

A program is data: inputs, parameters, steps and loss terms. ``ProgramModule`` interprets it; Dynamo unrolls the loop.
Sizes that grow with the batch are written ``Batch(outer, inner)`` = outer * B * inner, so that the same program runs on
one sample.

The generator knows the truth. A step whose result lets samples see each other carries an ``effect``:

- ``mixes``: must be refused, unless the gradients equal the per-sample loop's all the same;
- ``leaks``: must be refused whatever the gradients are (a buffer that keeps the batch, say);
- ``scales``: a batch statistic multiplies the loss: refused, or the sensitivity stays bounded;
- ``hard``: independent, but only a very subtle analysis sees it: a refusal is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

IGNORED = -100
MAX_ELEMENTS = 400  # of one value, per sample


@dataclass(frozen=True)
class Batch:
    """A size that holds the samples: position i belongs to sample (i // inner) % B."""

    outer: int = 1
    inner: int = 1

    def __repr__(self) -> str:
        return "B" if self == B else f"Batch({self.outer}, {self.inner})"


B = Batch()
Size = int | Batch
Dims = tuple[Size, ...]


@dataclass(frozen=True)
class Input:
    """``x`` and ``y`` are floats, ``ids`` and ``targets`` integers below ``bound``, ``pub`` a public float.

    ``ignored``: part of the targets is -100.
    """

    name: str
    dims: Dims
    bound: int = 0
    ignored: bool = False

    @property
    def sample_dim(self) -> int | None:
        return next((i for i, d in enumerate(self.dims) if isinstance(d, Batch)), None)


@dataclass(frozen=True)
class Param:
    name: str
    shape: tuple[int, ...]
    layer: int = 0
    frozen: bool = False


@dataclass(frozen=True)
class Step:
    name: str
    op: str
    inputs: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    effect: str = ""

    def __repr__(self) -> str:
        parts = [repr(self.name), repr(self.op), *map(repr, self.inputs)]
        parts += [f"{key}={value!r}" for key, value in self.settings]
        return f"step({', '.join(parts + ([f'effect={self.effect!r}'] if self.effect else []))})"


def step(name: str, op: str, *inputs: str, effect: str = "", **settings: Any) -> Step:
    return Step(name, op, inputs, tuple(settings.items()), effect)


@dataclass(frozen=True)
class Program:
    """``steps`` run in the compiled module, ``losses`` too unless ``loss_outside``; the loss is their weighted sum.

    ``poisoned``: the first sample holds a NaN, so its own gradient contributes nothing (if the NaN reaches it).
    ``repr`` is a readable list of steps and valid Python: paste it to make a regression test.
    """

    batch: int
    inputs: tuple[Input, ...]
    params: tuple[Param, ...]
    steps: tuple[Step, ...]
    losses: tuple[Step, ...]
    clipping: str = "flat"
    norm_algorithm: str = "auto"
    loss_reduction: str = "mean"
    expected_batch_size: float | None = None
    loss_outside: bool = False
    dynamic: bool = False
    poisoned: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        lines = [f"batch={self.batch}"]
        for key in ("inputs", "params", "steps", "losses"):
            lines.append(f"{key}=({''.join(f'{chr(10)}        {item!r},' for item in getattr(self, key))})")
        given = [f for f in fields(self)[5:] if getattr(self, f.name) != f.default]
        lines += [f"{f.name}={getattr(self, f.name)!r}" for f in given]
        return "Program(\n    " + ",\n    ".join(lines) + ",\n)"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def effects(self) -> set[str]:
        return {s.effect for s in self.steps + self.losses if s.effect}

    @property
    def counts(self) -> bool:
        """A loss term in the graph is divided by the batch's number of counted tokens."""
        means = [s for s in self.losses if s.op == "cross_entropy" and dict(s.settings)["reduction"] == "mean"]
        return bool(means) and not self.loss_outside

    @property
    def model_inputs(self) -> tuple[Input, ...]:
        """What the compiled part reads."""
        read = {n for s in self.steps + (() if self.loss_outside else self.losses) for n in s.inputs}
        return tuple(i for i in self.inputs if i.name in read)

    @property
    def batch_dims(self) -> dict[str, int | None]:
        return {i.name: i.sample_dim for i in self.model_inputs if i.sample_dim != 0}


def resolve(size: Size, batch: int) -> int:
    return size.outer * batch * size.inner if isinstance(size, Batch) else size


def _sizes(dims: Dims, batch: int) -> list[int]:
    return [resolve(d, batch) for d in dims]


# --- the operations: (batch, *tensors, **settings) -> tensor --------------------------------------------------------

Op = Callable[..., Any]
OPS: dict[str, Op] = {}


def _op(function: Op) -> Op:
    OPS[function.__name__.strip("_")] = function
    return function


def _plain(**functions: Callable[..., Any]) -> None:
    """Operations that do not ask for the batch size."""
    for name, function in functions.items():
        OPS[name] = lambda batch, *tensors, _function=function, **settings: _function(*tensors, **settings)


_plain(
    linear=F.linear,
    matmul=torch.matmul,
    matmul_t=lambda a, w: a @ w.mT,
    einsum=lambda *tensors, equation: torch.einsum(equation, *tensors),
    bmm=torch.bmm,
    bmm_expanded=lambda a, w: torch.bmm(a, w.expand(a.shape[0], -1, -1)),
    addmm=torch.addmm,
    bilinear=F.bilinear,
    embedding=F.embedding,
    rows=lambda ids, w: w[ids],
    one_hot=lambda ids, w: F.one_hot(ids, w.shape[0]).to(w.dtype) @ w,
    conv=lambda a, w, *bias, **k: (F.conv1d if a.dim() == 3 else F.conv2d)(a, w, *bias, **k),
    conv_transpose=lambda a, w, *bias, **k: (F.conv_transpose1d if a.dim() == 3 else F.conv_transpose2d)(a, w, *bias, **k),
    avg_pool=lambda a, size: F.avg_pool1d(a, size, 1),
    max_pool=lambda a, size: F.max_pool1d(a, size, 1),
    upsample=lambda a: F.interpolate(a, scale_factor=2.0, mode="nearest"),
    add=torch.add,
    sub=torch.sub,
    mul=torch.mul,
    div=lambda a, w: a / (1.5 + torch.sigmoid(w)),
    squash_mul=lambda a, b: a * torch.tanh(b),
    where=lambda a, b: torch.where(a > 0, a, b),
    lerp=lambda a, b: torch.lerp(a, b, 0.3),
    addcmul=lambda a, w: torch.addcmul(a, a, w, value=0.5),
    maximum=torch.maximum,
    permute=lambda a, order: a.permute(order),
    flatten=torch.flatten,
    unsqueeze=torch.unsqueeze,
    squeeze=torch.squeeze,
    repeat=lambda a, times: a.repeat(times),
    repeat_interleave=torch.repeat_interleave,
    select=torch.select,
    slice=lambda a, dim, start, step: a[(slice(None),) * dim + (slice(start, None, step),)],
    flip=lambda a, dim: torch.flip(a, (dim,)),
    roll=lambda a, shift, dim: torch.roll(a, shift, dim),
    pad=lambda a, pads, value: F.pad(a, pads, value=value),
    unfold=lambda a, dim, size: a.unfold(dim, size, 1),
    tril=torch.tril,
    cat=lambda *tensors, dim: torch.cat(tensors, dim),
    stack=lambda *tensors, dim: torch.stack(tensors, dim),
    index_select=lambda a, dim, index: torch.index_select(a, dim, torch.tensor(index)),
    index=lambda a, dim, index: a[(slice(None),) * dim + (torch.tensor(index),)],
    reorder=lambda a, key, dim: torch.take_along_dim(a, key.argsort(dim=dim, stable=True), dim),
    gather_max=lambda a, dim: a.gather(dim, a.argmax(dim, keepdim=True)),
    topk=lambda a, dim, k: a.topk(k, dim)[0],
    argmax=torch.argmax,
    bucket=lambda a, last: (a.detach() > 0).long() * last,
    scatter_add=lambda a, key, dim: torch.zeros_like(a).scatter_add(dim, key.argsort(dim=dim, stable=True), a * 0.5),
    index_add=lambda a, dim, index: torch.zeros_like(a).index_add(dim, torch.tensor(index), a),
    sum=torch.sum,
    mean=torch.mean,
    var=lambda a, dim, keepdim: torch.var(a, dim, correction=0, keepdim=keepdim),
    amax=torch.amax,
    max=lambda a, dim, keepdim: torch.max(a, dim, keepdim)[0],
    logsumexp=torch.logsumexp,
    norm=lambda a, dim, keepdim: (a.square().sum(dim, keepdim=keepdim) + 0.1).sqrt(),
    cumsum=torch.cumsum,
    sort=lambda a, dim: torch.sort(a, dim=dim, stable=True)[0],
    softmax=torch.softmax,
    log_softmax=torch.log_softmax,
    layer_norm=lambda a, *affine, trailing: F.layer_norm(a, a.shape[-trailing:], *affine, eps=0.1),
    rms_norm=lambda a, *affine, trailing: F.rms_norm(a, a.shape[-trailing:], *affine, eps=0.1),
    group_norm=lambda a, *affine, groups: F.group_norm(a, groups, *affine, eps=0.1),
    # The views keep gradients contiguous: PyTorch 2.13's batch norm is wrong on a CPU for channels-last ones at N = 1.
    instance_norm=lambda a: F.instance_norm(a, eps=0.1).flatten(1).view(a.shape),
    gelu=F.gelu,
    tanh=torch.tanh,
    sigmoid=torch.sigmoid,
    relu=F.relu,
    silu=F.silu,
    softplus=F.softplus,
    sin=torch.sin,
    exp=lambda a: torch.exp(torch.tanh(a)),
    root=lambda a: (a * a + 0.1).sqrt(),
    clamp=lambda a: a.clamp(-0.8, 0.9),
    mask=lambda a: a.masked_fill(a > 0.5, 0.25),
    detach_mul=lambda a: a * a.detach(),
    # Functions of parameters.
    transpose=torch.t,
    outer=torch.outer,
    weight_norm=lambda v, g: g * v / (v.square().sum(-1, keepdim=True) + 0.1).sqrt(),
    softmax_last=lambda w: torch.softmax(w, -1),
    matrix_exp=lambda w: torch.linalg.matrix_exp(0.3 * w),
    symmetric=lambda w: w + w.mT,
    as_is=lambda w: w.view_as(w),
    tick=lambda count: count.add_(1.0) * 0.0,
    # Steps that mix samples.
    sub_mean=lambda a, dim: a - a.mean(dim, keepdim=True),
    sub_mean_detached=lambda a, dim: a - a.mean(dim, keepdim=True).detach(),
    above_mean=lambda a, dim: torch.where(a > a.mean(dim, keepdim=True), a, 0.1 * a),
    amax_expanded=lambda a, dim: a.amax(dim, keepdim=True).expand_as(a),
    permuted=lambda a, key, dim: a.index_select(dim, key.argsort(stable=True)),
    one_for_all=lambda a, dim, which: a.narrow(dim, which % a.shape[dim], 1).expand_as(a),
    spread=lambda a, dim: a * a.narrow(dim, 0, 1).detach(),
    normalize=lambda a, dim: (a - a.mean(dim, keepdim=True)) / (a.var(dim, correction=0, keepdim=True) + 0.1).sqrt(),
    batch_norm=lambda a: F.batch_norm(a, None, None, training=True, eps=0.1).flatten(1).view(a.shape),
    global_scale=lambda a: a / (a.detach().abs().max() + 0.5),
    diff=lambda a, dim: torch.diff(a, dim=dim, prepend=a.narrow(dim, 0, 1)),
    pairwise=lambda a: (a.unsqueeze(0) - a.unsqueeze(1)).tanh().mean(0),
    neighbor=lambda a: a * torch.tanh(a.mT),
    remember=lambda a, stat: a + 0.0 * stat.mul_(0.9).add_(a.detach().mean()),
)


@_op
def positions(batch: int, table: Tensor, length: int, style: str) -> Tensor:
    where = torch.arange(length)
    if style == "slice":
        return table[:length]
    if style == "index":
        return table[where]
    return F.embedding(where.expand(batch, length) if style == "expanded" else where, table)


@_op
def reshape(batch: int, a: Tensor, sizes: Dims) -> Tensor:
    return a.reshape(_sizes(sizes, batch))


@_op
def expand(batch: int, a: Tensor, sizes: Dims) -> Tensor:
    return a.expand(_sizes(sizes, batch))


@_op
def narrow(batch: int, a: Tensor, dim: int, start: Size, length: Size) -> Tensor:
    return a.narrow(dim, resolve(start, batch), resolve(length, batch))


@_op
def split(batch: int, a: Tensor, dim: int, length: Size, which: int) -> Tensor:
    return a.split(resolve(length, batch), dim)[which]


@_op
def pick(batch: int, a: Tensor, index: Tensor) -> Tensor:
    """One position of each sample, [B, T, ...] and [B] -> [B, ...], as a classifier picks its last token."""
    return a[torch.arange(batch), index % a.shape[1]]


@_op
def sdpa(batch: int, q: Tensor, k: Tensor, *bias: Tensor, style: str) -> Tensor:
    length = k.shape[-2]
    if style == "keys":
        keep = (k.detach().mean(-1) > 0).unsqueeze(-2) | torch.eye(length, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=keep)
    return F.scaled_dot_product_attention(q, k, k, attn_mask=bias[0] if bias else None, is_causal=style == "causal")


@_op
def attention(batch: int, q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1) @ k


@_op
def rotate(batch: int, a: Tensor, angle: Tensor) -> Tensor:
    pairs = torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


@_op
def gram(batch: int, a: Tensor, dim: int) -> Tensor:
    front = a.movedim(dim, 0)
    flat = front.flatten(1) if front.dim() > 1 else front.unsqueeze(1)
    return (torch.softmax(flat @ flat.mT, -1) @ flat).reshape(front.shape).movedim(0, dim)


@_op
def conv_over(batch: int, a: Tensor, dim: int) -> Tensor:
    """A moving average along ``dim``."""
    front = a.movedim(dim, -1)
    flat = front.reshape(-1, 1, front.shape[-1])
    return F.conv1d(flat, torch.full((1, 1, 3), 0.4, dtype=a.dtype), padding=1).reshape(front.shape).movedim(-1, dim)


@_op
def index_by_max(batch: int, a: Tensor, dim: int) -> Tensor:
    return a * (1.0 + a.argmax(dim, keepdim=True))


# --- loss terms -----------------------------------------------------------------------------------------------------


def _reduced(batch: int, total: Tensor, per_sample: int, reduction: str) -> Tensor:
    return total / (batch * per_sample) if reduction == "mean" else total


@_op
def loss_all(batch: int, a: Tensor, style: str, reduction: str) -> Tensor:
    """The mean (sum) over all elements."""
    a = {"plain": a, "square": a.square(), "tanh": torch.tanh(a)}[style]
    return a.mean() if reduction == "mean" else a.sum()


@_op
def loss_by_hand(batch: int, a: Tensor, reduction: str) -> Tensor:
    return _reduced(batch, a.square().sum(), 1, reduction)


@_op
def loss_sample(batch: int, a: Tensor, others: tuple[int, ...], style: str, reduction: str) -> Tensor:
    """A scalar of each position of the sample dimension, then its mean (sum)."""
    if style == "logsumexp":
        each = torch.logsumexp(a, others)
    else:
        each = a.square().mean(others) if style == "mean" else (a.square().sum(others) + 0.1).sqrt()
    return each.mean() if reduction == "mean" else each.sum()


@_op
def mse(batch: int, a: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(a, y, reduction=reduction)


@_op
def cross_entropy(batch: int, a: Tensor, targets: Tensor, style: str, reduction: str, fixed: bool = False) -> Tensor:
    """Cross entropy for each token; classes lie along the last dimension of ``a``.

    ``fixed``: what the specification makes of a mean over counted tokens, all tokens counted, ignored ones too.
    """
    if style == "second":
        logits, targets = a.movedim(-1, 1), targets
    else:
        logits, targets = a.reshape(-1, a.shape[-1]), targets.reshape(-1)
    if fixed and reduction == "mean":
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / targets.numel()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction)


@_op
def cross_entropy_own_count(batch: int, a: Tensor, targets: Tensor, sample: int, reduction: str) -> Tensor:
    """Each sample's mean over its own counted tokens, then the mean (sum) over samples."""
    flat = F.cross_entropy(a.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    tokens = flat.view(targets.shape).movedim(sample, 0).reshape(batch, -1)
    counted = (targets != IGNORED).movedim(sample, 0).reshape(batch, -1).sum(1).clamp(min=1)
    each = tokens.sum(1) / counted
    return each.mean() if reduction == "mean" else each.sum()


@_op
def loss_scaled(batch: int, a: Tensor, reduction: str) -> Tensor:
    """The whole loss multiplied by a statistic of the batch."""
    each = a.square()
    return (each.mean() if reduction == "mean" else each.sum()) * (0.5 + a.detach().square().mean())


# --- the interpreter ------------------------------------------------------------------------------------------------


def run_steps(steps: Iterable[Step], env: dict[str, Any], batch: int) -> None:
    for s in steps:
        env[s.name] = OPS[s.op](batch, *[env[name] for name in s.inputs], **dict(s.settings))


def total_loss(program: Program, env: dict[str, Any], batch: int) -> Tensor:
    run_steps(program.losses, env, batch)
    loss = env[program.losses[0].name]
    for s in program.losses[1:]:
        loss = loss + 0.5 * env[s.name]
    return loss


class ProgramModule(nn.Module):
    """Interprets a program. Parameters live in child modules ``layer0``, ``layer1``, ...; values come from ``seed``.

    Returns the loss, or with ``loss_outside`` the tuple of values that the loss terms read.
    """

    def __init__(self, program: Program, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(program.seed)
        for p in program.params:
            if not hasattr(self, f"layer{p.layer}"):
                self.add_module(f"layer{p.layer}", nn.Module())
            value = 0.7 * normal(p.shape, generator)
            owner = self.get_submodule(f"layer{p.layer}")
            owner.register_parameter(p.name, nn.Parameter(value.to(dtype), requires_grad=not p.frozen))
        self.register_buffer("stat", torch.zeros((), dtype=dtype))
        made = {s.name for s in program.steps}
        self.outputs = tuple(dict.fromkeys(n for s in program.losses for n in s.inputs if n in made))
        named = [(i.name, i.sample_dim) for i in program.model_inputs if i.sample_dim is not None]
        self.batch_at: tuple[str, int] = named[0]

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        ids: Tensor | None = None,
        targets: Tensor | None = None,
        pub: Tensor | None = None,
    ) -> Any:
        env: dict[str, Any] = {"x": x, "y": y, "ids": ids, "targets": targets, "pub": pub, "stat": self.stat}
        for p in self.program.params:
            env[p.name] = getattr(getattr(self, f"layer{p.layer}"), p.name)
        batch = env[self.batch_at[0]].shape[self.batch_at[1]]
        run_steps(self.program.steps, env, batch)
        if self.program.loss_outside:
            return tuple(env[name] for name in self.outputs)
        return total_loss(self.program, env, batch)


def loss_of(program: Program, model: Callable[..., Any], inputs: dict[str, Tensor], batch: int) -> Tensor:
    """The scalar loss of a (compiled) ``ProgramModule`` on ``inputs``, which hold ``batch`` samples."""
    result = model(**{i.name: inputs[i.name] for i in program.model_inputs})
    if not program.loss_outside:
        return result
    names = ProgramModule(program).outputs
    return total_loss(program, {**inputs, **dict(zip(names, result, strict=True))}, batch)


def make_inputs(program: Program, dtype: torch.dtype = torch.float32, seed: int | None = None) -> dict[str, Tensor]:
    """Random tensors for the program's inputs; every sample keeps at least one counted target."""
    generator = torch.Generator().manual_seed(1000 + (program.seed if seed is None else seed))
    made = {}
    for spec in program.inputs:
        shape = _sizes(spec.dims, program.batch)
        if not spec.bound:
            made[spec.name] = normal(shape, generator).to(dtype)
            if program.poisoned and spec.sample_dim is not None:
                made[spec.name][(0,) * len(shape)] = math.nan
            continue
        value = torch.randint(spec.bound, shape, generator=generator, device="cpu")
        if spec.ignored:
            drop = torch.rand(shape, generator=generator, device="cpu") < 0.4
            drop[tuple(slice(None) if isinstance(d, Batch) else 0 for d in spec.dims)] = False
            value = value.masked_fill(drop, IGNORED)
        made[spec.name] = value.to(torch.get_default_device())
    return made


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """float32, the same numbers on every device."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


# --- the generator --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """A tensor of the program while it is built: integers if ``bound``, public if no dimension is a ``Batch``."""

    name: str
    dims: Dims
    bound: int = 0

    @property
    def sample(self) -> int:
        return next(i for i, d in enumerate(self.dims) if isinstance(d, Batch))

    @property
    def others(self) -> list[int]:
        return [i for i, d in enumerate(self.dims) if not isinstance(d, Batch)]

    @property
    def elements(self) -> int:
        return math.prod(resolve(d, 1) for d in self.dims)


def _replaced(dims: Dims, at: int, *new: Size) -> Dims:
    return (*dims[:at], *new, *dims[at + 1 :])


def _merged(left: Size, right: Size) -> Size:
    if isinstance(left, Batch):
        assert isinstance(right, int)
        return Batch(left.outer, left.inner * right)
    return Batch(left * right.outer, right.inner) if isinstance(right, Batch) else left * right


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


@dataclass
class Builder:
    """Draws the parts of a program. Drawing functions shrink toward their first choice."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    batch: int
    inputs: dict[str, Input] = field(default_factory=dict)
    params: list[Param] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def chance(self, tenths: int) -> bool:
        return self.draw(st.integers(0, 9)) >= 10 - tenths

    def size(self) -> int:
        return self.pick([2, self.batch, 1, 3, 4, 5, self.batch])

    def emit(
        self, op: str, inputs: Sequence[Value], dims: Iterable[Size], bound: int = 0, effect: str = "", **settings: Any
    ) -> Value:
        value = Value(f"v{len(self.steps)}", tuple(dims), bound)
        self.steps.append(step(value.name, op, *[i.name for i in inputs], effect=effect, **settings))
        self.values.append(value)
        return value

    def input(self, name: str, dims: Dims, bound: int = 0, ignored: bool = False) -> Value:
        self.inputs[name] = Input(name, dims, bound, ignored)
        value = Value(name, dims, bound)
        if name in ("x", "ids", "y"):
            self.values.append(value)
        return value

    def sample_values(self) -> list[Value]:
        """Float values with a sample dimension, the latest first."""
        found = [v for v in self.values if not v.bound and any(isinstance(d, Batch) for d in v.dims)]
        return [v for v in reversed(found) if v.elements <= MAX_ELEMENTS and len(v.dims) <= 5]

    def current(self) -> Value:
        found = self.sample_values()
        return found[0] if not self.chance(2) else self.pick(found)

    def float_like(self, v: Value) -> Value | None:
        """Another value that broadcasts against ``v`` and has samples in the same place."""
        matches = [u for u in self.sample_values() if u.name != v.name and u.dims == v.dims]
        return self.pick(matches) if matches else None

    # Parameters, and public values made from them.

    def param(self, shape: tuple[int, ...]) -> Value:
        same = [p for p in self.params if p.shape == shape]
        if same and (self.chance(5) or len(self.params) >= 8):
            return Value(self.pick(same).name, shape)
        found = Param(f"w{len(self.params)}", shape, len(self.params) % 3, bool(self.params) and self.chance(1))
        self.params.append(found)
        return Value(found.name, shape)

    def weight(self, *shape: int) -> Value:
        """A public value of this shape: a parameter, a used one, a used one transposed, or a function of parameters."""
        flipped = [p for p in self.params if p.shape == shape[::-1]]
        if len(shape) == 2 and flipped and self.chance(3):
            return self.public("transpose", Value(self.pick(flipped).name, shape[::-1]), shape)
        kind = self.pick(["param", "param", "param", "function", "public input"])
        if kind == "public input" and self.params and self.inputs.get("pub", Input("pub", shape)).dims == shape:
            return self.input("pub", shape)
        if kind == "function" and len(shape) >= 1:
            return self.function(shape)
        return self.param(shape)

    def public(self, op: str, *inputs_and_shape: Any, **settings: Any) -> Value:
        *inputs, shape = inputs_and_shape
        value = Value(f"v{len(self.steps)}", tuple(shape))
        self.steps.append(step(value.name, op, *[i.name for i in inputs], **settings))
        return value

    def function(self, shape: tuple[int, ...]) -> Value:
        options = ["tanh", "softmax_last", "weight_norm", "add"]
        if len(shape) == 2:
            options += ["product", "outer", "as_is", *(["matrix_exp", "symmetric"] if shape[0] == shape[1] else [])]
        kind = self.pick(options)
        if kind == "product":
            rank = self.size()
            return self.public("matmul", self.param((shape[0], rank)), self.param((rank, shape[1])), shape)
        if kind == "outer":
            return self.public("outer", self.param(shape[:1]), self.param(shape[1:]), shape)
        if kind == "weight_norm":
            return self.public(kind, self.param(shape), self.param((*shape[:-1], 1)), shape)
        if kind == "add":
            return self.public(kind, self.param(shape), self.param(shape[-1:]), shape)
        return self.public(kind, self.param(shape), shape)

    # Shapes.

    def permuted(self, v: Value, order: Sequence[int]) -> Value:
        if list(order) == list(range(len(v.dims))):
            return v
        return self.emit("permute", [v], [v.dims[i] for i in order], bound=v.bound, order=tuple(order))

    def front(self, v: Value, rank: int) -> Value | None:
        """``v`` with samples first and ``rank`` dimensions."""
        v = self.permuted(v, [v.sample, *v.others])
        while len(v.dims) < rank:
            v = self.emit("unsqueeze", [v], (*v.dims[:1], 1, *v.dims[1:]), dim=1)
        return v if len(v.dims) == rank else None

    def tokens(self) -> Value:
        """Integers: the input ``ids``, seen in another shape, or an index computed from a sample's own values."""
        kind = self.pick(["input", "argmax", "bucket", "flat", "turned"])
        floats = [v for v in self.sample_values() if v.others and len(v.dims) <= 4]
        if kind == "argmax" and floats:
            v = self.pick(floats)
            dim = self.pick(v.others)
            return self.emit("argmax", [v], _replaced(v.dims, dim), bound=max(2, v.dims[dim]), dim=dim)
        if kind == "bucket" and floats:
            v = self.pick(floats)
            return self.emit("bucket", [v], v.dims, bound=3, last=2)
        found = [v for v in self.values if v.name == "ids"]
        ids = found[0] if found else self.input("ids", self.pick([(B, self.size()), (B,), (self.size(), B)]), 4)
        if kind == "flat" and len(ids.dims) == 2:
            return self.emit("flatten", [ids], [_merged(*ids.dims)], bound=ids.bound)
        return self.permuted(ids, (1, 0)) if kind == "turned" and len(ids.dims) == 2 else ids


Move = Callable[[Builder, Value], Value | None]


def contract(b: Builder, v: Value) -> Value | None:
    """A product with a parameter along one dimension, as linear, matmul, bmm or einsum, in any operand order."""
    if not v.others:
        v = b.emit("unsqueeze", [v], (*v.dims, 1), dim=-1)
    rank, dim, new = len(v.dims), b.pick(v.others), b.size()
    old = v.dims[dim]
    forms = ["einsum"]
    if dim == rank - 1:
        forms += ["linear", "linear_bias", "matmul", "matmul_t", *(["addmm"] if rank == 2 else [])]
    if rank >= 2 and dim == rank - 2:
        forms += ["left"]
    if rank == 3 and v.sample == 0 and dim == 2:
        forms += ["bmm_expanded"]
    if rank == 3 and v.sample != 0:
        forms += ["bmm"] if dim != 0 else []
    form = b.pick(forms)
    if form == "einsum":
        return _einsum(b, v, dim, new)
    dims = _replaced(v.dims, dim, new)
    if form in ("linear", "linear_bias", "matmul_t"):
        weights = [b.weight(new, old), *([b.weight(new)] if form == "linear_bias" else [])]
        return b.emit(form.removesuffix("_bias"), [v, *weights], dims)
    if form == "left":
        return b.emit("matmul", [b.weight(new, old), v], dims)
    if form == "bmm":
        left = dim == 1
        weight = b.weight(v.dims[0], *((new, old) if left else (old, new)))
        return b.emit("bmm", [weight, v] if left else [v, weight], dims)
    if form == "addmm":
        return b.emit("addmm", [b.weight(new), v, b.weight(old, new)], dims)
    return b.emit(form, [v, b.weight(old, new)], dims)


def _einsum(b: Builder, v: Value, dim: int, new: int) -> Value:
    letters = "abcdef"[: len(v.dims)]
    sizes = dict(zip(letters, v.dims, strict=True)) | {"z": new}
    shared = [letters[i] for i in v.others if i != dim and b.chance(3)]
    weight_letters = b.draw(st.permutations([letters[dim], *shared, "z"]))
    kept = [c for c in letters if c != letters[dim] and (c not in shared or not b.chance(2))]
    out = b.draw(st.permutations([*kept, "z"]))
    terms = [(letters, v), ("".join(weight_letters), b.weight(*[sizes[c] for c in weight_letters]))]
    if b.chance(2):
        terms.append(("z", b.weight(new)))
    terms = terms if not b.chance(4) else terms[::-1]
    equation = ",".join(t[0] for t in terms) + "->" + "".join(out)
    return b.emit("einsum", [t[1] for t in terms], [sizes[c] for c in out], equation=equation)


def embed(b: Builder, v: Value) -> Value:
    ids, width = b.tokens(), b.size()
    form = b.pick(["embedding", "rows", "one_hot"])
    settings = {"padding_idx": 0} if form == "embedding" and b.chance(3) else {}
    return b.emit(form, [ids, b.weight(ids.bound, width)], (*ids.dims, width), **settings)


def add_positions(b: Builder, v: Value) -> Value | None:
    if v.others[-2:] != [len(v.dims) - 2, len(v.dims) - 1]:
        return None
    length, width = v.dims[-2], v.dims[-1]
    style = b.pick(["embedding", "index", "slice", *(["expanded"] if v.dims[:-2] == (B,) else [])])
    dims = ((B,) if style == "expanded" else ()) + (length, width)
    table = b.weight(length + b.pick([0, 1]), width)
    found = b.emit("positions", [table], dims, length=length, style=style)
    b.values.remove(found)  # rows of no sample: a program that joins them to the batch is refused
    return b.emit("add", [v, found] if b.chance(5) else [found, v], v.dims)


def convolve(b: Builder, v: Value) -> Value | None:
    front = b.front(v, b.pick([3, 4]) if len(v.dims) < 4 else 4)
    if front is None:
        return None
    space = front.dims[2:]
    groups = b.pick(_divisors(front.dims[1]))
    out = groups * b.pick([1, 2])
    stride, padding, dilation = b.pick([1, 2]), b.pick([0, 1]), b.pick([1, 2])
    transposed = b.chance(3)
    kernel = tuple(b.pick([1, 2, 3]) for _ in space)
    if transposed:
        new = [(n - 1) * stride - 2 * padding + dilation * (k - 1) + 1 for n, k in zip(space, kernel, strict=True)]
        shape = (front.dims[1], out // groups, *kernel)
    else:
        new = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(space, kernel, strict=True)]
        shape = (out, front.dims[1] // groups, *kernel)
    if min(new) < 1:
        return None
    bias = [b.weight(out)] if b.chance(4) else []
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    op = "conv_transpose" if transposed else "conv"
    return b.emit(op, [front, b.weight(*shape), *bias], (front.dims[0], out, *new), **settings)


def pool(b: Builder, v: Value) -> Value | None:
    front = b.front(v, 3)
    if front is None:
        return None
    if b.chance(4):
        return b.emit("upsample", [front], (*front.dims[:2], 2 * front.dims[2]))
    size = b.pick(range(1, min(3, front.dims[2]) + 1))
    return b.emit(b.pick(["avg_pool", "max_pool"]), [front], (*front.dims[:2], front.dims[2] - size + 1), size=size)


def with_parameter(b: Builder, v: Value) -> Value:
    """Pointwise with a parameter that broadcasts along some dimensions: a scalar, a column, a block."""
    shape = [d if isinstance(d, int) and not b.chance(3) else 1 for d in v.dims]
    skip = b.pick(range(len(shape) + 1))
    weight = b.weight(*shape[skip:])
    op = b.pick(["mul", "add", "sub", "div", "where", "addcmul", "squash_mul", "lerp", "maximum"])
    swapped = op in ("mul", "sub", "add", "maximum") and b.chance(4)
    return b.emit(op, [weight, v] if swapped else [v, weight], v.dims)


def with_value(b: Builder, v: Value) -> Value:
    """Pointwise with another value of the same samples, or with a per-sample scalar of it."""
    other = b.float_like(v)
    if other is None:
        same = [u for u in b.sample_values() if u.dims[u.sample] == v.dims[v.sample]]
        other = b.pick(same)
        if len(other.dims) > 1:
            other = b.emit("mean", [other], [other.dims[other.sample]], dim=tuple(other.others))
        other = b.emit("reshape", [other], _alone(v), sizes=_alone(v))
    return b.emit(b.pick(["add", "mul", "sub", "squash_mul", "where", "lerp"]), [v, other], v.dims)


def _alone(v: Value) -> Dims:
    return tuple(d if isinstance(d, Batch) else 1 for d in v.dims)


def pointwise(b: Builder, v: Value) -> Value:
    names = ["tanh", "relu", "gelu", "sigmoid", "silu", "softplus", "sin", "exp", "root", "clamp", "mask", "detach_mul"]
    return b.emit(b.pick(names), [v], v.dims)


def turn(b: Builder, v: Value) -> Value:
    return b.permuted(v, b.draw(st.permutations(range(len(v.dims)))))


def merge(b: Builder, v: Value) -> Value | None:
    """Two neighboring dimensions become one; often B and T."""
    if len(v.dims) < 2:
        return None
    at = b.pick(range(len(v.dims) - 1))
    dims = (*v.dims[:at], _merged(v.dims[at], v.dims[at + 1]), *v.dims[at + 2 :])
    if b.chance(5):
        return b.emit("flatten", [v], dims, start_dim=at, end_dim=at + 1)
    return b.emit("reshape", [v], dims, sizes=dims)


def divide(b: Builder, v: Value) -> Value:
    """One dimension becomes two."""
    at = b.pick(range(len(v.dims)))
    size = v.dims[at]
    if isinstance(size, int):
        first = b.pick(_divisors(size))
        parts: Dims = (first, size // first)
    elif b.chance(5):
        outer = b.pick(_divisors(size.outer)[::-1])
        parts = (outer, Batch(size.outer // outer, size.inner))
    else:
        inner = b.pick(_divisors(size.inner)[::-1])
        parts = (Batch(size.outer, size.inner // inner), inner)
    dims = _replaced(v.dims, at, *parts)
    return b.emit("reshape", [v], dims, sizes=dims)


def grow(b: Builder, v: Value) -> Value | None:
    """unsqueeze, expand, repeat: along the samples too, where each copy keeps its owner."""
    kind = b.pick(["unsqueeze", "expand", "squeeze", "repeat", "interleave"])
    if kind in ("unsqueeze", "expand"):
        at = b.pick(range(len(v.dims) + 1))
        v = b.emit("unsqueeze", [v], (*v.dims[:at], 1, *v.dims[at:]), dim=at)
        dims = _replaced(v.dims, at, b.pick([2, 3, b.batch]))
        return v if kind == "unsqueeze" else b.emit("expand", [v], dims, sizes=dims)
    if kind == "squeeze":
        ones = [i for i in v.others if v.dims[i] == 1]
        if not ones:
            return None
        at = b.pick(ones)
        return b.emit("squeeze", [v], _replaced(v.dims, at), dim=at)
    at, times = b.pick(range(len(v.dims))), 2
    old = v.dims[at]
    if kind == "repeat":
        new = old * times if isinstance(old, int) else Batch(old.outer * times, old.inner)
        return b.emit("repeat", [v], _replaced(v.dims, at, new), times=_replaced((1,) * len(v.dims), at, times))
    new = old * times if isinstance(old, int) else Batch(old.outer, old.inner * times)
    return b.emit("repeat_interleave", [v], _replaced(v.dims, at, new), repeats=times, dim=at)


def cut(b: Builder, v: Value) -> Value | None:
    """Part of a dimension, or its elements in another order."""
    if not v.others:
        return None
    at = b.pick(v.others)
    n = v.dims[at]
    kind = b.pick(["select", "slice", "narrow", "flip", "roll", "index_select", "index", "pad", "tril", "unfold", "split"])
    if kind == "select":
        return b.emit(kind, [v], _replaced(v.dims, at), dim=at, index=b.pick(range(-1, n)))
    if kind == "slice":
        start, by = b.pick(range(n)), b.pick([1, 2])
        return b.emit(kind, [v], _replaced(v.dims, at, -(-(n - start) // by)), dim=at, start=start, step=by)
    if kind in ("narrow", "split"):
        length = b.pick(range(1, n + 1))
        if kind == "narrow":
            return b.emit(kind, [v], _replaced(v.dims, at, length), dim=at, start=b.pick(range(n - length + 1)), length=length)
        return b.emit(kind, [v], _replaced(v.dims, at, length), dim=at, length=length, which=b.pick(range(n // length)))
    if kind in ("index_select", "index"):
        index = tuple(b.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3)))
        return b.emit(kind, [v], _replaced(v.dims, at, len(index)), dim=at, index=index)
    if kind == "roll":
        return b.emit(kind, [v], v.dims, shift=b.pick([1, -1, 2]), dim=at)
    if kind == "pad":
        before, after = b.pick([1, 0]), b.pick([0, 1, 2])
        pads = (0, 0) * (len(v.dims) - 1 - at) + (before, after)
        return b.emit(kind, [v], _replaced(v.dims, at, n + before + after), pads=pads, value=b.pick([0.0, 0.3]))
    if kind == "unfold":
        size = b.pick(range(1, min(n, 3) + 1))
        return b.emit(kind, [v], (*_replaced(v.dims, at, n - size + 1), size), dim=at, size=size)
    if kind == "tril":
        return b.emit(kind, [v], v.dims) if v.others[-2:] == [len(v.dims) - 2, len(v.dims) - 1] else None
    return b.emit("flip", [v], v.dims, dim=at)


def by_content(b: Builder, v: Value) -> Value | None:
    """Indices that depend on the sample's own data."""
    if not v.others:
        return None
    at = b.pick(v.others)
    kind = b.pick(["reorder", "gather_max", "topk", "pick", "scatter_add", "index_add"])
    if kind == "gather_max":
        return b.emit(kind, [v], _replaced(v.dims, at, 1), dim=at)
    if kind == "topk":
        k = b.pick(range(1, v.dims[at] + 1))
        return b.emit(kind, [v], _replaced(v.dims, at, k), dim=at, k=k)
    if kind == "index_add":
        index = b.draw(st.permutations(range(v.dims[at])))
        return b.emit(kind, [v], v.dims, dim=at, index=tuple(index))
    if kind == "pick":
        if v.dims[0] != B:
            return None
        key = b.emit("argmax", [v], _replaced(v.dims, v.others[-1]), bound=v.dims[v.others[-1]], dim=v.others[-1])
        if len(key.dims) > 1:
            key = b.emit("amax", [key], (B,), bound=key.bound, dim=tuple(range(1, len(key.dims))))
        return b.emit(kind, [v, key], (B, *v.dims[2:]))
    return b.emit(kind, [v, b.float_like(v) or v], v.dims, dim=at)


def join(b: Builder, v: Value) -> Value:
    other = b.float_like(v) or b.emit("sin", [v], v.dims)
    if b.chance(4):
        at = b.pick(range(len(v.dims) + 1))
        return b.emit("stack", [v, other], (*v.dims[:at], 2, *v.dims[at:]), dim=at)
    at = b.pick(v.others) if v.others else None
    if at is None:
        return towers(b, v)
    return b.emit("cat", [v, other], _replaced(v.dims, at, 2 * v.dims[at]), dim=at)


def towers(b: Builder, v: Value) -> Value:
    """Two values with the same samples one after the other along the batch, as a siamese network does."""
    other = b.float_like(v) or b.emit("sin", [v], v.dims)
    size = v.dims[v.sample]
    dims = _replaced(v.dims, v.sample, Batch(2 * size.outer, size.inner))
    return b.emit("cat", [v, other], dims, dim=v.sample)


def part_towers(b: Builder, v: Value) -> Value | None:
    size = v.dims[v.sample]
    if size.outer == 1:
        return towers(b, v)
    if b.chance(5):
        parts = b.pick([k for k in _divisors(size.outer) if k < size.outer])
        length, which = Batch(parts, size.inner), b.pick(range(size.outer // parts))
        return b.emit("split", [v], _replaced(v.dims, v.sample, length), dim=v.sample, length=length, which=which)
    count = b.pick(range(1, size.outer))
    start, length = Batch(b.pick(range(size.outer - count + 1)), size.inner), Batch(count, size.inner)
    return b.emit("narrow", [v], _replaced(v.dims, v.sample, length), dim=v.sample, start=start, length=length)


def reduce_one(b: Builder, v: Value) -> Value | None:
    if not v.others:
        return None
    at, keep = b.pick(v.others), b.chance(4)
    op = b.pick(["sum", "mean", "var", "amax", "max", "logsumexp", "norm"])
    return b.emit(op, [v], _replaced(v.dims, at, *([1] if keep else [])), dim=at, keepdim=keep)


def scan(b: Builder, v: Value) -> Value | None:
    if not v.others:
        return None
    op = b.pick(["softmax", "cumsum", "sort", "log_softmax", "index_by_max", "conv_over"])
    return b.emit(op, [v], v.dims, dim=b.pick(v.others))


def normalize(b: Builder, v: Value) -> Value | None:
    trailing = len(v.dims) - 1 - v.sample
    kind = b.pick(["layer_norm", "rms_norm", "group_norm", "instance_norm"])
    if kind in ("layer_norm", "rms_norm"):
        if trailing == 0:
            return None
        count = b.pick(range(1, trailing + 1))
        affine = [b.weight(*v.dims[-count:]) for _ in range(b.pick([0, 1, 2 if kind == "layer_norm" else 1]))]
        return b.emit(kind, [v, *affine], v.dims, trailing=count)
    front = b.front(v, max(3, len(v.dims)) if kind == "instance_norm" else max(2, len(v.dims)))
    if front is None:
        return None
    if kind == "instance_norm":
        return b.emit(kind, [front], front.dims) if math.prod(front.dims[2:]) > 1 else None
    groups = b.pick(_divisors(front.dims[1]))
    if math.prod(front.dims[1:]) == groups:  # PyTorch refuses to normalize a single number
        return None
    affine = [b.weight(front.dims[1]) for _ in range(b.pick([0, 2]))]
    return b.emit(kind, [front, *affine], front.dims, groups=groups)


def attend(b: Builder, v: Value) -> Value | None:
    if len(v.dims) < 3 or v.sample >= len(v.dims) - 2:
        return None
    key = b.float_like(v) or v
    style = b.pick(["full", "causal", "keys", "bias", "matmul"])
    if style == "matmul":
        return b.emit("attention", [v, key], v.dims)
    bias = [b.weight(v.dims[-2], v.dims[-2])] if style == "bias" else []
    return b.emit("sdpa", [v, key, *bias], v.dims, style=style)


def rotary(b: Builder, v: Value) -> Value | None:
    last = v.dims[-1]
    if isinstance(last, Batch) or last % 2:
        return None
    return b.emit("rotate", [v, b.weight(last // 2)], v.dims)


def two_values(b: Builder, v: Value) -> Value | None:
    """A bilinear form of two values with a parameter."""
    if isinstance(v.dims[-1], Batch):
        return None
    other, new = b.float_like(v) or v, b.size()
    return b.emit("bilinear", [v, other, b.weight(new, v.dims[-1], v.dims[-1])], (*v.dims[:-1], new))


# fmt: off
MOVES: list[Move] = [  # one line for each theme; what stands twice is drawn twice as often
    contract, contract, contract, embed, embed, convolve, two_values, attend, rotary,
    add_positions, with_parameter, with_parameter, with_value, pointwise, pointwise,
    turn, turn, merge, merge, divide, divide, grow, cut, cut, by_content,
    join, towers, part_towers, reduce_one, scan, normalize, pool,
]
# fmt: on


# --- steps that mix samples on purpose -------------------------------------------------------------------------------


def mix(b: Builder, v: Value) -> Value:
    """One step that lets samples see each other."""
    at = v.sample
    kinds = [*["along"] * 5, "one_for_all", "permuted", "reverse", "gram", "spread", "global_scale", "remember"]
    neighbors = [i for i in (at - 1, at + 1) if i in v.others and v.dims[i] > 1]
    kinds += ["straddle", "straddle"] if neighbors else []
    kinds += ["batch_norm"] if at == 0 and len(v.dims) >= 3 and math.prod(v.dims[2:]) > 1 else []
    kinds += ["pairwise", "layer_norm"] if at == 0 and v.dims[0] == B else []
    kinds += ["neighbor"] * 2 if v.dims[-2:] in ((B, b.batch), (b.batch, B)) else []
    kinds += ["attend"] if at == len(v.dims) - 2 else []
    kind = b.pick(kinds)
    mixes: dict[str, Any] = {"effect": "mixes"}
    if kind == "along":
        ops = [
            "sub_mean",
            "sub_mean_detached",
            "softmax",
            "cumsum",
            "sort",
            "roll",
            "flip",
            "amax_expanded",
            "normalize",
        ]
        op = b.pick([*ops, "above_mean", "diff", "conv_over", "index_by_max", "log_softmax"])
        return b.emit(op, [v], v.dims, **mixes, **({"shift": 1} if op == "roll" else {}), dim=at)
    if kind == "permuted":
        key = v if not v.others else b.emit("mean", [v], [v.dims[at]], dim=tuple(v.others))
        return b.emit(kind, [v, key], v.dims, **mixes, dim=at)
    if kind == "straddle":
        return _straddle(b, v, b.pick(neighbors))
    if kind == "attend":
        return b.emit("sdpa", [v, v], v.dims, **mixes, style="full")
    if kind == "layer_norm":
        return b.emit("normalize", [v], v.dims, **mixes, dim=tuple(range(len(v.dims))))
    if kind == "neighbor":
        return b.emit(kind, [v], v.dims, effect="leaks")
    if kind == "remember":
        return b.emit(kind, [v, Value("stat", ())], v.dims, effect="leaks")
    if kind in ("batch_norm", "global_scale", "pairwise"):
        return b.emit(kind, [v], v.dims, **mixes)
    if kind == "one_for_all":
        return b.emit(kind, [v], v.dims, **mixes, dim=at, which=b.pick([0, -1]))
    return b.emit("flip" if kind == "reverse" else kind, [v], v.dims, **mixes, dim=at)


def _straddle(b: Builder, v: Value, other: int) -> Value:
    """A view that calls B what is n and n what is B: right only if they are swapped by a permutation."""
    order = list(v.dims)
    order[v.sample], order[other] = order[other], order[v.sample]
    return b.emit("reshape", [v], order, effect="mixes", sizes=tuple(order))


# --- losses and whole programs ---------------------------------------------------------------------------------------


def _loss_term(b: Builder, v: Value, name: str, reduction: str, outside: bool) -> Step:
    kinds = ["loss_all", "loss_by_hand", *(["loss_sample"] if v.others else [])]
    own = v.dims[v.sample] == B
    kinds += ["mse"] if own and b.inputs.get("y", Input("y", v.dims)).dims == v.dims else []
    classes = 0 if isinstance(v.dims[-1], Batch) else v.dims[-1]
    wanted = Input("targets", v.dims[:-1], classes, b.chance(5))
    if own and classes > 1:
        known = b.inputs.get("targets", wanted)
        kinds += ["cross_entropy"] * 3 if (known.dims, known.bound) == (wanted.dims, wanted.bound) else []
    kind = b.pick(kinds)
    if kind == "loss_all":
        return step(name, kind, v.name, style=b.pick(["square", "plain", "tanh"]), reduction=reduction)
    if kind == "loss_sample":
        style = b.pick(["mean", "root", "logsumexp"])
        return step(name, kind, v.name, others=tuple(v.others), style=style, reduction=reduction)
    if kind == "loss_by_hand":
        return step(name, kind, v.name, reduction=reduction)
    if kind == "mse":
        return step(name, kind, v.name, b.input("y", v.dims).name, reduction=reduction)
    return _token_loss(b, v, name, reduction, outside, b.inputs.get("targets", wanted))


def _token_loss(b: Builder, v: Value, name: str, reduction: str, outside: bool, targets: Input) -> Step:
    b.inputs["targets"] = targets
    if targets.ignored and (outside or b.chance(4)):
        return step(name, "cross_entropy_own_count", v.name, "targets", sample=v.sample, reduction=reduction)
    style = b.pick(["flat", *(["second"] if v.sample == 0 and len(v.dims) > 2 else [])])
    return step(name, "cross_entropy", v.name, "targets", style=style, reduction=reduction)


def pruned(program: Program) -> Program:
    """Without the steps, parameters and inputs that no loss term reads."""
    alive = {n for s in program.losses for n in s.inputs}
    steps = []
    for s in reversed(program.steps):
        if s.name in alive or s.op in ("remember", "tick"):
            steps.append(s)
            alive.update(s.inputs)
    keep = {
        "inputs": tuple(i for i in program.inputs if i.name in alive),
        "params": tuple(p for p in program.params if p.name in alive),
    }
    return replace(program, steps=tuple(reversed(steps)), **keep)


def _start(b: Builder) -> None:
    if b.chance(3):
        embed(b, Value("", ()))
        return
    rank = b.pick([2, 3, 3, 1, 4])
    dims = [b.size() for _ in range(rank - 1)]
    dims.insert(b.pick([0, 0, 0, *range(rank)]), B)
    b.input("x", tuple(dims))


@st.composite
def programs(draw: Callable[[st.SearchStrategy[Any]], Any], mixing: bool = False, longest: int = 7) -> Program:
    """A random program; with ``mixing``, one that holds a step which mixes samples."""
    b = Builder(draw, draw(st.sampled_from([2, 3, 4, 5] if mixing else [2, 3, 4, 5, 1])))
    _start(b)
    count = draw(st.integers(1, longest))
    mix_at = draw(st.integers(0, count)) if mixing else -1
    scaled = mix_at == 0 and b.chance(2)
    for i in range(count):
        if i == mix_at and not scaled:
            mix(b, b.current())
        b.pick(MOVES)(b, b.current())
    if mix_at == count:
        mix(b, b.current())
    if not b.params:
        with_parameter(b, b.sample_values()[0])
    return pruned(_finish(b, mixing, scaled))


def _finish(b: Builder, mixing: bool, scaled: bool) -> Program:
    # A view that swaps B and T does nothing where B == T; a loss outside would mix then, and nobody can see that.
    swapped = any(s.op == "reshape" and s.effect for s in b.steps)
    outside = b.chance(2) and not scaled and not swapped
    reduction = b.pick(["mean", "mean", "sum"])
    ends = [b.sample_values()[0], *([b.pick(b.sample_values())] if b.chance(2) else [])]
    losses = tuple(_loss_term(b, v, f"l{i}", reduction, outside) for i, v in enumerate(ends))
    if scaled:
        losses = (step("l0", "loss_scaled", ends[0].name, reduction=reduction, effect="scales"),)
    if b.chance(1):
        b.steps.append(step("t", "tick", "stat"))
    return Program(
        batch=b.batch,
        inputs=tuple(b.inputs.values()),
        params=tuple(b.params),
        steps=tuple(b.steps),
        losses=losses,
        clipping=b.pick(["flat", "flat", "per_layer", "group", "automatic"]),
        norm_algorithm=b.pick(["auto", "auto", "materialize", "ghost", "flash", "recompute"]),
        loss_reduction=reduction,
        expected_batch_size=b.pick([None, None, 4.0]) if reduction == "mean" else None,
        loss_outside=outside,
        dynamic=b.chance(2),
        poisoned=not mixing and b.batch > 1 and b.chance(1),
        seed=b.pick(range(10)),
    )
