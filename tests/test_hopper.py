"""Code generation for a Hopper GPU without one: what comes out, what it is estimated to cost, and that nothing stays patched."""

from __future__ import annotations

import importlib
import pkgutil
from unittest import mock

import pytest
import torch
from flashnorm_compile.templates.flops import FORMULAS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from flashnorm_compile import templates

pytest.importorskip("triton", reason="Inductor's code for a GPU needs the triton package")
if torch.cuda.is_available():
    pytest.skip("hopper() is for machines without a GPU", allow_module_level=True)

from benchmarks.case import Problem, per_sample
from benchmarks.contenders.base import Privacy
from benchmarks.contenders.nonprivate import NonPrivate
from benchmarks.contenders.ours import Ours
from benchmarks.hopper import Generated, hopper, peaks_named, roofline
from benchmarks.hopper.attention import attention_of_cuda, backend_on_cuda
from benchmarks.hopper.device import pretended_device
from benchmarks.hopper.eager import CountedStep
from benchmarks.hopper.fakes import fake_problem
from benchmarks.hopper.flops import MOVES_DATA, flops_of
from benchmarks.hopper.memory import Storage, walk

aten = torch.ops.aten
GIB = 2**30


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 32))


def _problem() -> Problem:
    return Problem(_model(), (torch.randn(4, 16, 64),), torch.randn(4, 16, 32), per_sample(F.mse_loss))


@pytest.fixture(scope="module")
def non_private() -> Generated:
    with fake_problem(_problem, torch.bfloat16) as problem, hopper(go_on=True) as generated:
        NonPrivate("inductor", compiled=True).prepare(problem, Privacy()).backward()
    return generated


@pytest.fixture(scope="module")
def private() -> Generated:
    with fake_problem(_problem, torch.bfloat16) as problem, hopper(go_on=True) as generated:
        Ours("flashnorm").prepare(problem, Privacy()).backward()
    return generated


def test_both_graphs_become_cuda_code_with_their_products_in_the_library(non_private: Generated) -> None:
    assert [one.kind for one in non_private.graphs] == ["forward", "backward"]
    assert non_private.calls == non_private.graphs
    forward, backward = (one.library_calls for one in non_private.graphs)
    assert forward == {"extern_kernels.addmm": 2}
    assert backward == {"extern_kernels.mm": 3}  # the first layer's input needs no gradient
    for one in non_private.graphs:
        assert one.kernels
        assert one.walked is not None
        assert one.walked.launches >= len(one.kernels)
        assert "empty_strided_cuda(" in one.code
        assert "empty_strided_cpu(" not in one.code
        for _, source in one.kernels:
            assert "DeviceProperties(type='cuda', index=0, multi_processor_count=132, cc=90" in source


def test_the_private_step_releases_noised_gradients_and_keeps_the_forward_products(private: Generated) -> None:
    forward, backward = private.graphs
    assert forward.library_calls == {"extern_kernels.addmm": 2}
    assert backward.library_calls["torch.ops.flashnorm.release.default"] == 1
    targets = {str(node.target) for node in backward.captured.graph.nodes}
    assert any(name.startswith("flashnorm.add_noise") or "noise" in name for name in targets)
    # Stored gradients in one launch, sums of products in another.
    assert backward.library_calls["torch.ops.flashnorm.weighted_sums_noise.default"] == 2


def test_a_product_is_counted_by_hand() -> None:
    with hopper() as generated, torch.no_grad():
        x, w = torch.randn(64, 128, dtype=torch.bfloat16), torch.randn(128, 256, dtype=torch.bfloat16)
        torch.compile(torch.mm, dynamic=False)(x, w)
    (graph,) = generated.graphs
    assert graph.kind == "inference"
    assert graph.library_calls == {"extern_kernels.mm": 1}
    assert generated.flops == 2 * 64 * 128 * 256
    assert generated.nbytes == 2 * (64 * 128 + 128 * 256 + 64 * 256)
    assert generated.peak_bytes == 2 * 64 * 256
    peaks = peaks_named("H200")
    assert generated.seconds() == pytest.approx(roofline(peaks, generated.flops, generated.nbytes, torch.bfloat16))


