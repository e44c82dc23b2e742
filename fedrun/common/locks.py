"""Locks between processes, each on a file: for a run's folder and for an entry of the token cache.

The kernel holds the lock (flock) and frees it however its owner ends. File systems without flock,
such as many NFS and Lustre mounts, use a second file as the lock, NAME.held. It is created by one
process only, names its owner, and is touched by it every few seconds. It is void if it has not
changed for a minute, or if its owner was a process of this machine and has ended.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedrun.common.errors import FedrunError
from fedrun.common.log import WARNING, log

SECONDS_BETWEEN_TOUCHES = 5.0  # by a lock's owner
SECONDS_UNTIL_STALE = 60.0  # without a touch, as observed by others; then they may take it over
SECONDS_TO_SETTLE = 0.5  # after which the last of several processes that take it over owns it
SECONDS_BETWEEN_ATTEMPTS = 0.1
HELD = ".held"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Busy(FedrunError):
    """Another process holds the lock. The message says which, if that is known."""


class Held:
    """A lock that this process holds until `release`, or until it ends.

    The first line of the lock's file names the owner; the owner chooses the other lines.
    """

    def __init__(self, path: Path, file: int, lock: _KernelLock | _FileLock) -> None:
        self.path, self._file, self._lock = path, file, lock

    def write(self, *lines: str) -> None:
        """Write this process's name and these lines into the lock's file. OSError if the file
        belongs to another user."""
        if fcntl.fcntl(self._file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, "".join(f"{line}\n" for line in (this_process(), *lines)).encode(), 0)
        os.fsync(self._file)

    def release(self) -> None:
        """Free the lock. Its file stays."""
        self._lock.release()
        os.close(self._file)


def this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def acquire(path: Path, patience: float, on_wait: Callable[[str], None] = lambda owner: None
            ) -> Held:
    """Acquire the lock on a file. The file and its folder are created if necessary.

    patience: seconds to wait for another process that holds the lock. If that process may have died
    and the kernel does not free its lock, wait in any case until that is certain.
    on_wait: called once with the owner's name if another process holds the lock.

    Raises:
        Busy: another process still holds the lock.
        OSError: the file cannot be opened.
    """
    file = _open(path)
    lock: _KernelLock | _FileLock = _KernelLock(path, file)
    waiting = False
    deadline = time.monotonic() + patience
    try:
        while not lock.try_acquire():
            if isinstance(lock, _KernelLock) and lock.unsupported:
                lock = _FileLock(path)
                _warn_once(path)
                continue
            if not waiting:
                on_wait(lock.owner)
                waiting = True
            if time.monotonic() > deadline and not lock.owner_may_be_dead:
                raise Busy(lock.owner)
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
    except BaseException:
        os.close(file)
        raise
    return Held(path, file, lock)


def _open(path: Path) -> int:
    """Open the file, read-only if it belongs to another user. Existing files are opened without
    O_CREAT: in folders such as /tmp Linux refuses it for files of other users."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT):
        try:
            return os.open(path, flags | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.exists():
                raise
            break
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class _KernelLock:
    """The kernel's lock on an open file (flock)."""

    owner_may_be_dead = False

    def __init__(self, path: Path, file: int) -> None:
        self.path, self.file = path, file
        self.unsupported = False
        """Whether the file system has no flock."""

    @property
    def owner(self) -> str:
        """The lock's owner, from the first line of the file."""
        with suppress(OSError):
            name = self.path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            return name or "another process"
        return "another process"

    def try_acquire(self) -> bool:
        """Acquire the lock if it is free."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EBADF:  # another user's file on a network file system
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path)
                                      ) from None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, *NO_LOCKS):
                raise
            self.unsupported = error.errno in NO_LOCKS
            return False
        with suppress(OSError):
            if os.path.samestat(self.path.stat(), os.fstat(self.file)):
                return True
        # The file was removed: its lock protects nothing. Open the new file under the same number.
        os.dup2(reopened := _open(self.path), self.file, inheritable=False)
        os.close(reopened)
        return self.try_acquire()

    def release(self) -> None:
        """Nothing to do: closing the file frees the lock."""


_warned: set[str] = set()


def _warn_once(path: Path) -> None:
    if not _warned:
        log(f"the file system of {path.parent} has no locks (flock): files *{HELD} take their "
            f"place, for up to {SECONDS_UNTIL_STALE:.0f} s after a process has died", WARNING)
    _warned.add(str(path))


class _FileLock:
    """The file NAME.held, in place of a lock of the kernel."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + HELD)
        self.owner = "another process"
        """The lock's owner at the last attempt."""
        self.owner_may_be_dead = True
        """Whether the owner has not touched the file since the first attempt."""
        self._content = json.dumps({"holder": this_process(), "pid": os.getpid(),
                                    "began": _start_time(os.getpid()), "machine": _machine_id(),
                                    "token": secrets.token_hex(8)})
        self._seen: tuple[object, float] = (None, 0.0)  # state of the file, and since when
        self._file = -1
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_touching, name="fedrun-lock", daemon=True)

    def try_acquire(self) -> bool:
        """Create the file, or take it over if its owner is dead."""
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
                                 0o666)
        except FileExistsError:
            return self._owner_is_dead() and self._take_over()
        os.write(self._file, self._content.encode())
        self._thread.start()
        return True

    def _owner_is_dead(self) -> bool:
        try:
            with self.path.open("rb") as file:  # opening makes network file systems look again
                content, status = file.read(10_000), os.fstat(file.fileno())
        except FileNotFoundError:
            return False
        now, state = time.monotonic(), (content, status.st_ino, status.st_mtime_ns)
        if self._seen[0] != state:
            self.owner_may_be_dead = self._seen[0] is None
            self._seen = state, now
        owner = _parse(content)
        self.owner = str(owner.get("holder", "another process"))
        if owner.get("machine") == _machine_id():
            self.owner_may_be_dead = False
            return _start_time(owner.get("pid")) != owner.get("began")
        return now - self._seen[1] >= SECONDS_UNTIL_STALE

    def _take_over(self) -> bool:
        """Replace the file by our own. If several processes do so, the last one owns the lock."""
        mine = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        self._file = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.write(self._file, self._content.encode())
        os.replace(mine, self.path)
        time.sleep(SECONDS_TO_SETTLE)
        if not self._is_mine():
            os.close(self._file)
            return False
        self._thread.start()
        return True

    def _is_mine(self) -> bool:
        with suppress(OSError):
            return self.path.read_bytes() == self._content.encode()
        return False

    def _keep_touching(self) -> None:
        while not self._released.wait(SECONDS_BETWEEN_TOUCHES):
            with suppress(OSError):  # by number: another process may have replaced the file
                os.utime(self._file)

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if self._is_mine():
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def _parse(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        owner = json.loads(content)
        if isinstance(owner, dict):
            return owner
    return {}


def _start_time(pid: Any) -> float | None:
    """When a process of this machine started, which distinguishes it from a later one with the same
    ID; None if there is no such process."""
    import psutil
    with suppress(psutil.Error, TypeError, ValueError, OverflowError):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return float(process.create_time())
    return None


def _machine_id() -> str:
    """Shared by processes that see each other's IDs. Containers of one machine do not, even if they
    use its name."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return platform.node()
