"""Errors a user can mend, each with the exit code of the command line.

Everything else is a defect and keeps its traceback.
"""


class PipelineError(Exception):
    """The surroundings failed (disk, cluster, a lost worker); the job can be resumed."""

    exit_code = 1


class SpecError(PipelineError):
    """The call or the spec is wrong."""

    exit_code = 2


class QueryError(SpecError, ValueError):
    """A query is wrong: its vector, its filter or its k."""


class DataError(PipelineError):
    """The data is wrong: unreadable, inconsistent, or not what was promised."""

    exit_code = 3


class StaleError(PipelineError):
    """Refused: the root was begun with other settings, or holds nothing finished."""

    exit_code = 4


class LockedError(PipelineError):
    """Refused: another job holds the root."""

    exit_code = 5


class FloorError(PipelineError):
    """A quality floor was missed."""

    exit_code = 6


class DamageError(PipelineError):
    """What is on disk is not what was written."""

    exit_code = 7


class DeviceLost(PipelineError):
    """The device is in an error that outlives the call (CUDA): no row's fault, and only a new process mends it."""
