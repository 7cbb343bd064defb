"""Atomic file writes, and temporary files that the next run removes after a run was killed.

A temporary file is called `.NAME.TOKEN.tmp`. The token is random, so that nobody can predict the name. The file is
created with O_EXCL and O_NOFOLLOW, so that a link planted there is not followed. The process that creates it holds a
lock (flock) on it. The kernel drops the lock when the process ends, however it ends. An unlocked file of such a name is
the leftover of a killed run.
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
"""Longest wait for a folder's lock. A process that is stopped while it renames files must not block others forever."""


def new_token() -> str:
    """Returns the random token of one run. The names of all its temporary files contain it."""
    return secrets.token_hex(4)


def temporary(path: Path, token: str, kind: str = "tmp") -> Path:
    """Returns the temporary name of `path`.

    Args:
        path: the final name.
        token: of the run (`new_token`).
        kind: `tmp` for a new file, `old` for the replaced file while the run is unfinished.
    """
    return path.with_name(f".{path.name}.{token}.{kind}")


def refuse_special(path: Path) -> None:
    """Refuse to replace a device or a pipe by a file.

    Raises:
        JobError: `path` is a device or a pipe.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise JobError(f"{path}: is a device or a pipe, no file; name a file")


def write_error(path: Path, error: OSError) -> JobError:
    """Returns the error for a file that cannot be written; it names the operating system's reason."""
    reason = error.strerror or str(error)
    return JobError(f"{path}: cannot be written ({reason}); free space or choose another folder")


def flush(path: Path) -> None:
    """Wait until the bytes of the file `path`, or the names in the folder `path`, are on the disk (fsync)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def real_target(path: Path) -> Path:
    """Returns the path to write for `path`: for a link its target, so that the link stays."""
    return path.resolve() if path.is_symlink() else path


def create(path: Path, like: Path | None = None) -> int:
    """Create an empty file and lock it.

    Args:
        path: the new file.
        like: a file whose mode and owner the new file gets, if it exists.

    Returns:
        The open file's descriptor.

    Raises:
        FileExistsError: `path` exists, be it a link.
        OSError: the folder is missing or not writable.
    """
    while True:
        fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666
        )
        if try_lock(fd) and os.fstat(fd).st_nlink:
            break
        os.close(fd)  # before it was locked, another run took it for a leftover and removes it
        while path.exists():
            time.sleep(0.001)
    if like is not None:
        _copy_mode_and_owner(fd, real_target(like))
    return fd


class NewFile:
    """A temporary file beside `path` that `commit` renames to `path`.

    It is empty at first and has the mode and owner of `like`, by default of `path`.

    Attributes:
        path: the final name. If it was a link, the link's target.
        tmp: the temporary file to write.
    """

    def __init__(self, path: Path, token: str, like: Path | None = None) -> None:
        """Raises: OSError where the folder is missing or not writable."""
        self.path = real_target(path)
        self.tmp = temporary(self.path, token)
        self._fd = create(self.tmp, like or path)

    @property
    def is_named(self) -> bool:
        """Whether `commit` has renamed the file. The file system decides: a signal may directly follow the rename."""
        return not self.tmp.exists()

    def commit(self, *, durable: bool, path: Path | None = None) -> None:
        """Rename the temporary file to its final name.

        Args:
            durable: flush its bytes to the disk first, so that a power cut leaves the old file or the new one.
            path: another final name.
        """
        self.path = path or self.path
        if durable:
            flush(self.tmp)  # the writer may have created another file of this name
        self.tmp.replace(self.path)

    def close(self) -> None:
        """Remove the temporary file unless it was renamed, and release its lock."""
        if self._fd >= 0:
            self.tmp.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def try_lock(fd: int) -> bool:
    """Try to lock an open file; False if another process holds the lock. A file system without locks counts as free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _copy_mode_and_owner(fd: int, old: Path) -> None:
    """Give the open file the mode of `old`, and its owner if permitted."""
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
    """Yields a temporary path beside `path`, which replaces `path` on success and is removed on failure.

    If `path` exists, the new bytes are flushed to the disk before the replacement.

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
    """Create the folder of the output `path`.

    Raises:
        JobError: the folder cannot be created; names the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"{path}: its folder cannot be created ({error.strerror}); name another place") from None


def probe(path: Path) -> None:
    """Refuse, before any work, a path where no file can be created.

    Raises:
        JobError: names the reason.
    """
    refuse_special(path)
    try:
        NewFile(path, new_token()).close()
    except OSError as error:
        raise write_error(path, error) from error


# --- leftovers of killed runs -----------------------------------------------------------------------------------------


def sweep(folder: Path, names: set[str]) -> None:
    """Remove temporary files of `names` in `folder` whose process is gone.

    A run that was killed while it renamed its files leaves `.old` copies of the files that it had replaced, and a
    `.tmp` file that it had not yet renamed. In that case the old files are restored.
    """
    runs: dict[str, list[tuple[Path, Path, str]]] = {}
    for entry in folder.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match is not None and match["name"] in names and not entry.is_symlink():
            runs.setdefault(match["token"], []).append((entry, folder / match["name"], match["kind"]))
    for files in runs.values():
        waiting = [tmp for tmp, _, kind in files if kind == "tmp"]
        with contextlib.ExitStack() as stack:
            if not all(stack.enter_context(taken(tmp)) for tmp in waiting):
                continue
            for entry, path, kind in files:
                with contextlib.suppress(OSError):
                    if kind == "old" and waiting:
                        entry.replace(path)
                    entry.unlink(missing_ok=True)  # renaming one link of a file to another does nothing (rename(2))


@contextlib.contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Yields whether a file or folder of this user was unlocked; if so, it stays locked while the context lasts.

    A caller must remove it inside the context: between a check and a removal, another run may create and lock a file of
    this name.
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
    """Lock a regular file or folder of this user.

    False if it is no such file or folder, if it is locked, or if its file system has no locks.
    """
    status = os.fstat(fd)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or status.st_uid != os.geteuid():
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


_own_folders: set[Path] = set()
"""The folders that this process has locked."""


class OwnFolder:
    """A temporary folder that is removed with the object.

    After a kill, the next run that creates one of the same prefix removes it.

    Attributes:
        path: the folder.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        """Raises: OSError where `parent` (by default TMPDIR) is missing or not writable."""
        where = parent or Path(tempfile.gettempdir())
        remove_dead(prefix, where)
        self.path, fd = _locked_folder(prefix, where)
        _own_folders.add(self.path.resolve())
        self._finalizer = weakref.finalize(self, _remove_folder, self.path, fd)

    def close(self) -> None:
        """Remove the folder now."""
        self._finalizer()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_dead(prefix: str, where: Path) -> None:
    """Remove the folders of `OwnFolder` called `prefix`* in the folder `where` whose process is gone."""
    for entry in where.glob(f"{prefix}*"):
        if entry.is_dir() and not entry.is_symlink():
            with taken(entry) as is_dead:
                if is_dead:
                    shutil.rmtree(entry, ignore_errors=True)


def _locked_folder(prefix: str, parent: Path) -> tuple[Path, int]:
    """Returns a new folder and its lock. Tries again if another run removed the folder before it was locked."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if try_lock(fd) and path.is_dir():
                return path, fd
            os.close(fd)


def _remove_folder(path: Path, fd: int) -> None:
    _own_folders.discard(path.resolve())
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.close(fd)


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Let only one process at a time rename files in `folder`.

    If another process holds the lock for more than `_LOCK_SECONDS`, this one goes on without it. An `OwnFolder` of this
    process is already locked, and nobody else renames files in it.
    """
    if folder.resolve() in _own_folders:
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
