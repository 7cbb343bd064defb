"""A plan file that is written and hashed while the builder makes its next piece."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

_PENDING = 2
"""Pieces (TensorRT's have 64 MiB) that may wait, so that a slow disk holds the builder up and does not fill the
memory.
"""


class PlanFile:
    """Pieces go to the file on one thread and into the hash on another.

    Attributes:
        size: bytes taken so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self._digest = hashlib.sha256()
        self._writing, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._error: OSError | None = None
        self.size = 0

    def take(self, data: bytes | memoryview) -> int:
        """Queue a piece. Returns its length, or 0 where an earlier one could not be written (`finish` says why)."""
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
            OSError: one of them could not be written.
        """
        while self._pending:
            self._wait()
        if self._error is not None:
            raise self._error

    @property
    def sha256(self) -> str:
        """Hexadecimal; of all pieces after `finish`."""
        return self._digest.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:  # an unbuffered file may take less than it is given
            rest = rest[self._file.write(rest) :]

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