def test_fused_elementwise_work_moves_each_operand_once() -> None:
    with hopper() as generated, torch.no_grad():
        torch.compile(lambda a, b: torch.relu(a + b) * 2.0, dynamic=False)(torch.randn(8, 100), torch.randn(8, 100))
    assert len(generated.kernels) == 1
    assert generated.flops == 0
    assert generated.nbytes == 3 * 4 * 800


def test_a_peak_is_counted_by_hand() -> None:
    """relu(x @ w).sum(): forward saves where relu is 0, one byte an element; backward makes relu's gradient, then the weight's."""

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return torch.relu(x @ w).sum()

    with hopper() as generated:
        torch.compile(loss, dynamic=False)(torch.randn(256, 128), torch.randn(128, 64, requires_grad=True))
    forward, backward = (one.walked for one in generated.graphs)
    assert forward is not None
    assert backward is not None
    mask, product, weight = 256 * 64, 4 * 256 * 64, 4 * 128 * 64
    assert mask in [storage.nbytes for storage in forward.outputs if storage is not None]
    assert product + mask <= forward.peak_bytes <= product + mask + 1024  # and partial sums of the loss
    assert [storage.nbytes for storage in backward.allocations] == [product, weight]
    assert backward.peak_bytes == product + weight  # the mask is given back by then


def test_any_size_needs_no_memory() -> None:
    def huge() -> Problem:
        return Problem(nn.Linear(2**16, 2**16), (torch.randn(2**20, 2**16),), torch.randn(2**20, 2**16), per_sample(F.mse_loss))

    with fake_problem(huge) as problem, hopper(go_on=True) as generated:
        NonPrivate("inductor", compiled=True).prepare(problem, Privacy()).backward()
    assert generated.peak_bytes > 256 * GIB
    assert generated.flops == 2 * 2 * 2**20 * 2**32  # forward, and the weight's gradient


def test_a_graph_whose_code_cannot_be_generated_gives_its_error() -> None:
    def broken(*operands: object) -> object:
        raise NotImplementedError("no kernel for this product")

    lowerings = torch._inductor.lowering.lowerings
    with (
        mock.patch.dict(lowerings, {aten.mm.default: broken}),
        pytest.raises(Exception, match="no kernel for this product"),
        hopper(),
        torch.no_grad(),
    ):
        torch.compile(torch.mm)(torch.randn(4, 4), torch.randn(4, 4))
    assert not torch.cuda.is_available()


def test_nothing_stays_patched() -> None:
    q_bhtk = torch.randn(2, 2, 8, 16)
    before = F.scaled_dot_product_attention(q_bhtk, q_bhtk, q_bhtk)
    patched = (torch.cuda.get_device_properties, torch._inductor.graph.GraphLowering.codegen, torch._inductor.config.shape_padding)
    with hopper() as generated:
        torch.compile(nn.Linear(8, 8))(torch.randn(2, 8))
    assert generated.graphs
    assert patched == (
        torch.cuda.get_device_properties,
        torch._inductor.graph.GraphLowering.codegen,
        torch._inductor.config.shape_padding,
    )
    torch.testing.assert_close(F.scaled_dot_product_attention(q_bhtk, q_bhtk, q_bhtk), before)
    x = torch.randn(5, 7)
    torch.testing.assert_close(torch.compile(lambda x: torch.sin(x) + 1)(x), torch.sin(x) + 1)


