"""A plan file that is written and hashed while the builder makes the next piece."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

_PENDING = 2
"""Most pieces (of 64 MiB in TensorRT) that wait: a slow disk delays the builder instead of filling the memory."""


class PlanFile:
    """Writes pieces to the file on one thread and hashes them on another.

    Attributes:
        size: number of bytes taken so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._digest = hashlib.sha256()
        self._writing, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._error: OSError | None = None
        self.size = 0

    def take(self, data: bytes | memoryview) -> int:
        """Queue a piece; returns its length, or 0 if an earlier piece could not be written (`finish` says why)."""
        while len(self._pending) >= 2 * _PENDING:
            self._wait()
        if self._error is not None:
            return 0
        self._pending += [self._writing.submit(self._write, data), self._hashing.submit(self._digest.update, data)]
        self.size += len(data)
        return len(data)

    def finish(self) -> None:
        """Wait for all pieces.

        Raises:
            OSError: a piece could not be written.
        """
        while self._pending:
            self._wait()
        if self._error is not None:
            raise self._error

    @property
    def sha256(self) -> str:
        """The hexadecimal hash; after `finish` it covers all pieces."""
        return self._digest.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        unwritten = memoryview(data)
        while unwritten:  # an unbuffered write may be incomplete
            unwritten = unwritten[self._file.write(unwritten) :]

    def _wait(self) -> None:
        try:
            self._pending.popleft().result()
        except OSError as error:
            self._error = self._error or error

    def __enter__(self) -> PlanFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writing.shutdown()
        self._hashing.shutdown()
        self._file.close()
