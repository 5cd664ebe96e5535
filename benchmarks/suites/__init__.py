"""The suites, by name."""

from benchmarks.case import Suite
from benchmarks.suites import core, gpt2, layers, linear, llama, vision

SUITES: dict[str, Suite] = {suite.name: suite for suite in (m.SUITE for m in (core, linear, gpt2, llama, vision, layers))}
