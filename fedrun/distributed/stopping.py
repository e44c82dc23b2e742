"""Orderly ends that someone asks for: SIGTERM, SIGINT, a closed terminal (SIGHUP), a STOP file in
the run's folder.

The first request ends the run at the next round boundary, with a checkpoint; a second signal ends
the process at once, and so does one while a peer is gone, since the boundary would never come.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedrun.common.errors import FolderLost
from fedrun.common.files import DamagedFile, check_claim, read_regular

STOP = "STOP"
REFUSED = "FEDRUN_REFUSED"  # the variable that names a file: see `refuse`
LAUNCHER = "FEDRUN_LAUNCHER"  # the variable by which a launcher tells its process id (torchrun.py)
LARGEST = 1000  # bytes in it, or it is none
HEARTBEAT = "fedrun-heartbeat"  # the thread that tells other ranks of this one (control_plane.py)
SECONDS_BETWEEN_LOOKS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DOUBLE = 0.5  # seconds within which two signals are one: launchers send what the terminal sent too
SECONDS_TO_INTERRUPT = 1.0
_INTERRUPTED = "fedrun: interrupted; the same command starts again, or resumes"
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop.

    Signals are read by a thread, since the main one may wait in a collective for as long as a round
    takes, and Python runs handlers between its own instructions only.
    """

    def __init__(self, run_dir: Path, lock: Path, lost_peers: Callable[[], list[int]], quiet: bool
                 ) -> None:
        """run_dir: where a STOP file is obeyed; lock: what rank 0 wrote there when the run began;
        quiet: say nothing of signals."""
        self.signal = ""
        """The name of the first signal; empty without one."""
        self._file = run_dir / STOP
        # By the clock of the file system, as STOP's time is: rank 0 has just written the lock.
        self._since = lock.stat().st_mtime
        self._ignored = ""
        self._looked = 0.0
        self._lost_peers = lost_peers
        self._quiet = quiet
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watch_peers, name="fedrun-peers", daemon=True)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Obey signals inside; off the main thread, where Python allows no handlers, only files."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        here, there = socket.socketpair()
        there.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS
                  if number != signal.SIGHUP or not hangup_ignored()}
        old_fd = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(here,), name="fedrun-signals",
                                  daemon=True)
        thread.start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            there.close()
            self._over.set()
            for running in (thread, self._watch):  # none may be inside the store when Python ends
                if running.is_alive():
                    running.join()
            here.close()

    def _listen(self, signals: socket.socket) -> None:
        first = 0.0
        while received := signals.recv(1):
            if received[0] not in SIGNALS:
                continue  # its handler was there before
            name = signal.Signals(received[0]).name
            if self.signal and time.monotonic() - first > DOUBLE:
                self._end(received[0], f"{name} again: ends at once")
            if not self.signal:
                self.signal, first = name, time.monotonic()
                if not self._quiet:
                    print(f"fedrun: {name}: stops after this round (once more: at once)",
                          file=sys.stderr, flush=True)
                self._watch.start()

    def _watch_peers(self) -> None:
        """A launcher that has lost one process sends the others SIGTERM."""
        while not self._over.wait(1.0):
            lost = self._lost_peers()
            if lost and not self._over.is_set():
                self._end(signal.Signals[self.signal], f"{self.signal}, and no sign of life from "
                          f"rank {', '.join(map(str, lost))}: ends at once")

    def _end(self, number: int, why: str) -> None:
        print(f"fedrun: {why}", file=sys.stderr, flush=True)
        os._exit(128 + number)

    def lost_folder(self) -> str:
        """Server: why the run's folder is no longer this run's; empty while it is. Looked at once a
        second at most: opening a file takes long on a network file system."""
        if time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            try:
                check_claim(self._file)
            except FolderLost as lost:
                return str(lost)
        return ""

    def asked_by(self) -> str:
        """Server: who asks for an end: a signal by its name, or the STOP file; empty if nobody."""
        return self.signal or ("the STOP file" if self._file_says_so() else "")

    def _file_says_so(self) -> bool:
        """Whether the STOP file is there and meant for this start of this job.

        An empty file (`touch`) is meant for whoever runs; a launcher writes its job and attempt
        into it, since a job that was put back into the queue must not obey what ended it. One that
        is older than the start is of an earlier run.
        """
        try:
            if self._file.stat().st_mtime < self._since:
                return False
            meant_for = read_regular(self._file, LARGEST).decode(errors="replace").split()
        except OSError:
            return False
        except DamagedFile as error:
            self._ignore(f"{error}; an empty file stops the run")
            return False
        here = [os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")]
        if not meant_for or meant_for == here:
            return True
        self._ignore(f"{self._file} is for job and attempt {' '.join(meant_for)}; an empty one is "
                     "for any run")
        return False

    def _ignore(self, why: str) -> None:
        if self._ignored != why:
            self._ignored = why
            print(f"fedrun: {STOP} is ignored: {why}", flush=True)

    def obeyed(self) -> None:
        """Server: the file has done its work."""
        if self._file.is_file():
            self._file.unlink(missing_ok=True)


def hangup_ignored() -> bool:
    """Whether a closed terminal is nothing to us, as under nohup."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def interruptible(command: Callable[[], int]) -> int:
    """The exit code of a command; after Ctrl-C one line, and 130.

    Python raises KeyboardInterrupt between its own instructions only. Where the main thread does
    not come to that for a while, as in the training of a tokenizer, a thread ends the process.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return command()  # as for a shell's background jobs
    here, there = socket.socketpair()
    there.setblocking(False)
    raised = threading.Event()

    def interrupt(*_: object) -> None:
        raised.set()
        raise KeyboardInterrupt

    def watch() -> None:
        while received := here.recv(1):
            if (received[0] == signal.SIGINT and not raised.wait(SECONDS_TO_INTERRUPT)
                    and signal.getsignal(signal.SIGINT) == interrupt):
                print(_INTERRUPTED, file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, name="fedrun-interrupt", daemon=True).start()
    try:
        return command()
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


class _Terminal(io.FileIO):
    """A terminal that may be closed: what is written then is lost, and no error."""

    def write(self, text: Any, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(text)


def outlive_terminal() -> None:
    """Let standard output and error be written to after their terminal is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            raw = _Terminal(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding,
                                                stream.errors, line_buffering=True))


def refuse() -> None:
    """Tell our launcher that the user has to change something, so that it starts nothing again."""
    if mark := os.environ.get(REFUSED):
        with suppress(OSError):
            Path(mark).touch()


def die_with_launcher() -> None:
    """End this process when the one that started it ends, however that happens.

    By the kernel, where it is Linux's: a process that is stopped or inside a kernel dies as well.
    One that has ended before it could be watched is noticed here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if _launcher_is_gone():
        os._exit(1)  # without a word: nobody has asked for this process any more


def _launcher_is_gone() -> bool:
    """Whether the process that started this one has ended already.

    Another parent than the launcher is a script that it was told to start ranks by, or whoever
    adopts orphans. torchrun does not tell its number, but serves the store that ranks meet in from
    before it starts them: on the first machine it is gone where nobody listens any more.
    """
    if number := os.environ.get(LAUNCHER):
        if os.getppid() == int(number):
            return False
        import psutil  # seldom needed, and this is before all else
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    address = "127.0.0.1" if one_machine else os.environ["MASTER_ADDR"]
    try:
        socket.create_connection((address, int(os.environ["MASTER_PORT"])), timeout=2).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False
