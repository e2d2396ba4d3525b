"""Typed errors for users; the command line prints them as one line and exits with `exit_code`."""


class SipError(Exception):
    """Base of every error a user can cause or must act on.

    The message says what was wrong, which rule it broke and what to do, in one line.
    """

    exit_code = 1


class ConfigError(SipError, ValueError):
    """A setting is unknown, out of range, or in conflict with another one."""

    exit_code = 2


class DataError(SipError, ValueError):
    """Input text, token files or prompts are missing, empty or not what they should be."""

    exit_code = 3


class CheckpointError(SipError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_code = 4


class RequestError(SipError, ValueError):
    """A generation or scoring request breaks a rule; raised before any page is taken."""

    exit_code = 5


class NonFiniteError(SipError):
    """A loss or gradient is not finite; raised before the update, on every rank alike."""

    exit_code = 6


class ThresholdError(SipError):
    """A monitored quantity (judge failures, sampler drift, ...) crossed its limit; the run stops."""

    exit_code = 7
