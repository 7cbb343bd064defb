"""Calls of `tokenizers`, whose Rust code panics on some files and texts: every failure becomes a JobError."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

from onnxtools.base.errors import JobError, OnnxtoolsError, one_line

_STDERR = 2
_lock = threading.RLock()


@contextlib.contextmanager
def native_call(what: str) -> Iterator[None]:
    """Context manager for a call of `tokenizers`.

    Args:
        what: the beginning of the error's line.

    Raises:
        JobError: the call failed or panicked. The panic's text on stderr is dropped.
    """
    with _captured_stderr() as captured:
        try:
            yield
        except OnnxtoolsError:
            raise
        except BaseException as error:  # PanicException of pyo3 is no Exception, and its class cannot be imported
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if captured is not None:
                captured.truncate(0)
            raise JobError(f"{what} ({one_line(error, 120) or type(error).__name__})") from None


class _Capture:
    """The file for stderr during a call: one file for the process, since there is a call for every token."""

    file: BinaryIO | None = None


@contextlib.contextmanager
def _captured_stderr() -> Iterator[BinaryIO | None]:
    """Redirect the file descriptor of stderr to a file, and write the file's content to stderr afterwards.

    It yields the file, or None if stderr is closed. Rust's panic hook writes to the descriptor itself, before Python
    gets the panic.
    """
    with _lock:
        try:
            saved = os.dup(_STDERR)
        except OSError:  # stderr is closed
            yield None
            return
        try:
            if _Capture.file is None:
                _Capture.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # lives as long as the process
            file = _Capture.file
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
