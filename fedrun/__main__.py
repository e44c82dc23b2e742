"""`python -m fedrun ...` and the console script `fedrun`."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports that follow

import os
import threading

from fedrun.common.errors import explain
from fedrun.common.limits import TooLittle, require_memory, shortage
from fedrun.common.log import ERROR, log, print_log
from fedrun.common.terminal import make_printable
from fedrun.distributed.launch import detect
from fedrun.distributed.stopping import (
    HEARTBEAT_THREAD,
    LAUNCHER,
    die_with_launcher,
    end_process,
    interruptible,
    outlive_terminal,
)


def main() -> None:
    launch = detect(os.environ)
    make_printable()
    print_log(quiet=launch.local_rank > 0)
    outlive_terminal()
    threading.excepthook = _report_thread_error
    if launch.alone:
        if LAUNCHER in os.environ:  # a run of a study
            die_with_launcher()
        code = interruptible(command)
    else:
        die_with_launcher()  # before the imports, which take seconds
        # Python's handler would run only after the collective that the main thread is in.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        code = command()
    # A heartbeat that the store does not let go would abort Python's shutdown.
    in_store = any(thread.name == HEARTBEAT_THREAD for thread in threading.enumerate())
    if code or in_store:
        end_process(code)


def _report_thread_error(failed: threading.ExceptHookArgs) -> None:
    """Report an error in a thread, such as a library's, as one in the main thread: in one line if
    the user or the machine caused it."""
    line = explain(failed.exc_value) if failed.exc_value else None
    if line is None:
        threading.__excepthook__(failed)
    else:
        log(line, ERROR)


def command() -> int:
    """Run the command line; return its exit code. If memory or threads are too few even for
    the imports, print one line."""
    try:
        require_memory()
        from fedrun import cli
        return cli.main()
    except Exception as error:
        if why := str(error) if isinstance(error, TooLittle) else shortage(error):
            log(why, ERROR)
            return 1
        raise


if __name__ == "__main__":
    main()
