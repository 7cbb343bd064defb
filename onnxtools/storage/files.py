"""Files that appear whole or not at all, and temporary ones that the next run removes where a run was killed.

A temporary file is called `.NAME.TOKEN.tmp`, with a random token, so that its name cannot be foretold; it is made with
O_EXCL and O_NOFOLLOW, so that a link planted there is not followed; and its maker holds a lock (flock) on it, which the
kernel drops when the process ends, however it ends. What matches the name and is not locked was left by a killed run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from onnxtools.base.errors import JobError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{8})\.(?P<kind>tmp|old)")
_LOCK_SECONDS = 10.0
"""A process that was stopped while it renamed its files must not hold up others for ever."""


def new_token() -> str:
    """Of one run that writes; all its temporary files carry it."""
    return secrets.token_hex(4)


def temporary(path: Path, token: str, kind: str = "tmp") -> Path:
    """The temporary name of `path`; `old` is where the file that is replaced waits until all is done."""
    return path.with_name(f".{path.name}.{token}.{kind}")


def refuse_special(path: Path) -> None:
    """A device or a pipe must not be replaced by a file.

    Raises:
        JobError: `path` is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise JobError(f"{path}: is a device or a pipe, no file; name a file")


def write_error(path: Path, error: OSError) -> JobError:
    reason = error.strerror or str(error)
    return JobError(f"{path}: cannot be written ({reason}); free space or choose another folder")


def flush(path: Path) -> None:
    """Wait until the bytes of `path`, or the names in the folder `path`, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def real_target(path: Path) -> Path:
    """Where a file at `path` really lies: a link stays, and what it leads to is replaced."""
    return path.resolve() if path.is_symlink() else path


def create(path: Path, like: Path | None = None) -> int:
    """A new empty file, locked, with the mode and owner of the file at `like` where there is one; its descriptor.

    Raises:
        FileExistsError: something is there, be it a link.
        OSError: the folder is missing or not writable.
    """
    while True:
        fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666
        )
        if try_lock(fd) and os.fstat(fd).st_nlink:
            break
        os.close(fd)  # another run took it for a dead one before it was locked, and removes it
        while path.exists():
            time.sleep(0.001)
    if like is not None:
        _take_after(fd, real_target(like))
    return fd


class NewFile:
    """A temporary file beside `path`, empty at first, that `commit` gives its name. It has the mode and owner of
    `like`, by default `path`.

    Attributes:
        path: its name to be; of a link, what it leads to.
        tmp: where to write.
    """

    def __init__(self, path: Path, token: str, like: Path | None = None) -> None:
        """Raises: OSError where the folder is missing or not writable."""
        self.path = real_target(path)
        self.tmp = temporary(self.path, token)
        self._fd = create(self.tmp, like or path)

    @property
    def is_named(self) -> bool:
        """Whether it has its name. The file system is asked: a signal may come between a rename and a note of it."""
        return not self.tmp.exists()

    def commit(self, *, durable: bool, path: Path | None = None) -> None:
        """Rename it to `path`.

        Args:
            durable: its bytes are on the disk before, so that a power cut leaves the old file or the new one.
        """
        self.path = path or self.path
        if durable:
            flush(self.tmp)  # whoever wrote it may have made another file of this name
        self.tmp.replace(self.path)

    def close(self) -> None:
        """Remove the temporary file, where it has not got its name."""
        if self._fd >= 0:
            self.tmp.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def try_lock(fd: int) -> bool:
    """Try to lock; False where another process has it. File systems without locks count as free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _take_after(fd: int, old: Path) -> None:
    """Give the open file the mode of `old`, and its owner where we may."""
    try:
        status = old.stat()
    except OSError:
        return
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(OSError):
            os.fchown(fd, status.st_uid, status.st_gid)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` (flushed first if `path` exists), else it
    goes.

    Raises:
        JobError: the folder is missing or not writable, or the disk is full.
    """
    refuse_special(path)
    try:
        sweep(path.parent, {path.name})
        new = NewFile(path, new_token())
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield new.tmp
        durable = new.path.exists()
        new.commit(durable=durable)
        if durable:
            flush(new.path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        new.close()


def make_parent(path: Path) -> None:
    """Create the folder of an output.

    Raises:
        JobError: it cannot be created; names the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{path}: its folder cannot be created ({error.strerror}); name another place") from None


def probe(path: Path) -> None:
    """Refuse, before any work, a place where no file can be made.

    Raises:
        JobError: names the reason.
    """
    refuse_special(path)
    try:
        NewFile(path, new_token()).close()
    except OSError as error:
        raise write_error(path, error) from error


# --- what killed runs left --------------------------------------------------------------------------------------------


def sweep(folder: Path, names: set[str]) -> None:
    """Remove temporary files of `names` in `folder` whose process is gone.

    Where a run was killed while it renamed its files, `.old` copies of those that it had replaced lie there beside a
    file that it had not yet renamed: then the old ones come back.
    """
    runs: dict[str, list[tuple[Path, Path, str]]] = {}
    for entry in folder.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match is not None and match["name"] in names and not entry.is_symlink():
            runs.setdefault(match["token"], []).append((entry, folder / match["name"], match["kind"]))
    for left in runs.values():
        waiting = [tmp for tmp, _, kind in left if kind == "tmp"]
        with contextlib.ExitStack() as stack:
            if not all(stack.enter_context(taken(tmp)) for tmp in waiting):
                continue
            for entry, path, kind in left:
                with contextlib.suppress(OSError):
                    if kind == "old" and waiting:
                        entry.replace(path)
                    entry.unlink(missing_ok=True)  # renaming one link of a file to another does nothing (rename(2))


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Whether a file or folder of this user was locked by nobody; then nobody else has it as long as the context lasts.

    Whoever removes it must hold it: between a look and a removal another run may have made a file of this name its own.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        yield _lock_own(fd)
    finally:
        os.close(fd)


def _lock_own(fd: int) -> bool:
    """Lock a regular file or folder of this user; False where it is none, is locked, or its file system has no
    locks.
    """
    status = os.fstat(fd)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or status.st_uid != os.geteuid():
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


_own: set[Path] = set()
"""The folders that this process has locked."""


class OwnFolder:
    """A temporary folder that goes with the object, or, after a kill, with the next run that makes one of the same
    prefix.

    Attributes:
        path: the folder.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        """Raises: OSError where `parent` (by default TMPDIR) is missing or not writable."""
        where = parent or Path(tempfile.gettempdir())
        remove_dead(prefix, where)
        self.path, fd = _locked_folder(prefix, where)
        _own.add(self.path.resolve())
        self._finalizer = weakref.finalize(self, _remove_folder, self.path, fd)

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_dead(prefix: str, where: Path) -> None:
    """Remove folders of `OwnFolder` whose process is gone."""
    for entry in where.glob(f"{prefix}*"):
        if entry.is_dir() and not entry.is_symlink():
            with taken(entry) as is_dead:
                if is_dead:
                    shutil.rmtree(entry, ignore_errors=True)


def _locked_folder(prefix: str, parent: Path) -> tuple[Path, int]:
    """A new folder and its lock; made again where another run took it for a dead one before it was locked."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if try_lock(fd) and path.is_dir():
                return path, fd
            os.close(fd)


def _remove_folder(path: Path, fd: int) -> None:
    _own.discard(path.resolve())
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(fd)


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """One process at a time gives files of `folder` their names; where one has stopped for good, others go on after a
    while.

    A folder of our own is locked for as long as it lives, and nobody else names files in it.
    """
    if folder.resolve() in _own:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + _LOCK_SECONDS
        while not try_lock(fd) and time.monotonic() < until:
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)
