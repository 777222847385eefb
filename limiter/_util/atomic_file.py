"""Files that appear under their name complete or not at all. This module knows nothing of their content.

Everything here blocks: call it from a thread where an event loop must not wait for the disk.
"""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from limiter._util.cancellation import run_to_completion

T = TypeVar("T")
P = ParamSpec("P")
_DEAD_S = 3600.0  # where locks do not work: the writer of a temp file left alone for this long is taken for dead
_FRESH_S = 60.0  # a temp file is created first and locked only then
_LOCK_PAUSE_S = 0.02
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_COPY_BYTES = 1 << 20


class AtomicFile:
    """A file being written: `write`, then `publish`; a `with` block that ends before `publish` leaves no trace.

    Data goes to a temp file with a unique name beside `path`, mode 0600. Raises OSError, in which case the file at
    `path` is unchanged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # a symbolic link stays one: its target is replaced
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if self.path.exists() and not self.path.is_file():  # root could replace /dev/null with a file
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        _sweep(self.path)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp")
        self._temp: Path | None = Path(name)
        self._is_synced = False
        self._stream = os.fdopen(descriptor, "wb", buffering=0)
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # shows `_sweep` that the writer is alive

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, data: bytes) -> None:
        """Append all of the data."""
        self._is_synced = False
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) :]

    def sync(self) -> None:
        """Flush the written data to disk."""
        if not self._is_synced:
            os.fsync(self._stream.fileno())
        self._is_synced = True

    def publish(self, *, keep_as: Path | None = None) -> os.stat_result:
        """Flush the file to disk, then move it to `path`. With keep_as, the replaced file is kept under that name.

        Returns the stat of the new file, whose device and inode identify it.
        """
        if self._temp is None:
            raise ValueError("this file has been published or discarded already")
        self.sync()
        result = os.fstat(self._stream.fileno())
        if keep_as is not None:
            _keep(self.path, keep_as)
        self._temp.replace(self.path)
        self._temp = None
        self._stream.close()
        _sync_folder(self.path.parent)  # otherwise a power loss could undo the rename
        return result

    def discard(self) -> None:
        """Remove the written data, unless it has been published."""
        self._stream.close()
        if self._temp is not None:
            with contextlib.suppress(OSError):
                self._temp.unlink()
            self._temp = None


class FolderLock:
    """A lock beside a file, released when its process dies: `with FolderLock(path) as lock: lock.acquire(…)`.

    The lock file, `.<name>.lock`, is never removed: removing it could break a lock that another process holds.
    """

    def __init__(self, path: Path) -> None:
        resolved = path.resolve()
        self.path = resolved.with_name(f".{resolved.name}.lock")
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def acquire(self, *, within_s: float) -> None:
        """Wait for the lock. Raises BlockingIOError when another process holds it for within_s, or another OSError."""
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + within_s
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOCK_PAUSE_S)
            else:
                return


def free_name(path: Path, suffix: str) -> Path:
    """Return an unused name beside `path`, such as `credits.json.<suffix>`."""
    name = f"{path.name}.{suffix}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path.with_name(each) for each in names if not os.path.lexists(path.with_name(each)))


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a thread, to its end even if the caller is cancelled: no file is closed during a write."""
    return await run_to_completion(asyncio.to_thread(function, *args, **kwargs), if_it_fails="Meanwhile")


def _keep(path: Path, kept: Path) -> None:
    try:
        os.link(path, kept)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy(path, kept)


def _copy(path: Path, kept: Path) -> None:
    """Copy the file, for file systems without hard links."""
    with path.open("rb") as source, os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as to:
        shutil.copyfileobj(source, to, _COPY_BYTES)
        to.flush()
        os.fsync(to.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove temp files whose writers were killed, so that a crash loop does not fill the disk."""
    for entry in path.parent.iterdir():
        if entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp"):
            with contextlib.suppress(OSError):  # another writer may have removed it
                if _is_dead(entry):
                    entry.unlink()


def _is_dead(temp: Path) -> bool:
    idle_s = time.time() - temp.stat().st_mtime
    if idle_s < _FRESH_S:
        return False
    descriptor = os.open(temp, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return idle_s > _DEAD_S
    else:
        return True
    finally:
        os.close(descriptor)
