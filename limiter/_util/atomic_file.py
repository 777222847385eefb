"""Files that appear under their name whole or not at all. It knows nothing of what they hold.

Everything here blocks: call it from a thread where an event loop must not wait for a disk.
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
_DEAD_S = 3600.0  # without locks: a temp file that nobody wrote to for so long has lost its writer
_FRESH_S = 60.0  # a temp file is made, and only then locked
_LOCK_PAUSE_S = 0.02
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_COPY_BYTES = 1 << 20


class AtomicFile:
    """A file in the making: `write`, then `publish`; a block that ends without it leaves no trace.

    It is a temp file of its own name beside `path`, mode 0600. Raises OSError; the file at `path` then is as it was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # a link stays a link: what it points to is replaced
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if self.path.exists() and not self.path.is_file():  # root could put a file in the place of /dev/null
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        _sweep(self.path)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp")
        self._temp: Path | None = Path(name)
        self._is_synced = False
        self._stream = os.fdopen(descriptor, "wb", buffering=0)
        with contextlib.suppress(OSError):  # there are file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says to `_sweep` that its writer lives

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, data: bytes) -> None:
        """Append the data, all of it."""
        self._is_synced = False
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) :]

    def sync(self) -> None:
        """Bring what was written to disk."""
        if not self._is_synced:
            os.fsync(self._stream.fileno())
        self._is_synced = True

    def publish(self, *, keep_as: Path | None = None) -> os.stat_result:
        """Bring it to disk, then under its name; with keep_as, the file that it replaces stays under that one.

        Gives the new file's stat: its device and inode tell it from any other.
        """
        if self._temp is None:
            raise ValueError("this file is published or discarded already")
        self.sync()
        result = os.fstat(self._stream.fileno())
        if keep_as is not None:
            _keep(self.path, keep_as)
        self._temp.replace(self.path)
        self._temp = None
        self._stream.close()
        _sync_folder(self.path.parent)  # or a power loss takes the rename back
        return result

    def discard(self) -> None:
        """Remove what was written, unless it is published."""
        self._stream.close()
        if self._temp is not None:
            with contextlib.suppress(OSError):
                self._temp.unlink()
            self._temp = None


class FolderLock:
    """A lock beside a file, that a killed process loses: `with FolderLock(path) as lock: lock.acquire()`.

    Its file, `.<name>.lock`, stays: who removed it could take it away from under another.
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
        """Wait for it. Raises BlockingIOError when another has it for so long, and any other OSError."""
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
    """Give a name beside `path` that is not taken, as `credits.json.<suffix>`."""
    name = f"{path.name}.{suffix}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path.with_name(each) for each in names if not os.path.lexists(path.with_name(each)))


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run it in a thread, to its end even when the caller is cancelled: a file is never closed under its writer."""
    return await run_to_completion(asyncio.to_thread(function, *args, **kwargs), if_it_fails="Meanwhile")


def _keep(path: Path, kept: Path) -> None:
    try:
        os.link(path, kept)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy(path, kept)


def _copy(path: Path, kept: Path) -> None:
    """Copy where the file system has no hard links."""
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
    """Remove temp files whose writers were killed, or a crash loop would fill the disk."""
    for entry in path.parent.iterdir():
        if entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp"):
            with contextlib.suppress(OSError):  # another writer may have done it
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