def test_attention_that_was_traced_has_its_gradient_again() -> None:
    class Squares(nn.Module):
        def forward(self, q_bhtk: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q_bhtk, q_bhtk, q_bhtk).square().sum()

    q_bhtk = torch.randn(2, 2, 8, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(Squares()(q_bhtk), q_bhtk)
    with hopper() as generated:
        torch.compile(Squares())(q_bhtk)
    assert generated.graphs
    (found,) = torch.autograd.grad(torch.compile(Squares(), backend="aot_eager")(q_bhtk), q_bhtk)
    torch.testing.assert_close(found, expected)


def test_a_second_device_is_refused() -> None:
    with pretended_device(), pytest.raises(RuntimeError, match=r"for machines without a GPU"), pretended_device():
        pass
    with pytest.raises(KeyError), pretended_device("H300"):
        pass


@pytest.mark.parametrize(
    ("dtype", "width", "masked", "backend"),
    [
        (torch.bfloat16, 64, False, "flash"),
        (torch.bfloat16, 64, True, "efficient"),
        (torch.float32, 64, False, "efficient"),
        (torch.float32, 25, False, "math"),
        (torch.float64, 64, False, "math"),
    ],
)
def test_attention_is_what_cuda_chooses(dtype: torch.dtype, width: int, masked: bool, backend: str) -> None:
    assert backend_on_cuda(dtype, width, width, masked) == backend
    with FakeTensorMode(), attention_of_cuda():
        q_bhtk = torch.randn(2, 3, 8, width, dtype=dtype, requires_grad=True)
        mask = torch.zeros(2, 3, 8, 8, dtype=dtype) if masked else None
        out = F.scaled_dot_product_attention(q_bhtk, q_bhtk, q_bhtk, attn_mask=mask, is_causal=not masked)
    assert out.shape == (2, 3, 8, width)
    assert out.grad_fn is not None
    named = {name: name in out.grad_fn.name().lower() for name in ("flash", "efficient")}
    assert named == {name: name == backend for name in named}


def test_the_walk_follows_names_aliases_and_tuples() -> None:
    code = """
def call(self, args):
    primals_1, saved = args
    args.clear()
    buf0 = empty_strided_cuda((4, 8), (8, 1), torch.float32)
    buf1 = reinterpret_tensor(buf0, (8, 4), (4, 1), 0); del buf0  # reuse
    buf2 = torch.ops.aten.sort.default(buf1)
    del buf1
    buf3 = buf2[0]
    buf4 = buf2[1]
    del buf2
    del buf3
    del saved
    with torch.cuda._DeviceGuard(0):
        kernel.run(buf4, 4, stream=stream0)
        buf5 = empty_strided_cuda((4, ), (1, ), torch.bfloat16).as_strided((2, ), (1, ))
    return (buf5, primals_1, None, reinterpret_tensor(buf4, (1,), (1,), 0), )
"""
    saved = Storage("saved", 1000)
    walked = walk(code, {"buf3": 100, "buf4": 10}.get, {"saved": saved})
    assert walked.peak_bytes == 1000 + 128 + 110
    assert walked.at_peak[0] is saved
    assert [storage.nbytes for storage in walked.allocations] == [128, 100, 10, 8], "padding in place: all that is allocated"
    assert [storage and storage.nbytes for storage in walked.outputs] == [8, None, None, 10]
    assert walked.library_calls == {"torch.ops.aten.sort.default": 1}
    assert walked.launches == 1


def test_an_eager_step_counts_its_operators_and_its_peak() -> None:
    with FakeTensorMode():
        x, w = torch.empty(64, 128), torch.empty(128, 256)
        with CountedStep(peaks_named("H200")) as counted:
            y = (x @ w).t()
            del y
            y = torch.relu(x)
    assert y.shape == (64, 128)
    assert counted.launches == 2
    assert counted.flops == 2 * 64 * 128 * 256
    assert counted.nbytes == 4 * (64 * 128 + 128 * 256 + 64 * 256 + 2 * 64 * 128)
    assert counted.peak_bytes == 4 * 64 * 256
    assert counted.live_bytes == 4 * 64 * 128


def test_every_operator_of_ours_has_a_formula_or_needs_none() -> None:
    for module in pkgutil.iter_modules(templates.__path__):
        importlib.import_module(f"{templates.__name__}.{module.name}")
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("flashnorm::")}
    assert names - set(FORMULAS) - MOVES_DATA == set()


def test_formulas_of_ours_agree_with_the_product_that_they_stand_for() -> None:
    g_btp, a_btd = torch.empty(3, 5, 7, device="meta"), torch.empty(3, 5, 11, device="meta")
    product = flops_of(aten.bmm.default, (g_btp.mT, a_btd), {}, torch.empty(3, 7, 11, device="meta"))
    assert FORMULAS["weight_grads"](g_btp.shape, a_btd.shape) == product == 2 * 3 * 5 * 7 * 11
    assert FORMULAS["ghost_norm"](g_btp.shape, a_btd.shape) == 3 * 25 * 18
    grad, source = torch.empty(3, 4, 6, 6, device="meta"), torch.empty(3, 2, 8, 8, device="meta")
    conv = flops_of(
        aten.convolution.default,
        (source, torch.empty(4, 2, 3, 3, device="meta"), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        {},
        grad,
    )
    assert FORMULAS["conv_weight_grads"](grad.shape, source.shape, [4, 2, 3, 3], [1, 1], [0, 0], [1, 1], False, [0, 0], 1) == conv
