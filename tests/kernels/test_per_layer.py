"""``flashnorm::per_layer``: one launch in Triton's interpreter, two launches, and the ATen form against loops in float64."""

from __future__ import annotations

import pytest
import torch
from eager import interpreted_launches
from flashnorm_compile.templates import _layer_tiles as layer_tiles
from flashnorm_compile.templates import per_layer as module
from flashnorm_compile.templates._triton import AMPERE, HOPPER, POINTERS, layout_of
from helpers import FORMS, operand
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sum_configurations import Configuration, faults, per_layer_configurations
from torch import Tensor

per_layer = torch.ops.flashnorm.per_layer
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RTOL = 1e-5


def assert_equals_loops(
    found: tuple[Tensor, Tensor], g: Tensor, a: Tensor, bound: float, scale: float, constant: float | None
) -> None:
    total, norms_sq = module.reference(g, a, bound, scale, constant)
    torch.testing.assert_close(found[0].double(), total, rtol=RTOL, atol=RTOL * bound * scale * max(1, g.shape[0]))
    finite = norms_sq.isfinite()
    assert torch.equal(found[1].isfinite(), finite)
    torch.testing.assert_close(found[1][finite].double(), norms_sq[finite], rtol=RTOL, atol=0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_one_launch_equals_loops(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.one_of(st.sampled_from([1, 16, 32, 33]), st.integers(1, 40))
    batch, length, p, d = draw(st.integers(1, 5)), draw(sizes), draw(sizes), draw(sizes)
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    g, a = (operand((batch, length, width), dtype, draw(st.sampled_from(FORMS))) for width in (p, d))
    if g.stride(0) and draw(st.booleans()):
        g[0] = float("nan")
    # About half of the samples are clipped.
    bound, scale, constant = (length * p * d) ** 0.5, draw(st.sampled_from([1.0, 0.25])), draw(st.sampled_from([None, 0.01]))
    tiles = layer_tiles.whole_layer(p, d, dtype, "ieee", split=draw(st.integers(1, batch)))
    assert tiles is not None
    layouts = [draw(st.sampled_from(sorted({POINTERS, layout_of(x, HOPPER)}))) for x in (g, a)]
    with interpreted_launches(seed):
        totals, norms_sq = module.launch(g, a, torch.tensor(bound), torch.tensor(scale), constant, tiles, layouts, "ieee")
    assert totals.shape == (tiles.SPLIT, p, d)
    assert_equals_loops((totals.double().sum(0), norms_sq), g, a, bound, scale, constant)


@pytest.mark.parametrize("constant", [None, 0.01])
def test_one_sample_never_adds_more_than_its_bound(constant: float | None) -> None:
    g, a = torch.randn(1, 33, 20) * 1e3, torch.randn(1, 33, 24)
    tiles = layer_tiles.whole_layer(20, 24, torch.float32, "ieee")
    assert tiles is not None
    with interpreted_launches():
        one = module.launch(g, a, torch.tensor(0.7), torch.tensor(1.0), constant, tiles, (POINTERS, POINTERS), "ieee")[0]
    for total in (one, per_layer(g, a, torch.tensor(0.7), torch.tensor(1.0), constant)[0]):
        assert float(total.norm()) == pytest.approx(0.7, rel=1e-4)
        assert float(total.norm()) <= 0.7 * (1 + 1e-3)


def test_a_zero_gradient_stays_zero() -> None:
    g, a = torch.zeros(2, 8, 16), torch.randn(2, 8, 16)
    tiles = layer_tiles.whole_layer(16, 16, torch.float32, "ieee")
    assert tiles is not None
    with interpreted_launches():
        total, norms_sq = module.launch(g, a, torch.tensor(1.0), torch.tensor(1.0), None, tiles, (POINTERS, POINTERS), "ieee")
    assert not total.any()
    assert not norms_sq.any()
    assert not per_layer(g, a, torch.tensor(1.0), torch.tensor(1.0))[0].any()


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("constant", [None, 0.01])
def test_eager_launch_is_one_or_two(fits: bool, constant: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (module, module.clipped_sum_triton.__globals__):
        patch = monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr
        patch(where, "device_for", lambda *operands: (HOPPER, [POINTERS, POINTERS]))
        patch(where, "allocate_descriptors", lambda: None)
    launched = []
    real = module.launch
    monkeypatch.setattr(module, "launch", lambda *args: launched.append(1) or real(*args))
    if not fits:
        monkeypatch.setattr(module, "one_launch", lambda *args: None)
    g, a = torch.randn(6, 40, 20), torch.randn(6, 24, 40).mT
    with interpreted_launches():
        found = module.per_layer_triton(g, a, torch.tensor(120.0), torch.tensor(0.5), constant)
    assert_equals_loops(found, g, a, 120.0, 0.5, constant)
    assert bool(launched) == fits


@pytest.mark.parametrize("sizes", [(3, 7, 5, 4), (1, 1, 1, 1), (0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_operator_takes_any_size(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, length, p, d = sizes
    g, a = torch.randn(batch, length, p, dtype=dtype), torch.randn(batch, d, length, dtype=dtype).mT
    arguments = (g, a, torch.tensor(3.0), torch.tensor(0.5))
    found = per_layer(*arguments)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_equals_loops(found, g, a, 3.0, 0.5, None)
    torch.library.opcheck(per_layer.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    g, a, one = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"max_norm of dtype torch.float64 and shape \(\); it needs 0-d float32"):
        per_layer(g, a, one.double(), one)
    with pytest.raises(ValueError, match=r"scale of dtype torch.float32 and shape \(1,\)"):
        per_layer(g, a, one, one[None])
    with pytest.raises(TypeError, match=r"cast one of them"):
        per_layer(g, a.half(), one, one)


@pytest.mark.parametrize("device", [HOPPER, AMPERE])
def test_one_launch_only_where_the_layer_fits_and_pays(device: object) -> None:
    def best(*shape: int) -> layer_tiles.Tiles | None:
        return layer_tiles.one_launch(shape, torch.bfloat16, device, "ieee")  # type: ignore[arg-type]

    adapter = best(264, 1024, 16, 768)
    assert adapter is not None
    assert (adapter.BLOCK_P, adapter.BLOCK_D) == (16, 1024)
    assert adapter.SPLIT > 64
    assert best(264, 1024, 768, 768) is None
    assert best(1, 65536, 128, 128) is None


@pytest.mark.parametrize("configuration", per_layer_configurations(), ids=str)
def test_code_fits_the_device(configuration: Configuration) -> None:
    assert not faults(configuration)
