"""Calls into `tokenizers`, whose Rust code panics on some files and texts: every failure becomes one JobError."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

from onnxtools.base.errors import JobError, OnnxtoolsError

_STDERR = 2
_lock = threading.RLock()


@contextlib.contextmanager
def native_call(what: str) -> Iterator[None]:
    """Around a call of `tokenizers`; `what` begins the error's line.

    Raises:
        JobError: it failed or panicked. What a panic wrote to stderr is dropped.
    """
    with _stderr_kept() as kept:
        try:
            yield
        except OnnxtoolsError:
            raise
        except BaseException as error:  # PanicException of pyo3 is no Exception, and its class cannot be imported
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if kept is not None:
                kept.truncate(0)
            raise JobError(f"{what} ({' '.join(str(error).split())[:120] or type(error).__name__})") from None


class _Kept:
    """Where stderr goes meanwhile: one file for the process, since a call is made for every token."""

    file: BinaryIO | None = None


@contextlib.contextmanager
def _stderr_kept() -> Iterator[BinaryIO | None]:
    """Keep what is written to the file descriptor of stderr, and write it there afterwards; None where that is not
    possible.

    Rust's panic hook writes to the descriptor itself before Python learns of the panic.
    """
    with _lock:
        try:
            saved = os.dup(_STDERR)
        except OSError:  # stderr is closed
            yield None
            return
        try:
            if _Kept.file is None:
                _Kept.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # lives as long as the process
            file = _Kept.file
            os.dup2(file.fileno(), _STDERR)
            try:
                yield file
            finally:
                os.dup2(saved, _STDERR)
                _replay(file)
        finally:
            os.close(saved)


def _replay(file: BinaryIO) -> None:
    if file.seek(0, os.SEEK_END):
        file.seek(0)
        with contextlib.suppress(OSError):
            os.write(_STDERR, file.read())
        file.seek(0)
        file.truncate(0)
