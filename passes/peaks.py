"""How fast a device computes and moves data: what the planner divides FLOPs and bytes by.

Known GPUs come from their makers' datasheets. Everything else is measured once and kept in a file, so that every process on
a machine plans alike.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..templates import ghost_norm  # noqa: F401 - the operator
from . import _compat

# Shares of the datasheet's figures that well-tuned kernels reach.
ATTAINED_FLOPS, ATTAINED_BANDWIDTH = 0.7, 0.85


@dataclass(frozen=True)
class Peaks:
    """Floating-point operations per second of matrix products by input type, bytes per second of memory, seconds per kernel.

    ``flops_float32`` is for IEEE float32; ``flops_tf32`` counts where the user's matmul precision allows it. ``flops_inner`` is for
    the inner products that a CPU's ghost norms take in float32; a GPU has no use for it.
    """

    name: str
    flops_half: float
    flops_tf32: float
    flops_float32: float
    flops_float64: float
    flops_inner: float
    bandwidth: float
    launch: float
    source: str

    def flops(self, dtype: torch.dtype) -> float:
        """Operations per second for matrix products of this type under the user's matmul precision."""
        if dtype == torch.float64 or dtype.is_complex:
            return self.flops_float64
        if dtype.itemsize <= 2:
            return self.flops_half
        return self.flops_float32 if torch.get_float32_matmul_precision() == "highest" else self.flops_tf32

    def rounded(self) -> Peaks:
        """Two significant digits: small differences between measurements are not differences between machines."""
        numbers = {name: float(f"{value:.1e}") for name, value in asdict(self).items() if isinstance(value, float)}
        return Peaks(name=self.name, source=self.source, **numbers)


def _gpu(name: str, half: float, tf32: float, float32: float, float64: float, bandwidth: float, source: str) -> Peaks:
    """From dense (not sparse) TFLOP/s and TB/s."""
    rate = 1e12 * ATTAINED_FLOPS
    bytes_per_s = 1e12 * ATTAINED_BANDWIDTH * bandwidth
    return Peaks(name, rate * half, rate * tf32, rate * float32, rate * float64, rate * float32, bytes_per_s, 3e-6, source)


# The first entry whose name is part of the device's name counts.
DATASHEETS = (
    _gpu("H200", 989, 494, 67, 67, 4.8, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
    _gpu("H100 PCIe", 756, 378, 51, 51, 2.0, "NVIDIA H100 Tensor Core GPU datasheet (PCIe)"),
    _gpu("H100", 989, 494, 67, 67, 3.35, "NVIDIA H100 Tensor Core GPU datasheet (SXM)"),
    _gpu("A100-SXM4-40GB", 312, 156, 19.5, 19.5, 1.555, "NVIDIA A100 Tensor Core GPU datasheet (40 GB)"),
    _gpu("A100", 312, 156, 19.5, 19.5, 2.039, "NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM)"),
    _gpu("L40S", 362, 183, 91.6, 1.4, 0.864, "NVIDIA L40S datasheet"),
)


# Part of the file's name: figures of another way to measure are not used.
_METHOD = 4


@cache
def peaks_of(device: torch.device) -> Peaks:
    """The figures for a device: from a datasheet, or measured on it (a fraction of a second, once on a machine)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    known = next((peaks for peaks in DATASHEETS if device.type == "cuda" and peaks.name in name), None)
    return known or _kept(name, device)


def peaks_key() -> str:
    """What plans on this machine depend on, for compile caches: the figures of the CPU and of the current GPU."""
    devices = [torch.device("cpu")] + ([torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else [])
    return repr([peaks_of(device) for device in devices])


def _kept(name: str, device: torch.device) -> Peaks:
    path = (
        Path(_folder())
        / f"peaks_{''.join(c if c.isalnum() else '_' for c in name)}_{torch.__version__.split('+')[0]}_{_METHOD}.json"
    )
    found = _read(path)
    if found is not None:
        return found
    peaks = _best(name, device).rounded()
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(peaks)))
        os.link(partial, path)  # fails where another process was faster: then that one's figures count
    except OSError:
        pass  # also a home that cannot be written: measured again next time
    else:
        return peaks
    finally:
        partial.unlink(missing_ok=True)
    return _read(path) or peaks


def _read(path: Path) -> Peaks | None:
    try:
        return Peaks(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(base) / "flashnorm_compile")


def _best(name: str, device: torch.device) -> Peaks:
    with _compat.without_modes():  # planning happens while a graph is traced, where nothing is computed
        return _best_of_threads(name, device)


def _best_of_threads(name: str, device: torch.device) -> Peaks:
    """With all threads and with one: on a busy machine the threads of a call hardly ever run together, and one thread's figures
    still stand in the right proportion to each other."""
    found = [_measured(name, device)]
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1:
        torch.set_num_threads(1)
        try:
            found.append(_measured(name, device))
        finally:
            torch.set_num_threads(threads)
    return max(found, key=lambda peaks: peaks.flops_float32)


def _measured(name: str, device: torch.device) -> Peaks:
    cuda = device.type == "cuda"

    def products(dtype: torch.dtype, batch: int, rows: int, columns: int) -> float:
        """Inner products of the rows of ``batch`` matrices, as ghost norms take them."""
        x = torch.randn(batch, rows, columns, device=device).to(dtype)
        out = torch.empty(batch, rows, rows, device=device, dtype=dtype)
        return 2 * batch * rows**2 * columns / _seconds(lambda: torch.bmm(x, x.mT, out=out), device)

    large = (1, 4096, 4096) if cuda else (1, 384, 384)
    x = torch.randn(2**28 if cuda else 2**22, device=device)
    out = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / _seconds(lambda: torch.mul(x, 2.0, out=out), device)
    small = torch.zeros(8, device=device)
    launch = _seconds(lambda: small.add_(1.0), device)
    float32 = products(torch.float32, *large)
    half = products(torch.bfloat16, *large) if cuda else float32
    # On a CPU float64 is for ghost norms alone, so it is measured as they use it: on samples that exceed a core's cache.
    float64 = products(torch.float64, *(large if cuda else _SAMPLES))
    inner = float32 if cuda else _inner_products(device)
    return Peaks(name, half, float32, float32, float64, inner, bandwidth, launch, "measured")


_SAMPLES = (4, 196, 768)


def _inner_products(device: torch.device) -> float:
    batch, length, width = _SAMPLES
    x = torch.randn(*_SAMPLES, device=device)
    return batch * length**2 * 2 * width / _seconds(lambda: torch.ops.flashnorm.ghost_norm(x, x), device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of many calls, each far shorter than the time that a scheduler gives to one process: what other work on the
    machine slows down tells nothing about it, and among this many some run undisturbed. Not the very shortest two, in case the
    clock once read short."""
    taken = []
    for _ in range(_CALLS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[2]


_CALLS = 80


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())
