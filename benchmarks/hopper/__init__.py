"""Code for a Hopper GPU without one, and what it would cost there."""

from benchmarks.hopper.estimate import Work, peaks_named, roofline
from benchmarks.hopper.generate import Generated, GeneratedGraph, WouldRunError, hopper

__all__ = ["Generated", "GeneratedGraph", "Work", "WouldRunError", "hopper", "peaks_named", "roofline"]
