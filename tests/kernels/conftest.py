"""Tests of the Triton kernels need Triton itself; ``make test`` installs it beside a CPU build of PyTorch too."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
