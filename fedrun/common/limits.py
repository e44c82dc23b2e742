"""What this machine or the shell allows a process: files, memory, threads. Needs no torch.

Where it is too little, libraries fail in words of their own, or abort without any.
"""

from __future__ import annotations

import errno
import resource

from fedrun.common.errors import InputError, one_line

LEAST_MEMORY = 700 << 20  # bytes of addresses; torch aborts where it is not loaded into less
_MEMORY = ("allocate memory", "bad_alloc", "failed to map segment", "out of memory")
_THREADS = ("start new thread", "resource temporarily unavailable")


class TooLittle(InputError):
    """A limit below what is needed; the message names it, and how to raise it."""


def require_memory() -> None:
    """TooLittle where addresses are limited to less than torch alone takes."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_MEMORY:
        raise TooLittle(f"a process may have {limit >> 20} MiB of memory here (`ulimit -v`), and "
                        f"at least {LEAST_MEMORY >> 20} MiB are needed to begin: raise it")


def require_files(processes: int) -> None:
    """Allow this process, and those it starts, the open files that ranks connected to each other
    need; TooLittle where the system's limit is below."""
    needed = 20 + 4 * processes  # a connection to each other rank in three groups, and some spare
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise TooLittle(f"a process may have {hard} open files here (`ulimit -n`), and "
                            f"{processes} processes need {needed}: raise it, or start fewer")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def shortage(error: BaseException) -> str:
    """The cause in one line where an error comes from a limit of the machine; empty for others."""
    text, number = one_line(error), error.errno if isinstance(error, OSError) else None
    low = text.lower()
    if number in (errno.EMFILE, errno.ENFILE) or "too many open files" in low:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files; a process may have {files} here (`ulimit -n`): {text}"
    if number == errno.EAGAIN or any(words in low for words in _THREADS):
        return (f"no more threads or memory for them{memory_limit()}; the limit of threads is "
                f"{resource.getrlimit(resource.RLIMIT_NPROC)[0]} (`ulimit -u`): {text}")
    if number == errno.ENOMEM or isinstance(error, MemoryError) or any(
            words in low for words in _MEMORY):
        return f"out of memory{memory_limit()}: {text or 'no room for Python itself'}"
    return ""


def memory_limit() -> str:
    """In words, where addresses are limited; empty where they are not."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return "" if limit == resource.RLIM_INFINITY else (
        f", of which a process may have {limit >> 20} MiB here (`ulimit -v`)")
