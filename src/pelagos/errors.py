"""One error tree: every message says what, where, got, expected, and what to do."""

from __future__ import annotations


class PelagosError(Exception):
    """Something the user or the world got wrong; the command line prints it as one line and exits 1."""


class ConfigError(PelagosError):
    """A configuration value that is missing, of the wrong type or impossible."""


class CheckpointError(PelagosError):
    """A checkpoint that cannot be read or written as asked."""


class RequestError(PelagosError):
    """A request (prompt, sampling parameters, chat body) that cannot be served as asked."""


class FormError(RequestError):
    """A request whose fields have a wrong type or an unknown value; HTTP 422 where others are 400."""


class ContextLengthError(RequestError):
    """A prompt and completion that together are longer than the model's positions."""


class CapacityError(PelagosError):
    """A request that is valid but does not fit the memory or context planned for."""


class CacheError(PelagosError):
    """Cached state on disk or in memory that is damaged, of another layout, or not to be had."""


class DataError(PelagosError):
    """Training or evaluation data that is missing, malformed or made for another tokenizer."""


class TrainingError(PelagosError):
    """A training run that cannot go on: its loss or gradient is no longer finite."""


class MissingDependency(PelagosError):
    """An optional library this feature needs is not installed."""


class SandboxError(PelagosError):
    """A sandbox that cannot be made, reached or used as asked."""


class TrajectoryError(SandboxError):
    """A trajectory log that is damaged, or a request that differs from the one recorded under its id."""


class UnknownOutcome(TrajectoryError):
    """A recorded intent without a result: the command may have run, so it is not run again unless told to."""


class KernelUnavailable(PelagosError):
    """A kernel was asked for on a device that cannot run it."""
