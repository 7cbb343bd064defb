"""Errors that a user sees: one line that names the object and the next step."""

from __future__ import annotations


class OnnxtoolsError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback."""

    exit_code = 1


class JobError(OnnxtoolsError):
    """The job cannot be done on this input (exit code 1)."""


class UsageError(OnnxtoolsError):
    """The command or recipe was written wrongly (exit code 2)."""

    exit_code = 2


class ModelError(JobError):
    """The model file, or a weight that it refers to, cannot be used."""


class NoMatchError(JobError):
    """A pass found nothing to work on, and a silent no-op would mislead the user."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Returns the message of `error` on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]
