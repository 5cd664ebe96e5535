"""Fixtures that every test runs under: fixed seeds, a fresh Dynamo, poisoned memory, and a reason for each GPU skip."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import forked
import pytest
import torch
from torch._dynamo import guards

BACKEND = os.environ.get("FLASHNORM_TEST_BACKEND", "flashnorm_eager")
DEVICE = os.environ.get("FLASHNORM_TEST_DEVICE", "cpu")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device; skipped, with the reason, where there is none")
    config.addinivalue_line("markers", "slow: compiles with Inductor; a few of these take tens of seconds each")


def pytest_collection_finish() -> None:
    gc.collect()
    forked.imports_stay()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _guards_are_not_timed() -> Iterator[None]:
    """After each compilation Dynamo would empty the processor's caches and take the time of its guards, for a log."""
    with mock.patch.object(guards, "profile_guard_manager", return_value=0.0, create=True):
        yield


@pytest.fixture(autouse=True)
def _fresh_start() -> Iterator[None]:
    """The same seed and an empty Dynamo for every test."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def _device() -> Iterator[None]:
    """With FLASHNORM_TEST_DEVICE=cuda, say, models and batches are made on that device."""
    if DEVICE == "cpu":
        yield
        return
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Uninitialized memory holds NaN, so that a kernel which reads what nobody wrote gives itself away."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _kernel_operators() -> Iterator[None]:
    """With FLASHNORM_TEST_KERNELS=1 every private gradient is computed by the operators that GPUs get, on this device too."""
    from flashnorm_compile.passes import kernels

    if os.environ.get("FLASHNORM_TEST_KERNELS") != "1":
        yield
        return
    with mock.patch.object(kernels, "fused", return_value=True):
        yield


@pytest.fixture(scope="session")
def backend() -> str:
    """The backend under test: ``flashnorm_eager`` unless ``FLASHNORM_TEST_BACKEND`` names another."""
    return BACKEND
