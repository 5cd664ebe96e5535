"""``python -m flashnorm_compile budget | explain | diff``: questions before and after a training, without one."""

from .main import main

__all__ = ["main"]
