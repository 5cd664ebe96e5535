"""Every mistake a user can make, one class each.

All are ``ValueError``; each says what was given, what is allowed and what to do.
"""

from __future__ import annotations

from torch._dynamo.exc import ShortenTraceback


class PrivacyError(ShortenTraceback, ValueError):
    """Base class: training would not be private, so it does not start.

    Deriving from Dynamo's ``ShortenTraceback`` makes ``torch.compile`` raise it to the user as it is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionsError(PrivacyError):
    """An option is missing, unknown, or out of range."""


class BatchDimensionError(PrivacyError):
    """It is not clear along which dimension of an input the samples lie."""


class SampleMixingError(PrivacyError):
    """A released value depends on two samples or more in a way that clipping cannot bound."""


class UnsupportedGraphError(PrivacyError):
    """The captured graph holds something whose privacy cannot be established."""


class GraphBreakError(PrivacyError):
    """Several graphs share one clipping norm, so that no graph sees the whole gradient of a sample."""


class UnprotectedGradientError(PrivacyError):
    """An optimizer is about to use a gradient that was not clipped and noised for this step."""
