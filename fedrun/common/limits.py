"""Limits of this machine or shell for a process: open files, memory, threads. Needs no torch.

If a limit is too low, libraries fail with obscure messages, or abort without one.
"""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import psutil

from fedrun.common.errors import InputError, one_line

LEAST_MEMORY = 700 << 20  # bytes of address space; with less, torch aborts while it is imported
_MEMORY = ("allocate memory", "bad_alloc", "failed to map segment", "out of memory")
_THREADS = ("start new thread", "resource temporarily unavailable")


class TooLittle(InputError):
    """A limit is lower than needed. The message names it and how to raise it."""


def require_memory() -> None:
    """Raise TooLittle if the address space is limited to less than torch alone takes."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_MEMORY:
        raise TooLittle(f"a process may have {limit >> 20} MiB of memory here (`ulimit -v`), but "
                        f"needs at least {LEAST_MEMORY >> 20} MiB to start: raise the limit")


def require_files(processes: int) -> None:
    """Raise the limit of open files, for this process and those it starts, to what that many
    connected ranks need. TooLittle if the system's limit is lower."""
    needed = 20 + 4 * processes  # a connection to each other rank in three groups, and spare
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise TooLittle(f"a process may have {hard} open files here (`ulimit -n`), but "
                            f"{processes} processes need {needed} each: raise the limit or start "
                            "fewer")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def shortage(error: BaseException) -> str:
    """The cause, in one line, of an error that a limit of the machine caused; empty for others."""
    text, number = one_line(error), error.errno if isinstance(error, OSError) else None
    low = text.lower()
    if number in (errno.EMFILE, errno.ENFILE) or "too many open files" in low:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files; a process may have {files} here (`ulimit -n`): {text}"
    if number == errno.EAGAIN or any(words in low for words in _THREADS):
        return (f"no more threads, or no memory for them{memory_limit()}; the limit of threads is "
                f"{resource.getrlimit(resource.RLIMIT_NPROC)[0]} (`ulimit -u`): {text}")
    if number == errno.ENOMEM or isinstance(error, MemoryError) or any(
            words in low for words in _MEMORY):
        return f"out of memory{memory_limit()}: {text or 'no room for Python itself'}"
    return ""


def memory_limit() -> str:
    """The limit of the address space as part of a sentence; empty if there is none."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit == resource.RLIM_INFINITY else (
        f", of which a process may have {limit >> 20} MiB here (`ulimit -v`)")

def machine_memory() -> int:
    """The most bytes of memory and swap that this process may use."""
    have = int(psutil.virtual_memory().total) + int(psutil.swap_memory().total)
    try:
        return min(have, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no control groups, or "max"
        return have
