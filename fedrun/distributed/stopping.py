"""How a process ends early: on SIGTERM, SIGINT, a closed terminal (SIGHUP), a STOP file in the
run's folder, or the death of its launcher.

The first signal ends the run at the next round boundary, with a checkpoint. A second one ends the
process at once. So does a first one while another rank is lost, since that boundary would never
come.

In a run of several ranks the process then ends by `end_process`. A single process raises
KeyboardInterrupt or SystemExit in its main thread, so that a notebook survives; `__main__` turns
them into the exit code.
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
from types import FrameType
from typing import Any, NoReturn

from fedrun.common.errors import FolderLost
from fedrun.common.files import DamagedFile, check_claim, read_regular
from fedrun.common.log import WARNING, log
from fedrun.distributed.launch import Launch

STOP = "STOP"
REFUSED = "FEDRUN_REFUSED"  # environment variable with the path of a file: see `refuse`
LAUNCHER = "FEDRUN_LAUNCHER"  # environment variable with the launcher's process ID (torchrun.py)
STOP_FILE_BYTES = 1000  # a larger file is not a stop request
HEARTBEAT_THREAD = "fedrun-heartbeat"  # name of the thread in control_plane.py
SECONDS_BETWEEN_LOOKS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SECONDS_TO_RAISE = 1.0
SECONDS_BETWEEN_SIGNALS = 0.2
_INTERRUPTED = "interrupted; run the same command again to start over or resume"
_PR_SET_PDEATHSIG = 1


def end_process(code: int) -> NoReturn:
    """End this process at once, without Python's shutdown: destructors of process groups would wait
    for ranks that are gone. The only place that does so.

    Only `__main__` calls this in a run of one process. Flushes standard output and error in the
    main thread; in others a flush could wait for the main thread forever.
    """
    if threading.current_thread() is threading.main_thread():
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # none, or closed
                stream.flush()
    os._exit(code)


def seconds_of_one_request(number: int) -> float:
    """Signals within this time after the first count as one: launchers forward what the terminal
    has sent as well. scancel sends SIGTERM to launcher and ranks alike, and a launcher that is
    short of processor time forwards its own seconds later."""
    return 10.0 if number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ else 0.5


class StopRequest:
    """Whether this process was asked to stop.

    A thread reads the signals: Python runs handlers only between its own instructions, and the main
    thread may wait in a collective for as long as a round takes.
    """

    def __init__(self, run_dir: Path | None, lock: Path | None,
                 lost_peers: Callable[[], list[int]], launch: Launch) -> None:
        """run_dir: the folder in which a STOP file is obeyed; lock: the file that rank 0 wrote
        there when the run began; None at a site, which has no such folder and obeys signals and the
        server's decisions. lost_peers: see `ControlPlane`."""
        self.signal = ""
        """Name of the first signal; empty if there was none."""
        self._file = None if run_dir is None else run_dir / STOP
        # In the clock of the file system, as STOP's own time is: rank 0 has just written the lock.
        self._since = 0.0 if lock is None else lock.stat().st_mtime
        self._ignored = ""
        self._last_look = 0.0
        self._lost_peers = lost_peers
        self._launch = launch
        self._last_signal = 0  # that ends a single process at once
        self._outer_wakeup = -1
        self._raised = threading.Event()
        self._sending = threading.Lock()
        self._over = threading.Event()
        self._peer_watch = threading.Thread(target=self._watch_peers, name="fedrun-peers",
                                            daemon=True)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Obey signals inside the block. Outside the main thread, where Python allows no handlers,
        obey only STOP files."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        here, there = socket.socketpair()
        there.setblocking(False)
        before = {number: signal.signal(number, self._raise_last) for number in SIGNALS
                  if number != signal.SIGHUP or not hangup_ignored()}
        self._outer_wakeup = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(here,), name="fedrun-signals",
                                  daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            with self._sending:  # no signal of `_end` may meet the handlers from before
                pass
            signal.set_wakeup_fd(self._outer_wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            there.close()
            # No thread may be inside the store during Python's shutdown.
            for running in (thread, self._peer_watch):
                if running.is_alive():
                    running.join()
            here.close()

    def _listen(self, signals: socket.socket) -> None:
        first = 0.0
        while received := signals.recv(1):
            number = received[0]
            if number not in SIGNALS or self._last_signal:
                continue  # not ours, or the one that `_end` has sent
            name = signal.Signals(number).name
            if self.signal and time.monotonic() - first > seconds_of_one_request(
                    number):
                self._end(number, f"second signal ({name}): exiting now")
            if not self.signal:
                self.signal, first = name, time.monotonic()
                if self._launch.rank == 0:
                    log(f"{name}: stopping after this round (send it again to exit now)")
                self._peer_watch.start()

    def _watch_peers(self) -> None:
        """A launcher that has lost one process sends SIGTERM to the others."""
        while not self._over.wait(1.0):
            lost = self._lost_peers()
            if lost and not self._over.is_set():
                self._end(signal.Signals[self.signal], f"{self.signal}, and no heartbeat from "
                          f"rank {', '.join(map(str, lost))}: exiting now")

    def _end(self, number: int, why: str) -> None:
        """End the process from another thread than the main one."""
        log(why, WARNING)
        if not self._launch.alone:
            end_process(128 + number)
        self._last_signal = number
        main_thread = threading.main_thread().ident
        assert main_thread
        if self._outer_wakeup >= 0:
            with suppress(OSError):  # tell `interruptible`, in case the main thread is stuck
                os.write(self._outer_wakeup, bytes([number]))
        # Again and again: one that arrives just before the main thread begins to wait does not wake
        # it.
        while True:
            with self._sending:
                if self._raised.is_set() or self._over.is_set():
                    return
                signal.pthread_kill(main_thread, number)  # calls `_raise_last` there
            self._raised.wait(SECONDS_BETWEEN_SIGNALS)

    def _raise_last(self, *_: int | FrameType | None) -> None:
        """The handler of all signals. Raises once `_end` has decided so, inside the block."""
        if not self._last_signal or self._over.is_set():
            return
        self._raised.set()
        if self._last_signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._last_signal)

    def lost_folder(self) -> str:
        """Server: why the run's folder is no longer this run's; empty while it is. Looks at most
        once a second: opening a file on a network file system is slow."""
        if self._file and time.monotonic() - self._last_look > SECONDS_BETWEEN_LOOKS:
            self._last_look = time.monotonic()
            try:
                check_claim(self._file)
            except FolderLost as lost:
                return str(lost)
        return ""

    def asked_by(self) -> str:
        """Server: what asks the run to stop: a signal's name or the STOP file; empty if nothing."""
        return self.signal or ("the STOP file" if self._stop_file_applies() else "")

    def _stop_file_applies(self) -> bool:
        """Whether there is a STOP file for this attempt of this job.

        An empty file (`touch`) is for any run. A launcher writes its job and attempt into it, since
        a requeued job must not obey the file that stopped it before. A file older than the start
        belongs to an earlier run.
        """
        if self._file is None:
            return False
        try:
            if self._file.stat().st_mtime < self._since:
                return False
            meant_for = read_regular(self._file, STOP_FILE_BYTES).decode(errors="replace").split()
        except OSError:
            return False
        except DamagedFile as error:
            self._ignore(f"{error}; an empty file stops the run")
            return False
        here = [os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")]
        if not meant_for or meant_for == here:
            return True
        self._ignore(f"{self._file} is for job and attempt {' '.join(meant_for)}; an empty file "
                     "stops any run")
        return False

    def _ignore(self, why: str) -> None:
        if self._ignored != why:
            self._ignored = why
            log(f"ignoring {STOP}: {why}", WARNING)

    def obeyed(self) -> None:
        """Server: the run has stopped; remove the STOP file."""
        if self._file and self._file.is_file():
            self._file.unlink(missing_ok=True)


def hangup_ignored() -> bool:
    """Whether this process ignores SIGHUP (a closed terminal), as under nohup."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def interruptible(command: Callable[[], int], is_handled: Callable[[], bool] = lambda: False
                  ) -> int:
    """Run the command of a single process; return its exit code, also if it raises SystemExit.
    After Ctrl-C print one line and return 130.

    Python raises KeyboardInterrupt only between its own instructions. If the main thread does not
    reach one within SECONDS_TO_RAISE, as while it trains a tokenizer, a thread ends the process,
    unless it finds that the signal `is_handled` by others than this function.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return command()  # a background job of the shell
    here, there = socket.socketpair()
    there.setblocking(False)
    raised = threading.Event()

    def interrupt(*_: object) -> None:
        raised.set()
        raise KeyboardInterrupt

    def watch() -> None:
        while received := here.recv(1):
            number = received[0]
            # Either SIGINT before the run, or the signal that ends the run at once, which its
            # StopRequest forwards.
            if (number in SIGNALS and not raised.wait(SECONDS_TO_RAISE)
                    and not is_handled()):
                if number == signal.SIGINT:
                    log(_INTERRUPTED, WARNING)
                end_process(128 + number)

    signal.signal(signal.SIGINT, interrupt)
    signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, name="fedrun-interrupt", daemon=True).start()
    try:
        return command()
    except KeyboardInterrupt:
        log(_INTERRUPTED, WARNING)
        return 128 + signal.SIGINT
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        raise


class _Terminal(io.FileIO):
    """A terminal that may be closed: later output is lost without an error."""

    def write(self, text: Any, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(text)


def outlive_terminal() -> None:
    """Allow writing to standard output and error after their terminal has been closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            raw = _Terminal(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding,
                                                stream.errors, line_buffering=True))


def refuse() -> None:
    """Tell the launcher not to restart: the user has to change something first."""
    if mark := os.environ.get(REFUSED):
        with suppress(OSError):
            Path(mark).touch()


def die_with_launcher() -> None:
    """End this process when the one that started it ends, for whatever reason.

    On Linux the kernel does so, even if this process is stopped or inside a kernel. If the launcher
    ended before the kernel was asked, this function ends the process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if _launcher_is_gone():
        end_process(1)  # without a message: nobody is waiting for this process any more


def _launcher_is_gone() -> bool:
    """Whether the process that started this one has already ended.

    A parent other than the launcher is either a script between the two or the process that adopts
    orphans. torchrun does not pass on its process ID, but it serves the ranks' store from before it
    starts them: on the first machine, torchrun has ended if nothing listens there.
    """
    if number := os.environ.get(LAUNCHER):
        if os.getppid() == int(number):
            return False
        import psutil  # rarely needed, and this code runs before everything else
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
