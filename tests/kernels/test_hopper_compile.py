"""Every kernel configuration in use compiles for Hopper and Ampere, uses what the hardware has, and fits it."""

from __future__ import annotations

import sys

import pytest
from configurations import KERNELS, Configuration, compiled, configurations, resource_table
from flashnorm_compile.templates._triton import POINTERS
from helpers import device_of_capability


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("name", KERNELS)
def test_configurations_fit_and_use_the_hardware(name: str, capability: int) -> None:
    faults = [fault for configuration in configurations(name, capability) for fault in _faults(configuration)]
    sys.stdout.write(resource_table((name,), (capability,)) + "\n")
    assert not faults, "\n".join(faults)


def _faults(configuration: Configuration) -> list[str]:
    made = compiled(configuration)
    device = device_of_capability(configuration.capability)
    threads = 32 * configuration.num_warps
    wgmma = configuration.capability == 90 and configuration.tensor_cores and configuration.rows >= 64
    checks = {
        "spills": made.stack == 0,
        "takes more shared memory than there is": made.shared <= device.shared_bytes,
        "takes more registers than there are": made.registers * threads <= 65536,
        "has no bulk tensor copies": configuration.layout == POINTERS or made.bulk_copies > 0,
        "has no wgmma": not wgmma or made.wgmma > 0,
        "has no tensor core instructions": not configuration.tensor_cores or made.wgmma + made.mma > 0,
        "rounds float32 to tf32": configuration.tensor_cores or made.wgmma + made.mma == 0,
    }
    return [f"{configuration.label} {fault}" for fault, holds in checks.items() if not holds]
