"""Locks that one process holds by a file, for a run's folder and for an entry of the token cache.

The kernel keeps them (flock), and frees them however their holder ends. Where the file system has
none, as many NFS and Lustre mounts, a second file stands for the lock, NAME.held: made by one
process alone, it names its owner, who touches it every few seconds. It counts for nothing once it
has not changed for a minute, or its owner was a process of this machine and is gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

BEAT = 5.0  # seconds between an owner's signs of life
STALE = 60.0  # seconds without one, as others have watched, until a lock may be taken over
SETTLE = 0.5  # seconds after which the last one of several that take it over at once has done so
POLL = 0.1
HELD = ".held"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Busy(Exception):
    """Another process holds the lock; the text says which, as far as that is known."""


class Held:
    """A lock until it is released, or this process ends.

    The first line of the lock's file names the holder; what else it says is the holder's.
    """

    def __init__(self, path: Path, file: int, lock: _Kernel | _Owner) -> None:
        self.path, self._file, self._lock = path, file, lock

    def write(self, *lines: str) -> None:
        """Write the file: this process, and more lines. OSError where another user owns it."""
        if fcntl.fcntl(self._file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, "".join(f"{line}\n" for line in (this_process(), *lines)).encode(), 0)
        os.fsync(self._file)

    def release(self) -> None:
        """Give it up; the file stays."""
        self._lock.end()
        os.close(self._file)


def this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def acquire(path: Path, patience: float, waits: Callable[[str], None] = lambda holder: None,
            say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
            ) -> Held:
    """Hold the lock of a file, which is made where there is none, its folder too.

    waits: called with the holder's name where another process has it. `patience`: seconds to wait
    for that one; one that has died without the kernel freeing its lock is waited for until that is
    certain. Raises Busy, and OSError where the file cannot be opened.
    """
    file = _open(path)
    lock: _Kernel | _Owner = _Kernel(path, file)
    told = False
    deadline = time.monotonic() + patience
    try:
        while not lock.attempt():
            if isinstance(lock, _Kernel) and lock.missing:
                lock = _Owner(path)
                _say_once(path, say)
                continue
            if not told:
                waits(lock.holder)
                told = True
            if time.monotonic() > deadline and not lock.maybe_dead:
                raise Busy(lock.holder)
            time.sleep(POLL)
    except BaseException:
        os.close(file)
        raise
    return Held(path, file, lock)


def _open(path: Path) -> int:
    """The open file, read-only where another user owns it. Others' files are opened without
    O_CREAT, which Linux refuses for them in folders such as /tmp."""
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


class _Kernel:
    """The kernel's lock of an open file."""

    maybe_dead = False

    def __init__(self, path: Path, file: int) -> None:
        self.path, self.file = path, file
        self.missing = False
        """Whether the file system has no locks."""

    @property
    def holder(self) -> str:
        """Who has it, by the file's first line."""
        with suppress(OSError):
            name = self.path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            return name or "another process"
        return "another process"

    def attempt(self) -> bool:
        """Take the lock if it is free."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EBADF:  # a network file system, and a file of another user's
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path)
                                      ) from None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, *NO_LOCKS):
                raise
            self.missing = error.errno in NO_LOCKS
            return False
        with suppress(OSError):
            if os.path.samestat(self.path.stat(), os.fstat(self.file)):
                return True
        os.dup2(renewed := _open(self.path), self.file, inheritable=False)  # it was removed
        os.close(renewed)
        return self.attempt()

    def end(self) -> None:
        """Closing the file frees the lock."""


_said: set[str] = set()


def _say_once(path: Path, say: Callable[[str], None]) -> None:
    if not _said:
        say(f"fedrun: warning: the file system of {path.parent} has no locks (flock): files "
            f"*{HELD} stand for them, for up to {STALE:.0f} s after a process has died")
    _said.add(str(path))


class _Owner:
    """The file NAME.held, in place of a lock of the kernel's."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + HELD)
        self.holder = "another process"
        """Who has it, as of the last attempt."""
        self.maybe_dead = True
        """Whether that one has shown no sign of life since we look."""
        self._mine = json.dumps({"holder": this_process(), "pid": os.getpid(), "began": _began(
            os.getpid()), "machine": _machine(), "token": secrets.token_hex(8)})
        self._seen: tuple[object, float] = (None, 0.0)
        self._file = -1
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fedrun-lock", daemon=True)

    def attempt(self) -> bool:
        """Make the file, or take it over where its owner is dead."""
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
                                 0o666)
        except FileExistsError:
            return self._is_dead() and self._take_over()
        os.write(self._file, self._mine.encode())
        self._thread.start()
        return True

    def _is_dead(self) -> bool:
        try:
            with self.path.open("rb") as file:  # opening it makes a network file system look again
                content, status = file.read(10_000), os.fstat(file.fileno())
        except FileNotFoundError:
            return False
        now, state = time.monotonic(), (content, status.st_ino, status.st_mtime_ns)
        if self._seen[0] != state:
            self.maybe_dead = self._seen[0] is None
            self._seen = state, now
        owner = _parse(content)
        self.holder = str(owner.get("holder", "another process"))
        if owner.get("machine") == _machine():
            self.maybe_dead = False
            return _began(owner.get("pid")) != owner.get("began")
        return now - self._seen[1] >= STALE

    def _take_over(self) -> bool:
        """Put our file in its place; of several who do, the last one has it."""
        mine = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        self._file = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.write(self._file, self._mine.encode())
        os.replace(mine, self.path)
        time.sleep(SETTLE)
        if not self._is_mine():
            os.close(self._file)
            return False
        self._thread.start()
        return True

    def _is_mine(self) -> bool:
        with suppress(OSError):
            return self.path.read_bytes() == self._mine.encode()
        return False

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):  # the file itself, whoever may have put another in its place
                os.utime(self._file)

    def end(self) -> None:
        self._over.set()
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


def _began(pid: Any) -> float | None:
    """When a process of this machine began, by which it is told from a later one with its number;
    None where there is none."""
    import psutil
    with suppress(psutil.Error, TypeError, ValueError, OverflowError):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return float(process.create_time())
    return None


def _machine() -> str:
    """What processes have in common that see each other by number: containers of one machine,
    which may have its name, do not."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return platform.node()
