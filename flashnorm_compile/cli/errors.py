"""Mistakes on the command line that the argument parser cannot see."""


class UsageError(ValueError):
    """The call makes no sense; the text says what was given, what is allowed and what to do."""
