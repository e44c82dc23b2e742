"""The lock of a run's folder: one run at a time writes there.

The lock file holds a token, by which the run's other processes, on other machines too, verify that
they see the same folder. Before every write it is checked that the folder is still this run's.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fedrun.common import locks
from fedrun.common.errors import FolderLost, InputError
from fedrun.common.files import claim
from fedrun.records.run_files import LOCK

SECONDS_TO_DIE = 3.0  # that a killed run may take to release its folder


class RunDirLocked(InputError):
    """Another run holds the folder."""


_held_locks: dict[Path, locks.Held] = {}  # by folder, those of this process


def lock_run_dir(run_dir: Path, token: str) -> None:
    """Hold the folder until `release_run_dir`, or until this process ends in any way, and write the
    token into its lock file.

    Raises:
        RunDirLocked: another run holds the folder; the message names it.
        OSError: the lock file cannot be written.
    """
    try:
        held = locks.acquire(run_dir / LOCK, SECONDS_TO_DIE)
    except locks.Busy as holder:
        raise RunDirLocked(f"the folder {run_dir} is in use by {holder}; wait for it, or choose "
                           "another --run_name") from None
    try:
        held.write(token)
    except OSError:
        held.release()
        raise
    _held_locks[run_dir] = held
    claim(run_dir, lambda: check_ownership(run_dir, token))


def guard_run_dir(run_dir: Path, token: str) -> None:
    """For the run's other processes: write into the folder only while it is this run's."""
    if run_dir not in _held_locks:
        claim(run_dir, lambda: check_ownership(run_dir, token))


def release_run_dir(run_dir: Path) -> None:
    """Release the folder, when this process's run has ended and nothing of it writes any more."""
    claim(run_dir, None)
    if held := _held_locks.pop(run_dir, None):
        held.release()


def holds_lock(run_dir: Path) -> bool:
    """Whether this process holds the folder's lock."""
    return run_dir in _held_locks


def check_ownership(run_dir: Path, token: str) -> None:
    """Raise FolderLost if the lock file does not hold the token: the folder was removed or renamed,
    or another run has it, which must not find our files in it."""
    try:
        text = (run_dir / LOCK).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise FolderLost(f"{run_dir}: the folder of this run was removed or renamed while it ran; "
                         "the run ends, and has written nothing since") from None
    except OSError:
        return  # the disk does not respond: the write itself will raise
    if _token(text) != token:
        holder = text.partition("\n")[0]
        raise FolderLost(f"{run_dir}: the folder of this run was taken by {holder} while it ran; "
                         "this run ends, and has written nothing since")


def lock_token(run_dir: Path) -> str:
    """The token in a folder's lock file; empty if there is none, or not yet on this machine."""
    with suppress(OSError):
        return _token((run_dir / LOCK).read_text(encoding="utf-8", errors="replace"))
    return ""


def _token(text: str) -> str:
    """The last complete line: `Held.write` puts the holder's name first, then the token."""
    return text.rpartition("\n")[0].rpartition("\n")[2]
