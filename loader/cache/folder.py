"""Makes and locks the folder that node caches lie in: private to the user, with one lock for short decisions."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import tempfile
import time
from collections.abc import Iterator

from ..errors import AccessError
from .memory import available_bytes, is_in_memory

LOCK_NAME = ".lock"
LOCK_TIMEOUT_S = 60.0
"""The lock is held for moments only. Where a process that holds it is stopped, the others raise after this time."""


def default_cache_folder() -> str:
    """``rankload-<uid>`` in the system's temporary folder."""
    return os.path.join(tempfile.gettempdir(), f"rankload-{os.getuid()}")


def make_private_folder(path: str) -> str | None:
    """Makes `path` with mode 0700, or checks one that is there.

    A sentence for where others can list it, None otherwise: what lies in it is private. Raises `AccessError` where it
    is a link or no folder, belongs to another user, or lets others write.
    """
    try:
        # What has to be made above it lets nobody else write: who can write there can put another folder in its place.
        _make_folders(os.path.dirname(os.path.abspath(path)), 0o755)
        _make_folders(path, 0o700)
    except OSError as error:
        raise AccessError(
            f"{path}: the cache folder can't be made: {error.strerror}; set cache_dir to a folder that you "
            "can write to",
            path=path,
        ) from error
    return _check_private(path)


def make_private(folder: str) -> None:
    """Makes `folder`, and those above it that are missing, with mode 0700 whatever the umask. Raises OSError."""
    _make_folders(folder, 0o700)
    if os.stat(folder).st_mode & 0o077:
        os.chmod(folder, 0o700)


def open_private(path: str, flags: int) -> int:
    """Opens the file at `path`, never through a link; one that is made has mode 0600 whatever the umask."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) != 0o600:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_all_private(path: str) -> None:
    """Gives the file or folder at `path`, and all in it, mode 0600 or 0700."""
    for folder, _, names in os.walk(path):
        os.chmod(folder, 0o700)
        for name in names:
            os.chmod(os.path.join(folder, name), 0o600)
    if not os.path.isdir(path):
        os.chmod(path, 0o600)


def _make_folders(path: str, mode: int) -> None:
    """Makes `path`, and those above it that are missing, with `mode` from the start: one that is set afterwards leaves
    a moment in which others could write."""
    if os.path.isdir(path):
        return
    if not os.path.isdir(os.path.dirname(path)):
        _make_folders(os.path.dirname(path), mode)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)
        if stat.S_IMODE(os.stat(path).st_mode) & 0o700 != 0o700:
            os.chmod(path, mode)


def folder_of(path: str) -> str | None:
    """The cache folder that `path` lies in; None where it lies in none."""
    folder = os.path.dirname(os.path.abspath(path))
    while folder != os.path.dirname(folder):
        if os.path.exists(os.path.join(folder, LOCK_NAME)):
            return folder
        folder = os.path.dirname(folder)
    return None


def free_bytes_of(folder: str) -> int:
    """How many bytes the file system of `folder` has left for this user; in memory, no more than `available_bytes`."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    return min(free, available_bytes()) if is_in_memory(folder) else free


@contextlib.contextmanager
def locked(folder: str) -> Iterator[float]:
    """Holds the folder's lock, across processes, threads and nodes that share it; makes the folder if needed.

    Yields the present time by the clock that stamps files there, which may differ from this node's. The lock ends with
    its process. Raises `AccessError` where the file system has no locks, or another process holds this one for a
    minute.
    """
    fd = _acquire(folder)
    try:
        os.utime(fd)
        yield os.fstat(fd).st_mtime
    finally:
        os.close(fd)


def remove_if_empty(folder: str, *, keep_folder: bool) -> None:
    """Removes the lock file, and the folder too unless `keep_folder`, if nothing else is in there."""
    if not os.path.isdir(folder):
        return
    with contextlib.suppress(OSError), locked(folder):
        if os.listdir(folder) == [LOCK_NAME]:
            # A process that waits for this lock sees that its file is gone, and takes the next one.
            os.unlink(os.path.join(folder, LOCK_NAME))
            if not keep_folder:
                os.rmdir(folder)


def _check_private(path: str) -> str | None:
    found = os.lstat(path)
    mode = stat.S_IMODE(found.st_mode)
    problem = None
    remedy = "set cache_dir to a folder of your own"
    if mode & stat.S_ISVTX:
        # There, nobody else can put another folder in its place.
        remedy += f", such as {os.path.join(path, f'rankload-{os.geteuid()}')}"
    if stat.S_ISLNK(found.st_mode):
        problem, remedy = "is a symbolic link", f"set cache_dir to what it leads to, {os.path.realpath(path)}"
    elif not stat.S_ISDIR(found.st_mode):
        problem, remedy = "is not a folder", "set cache_dir to a folder"
    elif found.st_uid != os.geteuid():
        problem = f"belongs to user {found.st_uid}, expected user {os.geteuid()}"
    elif mode & 0o022:
        problem = f"can be written by others (mode {mode:04o}, expected 0700)"
        remedy = f"run chmod 700 {shlex.quote(path)}, or {remedy}"
    if problem is not None:
        raise AccessError(f"{path}: not used as cache folder, since it {problem}; {remedy}", path=path)
    if mode & 0o055:
        return (
            f"others can list the cache folder {path} (mode {mode:04o}), and not read what is in it: chmod 700 makes "
            "it private"
        )
    return None


def _acquire(folder: str) -> int:
    path = os.path.join(folder, LOCK_NAME)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fd = open_private(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            make_private_folder(folder)
            continue
        except OSError as error:
            raise AccessError(f"{path}: can't be opened: {error.strerror}", path=folder) from error
        try:
            if _try_lock(fd, folder) and _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > deadline:
            raise AccessError(
                f"{path}: locked by another process for {LOCK_TIMEOUT_S:.0f} s; end it, or set another "
                "cache_dir",
                path=folder,
            )
        time.sleep(0.01)


def _try_lock(fd: int, folder: str) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise AccessError(
            f"{folder}: its file system offers no locks ({error.strerror}); set cache_dir to another one",
            path=folder,
        ) from error
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
