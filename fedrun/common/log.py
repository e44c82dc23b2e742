"""All messages of fedrun: one function on top of the standard library's `logging`.

The command prints messages to standard output, warnings and errors to standard error. A program
that uses fedrun as a library receives them from `logging.getLogger("fedrun")`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from logging import ERROR, INFO, WARNING
from pathlib import Path

from fedrun.common.terminal import visible

__all__ = ["ERROR", "INFO", "LOGGER", "WARNING", "keep_log", "log", "print_log"]
LOGGER = logging.getLogger("fedrun")
_PREFIXES = {INFO: "fedrun: ", WARNING: "fedrun: warning: ", ERROR: "fedrun: error: "}


def log(line: str, level: int = INFO, trace: str = "") -> None:
    """Log a message of one line. The prefix for its level is added when it is printed.

    trace: a traceback to print above it.
    """
    LOGGER.log(level, "%s", line, extra={"trace": trace})


def print_log(quiet: bool = False, to_stderr: bool = False) -> None:
    """For commands: print messages.

    quiet: only warnings and errors, since the first process of each machine prints the rest.
    to_stderr: print everything to standard error, for commands whose result goes to standard
    output.
    """
    for handler in LOGGER.handlers:
        if isinstance(handler, _Terminal):
            handler.to_stderr = to_stderr
            break
    else:
        LOGGER.addHandler(_Terminal(to_stderr))
    LOGGER.setLevel(WARNING if quiet else INFO)


def keep_log(path: Path) -> None:
    """Also append all messages, and their tracebacks, to a file for its owner alone. OSError if
    this file cannot be written."""
    for handler in LOGGER.handlers:
        if isinstance(handler, _File) and handler.path == path:
            return
    os.close(_open(path))
    LOGGER.addHandler(_File(path))


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)


class _File(logging.Handler):
    """Appends each message in one write, since several processes share the file. A disk that is
    full later on costs the message, not the run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        text = (f"{getattr(record, 'trace', '')}{when} process {os.getpid()} "
                f"{record.levelname.lower()}: {record.getMessage()}\n")
        with suppress(OSError), open(_open(self.path), "wb") as file:
            file.write(text.encode(errors="backslashreplace"))


class _Terminal(logging.Handler):
    """Prints above the progress bar, if there is one. As with `print`, an error of the stream is
    raised to the caller: the reader of a pipe may have closed it."""

    def __init__(self, to_stderr: bool) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        line = visible(record.getMessage(), keep="\n\t")
        text = f"{getattr(record, 'trace', '')}{_PREFIXES[record.levelno]}{line}\n"
        to_stdout = record.levelno < WARNING and not self.to_stderr
        stream = sys.stdout if to_stdout else sys.stderr
        if tqdm := getattr(sys.modules.get("tqdm"), "tqdm", None):  # None during its import
            with tqdm.external_write_mode(file=stream):
                stream.write(text)
        else:
            stream.write(text)
        stream.flush()
