"""Benchmarks, run from the root of a checkout: `python -m benchmarks --help`."""

import os

# The profiler that counts CPU memory would write a line for each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
