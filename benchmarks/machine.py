"""Where a row was measured: device, library versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

PACKAGES = ("flashnorm_compile", "torch", "triton")


def device_name(device: str) -> str:
    """The GPU's name, or the processor's model name from the kernel where it tells."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of the packages (missing ones left out) and of Python."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """The date in UTC, as in 2026-11-24."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
