"""All that fedrun says: one function over the standard library's `logging`.

The command prints lines to standard output, warnings and errors to standard error. A program that
uses fedrun as a library gets them from `logging.getLogger("fedrun")` and handles them as it likes.
"""

from __future__ import annotations

import logging
import sys
from logging import ERROR, INFO, WARNING

from fedrun.common.terminal import visible

__all__ = ["ERROR", "INFO", "LOGGER", "WARNING", "log", "print_log"]
LOGGER = logging.getLogger("fedrun")
_PREFIXES = {INFO: "fedrun: ", WARNING: "fedrun: warning: ", ERROR: "fedrun: error: "}


def log(line: str, level: int = INFO, trace: str = "") -> None:
    """Say one line, without a prefix for its level; `trace`: a traceback that belongs to it."""
    LOGGER.log(level, "%s", line, extra={"trace": trace})


def print_log(quiet: bool = False) -> None:
    """For the command: print what is said. With `quiet`, warnings and errors alone, since one
    process a machine is enough for the rest."""
    if not any(isinstance(handler, _Terminal) for handler in LOGGER.handlers):
        LOGGER.addHandler(_Terminal())
    LOGGER.setLevel(WARNING if quiet else INFO)


class _Terminal(logging.Handler):
    """Prints above a progress bar, if there is one. An error of the stream is the caller's, as
    with `print`: whoever reads may have seen enough."""

    def emit(self, record: logging.LogRecord) -> None:
        line = visible(record.getMessage(), keep="\n\t")
        text = f"{getattr(record, 'trace', '')}{_PREFIXES[record.levelno]}{line}\n"
        stream = sys.stdout if record.levelno < WARNING else sys.stderr
        if tqdm := getattr(sys.modules.get("tqdm"), "tqdm", None):  # None while it is imported
            with tqdm.external_write_mode(file=stream):
                stream.write(text)
        else:
            stream.write(text)
        stream.flush()
